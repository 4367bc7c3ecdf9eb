"""Seven ways to distil a labelled teacher, as SSKD's table compares them: RepDistiller's losses and weights.

Student and teacher see one view; s, t are their feature maps f_0 (stem), f_1 ... f_n (stages) and pooled vectors:

    L = w_CE L_CE + w_KD L_KD + w L_method

  kd      soft logits                      Hinton et al. 2015, arXiv:1503.02531
  fitnet  one map, regressed               Romero et al., ICLR 2015, arXiv:1412.6550
  at      attention maps of all stages     Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928
  sp      similarities in the batch        Tung & Mori, ICCV 2019, arXiv:1907.09682
  vid     Gaussian of every map            Ahn et al., CVPR 2019, arXiv:1904.05835
  rkd     distances and angles             Park et al., CVPR 2019, arXiv:1904.05068
  pkt     distribution of similarities     Passalis & Tefas, ECCV 2018, arXiv:1803.10837

Each is one row of METHODS: weights, what is compared, loss. The table's others have trainers of their own, for they
have a memory (crd.py) or a first stage (ab.py, ft.py).
Reference code: github.com/HobbitLong/RepDistiller @ b84f547. Differences from it:
  D1. An epoch's last partial batch is left out.
  D2. --kd-weight and --method-weight have the scripts' values by default; there both must be given.
  D3. CIFAR-100's mean is SSKD's; RepDistiller's differs by 1e-4 in two figures.

Run:  accelerate launch trainers/kd.py --data CIFAR100 --teacher RUN --student resnet8x4 --method sp
Results: configs/kd/*.toml record command, hardware, time and accuracy of each run.
"""

import math
import os
import sys
from collections.abc import Callable
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
    run_dir: Path = Path("runs/kd")
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
    eval_every: int = 1
    """epochs between looks at the accuracy on the evaluation split"""
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
    image_size: int = 32
    """side of the square view, pixels"""
    num_workers: int = 8
    """data workers per process for images that do not stay in memory (above 96 px)"""
    max_megapixels: float = 179
    """images of more pixels, in millions, count as unreadable: a small file may unpack to more than the memory"""
    augmentation: Literal["cifar", "linear", "moco_v2", "digits"] = "cifar"
    """recipe of the random view: cifar is a 4-pixel shift and a flip [dataset/cifar100.py]"""

    # --- models ---
    student: str = "resnet8x4"
    """timm name of the network to train"""
    small_images: bool = False
    """3x3 stride-1 stem and no max-pool, ResNets only; for images of 64 px and below"""
    teacher: str | None = None
    """run or release folder, official .pth.tar, timm/NAME, Hub id, or a name that `python hub.py inspect` knows"""
    init_from: str | None = None
    """start from this checkpoint instead of random weights: the same forms as --teacher"""

    # --- method ---
    method: Literal["kd", "fitnet", "at", "sp", "vid", "rkd", "pkt"] = "kd"
    """what is distilled, named above"""
    ce_weight: float | None = None
    """w_CE; unset: the method's, 0.1 for kd and 1 for the others [scripts/run_cifar_distill.sh -r]"""
    kd_weight: float | None = None
    """w_KD; unset: the method's, 0.9 for kd and 0 for the others [-a]"""
    method_weight: float | None = None
    """w; unset: the method's, from 1 for vid and rkd to 30000 for pkt [-b]"""
    kd_temperature: float = 4.0
    """T of L_KD [train_student.py --kd_T]"""
    hint_layer: int = 2
    """the map that fitnet regresses, 0 being the stem's [train_student.py]"""
    bn_group_size: int = 0
    """images per BatchNorm group; 0: the whole batch (SyncBN)"""

    # --- optimisation ---
    epochs: float = 240
    """passes over the data; the schedule's length unless --total-steps is given"""
    total_steps: int = 0
    """optimizer steps; 0: derived from --epochs, otherwise it wins"""
    batch_size: int = 64
    """images per optimizer step, over all processes"""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd with momentum is the paper's; adamw learns the embedded digits in a few passes"""
    base_lr: float | None = None
    """learning rate per 256 images; unset: 0.2, and 0.04 for MobileNetV2 and ShuffleNets, 0.05 and 0.01 at 64 [train_student.py]"""
    schedule: Literal["cosine", "step"] = "step"
    """cosine to zero, or x --lr-decay at every milestone"""
    milestones: tuple[int, ...] = (150, 180, 210)
    """epochs at which the step schedule decays [train_student.py]"""
    lr_decay: float = 0.1
    """factor of the step schedule [train_student.py]"""
    lr_per_epoch: bool = True
    """move the learning rate once an epoch, as the authors do; off: every step"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters, biases and BatchNorm included"""
    compile: bool = False
    """torch.compile the networks; pays on GPUs for runs longer than a few minutes"""


# Losses. Each takes tensors and returns a scalar; only the student's side gets a gradient.


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """L_KD: T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over images. (B, C), (B, C) -> scalar >= 0."""
    log_p = (student_logits / temperature).log_softmax(1)
    target = (teacher_logits.detach().to(log_p.dtype) / temperature).softmax(1)
    return F.kl_div(log_p, target, reduction="batchmean") * temperature**2


def attention(f: Tensor) -> Tensor:
    """Mean square over the channels as a unit vector, (B, C, H, W) -> (B, H * W)."""
    return F.normalize(f.square().mean(1).flatten(1), dim=1)


def fitnet(student: Tensor, teacher: Tensor) -> Tensor:
    """FitNet's hint: mean squared error of the regressed map. (B, C, H, W) twice -> scalar >= 0."""
    return F.mse_loss(student, teacher.detach().to(student.dtype))


def same_size(*maps: Tensor) -> list[Tensor]:
    """Feature maps (B, C, H, W), the larger ones pooled to the smallest one's height and width."""
    size = min(f.shape[2:] for f in maps)
    return [f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in maps]


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer of one stage. (B, C, H, W) and (B, C', H', W') -> scalar >= 0."""
    student, teacher = same_size(student, teacher.detach().to(student.dtype))
    return (attention(student) - attention(teacher)).square().mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving: Gram matrices of the batch with unit rows. (B, ...) and (B, ...) -> scalar >= 0."""
    g_s, g_t = (
        F.normalize(f.flatten(1) @ f.flatten(1).T, dim=1) for f in (student, teacher.detach().to(student.dtype))
    )
    return (g_s - g_t).square().mean()


def vid(mean: Tensor, rho: Tensor, teacher: Tensor) -> Tensor:
    """Variational information: -log N(teacher; mean, softplus(rho) + 1e-5) of one stage. (B, C, H, W), (C,), as mean."""
    variance = (F.softplus(rho) + 1e-5).view(1, -1, 1, 1)
    return 0.5 * ((mean - teacher.detach()).square() / variance + variance.log()).mean()


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Relational KD: 25 x distances over their mean, 50 x angles of all triplets, both smooth L1. (B, D), (B, D')."""

    def relations(z: Tensor) -> tuple[Tensor, Tensor]:
        squared = z.square().sum(1)
        off_diagonal = 1 - torch.eye(len(z), device=z.device, dtype=z.dtype)
        d = (squared[:, None] + squared - 2 * z @ z.T).clamp(min=1e-12).sqrt() * off_diagonal
        e = F.normalize(z[None] - z[:, None], dim=2)
        return d / (d.sum() / (d > 0).sum()), e @ e.mT

    (d_s, a_s), (d_t, a_t) = relations(student), relations(teacher.detach().to(student.dtype))
    return 25 * F.smooth_l1_loss(d_s, d_t) + 50 * F.smooth_l1_loss(a_s, a_t)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Probabilistic transfer: KL of the batch's cosines, shifted to 0..1 and normalised by row. (B, D), (B, D')."""

    def probabilities(z: Tensor) -> Tensor:
        z = z / (z.norm(dim=1, keepdim=True) + 1e-7)
        similarity = (z @ z.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p_s, p_t = probabilities(student), probabilities(teacher.detach().to(student.dtype))
    return (p_t * ((p_t + 1e-7) / (p_s + 1e-7)).log()).mean()


class MapRegressor(nn.Module):
    """A feature map of shape (C, H, W) to another's shape by one convolution and BatchNorm, with ReLU if asked for.

    Raises SystemExit for sizes that one convolution does not lead to: smaller and not half of it.
    """

    def __init__(self, ours: common.Shape, theirs: common.Shape, relu: bool):
        super().__init__()
        (width, side, _), (goal_width, goal, _) = ours, theirs
        if side == 2 * goal:
            self.conv = nn.Conv2d(width, goal_width, 3, 2, 1)
        elif 2 * side == goal:
            self.conv = nn.ConvTranspose2d(width, goal_width, 4, 2, 1)
        elif side >= goal:
            self.conv = nn.Conv2d(width, goal_width, 1 + side - goal)
        else:
            raise SystemExit(
                f"--student: its feature map of {side} px is neither half of the teacher's {goal} px nor larger: choose another"
            )
        self.bn, self.relu = nn.BatchNorm2d(goal_width), relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return F.relu(x) if self.relu else x


class GaussianRegressor(nn.Module):
    """A Gaussian of another network's map, from (B, C, H, W) and that map: its mean, (C',) raw scales, and the map again."""

    def __init__(self, width: int, goal: int):
        super().__init__()
        first, *others = (nn.Conv2d(w, goal, 1, bias=False) for w in (width, goal, goal))
        self.regressor = nn.Sequential(first, nn.ReLU(), others[0], nn.ReLU(), others[1])
        self.log_scale = nn.Parameter(torch.full((goal,), math.log(math.expm1(5.0 - 1e-5))))

    def forward(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.regressor(x), self.log_scale, other


# What is compared. From all features of student and teacher, lists as `common.forward_stages` gives them, to one tuple of
# arguments of the loss for each place that is compared.


class Nothing(nn.Module):
    def forward(self, s: list[Tensor], t: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return []


class Pooled(nn.Module):
    def forward(self, s: list[Tensor], t: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return [(s[-1], t[-1])]


class LastMap(nn.Module):
    def forward(self, s: list[Tensor], t: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return [(s[-2], t[-2])]


class Stages(nn.Module):
    def forward(self, s: list[Tensor], t: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(s[1:-1], t[1:-1], strict=True))


class RegressedMap(nn.Module):
    """The map of --hint-layer, the student's brought to the teacher's shape."""

    def __init__(self, layer: int, s: list[common.Shape], t: list[common.Shape]):
        super().__init__()
        if layer > min(len(s), len(t)) - 2:
            raise SystemExit(f"--hint-layer {layer}: there are maps 0 to {min(len(s), len(t)) - 2}")
        self.layer, self.regress_s = layer, MapRegressor(s[layer], t[layer], relu=True)

    def forward(self, s: list[Tensor], t: list[Tensor]) -> list[tuple[Tensor, ...]]:
        return [(self.regress_s(s[self.layer]), t[self.layer])]


class Gaussians(nn.Module):
    """A Gaussian of the teacher's map from the student's, for every stage."""

    def __init__(self, s: list[common.Shape], t: list[common.Shape]):
        super().__init__()
        pairs = zip(s[1:-1], t[1:-1], strict=True)
        self.vid = nn.ModuleList([GaussianRegressor(ours[0], theirs[0]) for ours, theirs in pairs])

    def forward(self, s: list[Tensor], t: list[Tensor]) -> list[tuple[Tensor, ...]]:
        pairs = zip(self.vid, s[1:-1], t[1:-1], strict=True)
        return [gaussian(*same_size(ours, theirs)) for gaussian, ours, theirs in pairs]


@dataclass(frozen=True)
class Method:
    weights: tuple[float, float, float]  # w_CE, w_KD, w of scripts/run_cifar_distill.sh
    compared: Callable[[Args, list[common.Shape], list[common.Shape]], nn.Module]
    loss: Callable[..., Tensor] | None = None
    by_stages: bool = False  # student and teacher need equally many
    relational: bool = False  # between the images of the global batch


METHODS = {
    "kd": Method((0.1, 0.9, 0), lambda *_: Nothing()),
    "fitnet": Method((1, 0, 100), lambda args, s, t: RegressedMap(args.hint_layer, s, t), fitnet),
    "at": Method((1, 0, 1000), lambda *_: Stages(), at, by_stages=True),
    "sp": Method((1, 0, 3000), lambda *_: LastMap(), sp, relational=True),
    "vid": Method((1, 0, 1), lambda _, s, t: Gaussians(s, t), vid, by_stages=True),
    "rkd": Method((1, 0, 1), lambda *_: Pooled(), rkd, relational=True),
    "pkt": Method((1, 0, 30000), lambda *_: Pooled(), pkt, relational=True),
}


def create_helper(args: Args, s: list[common.Shape], t: list[common.Shape]) -> nn.Module:
    """What --method compares, and trains beside the student, for features of these shapes, (C, H, W) and (D,) at last."""
    method = METHODS[args.method]
    if method.by_stages and len(s) != len(t):
        raise SystemExit(
            f"--method {args.method}: goes by stages; the student has {len(s) - 2}, the teacher {len(t) - 2}"
        )
    return method.compared(args, s, t)


class Student(nn.Module):
    """Backbone and helper: images and the teacher's features -> logits, and the arguments of the method's losses."""

    def __init__(self, backbone: nn.Module, helper: nn.Module):
        super().__init__()
        self.backbone, self.helper = backbone, helper

    def forward(self, x: Tensor, t: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        s, logits = common.forward_stages(self.backbone, x)
        return logits, self.helper(s, t)


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    common.check_above_zero(args, "kd_temperature", "base_lr")
    common.check_positive(args, "eval_every")
    common.check_positive(args, "hint_layer", least=0)
    num_classes = common.count_classes(args.data, source)
    _, queries = common.labelled_queries(source, queries, run.say) or (source, None)
    views = [(common.RECIPES[args.augmentation], args.image_size)]
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    if args.teacher is None and args.data != "digits":
        raise SystemExit(f"--teacher is missing: {hub.HOW_TO_GET_A_TEACHER}; or train one with trainers/supervised.py")
    sizes = {"image_size": args.image_size, "num_classes": num_classes}
    teacher = hub.load_teacher(args.teacher or hub.digits_teacher(run), **sizes)
    run.record_teacher(teacher)
    common.to_device(teacher, device)
    backbone = common.create_backbone(args.student, small_images=args.small_images, **sizes)
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    shape_s, shape_t = (common.stage_shapes(n, args.image_size) for n in (backbone.to(device), teacher.backbone))
    student = Student(backbone, create_helper(args, shape_s, shape_t))
    student = common.set_batch_norm_groups(student, args.bn_group_size, args.batch_size)
    stages = common.forward_stages
    if args.compile:
        student.compile()
        stages = torch.compile(stages)

    light = backbone.pretrained_cfg["architecture"].startswith(("mobilenetv2_cifar", "shufflenet_v"))
    peak_lr = (args.base_lr or (0.04 if light else 0.2)) * args.batch_size / 256
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), peak_lr, **hyper)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)
    every, options = args.eval_every * data.steps_per_epoch, {"num_workers": args.num_workers}
    accuracy = common.EpochAccuracy(queries, args.image_size, accelerator, every, **options)

    state = {"student": student, "optimizer": optimizer, "accuracy": accuracy}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---
    method, given = METHODS[args.method], (args.ce_weight, args.kd_weight, args.method_weight)
    w_ce, w_kd, w = (usual if own is None else own for own, usual in zip(given, method.weights, strict=True))
    moves = data.epoch if args.lr_per_epoch else data.progress

    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        (x,) = batch.views
        with torch.no_grad(), accelerator.autocast():
            t, t_logits = stages(teacher.backbone, x)

        lr = common.scheduled_lr(args.schedule, moves(step), epochs, peak_lr, args.milestones, args.lr_decay)
        common.set_lr(optimizer, lr)

        logits, pairs = student(x, t)
        if method.relational:
            pairs = [[common.gather(f) for f in pair] for pair in pairs]
        ce, soft = F.cross_entropy(logits, batch.labels), kd(logits, t_logits, args.kd_temperature)
        distilled = sum(method.loss(*pair) for pair in pairs)
        loss = w_ce * ce + w_kd * soft + w * distilled

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.watch(step, loss)

        seen = accuracy.after(step + 1, backbone, final=step + 1 == total_steps)
        if run.log_due(step) or seen:
            right = 100 * (logits.argmax(1) == batch.labels).float().mean()
            run.log(step, loss=loss, ce=ce, kd=soft, distill=distilled, train_top1=right, **seen, lr=lr)

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
    results = run.attempt("top-1", accuracy.results, teacher, data.steps_per_epoch, run.say) or {}
    hub.finish(run, source, results)
    return results


if __name__ == "__main__":
    main(common.parse_args(Args))
