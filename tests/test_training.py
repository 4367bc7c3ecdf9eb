"""Learning goes wrong loudly, bf16 runs, the documented command runs, and the golden tests notice sabotage."""

import dataclasses
import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from golden import replay
from rederived import trajectories
from runs import ENV, LABELLED, TRAINERS, command, launch, metrics, tiny_flags, tiny_run
from together import run_here

import common
import hub

SABOTAGE = [
    ("simsiam", "z.detach()", "z"),  # no stop-gradient
    ("simsiam", "0.5 * negative_cosine(p2, z1)", "0.5 * negative_cosine(p1, z1)"),  # the same view twice
    ("simsiam", "args.batch_size / 256", "1"),  # no linear scaling
    ("simsiam", '{"fixed_lr": peak_lr} if args.fix_pred_lr else {}', '{"fixed_lr": 0.5 * peak_lr}'),
    ("moco", "list(encoder_q.parameters()), 1 - m)", "list(encoder_q.parameters()), 0 * m)"),  # keys that never move
    ("moco", "queue[start : start + args.batch_size] = keys", "queue[start : start + args.batch_size] = keys.flip(1)"),
    ("seed", "t[-1][:: args", "t[-1][1 :: args"),  # the second patch enqueued
    ("seed", "[embed(x) for x in inputs]", "[embed(x.flip(0)) for x in inputs]"),
    ("disco", "consistency_loss(s2, t2)", "consistency_loss(s2, t1)"),  # views crossed
    ("disco", 'statistics.train(args.teacher_bn == "batch")', "statistics.eval()"),
    ("disco", "info_nce(s1, k, queue", "info_nce(s2, k, queue"),
    ("disco", "            keys = encode_keys(encoder_k, x2", "            keys = encode_keys(encoder_k, x1"),
    ("rkd", "rkd_distance(s, t, group_size)", "rkd_distance(s, t, group_size // 2)"),
    ("rkd", "(d.sum((1, 2), keepdim=True) / pairs)", "d.mean((1, 2), keepdim=True)"),  # zeros counted
    (
        "rkd",
        "x.unsqueeze(1) - x[:, start : start + vertices].unsqueeze(2)",
        "x.unsqueeze(1) + 0 * x[:, start : start + vertices].unsqueeze(2)",
    ),  # angles at the origin
    ("rkd", "        if args.consistency:", "        if not args.consistency:"),
    ("swav", "prototypes.grad = None", "pass"),  # never frozen
    ("swav", "prototypes.copy_(F.normalize(prototypes, dim=1))", "pass"),
    ("swav", "gather(z[:, :2])", "gather(z[:, :2].flip(1))"),  # queues of the two crops crossed
    ("swav", ">= args.queue_length:  # it is full", "> 0:"),
    ("swav", "q /= all_sum(q.sum(dim=0))", "q *= 1"),  # no balance between prototypes
    ("swav", "- each.diagonal().sum()", "- 0"),  # a crop predicts its own code
    ("swav_disco", "args.mse_weight * mse", "mse"),
    ("swav_disco", "F.mse_loss(z, t)", "F.mse_loss(z, F.normalize(t, dim=2))"),
    ("sskd", "rank > 0", "rank > 1"),  # the nearly right counted as right
    ("sskd", "(turned, t_turned, lt_temperature) * lt_kept", "(turned, t_turned, lt_temperature) * ~lt_kept"),
    ("sskd", "x[:, 0], x[:, 1:]", "x[:, 1], x[:, 1:]"),  # turned images for upright ones
    ("sskd", "t_rep = (common.gather(y) for y in (t_logits, ssp_head(t_features)))", "t_rep = t_logits, t_features"),
    ("ft", "factors = encoder(t[-2])", "factors = encoder[:-1](t[-2])"),
    ("ft", "init_lr = (args.init_lr or", "init_lr = (2 * args.init_lr or"),
    ("ab", "(s > -1) & (t <= 0)", "(s > -1) & (t > 0)"),  # towards the wrong side of the boundary
    ("ab", "* 0.003 / 2**i", "* 0.003 / 3**i"),  # stages weighed otherwise
    ("crd", "(self.teacher, student), (self.student, teacher)", "(self.student, student), (self.teacher, teacher)"),
    ("crd", "memory[rows].lerp(", "memory[rows].lerp(0 * "),  # embeddings that never enter the memory
    ("kd", "z = z / (z.norm(dim=1, keepdim=True) + 1e-7)", "z = z / z.norm()"),
    ("smd", "< args.cosine_epochs else metric", "< 0 else metric"),  # no cosine phase
    ("smd", "smd_loss(s2, t2,", "smd_loss(s2, t1,"),  # views crossed
    ("smd", " / temperature).mean()", " / (2 * temperature)).mean()"),
    ("smd", "d_tt > d_ts.diagonal", "d_tt < d_ts.diagonal"),
    ("smd", "pairwise_distance(t, s)", "pairwise_distance(s, t)"),  # anchors on the wrong side
]


def sabotaged(method, old, new, folder):
    text = (ROOT / "trainers" / f"{method}.py").read_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times: the sabotage no longer applies"
    path = folder / f"{method}_{abs(hash(old))}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method, old, new", SABOTAGE, ids=lambda s: re.sub(r"\W+", "-", s)[:30])
def test_golden_trajectory_notices(method, old, new, tmp_path):
    if method in ("swav", "swav_disco"):
        lines, theirs = trajectories(sabotaged(method, old, new, tmp_path), tmp_path / "run")
        assert not np.allclose([line["loss"] for line in lines], theirs, rtol=1e-6)
        return
    name, flags = {
        "simsiam": ("simsiam", {}),
        "smd": ("smd_phase1_epoch0", {}),
        "moco": ("moco", {"head": "wide", "temperature": 0.1}),
        "seed": ("seed_small_patch", {"base_lr": 0.03}),
        "disco": ("disco", {"consistency_weight": 16}),
        "rkd": ("disco_rkd", {}),
        "sskd": ("sskd_calib_wrn402_wrn162_f64", {}),
        "ft": ("rep_resnet32x4_resnet8x4_f64", {}),
        "ab": ("rep_resnet32x4_resnet8x4_f64", {}),
        "crd": ("rep_resnet32x4_resnet8x4_f64", {}),
        "kd": ("rep_resnet32x4_resnet8x4_f64", {"method": "pkt"}),
    }[method]
    path = GOLDEN / "steps" / f"{name}.npz"
    ours, record = replay(sabotaged(method, old, new, tmp_path), path, **flags)["loss"], np.load(path)
    parts = {"sskd": ("ssp/loss", "student/loss"), "ft": ("factor/init_loss", "factor/loss"), "kd": ("pkt/loss",)}
    parts |= {"ab": ("abound/init_loss", "abound/loss"), "crd": ("crd/loss",)}
    theirs = np.concatenate([record[key] for key in parts.get(method, ("f64/losses/loss",))])
    assert len(ours) == len(theirs) and not np.allclose(ours, theirs, rtol=1e-6)


def test_simsiam_without_stop_gradient_is_stopped_as_collapsed(tmp_path, tiny_teacher):
    trainer = sabotaged("simsiam", "z.detach()", "z", tmp_path)
    args = common.parse_args(trainer.Args, tiny_flags("simsiam", tmp_path / "run", tiny_teacher))
    args = dataclasses.replace(args, total_steps=400, base_lr=8.0, save_every=1000, log_every=5, lr_per_epoch=False)
    with pytest.raises(SystemExit, match=r"step \d+: SimSiam has collapsed .* lower --base-lr"):
        trainer.main(args)
    last = metrics(tmp_path / "run")[-1]
    assert last["loss"] < -0.85 and last["z_std"] < 0.75 and last["step"] < 399


@pytest.mark.parametrize("method", TRAINERS)
def test_a_loss_that_is_not_finite_stops_with_its_step(method, tmp_path, tiny_teacher, monkeypatch):
    batch = common.Batches.batch

    def poisoned(self, step):
        got = batch(self, step)
        return dataclasses.replace(got, views=[x * math.nan for x in got.views]) if step == 4 else got

    monkeypatch.setattr(common.Batches, "batch", poisoned)
    with pytest.raises(SystemExit, match=r"step 4: the loss is not finite.*--base-lr"):
        tiny_run(method, tmp_path / "run", tiny_teacher, log_every=3)
    assert [f.name for f in hub.checkpoints(tmp_path / "run")] == ["step_00000003"], "no checkpoint after the NaN"


def test_an_smd_student_that_gives_one_feature_is_stopped(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setattr(common, "health", lambda _: {"z_std": 1e-4})  # the student's; the teacher's stays what it is
    with pytest.raises(SystemExit, match="same feature .*--base-lr"):
        tiny_run("smd", tmp_path / "run", tiny_teacher)


def test_a_teacher_in_batch_mode_drifts_in_the_run_but_is_reported_as_it_was_loaded(tmp_path, tiny_teacher, capsys):
    losses, reported, counted = {}, {}, {}
    for mode in ("batch", "running"):
        run_dir = tmp_path / mode
        losses[mode] = [line["loss"] for line in tiny_run("disco", run_dir, tiny_teacher, teacher_bn=mode)]
        reported[mode] = json.loads((run_dir / "results.json").read_text())["knn teacher"]
        state = torch.load(hub.checkpoints(run_dir)[0] / "state.pt")["state"]["teacher_bn"]
        counted[mode] = {v.item() for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert losses["batch"] != losses["running"] and reported["batch"] == reported["running"]
    (before,) = counted["running"]
    assert counted["batch"] == {before + 16}, "two views in each of 8 steps"
    assert "no projection head: its 96-d features" in capsys.readouterr().out


def test_consistency_alone_leaves_infonce_out_of_the_loss(tmp_path, tiny_teacher):
    for line in tiny_run("disco", tmp_path / "run", tiny_teacher, only_consistency=True):
        assert line["loss"] == pytest.approx(32 * (line["consistency_1"] + line["consistency_2"]))
        assert line["info_nce"] > 0


def test_optional_relations_are_part_of_the_loss(tmp_path, tiny_teacher):
    weights = {"rank_weight": 0.5, "attention_weight": 2.0, "distance_weight": 3.0, "angle_weight": 4.0}
    flags = {
        "image_size": 64,
        "subset": "96",
        "group_size": 8,
        "consistency": True,
    }  # below 64 px its last map is a point
    lines = tiny_run("rkd", tmp_path / "run", tiny_teacher, **flags, **weights)
    names = {"rkd_distance": 3, "rkd_angle": 4, "hard_dark_rank": 0.5, "attention": 2, "info_nce": 1}
    names |= {"consistency_1": 32, "consistency_2": 32}
    for line in lines:
        assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in names.items()))
        assert all(line[name] > 0 for name in names)


STUCK = {
    "uniform codes": ({"epsilon": 5.0}, {}, "codes are all but uniform.*lower --epsilon"),
    "one embedding": ({}, {"z_std": 1e-3}, "same embedding.*lower --base-lr, or raise --freeze-prototypes-steps"),
    "wrong codes": ({}, {"code_entropy": 0.5}, "not predicted: lower --num-prototypes"),
}


@pytest.mark.parametrize("cause", STUCK)
def test_a_swav_run_that_stays_at_chance_is_stopped_with_the_cause(cause, tmp_path, tiny_teacher, monkeypatch):
    flags, figures, message = STUCK[cause]
    if figures:  # a learning rate of zero keeps the loss where it began
        flags = {"base_lr": 0.0, "start_lr": 0.0, "final_lr": 0.0, "log_every": 10}
        log = hub.Run.log
        monkeypatch.setattr(hub.Run, "log", lambda self, step, **m: log(self, step, **{**m, **figures}))
    flags |= {"subset": "64", "num_prototypes": 50, "total_steps": 400, "save_every": 1000}
    with pytest.raises(SystemExit, match=rf"step \d+: the loss has been at ln\(--num-prototypes\) = 3.912.*{message}"):
        tiny_run("swav", tmp_path / "run", tiny_teacher, **flags)
    last = metrics(tmp_path / "run")[-1]
    assert 100 <= last["step"] <= 115 and last["loss"] > 0.995 * math.log(50)


def test_health_figures_are_one_when_spread_and_zero_when_collapsed():
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert common.z_std(z).item() == pytest.approx(1, abs=0.02)
    assert common.z_std(torch.ones(256, 64) + 1e-6 * z[:256]).item() < 1e-3
    assert common.effective_rank(z).item() > 60
    assert common.effective_rank(z[:, :1] * torch.ones(1, 64)).item() == pytest.approx(1, abs=1e-3)
    share = torch.linalg.svdvals((z[:50] - z[:50].mean(0)).double())
    share = share / share.sum()
    assert common.effective_rank(z[:50]).item() == pytest.approx(math.exp(-(share * share.log())[:-1].sum()), rel=1e-4)


# torch's bf16 convolutions (2.6 and 2.15) give a gradient that is not finite now and then on maps of 1x1: not below 32 px
BF16 = {"image-size": 32, "total-steps": 6}
BF16_VIEWS = {"seed": "small-patch-size", "swav": "small-crop-size", "swav_disco": "small-crop-size"}


def check_bf16(run_dir) -> None:
    assert json.loads((run_dir / "environment.json").read_text())["mixed_precision"] == "bf16"
    losses = [line["loss"] for line in metrics(run_dir)]
    assert len(losses) == 6 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("method", TRAINERS)
def test_bf16_trains_without_nan(method, tmp_path, tiny_teacher, precision):
    precision("bf16")
    small = {BF16_VIEWS[method]: 32} if method in BF16_VIEWS else {}
    run_here(method, tiny_flags(method, tmp_path, tiny_teacher, **BF16, **small), double=False)
    check_bf16(tmp_path)


def test_bf16_is_the_launchers_to_choose(tmp_path, tiny_teacher):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--mixed_precision", "bf16"]
    launch([*launcher, *command("smd")[1:], *tiny_flags("smd", tmp_path, tiny_teacher, **BF16)])
    check_bf16(tmp_path)


# MoCo's loss first rises to ln(1 + K), while real keys replace the random ones of its queue.
TO_LEARN = {
    "moco": {"hide_and_seek": False, "augmentation": "digits", "encoder_momentum": 0.9},
    "rkd": {"distance_weight": 100.0, "angle_weight": 100.0},
    # one stage, one loss: the two stages' losses have nothing to do with each other
    "sskd": {"head_epochs": 0},
    "ab": {"init_epochs": 0},
    "ft": {"init_epochs": 0},
    "kd": {"method": "kd"},
}


@pytest.mark.parametrize("method", TRAINERS)
def test_the_loss_falls(method, tmp_path, tiny_teacher):
    changes = {
        "total_steps": 60,
        "save_every": 1000,
        "optimizer": "adamw",
        "base_lr": 0.08,
        **TO_LEARN.get(method, {}),
    }
    losses = [line["loss"] for line in tiny_run(method, tmp_path / "run", tiny_teacher, **changes)]
    first = losses[10:20] if method == "moco" else losses[:10]
    assert sum(losses[-10:]) < sum(first) - 0.01


@pytest.mark.parametrize("method", TRAINERS)
def test_command_in_the_docstring_is_the_trainers(method):
    docstring = (ROOT / "trainers" / f"{method}.py").read_text().split('"""')[1]
    assert f"accelerate launch trainers/{method}.py" in docstring


@pytest.mark.parametrize("method", TRAINERS)
def test_a_short_run_from_the_command_line_ends_in_a_release(method, tmp_path, tiny_teacher, monkeypatch, capsys):
    """The file itself, as `python trainers/NAME.py` runs it."""
    file = str(ROOT / "trainers" / f"{method}.py")
    monkeypatch.setattr(sys, "argv", [file, *tiny_flags(method, tmp_path, tiny_teacher, **{"total-steps": 2})])
    runpy.run_path(file, run_name="__main__")
    said = capsys.readouterr().out
    assert "timm.create_model" in said and (tmp_path / "release" / "model.safetensors").exists()
    if method not in LABELLED:
        assert re.search(r"raw pixels +\d+\.\d\d %", said)


def test_help_lists_the_flags_and_the_papers_defaults():
    done = subprocess.run([*command("smd"), "--help"], env=ENV, capture_output=True, text=True)
    text = re.sub(r"[\s│]+", " ", done.stdout)  # without tyro's box
    assert done.returncode == 0 and "--temperature" in text
    assert re.search(r"--batch-size INT images per optimizer step, over all processes \(default: 512\)", text)
