"""kNN accuracy of a checkpoint's frozen features: no training, no learning rate to choose.

A query image with feature q takes the k gallery images of the greatest similarity s_i, N_k, and the class with most votes:

    class(q) = argmax_c  sum_{i in N_k} exp(s_i / vote_temperature) [y_i = c]                       (weighted vote)
    class(q) = argmax_c  sum_{i in N_k} [y_i = c]                                              (majority vote)

s is the cosine, or minus the squared Euclidean distance of the raw features. Weighted cosine with 0.07 is
Wu et al. (CVPR 2018, arXiv:1805.01978, Sec. 3.4), the setting of DINO and mmselfsup with k 10, 20, 100, 200; `--vote
majority --k 1` is CompRess' and ISD's 1-NN. The gallery is the training split, seen once in the evaluation view.
Differences from those codes:
  D1. Equal votes go to the smallest class; there to whichever the sort leaves first.
  D2. ssl-small (github.com/WOWNICE/ssl-small @ 815aea9, eval/knn.py) reports the best odd k of `--vote majority --metric
      euclidean`; here every k of `--k` is reported and none is chosen.

Run:  accelerate launch trainers/eval_knn.py --checkpoint runs/smd
Results: configs/eval_knn/*.toml record command, hardware, time and accuracy of each run.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    vote_temperature: float = 0.07
    """temperature of the weighted vote; the smaller, the more the nearest neighbours count [Wu et al. Sec. 3.4]"""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """similarity: cosine of the features, or minus their squared Euclidean distance"""
    pixel_baseline: bool = False
    """also classify by raw pixels at 32 px, what any feature has to beat; decodes the images a second time"""


def raw_pixels(x: Tensor) -> Tensor:
    """(B, 3, S, S) -> (B, 3072)."""
    return F.interpolate(x, (32, 32), mode="area").flatten(1)


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
    if not args.k or min(args.k) < 1 or max(args.k) > len(gallery):
        asked = " ".join(map(str, args.k))
        raise SystemExit(f"--k {asked}: give numbers from 1 to {len(gallery)}, the images in the gallery")
    common.check_positive(args, "eval_batch_size")
    common.check_above_zero(args, "vote_temperature")

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
    voting = {"temperature": args.vote_temperature, "vote": args.vote, "metric": args.metric}
    share = torch.arange(len(queries)).tensor_split(world)[rank]  # every process classifies its part of the queries
    figures = {}
    for name, function in rows.items():
        g, q = (  # (N, D), (M, D)
            common.extract_features(function, images, recipe, args.image_size, accelerator, **options).to(device)
            for images in (gallery, queries)
        )
        accuracy = common.knn_accuracy(g, gallery.labels, q[share], queries.labels[share], args.k, **voting)
        hits = torch.tensor([accuracy[k] * len(share) for k in args.k], device=device)
        hits = accelerator.reduce(hits, "sum") if world > 1 else hits
        figures |= {f"{name} k={k}": h / len(queries) for k, h in zip(args.k, hits.tolist(), strict=True)}

    run.say(
        f"\nkNN top-1 in percent, {args.metric}, {args.vote} vote\n{'':<12}" + "".join(f"  k={k:<5}" for k in args.k)
    )
    for name in rows:
        run.say(f"{name:<12}" + "".join(f"{figures[f'{name} k={k}']:8.2f} " for k in args.k))
    accelerator.log(figures, step=0)
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    counts = {"gallery_images": len(gallery), "query_images": len(queries)}
    results = {"checkpoint": args.checkpoint, **network.facts, "data": args.data, **counts, **figures, "flags": flags}
    run.finish(source, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
