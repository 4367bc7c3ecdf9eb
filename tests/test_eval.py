"""kNN and the linear probe: against scikit-learn, against themselves, and from the command line's flags to the files."""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tools import stop_message
from torch import nn

import common
import hub
from trainers import eval_knn, eval_linear
from trainers.shared.run import save_backbone

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_KNN = ROOT / "tests" / "golden" / "loss" / "metrics_ssl_small.npz"
pytestmark = pytest.mark.usefixtures("digits_once")
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A release folder: a small random network whose BatchNorm has seen the digits, so that its features differ."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    statistics = {"mean": common.IMAGENET_MEAN, "std": common.IMAGENET_STD}
    backbone = common.create_backbone("test_resnet", **statistics).train()
    with torch.no_grad():
        for _ in range(20):
            backbone(common.open_source("digits", "eval").pixels[:128].float() / 255)
    save_backbone(folder, backbone, 32)
    return folder


@pytest.fixture(scope="module")
def moco_file(tiny, tmp_path_factory) -> Path:
    """The same backbone as an official-looking MoCo v1 file, with a projection head."""
    backbone = hub.load_teacher(tiny).backbone.state_dict()
    torch.manual_seed(1)
    head = nn.Linear(96, 24)
    state = {f"module.encoder_q.{k}": v for k, v in backbone.items()}
    state |= {f"module.encoder_q.fc.{k}": v for k, v in head.state_dict().items()}
    path = tmp_path_factory.mktemp("moco") / "checkpoint_0199.pth.tar"
    torch.save({"arch": "test_resnet", "epoch": 200, "state_dict": state}, path)
    return path


def write_images(folder: Path, counts: dict[str, int], seed: int, noise: float = 70.0) -> None:
    """16 px images of classes that differ in colour and slope, under noise that makes some of them unreadable."""
    draw = np.random.RandomState(seed)
    slope = np.linspace(-1, 1, 16)
    for name, count in counts.items():
        look = np.random.RandomState(sum(map(ord, name))).uniform(-40, 40, (3, 3))
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pattern = look[0] + slope[:, None, None] * look[1] + slope[None, :, None] * look[2]
            shade = draw.normal(0, noise / 2, (1, 1, 3))
            pixels = 128 + pattern + shade + draw.normal(0, noise, (16, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i:04}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train/ and val/ with four classes; val/ has none of the second, which must not shift the labels after it."""
    path = tmp_path_factory.mktemp("images")
    write_images(path / "train", {"ant": 200, "bee": 200, "cow": 200, "dog": 200}, seed=0)
    write_images(path / "val", {"ant": 200, "cow": 200, "dog": 200}, seed=1)
    return path


def knn_args(checkpoint, run_dir, **flags):
    defaults = {"image_size": 32, "num_workers": 0, "subset": "600", "k": (1, 20)}
    return eval_knn.Args(checkpoint=str(checkpoint), run_dir=run_dir, **(defaults | flags))


def linear_args(checkpoint, run_dir, **flags):
    defaults = {"image_size": 32, "num_workers": 0, "subset": "600", "augmentation": "none", "log_every": 1}
    defaults |= {"batch_size": 128, "total_steps": 12, "save_every": 4, "keep": 9}
    return eval_linear.Args(checkpoint=str(checkpoint), run_dir=run_dir, **(defaults | flags))


def logged(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def saved(run_dir: Path, step: int) -> dict:
    return torch.load(run_dir / f"step_{step:08d}" / "state.pt", weights_only=True)["state"]


def clusters(n: int, m: int, dim: int = 16, classes: int = 7) -> tuple:
    """Overlapping classes away from the origin: gallery (N, D), its labels, queries (M, D), their labels; float64."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, dim, generator=g, dtype=torch.float64) + 1
    labels = torch.randint(classes, (n + m,), generator=g)
    x = centres[labels] + 1.5 * torch.randn(n + m, dim, generator=g, dtype=torch.float64)
    return x[:n], labels[:n], x[n:], labels[n:]


# --- kNN ---


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_knn_accuracy_equals_scikit_learn(metric, vote):
    gallery, labels, queries, targets = clusters(700, 300)
    ks, temperature = (1, 2, 5, 20, 100, 700), {"cosine": 0.3, "euclidean": 15.0}[metric]

    def weights(distance):
        return np.exp(-(distance if metric == "cosine" else distance**2) / temperature)

    options = {"vote": vote, "metric": metric, "temperature": temperature}
    ours = common.knn_accuracy(gallery, labels, queries, targets, ks, **options)
    theirs = {}
    for k in ks:
        model = KNeighborsClassifier(k, weights=weights if vote == "weighted" else "uniform", metric=metric)
        theirs[k] = 100 * model.fit(gallery, labels).score(queries, targets)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert len(set(ours.values())) >= 4 and max(ours.values()) - min(ours.values()) > 10  # k matters on these data


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_tied_votes_go_where_scikit_learn_sends_them(metric, vote):
    """Every image is there twice under two labels, so that every vote of the two nearest is a tie, exact in binary."""
    steps = torch.arange(16)
    points = torch.where(steps <= steps[:, None], 1.0, -1.0).double()  # cosines 1 - |i - j| / 8, norms of 4
    labels = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i))[:2] for i in range(16)])
    gallery, targets = points.repeat_interleave(2, 0), labels.min(1).values
    similarity = {"cosine": 1 / 8, "euclidean": 4.0}[metric]  # of one step, so that weights are exp(-steps)

    def weights(distance):
        return np.exp(-(distance if metric == "cosine" else distance**2) / similarity)

    ks, options = (2, 6), {"vote": vote, "metric": metric, "temperature": similarity}
    ours = common.knn_accuracy(gallery, labels.flatten(), points, targets, ks, **options)
    for k in ks:  # 6: the image's own two and those of both neighbours, at the ends of the next two
        model = KNeighborsClassifier(k, weights=weights if vote == "weighted" else "uniform", metric=metric)
        assert ours[k] == 100 * model.fit(gallery, labels.flatten()).score(points, targets)
    assert ours[2] == 100 > ours[6] > 0


def test_knn_accuracy_is_the_same_in_any_chunks_of_queries():
    data = clusters(500, 101)
    whole = common.knn_accuracy(*data, (1, 20), chunk=1000)
    assert common.knn_accuracy(*data, (1, 20), chunk=7) == whole


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_knn_accuracy_finds_neighbours_in_every_part_of_a_long_gallery(metric):
    gallery, labels, queries, targets = clusters(120_000, 40, dim=3)
    ours = common.knn_accuracy(gallery, labels, queries, targets, (1, 51), vote="majority", metric=metric)
    theirs = [KNeighborsClassifier(k, metric=metric).fit(gallery, labels).score(queries, targets) for k in (1, 51)]
    assert list(ours.values()) == pytest.approx([100 * t for t in theirs])
    last = queries[:1] + 1e-6  # the only neighbour that counts is the very last image
    gallery[-1], labels[-1] = last, 6
    assert common.knn_accuracy(gallery, labels, queries[:1], torch.tensor([6]), 1, metric=metric) == 100


@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_equal_votes_go_to_the_smallest_label(vote):
    gallery, query = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    for labels in ([2, 1], [1, 2]):
        assert common.knn_accuracy(gallery, torch.tensor(labels), query, torch.tensor([1]), 2, vote=vote) == 100


def test_a_majority_does_not_prefer_the_nearest_but_a_weighted_vote_does():
    gallery, query = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0]])
    labels, target = torch.tensor([1, 0]), torch.tensor([1])
    assert common.knn_accuracy(gallery, labels, query, target, 2, vote="majority") == 0
    assert common.knn_accuracy(gallery, labels, query, target, 2, vote="weighted") == 100


def test_a_small_temperature_does_not_overflow():
    gallery, labels, queries, targets = (x.float() if x.is_floating_point() else x for x in clusters(700, 300))
    cold = common.knn_accuracy(gallery, labels, queries, targets, 20, temperature=1e-3)
    assert cold == common.knn_accuracy(gallery, labels, queries, targets, 1)


def test_more_neighbours_than_images_is_an_error():
    gallery, labels, queries, targets = clusters(10, 5)
    assert common.knn_accuracy(gallery, labels, queries, targets, 10) >= 0
    with pytest.raises(ValueError, match="k = 11 neighbours of a gallery of 10"):
        common.knn_accuracy(gallery, labels, queries, targets, (1, 11))


def test_features_come_in_the_order_of_the_images_and_leave_the_network_as_it_was(tiny):
    source, recipe = common.open_source("digits", "eval").take(range(50)), common.eval_recipe(32)
    network = hub.load_teacher(tiny).backbone.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    features = common.extract_features(network, source, recipe, 32, Accelerator(cpu=True), batch_size=7)
    assert network.training and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with torch.no_grad():
        expected = network.eval()(source.pixels.float() / 255)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert (expected[1:] - expected[:-1]).abs().amax(1).min() > 1e-2  # neighbours differ, so the order was checked
    means = common.extract_features(lambda x: x.mean((2, 3)), source, recipe, 32, Accelerator(cpu=True), batch_size=7)
    torch.testing.assert_close(means, (source.pixels.double() / 255).mean((2, 3)).float())


# --- labels of two splits ---


def test_labels_of_two_splits_agree_where_one_lacks_a_class(folder):
    train, val = common.labelled_pair("x", common.open_source(str(folder)), common.open_source(str(folder), "eval"))
    assert train.classes == val.classes == ["ant", "bee", "cow", "dog"]
    assert val.labels.bincount(minlength=4).tolist() == [200, 0, 200, 200]
    names = [Path(val.where(i)).parent.name for i in range(len(val))]
    assert names == [val.classes[i] for i in val.labels]


# --- the linear probe ---


def probe_and_logistic_regression(checkpoint, data: str, run_dir: Path, rate: float, **flags) -> tuple[dict, float]:
    """The probe's figures, and LBFGS' accuracy on the same features: full batches, so one strictly convex problem."""
    images = common.open_source(data, subset=flags.get("subset", ""))
    train, val = common.labelled_pair("x", images, common.open_source(data, "eval"))
    base_lr = rate * 256 / len(train)
    defaults = {
        "subset": "",
        "optimizer": "sgd",
        "batch_size": len(train),
        "weight_decay": 1e-2,
        "lr_per_epoch": False,
    }
    defaults |= {"base_lrs": (IDLE, base_lr), "total_steps": 600, "log_every": 100, "save_every": 600}
    figures = eval_linear.main(linear_args(checkpoint, run_dir, data=data, **(defaults | flags)))

    network, recipe, accelerator = hub.load_teacher(checkpoint), common.eval_recipe(32), Accelerator(cpu=True)
    x, y = (common.extract_features(network, s, recipe, 32, accelerator).double() for s in (train, val))
    x, y = (torch.cat([f, torch.ones(len(f), 1)], 1) for f in (x, y))  # our L2 penalty is on the bias as well
    exact = LogisticRegression(C=1 / (len(x) * 1e-2), max_iter=20_000, tol=1e-10, fit_intercept=False)
    return figures, 100 * exact.fit(x, train.labels).score(y, val.labels)


IDLE = 1e-4  # a learning rate that gets nowhere, beside the one that counts


def test_the_probe_reaches_the_accuracy_of_logistic_regression(tiny, folder, tmp_path):
    figures, expected = probe_and_logistic_regression(tiny, str(folder), tmp_path, 0.3)
    assert abs(figures["top1"] - expected) <= 0.5 < expected - figures[f"top1_lr{IDLE:g}"]
    assert 60 < expected < 95  # neither chance nor trivial
    assert figures["top1"] < figures["top5"] == 100  # four classes: top-5 is top-4


@pytest.mark.data
def test_the_probe_reaches_the_accuracy_of_logistic_regression_on_photographs(tiny, real_images, tmp_path):
    figures, expected = probe_and_logistic_regression(tiny, str(real_images / "cifar10"), tmp_path, 0.1, subset="3000")
    assert abs(figures["top1"] - expected) <= 0.5 < expected - figures[f"top1_lr{IDLE:g}"]
    assert expected > 20  # a random network's features, ten classes
    assert figures["top1"] < figures["top5"] < 100


@pytest.mark.parametrize(("optimizer", "augmentation"), [("lars", "linear"), ("sgd", "none")])
def test_a_head_of_a_sweep_is_the_head_that_trains_alone(tiny, tmp_path, optimizer, augmentation):
    flags = {"optimizer": optimizer, "augmentation": augmentation, "subset": "256", "total_steps": 6}
    sweep = eval_linear.main(linear_args(tiny, tmp_path / "sweep", base_lrs=(0.1, 1.0), **flags))
    alone = eval_linear.main(linear_args(tiny, tmp_path / "alone", base_lrs=(1.0,), **flags))
    heads, head = saved(tmp_path / "sweep", 6), saved(tmp_path / "alone", 6)
    for name in ("weight", "bias"):
        assert torch.equal(heads["heads"][f"heads.1.{name}"], head["heads"][f"heads.0.{name}"])
        assert not torch.equal(heads["heads"][f"heads.0.{name}"], head["heads"][f"heads.0.{name}"])
    assert (sweep["top1_lr1"], sweep["top5_lr1"]) == (alone["top1"], alone["top5"])
    pairs = zip(logged(tmp_path / "sweep"), logged(tmp_path / "alone"), strict=True)
    assert all(a["loss_lr1"] == b["loss_lr1"] == b["loss"] for a, b in pairs)


def test_cached_and_recomputed_features_of_the_same_view_give_the_same_losses(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(common.RECIPES, "linear", common.eval_recipe(32))
    for augmentation in ("linear", "none"):
        eval_linear.main(linear_args(tiny, tmp_path / augmentation, augmentation=augmentation))
    losses = [[line["loss"] for line in logged(tmp_path / name)] for name in ("linear", "none")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 12


def test_the_backbone_stays_in_eval_mode_and_the_views_are_random(tiny, tmp_path, monkeypatch):
    seen, forward = [], hub.Teacher.forward

    def spy(self, x):
        seen.append((self.training, x.clone()))
        return forward(self, x)

    monkeypatch.setattr(hub.Teacher, "forward", spy)
    flags = {"augmentation": "linear", "batch_size": 64, "subset": "64", "total_steps": 2}
    eval_linear.main(linear_args(tiny, tmp_path, **flags))
    assert not any(training for training, _ in seen)
    first, second = (x for _, x in seen[-2:])
    assert first.shape == second.shape == (64, 3, 32, 32) and not torch.equal(first.sort(0)[0], second.sort(0)[0])


def test_learning_rates_follow_the_schedule(tiny, tmp_path):
    flags = {"subset": "256", "batch_size": 128, "total_steps": 8}  # 2 steps an epoch, 4 epochs
    eval_linear.main(linear_args(tiny, tmp_path / "cosine", **flags))
    factors = [line["lr"] / (0.1 * 128 / 256) for line in logged(tmp_path / "cosine")]
    assert factors == pytest.approx([1, 1, 0.853553, 0.853553, 0.5, 0.5, 0.146447, 0.146447], abs=1e-6)
    eval_linear.main(
        linear_args(tiny, tmp_path / "step", schedule="step", milestones=(1, 3), base_lrs=(0.2,), **flags)
    )
    factors = [line["lr"] / (0.2 * 128 / 256) for line in logged(tmp_path / "step")]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert saved(tmp_path / "step", 8)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.2 * 128 / 256 * 0.01)


def test_lars_learns(tiny, tmp_path, folder):
    flags = {"subset": "", "data": str(folder), "batch_size": 800, "total_steps": 200, "save_every": 200}
    figures = eval_linear.main(linear_args(tiny, tmp_path, base_lrs=(1e-4, 2.0), **flags))
    losses = [line["loss_lr2"] for line in logged(tmp_path)]
    assert losses[-1] < 0.6 * losses[0] and figures["top1"] == figures["top1_lr2"] > 50 > figures["top1_lr0.0001"]
    assert figures["best_base_lr"] == 2.0
    assert eval_linear.Args().optimizer == linear_args(tiny, tmp_path).optimizer == "lars"  # 1.39 -> 0.70, 60 %


def test_a_diverged_head_does_not_stop_the_others(tiny, tmp_path):
    figures = eval_linear.main(linear_args(tiny, tmp_path, optimizer="sgd", base_lrs=(0.1, 1e38)))
    assert figures["best_base_lr"] == 0.1
    with pytest.raises(SystemExit, match="the loss is not finite"):
        eval_linear.main(linear_args(tiny, tmp_path / "alone", optimizer="sgd", base_lrs=(1e38,)))


@pytest.mark.parametrize("augmentation", ["none", "linear"])
def test_resumed_run_repeats_the_uninterrupted_one(tiny, tmp_path, augmentation):
    flags = {"augmentation": augmentation, "optimizer": "sgd", "base_lrs": (0.1, 1.0)}
    figures = eval_linear.main(linear_args(tiny, tmp_path, **flags))
    lines, heads = logged(tmp_path), saved(tmp_path, 12)["heads"]
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"step_{step:08d}")
    again = eval_linear.main(linear_args(tiny, tmp_path, resume=True, **flags))
    assert len(lines) == 12 and logged(tmp_path) == lines and again == figures
    assert all(torch.equal(v, heads[k]) for k, v in saved(tmp_path, 12)["heads"].items())


def test_a_stop_signal_saves_and_the_run_continues(tiny, tmp_path, monkeypatch):
    flags = {"optimizer": "sgd", "save_every": 100}
    figures = eval_linear.main(linear_args(tiny, tmp_path / "whole", **flags))
    calls, original = [], eval_linear.cross_entropy

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(eval_linear, "cross_entropy", interrupt)
    with pytest.raises(SystemExit) as stop:
        eval_linear.main(linear_args(tiny, tmp_path / "part", **flags))
    assert stop.value.code == 143 and (tmp_path / "part" / "step_00000005").is_dir()
    assert eval_linear.main(linear_args(tiny, tmp_path / "part", resume=True, **flags)) == figures
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")


@pytest.mark.parametrize("space, name", [("raw", "original"), ("unit", "norm")])
def test_best_nn_is_the_authors(space, name):
    numbers = {k: v for k, v in np.load(GOLDEN_KNN).items() if k.startswith("knn_case0/") and v.dtype.kind in "fi"}
    g = {k.removeprefix("knn_case0/"): torch.from_numpy(np.asarray(v)) for k, v in numbers.items()}
    x, q = eval_knn.in_space(g["train_x"].double(), g["test_x"].double(), space)
    ks = g[f"{name}/odd_k"].tolist()
    ours = common.knn_accuracy(x, g["train_y"], q, g["test_y"], ks, vote="majority", metric="euclidean")
    assert list(ours.values()) == pytest.approx((100 * g[f"{name}/accuracy_per_k"].double()).tolist(), rel=1e-6)
    assert max(ours, key=ours.get) == g[f"{name}/best_k"].item(), "the smallest k of those that are best"


def test_shifted_features_lose_the_gallerys_mean():
    gallery, queries = torch.rand(50, 6) + 3, torch.rand(9, 6) + 3
    g, q = eval_knn.in_space(gallery, queries, "shifted")
    torch.testing.assert_close(q, torch.nn.functional.normalize(queries - gallery.mean(0), dim=1))
    torch.testing.assert_close(g.norm(dim=1), torch.ones(50))


# --- galleries that do not fit in memory ---


def rows_of(tmp_path: Path, gallery: torch.Tensor) -> common.StoredFeatures:
    run = SimpleNamespace(accelerator=Accelerator(cpu=True))
    rows = eval_knn.new_rows(tmp_path / "rows", {"checkpoint": "x"}, {"gallery": len(gallery)}, gallery.shape[1], run)
    for at in torch.arange(len(gallery)).split(300):
        rows["gallery"][at] = gallery[at]
    return rows["gallery"]


@pytest.mark.parametrize("space", ["raw", "unit", "shifted"])
def test_a_gallery_in_a_file_gives_what_it_gives_in_memory(space, tmp_path):
    gallery, labels, queries, targets = clusters(25_000, 40)
    gallery, queries = gallery.float(), queries.float()
    stored = rows_of(tmp_path, gallery)
    assert torch.equal(stored[:], gallery) and torch.equal(stored[24_990:30_000], gallery[24_990:])
    figures = []
    for g in (gallery, stored):
        g, q = eval_knn.in_space(g, queries, space)
        figures.append(common.knn_accuracy(g, labels, q, targets, (1, 20, 100), metric="euclidean", vote="majority"))
    assert figures[0] == figures[1] and len(set(figures[0].values())) > 1
    assert torch.equal(hub.safetensors.torch.load_file(tmp_path / "rows")["gallery"], gallery)


@pytest.mark.parametrize("file", [None, "kept.safetensors"])
def test_a_large_gallery_waits_on_disk(tiny, tmp_path, monkeypatch, file):
    flags = {"pixel_baseline": True, "metric": "euclidean", "space": "shifted"}
    in_memory = eval_knn.main(knn_args(tiny, tmp_path / "memory", **flags))
    monkeypatch.setattr(eval_knn, "IN_MEMORY", 0)
    used, original = [], common.knn_accuracy
    monkeypatch.setattr(common, "knn_accuracy", lambda g, *a, **o: used.append(type(g)) or original(g, *a, **o))
    kept = tmp_path / file if file else None
    assert eval_knn.main(knn_args(tiny, tmp_path / "disk", feature_file=kept, **flags)) == in_memory
    assert used == 2 * [common.StoredFeatures]
    left = {path.name for path in (tmp_path / "disk").rglob("*") if path.name.endswith("safetensors")}
    assert left == set() and (kept is None or kept.exists())


ADDED_MEMORY = """
import sys, types
from pathlib import Path
import torch
from accelerate import Accelerator
import common
from trainers import eval_knn
torch.set_num_threads(1)
accelerator, recipe = Accelerator(cpu=True), common.eval_recipe(32)
gallery = common.open_source("digits", "eval")
queries = gallery.take(range(8))
wide = lambda x: x.flatten(1).repeat(1, 80)
features = lambda source, into: common.extract_features(wide, source, recipe, 32, accelerator, batch_size=8, into=into)
run = types.SimpleNamespace(accelerator=accelerator)
def peak():  # KiB of this process; getrusage would begin with the parent's
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
def in_file(count, width):
    return eval_knn.new_rows(Path(sys.argv[2]), {}, {"gallery": count}, width, run)["gallery"]
with torch.inference_mode():
    q = features(queries, torch.zeros)
    common.knn_accuracy(q, queries.labels, q, queries.labels, 1)
    before = peak()
    g = features(gallery, in_file if sys.argv[1] == "file" else torch.zeros)
    print(common.knn_accuracy(g, gallery.labels, q, queries.labels, (1, 5)))
print((peak() - before) / 1024, 4 * len(g) * g.shape[1] / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux's record of a process's peak memory")
def test_a_gallery_on_disk_takes_a_bounded_amount_of_memory(tmp_path):
    """Peak of a process of its own, over features of 337 MiB made and searched: a few slices, not the gallery."""
    added, figures = {}, {}
    for where in ("file", "memory"):
        command = [sys.executable, "-c", ADDED_MEMORY, where, str(tmp_path / "rows")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        figures[where], last = done.stdout.splitlines()[-2:]
        added[where], gallery = map(float, last.split())
    assert gallery > 330 and "1: 100.0" in figures["file"] and figures["file"] == figures["memory"]
    assert added["file"] < 200 < 250 < added["memory"], added  # on top of an earlier peak


def test_a_full_disk_gets_one_line(tmp_path):
    rows = common.StoredFeatures(open("/dev/full", "r+b", buffering=0), 0, (9, 4))
    with pytest.raises(SystemExit, match="/dev/full: not written .No space left on device.; choose another place"):
        rows[torch.arange(3)] = torch.ones(3, 4)


def test_a_feature_file_in_a_place_that_cannot_be_written_gets_one_line(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    message = stop_message(eval_knn.main, knn_args(tiny, tmp_path / "1", feature_file=tmp_path / "file" / "x"))
    assert "--feature-file" in message and "choose another" in message


# --- from flags to files ---


def test_max_k_reports_every_odd_k_and_the_best(tiny, tmp_path, capsys):
    figures = eval_knn.main(knn_args(tiny, tmp_path, max_k=31, vote="majority", metric="euclidean"))
    assert [k for k in figures if "k=" in k] == [f"backbone k={k}" for k in range(1, 32, 2)]
    assert figures["backbone best-NN"] == max(v for k, v in figures.items() if "k=" in k)
    assert f"best {figures['backbone best-NN']:.2f} at k=" in capsys.readouterr().out


def test_temperatures_are_reported_side_by_side(tiny, tmp_path):
    figures = eval_knn.main(knn_args(tiny, tmp_path / "grid", k=(50,), vote_temperature=(0.01, 1.0)))
    alone = eval_knn.main(knn_args(tiny, tmp_path / "one", k=(50,), vote_temperature=(1.0,)))
    assert set(figures) == {"backbone T=0.01 k=50", "backbone T=1 k=50"}
    assert figures["backbone T=1 k=50"] == alone["backbone k=50"] != figures["backbone T=0.01 k=50"]


def test_features_are_kept_and_taken_from_their_file(tiny, tmp_path, monkeypatch, capsys):
    file = tmp_path / "kept" / "features.safetensors"
    first = eval_knn.main(knn_args(tiny, tmp_path / "1", feature_file=file))
    kept = hub.safetensors.torch.load_file(file)
    assert kept["gallery"].shape == (600, 96) and kept["queries"].shape == (360, 96)
    with monkeypatch.context() as patch:
        patch.setattr(common, "extract_features", lambda *_, **__: pytest.fail("the features were there"))
        again = eval_knn.main(knn_args(tiny, tmp_path / "2", feature_file=file))
    assert again == first and "features taken from" in capsys.readouterr().out
    for changes, what in (({"image_size": 16}, "image_size"), ({"subset": "500"}, "gallery")):
        message = stop_message(eval_knn.main, knn_args(tiny, tmp_path / what, feature_file=file, **changes))
        assert f"--feature-file {file}: holds features of another {what}" in message
    file.write_bytes(b"nothing")
    assert "cannot be read" in stop_message(eval_knn.main, knn_args(tiny, tmp_path / "3", feature_file=file))


@pytest.mark.parametrize("trainer", [eval_knn, eval_linear])
def test_the_tiny_config_runs_and_records_what_it_did(trainer, tiny, tmp_path, capsys):
    name = Path(trainer.__file__).stem
    config = ROOT / "configs" / name / "tiny.toml"
    argv = ["--config", str(config), "--checkpoint", str(tiny), "--run-dir", str(tmp_path / "run")]
    figures = trainer.main(common.parse_args(trainer.Args, argv))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert figures.items() <= results.items() and all(0 <= v <= 100 for v in figures.values())
    assert results["checkpoint"] == str(tiny) and results["data"] == "digits" and results["query_images"] == 360
    assert results["gallery_images" if trainer is eval_knn else "train_images"] == 1024
    assert results["flags"]["config"] == str(config) and results["architecture"] == "test_resnet"
    printed = capsys.readouterr().out
    shown = figures["backbone k=20" if trainer is eval_knn else "top1"]
    assert f"{shown:.2f}" in printed and "release:" not in printed
    assert not (tmp_path / "run" / "release").exists() and not list((tmp_path / "run").rglob("*.safetensors"))
    assert (tmp_path / "run" / f"{name}.py").exists() and (tmp_path / "run" / "environment.json").exists()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("vote", ["weighted", "majority"])
def test_knn_of_the_trainer_is_knn_of_its_features(tiny, folder, tmp_path, metric, vote):
    temperature = {"cosine": 0.07, "euclidean": 3.0}[metric]
    flags = {"data": str(folder), "subset": "", "k": (1, 5), "metric": metric, "vote": vote, "pixel_baseline": True}
    figures = eval_knn.main(knn_args(tiny, tmp_path, vote_temperature=(temperature,), eval_batch_size=64, **flags))

    def weights(distance):
        return np.exp(-(distance if metric == "cosine" else distance**2) / temperature)

    train, val = common.labelled_pair("x", common.open_source(str(folder)), common.open_source(str(folder), "eval"))
    network, recipe, accelerator = hub.load_teacher(tiny), common.eval_recipe(32), Accelerator(cpu=True)
    for name, function in (("backbone", network), ("raw pixels", lambda x: x.flatten(1))):
        x, y = (common.extract_features(function, s, recipe, 32, accelerator) for s in (train, val))
        for k in (1, 5):
            model = KNeighborsClassifier(k, weights=weights if vote == "weighted" else "uniform", metric=metric)
            expected = 100 * model.fit(x.double(), train.labels).score(y.double(), val.labels)
            assert figures[f"{name} k={k}"] == pytest.approx(expected, abs=0.2)  # one image: float32 distances
            assert expected > 40


def test_every_form_of_a_checkpoint_and_its_head(tiny, moco_file, tmp_path):
    release = eval_knn.main(knn_args(tiny, tmp_path / "1"))
    official = eval_knn.main(knn_args(moco_file, tmp_path / "2"))
    head = eval_knn.main(knn_args(moco_file, tmp_path / "3", features="head"))
    assert official == release  # one backbone, twice
    assert set(head) == {"head k=1", "head k=20"} and list(head.values()) != list(official.values())
    eval_linear.main(linear_args(moco_file, tmp_path / "4", features="head", total_steps=1))
    assert saved(tmp_path / "4", 1)["heads"]["heads.0.weight"].shape == (10, 24)


def test_another_query_split_is_used(tiny, tmp_path):
    figures = eval_knn.main(knn_args(tiny, tmp_path, split="test", query_split="test", subset="", k=(1,)))
    assert figures == {"backbone k=1": 100.0}  # every image is its own neighbour


UNLABELLED, SINGLE, STRANGER = "unlabelled", "single", "stranger"
BOTH = (knn_args, linear_args)
ERRORS = [
    (BOTH, {"checkpoint": None}, "--checkpoint is missing: --checkpoint takes a run or release folder"),
    (BOTH, {"checkpoint": "nowhere"}, "--checkpoint nowhere: no such file, folder or name"),
    (BOTH, {"checkpoint": "PARTIAL"}, r"does not fit test_resnet: 1 missing \(conv1.0.weight\)"),
    (BOTH, {"features": "head"}, "--features head: .* holds no projection head"),
    (BOTH, {"data": UNLABELLED}, "no labels to evaluate with .no class folders.; class folders or --label-column"),
    (BOTH, {"data": SINGLE}, "no split to evaluate on; .* --query-split"),
    (BOTH, {"data": STRANGER}, "1 classes to evaluate on are not in the training split: emu"),
    (BOTH, {"query_split": "nope"}, "--query-split nope: digits has train, test"),
    (BOTH, {"split": "nope"}, "--split nope: digits has train, test"),
    (BOTH[:1], {"eval_batch_size": 0}, "--eval-batch-size 0: must be at least 1"),
    (BOTH[1:], {"batch_size": 0}, "--batch-size 0: must be at least 1"),
    (BOTH[:1], {"k": (1, 601)}, "--k 1 601: give numbers from 1 to 600"),
    (BOTH[:1], {"k": (0,)}, "--k 0: give numbers from 1 to 600"),
    (BOTH[:1], {"k": ()}, "--k : give numbers"),
    (BOTH[:1], {"vote_temperature": (0.07, 0.0)}, "--vote-temperature 0.07 0.0: must be above 0"),
    (BOTH[1:], {"base_lrs": (0.1, 0.1)}, "--base-lrs: give one learning rate or several different"),
    (BOTH[1:], {"base_lrs": ()}, "--base-lrs: give one"),
    (BOTH[1:], {"batch_size": 601}, "--batch-size 601: larger than the 600 images"),
]


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [(m, f, t) for makers, f, t in ERRORS for m in makers],
    ids=lambda v: getattr(v, "__name__", str(v))[:40],
)
def test_mistakes_get_one_line(make, flags, message, tiny, tmp_path):
    flags = {"checkpoint": str(tiny)} | flags
    if flags["checkpoint"] == "PARTIAL":
        flags["checkpoint"] = str(shutil.copytree(tiny, tmp_path / "partial"))
        weights = hub.safetensors.torch.load_file(tiny / "model.safetensors")
        weights.pop("conv1.0.weight")
        hub.safetensors.torch.save_file(weights, tmp_path / "partial" / "model.safetensors")
    layouts = {UNLABELLED: ("train", "val"), SINGLE: ("ant", "bee"), STRANGER: ("train/ant", "val/ant", "val/emu")}
    if layout := layouts.get(flags.get("data")):
        flags |= {"data": str(tmp_path / "data"), "subset": ""}
        write_images(tmp_path / "data", dict.fromkeys(layout, 2), seed=0)
    args = make(flags.pop("checkpoint"), tmp_path / "run", **flags)
    if args.checkpoint == "None":
        args = type(args)(**(vars(args) | {"checkpoint": None}))
    trainer = eval_knn if make is knn_args else eval_linear
    with pytest.raises(SystemExit, match=message) as error:
        trainer.main(args)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_hidden_label_is_not_a_class():
    source = common.open_source("digits", "eval")
    source = dataclasses.replace(source, labels=torch.full_like(source.labels, -1))
    with pytest.raises(SystemExit, match="holds the label -1; choose a labelled split with --query-split"):
        common.labelled_pair("x", common.open_source("digits"), source)


@pytest.mark.parametrize("trainer", [eval_knn, eval_linear])
def test_a_folder_with_results_is_not_overwritten(trainer, tiny, tmp_path):
    args = knn_args(tiny, tmp_path) if trainer is eval_knn else linear_args(tiny, tmp_path, total_steps=1)
    trainer.main(args)
    before = (tmp_path / "results.json").read_bytes()
    remedy = "choose another folder" if trainer is eval_knn else "--resume it, or choose"
    with pytest.raises(SystemExit, match=f"holds a run already: {remedy}"):
        trainer.main(args)
    assert (tmp_path / "results.json").read_bytes() == before


BOTH_TRAINERS = """
import sys
import common
from trainers import eval_knn, eval_linear
checkpoint, folder = sys.argv[1:]
for name, trainer in (("eval_knn", eval_knn), ("eval_linear", eval_linear)):
    flags = ["--config", f"configs/{name}/tiny.toml", "--checkpoint", checkpoint, "--run-dir", f"{folder}/{name}"]
    trainer.main(common.parse_args(trainer.Args, flags))
eval_knn.IN_MEMORY = 0
flags = ["--config", "configs/eval_knn/tiny.toml", "--checkpoint", checkpoint, "--run-dir", f"{folder}/on_disk"]
eval_knn.main(common.parse_args(eval_knn.Args, flags))
"""


def test_two_processes_get_what_one_gets(tiny, tmp_path, monkeypatch):
    (tmp_path / "both.py").write_text(BOTH_TRAINERS)
    monkeypatch.setattr(eval_knn, "IN_MEMORY", eval_knn.IN_MEMORY)  # which the script changes
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["both.py", str(tiny), str(tmp_path / "1")])
    runpy.run_path(str(tmp_path / "both.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "both.py"), str(tiny), str(tmp_path / "2")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / "2" / n / "results.json").read_text()) for n in ("eval_knn", "on_disk")]
    in_memory, on_disk = ({k: v for k, v in r.items() if "k=" in k} for r in results)
    assert in_memory == on_disk and len(on_disk) == 4
    for name in ("eval_knn", "eval_linear"):
        runs = [tmp_path / number / name for number in ("1", "2")]
        facts = [json.loads((run / "environment.json").read_text())["num_processes"] for run in runs]
        one, two = (json.loads((run / "results.json").read_text()) for run in runs)
        figures = [k for k in one if "k=" in k or k.startswith("top")]
        assert facts == [1, 2] and len(figures) >= 4
        assert {k: one[k] for k in figures} == pytest.approx({k: two[k] for k in figures}, abs=0.3)  # an image of 360
    losses = [logged(run) for run in runs]
    assert len(losses[0]) == 20 and set(losses[0][0]) >= {"loss", "lr", "loss_lr0.1", "train_top1_lr1"}
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, abs=1e-5)


def test_every_config_parses_and_its_header_records_the_run():
    configs = sorted(c for t in ("eval_knn", "eval_linear") for c in (ROOT / "configs" / t).glob("*.toml"))
    assert len(configs) >= 9
    for config in configs:
        module = {"eval_knn": eval_knn, "eval_linear": eval_linear}[config.parent.name]
        args = common.parse_args(module.Args, ["--config", str(config)])
        assert args.config == config
        header = [line for line in config.read_text().splitlines() if line.startswith("#")]
        assert all(any(line.startswith(f"#   {key}") for line in header) for key in ("command", "hardware", "result"))
        assert f"--config configs/{config.parent.name}/{config.name}" in "\n".join(header)
