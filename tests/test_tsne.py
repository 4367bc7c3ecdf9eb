"""eval_tsne.py: the same picture every time, one scale, classes that can be told apart, and flags to files."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from runs import photographs, run_pair
from together import run_here
from tools import stop_message

import common
from trainers import eval_tsne
from trainers.eval_tsne import choose_classes, draw, embed, same_class_neighbours, shortened
from trainers.shared.run import save_backbone

pytest.importorskip("matplotlib", reason="the extra plot")
pytestmark = pytest.mark.usefixtures("digits_once")


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> list[str]:
    """Two release folders: small random networks whose BatchNorm has seen the digits, so that their features differ."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        backbone = common.create_backbone("test_resnet").train()
        with torch.no_grad():
            for _ in range(20):
                backbone(common.open_source("digits", "eval").pixels[:128].float() / 255)
        folders.append(tmp_path_factory.mktemp(f"network{seed}_"))
        save_backbone(folders[-1], backbone, 32)
    return [str(folder) for folder in folders]


def tsne_args(checkpoints, run_dir, **flags):
    defaults = {"image_size": 32, "num_workers": 0, "images_per_class": 6, "perplexity": 10.0}
    return eval_tsne.Args(checkpoints=tuple(checkpoints), run_dir=run_dir, **(defaults | flags))


def clusters(classes: int = 3, each: int = 20) -> tuple[torch.Tensor, np.ndarray]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(classes).repeat_interleave(each)
    return 6 * torch.randn(classes, 8, generator=g)[labels] + torch.randn(len(labels), 8, generator=g), labels.numpy()


def test_the_embedding_keeps_neighbours_and_is_the_same_every_time():
    features, labels = clusters()
    points, divergence = embed(features, 10.0, 0, 0)
    again, _ = embed(features, 10.0, 0, 0)
    assert points.shape == (60, 2) and np.array_equal(points, again) and 0 < divergence < 2
    assert same_class_neighbours(points, labels) > 95 > 50 > same_class_neighbours(points, np.arange(60) % 3)
    assert embed(features, 10.0, 4, 0)[0].shape == (60, 2)


def test_neighbours_are_other_points():
    points = np.array([[0.0, 0], [0, 1], [0, 1.5], [9, 9]])
    assert same_class_neighbours(points, np.array([0, 1, 1, 1])) == 75


def test_panels_have_one_scale_and_every_class_a_look_of_its_own():
    features, labels = clusters(30, 4)
    names = {number: f"class {number}" for number in range(30)}
    small, large = features[:, :2].numpy(), 3 * features[:, :2].numpy() + 7
    figure = draw({"small": small, "large": large}, labels, names)
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() == first.get_ylim() and first.get_xlim()[0] == -first.get_xlim()[1]
    assert [axis.get_title() for axis in figure.axes] == ["small", "large"]
    for axis, points in zip(figure.axes, (small, large), strict=True):
        drawn = np.concatenate([np.asarray(dots.get_offsets()) for dots in axis.collections])
        assert len(drawn) == 120 and np.ptp(drawn, axis=0).tolist() == pytest.approx(np.ptp(points, axis=0).tolist())
        assert np.abs(drawn).max() < axis.get_xlim()[1]
    looks = {(tuple(dots.get_facecolor()[0]), len(dots.get_paths()[0]), dots.get_paths()[0].vertices.tobytes())
             for dots in first.collections}  # fmt: skip
    assert len(looks) == len(first.collections) == 30
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(names.values())
    assert [dots.get_label() for dots in first.collections] == list(names.values())


def test_classes_are_chosen_by_name_or_number():
    names, labels = ["ant", "3", "bee", "cow"], torch.tensor([0, 1, 1, 3])
    assert choose_classes((), names, labels) == [0, 1, 3]
    assert choose_classes(("cow", "ant"), names, labels) == [3, 0]
    assert choose_classes(("3", "0"), names, labels) == [1, 0]  # a name comes before a number
    assert "--classes bee: no images of such a class; there are ant, 3, cow" in stop_message(
        choose_classes, ("bee", "ant"), names, labels
    )
    assert "--classes dog: no images" in stop_message(choose_classes, ("dog", "ant"), names, labels)
    for wrong in (("ant",), ("ant", "0")):
        assert "give 2 to 30 different classes" in stop_message(choose_classes, wrong, names, labels)
    many = [str(i) for i in range(31)]
    assert "give 2 to 30" in stop_message(choose_classes, tuple(many), many, torch.arange(31))
    assert shortened("tench, Tinca tinca", 10) == "tench..." and shortened("tench", 10) == "tench"


def test_the_tiny_config_draws_what_it_records_and_twice_the_same(networks, tmp_path, capsys):
    config = ROOT / "configs" / "eval_tsne" / "tiny.toml"
    argv = ["--config", str(config), "--checkpoints", *networks, "--run-dir"]
    runs = [tmp_path / name for name in "12"]
    figures = [
        eval_tsne.main(common.parse_args(eval_tsne.Args, [*argv, str(run), "--num-workers", "0"])) for run in runs
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 6
    for name, start in (("tsne.png", b"\x89PNG"), ("tsne.pdf", b"%PDF")):
        first, second = ((run / name).read_bytes() for run in runs)
        assert first == second and first.startswith(start) and len(first) > 10_000
    results = json.loads((runs[0] / "results.json").read_text())
    assert figures[0].items() <= results.items() and results["classes"] == [str(i) for i in range(10)]
    assert results["query_images"] == 60 and results["checkpoint"] == " ".join(networks)
    with open(runs[0] / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    titles = [Path(network).name for network in networks]
    assert len(rows) == 120 and [row["checkpoint"] for row in rows[::60]] == titles
    source = common.open_source("digits", "eval")
    assert all(int(row["class"]) == source.labels[int(row["image"])] for row in rows)
    for title, part in zip(titles, (rows[:60], rows[60:]), strict=True):
        points = np.array([[float(row["x"]), float(row["y"])] for row in part])
        value = figures[0][f"{title} nearest of same class, picture"]
        assert value == same_class_neighbours(points, np.array([row["class"] for row in part]))
    assert f"pictures: {runs[0] / 'tsne.png'}" in capsys.readouterr().out


def test_chosen_classes_titles_and_unit_features(networks, tmp_path):
    flags = {"classes": ("7", "3"), "titles": ("one", "two"), "unit_features": True, "pca_dims": 5, "perplexity": 5.0}
    figures = eval_tsne.main(tsne_args(networks, tmp_path / "run", **flags))
    assert {name.split()[0] for name in figures} == {"one", "two"}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["classes"] == ["7", "3"]


def test_two_processes_draw_what_one_draws(networks, tmp_path):
    flags = ["--config", str(ROOT / "configs" / "eval_tsne" / "tiny.toml"), "--checkpoints", *networks]
    run_here("eval_tsne", [*flags, "--run-dir", str(tmp_path / "1")], double=False)
    run_pair(tmp_path, [("eval_tsne", [*flags, "--run-dir", str(tmp_path / "2")], False)])
    for processes in (1, 2):
        facts = json.loads((tmp_path / str(processes) / "environment.json").read_text())
        assert facts["num_processes"] == processes
    for name in ("tsne.png", "points.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_a_missing_matplotlib_is_one_line(networks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = stop_message(eval_tsne.main, tsne_args(networks, tmp_path))
    assert message.startswith("matplotlib is missing") and "pip install" in message and "[plot]" in message


MISTAKES = [
    ({"checkpoints": ()}, "--checkpoints is missing: --checkpoints takes a run or release folder"),
    ({"checkpoints": ("nowhere",)}, "--checkpoints nowhere: no such file, folder or name"),
    ({"titles": ("one",)}, "--titles: gives 1 titles for 2 checkpoints"),
    ({"titles": ("one", "one")}, "--titles one one: must differ"),
    ({"features": "head"}, "holds no projection head; use --features backbone"),
    ({"query_split": "nope"}, "--query-split nope: digits has train, test"),
    ({"classes": ("eleven", "1")}, "--classes eleven: no images of such a class; there are 0, 1, 2"),
    ({"images_per_class": 0}, "--images-per-class 0: must be at least 1"),
    ({"perplexity": 60.0}, "--perplexity 60: must be above 0 and below the number of images, 60"),
    ({"perplexity": 0.0}, "--perplexity 0: must be above 0"),
    ({"pca_dims": -1}, "--pca-dims -1: must be at least 0"),
    ({"pca_dims": 61}, "--pca-dims 61: there are 60 images of 96 features"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda v: str(v)[:30])
def test_mistakes_get_one_line(flags, message, networks, tmp_path):
    args = tsne_args(**({"checkpoints": networks, "run_dir": tmp_path / "run"} | flags))
    assert message in stop_message(eval_tsne.main, args)
    assert not (tmp_path / "run" / "results.json").exists()


def test_images_without_labels_are_refused(networks, tmp_path):
    folder = photographs(tmp_path / "images", 8, (30, 40)) / "train"
    for i in range(5):  # at the top, and not one that strayed there: the folders are not classes
        (folder / f"{i}.jpg").write_bytes(next(folder.rglob("*.jpg")).read_bytes())
    message = stop_message(eval_tsne.main, tsne_args(networks, tmp_path / "run", data=str(folder)))
    assert f"--data {folder}: no labels to tell classes by" in message


def test_features_that_are_all_the_same_are_refused(tmp_path):
    backbone = common.create_backbone("test_resnet")
    for parameter in backbone.parameters():
        torch.nn.init.zeros_(parameter)
    save_backbone(tmp_path, backbone, 32)
    message = stop_message(eval_tsne.main, tsne_args([str(tmp_path)], tmp_path / "run"))
    assert message.startswith(f"--checkpoints {tmp_path}") and "the same for every image" in message
