"""Flags that nobody gave are fitted to small data, said in one line and recorded; flags that were given are refused."""

import dataclasses
import importlib
import json
import os
import shutil

import pytest
from conftest import ROOT
from runs import TRAINERS
from test_bad_input import write_images
from tools import make_backbone, make_run, stop_message

import common
from trainers import crd, eval_knn, eval_metrics, eval_tsne, kd, moco, rkd, simsiam, smd, swav_disco
from trainers.shared.fitting import fitted, given_names


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """40 pictures of two classes to train on, and 8 more."""
    folder = tmp_path_factory.mktemp("forty")
    write_images(folder / "train", 40)
    write_images(folder / "val", 8)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    make_run(folder := tmp_path_factory.mktemp("teacher") / "run", make_backbone("test_resnet", num_classes=2))
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """The same of a CIFAR network, which ab.py needs."""
    make_run(folder := tmp_path_factory.mktemp("zoo") / "run", make_backbone("resnet20", num_classes=2))
    return folder


def words(method: str, data, teacher, run_dir, *more: str) -> list[str]:
    """A command line of what a user must say: data, a network, its teacher; tiny views and two steps."""
    fields = importlib.import_module(f"trainers.{method}").Args.__dataclass_fields__
    flags = {"data": data, "run_dir": run_dir, "image_size": 16, "total_steps": 2, "backbone": "test_resnet",
             "student": "test_resnet", "teacher": teacher, "checkpoint": teacher, "checkpoints": teacher,
             "small_crop_size": 8}  # fmt: skip
    return [word for name, value in flags.items() if name in fields for word in (f"--{name}", str(value))] + [*more]


def run(method: str, data, teacher, run_dir, *more: str) -> dict:
    """Run it in this process; the flags of args.json."""
    trainer = importlib.import_module(f"trainers.{method}")
    trainer.main(common.parse_args(trainer.Args, words(method, data, teacher, run_dir, *more)))
    return json.loads((run_dir / "args.json").read_text())


@pytest.mark.parametrize("method", [*TRAINERS, "eval_linear", "eval_knn", "eval_metrics", "eval_tsne"])
def test_forty_pictures_train_at_the_first_attempt(forty, teacher, zoo, tmp_path, capsys, method):
    more = ("--student", "resnet20", "--teacher", str(zoo)) if method == "ab" else ()
    flags = run(method, forty, teacher, tmp_path / "run", *more)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fitted to ")]
    before = dataclasses.asdict(importlib.import_module(f"trainers.{method}").Args())
    changed = [name for name in ("batch_size", "queue_length", "group_size", "bn_group_size", "k") if name in flags]
    changed = [name for name in changed if flags[name] != (list(before[name]) if name == "k" else before[name])]
    assert len(said) == (method != "eval_metrics")  # which fits as it is
    for name in changed:
        assert said[0].startswith("fitted to 40 images") and f"--{name.replace('_', '-')} " in said[0]
    assert flags.get("batch_size", 40) == 40 and flags.get("queue_length", 0) in (0, 40)


def test_what_is_said_of_names_that_are_not_utf8_loses_no_run(forty, teacher, tmp_path, capsys):
    shutil.copytree(forty, tmp_path / "data")
    with open(os.fsencode(tmp_path / "data" / "train") + b"/.caf\xe9.png", "wb") as file:
        file.write(b"x")
    run("simsiam", tmp_path / "data", teacher, tmp_path / "run")
    assert "skipped 1 hidden or system files and folders (.caf\\udce9.png)" in capsys.readouterr().out


GIVEN = {
    "a batch": ("simsiam", ["--batch-size", "64"], "--batch-size 64: larger than the 40 images"),
    "a queue": ("moco", ["--queue-length", "64"], "--queue-length 64: must be a multiple"),
    "a queue with an underscore": ("seed", ["--queue_length=64"], "--queue-length 64: must be a multiple"),
    "groups": ("smd", ["--batch-size", "16", "--group-size", "128"], "--group-size 128: must divide --batch-size 16"),
    "BatchNorm groups": ("moco", ["--bn-group-size", "64"], "--bn-group-size 64: must divide --batch-size 40"),
    "neighbours": ("eval_knn", ["--k", "10", "200"], "--k 10 200: give numbers from 1 to 40"),
}


@pytest.mark.parametrize("flag", GIVEN)
def test_a_flag_that_was_given_is_refused_as_ever(forty, teacher, tmp_path, flag):
    method, more, message = GIVEN[flag]
    assert message in stop_message(run, method, forty, teacher, tmp_path / "run", *more)


def test_a_config_that_was_named_gives_its_flags_and_the_shipped_one_does_not(forty, teacher, tmp_path, capsys):
    (tmp_path / "mine.toml").write_text("batch_size = 256\n")
    message = stop_message(run, "moco", forty, teacher, tmp_path / "a", "--config", str(tmp_path / "mine.toml"))
    assert "--batch-size 256: larger than the 40 images" in message
    shipped = common.parse_args(simsiam.Args, ["--data", "digits", "--subset", "20"])
    assert shipped.config == ROOT / "configs" / "simsiam" / "digits.toml"
    assert given_names(shipped) == {"data", "subset"}
    flags = run("simsiam", "digits", teacher, tmp_path / "b", "--subset", "20")
    assert flags["batch_size"] == 20 and "fitted to 20 images" in capsys.readouterr().out


def test_what_counts_as_given():
    parsed = common.parse_args(kd.Args, ["--no-compile", "--batch_size=64", "--data", "x"])
    assert given_names(parsed) >= {"compile", "batch_size", "data"} and "epochs" not in given_names(parsed)
    assert given_names(kd.Args(epochs=3)) == {"epochs"}
    assert given_names(dataclasses.replace(parsed, epochs=3)) == {"epochs", "data"}  # made, not parsed
    assert "given" not in "".join(vars(parsed))


def fit(trainer, images: int, processes: int = 1, cores: int = 0, **given) -> dict:
    return fitted(trainer.Args(**given), set(given), images, processes, cores)


def test_large_data_change_nothing():
    for method in [*TRAINERS, "eval_knn", "eval_linear"]:
        assert not fit(importlib.import_module(f"trainers.{method}"), 1_281_167)


@pytest.mark.parametrize("images", [1, 2, 7, 37, 40, 100, 250, 254, 300, 511, 513, 60_000])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("trainer", [moco, rkd, smd, swav_disco], ids=lambda m: m.__name__)
def test_what_is_fitted_is_what_the_checks_accept(trainer, images, processes):
    args = trainer.Args()
    if args.batch_size % processes or images < processes:
        return  # refused before, whatever the data
    args = dataclasses.replace(args, **fit(trainer, images, processes))
    batch, share = args.batch_size, args.batch_size // processes
    assert 0 < batch <= images and batch % processes == 0 and batch > min(images, trainer.Args.batch_size) - processes
    for name in ("group_size", "bn_group_size"):
        group = getattr(args, name, 0) or batch
        assert batch % group == 0 and (share % group == 0 or group % share == 0)
        assert group > 1 or batch == 1 or share == 1
    queue = getattr(args, "queue_length", 0)
    assert (
        queue % batch == 0
        and queue <= images
        and queue + batch > min(images, getattr(trainer.Args, "queue_length", 0))
    )


def test_a_batch_nobody_gave_goes_with_groups_and_queues_that_somebody_did():
    assert fit(smd, 40, group_size=16) == {"batch_size": 32}
    assert fit(moco, 40, queue_length=36) == {"batch_size": 36, "bn_group_size": 18}
    assert fit(moco, 40, batch_size=8) == {"bn_group_size": 8, "queue_length": 40}
    assert fit(moco, 1000, batch_size=250) == {"bn_group_size": 25, "queue_length": 1000}


def test_workers_are_at_most_the_cores_of_a_process_where_images_are_streamed():
    assert fit(simsiam, 10_000, cores=2) == {"num_workers": 2} and not fit(simsiam, 10_000, cores=16)
    assert not fit(simsiam, 10_000, cores=2, num_workers=4)


def test_neighbours_negatives_and_perplexity_are_fewer_than_the_images():
    assert fit(eval_knn, 40)["k"] == (10, 20) and fit(eval_knn, 5)["k"] == (5,)
    assert fit(eval_metrics, 4)["topk"] == 3 and fit(eval_tsne, 22)["perplexity"] == 7
    assert fit(crd, 40) == {"batch_size": 40, "crd_negatives": 39}
