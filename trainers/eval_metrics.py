"""What a checkpoint's features are like, without a classifier on the images: the small-SSL metrics, information, size, speed.

Every image x has two random views x', x'', a function of the seed and the image alone: the same for every checkpoint. With
d for the images in their evaluation view, sd for the random views and unit features f:

    instance discrimination   share of i with  #{j != i : f(x_j).f(x_i) >= f(x'_i).f(x_i)} < k        (d-sd)
                              the same of x' and x'' for x and x'                                     (sd-sd)
    alignment                 mean_i ||f(x_i) - f(x'_i)||^2                                           (d-sd, sd-sd)
    intra-class alignment     mean_c mean_{i<j of class c} ||f(x_i) - f(x_j)||^2                      (d, sd)
    uniformity                log mean_{i<j} exp(-t ||f(x_i) - f(x_j)||^2)                            (d, sd)
    effective rank            exp(H(s / sum s)), s the singular values of the centred f               (d)
    I(X; T), I(T; Y)          bits; T a linear probe's softmax outputs, each in one of `--bins` bins, X uniform over images

Alignment and uniformity are Wang & Isola's (ICML 2020, arXiv:2005.10242). "Efficacy of small SSL" (Shi et al., WACV 2022,
arXiv:2107.14762) compares small networks by the first four, DisCo (Gao et al., ECCV 2022, arXiv:2104.09124) by the last.
Instance discrimination falls and both informations grow with the number of images: compare equal numbers. The three
feature matrices are kept in memory: 1.2 GB for ImageNet's 50,000 validation images and a ResNet-50, 0.3 GB for a ResNet-18.
Reference code: github.com/WOWNICE/ssl-small @ 815aea9, experiments/sample-augs.py, eval/instdisc.py, eval/stats-dist.py;
github.com/Yuting-Gao/DisCo-pytorch @ 1d732c8, data/mi_by_binning.py. Differences from them:
  D1. The images of a class are drawn from the seed, there the first files of its folder; views go from memory to the
      network, there through JPEG. Accuracies are means over images, there over classes: equal where those are equal in size.
  D2. A negative that is as near as the positive counts as nearer, so that a collapsed network gets 0 and not 100; there the
      sort decides.
  D3. `--overlap` is the exact share; there the intersection is a pixel too wide and too high. 4000 tries for a pair, there
      1000 (2000 for super-hard), whose failures pass unseen; here they are counted, and over 1 % stop the run.
      The variants with a masked intersection are not here.
  D4. Classes with a single image have no pairs and do not count.
  D5. Rows with equal codes are one value of T. There a row is compared with the first rows, as many as there are values
      so far, instead of one row of each, so that values are counted twice: `--overcount` does the same. An output of exactly
      0 is in the first bin, there in none. Any number of classes, there ten; the images are in their evaluation view.

Run:  accelerate launch trainers/eval_metrics.py --checkpoint runs/smd
Results: configs/eval_metrics/*.toml record command, hardware, time and figures of each run.
"""

import copy
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub

# Intersection over union of a pair of crops, neither inside the other [ssl-small experiments/sample-augs.py].
OVERLAPS = {"easy": (0.25, 1.0), "hard": (0.05, 0.25), "super-hard": (1e-4, 0.05)}
TRIES = 4000  # one pair in about 430 is super-hard


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/eval_metrics")
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
    images_per_class: int = 50
    """images of each class, drawn from the seed, or all where it has fewer [ssl-small: 50 of val, 100 of train]"""
    num_images: int = 0
    """images in all, drawn from the seed whatever their class; 0: --images-per-class"""
    image_size: int = 224
    """side of the square view, pixels"""
    num_workers: int = 8
    """data workers per process for images that do not stay in memory (above 96 px)"""
    max_megapixels: float = 179
    """images of more pixels, in millions, count as unreadable: a small file may unpack to more than the memory"""
    eval_batch_size: int = 256
    """images per forward pass of each process; changes memory and speed, no figure"""
    augmentation: Literal["moco_v2", "moco_v1", "digits"] = "moco_v2"
    """recipe of the two random views [sample-augs.py]"""
    crop_scale: tuple[float, float] | None = None
    """share of the image's area in a view; unset: the recipe's [sample-augs.py: 0.2 1, as moco_v2]"""
    overlap: Literal["any", "easy", "hard", "super-hard"] = "any"
    """intersection over union of a pair of views: easy 0.25 to 1, hard 0.05 to 0.25, super-hard below, D3 [sample-augs.py]"""

    # --- models ---
    checkpoint: str | None = None
    """network to evaluate: the same forms as --teacher"""
    features: Literal["backbone", "head"] = "backbone"
    """pooled features, or the projection head's output, which official SimSiam and MoCo files hold"""
    probe: Path | None = None
    """finished run of trainers/eval_linear.py on this checkpoint: T is its classifier's output; unset: no information"""

    # --- method ---
    topk: int = 5
    """instance discrimination is reported for k = 1 to topk [ssl-small eval/instdisc.py]"""
    uniformity_t: float = 2.0
    """t of the uniformity [Wang & Isola; stats-dist.py]"""
    uniformity_size: int = 128
    """images in a subset for the uniformity [stats-dist.py]"""
    uniformity_subsets: int = 3
    """disjoint random subsets whose uniformities are averaged [stats-dist.py]"""
    rank_images: int = 4096
    """images for the effective rank, drawn from the seed; it grows with their number"""
    bins: int = 30
    """equal bins in [0, 1] for each of the probe's outputs [DisCo data/mi_by_binning.py]"""
    information_images: int = 1000
    """images for the two informations, drawn from the seed; I(X; T) is at most log2 of it [DisCo cifar_main_lincls.py]"""
    overcount: bool = False
    """count the values of T as the authors' code does, D5"""
    latency_runs: int = 30
    """timed passes of one image through the network on the CPU, of which the median counts; 0: none"""
    latency_threads: int = 1
    """threads of those passes"""


def box_overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union, and whether one box contains the other. a, b: (B, 4) top, left, height, width -> (B,) each."""
    (start_a, side_a), (start_b, side_b) = a.split(2, dim=1), b.split(2, dim=1)
    end_a, end_b = start_a + side_a, start_b + side_b
    common_part = (torch.minimum(end_a, end_b) - torch.maximum(start_a, start_b)).clamp(min=0).prod(1)
    contained = (start_a <= start_b) & (end_a >= end_b), (start_b <= start_a) & (end_b >= end_a)
    return common_part / (side_a.prod(1) + side_b.prod(1) - common_part), contained[0].all(1) | contained[1].all(1)


class StaticSet(Dataset):
    """The evaluation view and two random views of any image, a pure function of the seed and the image's place in `source`."""

    def __init__(self, source: common.Source, recipe: common.Recipe, overlap: str, size: int, seed: int):
        self.source, self.overlap, self.size, self.seed = source, overlap, size, seed
        self.recipes = [common.eval_recipe(size), recipe, recipe]
        self.reader = common.Crops(source, [], seed)

    def params(self, rows: Tensor, sides: Tensor) -> tuple[list, Tensor]:
        """Parameters of the three views, and where the pair's overlap is not the one asked for. rows (B,), sides (B, 2)."""
        views = [
            common.sample_params(recipe, self.seed, 0, rows, v, *sides.unbind(1), self.size)
            for v, recipe in enumerate(self.recipes)
        ]
        left, done = torch.arange(len(rows)), 0
        if self.overlap == "any":
            return views, left[:0]
        low, high = OVERLAPS[self.overlap]
        while done < TRIES and len(left):
            count = min(TRIES - done, max(1, 8192 // len(left)))
            tries = torch.arange(done, done + count).repeat(len(left))  # a try takes the place of the epoch
            again, those = rows[left].repeat_interleave(count), sides[left].repeat_interleave(count, 0).unbind(1)
            boxes = [
                common.sample_params(self.recipes[v], self.seed, tries.numpy(), again, v, *those, self.size).box
                for v in (1, 2)
            ]
            share, contained = box_overlap(*boxes)
            fits = ((share >= low) & (share <= high) & ~contained).view(-1, count)
            found, first = fits.any(1), fits.int().argmax(1)
            for v in (1, 2):
                views[v].box[left[found]] = boxes[v - 1].view(-1, count, 4)[found, first[found]]
            left, done = left[~found], done + count
        return views, left

    def __getitem__(self, rows: Tensor) -> tuple[list[Tensor], list, int, list[tuple[int, str]]]:
        """In a data worker: the crops (B, 3, S, S) uint8, their parameters, pairs that fail, images that are unreadable."""
        images, _, bad = zip(*map(self.reader.decode, rows.tolist()), strict=True)
        params, left = self.params(rows, torch.tensor([image.shape[1:] for image in images]))
        crops = [
            torch.stack([common.crop_one(image, p, i, self.size, recipe) for i, image in enumerate(images)])
            for p, recipe in zip(params, self.recipes, strict=True)
        ]
        return crops, params, len(left), [each for some in bad for each in some]

    def batches(self, rows: Tensor, batch_size: int, device: torch.device, num_workers: int) -> Iterator[tuple]:
        """Batch by batch the three views (B, 3, S, S) in [0, 1], and how many pairs do not overlap as asked."""
        parts, pixels = rows.split(batch_size), self.source.pixels
        if pixels is not None:
            for part in parts:
                params, left = self.params(part, torch.tensor([pixels.shape[2:]] * len(part)))
                x, choices = pixels[part].to(device), list(zip(params, self.recipes, strict=True))
                yield [common.colour_batch(common.crop_batch(x, p, self.size, r), p, r) for p, r in choices], len(left)
            return
        for crops, params, failed, bad in common.read_batches(self, parts, num_workers, single=True):
            self.source.bad.update(dict(bad))
            common.check_bad(self.source.name, self.source.bad, len(rows))
            choices = zip(crops, params, self.recipes, strict=True)
            yield [common.colour_batch(x.to(device).float().div_(255), p, r) for x, p, r in choices], failed


@torch.no_grad()
def extract(
    model: Callable, images: StaticSet, rows: Tensor, accelerator: Accelerator, batch_size: int, num_workers: int
) -> tuple[list[Tensor], int]:
    """Features of the three views, (N, D) float32 on the CPU and the same on every process, and the pairs outside --overlap.

    An image that could not be read has rows of NaN.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    share = torch.arange(len(rows)).tensor_split(world)[rank]
    features, failed = None, 0
    batches = images.batches(rows[share], batch_size, accelerator.device, num_workers)
    for at, (views, outside) in zip(share.split(batch_size), batches, strict=True):
        failed += outside
        if failed > max(1, 0.01 * len(rows)):  # hopeless: 4000 tries for the rest would take long
            break
        for v, x in enumerate(views):
            with accelerator.autocast():
                y = model(x).float().cpu()
            if not y.isfinite().all():
                raise SystemExit("--checkpoint: its features are not finite; in fp16, try bf16 or no mixed precision")
            if images.source.pixels is None:
                y[[i in images.source.bad for i in rows[at].tolist()]] = torch.nan  # another image's
            features = features or [y.new_zeros(len(rows), y.shape[1]) for _ in views]
            features[v][at] = y
    if world > 1:
        failed = int(accelerator.reduce(torch.tensor(failed, device=accelerator.device), "sum"))
    if failed > max(1, 0.01 * len(rows)):
        low, high = images.recipes[1].scale
        raise SystemExit(
            f"--overlap {images.overlap}: over 1 % of the images have no such pair of views of {low:g} to {high:g} of "
            f"their area in {TRIES} tries; lower --crop-scale (0.2 1 is the authors')"
        )
    if world > 1:
        for part in (part for matrix in features for part in matrix.split(65536)):
            part.copy_(accelerator.reduce(part.to(accelerator.device), "sum").cpu())
    return features, failed


@torch.no_grad()
def instance_discrimination(query: Tensor, positive: Tensor, topk: int = 5, share: Tensor | None = None) -> Tensor:
    """Percent of images nearer to their positive than to all but k - 1 of the others, for k = 1 .. topk: (topk,) float64.

    query, positive: (N, D), rows of any length; cosine similarity, negatives are the other queries, ties count as nearer
    (D2). `share`: the rows to judge, all by default. Beyond its arguments it holds 1024 x 10,000 scores and 10,000 rows, whatever N.
    """
    chunk, block = 1024, 10_000
    share = torch.arange(len(query), device=query.device) if share is None else share.to(query.device)
    nearer = torch.zeros(len(share), dtype=torch.long, device=query.device)
    scores = query.new_empty(min(chunk, len(share)), min(block, len(query)))  # new memory each time costs a third
    margin = 8 * torch.finfo(query.dtype).eps  # equal features give similarities that differ in the last digit
    for start in range(0, len(query), block):
        gallery = F.normalize(query[start : start + block], dim=1)
        for at in range(0, len(share), chunk):
            rows = share[at : at + chunk]
            q = F.normalize(query[rows], dim=1)
            own = (q * F.normalize(positive[rows], dim=1)).sum(1, keepdim=True)
            score = torch.mm(q, gallery.T, out=scores[: len(rows), : len(gallery)])
            nearer[at : at + chunk] += (score >= own - margin).sum(1)
    k = torch.arange(1, topk + 1, device=query.device)  # the image itself is always among the nearer
    return (nearer.view(-1, 1) <= k).double().sum(0) * (100 / max(1, len(share)))


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of positive pairs, rows normalised: 0 (equal) to 4. x, y: (N, D)."""
    pairs = zip(x.split(4096), y.split(4096), strict=True)
    total = sum((F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum().double() for a, b in pairs)
    return float(total / len(x))


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """Log of the mean of exp(-t d^2) over all pairs, rows normalised: 0 (collapsed) or less. x: (N, D).

    Raises ValueError below two rows.
    """
    if len(x) < 2:
        raise ValueError(f"uniformity of {len(x)} rows: there is no pair")
    x, total = F.normalize(x, dim=1), 0.0
    norm = x.square().sum(1)
    for start in range(0, len(x), 256):
        part = x[start : start + 256]
        distance = (norm[start : start + 256, None] + norm[start:] - 2 * part @ x[start:].T).clamp_(min=0)
        total = total + distance.mul_(-t).exp_().triu_(1).sum(dtype=torch.float64)  # each pair once
    return float((total / (len(x) * (len(x) - 1) / 2)).log())


def intra_class_alignment(x: Tensor, labels: Tensor) -> float:
    """Mean over classes of the mean squared distance within a class, rows normalised: 0 to 4. x: (N, D), labels: (N,).

    Raises ValueError if no class has two rows.
    """
    count = labels.bincount()
    # the sum over pairs is n sum |x|^2 - |sum x|^2: no pair is ever formed
    sums = torch.zeros(len(count), x.shape[1], dtype=torch.float64, device=x.device)
    squares = sums.new_zeros(len(count))
    for part, label in zip(x.split(4096), labels.split(4096), strict=True):
        part = F.normalize(part.double(), dim=1)
        sums.index_add_(0, label, part)
        squares.index_add_(0, label, part.square().sum(1))
    several = count > 1
    if not several.any():
        raise ValueError("intra-class alignment: no class has two images")
    n = count[several].double()
    pairs = n * squares[several] - sums[several].square().sum(1)
    return float((pairs / (n * (n - 1) / 2)).mean())


def mutual_information(
    logits: Tensor, labels: Tensor, bins: int = 30, *, overcount: bool = False
) -> tuple[float, float]:
    """I(X; T) and I(T; Y) in bits: T is which of `bins` equal bins each softmax output is in, X uniform over the N rows.

    logits: (N, C), labels: (N,). `overcount` counts the values of T as the authors do (D5).
    """
    edges = torch.arange(bins + 1, dtype=torch.float64, device=logits.device) / bins
    codes = torch.cat([
        torch.bucketize(part.double().softmax(1), edges).sub_(1).to(torch.int16) for part in logits.split(4096)
    ])  # fmt: skip
    zero = (codes < 0).any(1)
    value = codes.clamp_(min=0).unique(dim=0, return_inverse=True)[1]
    if overcount:
        value = _overcounted(value, zero)
    total, values = float(len(value)), int(value.max()) + 1
    n_t, n_y = value.bincount().double(), labels.bincount().double()
    pair, n_ty = (labels * values + value).unique(return_counts=True)  # only pairs that occur
    n_ty, expected = n_ty.double(), n_t[pair % values] * n_y[pair // values] / total
    information_ty = (n_ty / total * (n_ty / expected).log2()).sum()
    n_t = n_t[n_t > 0]
    return float((n_t / total * (total / n_t).log2()).sum()), float(information_ty)


def _overcounted(value: Tensor, zero: Tensor) -> Tensor:
    """The authors' values of T: a row is that of its first equal j if j is below the number of values so far, else it is new."""
    first, out, number = {}, [], 0
    for i, (own, lone) in enumerate(zip(value.tolist(), zero.tolist(), strict=True)):
        same = i if lone else first.setdefault(own, i)  # an exact 0 equals nothing
        out.append(min(same, number))
        number += same >= number
    return value.new_tensor(out)


def choose_images(labels: Tensor | None, count: int, per_class: int, total: int, seed: int) -> Tensor:
    """Places of `total` of `count` images, or, where that is 0, of `per_class` of every class at most; sorted."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if total:
        return order[:total].sort()[0]
    grouped = order[labels[order].argsort(stable=True)]
    starts = labels.bincount().cumsum(0) - labels.bincount()
    place = torch.arange(count) - starts[labels[grouped]]  # within its class
    return grouped[place < per_class].sort()[0]


def load_probe(folder: Path, checkpoint: str, features: str) -> nn.Linear:
    """The classifier of a finished run of eval_linear, its best learning rate's. Raises SystemExit if it is not this checkpoint's."""
    try:
        results = json.loads((folder / "results.json").read_text())
        theirs, flags = results["checkpoint"], results["flags"]
        saved = torch.load(hub.checkpoints(folder)[0] / "state.pt", map_location="cpu", weights_only=True)
        name = f"heads.{flags['base_lrs'].index(results['best_base_lr'])}"
        weight, bias = (saved["state"]["heads"][f"{name}.{part}"] for part in ("weight", "bias"))
    except Exception as error:  # whatever is missing or damaged, the remedy is the same
        raise SystemExit(
            f"--probe {folder}: not a finished run of trainers/eval_linear.py ({type(error).__name__}: "
            f"{common.first_line(error)}); make one with --checkpoint {checkpoint}"
        ) from None
    if Path(theirs).resolve() != Path(checkpoint).resolve() or flags["features"] != features:
        raise SystemExit(
            f"--probe {folder}: was trained on {flags['features']} features of {theirs}, not on {features} features of "
            f"{checkpoint}"
        )
    probe = nn.Linear(weight.shape[1], len(weight)).requires_grad_(False)
    probe.load_state_dict({"weight": weight, "bias": bias})
    return probe


@torch.no_grad()
def cost(network: nn.Module, size: int, runs: int, threads: int) -> dict[str, float]:
    """Parameters, multiply-adds of one image, and the median milliseconds of one image on the CPU in float32."""
    network, x = copy.deepcopy(network).cpu().float(), torch.rand(1, 3, size, size)
    found = {"parameters": sum(p.numel() for p in network.parameters())}
    found["multiply_adds"] = common.multiply_adds(network, size)
    if runs:
        before, seconds = torch.get_num_threads(), []
        torch.set_num_threads(threads)
        for _ in range(5 + runs):
            start = time.perf_counter()
            network(x)
            seconds.append(time.perf_counter() - start)
        torch.set_num_threads(before)
        found["latency_ms"] = 1000 * statistics.median(seconds[5:])  # the first few allocate
    return found


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    common.check_positive(args, "eval_batch_size", "images_per_class", "topk", "bins", "latency_threads")
    common.check_positive(args, "uniformity_subsets")
    common.check_positive(args, "uniformity_size", "rank_images", "information_images", least=2)
    common.check_positive(args, "num_images", "latency_runs", least=0)
    common.check_above_zero(args, "uniformity_t")
    common.check_share(args, "crop_scale")
    options = common.source_options(args)
    source = common.open_source(args.data, "eval", split=args.query_split, **options)
    source = source or common.open_source(args.data, "train", **options)  # a folder without splits: all of it
    args = common.fit_to_data(args, source, run)
    labels = source.labels if source.labels is not None and source.labels.min() >= 0 else None
    if labels is None and not args.num_images:
        raise SystemExit(
            f"--data {args.data}: no labels to take --images-per-class by; say how many with --num-images"
        )
    if args.num_images > len(source):
        raise SystemExit(f"--num-images {args.num_images}: {source.name} has {len(source)} images")
    rows = choose_images(labels, len(source), args.images_per_class, args.num_images, args.seed)
    if len(rows) <= args.topk:
        raise SystemExit(f"--topk {args.topk}: must be below the number of images, {len(rows)}")

    if args.checkpoint is None:
        raise SystemExit(f"--checkpoint is missing: {hub.HOW_TO_GET_A_TEACHER}".replace("--teacher", "--checkpoint"))
    network = hub.load_teacher(args.checkpoint, image_size=args.image_size, flag="--checkpoint")
    if args.features == "head" and network.head is None:
        raise SystemExit(f"--features head: {args.checkpoint} holds no projection head; use --features backbone")
    if args.probe and labels is None:
        raise SystemExit(f"--probe {args.probe}: I(T; Y) needs labels and {source.name} has none; leave it out")
    probe = load_probe(args.probe, args.checkpoint, args.features) if args.probe else None
    whole = network.backbone if args.features == "backbone" else nn.Sequential(network.backbone, network.head)
    facts = ", ".join(f"{key} {value}" for key, value in network.facts.items())
    run.say(f"checkpoint: {facts}; {len(rows)} images of {source.name}, two views of each, overlap {args.overlap}")
    common.to_device(whole.eval(), device)

    recipe = common.RECIPES[args.augmentation]
    recipe = dataclasses.replace(recipe, scale=args.crop_scale or recipe.scale)
    images = StaticSet(source, recipe, args.overlap, args.image_size, args.seed)
    options = {"batch_size": args.eval_batch_size, "num_workers": args.num_workers}
    views, failed = extract(whole, images, rows, accelerator, **options)
    readable = common.readable_rows(views[0])
    plain, first, second = (view[readable] for view in views)  # (N, D) each
    rows = rows[readable]
    labels = None if labels is None else labels[rows]

    figures = {}
    share = torch.arange(len(rows)).tensor_split(world)[rank]  # every process judges its part of the queries
    for name, query, positive in (("d-sd", plain, first), ("sd-sd", first, second)):
        query, positive = query.to(device), positive.to(device)
        hits = instance_discrimination(query, positive, args.topk, share).float() * len(share)
        hits = accelerator.reduce(hits, "sum") if world > 1 else hits
        figures |= {f"top{k} {name}": h / len(rows) for k, h in enumerate(hits.tolist(), start=1)}
        figures[f"alignment {name}"] = alignment(query, positive)

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    subsets = order[: args.uniformity_size * args.uniformity_subsets].split(args.uniformity_size)
    subsets = [subset for subset in subsets if len(subset) > 1]
    for name, x in (("d", plain), ("sd", first)):
        figures[f"uniformity {name}"] = statistics.mean(uniformity(x[s], args.uniformity_t) for s in subsets)
        if labels is not None and labels.bincount().max() > 1:
            figures[f"intra-class alignment {name}"] = intra_class_alignment(x, labels)
    figures["effective rank"] = common.effective_rank(F.normalize(plain[order[: args.rank_images]], dim=1)).item()
    if probe is not None:
        some = order[: args.information_images]
        information = mutual_information(probe(plain[some]), labels[some], args.bins, overcount=args.overcount)
        figures |= dict(zip(("I(X;T)", "I(T;Y)"), information, strict=True))
    if accelerator.is_main_process:
        figures |= cost(whole, args.image_size, args.latency_runs, args.latency_threads)
    figures = run.same_everywhere(figures)

    run.say(f"\n{'':<22}{'d-sd':>9}{'sd-sd':>9}")
    for name in (*(f"top{k}" for k in range(1, args.topk + 1)), "alignment"):
        run.say(f"{name:<22}" + "".join(f"{figures[f'{name} {pair}']:9.4g}" for pair in ("d-sd", "sd-sd")))
    run.say(f"\n{'':<22}{'d':>9}{'sd':>9}")
    for name in ("intra-class alignment", "uniformity"):
        if f"{name} d" in figures:
            run.say(f"{name:<22}" + "".join(f"{figures[f'{name} {part}']:9.4f}" for part in ("d", "sd")))
    for name in ("effective rank", "I(X;T)", "I(T;Y)", "latency_ms"):
        if name in figures:
            run.say(f"{name:<22}{figures[name]:9.4g}")
    run.say(f"{figures['parameters'] / 1e6:.2f} M parameters, {figures['multiply_adds'] / 1e9:.3f} G multiply-adds")
    run.attempt(f"--tracker {args.tracker}", accelerator.log, figures, step=0)
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    counts = {"query_images": len(rows), "pairs_outside_overlap": failed}
    results = {"checkpoint": args.checkpoint, **network.facts, "data": args.data, **counts, **figures, "flags": flags}
    run.finish(source, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
