"""CRD: Contrastive Representation Distillation (Tian et al., ICLR 2020, arXiv:1910.10699), of a labelled teacher.

Student and teacher see one view and are embedded by a Linear each, to unit vectors s_i, t_i. A memory holds both
embeddings of all N images; against the own entry stand K entries of images of other classes. With the constants Z that
make scores probabilities, set once by the first batch,

    p(j | s_i) = exp(<s_i, memory_t[j]> / temperature) / Z_t,   and likewise p(j | t_i) with memory_s
    L_CRD = - mean over i, over both sides, of log h(i) + sum over the K others j of log (1 - h(j)),  h = p / (p + K / N)
    L     = w_CE L_CE + w_KD L_KD + w L_CRD

After the step the memory's rows move towards the new embeddings.
Reference code: github.com/HobbitLong/RepDistiller @ b84f547. Differences from it:
  D1. An epoch's last partial batch is left out.
  D2. Negatives are one image from each of K equal slices of the other classes' images, in place of a draw of K without
      replacement: as likely each, none twice, and no pass over the data for every image.
  D3. --kd-weight and --method-weight have the scripts' values by default; there both must be given.
  D4. CIFAR-100's mean is SSKD's; RepDistiller's differs by 1e-4 in two figures.

Run:  accelerate launch trainers/crd.py --data CIFAR100 --teacher RUN --student resnet8x4
Results: configs/crd/*.toml record command, hardware, time and accuracy of each run.
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
    run_dir: Path = Path("runs/crd")
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
    method_weight: float = 0.8
    """w [-b]"""
    kd_temperature: float = 4.0
    """T of L_KD [train_student.py --kd_T]"""
    crd_dim: int = 128
    """width of the embeddings [train_student.py --feat_dim]"""
    crd_negatives: int = 16384
    """K, images of other classes that each image is contrasted with [train_student.py --nce_k]"""
    crd_temperature: float = 0.07
    """temperature of the scores [train_student.py --nce_t]"""
    crd_momentum: float = 0.5
    """share of the old embedding that the memory keeps [train_student.py --nce_m]"""
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


def kd(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """L_KD: T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over images. (B, C), (B, C) -> scalar >= 0."""
    log_p = (student_logits / temperature).log_softmax(1)
    target = (teacher_logits.detach().to(log_p.dtype) / temperature).softmax(1)
    return F.kl_div(log_p, target, reduction="batchmean") * temperature**2


def crd(student: Tensor, teacher: Tensor, count: int) -> Tensor:
    """L_CRD: tell each embedding's counterpart from K others out of `count` images.

    student, teacher: (B, 1 + K), the probability of either side's embedding with each candidate, the own image first.
    """
    total = 0
    for p in (student, teacher):
        noise = (p.shape[1] - 1) / count
        positive = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log()
        negative = (noise / (p[:, 1:] + noise + 1e-7)).log()
        total = total - (positive + negative.sum(1)).mean()
    return total


class UnitEmbedding(nn.Module):
    """One Linear to vectors of unit length, (B, D) -> (B, D')."""

    def __init__(self, width: int, goal: int):
        super().__init__()
        self.linear = nn.Linear(width, goal)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear(x), dim=1)


def create_helper(args: Args, s: list[common.Shape], t: list[common.Shape]) -> nn.ModuleDict:
    """The two embeddings, for features of these shapes, (C, H, W) and (D,) at last."""
    return nn.ModuleDict({f"embed_{n}": UnitEmbedding(x[-1][0], args.crd_dim) for n, x in (("s", s), ("t", t))})


class Student(nn.Module):
    """Backbone and helper: images and the teacher's features -> logits, and both sides' embeddings (B, --crd-dim)."""

    def __init__(self, backbone: nn.Module, helper: nn.Module):
        super().__init__()
        self.backbone, self.helper = backbone, helper

    def forward(self, x: Tensor, t: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        s, logits = common.forward_stages(self.backbone, x)
        return logits, (self.helper["embed_s"](s[-1]), self.helper["embed_t"](t[-1]))


def initial_memory(count: int, dim: int) -> Tensor:
    """Uniform around zero, (N, D)."""
    return (2 * torch.rand(count, dim) - 1) * (3 / dim) ** 0.5


class Memory(nn.Module):
    """The embeddings of all N images by both networks, and the constants that make scores probabilities."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.register_buffer("student", initial_memory(count, dim))
        self.register_buffer("teacher", initial_memory(count, dim))
        self.register_buffer("constants", torch.zeros(2))

    def forward(
        self, student: Tensor, teacher: Tensor, candidates: Tensor, temperature: float, first: bool
    ) -> list[Tensor]:
        """exp(<v, memory> / temperature) / constant for the other network's memory of (B, 1 + K) candidates, both sides."""
        sides = ((self.teacher, student), (self.student, teacher))
        scores = [(torch.einsum("bkd,bd->bk", m[candidates], v) / temperature).exp() for m, v in sides]
        if first:  # the constants are set once: the first batch's mean score times N
            means = torch.stack([s.detach().mean() for s in scores]).view(1, 2)
            self.constants.copy_(common.gather(means).mean(0) * len(self.student))
        return [s / constant for s, constant in zip(scores, self.constants, strict=True)]

    @torch.no_grad()
    def update(self, indices: Tensor, student: Tensor, teacher: Tensor, momentum: float) -> None:
        """Move the global batch's rows towards its embeddings."""
        rows = common.gather(indices)
        for memory, v in ((self.student, student), (self.teacher, teacher)):
            memory[rows] = F.normalize(memory[rows].lerp(common.gather(v.detach()), 1 - momentum), dim=1)


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    common.check_above_zero(args, "kd_temperature", "crd_temperature", "base_lr")
    common.check_positive(args, "eval_every", "crd_dim", "crd_negatives")
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
    others = common.OtherClasses(args.data, source.labels, device)
    memory = Memory(len(source), args.crd_dim).to(device)

    state = {"student": student, "optimizer": optimizer, "accuracy": accuracy, "memory": memory}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---
    moves = data.epoch if args.lr_per_epoch else data.progress

    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        (x,) = batch.views
        with torch.no_grad(), accelerator.autocast():
            t, t_logits = stages(teacher.backbone, x)

        lr = common.scheduled_lr(args.schedule, moves(step), epochs, peak_lr, args.milestones, args.lr_decay)
        common.set_lr(optimizer, lr)

        logits, pair = student(x, t)
        indices = common.send(batch.indices, device)
        g = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
        negatives = others.draw(common.gather(batch.labels), args.crd_negatives, g)
        candidates = torch.cat([indices[:, None], negatives.chunk(world)[rank]], 1)
        probabilities = memory(*pair, candidates, args.crd_temperature, first=step == 0)
        ce, soft = F.cross_entropy(logits, batch.labels), kd(logits, t_logits, args.kd_temperature)
        distilled = crd(*probabilities, len(source))
        loss = args.ce_weight * ce + args.kd_weight * soft + args.method_weight * distilled

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        memory.update(indices, *pair, args.crd_momentum)
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
