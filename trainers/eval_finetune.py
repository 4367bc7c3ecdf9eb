"""Fine-tuning: a checkpoint and a new classifier trained together on few labels or on other data.

    L = mean_i CE(W f(x_i) + b, y_i)          f starts as the checkpoint, W and b anew; BatchNorm in training mode

The default is SwAV's semi-supervised recipe for 10 % of ImageNet: SGD, momentum 0.9, no weight decay, batch 256, learning
rate 0.01 for f and 0.2 for W and b, both x0.2 at epochs 12 and 16 of 20; for 1 %, 0.02 and 5 (configs/eval_finetune).
`--subset 10%` draws a tenth of every class from the seed; `--subset 10percent.txt` takes SimCLR's list, the papers'.
DisCo's "semi-supervised" figures are another thing, a probe of the frozen network on those images:
trainers/eval_linear.py --subset. There is no flag to freeze f here.
Transfer as ssl-small fine-tunes: one rate for all, x0.2 at epochs 60 and 80 of 100, bicubic crops of 20 % of the image
and more at 224 px (configs/eval_finetune/transfer_cifar10.toml). No learning rate of theirs is on record.
Reference code: github.com/facebookresearch/swav @ 06b1b7c, eval_semisup.py; github.com/WOWNICE/ssl-small @ 815aea9,
main_transfer.py --finetune. Differences from them:
  D1. The accuracy is the last step's; there the best epoch's on the evaluation split.
  D2. BatchNorm stays in training mode throughout, as in SwAV. ssl-small never returns to it after its first validation:
      from the second epoch on its statistics are frozen at those of the first.
  D3. W and b start as torch's Linear does, as in SwAV, and see the features as they are. ssl-small draws W from
      N(0, 0.01) and classifies unit vectors: no timm model does, and the release is one, classifier and all.
  D4. The last partial batch of an epoch is dropped.

Run:  accelerate launch trainers/eval_finetune.py --checkpoint runs/smd
Results: configs/eval_finetune/*.toml record command, hardware, time and accuracy of each run.
"""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    run_dir: Path = Path("runs/eval_finetune")
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
    push_to_hub: str | None = None
    """org/name on the Hugging Face Hub to upload the release to at the end"""

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
    augmentation: Literal["linear", "cifar", "digits", "none"] = "linear"
    """linear: torchvision's crop and flip, cifar: a 4-pixel shift and flip, none: the evaluation's view every time"""
    crop_scale: tuple[float, float] | None = None
    """share of the image's area in a view; unset: the recipe's [main_transfer.py --finetune: 0.2 1]"""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """resampling of all views; the papers' transfer to CIFAR is bicubic"""
    crop_pct: float | None = None
    """image_size over the short side of the resized test image; 1: all of it; unset: 0.875, up to 96 px 1"""

    # --- models ---
    checkpoint: str | None = None
    """network to evaluate: the same forms as --teacher"""

    # --- method ---
    bn_group_size: int = 0
    """images per BatchNorm group; 0: the whole batch (SyncBN)"""

    # --- optimisation ---
    schedule: Literal["cosine", "step"] = "step"
    """cosine to zero, or x --lr-decay at every milestone; both learning rates alike"""
    milestones: tuple[int, ...] = (12, 16)
    """epochs at which the step schedule decays, perhaps none [SwAV eval_semisup.py]"""
    lr_decay: float = 0.2
    """factor of the step schedule [SwAV eval_semisup.py; main_transfer.py --finetune]"""
    epochs: float = 20
    """passes over the data; the schedule's length unless --total-steps is given"""
    total_steps: int = 0
    """optimizer steps; 0: derived from --epochs, otherwise it wins"""
    batch_size: int = 256
    """images per optimizer step, over all processes"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum is the papers'; adamw asks for smaller learning rates"""
    base_lr: float = 0.01
    """the network's learning rate per 256 images: lr = base_lr * batch_size / 256 [eval_semisup.py: 1 % of labels 0.02]"""
    head_base_lr: float = 0.2
    """the classifier's, likewise [eval_semisup.py: 1 % of labels 5]"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up"""
    lr_per_epoch: bool = True
    """move the learning rate once an epoch, as the authors do; off: every step"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 0.0
    """L2 penalty on all parameters, biases and BatchNorm included"""
    compile: bool = False
    """torch.compile the networks; pays on GPUs for runs longer than a few minutes"""


def with_classifier(start: hub.Teacher, num_classes: int) -> tuple[nn.Module, nn.Linear]:
    """The checkpoint's network, (B, 3, H, W) -> (B, num_classes) logits, and its new classifier, as torch starts one."""
    architecture = start.facts["architecture"]
    backbone = common.create_backbone(architecture, num_classes=num_classes, **common.how_built(start.backbone))
    head = backbone.get_classifier()
    missing, unexpected = backbone.load_state_dict(start.backbone.state_dict(), strict=False)
    if not isinstance(head, nn.Linear) or unexpected or len(missing) != len(head.state_dict()):
        raise SystemExit(
            f"--checkpoint: {architecture} does not end in one linear classifier; eval_linear.py probes it"
        )
    head.reset_parameters()
    return backbone, head


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """L. logits (B, C), labels (B,) -> scalar >= 0, mean over the batch."""
    return F.cross_entropy(logits, labels)


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
    start = hub.load_teacher(args.checkpoint, image_size=args.image_size, flag="--checkpoint")
    run.record_teacher(start, "checkpoint")
    backbone, head = with_classifier(start, num_classes)
    model = common.set_batch_norm_groups(backbone, args.bn_group_size, args.batch_size)
    if args.compile:
        backbone.compile()

    peak_lrs = [base_lr * args.batch_size / 256 for base_lr in (args.base_lr, args.head_base_lr)]
    own = set(map(id, head.parameters()))
    groups = [{"params": [p for p in model.parameters() if id(p) not in own]}, {"params": list(head.parameters())}]
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, groups, peak_lrs[0], **hyper)  # a learning rate each, below
    model, optimizer = accelerator.prepare(common.to_device(model, device), optimizer)

    state = {"model": model, "optimizer": optimizer}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---

    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)

        at, unit = (data.epoch(step), 1) if args.lr_per_epoch else (data.progress(step), 1 / data.steps_per_epoch)
        if args.schedule == "cosine":
            factor = common.cosine_schedule(at, epochs, 1.0, warmup=args.warmup_epochs, unit=unit)
        else:
            factor = common.step_schedule(at, 1.0, args.milestones, args.lr_decay)
        for group, peak_lr in zip(optimizer.param_groups, peak_lrs, strict=True):
            group["lr"] = peak_lr * factor

        logits = model(batch.views[0])
        loss = cross_entropy(logits, batch.labels)

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.watch(step, loss)

        if run.log_due(step):
            correct = (logits.argmax(1) == batch.labels).float().mean()
            lrs = [group["lr"] for group in optimizer.param_groups]
            run.log(step, loss=loss, train_top1=100 * correct, lr=lrs[0], head_lr=lrs[1])

        # --- shared block: checkpoint ---
        stopping = run.stop_requested()
        if (step + 1) % args.save_every == 0 or step + 1 == total_steps or stopping:
            run.save(step + 1, state, backbone)
        if stopping:
            run.stop(step + 1)
        # --- end shared block ---

    # --- shared block: release ---
    hub.release(run, total_steps, state, backbone)
    # --- end shared block ---

    options = {"num_workers": args.num_workers}
    logits = common.extract_features(backbone, queries, recipe, args.image_size, accelerator, **options)
    top = min(5, num_classes)
    hits = (logits.topk(top).indices == queries.labels.view(-1, 1))[common.readable_rows(logits)]
    figures = {"top1": 100 * hits[:, 0].double().mean().item(), "top5": 100 * hits.any(1).double().mean().item()}
    top1, top5 = figures.values()
    run.say(f"\ntop-1 and top-{top} on {len(queries)} images of {queries.name}: {top1:.2f} and {top5:.2f} %")
    flags = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    counts = {"train_images": len(source), "query_images": len(queries)}
    results = {"checkpoint": args.checkpoint, **start.facts, "data": args.data, **counts, **figures, "flags": flags}
    hub.finish(run, source, results)
    return figures


if __name__ == "__main__":
    main(common.parse_args(Args))
