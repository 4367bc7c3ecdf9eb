"""FT: Paraphrasing Complex Network: Network Compression via Factor Transfer (Kim et al., NeurIPS 2018, arXiv:1802.04977).

First stage (--init-epochs): an autoencoder, the paraphraser, learns the teacher's last map t by its mean squared error;
what its encoder makes of a map are the teacher's factors F_t. Second stage: a translator beside the student makes the
student's factors F_s of its last map; with Q(F) the mean square over the channels as a unit vector,

    L_FT = mean |Q(F_s) - Q(F_t)|,   L = w_CE L_CE + w_KD L_KD + w L_FT

Reference code: github.com/HobbitLong/RepDistiller @ b84f547. Differences from it:
  D1. An epoch's last partial batch is left out.
  D2. --kd-weight and --method-weight have the scripts' values by default; there both must be given.
  D3. CIFAR-100's mean is SSKD's; RepDistiller's differs by 1e-4 in two figures.

Run:  accelerate launch trainers/ft.py --data CIFAR100 --teacher RUN --student resnet8x4
Results: configs/ft/*.toml record command, hardware, time and accuracy of each run.
"""

import os
import sys
from dataclasses import dataclass
from itertools import pairwise
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
    run_dir: Path = Path("runs/ft")
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
    method_weight: float = 200.0
    """w [-b]"""
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


def attention(f: Tensor) -> Tensor:
    """Mean square over the channels as a unit vector, (B, C, H, W) -> (B, H * W)."""
    return F.normalize(f.square().mean(1).flatten(1), dim=1)


def same_size(*maps: Tensor) -> list[Tensor]:
    """Feature maps (B, C, H, W), the larger ones pooled to the smallest one's height and width."""
    size = min(f.shape[2:] for f in maps)
    return [f if f.shape[2:] == size else F.adaptive_avg_pool2d(f, size) for f in maps]


def ft(student: Tensor, teacher: Tensor) -> Tensor:
    """L_FT: mean absolute difference of the factors' attention. (B, K, H, W) and (B, K, H', W')."""
    student, teacher = same_size(student, teacher.detach().to(student.dtype))
    return (attention(student) - attention(teacher)).abs().mean()


def conv_stack(widths: tuple[int, ...], layer: type, norm: type = nn.Identity) -> nn.Sequential:
    """3x3 layers (convolutions or transposed ones) from width to width, each with `norm` and LeakyReLU."""
    rows = [(layer(a, b, 3, 1, 1), norm(b), nn.LeakyReLU(0.1, inplace=True)) for a, b in pairwise(widths)]
    return nn.Sequential(*(module for row in rows for module in row))


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's last map with half its channels in the middle: (B, C, H, W) -> the same."""

    def __init__(self, width: int):
        super().__init__()
        self.encoder = conv_stack((width, width, width // 2, width // 2), nn.Conv2d)
        self.decoder = conv_stack((width // 2, width // 2, width, width), nn.ConvTranspose2d)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def create_helper(s: list[common.Shape], t: list[common.Shape]) -> nn.ModuleDict:
    """The translator, from the student's last map to as many channels as the teacher's factors have."""
    width, goal = s[-2][0], t[-2][0] // 2
    return nn.ModuleDict({"translator": conv_stack((width, width, goal, goal), nn.Conv2d, nn.BatchNorm2d)})


class Student(nn.Module):
    """Backbone and helper: images -> logits, and its factors (B, K, H, W)."""

    def __init__(self, backbone: nn.Module, helper: nn.Module):
        super().__init__()
        self.backbone, self.helper = backbone, helper

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s, logits = common.forward_stages(self.backbone, x)
        return logits, self.helper["translator"](s[-2])


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
    student = Student(backbone, create_helper(shape_s, shape_t))
    student = common.set_batch_norm_groups(student, args.bn_group_size, args.batch_size)
    stages = common.forward_stages
    if args.compile:
        student.compile()
        stages = torch.compile(stages)

    light = backbone.pretrained_cfg["architecture"].startswith(("mobilenetv2_cifar", "shufflenet_v"))
    peak_lr = (args.base_lr or (0.04 if light else 0.2)) * args.batch_size / 256
    slow = isinstance(backbone, common.CifarResNet | common.WideResNet)
    init_lr = (args.init_lr or (0.04 if slow else 0)) * args.batch_size / 256 or peak_lr
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), peak_lr, **hyper)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)
    every, options = args.eval_every * data.steps_per_epoch, {"num_workers": args.num_workers}
    accuracy = common.EpochAccuracy(queries, args.image_size, accelerator, every, **options)
    paraphraser = common.set_batch_norm_groups(
        Paraphraser(shape_t[-2][0]).to(device), args.bn_group_size, args.batch_size
    )
    init_optimizer = common.create_optimizer(args.optimizer, paraphraser.parameters(), init_lr, **hyper)
    paraphraser, init_optimizer = accelerator.prepare(paraphraser, init_optimizer)
    encoder = accelerator.unwrap_model(paraphraser).encoder

    state = {"student": student, "optimizer": optimizer, "accuracy": accuracy}
    state |= {"paraphraser": paraphraser, "init_optimizer": init_optimizer}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---
    init_steps, total_steps = common.two_stages(args, args.init_epochs, total_steps, data.steps_per_epoch)
    epochs = (total_steps - init_steps) / data.steps_per_epoch
    moves = data.epoch if args.lr_per_epoch else data.progress

    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        (x,) = batch.views
        with torch.no_grad(), accelerator.autocast():
            t, t_logits = stages(teacher.backbone, x)
            factors = encoder(t[-2]) if step >= init_steps else None

        if step < init_steps:
            trains, lr, terms = init_optimizer, init_lr, {}
            loss = F.mse_loss(paraphraser(t[-2]), t[-2])
        else:
            trains, passed = optimizer, moves(step - init_steps)
            lr = common.scheduled_lr(args.schedule, passed, epochs, peak_lr, args.milestones, args.lr_decay)
            logits, translated = student(x)
            ce, soft = F.cross_entropy(logits, batch.labels), kd(logits, t_logits, args.kd_temperature)
            terms = {"ce": ce, "kd": soft, "distill": ft(translated, factors)}
            loss = args.ce_weight * ce + args.kd_weight * soft + args.method_weight * terms["distill"]

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
