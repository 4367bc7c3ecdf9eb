"""Distillation with labels: two phases resumed anywhere, every method on one and two processes, and what users get wrong."""

import importlib
import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from runs import LABELLED, command, launch, metrics, run_pair, tiny_flags, tiny_run
from test_two_processes import compare
from together import run_here
from tools import make_backbone, make_run, stop_message

import common
import hub
from trainers import kd, sskd, supervised
from trainers.shared import sources

FROM_LABELS = [name for name in LABELLED if name != "eval_finetune"]  # its own mistakes are in test_transfer.py


@pytest.fixture(scope="session")
def zoo_teacher(tiny_teacher):
    """A run folder of a CIFAR network with the digits' classes: what ab needs."""
    return tiny_teacher.parent / "zoo"


def states(run_dir, step: int) -> dict:
    return torch.load(run_dir / f"step_{step:08d}" / "state.pt", weights_only=True)["state"]


@pytest.mark.parametrize("kept", [1, 2, 3, 5])  # of 2 steps of phase A and 4 of phase B
def test_sskd_resumes_exactly_in_either_phase(kept, tmp_path, tiny_teacher):
    changes = {"total_steps": 6, "head_epochs": 2.0, "epochs": 4.0, "save_every": 1, "keep": 9, "eval_every": 1}
    whole = tiny_run("sskd", tmp_path / "whole", tiny_teacher, **changes)
    assert ["ce" in line for line in whole] == [False] * 2 + [True] * 4
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    for folder in hub.checkpoints(resumed):
        if int(folder.name[5:]) > kept:
            shutil.rmtree(folder)
    (resumed / "ssp_head.safetensors").unlink()
    assert tiny_run("sskd", resumed, tiny_teacher, resume=True, **changes) == whole
    torch.testing.assert_close(states(resumed, 6), states(tmp_path / "whole", 6), rtol=0, atol=0)
    assert (resumed / "ssp_head.safetensors").exists() == (kept < 2), "written when phase A ends"


def test_phase_a_is_kept_and_reused_with_the_same_teacher_only(tmp_path, tiny_teacher, zoo_teacher):
    first = tiny_run("sskd", tmp_path / "first", tiny_teacher)
    head = safetensors.torch.load_file(tmp_path / "first" / "ssp_head.safetensors")
    assert not any("ce" in line for line in first[:3])
    again = tiny_run("sskd", tmp_path / "again", tiny_teacher, ssp_head=tmp_path / "first", total_steps=3)
    assert len(again) == 3 and all("ce" in line for line in again)
    torch.testing.assert_close(states(tmp_path / "again", 3)["ssp_head"], head, rtol=0, atol=0)
    assert not (tmp_path / "again" / "ssp_head.safetensors").exists()

    def attempt(path, teacher=tiny_teacher):
        return stop_message(tiny_run, "sskd", tmp_path / "wrong", teacher, ssp_head=path)

    assert "another --teacher" in attempt(tmp_path / "first", zoo_teacher)
    assert "cannot be read" in attempt(tmp_path / "nowhere")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "first" / "ssp_head.safetensors").read_bytes()[:-100])
    assert "cannot be read" in attempt(tmp_path / "cut.safetensors")


def test_a_full_disk_under_the_head_is_one_line(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setattr("os.replace", _full_disk_for("ssp_head", __import__("os").replace))
    message = stop_message(tiny_run, "sskd", tmp_path / "run", tiny_teacher)
    assert "ssp_head.safetensors" in message and "free space" in message and "--resume" in message


def _full_disk_for(name, function):
    def stand_in(source, target):
        if name in str(target):
            raise OSError(28, "No space left on device")
        return function(source, target)

    return stand_in


def test_nothing_kept_gives_no_nan(tmp_path, tiny_teacher):
    """The teacher of a few steps is wrong almost everywhere: both terms keep nearly nothing, in phase B only."""
    lines = tiny_run("sskd", tmp_path / "run", tiny_teacher, lt_keep=0.0, ss_keep=0.0, head_epochs=0.0, batch_size=2)
    assert len(lines) == 8 and all(line["loss"] == line["loss"] and line["lt"] >= 0 for line in lines)
    logits, target = torch.randn(8, 4), torch.zeros(2, dtype=torch.long)
    wrong = torch.arange(4.0).repeat(8, 1)  # the true class comes last everywhere
    rates = {"kd_temperature": 4, "lt_temperature": 4, "ss_temperature": 0.5, "lt_keep": 0, "ss_keep": 0}
    logits.requires_grad_()
    losses = sskd.sskd_losses(logits, wrong, logits, wrong, target, **rates)
    assert losses[2] == 0 and torch.autograd.grad(losses[2], logits)[0].abs().sum() == 0


METHODS = [m for m in kd.METHODS if m != "vid"]  # vid is tiny.toml's: the other files' tests have it


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_exactly(method, tmp_path, tiny_teacher):
    whole = tiny_run("kd", tmp_path / "whole", tiny_teacher, method=method)
    assert len(whole) == 8 and all(line["loss"] == line["loss"] for line in whole)
    assert (method == "kd") == (not whole[-1]["distill"])
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    for folder in hub.checkpoints(resumed)[:1]:
        shutil.rmtree(folder)
    assert tiny_run("kd", resumed, tiny_teacher, resume=True, method=method) == whole
    torch.testing.assert_close(states(resumed, 8), states(tmp_path / "whole", 8), rtol=0, atol=0)


@pytest.mark.parametrize("trainer", ["ab", "ft"])
@pytest.mark.parametrize("kept", [2, 3, 5])  # of 3 steps of the first stage and 5 of the second
def test_two_stages_resume_exactly_in_either(trainer, kept, tmp_path, tiny_teacher):
    changes = {"save_every": 1, "keep": 9}
    whole = tiny_run(trainer, tmp_path / "whole", tiny_teacher, **changes)
    assert ["ce" in line for line in whole] == [False] * 3 + [True] * 5
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    for folder in hub.checkpoints(resumed):
        if int(folder.name[5:]) > kept:
            shutil.rmtree(folder)
    assert tiny_run(trainer, resumed, tiny_teacher, resume=True, **changes) == whole
    torch.testing.assert_close(states(resumed, 8), states(tmp_path / "whole", 8), rtol=0, atol=0)


def test_ab_moves_only_what_makes_the_maps_and_then_everything(tmp_path, zoo_teacher):
    make_run(tmp_path / "zoo", make_backbone("wrn_16_2", num_classes=10), supervised)
    tiny_run("ab", tmp_path / "run", tmp_path / "teacher", student="wrn_16_2", save_every=1, keep=9)
    before, first, last = (states(tmp_path / "run", step)["student"] for step in (1, 3, 8))
    moved = {k for k in before if not torch.equal(before[k], first[k]) and "num_batches" not in k}
    assert moved and not {k for k in moved if k.startswith(("backbone.bn1", "backbone.fc"))}
    assert {k for k in before if k.startswith("backbone.block") and "running" not in k and "num_" not in k} <= moved
    assert not torch.equal(last["backbone.fc.weight"], first["backbone.fc.weight"])
    # the last norm's statistics stand still in the first stage, and move twice a step in the second
    assert first["backbone.bn1.num_batches_tracked"] == 0 and last["backbone.bn1.num_batches_tracked"] == 10


def test_relations_do_not_depend_on_the_processes(tmp_path, tiny_teacher):
    """Relations between the images of the global batch; the other methods are in test_two_processes.py."""
    words = [tiny_flags("kd", tmp_path / n, tiny_teacher, method="rkd", **{"total-steps": 5}) for n in "12"]
    run_here("kd", words[0])
    run_pair(tmp_path, [("kd", words[1], True)])
    assert json.loads((tmp_path / "2" / "environment.json").read_text())["num_processes"] == 2
    compare(metrics(tmp_path / "1"), metrics(tmp_path / "2"), 5, 1e-8)


@pytest.mark.parametrize("k", [7, 60, 200])
def test_negatives_are_of_other_classes_each_as_likely_and_none_twice(k):
    labels = torch.tensor([0] * 30 + [1] * 10 + [3] * 60)[
        torch.randperm(100, generator=torch.Generator().manual_seed(3))
    ]
    others = sources.OtherClasses("data", labels, torch.device("cpu"))
    counts, asked = torch.zeros(3, 100), {0: 70, 1: 90, 3: 40}
    for row, label in enumerate(asked):
        for seed in range(40):
            drawn = others.draw(torch.full((50,), label), k, torch.Generator().manual_seed(seed))
            assert drawn.shape == (50, k) and (labels[drawn] != label).all()
            if k <= asked[label]:
                assert all(len(set(r)) == k for r in drawn.tolist())
            counts[row] += drawn.flatten().bincount(minlength=100)
        own = counts[row][labels != label]
        expected = 2000 * k / asked[label]
        assert (own / expected - 1).abs().max() < 6 / expected**0.5, "each as likely"
    with pytest.raises(SystemExit, match="one class"):
        sources.OtherClasses("data", torch.zeros(5, dtype=torch.long), torch.device("cpu"))


@pytest.mark.parametrize("trainer", ["sskd", "kd", "crd"])
@pytest.mark.parametrize(
    "student, lr", [("shufflenet_v1_cifar", 0.01), ("mobilenetv2_cifar", 0.01), ("resnet20", 0.05)]
)
def test_light_networks_learn_at_their_own_rate(trainer, student, lr, tmp_path, tiny_teacher):
    changes = {"student": student, "batch_size": 64, "total_steps": 1, **({"method": "kd"} if trainer == "kd" else {})}
    changes |= {"head_epochs": 0.0} if trainer == "sskd" else {}
    (line,) = tiny_run(trainer, tmp_path / "run", tiny_teacher, **changes)
    assert line["lr"] == pytest.approx(lr)


@pytest.mark.parametrize("student, lr", [("resnet20", 0.01), ("test_resnet", 0.05)])
def test_the_paraphraser_learns_at_the_authors_rate(student, lr, tmp_path, tiny_teacher):
    lines = tiny_run("ft", tmp_path / "run", tiny_teacher, student=student, batch_size=64)
    assert [line["lr"] for line in lines] == pytest.approx([lr] * 3 + [0.05] * 5)


def test_results_are_the_last_and_the_best_epoch(tmp_path, tiny_teacher, monkeypatch):
    seen = iter((30.0, 50.0, 40.0, 77.0))  # after steps 2 and 4, after the last, and the teacher's
    monkeypatch.setattr(common, "top1_accuracy", lambda *_, **__: next(seen))
    monkeypatch.setattr(common.Batches, "steps_per_epoch", property(lambda _: 2, lambda *_: None), raising=False)
    lines = tiny_run("kd", tmp_path / "run", tiny_teacher, method="kd", total_steps=5)
    assert [line.get("eval_top1") for line in lines] == [None, 30.0, None, 50.0, 40.0]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    figures = {k: v for k, v in results.items() if isinstance(v, float)}
    assert figures == {"top1 teacher": 77.0, "top1 last epoch": 40.0, "top1 best epoch": 50.0}


@pytest.mark.parametrize("trainer", ["sskd", "kd", "crd", "ft"])
def test_a_teacher_of_other_classes_is_named(trainer, tmp_path):
    folder = tmp_path / "teacher"
    make_run(folder, make_backbone("test_resnet", num_classes=7), supervised)
    message = stop_message(tiny_run, trainer, tmp_path / "run", folder)
    assert "has a classifier of 7 classes, the data has 10" in message and "--teacher" in message
    headless = tmp_path / "headless"
    make_run(headless, make_backbone("test_resnet"))
    assert "has a classifier of 0 classes" in stop_message(tiny_run, trainer, tmp_path / "run", headless)


def test_timms_classifier_is_not_replaced_by_a_random_one(monkeypatch):
    """timm itself would build a new one for another number of classes, without a word."""
    create = common.create_backbone
    monkeypatch.setattr(common, "create_backbone", lambda name, pretrained, **kw: create(name, **kw))
    with pytest.raises(SystemExit, match="has a classifier of 1000 classes, the data has 10"):
        hub.load_teacher("timm/test_resnet", num_classes=10)
    assert hub.load_teacher("timm/test_resnet", num_classes=1000).backbone.num_classes == 1000
    assert hub.load_teacher("timm/test_resnet").backbone.num_classes == 0


@pytest.mark.parametrize("trainer", FROM_LABELS)
@pytest.mark.parametrize("labels, message", [([0, -1, 1], "holds the label -1"), (None, "no labels to learn from")])
def test_labels_that_cannot_be_learned_are_named(trainer, labels, message, tmp_path, tiny_teacher, monkeypatch):
    opened = common.open_source

    def spoilt(*args, **kwargs):
        source = opened(*args, **kwargs)
        source.labels = None if labels is None else torch.tensor(labels).repeat(len(source) // 3 + 1)[: len(source)]
        return source

    monkeypatch.setattr(common, "open_source", spoilt)
    assert message in stop_message(tiny_run, trainer, tmp_path / "run", tiny_teacher)


def test_a_label_above_the_teachers_classes_is_named(tmp_path, tiny_teacher, monkeypatch):
    opened = common.open_source

    def spoilt(*args, **kwargs):
        source = opened(*args, **kwargs)
        source.labels = source.labels.clone()
        source.labels[5] = 12
        return source

    monkeypatch.setattr(common, "open_source", spoilt)
    assert "the data has 13" in stop_message(tiny_run, "sskd", tmp_path / "run", tiny_teacher)


MISTAKES = [
    ("sskd", {"lt_keep": 1.5}, "--lt-keep 1.5: must be at most 1"),
    ("sskd", {"ss_keep": -0.1}, "--ss-keep -0.1: must be at least 0"),
    ("sskd", {"ss_temperature": 0.0}, "--ss-temperature 0.0: must be above 0"),
    ("sskd", {"head_epochs": -1.0}, "--head-epochs -1.0: must be at least 0"),
    ("sskd", {"base_lr": 0.0}, "--base-lr 0.0: must be above 0"),
    ("sskd", {"eval_every": 0}, "--eval-every 0: must be at least 1"),
    ("kd", {"kd_temperature": -1.0}, "--kd-temperature -1.0: must be above 0"),
    ("crd", {"crd_temperature": 0.0}, "--crd-temperature 0.0: must be above 0"),
    ("crd", {"crd_negatives": 0}, "--crd-negatives 0: must be at least 1"),
    ("kd", {"method": "fitnet", "hint_layer": 9}, "--hint-layer 9: there are maps 0 to 4"),
    ("ab", {"student": "test_resnet"}, "need maps before the activation, as wrn_40_2"),
    ("ab", {"teacher": None}, "--teacher is missing: a labelled network with maps before the activation; train one"),
    ("kd", {"method": "at", "student": "resnet20"}, "--method at: goes by stages; the student has 3, the teacher 4"),
    ("ft", {"init_epochs": -1.0}, "--init-epochs -1.0: must be at least 0"),
]


@pytest.mark.parametrize("trainer, changes, message", MISTAKES, ids=lambda m: str(m)[:40])
def test_a_setting_that_makes_no_sense_is_named(trainer, changes, message, tmp_path, tiny_teacher):
    assert message in stop_message(tiny_run, trainer, tmp_path / "run", tiny_teacher, **changes)


def test_maps_that_one_convolution_cannot_match_are_named():
    with pytest.raises(SystemExit, match="4 px is neither half of the teacher's 16 px nor larger"):
        kd.MapRegressor((8, 4, 4), (8, 16, 16), relu=True)


@pytest.mark.parametrize("trainer", FROM_LABELS)
def test_init_from_leaves_the_classifier_to_the_new_classes(trainer, tmp_path, tiny_teacher):
    folder, name = tmp_path / "other", "resnet20" if trainer == "ab" else "test_resnet"
    make_run(folder, backbone := make_backbone(name, num_classes=3), supervised)
    changes = {
        "init_from": str(folder),
        "total_steps": 1,
        "base_lr": 1e-12,
        "head_epochs": 0.0,
        "init_epochs": 0.0,
        "method": "kd",
        "backbone": name,
        "student": name,
    }
    fields = importlib.import_module(f"trainers.{trainer}").Args.__dataclass_fields__
    tiny_run(trainer, tmp_path / "run", tiny_teacher, **{k: v for k, v in changes.items() if k in fields})
    weights = safetensors.torch.load_file(tmp_path / "run" / "release" / "model.safetensors")
    stem = next(key for key in weights if key.startswith("conv1.") and weights[key].dim() == 4)
    torch.testing.assert_close(weights[stem], backbone.state_dict()[stem], rtol=1e-4, atol=1e-6)
    assert len(weights["fc.weight"]) == 10


def test_digits_without_a_teacher_train_one_first(tmp_path):
    """The command line's first contact: no --teacher, the embedded data."""
    changes = {"--total-steps": 2, "--run-dir": tmp_path / "runs" / "kd", "--student": "resnet20", "--image-size": 16}
    stand_in = tmp_path / "runs" / "digits_teacher"
    make_run(stand_in, make_backbone("test_resnet", num_classes=10), supervised)
    hub.build_release(stand_in)
    words = [str(word) for pair in changes.items() for word in pair]
    done = launch(command("kd") + words)
    assert "student" in done.stdout and "timm.create_model" in done.stdout
    assert json.loads((tmp_path / "runs" / "kd" / "teacher.json").read_text())["architecture"] == "test_resnet"
    assert (ROOT / "configs" / "kd" / "digits.toml").exists()
