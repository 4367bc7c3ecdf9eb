"""What is released is what was trained; nothing that only reports loses a finished run; damaged folders give one line."""

import copy
import dataclasses
import json
import os
import pickle
import shutil
import stat
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from runs import tiny_run
from tools import make_backbone, make_run, stop_message

import common
import hub
from trainers.shared import card, export
from trainers.shared.files import read_json, read_records, write_whole
from trainers.shared.official import read_foreign

COLOURS = {"cat": (220, 30, 30), "dog": (30, 200, 40), "eel": (30, 60, 220), "fox": (220, 210, 30)}


def pictures(folder: Path, classes=("cat", "dog", "eel"), count: int = 8, flat: bool = False) -> None:
    """A class is a colour, so that kNN of raw pixels is 100 % where the labels are right."""
    for name in classes:
        for i in range(count):
            file = folder / f"{name}{i}.png" if flat else folder / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), tuple(min(255, c + i) for c in COLOURS[name])).save(file)


def source(labels: list[int] | None, classes: list[str], name: str = "x") -> common.Source:
    labels = None if labels is None else torch.tensor(labels)
    pixels = torch.zeros(6 if labels is None else len(labels), 3, 8, 8, dtype=torch.uint8)
    return common.Source(name, len(pixels), pixels=pixels, labels=labels, classes=classes)


def weights(folder: Path) -> dict:
    return safetensors.torch.load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Labels that can be compared
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["flat test", "fewer", "more", "same"])
def test_a_run_on_any_folders_ends_with_a_release_and_a_right_knn_or_none(case, tmp_path, capsys):
    pictures(tmp_path / "data" / "train", count=12)
    if case == "flat test":
        pictures(tmp_path / "data" / "test", flat=True)
    else:
        classes = {"fewer": ("dog", "eel"), "more": tuple(COLOURS), "same": ("cat", "dog", "eel")}[case]
        pictures(tmp_path / "data" / "val", classes)
    tiny_run("simsiam", tmp_path / "run", tmp_path, data=str(tmp_path / "data"), total_steps=1, batch_size=16)
    said, results = capsys.readouterr().out, read_json(tmp_path / "run" / "results.json")
    assert (tmp_path / "run" / "release" / "model.safetensors").exists()
    if case == "flat test":
        assert "no kNN: the evaluation split" in said and not [name for name in results if "knn" in name]
    else:
        assert results["knn raw pixels"] == 100.0
        assert ("left out 8 evaluation images of classes that no training image has" in said) is (case == "more")


def test_labels_are_matched_by_name_and_what_cannot_be_is_left_out_and_said():
    said = []
    gallery, queries = common.labelled_queries(
        source([0, 1, 1, -1, 0], ["dog", "eel"], "train"), source([0, 1, 2, -1], ["cat", "dog", "eel"]), said.append
    )
    assert gallery.labels.tolist() == [0, 1, 1, 0] and queries.labels.tolist() == [0, 1]
    assert len(queries.pixels) == 2 and queries.classes == ["dog", "eel"]
    assert said == [
        "evaluation: left out 1 training images without a label, 1 evaluation images without a label, "
        "1 evaluation images of classes that no training image has"
    ]


@pytest.mark.parametrize(
    ("train", "val", "why"),
    [
        (source([-1] * 4, ["a"], "train"), source([0, 0], ["a"]), "the training split (train) has no labels"),
        (source([0, 0], ["a"]), source([-1, -1], ["a"], "test"), "the evaluation split (test) has no labels"),
        (source(None, [], "train"), source([0], ["a"]), "the training split (train) has no labels"),
        (source([0], ["a"]), None, "no split called val or test"),
        (source([0], ["a"], "p"), source([0], ["b"], "q"), "p and q have no class in common"),
    ],
)
def test_labels_that_cannot_be_compared_give_one_line_and_no_figure(train, val, why):
    said = []
    assert common.labelled_queries(train, val, said.append, "kNN") is None
    assert len(said) == 1 and why in said[0] and said[0].startswith("no kNN")


# ---------------------------------------------------------------------------------------------------------------------
# A finished run is not lost to its report
# ---------------------------------------------------------------------------------------------------------------------


def test_a_knn_that_fails_leaves_a_finished_run_that_says_so(tmp_path, capsys, monkeypatch, digits_once):
    def out_of_memory(*_, **__):
        assert (tmp_path / "run" / "release" / "config.json").exists(), "reported before it was released"
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(common, "knn_table", out_of_memory)
    tiny_run("simsiam", tmp_path / "run", tmp_path, total_steps=1)
    results = read_json(tmp_path / "run" / "results.json")
    assert results["report_problem"] == "kNN: CUDA out of memory" and results["step"] == 1
    assert "kNN: failed, the run is whole" in capsys.readouterr().out


def test_ctrl_c_during_the_report_leaves_the_release_whole(tmp_path, monkeypatch, digits_once):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "knn_table", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tiny_run("simsiam", tmp_path / "run", tmp_path, total_steps=1)
    assert hub.load_teacher(tmp_path / "run" / "release").num_features > 0


def test_a_picture_a_tracker_and_an_upload_that_fail_lose_no_run(tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    def fail(*_, **__):
        raise RuntimeError("broken")

    run = make_run(tmp_path / "run", backbone := make_backbone("test_resnet"))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2, "loss": 1.5}\n')
    monkeypatch.setattr(Figure, "savefig", fail)
    monkeypatch.setattr(hub, "push", fail)
    monkeypatch.setattr(run.accelerator, "end_training", fail)
    run.args = dataclasses.replace(run.args, tracker="tensorboard", push_to_hub="org/name")
    hub.release(run, 3, {"model": backbone}, backbone)
    assert hub.finish(run, None, {"knn trained": 50.0}) == tmp_path / "run" / "release"
    said = capsys.readouterr().out
    assert "--tracker tensorboard: failed" in said and "--push-to-hub: failed" in said and "try again" in said
    assert "knn trained | 50.00" in (tmp_path / "run" / "release" / "README.md").read_text()


def test_file_names_that_are_not_utf8_are_listed_and_lose_nothing(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"r\xe9sultat")
    run = make_run(folder, backbone := make_backbone("test_resnet"), data=os.fsdecode(b"/x/donn\xe9es"))
    hub.release(run, 3, {"model": backbone}, backbone)
    data = source([0, 1], ["a", "b"])
    data.bad = {0: os.fsdecode(b"caf\xe9.jpg: no image"), 1: "a\nb.jpg: no image"}
    hub.finish(run, data, {"knn trained": 50.0})
    assert (folder / "bad_images.txt").read_bytes() == b"caf\xe9.jpg: no image\na\\nb.jpg: no image\n"
    assert "2 images could not be read" in capsys.readouterr().out
    assert read_json(folder / "results.json")["knn trained"] == 50.0
    assert "\\udce9" in (folder / "release" / "README.md").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Never other weights than the run's
# ---------------------------------------------------------------------------------------------------------------------


def test_at_its_end_the_network_in_memory_is_released_whatever_lies_in_the_folder(tmp_path):
    run = make_run(tmp_path / "run", backbone := make_backbone("test_resnet"))
    (tmp_path / "run" / "step_00000099").mkdir()
    (tmp_path / "run" / "step_00000099" / "model.safetensors").write_bytes(bytes(1000))
    hub.release(run, 3, {"model": backbone}, backbone)
    hub.finish(run, None, {})
    found = weights(tmp_path / "run" / "release")
    assert all(torch.equal(found[k], v) for k, v in backbone.state_dict().items())
    assert "step 3," in (tmp_path / "run" / "release" / "README.md").read_text()


def damage(checkpoint: Path, how: str) -> None:
    file, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    content = read_json(config)
    if how == "zeroed":
        file.write_bytes(bytes(file.stat().st_size))
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "not finite":
        state = weights(checkpoint)
        state[next(k for k in state if state[k].dtype == torch.float32)].fill_(torch.nan)
        safetensors.torch.save_file(state, file)
    elif how == "no weights":
        file.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "cut config":
        config.write_text(config.read_text()[:50])
    elif how == "other features":
        config.write_text(json.dumps({**content, "num_features": 7}))
    elif how == "other network":
        config.write_text(json.dumps({**content, "architecture": "resnet18"}))
    elif how == "another run's":
        config.write_text(json.dumps({**content, "run": {**content["run"], "seed": 5}}))
    elif how == "another step's":
        shutil.copy(checkpoint.parent / "step_00000003" / "state.pt", checkpoint)


@pytest.mark.parametrize(
    "how",
    ["zeroed", "cut", "not finite", "no weights", "no config", "cut config", "other features", "other network",
     "another run's", "another step's"],
)  # fmt: skip
def test_build_takes_the_newest_checkpoint_that_is_whole_and_says_which_it_passed_over(how, tmp_path, capsys):
    run = make_run(tmp_path / "run", backbone := make_backbone("test_resnet"))
    before = copy.deepcopy(backbone.state_dict())
    with torch.no_grad():
        next(backbone.parameters()).add_(1)
    run.save(4, {"model": backbone}, backbone)
    (tmp_path / "run" / "results.json").write_text('{"trainer": "simsiam", "step": 4, "knn trained": 77.0}')
    damage(tmp_path / "run" / "step_00000004", how)
    release = hub.build_release(tmp_path / "run")
    assert all(torch.equal(weights(release)[k], v) for k, v in before.items())
    passed = capsys.readouterr().err
    assert passed.count("\n") == 1 and "passed over step_00000004" in passed
    assert "77.00" not in (release / "README.md").read_text(), "figures of another step"
    shutil.rmtree(tmp_path / "run" / "step_00000003")
    shutil.rmtree(release)
    assert "step_00000004" in stop_message(hub.build_release, tmp_path / "run")
    assert not (tmp_path / "run" / ".release").exists() and not release.exists()


def test_a_checkpoint_beyond_the_log_is_not_this_runs(tmp_path):
    run = make_run(tmp_path / "run", backbone := make_backbone("test_resnet"))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    run.save(900, {"model": backbone}, backbone)
    assert "step 3," in (hub.build_release(tmp_path / "run") / "README.md").read_text()


@pytest.mark.parametrize("event", range(2))
def test_a_rebuild_that_is_killed_loses_no_exported_file(event, tmp_path, monkeypatch):
    make_run(tmp_path / "run", make_backbone("test_resnet"))
    release = hub.build_release(tmp_path / "run")
    (release / "model.onnx").write_bytes(b"exported")
    replace, seen = os.replace, []

    def killed(a, b):
        if "release" in Path(b).name:
            seen.append(b)
            if len(seen) == event + 1:
                raise KeyboardInterrupt
        replace(a, b)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        hub.build_release(tmp_path / "run")
    assert (hub.build_release(tmp_path / "run") / "model.onnx").read_bytes() == b"exported"
    assert [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith(".")] == [".lock"]


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b'{"a": ', b"[1]", b"\xff\xfe", b"[" * 100_000, b""])
def test_a_damaged_json_file_is_named_in_one_line(content, tmp_path):
    (tmp_path / "args.json").write_bytes(content)
    assert str(tmp_path / "args.json") in stop_message(read_json, tmp_path / "args.json")


def test_cut_records_are_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "loss": 2.0}\n\xff}\n[]\n{}\n{"step": "x"}\n{"step": 2}\n{"st'
    )
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize("name", ["args.json", "environment.json", "data.json", "teacher.json", "results.json"])
def test_a_cut_file_in_a_run_folder_gives_one_line_everywhere(name, tmp_path, capsys):
    run = make_run(tmp_path / "runs" / "run", make_backbone("test_resnet")).dir
    (run / name).write_text('{"cut')
    assert name in stop_message(hub.build_release, run)
    assert not (run / ".release").exists() and not (run / "release").exists()
    assert hub.load_teacher(run).num_features == 96
    if name in ("args.json", "results.json"):
        (run / "results.json").write_text('{"cut' if name == "results.json" else '{"top1": 5.0}')
        assert name in stop_message(hub.report, [run])
    hub._list(tmp_path / "runs")
    assert str(run) in capsys.readouterr().out


def test_texts_of_a_run_folder_are_no_markup_in_card_list_and_report(tmp_path, capsys):
    evil = "<script>alert(1)</script>|x\n# y"
    run = make_run(tmp_path / "runs" / "run", make_backbone("test_resnet"), data=evil).dir
    (run / "teacher.json").write_text(json.dumps({"source": evil, "licence": "mit", "role": evil}))
    figures = {"trainer": evil, "checkpoint": evil, evil: 50.0, "nan": float("nan"), "huge": 1e300, "text": "9"}
    (run / "results.json").write_text(json.dumps(figures))
    text = (hub.build_release(run) / "README.md").read_text()
    table = hub.report([run])
    for shown in (text.split("## Flags")[0].split("---", 2)[2], table):
        assert "<script>" not in shown and "\n# y" not in shown and "&lt;script&gt;" in shown
    assert "nan" not in table.lower().replace("alert", "") and "huge" not in table
    assert [line.count(" | ") for line in table.splitlines()] == [1, 1, 1]
    hub._list(tmp_path / "runs")
    assert len([line for line in capsys.readouterr().out.splitlines() if "y" == line.strip(" #")]) == 0


def test_a_card_that_is_not_utf8_is_not_pushed(tmp_path):
    make_run(tmp_path / "run", make_backbone("test_resnet"))
    release = hub.build_release(tmp_path / "run")
    (release / "README.md").write_bytes(b"caf\xe9")
    assert "README.md" in stop_message(hub.push, release, "org/name")


@pytest.mark.parametrize("side", [-5, 1, 10**9, 32.5, None])
def test_an_absurd_image_size_is_not_exported(side, tmp_path):
    network = hub.Teacher(make_backbone("test_resnet"), {"architecture": "test_resnet"})
    assert "--image-size" in stop_message(export.export, network, tmp_path / "x.ts", "torchscript", side=side)


def test_every_file_of_a_release_and_of_a_checkpoint_has_the_umasks_mode(tmp_path):
    before = os.umask(0o027)
    try:
        make_run(tmp_path / "run", make_backbone("test_resnet"))
        os.chmod(tmp_path / "run" / "step_00000003" / "model.safetensors", 0o600)  # as older versions left it
        files = list(hub.build_release(tmp_path / "run").iterdir())
        files += [f for f in (tmp_path / "run" / "step_00000003").iterdir() if f.name != "model.safetensors"]
        make_run(tmp_path / "new", make_backbone("test_resnet"))
        files += list((tmp_path / "new" / "step_00000003").iterdir())
        write_whole(tmp_path / "small", "x")
    finally:
        os.umask(before)
    assert len(files) >= 6
    assert {stat.S_IMODE(f.stat().st_mode) for f in (*files, tmp_path / "small")} == {0o640}


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_says_so_whatever_its_protocol(protocol, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "created"),)

    (tmp_path / "x.pth").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol))
    torch.save({"state_dict": Evil()}, tmp_path / "y.pth", pickle_protocol=max(2, protocol))
    for file in ("x.pth", "y.pth"):
        message = stop_message(read_foreign, tmp_path / file)
        assert "refused, loading it would run code (posix.mkdir)" in message or "nt.mkdir" in message
    assert not (tmp_path / "created").exists()


def test_a_cards_title_survives_a_damaged_copy_of_the_trainer(tmp_path):
    (tmp_path / "simsiam.py").write_bytes(b"def (\x00")
    assert card._title_and_citation(tmp_path / "simsiam.py") == ("", "")
