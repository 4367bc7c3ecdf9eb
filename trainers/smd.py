"""SMD: Improving Self-supervised Lightweight Model Learning via Hard-Aware Metric Distillation (Liu & Ye, ECCV 2022).

A frozen teacher t and a student s see the same view; features are l2-normalised. Inside a group of images, with
D_tt[a, b] = ||t_a - t_b|| and D_ts[a, b] = ||t_a - s_b||, anchor a takes b as a negative if D_tt[a, b] > D_ts[a, a] and
as a positive otherwise (b = a among them); n, p are its hardest negative (argmin) and positive (argmax) under D_ts:

    w_n = max(D_tt[a, n] - D_ts[a, n], 0),   w_p = max(D_ts[a, p] - D_tt[a, p], 0)     (hard-aware weights)
    L_a = log(1 + exp((w_p D_ts[a, p] - w_n D_ts[a, n]) / temperature))                 (metric loss)
    L   = L_cos + L_metric while epoch < cosine_epochs, then L_metric alone              (total)
    L_cos = - 1/2 (cos(t_1, s_1) + cos(t_2, s_2)), L_metric the mean over both views and all anchors

The paper's equation numbers could not be checked: no readable copy of it was at hand, the equations are the code's.
Reference code: github.com/liuhao-lh/SMD @ a613972. Differences from it:
  D1. The anchors of one loss are `group_size` images of the global batch, not one GPU's share (4 x 128 there).
  D2. `--temperature` is obeyed for every student; there 0.004 is forced on MobileNetV3-L and EfficientNet-B0/B1. Without
      the flag we choose the same values as the code does.
  D3. Students are timm's: other MobileNetV3/EfficientNet variants than the authors' ports (order of squeeze-excite and
      activation, BatchNorm eps, padding), and without their dropout 0.2 and drop-connect 0.2.
  D4. A teacher file that is missing or does not fit stops the run; there it silently means a random teacher.
  D5. `--metric-weight` (their --times) weighs L_metric while L_cos is on only, as in their code.

Run:  accelerate launch trainers/smd.py --student resnet18
Results: configs/smd/*.toml record command, hardware, time and accuracy of each run.
"""

import copy
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
    run_dir: Path = Path("runs/smd")
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
    """recipe of the random views [main_distill.py: MoCo-v2's]"""

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
    temperature: float | None = None
    """temperature of the metric loss; unset: 0.004 for MobileNetV3 and EfficientNet, else 0.04 [main_distill.py]"""
    group_size: int = 128
    """images among which an anchor looks for its hardest positive and negative; 0: the whole batch [512 on 4 GPUs]"""
    cosine_epochs: float = 2
    """epochs at the start in which the cosine term is added [main_distill.py]"""
    metric_weight: float = 1.0
    """weight of the metric loss while the cosine term is on, D5 [main_distill.py --times]"""
    bn_group_size: int = 0
    """images per BatchNorm group; 0: the whole batch (SyncBN) [main_distill.py]"""

    # --- optimisation ---
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


class Student(nn.Module):
    """Backbone and one Linear to the teacher's width, for all views at once: [(B, 3, S, S)] -> [(B, D)]."""

    def __init__(self, backbone: nn.Module, teacher_dim: int):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, teacher_dim)

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        return [self.head(self.backbone(x)) for x in views]  # one pass a view: BatchNorm statistics are per view


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_cos of one view, teacher detached. student, teacher: (B, D) -> scalar in [-1, 1]."""
    return -F.cosine_similarity(student, teacher.detach().to(student.dtype), dim=1).mean()


def smd_loss(student: Tensor, teacher: Tensor, temperature: float, group_size: int | None = None) -> Tensor:
    """L_metric of one view inside groups of `group_size` rows (None or 0: all), teacher detached.

    student, teacher: (B, D) raw features, normalised here -> scalar >= 0. Raises ValueError if B is no multiple of
    `group_size`.
    """
    group_size = group_size or len(student)
    if len(student) % group_size:
        raise ValueError(f"{len(student)} images are not a multiple of group_size {group_size}")
    s = F.normalize(student, dim=1).view(-1, group_size, student.shape[1])  # (G, N, D)
    t = F.normalize(teacher.detach().to(student.dtype), dim=1).view_as(s)  # autocast gives bf16 or fp16
    d_tt, d_ts = pairwise_distance(t, t), pairwise_distance(t, s)  # (G, N, N), anchors in rows
    with torch.no_grad():
        negative = d_tt > d_ts.diagonal(dim1=1, dim2=2).unsqueeze(2)
        n = d_ts.masked_fill(~negative, torch.inf).argmin(dim=2, keepdim=True)
        p = d_ts.masked_fill(negative, -torch.inf).argmax(dim=2, keepdim=True)
        w_n = (d_tt.gather(2, n) - d_ts.gather(2, n)).clamp(min=0)
        w_n = w_n * negative.any(dim=2, keepdim=True)  # an anchor without negatives only pulls
        w_p = (d_ts.gather(2, p) - d_tt.gather(2, p)).clamp(min=0)
    return F.softplus((w_p * d_ts.gather(2, p) - w_n * d_ts.gather(2, n)) / temperature).mean()


def pairwise_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of unit vectors, (G, N, D) and (G, N, D) -> (G, N, N); the square is kept above 1e-12."""
    squared = a.square().sum(2).unsqueeze(2) + b.square().sum(2).unsqueeze(1) - 2 * a @ b.transpose(1, 2)
    return squared.clamp(min=1e-12).sqrt()


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    common.check_positive(args, "group_size", least=0)
    common.check_above_zero(args, "temperature")
    share, group_size = args.batch_size // world, args.group_size or args.batch_size
    if args.batch_size % group_size or (share % group_size and group_size % share):
        raise SystemExit(
            f"--group-size {group_size}: must divide --batch-size {args.batch_size} and fit a process's {share}"
        )
    views = [(common.RECIPES[args.augmentation], args.image_size)] * 2
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    if args.teacher is None and args.data != "digits":
        raise SystemExit(f"--teacher is missing: {hub.HOW_TO_GET_A_TEACHER}; or train one with trainers/simsiam.py")
    teacher = hub.load_teacher(args.teacher or hub.digits_teacher(run), image_size=args.image_size)
    run.record_teacher(teacher)
    common.prepare_frozen(common.to_device(teacher, device).backbone, accelerator, args.image_size)
    backbone = common.create_backbone(args.student, image_size=args.image_size, small_images=args.small_images)
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    untrained = copy.deepcopy(backbone)  # on the CPU until it is reported
    student = Student(backbone, teacher.num_features)
    student = common.set_batch_norm_groups(student, args.bn_group_size, args.batch_size)
    light = args.student.startswith(("mobilenetv3", "efficientnet", "tf_mobilenetv3", "tf_efficientnet"))
    temperature = args.temperature or (0.004 if light else 0.04)
    if args.temperature is None:
        run.say(f"temperature {temperature}: the authors' value for {args.student}")
    if args.compile:
        backbone.compile()
        teacher.compile()

    peak_lr = args.base_lr * args.batch_size / 256  # linear scaling rule
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), peak_lr, **hyper)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)

    state = {"student": student, "optimizer": optimizer}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---

    collapsed = 0
    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)

        at, unit = (data.epoch(step), 1) if args.lr_per_epoch else (data.progress(step), 1 / data.steps_per_epoch)
        common.set_lr(optimizer, common.cosine_schedule(at, epochs, peak_lr, warmup=args.warmup_epochs, unit=unit))

        with torch.no_grad(), accelerator.autocast():
            t1, t2 = teacher(torch.cat(batch.views)).chunk(2)  # eval mode: joining the views changes nothing
        s1, s2 = student(batch.views)

        if group_size > share:  # the group spans processes: everyone computes the whole loss
            s1, s2, t1, t2 = (common.gather(x) for x in (s1, s2, t1, t2))
        cosine = (cosine_loss(s1, t1) + cosine_loss(s2, t2)) / 2
        metric = (smd_loss(s1, t1, temperature, group_size) + smd_loss(s2, t2, temperature, group_size)) / 2
        loss = cosine + args.metric_weight * metric if data.progress(step) < args.cosine_epochs else metric

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.watch(step, loss)

        if run.log_due(step):
            # z_std: 1 = spread over the sphere, 0 = all features equal; the teacher's own is the goal
            health = {**common.health(s1), "teacher_z_std": common.z_std(common.gather(t1)).item()}
            lr = optimizer.param_groups[0]["lr"]
            seen = run.log(step, loss=loss, cos_term=cosine, distill_term=metric, **health, lr=lr)
            # five looks in a row: a step after the first, or a batch of one class, may well be close together
            collapsed = collapsed + 1 if seen["z_std"] < 0.02 * min(1, seen["teacher_z_std"]) else 0
            if collapsed == 5:
                raise SystemExit(
                    f"step {step}: the student gives every image the same feature (z_std {seen['z_std']:.4f}, teacher "
                    f"{seen['teacher_z_std']:.4f}): lower --base-lr or raise --cosine-epochs"
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
