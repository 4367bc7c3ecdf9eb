"""SSKD: Knowledge Distillation Meets Self-Supervision (Xu et al., ECCV 2020, arXiv:2006.07114).

Image i is seen as it is (k = 0) and turned by k x 90 degrees; f are a network's logits, z is a two-layer head on its
pooled features. S^k_ij = cos(z(x_i^k), z(x_j^0)) asks which image of the batch a turned one comes from:

    L_SSP = - mean_{i, k > 0} log softmax_j(S^k_ij)_i                    (phase A: the head on the frozen teacher)
    L = w_CE L_CE + w_KD L_KD + w_LT L_LT + w_SS L_SS                    (phase B: student and its head)
    L_CE = cross-entropy of f^S(x_i^0) with the label
    L_KD = T^2 KL(softmax(f^T(x_i^0) / T) || softmax(f^S(x_i^0) / T))    (mean over images)
    L_LT = the same on turned images                                     (mean over the kept ones)
    L_SS = the same on the rows of S^T and S^S                           (mean over the kept ones)

Rows of L_LT and L_SS on which the teacher is right are kept, and of its wrong ones the least wrong `--lt-keep`,
`--ss-keep`: those where the true entry (the label, the own image) has the highest rank in the teacher's row.
The paper's equation numbers are left out: no readable copy of it was at hand, the equations are the code's.
Reference code: github.com/xuguodong03/SSKD @ 661b972. Differences from it:
  D1. An epoch's last partial batch is left out; there its softmax of L_SS has as many classes as it has images.
  D2. Equal ranks at the cut keep the batch's order, there an unstable sort's; where nothing is kept L is 0, there NaN.
  D3. Flips differ in every epoch; with the authors' PyTorch all workers and epochs share one sequence.
  D4. The release is the last epoch; both it and the best epoch on the evaluation split are reported, there the best.
  D5. Light networks take their lower learning rate by themselves; there command.sh sets it.
  D6. `--ssp-head` takes phase A's head from another run with the same teacher; there phase A runs every time.

Run:  accelerate launch trainers/sskd.py --data CIFAR100 --teacher RUN --student wrn_16_2
Results: configs/sskd/*.toml record command, hardware, time and accuracy of each run.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
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
    run_dir: Path = Path("runs/sskd")
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
    """recipe of the four views, each with a crop of its own behind the common flip and its turn [cifar.py, student.py]"""

    # --- models ---
    student: str = "wrn_16_2"
    """timm name of the network to train"""
    small_images: bool = False
    """3x3 stride-1 stem and no max-pool, ResNets only; for images of 64 px and below"""
    teacher: str | None = None
    """run or release folder, official .pth.tar, timm/NAME, Hub id, or a name that `python hub.py inspect` knows"""
    init_from: str | None = None
    """start from this checkpoint instead of random weights: the same forms as --teacher"""

    # --- method ---
    ssp_head: Path | None = None
    """phase A's result, ssp_head.safetensors or a run folder with it: leaves phase A out; only with the same teacher"""
    head_epochs: float = 60
    """epochs of phase A; with --total-steps their share of it is head_epochs / (head_epochs + epochs) [student.py]"""
    ce_weight: float = 0.1
    """w_CE [student.py]"""
    kd_weight: float = 0.9
    """w_KD [student.py]"""
    lt_weight: float = 2.7
    """w_LT [student.py --tf-weight]"""
    ss_weight: float = 10.0
    """w_SS [student.py]"""
    kd_temperature: float = 4.0
    """T of L_KD [student.py]"""
    lt_temperature: float = 4.0
    """T of L_LT [student.py --tf-T]"""
    ss_temperature: float = 0.5
    """T of L_SS [student.py]"""
    lt_keep: float = 1.0
    """share of the teacher's wrong predictions of turned images that L_LT keeps, the least wrong first [--ratio-tf]"""
    ss_keep: float = 0.75
    """share of the teacher's wrong assignments that L_SS keeps, the least wrong first [--ratio-ss]"""
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
    """learning rate per 256 images; unset: 0.2, and 0.04 for MobileNetV2 and ShuffleNets, 0.05 and 0.01 at 64 [command.sh]"""
    head_lr: float = 0.2
    """phase A's learning rate per 256 images, 0.05 at 64 [student.py --t-lr]"""
    schedule: Literal["cosine", "step"] = "step"
    """cosine to zero, or x --lr-decay at every milestone"""
    milestones: tuple[int, ...] = (150, 180, 210)
    """epochs at which the step schedule decays [student.py]"""
    head_milestones: tuple[int, ...] = (30, 45)
    """the same in phase A [student.py --t-milestones]"""
    lr_decay: float = 0.1
    """factor of the step schedule [student.py --gamma]"""
    lr_per_epoch: bool = True
    """move the learning rate once an epoch, as the authors do; off: every step"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 5e-4
    """L2 penalty on all parameters, biases and BatchNorm included"""
    compile: bool = False
    """torch.compile the networks; pays on GPUs for runs longer than a few minutes"""


class Student(nn.Module):
    """A classifier and the head on its pooled features: (N, 3, S, S) -> logits (N, C), z (N, D)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = common.forward_stages(self.backbone, x)
        return logits, self.head(features[-1])


def create_head(dim: int) -> nn.Module:
    """The two-layer projection, (N, D) -> (N, D)."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, dim))


def split_views(x: Tensor) -> tuple[Tensor, Tensor]:
    """Interleaved rows, 4i + k for image i turned k times: (4B, D) -> upright (B, D), turned (3B, D)."""
    x = x.unflatten(0, (-1, 4))
    return x[:, 0], x[:, 1:].flatten(0, 1)


def similarity(z: Tensor) -> tuple[Tensor, Tensor]:
    """S of interleaved head outputs (4B, D): (3B, B), and the column of each row's own image, (3B,)."""
    upright, turned = split_views(F.normalize(z, dim=1))
    return turned @ upright.T, torch.arange(len(upright), device=z.device).repeat_interleave(3)


def ssp_loss(head_output: Tensor) -> Tensor:
    """L_SSP. head_output: (4B, D), interleaved -> scalar >= 0."""
    return F.cross_entropy(*similarity(head_output))


def true_rank(scores: Tensor, target: Tensor) -> Tensor:
    """How many entries come before the true one, equal ones by index. (N, C), (N,) -> (N,); 0: the row is right."""
    true = scores.gather(1, target[:, None])
    earlier = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return ((scores > true) | ((scores == true) & earlier)).sum(1)


def selected(rank: Tensor, keep: float) -> Tensor:
    """Rows to distil from their true entry's rank, (N,) -> (N,) bool: the right ones and a share of the wrong ones."""
    wrong = (rank > 0).sum().view(1)
    count = len(rank) - wrong + (wrong.double() * keep).long()  # as int(wrong * keep)
    place = torch.empty_like(rank)
    place[rank.argsort(stable=True)] = torch.arange(len(rank), device=rank.device)  # D2
    return place < count


def soft_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of every row, (N, C), (N, C) -> (N,)."""
    log_p, target = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    return F.kl_div(log_p, target, reduction="none").sum(1) * temperature**2


def sskd_losses(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_rep: Tensor,
    teacher_rep: Tensor,
    target: Tensor,
    *,
    kd_temperature: float,
    lt_temperature: float,
    ss_temperature: float,
    lt_keep: float,
    ss_keep: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(L_CE, L_KD, L_LT, L_SS), unweighted; only the student gets a gradient.

    Logits (4B, C) and head outputs (4B, D) are interleaved (row 4i + k is image i turned k times), D may differ between
    student and teacher; target: (B,). A term that keeps no row is 0.
    """
    upright, turned = split_views(student_logits)
    t_upright, t_turned = split_views(teacher_logits.detach().to(student_logits.dtype))
    s_similar, own = similarity(student_rep)
    t_similar, _ = similarity(teacher_rep.detach().to(student_rep.dtype))
    lt_kept = selected(true_rank((t_turned / lt_temperature).softmax(1), target.repeat_interleave(3)), lt_keep)
    ss_kept = selected(true_rank(t_similar, own), ss_keep)
    lt = soft_divergence(turned, t_turned, lt_temperature) * lt_kept
    ss = soft_divergence(s_similar, t_similar, ss_temperature) * ss_kept
    means = (rows.sum() / kept.sum().clamp(min=1) for rows, kept in ((lt, lt_kept), (ss, ss_kept)))
    return F.cross_entropy(upright, target), soft_divergence(upright, t_upright, kd_temperature).mean(), *means


def load_head(head: nn.Module, path: Path, teacher: str) -> None:
    """--ssp-head: phase A's result, whole and made for the teacher with this fingerprint, or SystemExit."""
    file = path / "ssp_head.safetensors" if path.is_dir() else path
    try:
        with safetensors.safe_open(file, "pt") as opened:
            made_for = (opened.metadata() or {}).get("teacher")
            state = {k: opened.get_tensor(k) for k in opened.keys()}
    except Exception as error:  # the safetensors reader has an exception type of its own
        reason = common.first_line(error)
        raise SystemExit(f"--ssp-head {file}: cannot be read ({reason}); a run writes it when phase A ends") from None
    if made_for != teacher:
        raise SystemExit(f"--ssp-head {file}: trained on another --teacher; leave it out to train the head again")
    hub.load_strictly(head, state, f"--ssp-head {file}")


def save_head(run: hub.Run, head: nn.Module, teacher: str) -> None:
    """ssp_head.safetensors in the run folder, whole or not at all."""
    if run.accelerator.is_main_process:
        file, state = run.dir / "ssp_head.safetensors", {k: v.cpu().contiguous() for k, v in head.state_dict().items()}
        try:
            file.with_suffix(".tmp").write_bytes(safetensors.torch.save(state, {"teacher": teacher}))
            os.replace(file.with_suffix(".tmp"), file)
        except OSError as error:
            raise SystemExit(f"{file}: not written ({error.strerror}); free space, then --resume") from None


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    common.check_above_zero(args, "kd_temperature", "lt_temperature", "ss_temperature", "base_lr")
    common.check_positive(args, "eval_every")
    common.check_positive(args, "head_epochs", "lt_keep", "ss_keep", least=0)
    for flag, value in (("--lt-keep", args.lt_keep), ("--ss-keep", args.ss_keep)):
        if value > 1:
            raise SystemExit(f"{flag} {value}: must be at most 1, a share of the wrong predictions")
    num_classes = common.count_classes(args.data, source)
    _, queries = common.labelled_queries(source, queries, run.say) or (source, None)
    views = [(recipe, args.image_size) for recipe in common.rotations(common.RECIPES[args.augmentation])]
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    if args.teacher is None and args.data != "digits":
        raise SystemExit(f"--teacher is missing: {hub.HOW_TO_GET_A_TEACHER}; or train one with trainers/supervised.py")
    sizes = {"image_size": args.image_size, "num_classes": num_classes}
    teacher = hub.load_teacher(args.teacher or hub.digits_teacher(run), **sizes)
    run.record_teacher(teacher)
    teacher_print = common.fingerprint(teacher.backbone)
    common.to_device(teacher, device)
    ssp_head = create_head(teacher.num_features)
    if args.ssp_head:
        load_head(ssp_head, args.ssp_head, teacher_print)
    backbone = common.create_backbone(args.student, small_images=args.small_images, **sizes)
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    student = Student(backbone, create_head(backbone.num_features))
    student = common.set_batch_norm_groups(student, args.bn_group_size, args.batch_size)
    stages = common.forward_stages
    if args.compile:
        student.compile()
        stages = torch.compile(stages)

    light = backbone.pretrained_cfg["architecture"].startswith(("mobilenetv2_cifar", "shufflenet_v"))
    peak_lr = (args.base_lr or (0.04 if light else 0.2)) * args.batch_size / 256
    peak_head_lr = args.head_lr * args.batch_size / 256
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    head_optimizer = common.create_optimizer(args.optimizer, ssp_head.parameters(), peak_head_lr, **hyper)
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), peak_lr, **hyper)
    trained_head, head_optimizer = accelerator.prepare(ssp_head.to(device), head_optimizer)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)
    every, options = args.eval_every * data.steps_per_epoch, {"num_workers": args.num_workers}
    accuracy = common.EpochAccuracy(queries, args.image_size, accelerator, every, **options)

    state = {"ssp_head": trained_head, "head_optimizer": head_optimizer}
    state |= {"student": student, "optimizer": optimizer, "accuracy": accuracy}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---
    head_epochs = 0 if args.ssp_head else args.head_epochs
    head_steps, total_steps = common.two_stages(args, head_epochs, total_steps, data.steps_per_epoch)
    epochs = (total_steps - head_steps) / data.steps_per_epoch
    weights = {"ce": args.ce_weight, "kd": args.kd_weight, "lt": args.lt_weight, "ss": args.ss_weight}
    settings = {
        "kd_temperature": args.kd_temperature, "lt_temperature": args.lt_temperature,
        "ss_temperature": args.ss_temperature, "lt_keep": args.lt_keep, "ss_keep": args.ss_keep,
    }  # fmt: skip
    moves = data.epoch if args.lr_per_epoch else data.progress

    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        x = torch.stack(batch.views, 1).flatten(0, 1)  # (4B, 3, S, S), interleaved

        with torch.no_grad(), accelerator.autocast():
            maps, t_logits = stages(teacher.backbone, x)
            t_features = maps[-1]
        del maps  # not needed while the student works
        # every process computes the whole loss: it compares an image with the others of the global batch
        if step < head_steps:
            trains = head_optimizer
            lr = common.step_schedule(moves(step), peak_head_lr, args.head_milestones, args.lr_decay)
            rep = common.gather(trained_head(t_features))
            loss, terms = ssp_loss(rep), {}
        else:
            trains, passed = optimizer, moves(step - head_steps)
            lr = common.scheduled_lr(args.schedule, passed, epochs, peak_lr, args.milestones, args.lr_decay)
            with torch.no_grad(), accelerator.autocast():
                t_logits, t_rep = (common.gather(y) for y in (t_logits, ssp_head(t_features)))
            logits, rep = (common.gather(y) for y in student(x))
            losses = sskd_losses(logits, t_logits, rep, t_rep, common.gather(batch.labels), **settings)
            terms = dict(zip(weights, losses, strict=True))
            loss = sum(weights[name] * term for name, term in terms.items())

        common.set_lr(trains, lr)
        trains.zero_grad()
        accelerator.backward(loss)
        trains.step()
        run.watch(step, loss)
        if step + 1 == head_steps:
            save_head(run, ssp_head, teacher_print)

        seen = accuracy.after(step + 1 - head_steps, backbone, final=step + 1 == total_steps)
        if run.log_due(step) or seen:
            # ssp_top1: turned images whose own image is nearest, 1/B by chance; z_std: 1 = spread out, 0 = collapsed
            similar, own = similarity(rep.detach())
            health = {
                "ssp_top1": 100 * (similar.argmax(1) == own).float().mean(),
                "z_std": common.z_std(rep).item(),
            }
            run.log(step, loss=loss, **terms, **health, **seen, lr=lr)

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
