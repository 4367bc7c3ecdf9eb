"""AB: Knowledge Transfer via Distillation of Activation Boundaries (Heo et al., AAAI 2019, arXiv:1811.03233).

Maps are taken before their activation. First stage (--init-epochs): the student's maps s, brought to the teacher's shape
by a connector each, are moved over the boundary at 0 where the teacher's t lies on the other side, with margin 1:

    L_AB = 1/B sum over stages and elements of 3/1000 / 2^(stages from the last) of
           (s + 1)^2 where t <= 0 and s > -1,   (s - 1)^2 where t > 0 and s <= 1

Only what makes the maps learns. Second stage: L = w_CE L_CE + w_KD L_KD, labels alone by default.
Reference code: github.com/HobbitLong/RepDistiller @ b84f547. Differences from it:
  D1. An epoch's last partial batch is left out.
  D2. --kd-weight has the script's value by default; there it must be given.
  D3. CIFAR-100's mean is SSKD's; RepDistiller's differs by 1e-4 in two figures.

Run:  accelerate launch trainers/ab.py --data CIFAR100 --teacher RUN --student resnet8x4
Results: configs/ab/*.toml record command, hardware, time and accuracy of each run.
"""

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
    run_dir: Path = Path("runs/ab")
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
    ce_weight: float = 1.0
    """w_CE [scripts/run_cifar_distill.sh -r]"""
    kd_weight: float = 0.0
    """w_KD [-a]"""
    kd_temperature: float = 4.0
    """T of L_KD [train_student.py --kd_T]"""
    init_epochs: float = 30
    """epochs of the first stage; with --total-steps their share is init_epochs / (init_epochs + epochs) [train_student.py]"""
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
    init_lr: float | None = None
    """the same in the first stage; unset: base_lr's, and 0.04 for ft with a CIFAR ResNet or WideResNet [helper/pretrain.py]"""
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


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """L_KD: T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over images. (B, C), (B, C) -> scalar >= 0."""
    log_p = (student_logits / temperature).log_softmax(1)
    target = (teacher_logits.detach().to(log_p.dtype) / temperature).softmax(1)
    return F.kl_div(log_p, target, reduction="batchmean") * temperature**2


def ab(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """L_AB of all stages' maps, (B, C, H, W) each: the last stage counts 3/1000, those before it half as much each."""
    total = 0
    for i, (s, t) in enumerate(zip(reversed(students), reversed(teachers), strict=True)):
        wrong_on = (s + 1).square() * ((s > -1) & (t <= 0))
        wrong_off = (s - 1).square() * ((s <= 1) & (t > 0))
        total = total + (wrong_on + wrong_off).sum() / len(s) * 0.003 / 2**i
    return total


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


def create_connectors(s: list[common.Shape], t: list[common.Shape]) -> nn.ModuleList:
    """One for each stage of features of these shapes, (C, H, W) and (D,) at last."""
    if len(s) != len(t):
        raise SystemExit(f"--student: has {len(s) - 2} stages, the teacher {len(t) - 2}; choose one of as many")
    pairs = zip(s[1:-1], t[1:-1], strict=True)
    return nn.ModuleList([nn.Identity() if a == b else MapRegressor(a, b, relu=False) for a, b in pairs])


class Student(nn.Module):
    """Images -> logits. With the maps before the activation, as the authors' loop: a WideResNet's norms see them twice."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        return common.forward_stages(self.backbone, x, preact=True)[1]


class Connected(nn.Module):
    """The student's maps before the activation, brought to the teacher's shapes: images -> [(B, C, H, W), ...]."""

    def __init__(self, backbone: nn.Module, connectors: nn.ModuleList):
        super().__init__()
        self.backbone, self.connectors = backbone, connectors

    def forward(self, x: Tensor) -> list[Tensor]:
        s, _ = common.forward_stages(self.backbone, x, preact=True)
        return [connect(f) for connect, f in zip(self.connectors, s[1:-1], strict=True)]


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    common.check_above_zero(args, "kd_temperature", "base_lr", "init_lr")
    common.check_positive(args, "eval_every")
    common.check_positive(args, "init_epochs", least=0)
    num_classes = common.count_classes(args.data, source)
    _, queries = common.labelled_queries(source, queries, run.say) or (source, None)
    views = [(common.RECIPES[args.augmentation], args.image_size)]
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    if args.teacher is None:
        raise SystemExit(
            "--teacher is missing: a labelled network with maps before the activation; train one: trainers/supervised.py "
            f"--data {args.data} --image-size {args.image_size} --backbone resnet56 --run-dir runs/resnet56"
        )
    sizes = {"image_size": args.image_size, "num_classes": num_classes}
    teacher = hub.load_teacher(args.teacher, **sizes)
    run.record_teacher(teacher)
    common.to_device(teacher, device)
    backbone = common.create_backbone(args.student, small_images=args.small_images, **sizes)
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    if not all(isinstance(n, common.CifarNetwork) for n in (backbone, teacher.backbone)):
        raise SystemExit(
            f"--student, --teacher: need maps before the activation, as {', '.join(common.ZOO)} have them"
        )
    shape_s, shape_t = (common.stage_shapes(n, args.image_size) for n in (backbone.to(device), teacher.backbone))
    connectors = create_connectors(shape_s, shape_t)
    student = common.set_batch_norm_groups(Student(backbone), args.bn_group_size, args.batch_size)
    stages = common.forward_stages
    if args.compile:
        student.compile()
        stages = torch.compile(stages)

    light = backbone.pretrained_cfg["architecture"].startswith(("mobilenetv2_cifar", "shufflenet_v"))
    peak_lr = (args.base_lr or (0.04 if light else 0.2)) * args.batch_size / 256
    init_lr = (args.init_lr or 0) * args.batch_size / 256 or peak_lr
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), peak_lr, **hyper)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)
    every, options = args.eval_every * data.steps_per_epoch, {"num_workers": args.num_workers}
    accuracy = common.EpochAccuracy(queries, args.image_size, accelerator, every, **options)
    trained = nn.ModuleList([connectors, *backbone.feature_modules()])
    init_optimizer = common.create_optimizer(args.optimizer, trained.parameters(), init_lr, **hyper)
    connected = common.set_batch_norm_groups(
        Connected(backbone, connectors).to(device), args.bn_group_size, args.batch_size
    )
    connected.requires_grad_(False)  # several processes wait for a gradient of all that needs one when it is prepared
    trained.requires_grad_(True)
    connected, init_optimizer = accelerator.prepare(connected, init_optimizer)
    backbone.requires_grad_(True)

    state = {"student": student, "optimizer": optimizer, "accuracy": accuracy}
    state |= {"connected": connected, "init_optimizer": init_optimizer}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---
    init_steps, total_steps = common.two_stages(args, args.init_epochs, total_steps, data.steps_per_epoch)
    epochs = (total_steps - init_steps) / data.steps_per_epoch
    moves = data.epoch if args.lr_per_epoch else data.progress
    if first_step < init_steps:
        backbone.eval()
        trained.train()

    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        (x,) = batch.views
        with torch.no_grad(), accelerator.autocast():
            t, t_logits = stages(teacher.backbone, x, preact=True)

        if step < init_steps:
            trains, lr, terms = init_optimizer, init_lr, {}
            loss = ab(connected(x), t[1:-1])
        else:
            trains, passed = optimizer, moves(step - init_steps)
            lr = common.scheduled_lr(args.schedule, passed, epochs, peak_lr, args.milestones, args.lr_decay)
            if step == init_steps:
                student.train()
            logits = student(x)
            terms = {"ce": F.cross_entropy(logits, batch.labels), "kd": kd(logits, t_logits, args.kd_temperature)}
            loss = args.ce_weight * terms["ce"] + args.kd_weight * terms["kd"]

        common.set_lr(trains, lr)
        trains.zero_grad()
        accelerator.backward(loss)
        trains.step()
        run.watch(step, loss)

        seen = accuracy.after(step + 1 - init_steps, backbone, final=step + 1 == total_steps)
        if run.log_due(step) or seen:
            right = {"train_top1": 100 * (logits.argmax(1) == batch.labels).float().mean()} if terms else {}
            run.log(step, loss=loss, **terms, **right, **seen, lr=lr)

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
