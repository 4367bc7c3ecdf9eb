"""eval_metrics.py: the authors' figures to 1e-9, closed forms and brute force, the static set, and flags to files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, ROOT
from runs import photographs, run_pair
from test_training import sabotaged
from together import run_here
from tools import Largest, make_backbone, stop_message
from torch import nn
from torchvision.ops import box_iou

import common
import hub
from trainers import eval_linear, eval_metrics
from trainers.eval_metrics import (
    OVERLAPS,
    StaticSet,
    alignment,
    choose_images,
    cost,
    instance_discrimination,
    intra_class_alignment,
    mutual_information,
    uniformity,
)
from trainers.shared import sources
from trainers.shared.run import save_backbone

pytestmark = pytest.mark.usefixtures("digits_once")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A release folder: a small random network whose BatchNorm has seen the digits, so that its features differ."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    backbone = common.create_backbone("test_resnet").train()
    with torch.no_grad():
        for _ in range(20):
            backbone(common.open_source("digits", "eval").pixels[:128].float() / 255)
    save_backbone(folder, backbone, 32)
    return folder


def golden(name: str) -> dict:
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "loss" / f"{name}.npz").items() if v.dtype.kind != "U"}


def metrics_args(checkpoint, run_dir, **flags):
    defaults = {"image_size": 32, "num_workers": 0, "augmentation": "digits", "images_per_class": 8, "latency_runs": 0}
    return eval_metrics.Args(checkpoint=str(checkpoint), run_dir=run_dir, **(defaults | flags))


def points(n: int, dim: int = 5, seed: int = 0) -> torch.Tensor:
    """Rows of all lengths, off the origin; float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=g, dtype=torch.float64) + 0.5


# --- the authors' figures ---


def check_small_ssl(module) -> None:
    g = golden("metrics_ssl_small")
    plain, first, second = (g[f"case0/features_{name}"] for name in ("original", "view1", "view2"))
    labels = torch.arange(len(plain)) // int(g["case0/samples_per_class"])
    stats = {k.removeprefix("case0/stats/"): v for k, v in g.items() if k.startswith("case0/stats/")}
    for mode, pair in (("d-sd", (plain, first)), ("sd-sd", (first, second))):
        theirs = g[f"case0/instdisc/{mode}/all_classes/top1to5_percent"]
        torch.testing.assert_close(module.instance_discrimination(*pair, 5), theirs, rtol=0, atol=1e-9)
    subsets = g["case0/uniformity_permutation"][: 3 * 128].split(128)
    ours = {
        "align_d_sd": module.alignment(plain, first),
        "align_sd_sd": module.alignment(first, second),
        "alignment_fn_original_view1": module.alignment(plain, first),
        "avg_align_d": module.intra_class_alignment(plain, labels),
        "avg_align_sd": module.intra_class_alignment(first, labels),
        "uniform_d": sum(module.uniformity(plain[s], 2) for s in subsets) / 3,
        "uniform_sd": sum(module.uniformity(first[s], 2) for s in subsets) / 3,
        "uniform_first128_of_original": module.uniformity(plain[:128], 2),
    }
    assert set(ours) == set(stats) - {"align_cls_d_per_class"}
    assert ours == pytest.approx({k: float(stats[k]) for k in ours}, rel=1e-9, abs=1e-9)
    each = [module.intra_class_alignment(plain[labels == c], labels[labels == c]) for c in range(10)]
    assert each == pytest.approx(stats["align_cls_d_per_class"].tolist(), rel=1e-9)


def check_information(module) -> None:
    g = golden("metrics_mi")
    cases = sorted({key.split("/")[0] for key in g})
    for case, counting in [(case, counting) for case in cases for counting in ("intended", "official")]:
        labels = g[f"{case}/label_matrix"].argmax(1)
        ours = module.mutual_information(g[f"{case}/logits"], labels, 30, overcount=counting == "official")
        assert ours == pytest.approx([float(g[f"{case}/{counting}_I_{pair}"]) for pair in ("XT", "TY")], rel=1e-9)
    assert len(cases) == 2
    assert g["case0/official_num_clusters"] > g["case0/intended_num_clusters"], "the two countings differ somewhere"


@pytest.mark.parametrize("check", [check_small_ssl, check_information])
def test_the_figures_are_the_authors(check):
    check(eval_metrics)


@pytest.mark.parametrize(
    ("check", "old", "new"),
    [
        (check_small_ssl, "(nearer.view(-1, 1) <= k)", "(nearer.view(-1, 1) < k)"),  # the image itself counted
        (check_small_ssl, "own = (q * F.normalize(positive[rows]", "own = (q * F.normalize(query[rows]"),
        (check_small_ssl, "gallery = F.normalize(query[start", "gallery = F.normalize(positive[start"),
        (check_small_ssl, "F.normalize(b, dim=1)).square()", "b).square()"),
        (check_small_ssl, ".triu_(1)", ".triu_(0)"),
        (check_small_ssl, "distance.mul_(-t)", "distance.sqrt_().mul_(-t)"),
        (check_small_ssl, "(n * (n - 1) / 2)).mean()", "(n * n / 2)).mean()"),
        (check_information, "device=logits.device) / bins", "device=logits.device) / (bins - 2)"),
        (check_information, "first.setdefault(own, i)", "i"),  # nothing is ever equal
        (check_information, "value = _overcounted(value, zero)", "pass"),
        (check_information, "n_y[pair // values] / total", "n_y[pair // values]"),
    ],
    ids=range(11),
)
def test_the_authors_figures_notice_sabotage(check, old, new, tmp_path):
    module = sabotaged("eval_metrics", old, new, tmp_path)
    with pytest.raises(AssertionError):
        check(module)


# --- closed forms and brute force ---


@pytest.mark.parametrize("n", [2, 3, 700])
def test_metrics_equal_brute_force_over_all_pairs(n):
    x = points(n)
    y = x + 0.2 * points(n, seed=1)
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    assert alignment(x, y) == pytest.approx(float((u - v).square().sum(1).mean()), rel=1e-12)
    assert uniformity(x, 3.0) == pytest.approx(float(torch.pdist(u).square().mul(-3).exp().mean().log()), rel=1e-9)
    nearer = [int((u @ u[i] > u[i] @ v[i]).sum()) - 1 for i in range(n)]
    expected = [100 * np.mean([m < k for m in nearer]) for k in range(1, 4)]
    assert instance_discrimination(x, y, 3).tolist() == pytest.approx(expected, abs=1e-9)
    assert n < 700 or 0 < expected[0] < expected[2] < 95
    shares = [instance_discrimination(x, y, 3, s) * len(s) for s in torch.arange(n).tensor_split(4)]
    assert (sum(shares) / n).tolist() == pytest.approx(expected, abs=1e-9)


def test_intra_class_alignment_counts_classes_equally_and_leaves_single_images_out():
    x, labels = points(60), torch.tensor([0] * 40 + [2] * 19 + [5])
    u = F.normalize(x, dim=1)
    expected = (torch.pdist(u[:40]).square().mean() + torch.pdist(u[40:59]).square().mean()) / 2
    assert intra_class_alignment(x, labels) == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="no class has two images"):
        intra_class_alignment(x, torch.arange(60))
    with pytest.raises(ValueError, match="no pair"):
        uniformity(x[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_collapsed_network_scores_nothing(dtype):
    x = points(1, 37).to(dtype).expand(300, 37)
    assert instance_discrimination(x, x, 5).tolist() == [0] * 5
    assert alignment(x, x) == uniformity(x) == 0


def test_a_negative_in_a_later_block_of_the_gallery_counts():
    x = points(10_050, 3)
    y = x.roll(1, 0)  # image i's positive is its neighbour: every image that is nearer than that one counts
    u, some = F.normalize(x, dim=1), torch.tensor([0, 3, 9_999, 10_000, 10_049])
    nearer = (u[some] @ u.T > (u[some] * u.roll(1, 0)[some]).sum(1, keepdim=True)).sum(1) - 1
    median = int(nearer.median())
    expected = 100 * (nearer < median).double().mean()
    assert instance_discrimination(x, y, median, some)[-1] == pytest.approx(float(expected)) and 0 < expected < 100


def test_no_metric_makes_a_matrix_of_all_pairs():
    x, labels = torch.rand(30_000, 4), torch.arange(30_000) % 100
    with Largest() as largest:
        instance_discrimination(x, x + 0.1, 5, torch.arange(3000))
        alignment(x, x + 0.1)
        intra_class_alignment(x, labels)
        mutual_information(x, labels)
        uniformity(x[:5000])
    assert 5_000_000 < largest.numel <= 1024 * 10_000 < len(x) ** 2 / 50


def test_informations_of_outputs_that_tell_everything_and_nothing():
    labels = torch.arange(64) % 4
    sure = 50 * F.one_hot(labels, 4).double()
    assert mutual_information(sure, labels) == pytest.approx((2, 2))
    assert mutual_information(torch.zeros(64, 4), labels) == pytest.approx((0, 0))
    assert mutual_information(sure, torch.arange(64) // 16) == pytest.approx((2, 0))
    probabilities = torch.linspace(0.02, 0.98, 64, dtype=torch.float64)
    graded = torch.stack([probabilities, 1 - probabilities], 1).log()
    assert mutual_information(graded, labels % 2, 10_000)[0] == pytest.approx(6)  # every image a value of its own
    assert mutual_information(graded, labels % 2, 2) == pytest.approx((1, 0))


def overcounted(codes: np.ndarray) -> list[int]:
    """The authors' counting from its description: row i against rows 0 .. number - 1, NaN equals nothing."""
    values, number = [], 0
    for code in codes:
        same = [j for j in range(number) if (codes[j] == code).all()]
        values.append(same[0] if same else number)
        number += not same
    return values


@pytest.mark.parametrize("seed", range(4))
def test_overcounted_values_are_the_authors_and_zeros_are_their_nan(seed):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (120, 3), generator=g).double() * 2
    logits[::7, 0] -= 1e4  # a softmax output of exactly 0
    labels = torch.randint(0, 3, (120,), generator=g)
    p = logits.softmax(1).numpy()
    codes = np.where(p > 0, np.ceil(p * 5 - 1e-12) - 1, np.nan)
    values = torch.tensor(overcounted(codes))
    joint = (
        torch.zeros(120, 3, dtype=torch.float64).index_put_((values, labels), torch.tensor(1.0).double(), True) / 120
    )
    p_t, p_y = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)
    expected = -(p_t[p_t > 0] * p_t[p_t > 0].log2()).sum(), (joint * (joint / (p_t * p_y)).log2()).nansum()
    ours = mutual_information(logits, labels, 5, overcount=True)
    assert ours == pytest.approx([float(v) for v in expected])
    assert ours[0] > mutual_information(logits, labels, 5)[0] + 0.1


# --- the static set ---


def test_images_are_drawn_per_class_or_in_all():
    labels = torch.tensor([3] * 30 + [0] * 5 + [7] * 40)
    rows = choose_images(labels, 75, 10, 0, 0)
    assert labels[rows].bincount().tolist() == [5, 0, 0, 10, 0, 0, 0, 10] and rows.tolist() == sorted(
        set(rows.tolist())
    )
    assert (
        choose_images(labels, 75, 10, 0, 1).tolist() != rows.tolist() == choose_images(labels, 75, 10, 0, 0).tolist()
    )
    some = choose_images(None, 75, 10, 20, 0)
    assert len(set(some.tolist())) == 20 and some.max() > 40


def static_views(source, rows, overlap="any", seed=0, batch_size=7, workers=0, size=24) -> list[torch.Tensor]:
    images = StaticSet(source, common.MOCO_V2, overlap, size, seed)
    found = [views for views, _ in images.batches(rows, batch_size, torch.device("cpu"), workers)]
    return [torch.cat(views) for views in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return common.open_source(str(photographs(tmp_path_factory.mktemp("photos"), 24)))


@pytest.mark.parametrize("overlap", ["any", "hard", "super-hard"])
@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_an_images_views_depend_on_the_seed_and_the_image_alone(kind, overlap, photos):
    source = common.open_source("digits", "eval") if kind == "resident" else photos
    assert (source.pixels is None) == (kind == "streamed")
    rows = torch.arange(12)
    whole = static_views(source, rows, overlap)
    again = static_views(source, rows.flip(0), overlap, batch_size=5, workers=2 if kind == "streamed" else 0)
    other = static_views(source, rows, overlap, seed=1)
    for view, (x, y, z) in enumerate(zip(whole, again, other, strict=True)):
        torch.testing.assert_close(x, y.flip(0), rtol=1e-5, atol=1e-6)
        assert x.shape == (12, 3, 24, 24) and ((x - z).abs().amax((1, 2, 3)) > 0.1).sum() >= (10 if view else 0)
    assert torch.equal(whole[0], other[0]) and (whole[1] - whole[2]).abs().amax((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("side", [32, 300])
def test_pairs_overlap_as_asked_and_none_contains_the_other(overlap, side):
    n = 120
    source = sources.Source("none", n)
    params, left = StaticSet(source, common.MOCO_V2, overlap, 32, 0).params(torch.arange(n), torch.full((n, 2), side))
    assert len(left) == 0
    boxes = [torch.cat([p.box[:, :2], p.box[:, :2] + p.box[:, 2:]], 1)[:, [1, 0, 3, 2]] for p in params[1:]]
    share = box_iou(*boxes).diagonal()
    low, high = OVERLAPS[overlap]
    assert (share >= low).all() and (share <= high).all()
    (a, b), sides = boxes, torch.cat([p.box[:, 2:] for p in params[1:]])
    inside = [((x[:, :2] >= y[:, :2]) & (x[:, 2:] <= y[:, 2:])).all(1).any() for x, y in ((a, b), (b, a))]
    assert not any(inside)
    assert sides.prod(1).min() > 0.15 * side**2 and sides.max() <= side
    free, _ = StaticSet(source, common.MOCO_V2, "any", 32, 0).params(torch.arange(n), torch.full((n, 2), side))
    assert all(torch.equal(p.factors, q.factors) for p, q in zip(params, free, strict=True))  # only the boxes change


def test_an_overlap_that_the_crops_do_not_allow_stops_the_run(tiny, tmp_path):
    message = stop_message(eval_metrics.main, metrics_args(tiny, tmp_path, overlap="hard", images_per_class=1))
    assert message.startswith("--overlap hard: over 1 %") and "0.6 to 1" in message and "--crop-scale" in message
    flags = {"overlap": "hard", "crop_scale": (0.2, 1.0), "images_per_class": 2}
    eval_metrics.main(metrics_args(tiny, tmp_path / "run", **flags))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["pairs_outside_overlap"] == 0


# --- size and speed ---


def test_cost_counts_parameters_and_multiply_adds():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    found = cost(network.eval(), 16, 3, 1)
    assert found["parameters"] == 8 * 28 + 45 and found["multiply_adds"] == 16 * 16 * 8 * 27 + 40
    assert 0 < found["latency_ms"] < 1000 and "latency_ms" not in cost(network, 16, 0, 1)
    attention = cost(make_backbone("test_vit"), 160, 0, 1)["multiply_adds"]
    tokens, dim, depth = 101, 64, 6
    linear = depth * tokens * (4 + 2 * 3) * dim**2 + (tokens - 1) * 3 * 16**2 * dim
    assert attention == pytest.approx(linear + depth * 2 * tokens**2 * dim, rel=0.02)


def test_threads_are_set_for_the_latency_only(monkeypatch):
    seen = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2))
    network.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    cost(network, 8, 2, before + 1)
    assert set(seen[1:]) == {before + 1} and torch.get_num_threads() == before


# --- from flags to files ---


def test_the_tiny_config_runs_and_its_figures_are_those_of_the_functions(tiny, tmp_path, capsys):
    config = ROOT / "configs" / "eval_metrics" / "tiny.toml"
    argv = ["--config", str(config), "--checkpoint", str(tiny), "--run-dir", str(tmp_path / "run")]
    args = common.parse_args(eval_metrics.Args, argv)
    figures = eval_metrics.main(args)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert figures.items() <= results.items() and all(math.isfinite(v) for v in figures.values())
    assert (
        results["checkpoint"] == str(tiny)
        and results["query_images"] == 100
        and results["architecture"] == "test_resnet"
    )
    assert results["flags"]["config"] == str(config) and not (tmp_path / "run" / "release").exists()

    source, network = common.open_source("digits", "eval"), hub.load_teacher(tiny)
    rows = choose_images(source.labels, 360, 10, 0, 0)
    (views,) = [
        v for v, _ in StaticSet(source, common.DIGITS, "any", 32, 0).batches(rows, 100, torch.device("cpu"), 0)
    ]
    with torch.no_grad():
        plain, first, second = (network(x) for x in views)
    again = {f"top{k} d-sd": v for k, v in enumerate(instance_discrimination(plain, first).tolist(), 1)}
    again |= {f"top{k} sd-sd": v for k, v in enumerate(instance_discrimination(first, second).tolist(), 1)}
    again |= {"alignment d-sd": alignment(plain, first), "alignment sd-sd": alignment(first, second)}
    again["intra-class alignment d"] = intra_class_alignment(plain, source.labels[rows])
    again["uniformity sd"] = uniformity(first)  # fewer images than one subset: all of them
    assert again == pytest.approx({k: figures[k] for k in again}, rel=1e-3)
    assert figures["top1 d-sd"] < figures["top5 d-sd"] and figures["parameters"] == sum(
        map(torch.numel, network.parameters())
    )
    assert 1 < figures["effective rank"] < 96 and figures["multiply_adds"] > 1e6
    printed = capsys.readouterr().out
    assert f"{figures['alignment sd-sd']:.4g}" in printed and "0.37 M parameters" in printed


def test_a_probe_gives_the_informations(tiny, tmp_path):
    flags = {"image_size": 32, "num_workers": 0, "augmentation": "none", "batch_size": 64, "optimizer": "sgd"}
    flags |= {"base_lrs": (0.001, 10.0), "total_steps": 60, "subset": "600", "run_dir": tmp_path / "probe"}
    probed = eval_linear.main(eval_linear.Args(checkpoint=str(tiny), **flags))
    assert probed["best_base_lr"] == 10
    probe = tmp_path / "probe"
    figures = eval_metrics.main(metrics_args(tiny, tmp_path / "run", probe=probe, images_per_class=50))
    assert 0 < figures["I(T;Y)"] < math.log2(10) and figures["I(T;Y)"] <= figures["I(X;T)"] <= math.log2(360)
    over = eval_metrics.main(metrics_args(tiny, tmp_path / "over", probe=probe, images_per_class=50, overcount=True))
    assert over["I(X;T)"] >= figures["I(X;T)"]
    few = eval_metrics.main(metrics_args(tiny, tmp_path / "few", probe=probe, information_images=16))
    assert few["I(X;T)"] <= 4
    for wrong, parts in (
        ({"probe": tmp_path / "run"}, ("not a finished run of trainers/eval_linear.py",)),
        ({"probe": tmp_path / "nowhere"}, ("not a finished run", f"--checkpoint {tiny}")),
    ):
        message = stop_message(eval_metrics.main, metrics_args(tiny, tmp_path / "wrong", **wrong))
        assert message.startswith(f"--probe {wrong['probe']}: ") and all(part in message for part in parts)
    other = tmp_path / "other"
    other.mkdir()
    save_backbone(other, make_backbone("test_resnet"), 32)
    message = stop_message(eval_metrics.main, metrics_args(other, tmp_path / "wrong", probe=probe))
    assert f"trained on backbone features of {tiny}, not on backbone features of {other}" in message


def test_a_plain_folder_without_labels_is_evaluated_whole(tiny, tmp_path):
    folder = photographs(tmp_path / "images", 16, (30, 40)) / "train" / "class1"
    for sub in ("0", "1"):  # a file at the top: the folders are not classes
        (folder.parent / f"{sub}.jpg").write_bytes(next(folder.glob("*.jpg")).read_bytes())
    flags = {"data": str(folder.parent), "num_images": 9, "eval_batch_size": 4}
    figures = eval_metrics.main(metrics_args(tiny, tmp_path / "run", **flags))
    assert "uniformity d" in figures and "intra-class alignment d" not in figures
    assert json.loads((tmp_path / "run" / "results.json").read_text())["query_images"] == 9
    message = stop_message(eval_metrics.main, metrics_args(tiny, tmp_path / "no", data=str(folder.parent)))
    assert "no labels to take --images-per-class by; say how many with --num-images" in message
    message = stop_message(eval_metrics.main, metrics_args(tiny, tmp_path / "no", probe=tmp_path, **flags))
    assert message.startswith(f"--probe {tmp_path}: I(T; Y) needs labels")


def test_two_processes_get_what_one_gets(tiny, tmp_path):
    config = ROOT / "configs" / "eval_metrics" / "tiny.toml"
    words = ["--config", str(config), "--checkpoint", str(tiny), "--latency-runs", "0", "--run-dir"]
    run_here("eval_metrics", [*words, str(tmp_path / "1")], double=False)
    run_pair(tmp_path, [("eval_metrics", [*words, str(tmp_path / "2")], False)])
    results = []
    for processes in (1, 2):
        run_dir = tmp_path / str(processes)
        assert json.loads((run_dir / "environment.json").read_text())["num_processes"] == processes
        found = json.loads((run_dir / "results.json").read_text())
        results.append({k: v for k, v in found.items() if isinstance(v, int | float)})
    one, two = results
    assert len(one) >= 20 and two == pytest.approx(one, rel=1e-4, abs=1.01)  # an image of 100
    exact = [k for k in one if "top" not in k]
    assert {k: two[k] for k in exact} == pytest.approx({k: one[k] for k in exact}, rel=1e-4)


MISTAKES = [
    ({"checkpoint": None}, "--checkpoint is missing: --checkpoint takes a run or release folder"),
    ({"checkpoint": "nowhere"}, "--checkpoint nowhere: no such file, folder or name"),
    ({"features": "head"}, "holds no projection head; use --features backbone"),
    ({"query_split": "nope"}, "--query-split nope: digits has train, test"),
    ({"eval_batch_size": 0}, "--eval-batch-size 0: must be at least 1"),
    ({"images_per_class": 0}, "--images-per-class 0: must be at least 1"),
    ({"num_images": -1}, "--num-images -1: must be at least 0"),
    ({"num_images": 361}, "--num-images 361: digits has 360 images"),
    ({"topk": 0}, "--topk 0: must be at least 1"),
    ({"topk": 80}, "--topk 80: must be below the number of images, 80"),
    ({"bins": 0}, "--bins 0: must be at least 1"),
    ({"uniformity_t": 0.0}, "--uniformity-t 0.0: must be above 0"),
    ({"uniformity_size": 1}, "--uniformity-size 1: must be at least 2"),
    ({"uniformity_subsets": 0}, "--uniformity-subsets 0: must be at least 1"),
    ({"rank_images": 1}, "--rank-images 1: must be at least 2"),
    ({"information_images": 1}, "--information-images 1: must be at least 2"),
    ({"latency_runs": -1}, "--latency-runs -1: must be at least 0"),
    ({"latency_threads": 0}, "--latency-threads 0: must be at least 1"),
    ({"crop_scale": (0.5, 0.2)}, "--crop-scale 0.5 0.2: must be a share"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda v: str(v)[:30])
def test_mistakes_get_one_line(flags, message, tiny, tmp_path):
    args = metrics_args(**({"checkpoint": tiny, "run_dir": tmp_path / "run"} | flags))
    if flags.get("checkpoint", tiny) is None:
        args = eval_metrics.Args(**(vars(args) | {"checkpoint": None}))
    assert message in stop_message(eval_metrics.main, args)
    assert not (tmp_path / "run" / "results.json").exists()


def test_features_that_are_not_finite_stop_the_run(tiny, tmp_path, monkeypatch):
    load = eval_metrics.hub.load_teacher

    def broken(*args, **kwargs):
        network = load(*args, **kwargs)
        next(network.backbone.parameters()).fill_(math.nan)
        return network

    monkeypatch.setattr(eval_metrics.hub, "load_teacher", broken)
    message = stop_message(eval_metrics.main, metrics_args(tiny, tmp_path))
    assert message.startswith("--checkpoint") and "not finite" in message
