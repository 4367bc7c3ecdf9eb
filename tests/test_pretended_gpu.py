"""Every trainer and evaluation on a CUDA device that is not there: nothing on two devices, no wait for it in a step.

pretended_gpu/ makes the device; one process runs all cases and one pair all of those on two, for what was done to torch
there stays. Without a C++ compiler, or on a torch that the stand-in does not fit, the tests are skipped and counted.
"""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import ENV, TRAINERS, made_once, metrics, tiny_flags

import common

PRECISIONS = ["no", "bf16", "fp16"]
BF16_VIEWS = {"seed": "small-patch-size", "swav": "small-crop-size", "swav_disco": "small-crop-size"}
ON_TWO = ["smd", "seed", "disco", "rkd", "swav", "moco", "simsiam", "supervised", "crd"]
EVALS = {"eval_knn": {}, "eval_linear": {}, "eval_metrics": {"latency-runs": 0}, "eval_tsne": {}}
SPOILT = {  # what the device must notice -> trainer, text, sabotage
    "labels on the host": (
        "supervised",
        "cross_entropy(logits, batch.labels,",
        "cross_entropy(logits, batch.labels.cpu(),",
    ),
    "a number read in a step": ("simsiam", "run.watch(step, loss)", "run.watch(step, loss), loss.item()"),
    "a queue on the host": ("moco", "dim).to(device)", "dim)"),
}


def run(folder, cases: list[dict], processes: int) -> None:
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
    words = [
        *launcher,
        str(ROOT / "tests" / "pretended_gpu" / "steps.py"),
        folder / "cases.json",
        folder / "seen.json",
    ]
    env = {k: v for k, v in ENV.items() if k != "ACCELERATE_USE_CPU"}
    done = subprocess.run([sys.executable, *map(str, words)], env=env, capture_output=True, text=True, timeout=1200)
    if "NotHere" in done.stderr:
        (folder / "seen.json").write_text(json.dumps({"skip": done.stderr.strip().splitlines()[-1]}))
        return
    assert done.returncode == 0, done.stderr[-4000:]


def case(folder, name: str, trainer: str, teacher, precision: str, **changes) -> dict:
    steps = {} if trainer in EVALS and trainer != "eval_linear" else {"total-steps": 5, "save-every": 100}
    if trainer in EVALS:
        flag = "checkpoints" if trainer == "eval_tsne" else "checkpoint"
        flags = {
            "config": ROOT / "configs" / trainer / "tiny.toml",
            "run-dir": folder / name,
            flag: teacher,
            **EVALS[trainer],
        }
        words = [str(word) for key, value in {**flags, **steps, **changes}.items() for word in (f"--{key}", value)]
    else:
        words = tiny_flags(trainer, folder / name, teacher, **steps, **changes)
    return {"name": name, "trainer": trainer, "words": words, "precision": precision}


@pytest.fixture(scope="session")
def seen(tmp_path_factory, tiny_teacher) -> dict:
    """What one pretended device saw: {case: {"error", "waits", "ops", "low", "copies"}}."""

    def make(folder):
        cases = [case(folder, f"{t} {p}", t, tiny_teacher, p) for t in TRAINERS for p in PRECISIONS]
        cases += [case(folder, f"{t} {p}", t, tiny_teacher, p) for t in EVALS for p in ("no", "bf16")]
        for name, (trainer, *texts) in SPOILT.items():
            cases.append({**case(folder, name, trainer, tiny_teacher, "no"), "spoilt": texts})
        run(folder, cases, 1)

    folder = made_once(tmp_path_factory, "pretended", make)
    found = json.loads((folder / "seen.json").read_text())
    if "skip" in found:
        pytest.skip(found["skip"])
    return {name: {**what, "folder": folder / name} for name, what in found.items()}


@pytest.fixture(scope="session")
def seen_by_two(tmp_path_factory, tiny_teacher) -> dict:
    def make(folder):
        run(folder, [case(folder, name, name, tiny_teacher, "bf16") for name in ON_TWO], 2)

    folder = made_once(tmp_path_factory, "pretended_pair", make)
    found = json.loads((folder / "seen.json").read_text())
    if "skip" in found:
        pytest.skip(found["skip"])
    return {name: {**what, "folder": folder / name} for name, what in found.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", TRAINERS)
def test_a_step_stays_on_the_device_and_never_waits_for_it(method, precision, seen):
    found = seen[f"{method} {precision}"]
    assert not found["error"] and sum(found["ops"].values()) > 50
    assert found["waits"] == {}
    assert found["copies"] == [], "large copies that do not block must be pinned"


@pytest.mark.parametrize("method", TRAINERS)
def test_no_loss_is_computed_in_low_precision(method, seen):
    assert seen[f"{method} bf16"]["low"] == []


@pytest.mark.parametrize("method", TRAINERS)
def test_fp16_survives_an_overflow_on_its_first_step(method, seen):
    losses = [line["loss"] for line in metrics(seen[f"{method} fp16"]["folder"])]
    assert len(losses) == 5 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("method", ON_TWO)
def test_two_devices_never_wait_for_each_other_in_a_step(method, seen_by_two):
    found = seen_by_two[method]
    assert not found["error"] and found["waits"] == {} and len(metrics(found["folder"])) == 5
    facts = json.loads((found["folder"] / "environment.json").read_text())
    assert facts["num_processes"] == 2 and facts["device"] == "pretended"


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("name", EVALS)
def test_an_evaluation_stays_on_the_device(name, precision, seen):
    assert not seen[f"{name} {precision}"]["error"] and seen[f"{name} {precision}"]["waits"] == {}


def test_reports_of_a_trainer_are_those_of_the_cpu(seen, tiny_teacher, tmp_path):
    """kNN and health are computed on the device."""
    from runs import tiny_run

    lines = tiny_run("simsiam", tmp_path / "run", tiny_teacher, total_steps=5, save_every=100)
    there = seen["simsiam no"]["folder"]
    for ours, theirs in zip(lines, metrics(there), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", there))
    assert {k: v for k, v in theirs.items() if "knn" in k} == pytest.approx(
        {k: v for k, v in ours.items() if "knn" in k}, abs=1
    )


@pytest.mark.parametrize("name", SPOILT)
def test_it_notices(name, seen):
    found = seen[name]
    assert "same device" in found["error"] or found["waits"], found


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_a_first_step_that_is_skipped_leaves_no_rubbish_behind(name):
    """torch's fused SGD, momentum included, would make its buffers of whatever is in memory."""
    w, plain = (torch.nn.Parameter(torch.ones(10000)) for _ in range(2))
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    options = {"momentum": 0.9, "weight_decay": 0.0, "device": device}
    ours, theirs = (
        common.create_optimizer(name, [p], 0.1, fused=fused, **options)
        for p, fused in ((w, name != "lars"), (plain, False))
    )
    scaler, rubbish = torch.amp.GradScaler("cpu"), [torch.full((10000,), 1e30) for _ in range(50)]
    del rubbish  # as any step leaves it
    for step in range(3):
        for p, optimizer in ((w, ours), (plain, theirs)):
            optimizer.zero_grad()
            p.grad = torch.full_like(p, math.inf if step == 0 else 0.5 * scaler.get_scale())
        scaler.scale(torch.ones(()))  # as a step does
        scaler.step(ours)
        scaler.update()
        if step:
            plain.grad.fill_(0.5)
            theirs.step()
    torch.testing.assert_close(w, plain, rtol=1e-6, atol=1e-6)
