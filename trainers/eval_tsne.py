"""t-SNE pictures of chosen classes, one panel a checkpoint, side by side (van der Maaten & Hinton, JMLR 2008).

    p_ij ~ how near the features f_i, f_j are, at a bandwidth per image that gives it `--perplexity` neighbours
    q_ij = (1 + ||y_i - y_j||^2)^-1 / sum_{k != l} (1 + ||y_k - y_l||^2)^-1
    Y    = argmin KL(p || q)                                     y_i: image i's place in the picture

scikit-learn's Barnes-Hut t-SNE, from the first two principal components, as DisCo draws 50 images of each of ten classes of
ImageNet's validation split. All panels show the same images at the same scale; a class has the same colour and marker in
each. A picture's gaps and sizes mean little and t-SNE finds clusters in noise: beside each picture stands how many images
are of their nearest neighbour's class, in the features and in the picture.
Reference code: github.com/Yuting-Gao/DisCo-pytorch @ 1d732c8, visualization/draw.py; github.com/WOWNICE/ssl-small @ 815aea9,
experiments/tsne.py (`--unit-features --pca-dims 50 --images-per-class 100`). Differences from them:
  D1. The images of a class are drawn from the seed, there the first ones; DisCo's classes are `--classes 5 6 ... 14`.
  D2. scikit-learn's step size follows the number of images, there 200 was its default; ssl-small wrote a t-SNE of its own.
  D3. ssl-small's second figure, lines between an image and its two views, is not here.

Run:  accelerate launch trainers/eval_tsne.py --checkpoints runs/smd runs/seed
Results: configs/eval_tsne/*.toml record command, hardware and time of each run.
"""

import csv
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub

COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#333333",
)
MARKERS = "o^sPvpXD<*>"  # one more than the colours; classes of one colour get markers that do not look alike
MAX_CLASSES = 30  # more cannot be told apart


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/eval_tsne")
    """where checkpoints, metrics.jsonl, the resolved flags and the release folder are written"""
    seed: int = 0
    """seeds weights, data order and views; equal flags on one machine give equal losses"""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """mirror metrics.jsonl to this tracker (an extra: pip install -e .[track])"""

    # --- data ---
    data: str = "digits"
    """digits (embedded), an image folder, TSV or parquet files, any datasets layout, or a dataset id on the Hub"""
    data_config: str = ""
    """configuration of a datasets layout or Hub data set that has several; org/name:config says it too"""
    query_split: str = ""
    """split to evaluate on, where it is not the usual one (validation, val, valid, test)"""
    image_column: str = ""
    """image column, where it cannot be told by its type"""
    label_column: str = ""
    """label column, also of metadata.csv; labels serve kNN reports only, except in trainers with a supervised loss"""
    classes: tuple[str, ...] = ()
    """classes to draw, by name or by number from 0; none: the first ten [ssl-small tsne.py; DisCo draw.py: 5 to 14]"""
    images_per_class: int = 50
    """images of each class, drawn from the seed, or all where it has fewer [DisCo draw.py; 100 in ssl-small]"""
    image_size: int = 224
    """side of the square view, pixels"""
    num_workers: int = 8
    """data workers per process for images that do not stay in memory (above 96 px)"""
    max_megapixels: float = 179
    """images of more pixels, in millions, count as unreadable: a small file may unpack to more than the memory"""

    # --- models ---
    checkpoints: tuple[str, ...] = ()
    """networks to draw, a panel each: the same forms as --teacher"""
    titles: tuple[str, ...] = ()
    """a title for each panel; none: the checkpoints' names"""
    features: Literal["backbone", "head"] = "backbone"
    """pooled features, or the projection head's output, which official SimSiam and MoCo files hold"""

    # --- method ---
    perplexity: float = 30.0
    """neighbours that an image counts as near, 5 to 50; small: many little groups [draw.py, tsne.py]"""
    unit_features: bool = False
    """l2-normalise the features first [ssl-small tsne.py; DisCo draw.py does not]"""
    pca_dims: int = 0
    """principal components to keep before t-SNE; 0: the features as they are [50 in ssl-small tsne.py]"""


def choose_images(labels: Tensor | None, count: int, per_class: int, total: int, seed: int) -> Tensor:
    """Places of `total` of `count` images, or, where that is 0, of `per_class` of every class at most; sorted."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if total:
        return order[:total].sort()[0]
    grouped = order[labels[order].argsort(stable=True)]
    starts = labels.bincount().cumsum(0) - labels.bincount()
    place = torch.arange(count) - starts[labels[grouped]]  # within its class
    return grouped[place < per_class].sort()[0]


def choose_classes(wanted: tuple[str, ...], names: list[str], labels: Tensor) -> list[int]:
    """Numbers of the classes of these names or numbers, in this order. Raises SystemExit for one that is not there."""
    present = labels.unique().tolist()
    numbers = []
    for word in wanted or [names[i] for i in present[:10]]:
        number = names.index(word) if word in names else int(word) if word.isdigit() else -1
        if number not in present:
            some = ", ".join(names[i] for i in present[:10])
            raise SystemExit(
                f"--classes {word}: no images of such a class; there are {some}{', ...'[: 5 * (len(present) > 10)]}"
            )
        numbers.append(number)
    if len(set(numbers)) < len(numbers) or not 2 <= len(numbers) <= MAX_CLASSES:
        raise SystemExit(
            f"--classes {' '.join(wanted)}: give 2 to {MAX_CLASSES} different classes; more cannot be told apart in a picture"
        )
    return numbers


def embed(features: Tensor, perplexity: float, pca_dims: int, seed: int) -> tuple[np.ndarray, float]:
    """t-SNE of (N, D) features: (N, 2) coordinates, the same every time, and the KL divergence that is left."""
    x = features.numpy()
    with threadpool_limits(1):  # several threads add up in an order of their own, and t-SNE magnifies the difference
        x = PCA(pca_dims, random_state=seed).fit_transform(x) if pca_dims else x
        tsne = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed)
        return tsne.fit_transform(x), float(tsne.kl_divergence_)


def same_class_neighbours(points: np.ndarray, labels: np.ndarray) -> float:
    """Percent of points (N, D) whose nearest other point is of their class; labels (N,)."""
    nearest = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(return_distance=False)[:, 0]
    return float(100 * (labels[nearest] == labels).mean())


def draw(panels: dict[str, np.ndarray], labels: np.ndarray, names: dict[int, str]):
    """A matplotlib figure: a panel of (N, 2) points for each title, all to one scale, and the legend of the classes' names."""
    from matplotlib.figure import Figure

    columns = len(panels) if len(panels) <= 3 else math.ceil(len(panels) ** 0.5)
    rows, lists = math.ceil(len(panels) / columns), math.ceil(len(names) / 15)
    width = 0.55 + 0.075 * max(map(len, names.values()))  # inches of a list of the legend
    figure = Figure(figsize=(4.4 * columns + width * lists, 4.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    panels = {title: points - (points.min(0) + points.max(0)) / 2 for title, points in panels.items()}
    reach = 1.06 * max(np.abs(points).max() for points in panels.values())
    for axis, (title, points) in zip(axes, panels.items(), strict=False):
        for place, (number, name) in enumerate(names.items()):
            x, y = points[labels == number].T
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
            area = 46 if style["marker"] == "*" else 26  # a star covers little of it
            axis.scatter(x, y, area, linewidths=0.4, edgecolors="white", label=name, **style)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axis.set_title(title, fontsize=11)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    keys = axes[0].get_legend_handles_labels()
    figure.legend(*keys, loc="outside right center", ncols=lists, markerscale=1.6, fontsize=10, frameon=False)
    return figure


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3].rstrip(' ,')}..."


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("matplotlib is missing: pip install -e .[plot], or pip install matplotlib") from None
    common.check_positive(args, "images_per_class")
    common.check_positive(args, "pca_dims", least=0)
    if not args.checkpoints:
        raise SystemExit(f"--checkpoints is missing: {hub.HOW_TO_GET_A_TEACHER}".replace("--teacher", "--checkpoints"))
    if args.titles and len(args.titles) != len(args.checkpoints):
        raise SystemExit(f"--titles: gives {len(args.titles)} titles for {len(args.checkpoints)} checkpoints")
    last = [Path(spec).name for spec in args.checkpoints]
    titles = args.titles or tuple(
        name if last.count(name) == 1 else spec for name, spec in zip(last, args.checkpoints, strict=True)
    )
    if len(set(titles)) < len(titles):
        raise SystemExit(f"--titles {' '.join(titles)}: must differ, one for each of --checkpoints")

    options = common.source_options(args)
    source = common.open_source(args.data, "eval", split=args.query_split, **options)
    source = source or common.open_source(args.data, "train", **options)  # a folder without splits: all of it
    if source.labels is None or source.labels.min() < 0:
        raise SystemExit(
            f"--data {args.data}: no labels to tell classes by; class folders or --label-column give them"
        )
    numbers = choose_classes(args.classes, list(source.classes), source.labels)
    rows = choose_images(source.labels, len(source), args.images_per_class, 0, args.seed)
    images = source.take(rows[torch.isin(source.labels[rows], torch.tensor(numbers))].tolist())
    args = common.fit_to_data(args, images, run)
    if not 0 < args.perplexity < len(images):
        raise SystemExit(
            f"--perplexity {args.perplexity:g}: must be above 0 and below the number of images, {len(images)}"
        )
    run.say(f"{len(images)} images of {len(numbers)} classes of {source.name}, perplexity {args.perplexity:g}")

    recipe = common.eval_recipe(args.image_size)
    found = []
    # Checkpoints are what processes share: other batches would round otherwise, and t-SNE magnifies that.
    for spec in args.checkpoints[rank::world]:
        network = common.to_device(hub.load_teacher(spec, image_size=args.image_size, flag="--checkpoints"), device)
        if args.features == "head" and network.head is None:
            raise SystemExit(f"--features head: {spec} holds no projection head; use --features backbone")
        parts = []
        for x, _ in common.eval_batches(images, recipe, args.image_size, 256, device, args.num_workers):
            with torch.no_grad(), accelerator.autocast():
                y = network(x)
                parts.append((y if args.features == "backbone" else network.head(y)).float().cpu())
        readable = [i for i in range(len(images)) if images.pixels is not None or i not in images.bad]
        features, labels = torch.cat(parts)[readable], images.labels[readable].numpy()  # (N, D), (N,)
        if not features.isfinite().all() or features.std(0).max() == 0:
            raise SystemExit(f"--checkpoints {spec}: its features are not finite, or the same for every image")
        features = F.normalize(features, dim=1) if args.unit_features else features
        if args.pca_dims > min(features.shape):
            raise SystemExit(
                f"--pca-dims {args.pca_dims}: there are {len(features)} images of {features.shape[1]} features"
            )
        points, divergence = embed(features, args.perplexity, args.pca_dims, args.seed)
        nearest = [same_class_neighbours(each, labels) for each in (features.numpy(), points)]
        found.append((spec, points, (*nearest, divergence)))
    found = {spec: rest for spec, *rest in gather_object(found)}

    figures, panels = {}, {}
    for title, spec in zip(titles, args.checkpoints, strict=True):
        points, values = found[spec]
        names = ("nearest of same class, features", "nearest of same class, picture", "KL")
        figures |= {f"{title} {name}": value for name, value in zip(names, values, strict=True)}
        caption = "nearest of same class: features {:.0f} %, picture {:.0f} %".format(*values[:2])
        panels[f"{shortened(title, 44)}\n{caption}"] = points
        run.say(f"{title}: {caption}; KL {values[2]:.3f}")
    if accelerator.is_main_process:
        names = {number: shortened(source.classes[number], 30) for number in numbers}
        figure = draw(panels, labels, names)
        for name, undated in (("tsne.png", {"Software": None}), ("tsne.pdf", {"CreationDate": None})):
            figure.savefig(run.dir / name, dpi=160, metadata=undated)
        with open(run.dir / "points.csv", "w", newline="") as file:  # which image an outlier is
            table = csv.writer(file)
            table.writerow(("checkpoint", "image", "class", "x", "y"))
            for title, points in zip(titles, panels.values(), strict=True):
                for i, label, (x, y) in zip(readable, labels, points.tolist(), strict=True):
                    table.writerow((title, images.where(i), source.classes[label], x, y))
        run.say(f"pictures: {run.dir / 'tsne.png'}, {run.dir / 'tsne.pdf'}")
    run.attempt(f"--tracker {args.tracker}", accelerator.log, figures, step=0)
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    counts = {"query_images": len(labels), "classes": [source.classes[number] for number in numbers]}
    results = {"checkpoint": " ".join(args.checkpoints), "data": args.data, **counts, **figures, "flags": flags}
    run.finish(images, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
