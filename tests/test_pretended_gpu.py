"""Every trainer and evaluation on a CUDA device that is not there: nothing on two devices, no wait for it in a step.

pretended_gpu/ makes the device; one process runs all cases and one pair all of those on two, for what was done to torch
there stays. Without a C++ compiler, or on a torch that the stand-in does not fit, the tests are skipped and counted.
"""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from runs import ENV, TRAINERS, made_once, metrics, tiny_flags, tiny_run

import common
import hub

PRECISIONS = ["no", "bf16", "fp16"]
BF16_VIEWS = {"seed": "small-patch-size", "swav": "small-crop-size", "swav_disco": "small-crop-size"}
ON_TWO = ["smd", "seed", "disco", "rkd", "swav", "moco", "simsiam", "supervised", "crd"]
EVALS = {"eval_knn": {}, "eval_linear": {}, "eval_metrics": {"latency-runs": 0}, "eval_tsne": {}}
RESUMED = [("simsiam", "no"), ("simsiam", "fp16"), ("swav", "no")]  # SGD and LARS
SPOILT = {  # what the device must notice -> trainer, text, sabotage
    "labels on the host": (
        "supervised",
        "cross_entropy(logits, batch.labels,",
        "cross_entropy(logits, batch.labels.cpu(),",
    ),
    "a number read in a step": ("simsiam", "run.watch(step, loss)", "run.watch(step, loss), loss.item()"),
    "a queue on the host": ("moco", "dim).to(device)", "dim)"),
}


def forget_after(run_dir, step: int) -> None:
    for checkpoint in hub.checkpoints(run_dir):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)


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
        words = tiny_flags(trainer, folder / name, teacher, **{**steps, **changes})
    return {"name": name, "trainer": trainer, "words": words, "precision": precision}


@pytest.fixture(scope="session")
def seen(tmp_path_factory, tiny_teacher) -> dict:
    """What one pretended device saw: {case: {"error", "waits", "ops", "low", "copies"}}."""

    def make(folder):
        cases = [case(folder, f"{t} {p}", t, tiny_teacher, p) for t in TRAINERS for p in PRECISIONS]
        cases += [case(folder, f"{t} {p}", t, tiny_teacher, p) for t in EVALS for p in ("no", "bf16")]
        for trainer, precision in RESUMED:  # on the device, from a checkpoint of the CPU
            run_dir = folder / f"{trainer} resumed {precision}"
            tiny_run(trainer, run_dir, tiny_teacher, total_steps=8, save_every=2, keep=9)
            forget_after(run_dir, 4)
            more = {"total-steps": 8, "save-every": 2, "keep": 9, "resume": True}
            cases.append(case(folder, run_dir.name, trainer, tiny_teacher, precision, **more))
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
    lines = tiny_run("simsiam", tmp_path / "run", tiny_teacher, total_steps=5, save_every=100)
    there = seen["simsiam no"]["folder"]
    for ours, theirs in zip(lines, metrics(there), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (tmp_path / "run", there))
    assert {k: v for k, v in theirs.items() if "knn" in k} == pytest.approx(
        {k: v for k, v in ours.items() if "knn" in k}, abs=1
    )


@pytest.mark.parametrize(("trainer", "precision"), RESUMED)
def test_a_run_goes_from_the_cpu_to_the_device_and_back(trainer, precision, seen, tiny_teacher, tmp_path):
    """Checkpoints of an unfused optimizer without a GradScaler, and of a fused one with it."""
    found = seen[f"{trainer} resumed {precision}"]
    assert not found["error"]
    tolerance = {"no": 1e-3, "fp16": 0.2}[precision]
    whole = [
        line["loss"] for line in tiny_run(trainer, tmp_path / "cpu", tiny_teacher, total_steps=8, save_every=2, keep=9)
    ]
    assert [line["loss"] for line in metrics(found["folder"])] == pytest.approx(whole, rel=tolerance)
    back = tmp_path / "back"
    shutil.copytree(found["folder"], back)
    forget_after(back, 6)
    lines = tiny_run(trainer, back, tiny_teacher, total_steps=8, save_every=2, keep=9, resume=True)
    assert [line["loss"] for line in lines] == pytest.approx(whole, rel=tolerance)


@pytest.mark.parametrize("name", SPOILT)
def test_it_notices(name, seen):
    found = seen[name]
    assert "same device" in found["error"] or found["waits"], found


@pytest.mark.parametrize("kind", [common.SGD, common.LARS, torch.optim.AdamW])
def test_a_first_step_that_is_skipped_leaves_no_rubbish_behind(kind):
    """torch's fused SGD would make its momentum of whatever is in memory."""
    w, plain = (torch.nn.Parameter(torch.ones(10000)) for _ in range(2))
    options = {} if kind is torch.optim.AdamW else {"momentum": 0.9}
    ours, theirs = kind([w], 0.1, fused=True, **options), kind([plain], 0.1, **options)
    scaler, rubbish = torch.amp.GradScaler("cpu"), [torch.full((10000,), 1e30) for _ in range(50)]
    del rubbish  # as any step leaves it
    for step in range(3):
        ours.zero_grad()
        scaler.scale((0.5 * w).sum() * (math.inf if step == 0 else 1)).backward()
        scaler.step(ours)
        scaler.update()
        if step:
            plain.grad = torch.full_like(plain, 0.5)
            theirs.step()
    torch.testing.assert_close(w, plain, rtol=1e-6, atol=1e-6)
