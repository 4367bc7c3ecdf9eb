"""What a user may get wrong is told in one line that names the flag or the file and the remedy: DESIGN.md section 11."""

import errno
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import runs
import safetensors
import torch
from PIL import Image
from tools import make_backbone, make_run, stop_message

import common
import hub
from trainers import smd
from trainers.shared import sources

TRAINERS = {name: importlib.import_module(f"trainers.{name}") for name in runs.TRAINERS if name != "eval_finetune"}


def fields(name: str) -> set[str]:
    return set(TRAINERS[name].Args.__dataclass_fields__)


NETWORK = {name: "--student" if "student" in fields(name) else "--backbone" for name in TRAINERS}


def write_images(folder: Path, count: int = 24, side: int = 16, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A folder of PNGs, noise around a grey of their own; `side` may be a function of the number."""
    rng = np.random.default_rng(0)
    for i in range(count):
        size = side(i) if callable(side) else side
        pixels = rng.integers(0, 60, (size, size, 3), dtype=np.uint8) + np.uint8(i % 180)
        file = folder / (classes[i % len(classes)] if classes else "") / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


def write_parquet(folder: Path, count: int = 24, **columns) -> Path:
    """A parquet file of PNGs with class labels; further columns as given."""
    write_images(folder, count, classes=())
    rows = {
        "picture": [str(f) for f in sorted(folder.glob("*.png"))],
        "kind": [i % 2 for i in range(count)],
        "caption": [f"number {i}" for i in range(count)],
    }
    features = {
        "picture": datasets.Image(),
        "kind": datasets.ClassLabel(names=["cat", "dog"]),
        "caption": datasets.Value("string"),
    }
    file = folder / "rows.parquet"
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(file))
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    make_run(folder, make_backbone("test_resnet"))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A teacher with a classifier of as many classes as `photos` has."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    make_run(folder, make_backbone("test_resnet", num_classes=2))
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """The same of a CIFAR network."""
    folder = tmp_path_factory.mktemp("zoo") / "run"
    make_run(folder, make_backbone("resnet20", num_classes=2))
    return folder


@pytest.fixture
def train(tmp_path, photos, teacher, classifier, zoo):
    """Run a trainer in this process: two steps of the smallest network, unless the flags say otherwise."""

    def run(name: str, **flags) -> dict[str, float]:
        usual = {"data": photos, "run_dir": tmp_path / "run", "image_size": 16, "batch_size": 8, "total_steps": 2}
        usual |= {"num_workers": 0, "log_every": 1, NETWORK[name][2:]: "test_resnet"}
        if name in ("smd", "rkd"):
            usual |= {"group_size": 0}
        if "teacher" in fields(name):
            usual |= {"teacher": teacher}
        if name in runs.LABELLED and "teacher" in fields(name):
            usual |= {"teacher": classifier}
        if name == "ab":  # for CIFAR networks only
            usual |= {"teacher": zoo, "student": "resnet20"}
        if name in ("moco", "seed", "disco", "rkd"):
            usual |= {"queue_length": 2 * int(flags.get("batch_size", 8)), "bn_group_size": 0}
        if name in ("swav", "swav_disco"):
            usual |= {
                "queue_length": 0,
                "small_crops": 1,
                "small_crop_size": 8,
                "num_prototypes": 10,
                "hidden_dim": 16,
            }
        words = []
        for flag, value in (usual | flags).items():
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                words += [f"--{flag}", *map(str, value)]
            elif value is not None:
                words.append(f"--{flag}={value}")
        return TRAINERS[name].main(common.parse_args(TRAINERS[name].Args, words))

    return run


def steps_logged(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def lacks(message: str, parts: tuple[str, ...]) -> list[str]:
    return [part for part in parts if part not in message]


# ---------------------------------------------------------------------------------------------------------------------
# Flags and config files
# ---------------------------------------------------------------------------------------------------------------------

FLAG_MISTAKES = {
    "an unknown flag": (["--learning-rate=3"], "--learning-rate", "--help"),
    "a misspelt flag": (["--epoch", "3"], "--epoch", "did you mean --epochs"),
    "a word for a number": (["--epochs", "many"], "--epochs", "many"),
    "a fraction for a count": (["--batch-size", "1.5"], "--batch-size", "1.5"),
    "an illegal choice": (["--optimizer", "lion"], "--optimizer", "'sgd', 'adamw'"),
    "an illegal recipe": (["--augmentation", "rotate"], "--augmentation", "'moco_v2'", "'digits'"),
    "a flag without its value": (["--run-dir"], "--run-dir", "value"),
    "a word too many": (["photos"], "photos", "--help"),
    "--config without a file": (["--config"], "--config", "configs/"),
    "--config with an empty name": (["--config="], "--config", "configs/"),
    "a config that is not there": (["--config", "nowhere.toml"], "--config nowhere.toml", "No such file", "configs/"),
    "a folder for a config": (["--config", "."], "--config .", "directory", "configs/"),
}


@pytest.mark.parametrize("mistake", FLAG_MISTAKES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_wrong_flag_is_named_with_the_remedy(trainer, mistake):
    words, *parts = FLAG_MISTAKES[mistake]
    message = stop_message(common.parse_args, TRAINERS[trainer].Args, words)
    assert not lacks(message, parts), message


CONFIG_MISTAKES = {
    "a misspelt key": ("epoch = 3", "'epoch'", "did you mean 'epochs'"),
    "a key with a hyphen": ("batch-size = 3", "'batch-size'", "did you mean 'batch_size'"),
    "an unknown key": ("zzz = 3", "'zzz'", "--help"),
    "a word for a number": ('epochs = "many"', "--epochs", "many"),
    "a fraction for a count": ("batch_size = 1.5", "--batch-size", "1.5"),
    "an illegal choice": ('optimizer = "lion"', "--optimizer", "'sgd', 'adamw'"),
    "a word for a switch": ('resume = "yes"', "resume", "true or false"),
    "a switch for a number": ("batch_size = true", "batch_size", "a number"),
    "a table": ("[data]\nname = 3", "data", "a text"),
    "a list for a number": ("epochs = [1, 2]", "2", "--help"),
    "invalid TOML": ("epochs = = 3", "not valid TOML", "line 1"),
    "a file that is no text": (b"data = '\xff\xfe'", "not valid TOML"),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_wrong_config_is_named_with_the_remedy(tmp_path, trainer, mistake):
    text, *parts = CONFIG_MISTAKES[mistake]
    file = tmp_path / "wrong.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = stop_message(common.parse_args, TRAINERS[trainer].Args, ["--config", str(file)])
    assert message.startswith(f"--config {file}: ") and not lacks(message, parts), message


def test_a_message_does_not_depend_on_what_the_terminal_can_draw():
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, str(common.ROOT / "trainers" / "smd.py"), "--epoch", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    message = stop_message(common.parse_args, smd.Args, ["--epoch", "3"])
    assert done.returncode == 1 and done.stdout == "" and done.stderr == f"{message}\n"


NUMBERS = {
    "batch_size": (0, -8),
    "image_size": (0, 6),
    "save_every": (0,),
    "log_every": (0, -1),
    "keep": (0,),
    "total_steps": (-3,),
    "num_workers": (-1,),
    "bn_group_size": (3, -4, 16),
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in NUMBERS.items() for value in values])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_number_that_makes_no_sense_is_named(train, tmp_path, trainer, flag, value):
    message = stop_message(train, trainer, **{flag: value})
    assert f"--{flag.replace('_', '-')} {value}" in message and "must" in message
    assert not list(tmp_path.glob("run/step_*"))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_no_steps_to_do_is_named(train, trainer):
    message = stop_message(train, trainer, total_steps=0, epochs=0)
    assert "--epochs 0" in message and "--total-steps" in message


@pytest.mark.parametrize(
    "trainer, flag",
    [
        ("smd", "temperature"),
        ("moco", "temperature"),
        ("seed", "student_temperature"),
        ("seed", "teacher_temperature"),
        ("disco", "temperature"),
        ("disco", "consistency_weight"),
        ("rkd", "temperature"),
        ("rkd", "consistency_weight"),
        ("swav", "temperature"),
        ("swav_disco", "temperature"),
    ],
)
@pytest.mark.parametrize("value", [0.0, -0.1])
def test_a_number_that_is_not_above_zero_is_named(train, trainer, flag, value):
    assert f"--{flag.replace('_', '-')} {value}: must be above 0" in stop_message(train, trainer, **{flag: value})


@pytest.mark.parametrize("flag", ["crop_scale", "small_patch_scale"])
@pytest.mark.parametrize("share", [(0.5, 0.2), (0.0, 0.5), (0.5, 1.5)])
def test_a_share_of_the_image_that_makes_no_sense_is_named(train, flag, share):
    message = stop_message(train, "seed", **{flag: share})
    assert f"--{flag.replace('_', '-')} {share[0]} {share[1]}" in message and "share" in message


def test_a_patch_that_is_too_small_to_blur_is_named(train):
    message = stop_message(train, "seed", small_patches=2, small_patch_size=6)
    assert "--small-patch-size 6: must be at least 7" in message


@pytest.mark.parametrize("trainer", ["disco", "rkd"])
def test_a_hidden_layer_of_negative_width_is_named(train, trainer):
    assert "--hidden-dim -1: must be at least 0" in stop_message(train, trainer, hidden_dim=-1)


@pytest.mark.parametrize("flag", ["distance_weight", "angle_weight", "rank_weight", "attention_weight"])
def test_a_negative_weight_is_named(train, flag):
    assert f"--{flag.replace('_', '-')} -1.0: must be at least 0" in stop_message(train, "rkd", **{flag: -1.0})


def test_feature_maps_that_cannot_be_compared_are_named(train):
    message = stop_message(train, "rkd", attention_weight=1.0, student="test_vit", image_size=160)
    assert message.startswith("--attention-weight: student and teacher must end in (B, C, H, W) maps of one size")
    assert "(1, 101, 64) and (1, 96, 5, 5); leave it at 0" in message


@pytest.mark.parametrize("trainer", ["moco", "seed", "disco", "rkd"])
@pytest.mark.parametrize("length", [0, 12, 32])  # batches of 8, 24 images
def test_a_queue_that_does_not_fit_is_named(train, trainer, length):
    message = stop_message(train, trainer, queue_length=length)
    assert f"--queue-length {length}: must be a multiple of --batch-size 8 and at most the 24 images" in message


@pytest.mark.parametrize("trainer", ["swav", "swav_disco"])
@pytest.mark.parametrize("length", [-8, 12, 32])  # batches of 8, 24 images; 0 is none
def test_an_assignment_queue_that_does_not_fit_is_named(train, trainer, length):
    message = stop_message(train, trainer, queue_length=length)
    assert f"--queue-length {length}: must be a multiple of --batch-size 8 and at most the 24 images" in message


MULTI_CROP_NUMBERS = {
    "large_crops": 1, "small_crops": -1, "small_crop_size": 0, "num_prototypes": 1, "projection_dim": 0, "mse_weight": -0.5,
    "sinkhorn_iterations": 0, "epsilon": 0.01, "freeze_prototypes_steps": -1, "queue_start_epoch": -1,
}  # fmt: skip


@pytest.mark.parametrize("flag", MULTI_CROP_NUMBERS)
def test_a_number_that_makes_no_sense_to_multi_crop_trainers_is_named(train, flag):
    value = MULTI_CROP_NUMBERS[flag]
    asked = [name for name in ("swav", "swav_disco") if hasattr(TRAINERS[name].Args, flag)]
    assert asked
    for trainer in asked:
        message = stop_message(train, trainer, **{flag: value})
        assert f"--{flag.replace('_', '-')} {value}: must be at least" in message


@pytest.mark.parametrize("group_size, must", [(3, "divide --batch-size 8"), (-4, "be at least 0"), (16, "divide")])
@pytest.mark.parametrize("trainer", ["smd", "rkd"])
def test_groups_that_do_not_fit_the_batch_are_named(train, trainer, group_size, must):
    message = stop_message(train, trainer, group_size=group_size)
    assert f"--group-size {group_size}: must " in message and must in message


@pytest.mark.parametrize("group_size, flags", [(1, {}), (4, {"rank_weight": 1.0})])
def test_a_group_of_too_few_images_is_named(train, group_size, flags):
    message = stop_message(train, "rkd", group_size=group_size, **flags)
    assert f"--group-size {group_size}: must be at least {group_size + 1}, " in message


def test_a_learning_rate_that_blows_up_is_named_as_the_likely_cause(train):
    message = stop_message(train, "supervised", base_lr=1e30, total_steps=6, lr_per_epoch=False)
    assert "not finite" in message and "--base-lr" in message


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

DATA_MISTAKES = {
    "an empty folder": ("{tmp}/empty", {}, "no images", ".jpg"),
    "a folder of other files": ("{tmp}/texts", {}, "no images", ".jpg"),
    "a folder that is not there": ("{tmp}/nowhere", {}, "no such file or folder"),
    "a file that is not there": ("nowhere.parquet", {}, "no such file or folder"),
    "a dataset id without a connection": ("nobody/nothing", {}, "cannot be opened", "local folder"),
    "a folder without that split": ("{photos}", {"split": "test"}, "--split test", "cat, dog"),
    "a table without that split": ("{parquet}", {"split": "test"}, "--split test", "train"),
    "a table without that image column": ("{parquet}", {"image_column": "img"}, "--image-column img", "picture"),
    "a table without that label column": ("{parquet}", {"label_column": "y"}, "--label-column y", "kind"),
    "a column of words for images": ("{parquet}", {"image_column": "caption"}, "--image-column caption", "picture"),
    "a column of numbers for images": ("{parquet}", {"image_column": "kind"}, "--image-column kind", "picture"),
    "a table without images": ("{numbers}", {}, "no image column", "--image-column", "kind"),
    "a table without rows": ("{rowless}", {}, "rowless.parquet", "no data"),
    "a table that is cut off": ("{cut}", {}, "cannot be opened", "whole"),
    "more images than there are": ("{photos}", {"subset": "99"}, "--subset 99", "24 images"),
    "a share that is a word": ("{photos}", {"subset": "half"}, "--subset half", "10%"),
    "a batch above the data": ("{photos}", {"batch_size": 32}, "--batch-size 32", "24 images"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, photos) -> dict[str, Path]:
    """What the braces in DATA_MISTAKES stand for."""
    tmp = tmp_path_factory.mktemp("places")
    (tmp / "empty").mkdir()
    (tmp / "texts").mkdir()
    (tmp / "texts" / "readme.txt").write_text("no image")
    parquet = write_parquet(tmp / "table")
    table = datasets.Dataset.from_parquet(str(parquet), cache_dir=str(tmp / "cache"))
    table.select_columns(["kind"]).to_parquet(str(tmp / "numbers.parquet"))
    table.select([]).to_parquet(str(tmp / "rowless.parquet"))
    (tmp / "cut.parquet").write_bytes(parquet.read_bytes()[:-200])
    files = {name: tmp / f"{name}.parquet" for name in ("numbers", "rowless", "cut")}
    return {"tmp": tmp, "photos": photos, "parquet": parquet, **files}


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
@pytest.mark.parametrize("trainer", TRAINERS)
def test_data_that_cannot_be_used_is_named_with_the_remedy(train, places, trainer, mistake):
    data, flags, *parts = DATA_MISTAKES[mistake]
    message = stop_message(train, trainer, data=data.format(**places), **flags)
    assert not lacks(message, parts), message


def test_supervised_training_without_labels_says_where_they_would_come_from(train, tmp_path):
    flat = write_images(tmp_path / "flat", classes=())
    message = stop_message(train, "supervised", data=flat)
    assert f"--data {flat}" in message and "--label-column" in message
    train("simsiam", data=flat)  # the others need none


SPOILT = {
    "text": lambda data: b"this is no image",
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "header only": lambda data: data[:30],
}


def spoil(folder: Path, numbers: list[int], kind: str = "truncated") -> list[Path]:
    files = sorted(folder.rglob("*.png"), key=lambda f: f.name)
    for i in numbers:
        files[i].write_bytes(SPOILT[kind](files[i].read_bytes()))
    return [files[i] for i in numbers]


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("path, side", [("resident", 16), ("streamed", 100)])
def test_one_bad_image_among_many_is_skipped_counted_and_listed(train, tmp_path, capsys, path, side, kind):
    folder = write_images(tmp_path / "many", 101, side)
    (bad,) = spoil(folder, [50], kind)
    train("supervised", data=folder, batch_size=20, total_steps=7)
    said = capsys.readouterr().out
    assert path in said and "1 images could not be read" in said and "bad_images.txt" in said
    listed = (tmp_path / "run" / "bad_images.txt").read_text().splitlines()
    assert len(listed) == 1 and listed[0].startswith(f"{bad}: ")
    assert steps_logged(tmp_path / "run") == list(range(7))


def test_data_workers_report_bad_images_too(train, tmp_path):
    folder = write_images(tmp_path / "many", 101, 100)
    (bad,) = spoil(folder, [50])
    train("simsiam", data=folder, batch_size=20, total_steps=6, num_workers=1, log_every=5)
    assert str(bad) in (tmp_path / "run" / "bad_images.txt").read_text()


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("path, side", [("resident", 16), ("streamed", 100)])
def test_more_than_one_percent_of_bad_images_stops_the_run(train, tmp_path, trainer, path, side):
    folder = write_images(tmp_path / "many", 100, side)
    bad = spoil(folder, [20, 50, 70])
    message = stop_message(train, trainer, data=folder, batch_size=20, total_steps=20)
    assert f"--data {folder}: " in message and "of 100 images cannot be read (over 1 %)" in message
    assert any(str(file) in message for file in bad), message


@pytest.mark.parametrize("side", [16, 100])
def test_a_folder_where_every_image_is_bad_stops_at_once(train, tmp_path, side):
    folder = write_images(tmp_path / "all bad", 24, side)
    spoil(folder, list(range(24)), "text")
    assert f"--data {folder}" in stop_message(train, "simsiam", data=folder)


def test_an_image_that_vanishes_is_a_bad_one(train, tmp_path):
    folder = write_images(tmp_path / "many", 101)
    gone = sorted(folder.rglob("*.png"))[40]
    gone.unlink()
    gone.symlink_to(folder / "nowhere.png")
    train("supervised", data=folder)
    assert str(gone) in (tmp_path / "run" / "bad_images.txt").read_text()


def test_an_empty_cell_of_a_table_is_a_bad_image(train, tmp_path):
    file = write_parquet(tmp_path / "table", 101)
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    table = table.cast_column("picture", datasets.Image(decode=False))
    rows = table.to_list()
    rows[30]["picture"] = None
    datasets.Dataset.from_list(rows, features=table.features).to_parquet(str(file))
    train("supervised", data=file)
    assert f"{file} row 30: " in (tmp_path / "run" / "bad_images.txt").read_text()


def test_a_data_worker_that_dies_is_named_with_the_remedy(train, tmp_path, monkeypatch):
    decode = sources.decode_rgb

    def die_in_a_worker(data: bytes, *limit: int) -> torch.Tensor:
        return os._exit(1) if torch.utils.data.get_worker_info() else decode(data, *limit)

    monkeypatch.setattr(sources, "decode_rgb", die_in_a_worker)
    message = stop_message(train, "simsiam", data=write_images(tmp_path / "large", side=100), num_workers=1)
    assert "worker" in message and "--num-workers" in message and "--resume" in message


def test_images_of_several_sizes_are_streamed(train, tmp_path, capsys):
    folder = write_images(tmp_path / "mixed", side=lambda i: 16 + i)
    train("simsiam", data=folder, total_steps=4)
    assert "streamed" in capsys.readouterr().out and steps_logged(tmp_path / "run") == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINERS)
def test_an_unknown_network_is_named_with_those_that_are_close(train, trainer):
    message = stop_message(train, trainer, **{NETWORK[trainer][2:]: "resnet19"})
    assert "resnet19" in message and "did you mean" in message and "resnet18" in message


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_small_stem_for_a_network_without_one_is_named(train, trainer):
    flags = {NETWORK[trainer][2:]: "mobilenetv3_small_100", "small_images": True}
    message = stop_message(train, trainer, **flags)
    assert message.startswith("--small-images") and "mobilenetv3_small_100" in message and "resnet18_small" in message


def test_a_missing_teacher_is_named_with_the_ways_to_get_one(train):
    message = stop_message(train, "smd", teacher=None)
    assert "--teacher" in message and "timm/" in message and ".pth.tar" in message and "trainers/" in message


BAD_TEACHERS = {
    "/nowhere/teacher.pth.tar": ("no such file",),
    "nowhere/teacher": ("no such file or folder",),
    "timm/resnet19": ("resnet19", "did you mean"),
    "timm/resnet18": ("timm/resnet18", "connection"),
    "{photos}": ("config.json",),
    "{photos}/cat/0000.png": ("0000.png", "checkpoint"),
}


@pytest.mark.parametrize("spec", BAD_TEACHERS)
def test_a_teacher_that_cannot_be_had_is_named(train, photos, spec):
    spec, parts = spec.format(photos=photos), BAD_TEACHERS[spec]
    message = stop_message(train, "smd", teacher=spec)
    assert not lacks(message, parts), message


@pytest.mark.parametrize("trainer", TRAINERS)
def test_weights_to_start_from_that_do_not_fit_are_named(train, teacher, trainer):
    message = stop_message(train, trainer, init_from=teacher, **{NETWORK[trainer][2:]: "resnet18"})
    assert f"--init-from {teacher}" in message and "does not fit resnet18" in message
    assert "no such file" in stop_message(train, trainer, init_from="/nowhere/weights.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Run folders, checkpoints, disks, trackers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_used_run_folder_is_refused_and_left_as_it_was(train, tmp_path, trainer):
    train(trainer)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")}
    message = stop_message(train, trainer)
    assert f"--run-dir {tmp_path / 'run'}" in message and "--resume" in message
    assert len(before) > 8 and {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("*")} == before


def test_resume_with_nothing_there_starts_at_step_0_and_says_so(train, tmp_path, capsys):
    train("simsiam", resume=True)
    assert f"--resume: no checkpoint in {tmp_path / 'run'} yet: starting at step 0" in capsys.readouterr().out
    assert steps_logged(tmp_path / "run") == [0, 1]


def test_resuming_what_another_trainer_or_network_wrote_is_refused(train):
    train("simsiam")
    assert "another trainer" in stop_message(train, "smd", resume=True)
    message = stop_message(train, "simsiam", resume=True, backbone="test_efficientnet")
    assert message.startswith("--resume") and "--backbone is 'test_efficientnet'" in message


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("run_dir", ["a_file", "a_file/run"])
def test_a_run_folder_that_cannot_be_made_is_named(train, tmp_path, trainer, run_dir):
    (tmp_path / "a_file").write_text("in the way")
    message = stop_message(train, trainer, run_dir=tmp_path / run_dir)
    assert f"--run-dir {tmp_path / run_dir}" in message and "another folder" in message


def test_a_tracker_is_used_if_installed_and_named_if_not(train, tmp_path):
    trackers = ("tensorboard", "wandb", "trackio")
    installed = [name for name in trackers if importlib.util.find_spec(name)]
    for name in trackers:
        if name not in installed:
            message = stop_message(train, "simsiam", tracker=name, run_dir=tmp_path / name)
            assert f"--tracker {name}" in message and f"pip install {name}" in message
    assert len(installed) < len(trackers), "none is missing here: this test has checked nothing"
    if "tensorboard" in installed:
        train("simsiam", tracker="tensorboard", run_dir=tmp_path / "tensorboard")
        assert list((tmp_path / "tensorboard").rglob("events.out.tfevents.*"))


class FullDisk:
    """A function that works for the first checkpoint and then fails as on a full disk, leaving part of a file behind."""

    def __init__(self, function, error: Exception):
        self.function, self.error = function, error

    def __call__(self, content, file, *args, **kwargs):
        if ".step_00000001" not in str(file):
            Path(file).write_bytes(b"half of it")
            raise self.error
        return self.function(content, file, *args, **kwargs)


NO_SPACE = os.strerror(errno.ENOSPC)
FULL_DISKS = {
    "torch, by the system": ("torch.save", OSError(errno.ENOSPC, NO_SPACE)),
    "torch, by its zip writer": ("torch.save", RuntimeError("[enforce fail] PytorchStreamWriter failed writing file")),
    "safetensors": ("safetensors.torch.save_file", safetensors.SafetensorError(f"I/O error: {NO_SPACE}")),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("kind", FULL_DISKS)
def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(train, tmp_path, monkeypatch, trainer, kind):
    name, error = FULL_DISKS[kind]
    function = torch.save if name == "torch.save" else safetensors.torch.save_file
    with monkeypatch.context() as patch:
        patch.setattr(name, FullDisk(function, error))
        message = stop_message(train, trainer, total_steps=3, save_every=1)
    run = tmp_path / "run"
    assert "step_00000002" in message and "free space" in message and "--resume" in message
    assert sorted(p.name for p in [*run.glob("step_*"), *run.glob(".step_*")]) == ["step_00000001"]
    train(trainer, total_steps=3, save_every=1, resume=True)
    assert steps_logged(run) == [0, 1, 2] and (run / "step_00000003" / "state.pt").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's always-full device")
def test_a_full_disk_under_the_log_or_the_release_is_one_line(tmp_path):
    run = make_run(tmp_path / "run", make_backbone("test_resnet"))
    run.start(3, 5)
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    message = stop_message(run.log, 4, loss=1.0)
    assert str(tmp_path / "run") in message and "free space" in message


def test_a_release_that_cannot_be_written_is_one_line_with_the_command_to_retry(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", make_backbone("test_resnet"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copy", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, NO_SPACE)))
        message = stop_message(hub.build_release, run.dir)
    assert NO_SPACE in message and f"python hub.py build {run.dir}" in message
    assert not (run.dir / ".release").exists()
    assert hub.build_release(run.dir).is_dir()


@pytest.mark.parametrize("damage", ["empty", "cut", "overwritten", "gone"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(train, tmp_path, capsys, damage):
    train("simsiam", total_steps=4, save_every=2)
    run = tmp_path / "run"
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = run / "step_00000004" / "state.pt"
    whole = state.read_bytes()
    broken = {"empty": b"", "cut": whole[: len(whole) // 2], "overwritten": b"\0" * len(whole)}
    state.write_bytes(broken[damage]) if damage in broken else state.unlink()
    capsys.readouterr()
    train("simsiam", total_steps=4, save_every=2, resume=True)
    said = capsys.readouterr().out
    assert "step_00000004 is not whole" in said and "the one before" in said
    assert "resumed from" in said and "at step 2" in said
    again = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again == losses, "steps 2 and 3 must repeat what the uninterrupted run did"


def test_resume_stops_where_no_checkpoint_is_whole(train, tmp_path):
    train("simsiam", save_every=1)
    states = sorted((tmp_path / "run").glob("step_*/state.pt"))
    assert len(states) == 2
    for state in states:
        state.write_bytes(b"")
    message = stop_message(train, "simsiam", resume=True)
    assert "no whole checkpoint" in message and "step_00000001 is not whole" in message


# ---------------------------------------------------------------------------------------------------------------------
# The command line as a user sees it
# ---------------------------------------------------------------------------------------------------------------------


def test_a_mistake_on_the_command_line_prints_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, str(common.ROOT / "trainers" / "smd.py"), "--data", str(tmp_path / "nowhere")]
    done = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"--data {tmp_path / 'nowhere'}: no such file or folder\n"
