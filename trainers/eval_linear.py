"""Linear probe: a linear classifier on a checkpoint's frozen features, the number that papers compare.

    W, b = argmin  mean_i CE(W f(x_i) + b, y_i)          f frozen and in eval mode, BatchNorm and all

The default is the probe of SMD and SimSiam: LARS, batch 4096, learning rate 0.1 x batch / 256, 90 epochs, a cosine per
epoch, momentum 0.9, no weight decay, W ~ N(0, 0.01), b = 0, random crops and flips. MoCo's, SEED's and ssl-small's is SGD
at learning rate 30 for a batch of 256, x0.1 at epochs 60 and 80 of 100 (configs/eval_linear/sgd_step_in1k.toml), SwAV's
at 0.3 with a cosine per epoch and weight decay 1e-6 (sgd_cosine_in1k.toml).
Several learning rates train side by side: one head each from the same initial W, on the same features, one pass over the
backbone for all. The losses are summed, so that no head feels another: each ends where it would alone.
DisCo's probe is SGD at 3, halved at eleven epochs (sgd_halves_in1k.toml). What DisCo calls semi-supervised is a probe too,
on 1 % or 10 % of the images: `--subset` (sgd_halves_1percent_in1k.toml); fine-tuning is trainers/eval_finetune.py. On
CIFAR at 224 px, bicubic, the whole image to test: DisCo's at a constant 3 (transfer_constant_cifar10.toml), ssl-small's
at 30 on unit vectors, with crops of 60 % of the image and more (transfer_step_cifar10.toml).
Reference code: github.com/liuhao-lh/SMD @ a613972, main_lincls.py; github.com/facebookresearch/moco @ 64444f4,
main_lincls.py; github.com/Yuting-Gao/DisCo-pytorch @ 1d732c8, main_lincls.py, main_lincls_semi.py, cifar_main_lincls.py;
github.com/WOWNICE/ssl-small @ 815aea9, main_transfer.py. Differences from them:
  D1. The accuracy is the last step's; there the best epoch's on the evaluation split. The best of a sweep is still
      chosen on that split: it is an optimistic number, and every learning rate is reported.
  D2. `--augmentation none` computes the evaluation view's features once and trains on those: another number than the
      papers' (usually a little lower), minutes instead of hours.
  D3. The last partial batch of an epoch is dropped.

Run:  accelerate launch trainers/eval_linear.py --checkpoint runs/smd
Results: configs/eval_linear/*.toml record command, hardware, time and accuracy of each run.
"""

import copy
import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/eval_linear")
    """where checkpoints, metrics.jsonl, the resolved flags and the release folder are written"""
    seed: int = 0
    """seeds weights, data order and views; equal flags on one machine give equal losses"""
    resume: bool = False
    """continue exactly from run_dir's newest checkpoint, with its flags; at step 0 if it has none yet"""
    save_every: int = 1000
    """steps between checkpoints; one more is written at the end and on SIGTERM"""
    keep: int = 2
    """newest checkpoints to keep"""
    log_every: int = 10
    """steps between lines of metrics.jsonl; a smaller number waits for the GPU more often"""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """mirror metrics.jsonl to this tracker (an extra: pip install -e .[track])"""

    # --- data ---
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
    augmentation: Literal["linear", "none"] = "linear"
    """linear: random crops and flips, features anew in every step; none: features of the whole image, once, D2"""
    crop_scale: tuple[float, float] | None = None
    """share of the image's area in a view; unset: the recipe's [main_transfer.py: 0.6 1]"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """resampling of all views; the papers' transfer to CIFAR is bicubic"""
    crop_pct: float | None = None
    """image_size over the short side of the resized test image; 1: all of it; unset: 0.875, up to 96 px 1"""

    # --- models ---
    checkpoint: str | None = None
    """network to evaluate: the same forms as --teacher"""
    features: Literal["backbone", "head"] = "backbone"
    """pooled features, or the projection head's output, which official SimSiam and MoCo files hold"""
    normalise_features: bool = False
    """classify unit vectors [main_transfer.py]"""

    # --- optimisation ---
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine to zero, or x --lr-decay at every milestone"""
    milestones: tuple[int, ...] = (60, 80)
    """epochs at which the step schedule decays, perhaps none [MoCo main_lincls.py]"""
    lr_decay: float = 0.1
    """factor of the step schedule [MoCo main_lincls.py]"""
    epochs: float = 90
    """passes over the data; the schedule's length unless --total-steps is given"""
    total_steps: int = 0
    """optimizer steps; 0: derived from --epochs, otherwise it wins"""
    batch_size: int = 4096
    """images per optimizer step, over all processes"""
    optimizer: Literal["lars", "sgd"] = "lars"
    """lars is SMD's and SimSiam's, trust coefficient 0.001 and no clipping; sgd is MoCo's [main_lincls.py]"""
    base_lrs: tuple[float, ...] = (0.1,)
    """learning rates per 256 images, a head for each: lr = base_lr * batch_size / 256 [SMD main_lincls.py]"""
    lr_per_epoch: bool = True
    """move the learning rate once an epoch, as the authors do; off: every step"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 0.0
    """L2 penalty on all parameters, biases and BatchNorm included"""
    compile: bool = False
    """torch.compile the networks; pays on GPUs for runs longer than a few minutes"""


class Heads(nn.Module):
    """`count` linear classifiers that start equal, (B, D) -> (H, B, C)."""

    def __init__(self, num_features: int, num_classes: int, count: int):
        super().__init__()
        head = nn.Linear(num_features, num_classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(features) for head in self.heads])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """CE of every head. logits (H, B, C), labels (B,) -> (H,), each >= 0 and a mean over the batch."""
    return torch.stack([F.cross_entropy(each, labels) for each in logits])


@torch.no_grad()
def accuracy(heads: nn.Module, features: Tensor, labels: Tensor, top: int) -> Tensor:
    """Percent of labels among each head's `top` largest logits. features (M, D), labels (M,) -> (H,) float64."""
    hits = 0
    for f, y in zip(features.split(4096), labels.split(4096), strict=True):
        hits = hits + (heads(f).topk(top).indices == y.view(-1, 1)).sum((1, 2)).double()
    return 100 * hits / len(labels)


def stand_ins(readable: Tensor) -> Tensor:
    """(N,) bool -> (N,) index of each row or, where it is unreadable, of the next that is not, as `common.Batches` reads."""
    n, rows = len(readable), readable.cpu().nonzero().flatten()
    return rows[torch.searchsorted(rows, torch.arange(n)) % len(rows)]


def recipes(args: Args) -> tuple[common.Recipe, common.Recipe]:
    """The view to train on and the view to test with. Raises SystemExit for flags that no view can follow."""
    common.check_share(args, "crop_scale")
    if args.crop_pct is not None and not 0 < args.crop_pct <= 1:
        raise SystemExit(f"--crop-pct {args.crop_pct}: must be a share above 0 and up to 1")
    test = dataclasses.replace(common.eval_recipe(args.image_size), interpolation=args.interpolation)
    test = dataclasses.replace(test, crop_pct=args.crop_pct or test.crop_pct)
    train = dataclasses.replace(common.RECIPES.get(args.augmentation, test), interpolation=args.interpolation)
    if args.crop_scale and train.crop != "resized":
        raise SystemExit(f"--crop-scale: --augmentation {args.augmentation} has no random crop; linear has one")
    return dataclasses.replace(train, scale=args.crop_scale or train.scale), test


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    source, queries = common.labelled_pair(args.data, source, queries)
    num_classes = max(len(source.classes), int(source.labels.max()) + 1)
    train_recipe, recipe = recipes(args)
    views = [(train_recipe, args.image_size)]
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    if args.checkpoint is None:
        raise SystemExit(f"--checkpoint is missing: {hub.HOW_TO_GET_A_TEACHER}".replace("--teacher", "--checkpoint"))
    if not args.base_lrs or len(set(args.base_lrs)) < len(args.base_lrs):
        raise SystemExit("--base-lrs: give one learning rate or several different ones")
    network = hub.load_teacher(args.checkpoint, image_size=args.image_size, flag="--checkpoint")
    if args.features == "head" and network.head is None:
        raise SystemExit(f"--features head: {args.checkpoint} holds no projection head; use --features backbone")
    if args.compile:
        network.compile()
    common.to_device(network, device)
    embed = network if args.features == "backbone" else lambda x: network.head(network(x))
    extract = (lambda x: F.normalize(embed(x), dim=1)) if args.normalise_features else embed
    options = {"num_workers": args.num_workers}
    tested = common.extract_features(extract, queries, recipe, args.image_size, accelerator, **options)
    facts = ", ".join(f"{key} {value}" for key, value in network.facts.items())
    run.say(f"checkpoint: {facts}; {tested.shape[1]}-d features, {num_classes} classes")
    if args.augmentation == "none":
        cached = common.extract_features(extract, source, recipe, args.image_size, accelerator, **options)
        cached = cached.to(device, torch.get_default_dtype())
        readers = stand_ins(common.readable_rows(cached))

    heads = Heads(tested.shape[1], num_classes, len(args.base_lrs))
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    groups = [{"params": head.parameters()} for head in heads.heads]  # a learning rate each, below
    optimizer = common.create_optimizer(args.optimizer, groups, args.base_lrs[0], **hyper)
    heads, optimizer = accelerator.prepare(common.to_device(heads, device), optimizer)

    backbone = None  # nothing is trained that could be released
    state = {"heads": heads, "optimizer": optimizer}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---

    for step in run.start(first_step, total_steps, data, state, backbone):
        if args.augmentation == "none":
            rows = readers[data.indices(step)]
            features, labels = cached[common.send(rows, device)], common.send(source.labels[rows], device)
        else:
            batch = data.batch(step)
            with torch.no_grad(), accelerator.autocast():
                features, labels = extract(batch.views[0]).to(torch.get_default_dtype()), batch.labels

        at, unit = (data.epoch(step), 1) if args.lr_per_epoch else (data.progress(step), 1 / data.steps_per_epoch)
        if args.schedule == "cosine":
            factor = common.cosine_schedule(at, epochs, 1.0, unit=unit)
        else:
            factor = common.step_schedule(at, 1.0, args.milestones, args.lr_decay)
        for group, base_lr in zip(optimizer.param_groups, args.base_lrs, strict=True):
            group["lr"] = base_lr * args.batch_size / 256 * factor

        logits = heads(features)
        losses = cross_entropy(logits, labels)
        loss = losses.sum()  # no parameter is in two terms: every head gets its own gradient

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.watch(step, losses.nan_to_num(torch.inf).min())  # one head may diverge in a sweep, not all of them

        if run.log_due(step):
            each = {}
            for base_lr, value, guess in zip(args.base_lrs, losses, logits.argmax(2), strict=True):
                each[f"loss_lr{base_lr:g}"] = value
                each[f"train_top1_lr{base_lr:g}"] = 100 * (guess == labels).float().mean()
            run.log(step, loss=loss / len(losses), **each, lr=optimizer.param_groups[0]["lr"])

        # --- shared block: checkpoint ---
        stopping = run.stop_requested()
        if (step + 1) % args.save_every == 0 or step + 1 == total_steps or stopping:
            run.save(step + 1, state, backbone)
        if stopping:
            run.stop(step + 1)
        # --- end shared block ---

    trained, top = accelerator.unwrap_model(heads), min(5, num_classes)
    readable = common.readable_rows(tested)
    tested, labels = tested[readable].to(device, torch.get_default_dtype()), queries.labels[readable].to(device)
    top1, top5 = (accuracy(trained, tested, labels, n).tolist() for n in (1, top))
    best = top1.index(max(top1))
    figures = {"top1": top1[best], "top5": top5[best], "best_base_lr": args.base_lrs[best]}
    run.say(
        f"\nlinear top-1 and top-{top} in percent on {len(queries)} images of {queries.name}, {args.features} features"
    )
    for base_lr, first, fifth in zip(args.base_lrs, top1, top5, strict=True):
        figures |= {f"top1_lr{base_lr:g}": first, f"top5_lr{base_lr:g}": fifth}
        run.say(f"  base_lr {base_lr:<8g} {first:6.2f} {fifth:6.2f}{'  best' * (base_lr == args.base_lrs[best])}")
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    counts = {"train_images": len(source), "query_images": len(queries)}
    results = {"checkpoint": args.checkpoint, **network.facts, "data": args.data, **counts, **figures, "flags": flags}
    run.finish(source, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
