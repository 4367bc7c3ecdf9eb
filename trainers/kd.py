"""Ten ways to distil a labelled teacher, as SSKD's table compares them: RepDistiller's losses, weights and stages.

Student and teacher see one view; s, t are their feature maps f_0 (stem), f_1 ... f_n (stages) and pooled vectors:

    L = w_CE L_CE + w_KD L_KD + w L_method

  kd      soft logits                      Hinton et al. 2015, arXiv:1503.02531
  fitnet  one map, regressed               Romero et al., ICLR 2015, arXiv:1412.6550
  at      attention maps of all stages     Zagoruyko & Komodakis, ICLR 2017, arXiv:1612.03928
  sp      similarities in the batch        Tung & Mori, ICCV 2019, arXiv:1907.09682
  vid     Gaussian of every map            Ahn et al., CVPR 2019, arXiv:1904.05835
  rkd     distances and angles             Park et al., CVPR 2019, arXiv:1904.05068
  pkt     distribution of similarities     Passalis & Tefas, ECCV 2018, arXiv:1803.10837
  ab      activation boundaries, first     Heo et al., AAAI 2019, arXiv:1811.03233
  ft      factors of an autoencoder        Kim et al., NeurIPS 2018, arXiv:1802.04977
  crd     contrast with a memory           Tian et al., ICLR 2020, arXiv:1910.10699

Each is a function below; they share one loop because that is how the table compares them. Two have a first stage of
`--init-epochs`: ab moves the student's maps over the teacher's activation boundaries and then learns from labels alone,
ft trains the autoencoder (paraphraser) on the teacher's last map.
Reference code: github.com/HobbitLong/RepDistiller @ b84f547. Differences from it:
  D1. An epoch's last partial batch is left out.
  D2. crd's negatives are one image from each of K equal slices of the other classes' images, in place of a draw of K
      without replacement: as likely each, none twice, and no pass over the data for every image.
  D3. --kd-weight and --method-weight have the scripts' values by default; there both must be given.
  D4. CIFAR-100's mean is SSKD's; RepDistiller's differs by 1e-4 in two figures.

Run:  accelerate launch trainers/kd.py --data CIFAR100 --teacher RUN --student resnet8x4 --method sp
Results: configs/kd/*.toml record command, hardware, time and accuracy of each run.
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

WEIGHTS = {  # w_CE, w_KD, w of scripts/run_cifar_distill.sh
    "kd": (0.1, 0.9, 0), "fitnet": (1, 0, 100), "at": (1, 0, 1000), "sp": (1, 0, 3000), "vid": (1, 0, 1),
    "rkd": (1, 0, 1), "pkt": (1, 0, 30000), "ab": (1, 0, 1), "ft": (1, 0, 200), "crd": (1, 0, 0.8),
}  # fmt: skip


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
    split: str = ""
    """split to train on, where "train" is not it"""
    image_column: str = ""
    """image column, where it cannot be told by its type"""
    label_column: str = ""
    """label column; labels are used for kNN reports only, except by trainers with a supervised loss"""
    subset: str = ""
    """train on part of the images: a count ("5000") or share ("10%"), drawn once from the seed, or a file of their names"""
    image_size: int = 32
    """side of the square view, pixels"""
    num_workers: int = 8
    """data workers per process for images that do not stay in memory (above 96 px)"""
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
    method: Literal["kd", "fitnet", "at", "sp", "vid", "rkd", "pkt", "ab", "ft", "crd"] = "kd"
    """what is distilled, named above"""
    ce_weight: float | None = None
    """w_CE; unset: the method's, 0.1 for kd and 1 for the others [scripts/run_cifar_distill.sh -r]"""
    kd_weight: float | None = None
    """w_KD; unset: the method's, 0.9 for kd and 0 for the others [-a]"""
    method_weight: float | None = None
    """w; unset: the method's, from 0.8 for crd to 30000 for pkt [-b]"""
    kd_temperature: float = 4.0
    """T of L_KD [train_student.py --kd_T]"""
    hint_layer: int = 2
    """the map that fitnet regresses, 0 being the stem's [train_student.py]"""
    init_epochs: float = 30
    """epochs of ab's and ft's first stage; with --total-steps their share is init_epochs / (init_epochs + epochs) [train_student.py]"""
    crd_dim: int = 128
    """width of crd's embeddings [train_student.py --feat_dim]"""
    crd_negatives: int = 16384
    """K, images of other classes that each image is contrasted with [train_student.py --nce_k]"""
    crd_temperature: float = 0.07
    """temperature of crd's scores [train_student.py --nce_t]"""
    crd_momentum: float = 0.5
    """share of the old embedding that crd's memory keeps [train_student.py --nce_m]"""
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


# Losses. Each takes tensors and returns a scalar; only the student's side gets a gradient, and crd's teacher embedding.


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
    return F.mse_loss(student, teacher.detach())


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer of one stage. (B, C, H, W) and (B, C', H', W') -> scalar >= 0."""
    student, teacher = common.same_size(student, teacher.detach())
    return (attention(student) - attention(teacher)).square().mean()


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving: Gram matrices of the batch with unit rows. (B, ...) and (B, ...) -> scalar >= 0."""
    g_s, g_t = (F.normalize(f.flatten(1) @ f.flatten(1).T, dim=1) for f in (student, teacher.detach()))
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


def ab(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """Activation boundaries with margin 1, over maps before the activation; the last stage counts 3/1000, others halve."""
    total = 0
    for i, (s, t) in enumerate(zip(reversed(students), reversed(teachers), strict=True)):
        wrong_on = (s + 1).square() * ((s > -1) & (t <= 0))
        wrong_off = (s - 1).square() * ((s <= 1) & (t > 0))
        total = total + (wrong_on + wrong_off).sum() / len(s) * 0.003 / 2**i
    return total


def ft(student: Tensor, teacher: Tensor) -> Tensor:
    """Factor transfer: mean absolute difference of the factors' attention. (B, K, H, W) and (B, K, H', W')."""
    student, teacher = common.same_size(student, teacher.detach())
    return (attention(student) - attention(teacher)).abs().mean()


def crd(student: Tensor, teacher: Tensor, count: int) -> Tensor:
    """Contrastive representation distillation: tell each embedding's counterpart from K others out of `count` images.

    student, teacher: (B, 1 + K), the probability of either side's embedding with each candidate, the own image first.
    """
    total = 0
    for p in (student, teacher):
        noise = (p.shape[1] - 1) / count
        positive = (p[:, 0] / (p[:, 0] + noise + 1e-7)).log()
        negative = (noise / (p[:, 1:] + noise + 1e-7)).log()
        total = total - (positive + negative.sum(1)).mean()
    return total


LOSSES = {"fitnet": fitnet, "at": at, "sp": sp, "vid": vid, "rkd": rkd, "pkt": pkt, "ft": ft, "crd": crd}


class Student(nn.Module):
    """Backbone and helpers: images and the teacher's features -> logits, and the arguments of the method's losses."""

    def __init__(self, args: Args, backbone: nn.Module, helpers: nn.ModuleDict):
        super().__init__()
        self.method, self.hint, self.backbone, self.helpers = args.method, args.hint_layer, backbone, helpers

    def forward(self, x: Tensor, t: list[Tensor]) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        s, logits = common.forward_stages(self.backbone, x, preact=self.method == "ab")
        h, stages = self.helpers, list(zip(s[1:-1], t[1:-1], strict=False))
        arguments = {
            "fitnet": lambda: [(h["regress_s"](s[self.hint]), t[self.hint])],
            "at": lambda: stages,
            "sp": lambda: [(s[-2], t[-2])],
            "vid": lambda: [
                gaussian(*common.same_size(*pair)) for gaussian, pair in zip(h["vid"], stages, strict=True)
            ],
            "rkd": lambda: [(s[-1], t[-1])],
            "pkt": lambda: [(s[-1], t[-1])],
            "ft": lambda: [(h["translator"](s[-2]), t[-2])],
            "crd": lambda: [(h["embed_s"](s[-1]), h["embed_t"](t[-1]))],
        }
        return logits, arguments.get(self.method, list)()


class FirstStage(nn.Module):
    """What ab and ft train first: -> (student's connected maps, teacher's) or (reconstructed last map, teacher's)."""

    def __init__(self, backbone: nn.Module | None, modules: nn.ModuleList):
        super().__init__()
        self.backbone, self.own = backbone, modules

    def forward(self, x: Tensor, t: list[Tensor]) -> tuple:
        if self.backbone is None:
            encoder, decoder = self.own
            return decoder(encoder(t[-2])), t[-2]
        s, _ = common.forward_stages(self.backbone, x, preact=True)
        return [connect(f) for connect, f in zip(self.own, s[1:-1], strict=True)], t[1:-1]


def create_helpers(args: Args, s: list[common.Shape], t: list[common.Shape]) -> tuple[nn.ModuleDict, nn.Module | None]:
    """What a method trains beside the student and before it, for features of these shapes, (C, H, W) and (D,) at last."""
    if args.method in ("at", "vid", "ab") and len(s) != len(t):
        raise SystemExit(
            f"--method {args.method}: goes by stages; the student has {len(s) - 2}, the teacher {len(t) - 2}"
        )
    beside, before, stages = {}, None, list(zip(s[1:-1], t[1:-1], strict=False))
    c_s, c_t, half = s[-2][0], t[-2][0], t[-2][0] // 2
    if args.method == "fitnet":
        beside["regress_s"] = common.MapRegressor(s[args.hint_layer], t[args.hint_layer], relu=True)
    if args.method == "vid":
        beside["vid"] = nn.ModuleList([common.GaussianRegressor(a[0], b[0]) for a, b in stages])
    if args.method == "crd":
        beside = {f"embed_{n}": common.UnitEmbedding(x[-1][0], args.crd_dim) for n, x in (("s", s), ("t", t))}
    if args.method == "ab":
        before = [nn.Identity() if a == b else common.MapRegressor(a, b, relu=False) for a, b in stages]
    if args.method == "ft":
        beside["translator"] = common.conv_stack((c_s, c_s, half, half), nn.Conv2d, nn.BatchNorm2d)
        before = [common.conv_stack((c_t, c_t, half, half), nn.Conv2d)]
        before += [common.conv_stack((half, half, c_t, c_t), nn.ConvTranspose2d)]
    return nn.ModuleDict(beside), before and nn.ModuleList(before)


def initial_memory(count: int, dim: int) -> Tensor:
    """Uniform around zero, (N, D)."""
    return (2 * torch.rand(count, dim) - 1) * (3 / dim) ** 0.5


class Memory(nn.Module):
    """crd's embeddings of all N images by both networks, and the constants that make scores probabilities."""

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
    columns = {"image_column": args.image_column, "label_column": args.label_column}
    source = common.open_source(args.data, "train", split=args.split, subset=args.subset, seed=args.seed, **columns)
    queries = common.open_source(args.data, "eval", **columns)
    # --- end shared block ---
    common.check_above_zero(args, "kd_temperature", "crd_temperature", "base_lr", "init_lr")
    common.check_positive(args, "eval_every", "crd_dim", "crd_negatives")
    common.check_positive(args, "hint_layer", "init_epochs", least=0)
    num_classes = common.count_classes(args.data, source)
    queries = common.labelled_queries(args.data, source, queries)
    views = [(common.RECIPES[args.augmentation], args.image_size)]
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    if args.teacher is None and args.data != "digits":
        raise SystemExit(f"--teacher is missing: {hub.HOW_TO_GET_A_TEACHER}; or train one with trainers/supervised.py")
    teacher = hub.load_teacher(args.teacher or hub.digits_teacher(run), num_classes=num_classes)
    run.record_teacher(teacher)
    common.to_device(teacher, device)
    backbone = common.create_backbone(args.student, small_images=args.small_images, num_classes=num_classes)
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    if args.method == "ab" and not all(isinstance(n, common.CifarNetwork) for n in (backbone, teacher.backbone)):
        raise SystemExit(
            f"--method ab: needs maps before the activation; these networks have them: {', '.join(common.ZOO)}"
        )
    shape_s, shape_t = (common.stage_shapes(n, args.image_size) for n in (backbone.to(device), teacher.backbone))
    if args.hint_layer > min(len(shape_s), len(shape_t)) - 2:
        raise SystemExit(f"--hint-layer {args.hint_layer}: there are maps 0 to {min(len(shape_s), len(shape_t)) - 2}")
    helpers, before = create_helpers(args, shape_s, shape_t)
    student = Student(args, backbone, helpers)
    student = common.set_batch_norm_groups(student, args.bn_group_size, args.batch_size)
    stages = common.forward_stages
    if args.compile:
        student.compile()
        stages = torch.compile(stages)

    light = backbone.pretrained_cfg["architecture"].startswith(("mobilenetv2_cifar", "shufflenet_v"))
    peak_lr = (args.base_lr or (0.04 if light else 0.2)) * args.batch_size / 256
    slow = args.method == "ft" and isinstance(backbone, common.CifarResNet | common.WideResNet)
    init_lr = (args.init_lr or (0.04 if slow else 0)) * args.batch_size / 256 or peak_lr
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), peak_lr, **hyper)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)
    every, options = args.eval_every * data.steps_per_epoch, {"num_workers": args.num_workers}
    accuracy = common.EpochAccuracy(queries, args.image_size, accelerator, every, **options)

    state = {"student": student, "optimizer": optimizer, "accuracy": accuracy}
    if before is not None:
        trained = nn.ModuleList([before, *(backbone.feature_modules() if args.method == "ab" else ())])
        init_optimizer = common.create_optimizer(args.optimizer, trained.parameters(), init_lr, **hyper)
        first = FirstStage(backbone if args.method == "ab" else None, before)
        first = common.set_batch_norm_groups(first.to(device), args.bn_group_size, args.batch_size)
        first.requires_grad_(False)  # several processes wait for a gradient of all that needs one when it is prepared
        trained.requires_grad_(True)
        first, init_optimizer = accelerator.prepare(first, init_optimizer)
        backbone.requires_grad_(True)
        state |= {"first": first, "init_optimizer": init_optimizer}
    if args.method == "crd":
        others = common.OtherClasses(args.data, source.labels, device)
        memory = state["memory"] = Memory(len(source), args.crd_dim).to(device)
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---
    init_epochs = args.init_epochs if before is not None else 0
    init_steps, total_steps = common.two_stages(args, init_epochs, total_steps, data.steps_per_epoch)
    epochs = (total_steps - init_steps) / data.steps_per_epoch
    given = args.ce_weight, args.kd_weight, args.method_weight
    weights = [usual if own is None else own for own, usual in zip(given, WEIGHTS[args.method], strict=True)]
    moves = data.epoch if args.lr_per_epoch else data.progress
    if first_step < init_steps and args.method == "ab":
        backbone.eval()
        trained.train()

    for step in run.start(first_step, total_steps, data):
        batch = data.batch(step)
        (x,) = batch.views
        with torch.no_grad(), accelerator.autocast():
            t, t_logits = stages(teacher.backbone, x, preact=args.method == "ab")
            if args.method == "ft" and step >= init_steps:
                t[-2] = before[0](t[-2])

        if step < init_steps:
            trains, lr, terms = init_optimizer, init_lr, {}
            loss = (ab if args.method == "ab" else F.mse_loss)(*first(x, t))
        else:
            trains, passed = optimizer, moves(step - init_steps)
            lr = common.scheduled_lr(args.schedule, passed, epochs, peak_lr, args.milestones, args.lr_decay)
            if step == init_steps:
                student.train()
            logits, pairs = student(x, t)
            if args.method in ("sp", "rkd", "pkt"):  # relations between the images of the global batch
                pairs = [[common.gather(f) for f in pair] for pair in pairs]
            if args.method == "crd":
                (pair,), indices = pairs, batch.indices.to(device, non_blocking=True)
                g = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
                negatives = others.draw(common.gather(batch.labels), args.crd_negatives, g)
                candidates = torch.cat([indices[:, None], negatives.chunk(world)[rank]], 1)
                probabilities = memory(*pair, candidates, args.crd_temperature, first=step == 0)
                pairs = [(*probabilities, len(source))]
            terms = {"ce": F.cross_entropy(logits, batch.labels), "kd": kd(logits, t_logits, args.kd_temperature)}
            terms["distill"] = sum(LOSSES[args.method](*arguments) for arguments in pairs)
            loss = sum(weight * term for weight, term in zip(weights, terms.values(), strict=True))

        common.set_lr(trains, lr)
        trains.zero_grad()
        accelerator.backward(loss)
        trains.step()
        if args.method == "crd":
            memory.update(indices, *pair, args.crd_momentum)
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

    results = accuracy.results(teacher, data.steps_per_epoch, run.say)
    hub.finish(run, source, results)
    return results


if __name__ == "__main__":
    main(common.parse_args(Args))
