"""Supervised training with cross-entropy: the labelled teacher of distillation, and the bar that the others aim at.

    L = - log softmax(f(x))_y, with label smoothing e: targets (1 - e) onehot(y) + e / C          (cross-entropy)

Recipes: SGD with a cosine or with steps (SSKD's teachers: github.com/xuguodong03/SSKD @ 661b972, teacher.py), AdamW for
small data. Differences from SSKD's teacher.py:
  D1. The default schedule is a cosine; `--schedule step --milestones 150 180 210` is theirs (configs name it).
  D2. The last epoch is kept, there the best on the test set; an epoch's last partial batch is left out.

Run:  accelerate launch trainers/supervised.py --data FOLDER --backbone resnet18
Results: configs/supervised/*.toml record command, hardware, time and accuracy of each run.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/supervised")
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
    augmentation: Literal["linear", "cifar", "moco_v2", "digits"] = "linear"
    """recipe of the random views: linear is torchvision's crop and flip, cifar a 4-pixel shift and flip"""

    # --- models ---
    backbone: str = "resnet50"
    """timm name of the network to train"""
    small_images: bool = False
    """3x3 stride-1 stem and no max-pool, ResNets only; for images of 64 px and below"""
    init_from: str | None = None
    """start from this checkpoint instead of random weights: the same forms as --teacher"""

    # --- method ---
    label_smoothing: float = 0.0
    """e, share of the target spread over all classes"""
    bn_group_size: int = 0
    """images per BatchNorm group; 0: the whole batch (SyncBN)"""

    # --- optimisation ---
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine to zero, or x --lr-decay at every milestone"""
    milestones: tuple[int, ...] = (150, 180, 210)
    """epochs at which the step schedule decays [SSKD teacher.py]"""
    lr_decay: float = 0.1
    """factor of the step schedule [SSKD teacher.py]"""
    epochs: float = 100
    """passes over the data; the schedule's length unless --total-steps is given"""
    total_steps: int = 0
    """optimizer steps; 0: derived from --epochs, otherwise it wins"""
    batch_size: int = 512
    """images per optimizer step, over all processes"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum is the paper's; adamw learns the embedded digits in a few passes"""
    base_lr: float = 0.05
    """learning rate per 256 images: lr = base_lr * batch_size / 256"""
    warmup_epochs: float = 0.0
    """epochs of linear warm-up"""
    lr_per_epoch: bool = True
    """move the learning rate once an epoch, as the authors do; off: every step"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters, biases and BatchNorm included"""
    compile: bool = False
    """torch.compile the networks; pays on GPUs for runs longer than a few minutes"""


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """L. logits (B, C), labels (B,) -> scalar >= 0, mean over the batch."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    num_classes = common.count_classes(args.data, source)
    _, queries = common.labelled_queries(source, queries, run.say) or (source, None)
    views = [(common.RECIPES[args.augmentation], args.image_size)]
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    backbone = common.create_backbone(
        args.backbone, image_size=args.image_size, small_images=args.small_images, num_classes=num_classes
    )
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    model = common.set_batch_norm_groups(backbone, args.bn_group_size, args.batch_size)
    if args.compile:
        backbone.compile()

    peak_lr = args.base_lr * args.batch_size / 256
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, model.parameters(), peak_lr, **hyper)
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
            lr = common.cosine_schedule(at, epochs, peak_lr, warmup=args.warmup_epochs, unit=unit)
        else:
            lr = common.step_schedule(at, peak_lr, args.milestones, args.lr_decay)
        common.set_lr(optimizer, lr)

        logits = model(batch.views[0])
        loss = cross_entropy(logits, batch.labels, args.label_smoothing)

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.watch(step, loss)

        if run.log_due(step):
            correct = (logits.argmax(1) == batch.labels).float().mean()
            run.log(step, loss=loss, train_top1=100 * correct, lr=lr)

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

    results = {}
    if queries is not None:
        options = {"num_workers": args.num_workers}
        look = common.top1_accuracy
        top1 = run.attempt("top-1", look, backbone, queries, args.image_size, accelerator, **options)
        if top1 is not None:
            results["top1"] = top1
            run.say(f"top-1 on {len(queries)} images of {queries.name}: {top1:.2f} %")
    hub.finish(run, source, results)
    return results


if __name__ == "__main__":
    main(common.parse_args(Args))
