"""kNN accuracy of a checkpoint's frozen features: no training, no learning rate to choose.

A query image with feature q takes the k gallery images of the greatest similarity s_i, N_k, and the class with most votes:

    class(q) = argmax_c  sum_{i in N_k} exp(s_i / vote_temperature) [y_i = c]                       (weighted vote)
    class(q) = argmax_c  sum_{i in N_k} [y_i = c]                                              (majority vote)

s is the cosine, or minus the squared Euclidean distance of the raw features. Weighted cosine with 0.07 is
Wu et al. (CVPR 2018, arXiv:1805.01978, Sec. 3.4), the setting of DINO and mmselfsup with k 10, 20, 100, 200; `--vote
majority --k 1` is CompRess' and ISD's 1-NN. The gallery is the training split, seen once in the evaluation view.
Differences from those codes:
  D1. Equal votes go to the smallest class; there to whichever the sort leaves first.
  D2. best-NN, the best odd k up to `--max-k` with `--vote majority --metric euclidean`, is ssl-small's
      (github.com/WOWNICE/ssl-small @ 815aea9, eval/knn.py); `--space shifted` takes the whole gallery's mean from the
      features, there each batch loses its own.

Run:  accelerate launch trainers/eval_knn.py --checkpoint runs/smd
Results: configs/eval_knn/*.toml record command, hardware, time and accuracy of each run.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/eval_knn")
    """where checkpoints, metrics.jsonl, the resolved flags and the release folder are written"""
    seed: int = 0
    """seeds weights, data order and views; equal flags on one machine give equal losses"""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """mirror metrics.jsonl to this tracker (an extra: pip install -e .[track])"""

    # --- data: split and subset make the gallery ---
    data: str = "digits"
    """digits (embedded), an image folder, TSV or parquet files, any datasets layout, or a dataset id on the Hub"""
    split: str = ""
    """split to train on, where "train" is not it"""
    query_split: str = ""
    """split to evaluate on, where it is not the usual one (validation, val, valid, test)"""
    image_column: str = ""
    """image column, where it cannot be told by its type"""
    label_column: str = ""
    """label column; labels are used for kNN reports only, except by trainers with a supervised loss"""
    subset: str = ""
    """train on part of the images: a count ("5000") or share ("10%"), drawn once from the seed, or a file of their names"""
    image_size: int = 224
    """side of the square view, pixels"""
    num_workers: int = 8
    """data workers per process for images that do not stay in memory (above 96 px)"""
    eval_batch_size: int = 256
    """images per forward pass of each process; changes memory and speed, no figure"""

    # --- models ---
    checkpoint: str | None = None
    """network to evaluate: the same forms as --teacher"""
    features: Literal["backbone", "head"] = "backbone"
    """pooled features, or the projection head's output, which official SimSiam and MoCo files hold"""

    # --- method ---
    k: tuple[int, ...] = (10, 20, 100, 200)
    """numbers of neighbours, each reported [DINO eval_knn.py]"""
    vote: Literal["weighted", "majority"] = "weighted"
    """neighbours count by exp(similarity / vote_temperature), or one each [Wu et al. Sec. 3.4]"""
    vote_temperature: tuple[float, ...] = (0.07,)
    """of the weighted vote, each reported; the smaller, the more the nearest neighbours count [Wu et al. Sec. 3.4]"""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """similarity: cosine of the features, or minus their squared Euclidean distance"""
    max_k: int = 0
    """instead of --k every odd number up to this one, and the best of them: "best-NN" [ssl-small eval/knn.py: 101]"""
    space: Literal["raw", "unit", "shifted"] = "raw"
    """features as they are, of unit length, or less the gallery's mean and of unit length, D1 [ssl-small --rep-space]"""
    feature_file: Path | None = None
    """.safetensors file to keep the features in, or to take them from if it holds those of this checkpoint and data"""
    pixel_baseline: bool = False
    """also classify by raw pixels at 32 px, what any feature has to beat; decodes the images a second time"""


def raw_pixels(x: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 3072)."""
    return F.interpolate(x, (32, 32), mode="area").flatten(1)


def in_space(gallery: Tensor, queries: Tensor, space: str) -> tuple[Tensor, Tensor]:
    """Both feature sets, (N, D) and (M, D), as --space has them."""
    if space == "shifted":
        mean = gallery.mean(0)
        gallery, queries = gallery - mean, queries - mean
    return (gallery, queries) if space == "raw" else (F.normalize(gallery, dim=1), F.normalize(queries, dim=1))


def kept_features(file: Path | None, whose: dict[str, str], run: hub.Run, make: Callable) -> dict[str, Tensor]:
    """{"gallery": (N, D), "queries": (M, D)} from the file if it is there, else from `make`, and then kept in it.

    `whose` says of what they are; a file of anything else stops with one line.
    """
    if file is not None and run.same_everywhere(file.exists()):
        try:
            with safetensors.safe_open(file, "pt") as opened:
                found, features = opened.metadata() or {}, {key: opened.get_tensor(key) for key in opened.keys()}
        except Exception as error:  # the safetensors reader has an exception type of its own
            raise SystemExit(
                f"--feature-file {file}: cannot be read ({common.first_line(error)}); delete it"
            ) from None
        if other := [key for key in whose if found.get(key) != whose[key]]:
            raise SystemExit(
                f"--feature-file {file}: holds features of another {', '.join(other)}; choose another file"
            )
        run.say(f"features taken from {file}")
        return features
    features = make()
    if file is not None and run.accelerator.is_main_process:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            beside = file.with_name(f".{file.name}")
            beside.write_bytes(safetensors.torch.save(features, metadata=whose))
            os.replace(beside, file)
        except OSError as error:
            raise SystemExit(f"--feature-file {file}: not written ({error.strerror}); choose another") from None
    return features


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        log_with=None if args.tracker == "none" else args.tracker,
        project_dir=args.run_dir,
    )
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    source = common.open_source(args.data, "train", split=args.split, subset=args.subset, seed=args.seed, **columns)
    queries = common.open_source(args.data, "eval", **columns)
    # --- end shared block ---
    if args.query_split:
        queries = common.open_source(args.data, "eval", split=args.query_split, **columns)
    gallery, queries = common.labelled_pair(args.data, source, queries)
    common.check_positive(args, "max_k", least=0)
    ks = tuple(range(1, args.max_k + 1, 2)) or args.k
    if not ks or min(ks) < 1 or max(ks) > len(gallery):
        asked = f"--max-k {args.max_k}" if args.max_k else f"--k {' '.join(map(str, args.k))}"
        raise SystemExit(f"{asked}: give numbers from 1 to {len(gallery)}, the images in the gallery")
    common.check_positive(args, "eval_batch_size")
    if not args.vote_temperature or min(args.vote_temperature) <= 0:
        raise SystemExit(f"--vote-temperature {' '.join(map(str, args.vote_temperature))}: must be above 0")

    if args.checkpoint is None:
        raise SystemExit(f"--checkpoint is missing: {hub.HOW_TO_GET_A_TEACHER}".replace("--teacher", "--checkpoint"))
    network = hub.load_teacher(args.checkpoint, flag="--checkpoint")
    if args.features == "head" and network.head is None:
        raise SystemExit(f"--features head: {args.checkpoint} holds no projection head; use --features backbone")
    facts = ", ".join(f"{key} {value}" for key, value in network.facts.items())
    run.say(f"checkpoint: {facts}; {len(gallery)} images in the gallery, {len(queries)} queries of {queries.name}")
    common.to_device(network, device)
    rows = {"raw pixels": raw_pixels} if args.pixel_baseline else {}
    rows[args.features] = network if args.features == "backbone" else lambda x: network.head(network(x))

    recipe = common.eval_recipe(args.image_size)
    options = {"batch_size": args.eval_batch_size, "num_workers": args.num_workers}
    voting = {"vote": args.vote, "metric": args.metric}
    temperatures = args.vote_temperature if args.vote == "weighted" else args.vote_temperature[:1]
    share = torch.arange(len(queries)).tensor_split(world)[rank]  # every process classifies its part of the queries
    whose = {"checkpoint": common.fingerprint(network), "features": args.features, "image_size": str(args.image_size)}
    whose |= {"gallery": gallery.fingerprint(), "queries": queries.fingerprint()}
    figures, table = {}, {}
    for name, function in rows.items():

        def extract(function=function) -> dict[str, Tensor]:
            sides = {"gallery": gallery, "queries": queries}
            return {
                side: common.extract_features(function, images, recipe, args.image_size, accelerator, **options)
                for side, images in sides.items()
            }

        found = extract() if function is raw_pixels else kept_features(args.feature_file, whose, run, extract)
        g, q = in_space(found["gallery"].to(device), found["queries"].to(device), args.space)
        for temperature in temperatures:
            label = name if len(temperatures) == 1 else f"{name} T={temperature:g}"
            accuracy = common.knn_accuracy(
                g, gallery.labels, q[share], queries.labels[share], ks, temperature=temperature, **voting
            )
            hits = torch.tensor([accuracy[k] * len(share) for k in ks], device=device)
            hits = accelerator.reduce(hits, "sum") if world > 1 else hits
            table[label] = {k: h / len(queries) for k, h in zip(ks, hits.tolist(), strict=True)}
            figures |= {f"{label} k={k}": figure for k, figure in table[label].items()}
            if args.max_k:  # of equal ones the smallest k, as there
                figures[f"{label} best-NN"] = max(table[label].values())

    shown = ks if len(ks) <= 8 else ks[:: -(-len(ks) // 8)]
    run.say(
        f"\nkNN top-1 in percent, {args.metric}, {args.vote} vote\n{'':<16}" + "".join(f"  k={k:<5}" for k in shown)
    )
    for label, row in table.items():
        best = max(row, key=row.get)
        line = f"{label:<16}" + "".join(f"{row[k]:8.2f} " for k in shown)
        run.say(line + (f"  best {row[best]:.2f} at k={best}" if args.max_k else ""))
    accelerator.log(figures, step=0)
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    counts = {"gallery_images": len(gallery), "query_images": len(queries)}
    results = {"checkpoint": args.checkpoint, **network.facts, "data": args.data, **counts, **figures, "flags": flags}
    run.finish(source, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
