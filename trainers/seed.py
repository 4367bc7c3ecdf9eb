"""SEED: Self-supervised Distillation for Visual Representation (Fang et al., ICLR 2021, arXiv:2101.04731).

    p^T_j = softmax_j(z^T . d_j / tau^T),  p^S_j = softmax_j(z^S . d_j / tau^S),   d in D+ = {z^T} + queue
    L = - mean_i sum_j p^T_j log p^S_j                                                 (soft cross-entropy)

One view of every image goes to the frozen teacher and to the student; z are unit vectors, the queue holds the teacher's
embeddings of the batches before this one, the image's own embedding z^T comes first. With `--small-patches 6` every
image also gives six small crops with a queue of their own, which receives the first patch of each image; the two losses
are added, the small one a mean over all patches.
The paper's equation numbers are left out: no readable copy of it was at hand.
Reference code: github.com/jacobswan1/SEED @ f236cac. Differences from it:
  D1. BatchNorm groups are `--bn-group-size` images of the global batch (with all their patches), not one GPU's share.
  D2. The warm-up's goal is base_lr x batch / 256 in every mode; there the factor is 1 without --distributed.
  D3. tau^T is 1e-4, the code's default; the paper says 0.01 (`--teacher-temperature 0.01`).
  D4. A teacher without a projection head gives its pooled features, l2-normalised; the student's head then ends in
      their width. There every teacher has a head.
  D5. timm's ResNets start with the last BatchNorm scale of every block at zero, the authors' at one.
  D6. --symmetric adds a second view: the mean of both views' losses, each view with its own teacher embedding; the queue
      receives the first view's. Source: the README of github.com/zhangyifei01/SEED_ICLR21 @ 7835c3a, an unofficial
      implementation that reports a gain from it and shows no code for it.
  D7. A SwAV teacher's input is normalised as in its own training (red deviation 0.228); SEED gives 0.229 to both.
  D8. No fp16 inside the loss: at tau^T = 1e-4 the rounding of fp16 logits alone changes the target.

Run:  accelerate launch trainers/seed.py --data IMAGENET_FOLDER --config configs/seed/resnet18_moco-v2-r50_in1k.toml
Results: configs/seed/*.toml record command, hardware, time and accuracy of each run.
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
    run_dir: Path = Path("runs/seed")
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
    augmentation: Literal["moco_v2", "moco_v1", "digits"] = "moco_v2"
    """recipe of the random views: the teacher's own [tools/utils.py: v2 for MoCo-v2 and SwAV, v1 for MoCo-v1 and SimCLR]"""
    crop_scale: tuple[float, float] | None = None
    """share of the image's area in a view; unset: the recipe's [tools/utils.py: 0.14 1 for SwAV teachers]"""

    # --- models ---
    student: str = "resnet18"
    """timm name of the network to train"""
    small_images: bool = False
    """3x3 stride-1 stem and no max-pool, ResNets only; for images of 64 px and below"""
    teacher: str | None = None
    """run or release folder, official .pth.tar, timm/NAME, Hub id, or a name that `python hub.py inspect` knows"""
    init_from: str | None = None
    """start from this checkpoint instead of random weights: the same forms as --teacher"""

    # --- method ---
    head: Literal["linear", "mlp"] = "mlp"
    """student's head: mlp has one hidden layer [tools/opts.py --student_mlp]"""
    hidden_dim: int = 0
    """width of the head's hidden layer; 0: the backbone's [seed/builder.py]"""
    student_temperature: float = 0.2
    """tau^S [tools/opts.py --temp]"""
    teacher_temperature: float = 1e-4
    """tau^T, D3 [tools/opts.py --distill-t]"""
    queue_length: int = 65536
    """K, embeddings in the queue; a multiple of --batch-size and no longer than the data [tools/opts.py --queue]"""
    symmetric: bool = False
    """a second view of every image, the loss averaged over both, D6; twice the work a step"""
    small_patches: int = 0
    """small crops of each image beside the view; 6 in the small-patch runs [main_small-patch.py]"""
    small_patch_size: int = 96
    """side of a small crop, pixels [tools/utils.py]"""
    small_patch_scale: tuple[float, float] = (0.05, 0.14)
    """share of the image's area in a small crop [tools/utils.py]"""
    bn_group_size: int = 32
    """images per BatchNorm group; 0: the whole batch (SyncBN) [256 on 8 GPUs]"""

    # --- optimisation ---
    epochs: float = 200
    """passes over the data; the schedule's length unless --total-steps is given"""
    total_steps: int = 0
    """optimizer steps; 0: derived from --epochs, otherwise it wins"""
    batch_size: int = 256
    """images per optimizer step, over all processes"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum is the paper's; adamw learns the embedded digits in a few passes"""
    base_lr: float = 0.03
    """learning rate at the start, whatever the batch; the warm-up leads to base_lr * batch_size / 256 [tools/utils.py]"""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine to zero, or x --lr-decay at every milestone"""
    milestones: tuple[int, ...] = (120, 160)
    """epochs at which the step schedule decays [tools/opts.py]"""
    lr_decay: float = 0.1
    """factor of the step schedule [tools/utils.py]"""
    warmup_epochs: float = 5
    """epochs of linear warm-up"""
    lr_per_epoch: bool = True
    """move the learning rate once an epoch, as the authors do; off: every step"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters, biases and BatchNorm included"""
    compile: bool = False
    """torch.compile the networks; pays on GPUs for runs longer than a few minutes"""


class Student(nn.Module):
    """Backbone, head, l2 norm, for each input on its own: views (B, 3, S, S), patches (B * N, 3, s, s) -> (B, D), (B * N, D)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        # one pass an input: BatchNorm statistics are per view and per resolution
        return [F.normalize(self.head(self.backbone(x)), dim=1) for x in inputs]


def create_head(kind: str, width: int, hidden_dim: int, embedding_dim: int) -> nn.Module:
    """The projection from `width` features to `embedding_dim`."""
    hidden = hidden_dim or width
    if kind == "linear":
        return nn.Linear(width, embedding_dim)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embedding_dim))


def initial_queue(length: int, dim: int) -> Tensor:
    """Random unit vectors, (K, D)."""
    return F.normalize(torch.randn(length, dim), dim=1)


def seed_loss(
    student: Tensor, teacher: Tensor, queue: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """L. student, teacher: (B, D) and queue: (K, D), unit length -> scalar >= 0; only the student gets a gradient."""
    teacher, queue = teacher.detach(), queue.detach()
    # the image's own embedding comes first in D+
    own_s, own_t = ((x * teacher).sum(1, keepdim=True) for x in (student, teacher))
    logits = torch.cat([own_s, student @ queue.T], dim=1) / student_temperature  # (B, 1 + K)
    target = (torch.cat([own_t, teacher @ queue.T], dim=1) / teacher_temperature).softmax(1)
    return -(target * logits.log_softmax(1)).sum(1).mean()


def warmup_schedule(
    epoch: float, epochs: float, base_lr: float, batch_size: int, warmup: float, milestones=None, factor: float = 0.1
) -> float:
    """The authors': from base_lr (not 0) to base_lr x batch / 256, then a cosine that counts from epoch 0, or steps."""
    goal = base_lr * batch_size / 256
    if epoch < warmup:
        return base_lr + (goal - base_lr) / warmup * epoch
    if milestones is None:
        return common.cosine_schedule(epoch, epochs, goal)
    return common.step_schedule(epoch, goal, milestones, factor)


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    recipe = common.RECIPES[args.augmentation]
    small_recipe = dataclasses.replace(recipe, scale=args.small_patch_scale)
    recipe = dataclasses.replace(recipe, scale=args.crop_scale or recipe.scale)
    common.check_positive(args, "small_patches", least=0)
    common.check_positive(args, "small_patch_size", least=common.LEAST_PX)
    common.check_share(args, "crop_scale", "small_patch_scale")
    common.check_above_zero(args, "student_temperature", "teacher_temperature")
    count = 2 if args.symmetric else 1
    views = [(recipe, args.image_size)] * count + [(small_recipe, args.small_patch_size)] * args.small_patches
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)
    if not 0 < args.queue_length <= len(source) or args.queue_length % args.batch_size:
        raise SystemExit(
            f"--queue-length {args.queue_length}: must be a multiple of --batch-size {args.batch_size} and at most the "
            f"{len(source)} images of {args.data}"
        )

    if args.teacher is None and args.data != "digits":
        raise SystemExit(f"--teacher is missing: {hub.HOW_TO_GET_A_TEACHER}; or train one with trainers/simsiam.py")
    teacher = hub.load_teacher(args.teacher or hub.digits_teacher(run), image_size=args.image_size)
    run.record_teacher(teacher)
    common.prepare_frozen(common.to_device(teacher, device).backbone, accelerator, args.image_size)
    backbone = common.create_backbone(
        args.student, image_size=[side for _, side in views], small_images=args.small_images
    )
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    untrained = copy.deepcopy(backbone)  # on the CPU until it is reported
    dim = teacher.num_features
    if teacher.head is None:
        run.say(f"the teacher has no projection head: its {dim}-d features, l2-normalised, are what is distilled (D4)")
    else:
        with torch.no_grad():
            dim = teacher.head(torch.zeros(1, dim, device=device)).shape[1]
    student = Student(backbone, create_head(args.head, backbone.num_features, args.hidden_dim, dim))
    student = common.set_batch_norm_groups(student, args.bn_group_size, args.batch_size)
    if args.compile:
        backbone.compile()
        teacher.compile()

    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), args.base_lr, **hyper)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)
    queue, small_queue = (initial_queue(args.queue_length, dim).to(device) for _ in range(2))

    def embed(x: Tensor) -> Tensor:
        """The teacher's unit embedding, (N, D)."""
        features = teacher(x)
        return F.normalize((features if teacher.head is None else teacher.head(features)).to(queue.dtype), dim=1)

    state = {"student": student, "optimizer": optimizer, "queue": queue, "small_queue": small_queue}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---

    temperatures = args.student_temperature, args.teacher_temperature
    milestones = args.milestones if args.schedule == "step" else None
    collapsed = 0
    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        inputs, patches = batch.views[:count], batch.views[count:]
        if patches:
            inputs.append(torch.stack(patches, 1).flatten(0, 1))  # (B * N, 3, s, s), image by image

        at = data.epoch(step) if args.lr_per_epoch else data.progress(step)
        lr = warmup_schedule(at, epochs, args.base_lr, args.batch_size, args.warmup_epochs, milestones, args.lr_decay)
        common.set_lr(optimizer, lr)

        s = student(*inputs)
        with torch.no_grad(), accelerator.autocast():
            t = [embed(x) for x in inputs]
        losses = [seed_loss(s[v], t[v], queue, *temperatures) for v in range(count)]
        loss_global = loss = sum(losses) / count
        extra = {}
        if patches:
            loss_small = seed_loss(s[-1], t[-1], small_queue, *temperatures)
            loss = loss_global + loss_small
            extra = {"loss_global": loss_global, "loss_small": loss_small}

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        rows = slice(start := step * args.batch_size % args.queue_length, start + args.batch_size)
        queue[rows] = common.gather(t[0])
        if patches:
            small_queue[rows] = common.gather(t[-1][:: args.small_patches].contiguous())  # each image's first patch
        run.watch(step, loss)

        if run.log_due(step):
            # z_std: 1 = spread over the sphere, 0 = all embeddings equal; the teacher's own is the goal
            health = {**common.health(s[0]), "teacher_z_std": common.z_std(common.gather(t[0])).item()}
            seen = run.log(step, loss=loss, **extra, **health, lr=lr)
            collapsed = collapsed + 1 if seen["z_std"] < 0.02 * min(1, seen["teacher_z_std"]) else 0
            if collapsed == 5:
                raise SystemExit(
                    f"step {step}: the student gives every image the same embedding (z_std {seen['z_std']:.4f}, teacher "
                    f"{seen['teacher_z_std']:.4f}): lower --base-lr"
                )

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
    networks = {"untrained student": untrained, "teacher": teacher, "distilled student": backbone}
    results = hub.knn(run, networks, source, queries)
    hub.finish(run, source, results)
    return results


if __name__ == "__main__":
    main(common.parse_args(Args))
