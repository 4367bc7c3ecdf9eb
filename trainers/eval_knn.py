"""kNN accuracy of a checkpoint's frozen features: no training, no learning rate to choose.

A query image with feature q takes the k gallery images of the greatest similarity s_i, N_k, and the class with most votes:

    class(q) = argmax_c  sum_{i in N_k} exp(s_i / vote_temperature) [y_i = c]                       (weighted vote)
    class(q) = argmax_c  sum_{i in N_k} [y_i = c]                                              (majority vote)

s is the cosine, or minus the squared Euclidean distance of the raw features. Weighted cosine with 0.07 is
Wu et al. (CVPR 2018, arXiv:1805.01978, Sec. 3.4), the setting of DINO and mmselfsup with k 10, 20, 100, 200; `--vote
majority --k 1` is CompRess' and ISD's 1-NN. The gallery is the training split, seen once in the evaluation view. More
than 256 MiB of its features wait on disk, in `--feature-file` or in the run folder, and pass through memory in slices.
Differences from those codes:
  D1. Equal votes go to the smallest class; there to whichever the sort leaves first.
  D2. best-NN, the best odd k up to `--max-k` with `--vote majority --metric euclidean`, is ssl-small's
      (github.com/WOWNICE/ssl-small @ 815aea9, eval/knn.py); `--space shifted` takes the whole gallery's mean from the
      features, there each batch loses its own.

Run:  accelerate launch trainers/eval_knn.py --checkpoint runs/smd
Results: configs/eval_knn/*.toml record command, hardware, time and accuracy of each run.
"""

import atexit
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors
import torch
import torch.nn.functional as F
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
    data_config: str = ""
    """configuration of a datasets layout or Hub data set that has several; org/name:config says it too"""
    split: str = ""
    """split to train on, where "train" is not it; "." takes all folders of a folder for classes"""
    query_split: str = ""
    """split to evaluate on, where it is not the usual one (validation, val, valid, test)"""
    image_column: str = ""
    """image column, where it cannot be told by its type"""
    label_column: str = ""
    """label column, also of metadata.csv; labels serve kNN reports only, except in trainers with a supervised loss"""
    subset: str = ""
    """train on part of the images: a count ("5000") or share ("10%"), drawn once from the seed, or a file of their names"""
    image_size: int = 224
    """side of the square view, pixels"""
    num_workers: int = 8
    """data workers per process for images that do not stay in memory (above 96 px)"""
    max_megapixels: float = 179
    """images of more pixels, in millions, count as unreadable: a small file may unpack to more than the memory"""
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


Features = Tensor | common.StoredFeatures
IN_MEMORY = 2**28  # bytes of a gallery that nobody asked to keep in a file


def in_space(gallery: Features, queries: Tensor, space: str) -> tuple[Features, Tensor]:
    """Both feature sets, (N, D) and (M, D), as --space has them."""
    if space == "raw":
        return gallery, queries
    mean = queries.new_zeros(queries.shape[1])
    if space == "shifted":
        parts = (gallery[at : at + 10_000] for at in range(0, len(gallery), 10_000))
        total, count = 0, 0
        for part in parts:
            part = part[common.readable_rows(part)]
            total, count = total + part.double().sum(0), count + len(part)
        mean = (total / count).to(queries.dtype)

    def change(x: Tensor) -> Tensor:
        return F.normalize(x - mean.to(x.device), dim=1)

    stored = isinstance(gallery, common.StoredFeatures)
    return gallery.changed(change) if stored else change(gallery), change(queries)


def open_rows(file: Path, mode: str) -> dict[str, common.StoredFeatures]:
    """The tensors of a .safetensors file as rows to read, or with mode "r+b" to write as well."""
    opened = open(file, mode, buffering=0)  # a buffer would hide what another process has written since
    length = int.from_bytes(opened.read(8), "little")
    tensors = json.loads(opened.read(length))
    tensors.pop("__metadata__")
    starts = {side: 8 + length + tensor["data_offsets"][0] for side, tensor in tensors.items()}
    return {side: common.StoredFeatures(opened, starts[side], tensors[side]["shape"]) for side in tensors}


def new_rows(file: Path, whose: dict[str, str], counts: dict[str, int], width: int, run: hub.Run) -> dict:
    """A .safetensors file of zeros, (count, width) for each of `counts`, as `open_rows` gives it."""
    if run.accelerator.is_main_process:
        header, end = {"__metadata__": whose}, 0
        for side, count in counts.items():
            size = 4 * count * width
            header[side] = {"dtype": "F32", "shape": [count, width], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(opened.tell() + end)
    run.accelerator.wait_for_everyone()
    return open_rows(file, "r+b")


def features_of(
    counts: dict[str, int], file: Path | None, scratch: Path, whose: dict[str, str], run: hub.Run, extract: Callable
) -> tuple[Features, Tensor]:
    """The gallery's (N, D) and the queries' (M, D): from the file if it is there, else from `extract`, and kept in it.

    `whose` says of what they are; a file of anything else stops with one line. A large gallery without a file waits in
    `scratch`, for the caller to delete.
    """
    if file is not None and run.same_everywhere(file.exists()):
        try:
            with safetensors.safe_open(file, "pt") as opened:
                found = opened.metadata() or {}
        except Exception as error:  # the safetensors reader has an exception type of its own
            raise SystemExit(
                f"--feature-file {file}: cannot be read ({common.first_line(error)}); delete it"
            ) from None
        if other := [key for key in whose if found.get(key) != whose[key]]:
            raise SystemExit(
                f"--feature-file {file}: holds features of another {', '.join(other)}; choose another file"
            )
        run.say(f"features taken from {file}")
        rows = open_rows(file, "rb")
        return rows["gallery"], rows["queries"][:]
    rows, beside = {}, file.with_name(f".{file.name}") if file else scratch

    def into(count: int, width: int) -> Features:
        if file is None and 4 * count * width <= IN_MEMORY:
            return torch.zeros(count, width, dtype=torch.float32)
        try:
            rows.update(new_rows(beside, whose, counts, width, run))
        except OSError as error:
            name = f"--feature-file {file}" if file else f"--run-dir {run.dir}"
            raise SystemExit(
                f"{name}: not written ({error.strerror}); choose another that all processes see"
            ) from None
        return rows["gallery"]

    gallery, queries = extract("gallery", into), extract("queries", None)
    if file is not None and run.accelerator.is_main_process:
        rows["queries"][torch.arange(len(queries))] = queries
        os.replace(beside, file)
    return gallery, queries


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
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
    network = hub.load_teacher(args.checkpoint, image_size=args.image_size, flag="--checkpoint")
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
    counts = {"gallery": len(gallery), "queries": len(queries)}
    scratch = args.run_dir / ".features.safetensors"
    if accelerator.is_main_process:
        atexit.register(scratch.unlink, missing_ok=True)  # should the run stop before it gets there itself
    figures, table = {}, {}
    for name, function in rows.items():

        def extract(side: str, into: Callable | None, function=function) -> Features:
            images = {"gallery": gallery, "queries": queries}[side]
            return common.extract_features(
                function, images, recipe, args.image_size, accelerator, into=into, **options
            )

        file = None if function is raw_pixels else args.feature_file
        g, q = features_of(counts, file, scratch, whose, run, extract)
        g, q = in_space(g if isinstance(g, common.StoredFeatures) else g.to(device), q.to(device), args.space)
        mine = q.tensor_split(world)[rank]  # a view, where q[share] would be a copy
        for temperature in temperatures:
            label = name if len(temperatures) == 1 else f"{name} T={temperature:g}"
            accuracy = common.knn_accuracy(
                g, gallery.labels, mine, queries.labels[share], ks, temperature=temperature, **voting
            )
            asked = int(common.readable_rows(mine).sum())
            hits = torch.tensor([accuracy[k] * asked for k in ks], device=device)
            hits = accelerator.reduce(hits, "sum") if world > 1 else hits
            count = int(common.readable_rows(q).sum())
            table[label] = {k: h / max(1, count) for k, h in zip(ks, hits.tolist(), strict=True)}
            figures |= {f"{label} k={k}": figure for k, figure in table[label].items()}
            if args.max_k:  # of equal ones the smallest k, as there
                figures[f"{label} best-NN"] = max(table[label].values())
        if accelerator.is_main_process:  # every process has read its last row: the hits above are from all of them
            scratch.unlink(missing_ok=True)

    shown = ks if len(ks) <= 8 else ks[:: -(-len(ks) // 8)]
    run.say(
        f"\nkNN top-1 in percent, {args.metric}, {args.vote} vote\n{'':<16}" + "".join(f"  k={k:<5}" for k in shown)
    )
    for label, row in table.items():
        best = max(row, key=row.get)
        line = f"{label:<16}" + "".join(f"{row[k]:8.2f} " for k in shown)
        run.say(line + (f"  best {row[best]:.2f} at k={best}" if args.max_k else ""))
    run.attempt(f"--tracker {args.tracker}", accelerator.log, figures, step=0)
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    images = {"gallery_images": len(gallery), "query_images": len(queries)}
    results = {"checkpoint": args.checkpoint, **network.facts, "data": args.data, **images, **figures, "flags": flags}
    run.finish(source, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
