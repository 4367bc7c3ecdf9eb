"""Folders, tables and labels as people have them: what is a split, a class, a label, and what is no data."""

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_bad_input import write_images
from test_sources import write_tsv
from tools import stop_message

import common
from trainers.shared import tables
from trainers.shared.labels import read_labels


def tree(root: Path, **folders: tuple[str, ...]) -> Path:
    """Two pictures in each folder named by a keyword, or in each of its class folders; __ in a keyword is /."""
    for name, classes in folders.items():
        write_images(root / name.replace("__", "/"), 2 * max(1, len(classes)), 8, classes)
    return root


def opened(root: Path, role: str = "train", **options) -> common.Source | None:
    return common.open_source(str(root), role, resident=False, **options)


def answer(root: Path, **options) -> tuple:
    """(folder read below root, images, classes) to train on, and the folder to evaluate on."""
    train = opened(root, **options)
    queries = opened(root, "eval", train_split=options.get("split", ""))
    below = [None if s is None else os.path.relpath(s.name, root) for s in (train, queries)]
    return below[0], len(train), list(train.classes), below[1]


CD = ("cat", "dog")
LAYOUTS = {  # name: (folders, what is read to train on, images, classes, what to evaluate on)
    "splits of classes": ({"train": CD, "val": CD}, "train", 4, ["cat", "dog"], "val"),
    "a class called train": ({"bus": (), "car": (), "train": (), "tram": ()}, ".", 8, ["bus", "car", "train", "tram"], None),
    "a class called test": ({"sample": (), "standard": (), "test": ()}, ".", 6, ["sample", "standard", "test"], None),
    "train and tram": ({"train": (), "tram": ()}, ".", 4, ["train", "tram"], None),
    "an unlabelled part": ({"train": CD, "val": CD, "unlabeled": ()}, "train", 4, ["cat", "dog"], "val"),
    "a flat unlabelled part": ({"train": (), "val": (), "unlabeled": ()}, "train", 2, [], "val"),
    "a part of the same classes": ({"train": CD, "more": CD}, "train", 4, ["cat", "dog"], None),
    "a flat test": ({"train": CD, "test": (), "sample": ()}, "train", 4, ["cat", "dog"], "test"),
    "capitals": ({"Train": CD, "Test": CD}, "Train", 4, ["cat", "dog"], "Test"),
    "years": ({"train2017": (), "val2017": ()}, "train2017", 2, [], "val2017"),
    "sets": ({"training_set": CD, "test_set": CD}, "training_set", 4, ["cat", "dog"], "test_set"),
    "one level down": ({"images__train": (), "images__val": ()}, "images/train", 2, [], "images/val"),
    "one folder in a split": ({"train__images": (), "val__images": ()}, "train", 2, [], "val"),
    "classes below one folder": ({"train__images": CD}, "train", 4, ["cat", "dog"], None),
    "a split with one of the classes": ({"train": CD, "val": ("dog",)}, "train", 4, ["cat", "dog"], "val"),
    "one folder": ({"cat": ()}, ".", 2, [], None),
    "a single split": ({"test": CD}, "test", 4, ["cat", "dog"], None),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_and_classes_are_told_apart(tmp_path, layout):
    folders, *expected = LAYOUTS[layout]
    (tree(tmp_path, **folders) / "labels").mkdir()  # a folder without images does not count
    assert answer(tmp_path) == tuple(expected)


ASKED = {
    "a split beside a class": {"train": CD, "bus": ()},
    "classes of classes": {"train": ("diesel", "steam"), "bus": ("city", "school")},
    "train, test and another": {"train": (), "test": (), "bus": ()},
    "pictures and their masks": {"train_images": (), "bus": ()},
}


@pytest.mark.parametrize("layout", ASKED)
def test_a_folder_that_may_be_either_is_asked_about_and_split_answers(tmp_path, layout):
    tree(tmp_path, **ASKED[layout])
    message = stop_message(opened, tmp_path)
    name = next(name for name in ASKED[layout] if name.startswith("train"))
    assert f"--split {name}" in message and "--split ." in message and "bus" in message
    below, count, classes, _ = answer(tmp_path, split=name)
    assert below == name and count == len(opened(tmp_path / name))
    below, count, classes, queries = answer(tmp_path, split=".")
    assert (below, classes, queries) == (".", sorted(ASKED[layout]), None)


def test_images_beside_a_folder_called_test_are_not_passed_over(tmp_path):
    write_images(tree(tmp_path, test=()), 6, 8, ())
    message = stop_message(opened, tmp_path)
    assert "--split test" in message and "images" in message
    assert answer(tmp_path, split=".") == (".", 8, [], None) and answer(tmp_path, split="test")[:2] == ("test", 2)


def test_folders_that_hold_splits_of_their_own_are_asked_about(tmp_path):
    tree(tmp_path, images__train=(), images__val=(), masks__train=(), masks__val=())
    assert f"--data {tmp_path / 'images'}" in stop_message(opened, tmp_path)
    assert len(opened(tmp_path / "images")) == 2


def test_what_systems_leave_behind_is_skipped_and_counted(tmp_path):
    root = tree(
        tmp_path / "data", cat=(), dog=(), **{"@eaDir": (), "$RECYCLE.BIN": (), "#recycle": (), "lost+found": ()}
    )
    tree(root, **{".ipynb_checkpoints": (), ".Trash-1000": (), "System Volume Information": ()})
    write_images(root / "__MACOSX" / "cat", 2, 8, ())
    (root / "cat" / "._0000.png").write_bytes(b"\x00\x05\x16\x07")
    (root / "dog" / "Thumbs.db").write_bytes(b"x")
    source = opened(root)
    assert (len(source), list(source.classes)) == (4, ["cat", "dog"]) and not source.bad
    (note,) = source.notes
    assert note.startswith("skipped 10 hidden or system files and folders (#recycle, $RECYCLE.BIN, ")
    write_tsv(tmp_path / "tsv" / "train.tsv")
    (tmp_path / "tsv" / "._train.tsv").write_bytes(b"\x00\x05\x16\x07\tx\ty")
    assert len(opened(tmp_path / "tsv")) == 24


def test_links_are_followed_once_and_never_upwards(tmp_path):
    root = tree(tmp_path / "loop", train=CD, val=CD)
    os.symlink("../..", root / "train" / "cat" / "up")
    os.symlink("dog", root / "train" / "hound")
    os.symlink("itself", root / "train" / "itself")
    assert answer(root) == ("train", 4, ["cat", "dog"], "val") and "skipped 2 links" in opened(root).notes[0]
    (tmp_path / "links").mkdir()
    for name in CD:
        os.symlink(root / "train" / name, tmp_path / "links" / name)
    os.symlink(root / "train" / "cat", tmp_path / "links" / "zebra")
    assert answer(tmp_path / "links") == (".", 4, ["cat", "dog"], None)


def test_a_few_images_beside_class_folders_are_left_out_and_many_mean_no_classes(tmp_path):
    write_images(tmp_path, 40, 8)
    shutil.copy(tmp_path / "cat" / "0000.png", tmp_path / "test.png")
    source = opened(tmp_path)
    assert (len(source), list(source.classes)) == (40, ["cat", "dog"]) and "left out 1 image" in source.notes[0]
    shutil.copy(tmp_path / "test.png", tmp_path / "more.png")
    source = opened(tmp_path)
    assert len(source) == 42 and source.labels is None and "beside the folders" in source.no_labels


STRAY = {
    "labels.csv": "id,breed\n1,x\n",
    "annotations.json": '{"images": []}',
    "metadata.tsv": "file\tlabel\tkind\na.jpg\tcat\tx\n",
    "checksums.tsv": f"a.jpg\tcat\t{'0a' * 32}\n",
    "notes.jsonl": '{"a": 1}\n',
    "metadata.csv": "id,breed\n1,x\n",
}


@pytest.mark.parametrize("name", [*STRAY, "features.parquet"])
def test_a_table_that_lies_about_hides_no_images(tmp_path, name):
    root = tree(tmp_path, train=CD, val=CD)
    if name in STRAY:
        (root / name).write_text(STRAY[name])
    else:
        datasets.Dataset.from_dict({"x": [1.0]}).to_parquet(str(root / name))
    assert answer(root) == ("train", 4, ["cat", "dog"], "val")
    assert answer(root / "train") == (".", 4, ["cat", "dog"], None)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("place", ["beside", "above"])
def test_labels_of_a_folder_may_stand_in_a_metadata_table(tmp_path, suffix, place):
    root = tree(tmp_path, train=(), val=())
    names = sorted(file.name for file in (root / "train").glob("*.png"))
    for split in ("train", "val"):
        rows = [
            {"file_name": n if place == "beside" else f"{split}/{n}", "kind": f"k{i}"} for i, n in enumerate(names)
        ]
        rows = rows[:1] if split == "val" else rows
        folder = root / split if place == "beside" else root
        file, known = folder / f"metadata{suffix}", []
        if place == "above" and split == "val":
            continue
        if suffix == ".csv":
            file.write_text("file_name,kind\n" + "".join(f"{r['file_name']},{r['kind']}\n" for r in rows + known))
        elif suffix == ".jsonl":
            file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        else:
            datasets.Dataset.from_list(rows).to_parquet(str(file))
    source = opened(root, label_column="kind")
    assert list(source.classes) == ["k0", "k1"] and source.labels.tolist() == [0, 1]
    queries = opened(root, "eval", label_column="kind")
    if place == "beside":
        assert queries.labels.tolist() == [0, -1] and "1 of 2 labels" in queries.no_labels
    else:
        assert queries.labels is None and "no label at all" in queries.no_labels
    assert "has the columns kind" in stop_message(opened, root, label_column="nosuch")


def test_a_label_column_that_no_table_has_and_a_damaged_table_are_named(tmp_path):
    root = tree(tmp_path, cat=(), dog=())
    assert "--label-column kind" in stop_message(opened, root, label_column="kind")
    (root / "metadata.jsonl").write_text('{"file_name": ')
    assert "metadata.jsonl" in stop_message(opened, root, label_column="kind")


# ---------------------------------------------------------------------------------------------------------------------
# Labels
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = {  # values, the labels they are, the classes or the words of the reason that they are none
    "whole numbers": ([0, 2, 0, 2], [0, 2, 0, 2], ["0", "1", "2"]),
    "whole floats": ([0.0, 1.0, 1.0], [0, 1, 1], ["0", "1"]),
    "true and false": ([True, False, True], [1, 0, 1], ["False", "True"]),
    "words": (["eel", "cat", "eel"], [1, 0, 1], ["cat", "eel"]),
    "words that are numbers": (["9", "10", "11"] * 4, [0, 1, 2] * 4, ["9", "10", "11"]),
    "a number like a telephone's": ([1_000_000_000, 3, 3], [1, 0, 0], ["3", "1000000000"]),
    "a number beyond 64 bits": ([2**70, 1, 1], [1, 0, 0], ["1", str(2**70)]),
    "numbers below 0": ([-2, -1, 0, 1, 2], [0, 1, 2, 3, 4], ["-2", "-1", "0", "1", "2"]),
    "a null": ([0, None, 1], [0, -1, 1], ["0", "1"]),
    "-1": ([0, -1, 1], [0, -1, 1], ["0", "1"]),
    "an empty word": (["cat", "", "dog"], [0, -1, 1], ["cat", "dog"]),
    "not a number": ([0.0, float("nan"), 1.0], [0, -1, 1], ["0", "1"]),
    "fractions": ([0.5, 1.25, 2.0], None, "fractions"),
    "infinity": ([0.0, float("inf")], None, "fractions"),
    "captions": ([f"a photo of number {i}" for i in range(60)], None, "60 different values"),
    "keys": ([10**9 + i for i in range(60)], None, "60 different values"),
    "lists": ([[0, 1], [1]], None, "lists"),
    "dicts": ([{"a": 1}], None, "dicts"),
    "nothing": ([None, None], None, "no label at all"),
    "a mixture": ([1, "cat"], None, "int and str"),
}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_gives_labels_or_the_reason_why_not(column):
    values, expected, said = COLUMNS[column]
    labels, classes, line = read_labels(values, "kind")
    if expected is None:
        assert labels is None and not classes and said in line and "kind" in line
    else:
        assert labels.tolist() == expected and list(classes) == said and labels.dtype == torch.int64
        assert bool(line) == (-1 in expected)


FEATURES = {
    "several labels": (datasets.Sequence(datasets.Value("int64")), lambda i: [i % 3, 3], "lists"),
    "several named labels": (datasets.Sequence(datasets.ClassLabel(names=list("abcd"))), lambda i: [i % 3], "lists"),
    "an image": (datasets.Image(), lambda i: Image.new("RGB", (8, 8)), "images"),
    "attributes": ({"shape": datasets.Value("int64")}, lambda i: {"shape": i}, "structs"),
    "a measurement": (datasets.Value("float32"), lambda i: i * 0.37, "fractions"),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_a_column_called_label_that_holds_no_classes_gives_none(tmp_path, kind):
    feature, value, said = FEATURES[kind]
    rows = {"image": [Image.new("RGB", (8, 8))] * 12, "label": [value(i) for i in range(12)]}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    source = common.open_source(str(tmp_path / "x.parquet"))
    assert source.labels is None and said in source.no_labels and len(source) == 12
    assert said in stop_message(common.count_classes, "x", source)
    assert said in stop_message(common.labelled_pair, "x", source, source)


def test_named_classes_keep_their_numbers_and_a_null_is_none():
    labels, classes, line = tables.read_named_labels([2, None, 0, -1], ["a", "b", "c"], "kind")
    assert labels.tolist() == [2, -1, 0, -1] and classes == ["a", "b", "c"] and "2 of 4 labels" in line
    assert tables.read_named_labels([-1, -1], ["a"], "kind")[0] is None


def test_a_huge_label_in_a_tsv_file_makes_no_names(tmp_path):
    write_tsv(tmp_path / "train.tsv", label=lambda i: "1000000000" if i % 2 else "7")
    source = opened(tmp_path)
    assert list(source.classes) == ["7", "1000000000"] and source.labels.tolist() == [0, 1] * 12


@pytest.mark.parametrize("damage", ["cut", "word", "fraction", "far", "below", "unsorted", "empty", "bytes", "huge"])
def test_a_damaged_index_of_a_tsv_file_is_named(tmp_path, damage):
    file = write_tsv(tmp_path / "train.tsv")
    index = file.with_suffix(".lineidx")
    lines = index.read_text().split()
    damaged = {
        "cut": lines[:20],
        "word": [*lines[:5], "x", *lines[6:]],
        "fraction": [*lines[:5], "3.5", *lines[6:]],
        "far": [*lines, str(10**9)],
        "below": ["-5", *lines[1:]],
        "unsorted": [lines[0], *reversed(lines[1:])],
        "empty": [],
        "bytes": lines,
        "huge": [*lines[:-1], "9" * 30],
    }[damage]
    index.write_text("\n".join(damaged))
    if damage == "bytes":
        index.write_bytes(b"\xff\xfe\x00")
    message = stop_message(opened, file)
    assert str(file) in message and "delete train.lineidx" in message


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def small_table(file: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": images, "label": [i % 2 for i in range(count)]}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    return file


def test_brackets_in_a_path_are_names_and_shard_patterns_still_work(tmp_path):
    folder = tmp_path / "photos [2024]"
    small_table(folder / "x.parquet")
    assert len(common.open_source(str(folder / "x.parquet"))) == 12
    assert len(common.open_source(str(folder / "*.parquet"))) == 12
    assert len(common.open_source(str(folder / "[xy].parquet"))) == 12
    assert len(common.open_source(str(tmp_path / "photos*" / "?.parquet"))) == 12
    small_table(folder / "data" / "train-00000-of-00001.parquet")
    small_table(folder / "data" / "test-00000-of-00001.parquet", 4)
    (folder / "x.parquet").unlink()
    assert [len(common.open_source(str(folder), role)) for role in ("train", "eval")] == [12, 4]
    tree(tmp_path / "f [1]", cat=(), dog=())
    assert len(opened(tmp_path / "f [1]")) == 4
    assert "no such file" in stop_message(common.open_source, str(folder / "y*.parquet"))


def test_configurations_are_chosen_by_flag_or_name_and_listed(tmp_path):
    for name, count in (("small", 4), ("large", 12)):
        small_table(tmp_path / name / "train.parquet", count)
    card = "".join(f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    assert "small, large; choose one with --data-config" in stop_message(common.open_source, str(tmp_path))
    assert len(common.open_source(str(tmp_path), config="small")) == 4
    assert len(common.open_source(f"{tmp_path}:large")) == 12
    message = stop_message(common.open_source, str(tmp_path), config="huge")
    assert "--data-config huge" in message and "small, large" in message
    assert "--data-config x" in stop_message(common.open_source, "digits", config="x")
    tree(tmp_path / "f", cat=(), dog=())
    assert "--data-config x" in stop_message(common.open_source, str(tmp_path / "f"), config="x")


def test_a_cache_that_cannot_be_written_names_hf_home(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "file" / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "hf" / "datasets")
    message = stop_message(common.open_source, str(small_table(tmp_path / "x.parquet")))
    assert "HF_HOME" in message and str(tmp_path / "file" / "hf") in message and "whole" not in message


def test_a_picture_for_a_folder_is_named(tmp_path):
    file = write_images(tmp_path, 1, 8, ()) / "0000.png"
    assert "is one image" in stop_message(common.open_source, str(file))


# ---------------------------------------------------------------------------------------------------------------------
# Boxes
# ---------------------------------------------------------------------------------------------------------------------


def roboflow(root: Path, boxes: list) -> Path:
    """train/ and valid/ with their images and _annotations.coco.json, one object an image."""
    for split in ("train", "valid"):
        write_images(root / split, len(boxes), 16, ())
        content = {
            "categories": [{"id": 0, "name": "things"}, {"id": 1, "name": "cat"}],
            "images": [{"id": i, "file_name": f"{i:04d}.png", "height": 16, "width": 16} for i in range(len(boxes))],
            "annotations": [{"id": 70 + i, "image_id": i, "category_id": 1, "bbox": b} for i, b in enumerate(boxes)],
        }
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def test_coco_as_roboflow_writes_it_is_opened(tmp_path):
    roboflow(tmp_path, [[1, 2, 3, 4], [2, 2, 5, 5]])
    train, test = (common.open_objects(str(tmp_path), role) for role in ("train", "eval"))
    assert [things[0]["bbox"] for things in train.objects] == [[1, 2, 3, 4], [2, 2, 5, 5]]
    assert train.source.read(0) == (tmp_path / "train" / "0000.png").read_bytes()
    assert test.source.where(0).endswith("valid/0000.png")
    alone = common.open_objects(str(tmp_path / "train"))
    assert len(alone) == 2 and common.open_objects(str(tmp_path / "train"), "eval") is None


def test_boxes_that_are_none_are_left_out_and_named_by_annotation(tmp_path):
    wrong = [[], None, [1, 2, 3], [1, 2, 0, 4], [1, 2, -3, 4], [1, 2, "x", 4], [1, 2, float("nan"), 4], 7]
    roboflow(tmp_path, [[1, 2, 3, 4], *wrong])
    found = common.open_objects(str(tmp_path))
    assert [len(things) for things in found.objects] == [1] + [0] * len(wrong)
    (note,) = found.source.notes
    assert f"{len(wrong)} boxes" in note and "annotation 71, annotation 72" in note


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"images": []}', "[" * 100_000, '{"categories": ["cat"], "images": []}', "\x00"]
)
def test_json_that_is_cut_or_of_something_else_is_named(tmp_path, text):
    roboflow(tmp_path, [[1, 2, 3, 4]])
    (tmp_path / "train" / "_annotations.coco.json").write_text(text)
    assert "_annotations.coco.json" in stop_message(common.open_objects, str(tmp_path))


def test_boxes_of_a_table_that_are_none_are_left_out(tmp_path):
    rows = {
        "image": [Image.new("RGB", (16, 16))] * 3,
        "objects": [{"bbox": [[1.0, 2, 3, 4], [1.0, 2, 0, 4]], "category": ["cat", "dog"]}, {"bbox": [[]], "category": ["a"]},
                    {"bbox": None, "category": None}],
    }  # fmt: skip
    objects = {"bbox": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
               "category": datasets.Sequence(datasets.Value("string"))}  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    found = common.open_objects(str(tmp_path / "x.parquet"))
    assert [len(things) for things in found.objects] == [1, 0, 0] and "2 boxes" in found.source.notes[0]
