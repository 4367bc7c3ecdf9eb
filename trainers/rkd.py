"""RKD: Relational Knowledge Distillation (Park et al., CVPR 2019, arXiv:1904.05068), self-supervised, as DisCo compares it.

A student learns by MoCo's contrast and takes over how the frozen teacher's embeddings lie to each other. Two views of
every image, s and t the student's and the teacher's unit embeddings of view 1. Inside a group of n images, with
d_ij = ||x_i - x_j||, mu its mean over i != j, cos_ijk the cosine at x_i of the angle to x_j and x_k, l the smooth L1:

    L_D = 1/n^2 sum_ij  l(d^s_ij / mu^s, d^t_ij / mu^t)                               (distance)
    L_A = 1/n^3 sum_ijk l(cos^s_ijk, cos^t_ijk)                                       (angle)
    L   = L_q + distance_weight L_D + angle_weight L_A

with L_q and the key encoder as in MoCo (its Eq. 1, and Eq. 2 for the momentum), on a queue of keys. `--consistency` adds
DisCo's consistency_weight L_c, L_c = ||s_1 - t_1||^2 + ||s_2 - t_2||^2. Two more terms stand in their loss.py, off here
as there: HardDarkRank (DarkRank, Chen et al., arXiv:1707.01220), the likelihood under the student of the order of the
teacher's nearest neighbours, and attention transfer (Zagoruyko & Komodakis, arXiv:1612.03928) on view 1's last maps.
The papers' equation numbers for these are left out: no readable copy was at hand, the equations are the code's.
Reference code: github.com/Yuting-Gao/DisCo-pytorch @ 1d732c8 (main_moco_distill_rkd.py, loss.py). Differences from it:
  D1. Relations are those inside `--group-size` images of the global batch, not one GPU's share (8 x 32 there).
  D2. The consistency is a mean with a weight of 32. There it is a sum over one GPU's 32 images whose gradient is then
      averaged over 8 GPUs: the same, as long as a GPU has 32 images.
  D3. BatchNorm groups of student, key encoder and teacher are `--bn-group-size` images of the global batch, not a GPU's
      share; the keys' are shuffled first, in an order that comes from (seed, step).
  D4. `--teacher-bn batch`: there the teacher stays in train mode, so its BatchNorm normalises with the batch's own
      statistics and its running ones drift; nothing reads those. The kNN report is about the teacher as it was loaded.
  D5. The queue starts with random unit vectors; there with the queue in the teacher's MoCo file, on every resume again.
  D6. A teacher without a projection head gives its pooled features, l2-normalised; the student's head and the queue
      then have their width. There every teacher has a head, and the student's ends in 128 after a hidden layer of 2048.
  D7. The learning rate is `--base-lr` x batch / 256; there it is `--lr`, whatever the batch. Equal in the paper's runs.
  D8. timm's ResNets start with the last BatchNorm scale of every block at zero, the authors' at one.
  D9. Two embeddings closer than 1e-6 make no angle and get no gradient from it; there it is divided by 1e-12.

Run:  accelerate launch trainers/rkd.py --data IMAGENET_FOLDER --config configs/rkd/efficientnet_b0_moco-v2-r50_in1k.toml
Results: configs/rkd/*.toml record command, hardware, time and accuracy of each run.
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
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/rkd")
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
    """recipe of the random views [..._rkd.py --aug-plus: MoCo-v2's]"""

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
    """student's head: mlp has one hidden layer [..._rkd.py --mlp]"""
    hidden_dim: int = 2048
    """width of the head's hidden layer; 0: the backbone's [builder_kq_mse_largeembedding_2048.py]"""
    temperature: float = 0.2
    """T of Eq. 1 [their commands' --moco-t]"""
    queue_length: int = 65536
    """K, embeddings in the queue; a multiple of --batch-size and no longer than the data [..._rkd.py --moco-k]"""
    encoder_momentum: float = 0.999
    """m of Eq. 2 [..._rkd.py --moco-m]"""
    group_size: int = 32
    """images whose relations are compared, D1; 0: the whole batch [256 on 8 GPUs]"""
    distance_weight: float = 1.0
    """weight of L_D [..._rkd.py]"""
    angle_weight: float = 1.0
    """weight of L_A [..._rkd.py]"""
    rank_weight: float = 0.0
    """weight of HardDarkRank with alpha 3, beta 3 and 4 neighbours [loss.py, not used there]"""
    attention_weight: float = 0.0
    """weight of attention transfer; the last maps of student and teacher must have one size [loss.py, not used there]"""
    consistency: bool = False
    """add DisCo's terms; without it they are computed and logged all the same [..._rkd.py --use-mse]"""
    consistency_weight: float = 32.0
    """weight of each view's mean squared distance to the teacher [..._rkd.py: a sum over a GPU's 32]"""
    teacher_bn: Literal["batch", "running"] = "batch"
    """statistics that the teacher's BatchNorm normalises with: its own groups' or those of its training [..._rkd.py]"""
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


class Encoder(nn.Module):
    """Backbone, head, l2 norm, for all views at once: [(B, 3, S, S)] -> [(B, D)], with `keep_map` view 1's map last."""

    def __init__(self, backbone: nn.Module, head: nn.Module, keep_map: bool):
        super().__init__()
        self.backbone, self.head, self.keep_map = backbone, head, keep_map

    def forward(self, views: list[Tensor]) -> list[Tensor]:
        # one pass a view: BatchNorm statistics are per view
        features, maps = zip(*(features_and_map(self.backbone, x, self.keep_map) for x in views), strict=True)
        return [F.normalize(self.head(f), dim=1) for f in features] + ([maps[0]] if self.keep_map else [])


def features_and_map(backbone: nn.Module, x: Tensor, keep_map: bool) -> tuple[Tensor, Tensor | None]:
    """Pooled features (B, D) and, if it is wanted, the last feature map (B, C, H, W) from one pass."""
    if not keep_map:
        return backbone(x), None
    last = backbone.forward_features((x - backbone.input_mean) / backbone.input_std)
    return backbone.forward_head(last), last


def create_head(kind: str, width: int, hidden_dim: int, embedding_dim: int) -> nn.Module:
    """The projection from `width` features to `embedding_dim`."""
    hidden = hidden_dim or width
    if kind == "linear":
        return nn.Linear(width, embedding_dim)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, embedding_dim))


def initial_queue(length: int, dim: int) -> Tensor:
    """Random unit vectors, (K, D)."""
    return F.normalize(torch.randn(length, dim), dim=1)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """L_q, Eq. 1. query, key: (B, D) and queue: (K, D), unit length -> scalar >= 0; only the query gets a gradient."""
    key, queue = key.detach(), queue.detach()
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def consistency_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_c of one view, a mean over images, teacher detached. student, teacher: (B, D), unit length -> scalar in [0, 4]."""
    return (student - teacher.detach()).square().sum(1).mean()


def in_groups(student: Tensor, teacher: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """(B, D) and (B, E) as (G, N, D) and (G, N, E), N = `group_size` (None or 0: B); the teacher detached, same dtype.

    Raises ValueError if B is no multiple of `group_size`.
    """
    group_size = group_size or len(student)
    if len(student) % group_size:
        raise ValueError(f"{len(student)} images are not a multiple of group_size {group_size}")
    teacher = teacher.detach().to(student.dtype)
    return student.unflatten(0, (-1, group_size)), teacher.unflatten(0, (-1, group_size))


def pairwise_distance(x: Tensor) -> Tensor:
    """Euclidean distances, (G, N, D) -> (G, N, N); the square is kept above 1e-12, the diagonal is 0."""
    squares = x.square().sum(2)
    squared = squares.unsqueeze(2) + squares.unsqueeze(1) - 2 * x @ x.transpose(1, 2)
    diagonal = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return squared.clamp(min=1e-12).sqrt().masked_fill(diagonal, 0)


def rkd_distance(student: Tensor, teacher: Tensor, group_size: int | None = None) -> Tensor:
    """L_D inside groups of `group_size` rows (None or 0: all), teacher detached. (B, D), (B, E) -> scalar >= 0.

    The student's mean distance is differentiated too. Raises ValueError if B is no multiple of `group_size`.
    """
    s, t = (pairwise_distance(x) for x in in_groups(student, teacher, group_size))
    pairs = s.shape[1] * (s.shape[1] - 1)
    s, t = (d / (d.sum((1, 2), keepdim=True) / pairs) for d in (s, t))
    return F.smooth_l1_loss(s, t)


def rkd_angle(student: Tensor, teacher: Tensor, group_size: int | None = None, piece: int = 2**22) -> Tensor:
    """L_A inside groups of `group_size` rows (None or 0: all), teacher detached. (B, D), (B, E) -> scalar >= 0.

    At most about `piece` numbers are held at a time: the backward pass computes its angles again, vertex by vertex.
    Raises ValueError if B is no multiple of `group_size`.
    """
    s, t = in_groups(student, teacher, group_size)
    groups, n, dim = s.shape
    vertices = max(1, piece // (groups * n * max(n, dim, t.shape[2])))

    def part(s: Tensor, t: Tensor, start: int) -> Tensor:
        cosines = []
        for x in (s, t):
            to = x.unsqueeze(1) - x[:, start : start + vertices].unsqueeze(2)  # (G, V, N, D)
            length = to.norm(dim=3, keepdim=True)
            to = to * (length > 1e-6) / length.clamp(min=1e-6)  # D9
            cosines.append(to @ to.transpose(2, 3))  # (G, V, N, N)
        return F.smooth_l1_loss(*cosines, reduction="sum")

    keep_no_rng = {"use_reentrant": False, "preserve_rng_state": False}
    return sum(checkpoint(part, s, t, start, **keep_no_rng) for start in range(0, n, vertices)) / (groups * n**3)


def hard_dark_rank(
    student: Tensor, teacher: Tensor, alpha=3.0, beta=3.0, permutation_length=4, group_size: int | None = None
) -> Tensor:
    """HardDarkRank inside groups of `group_size` rows (None or 0: all), teacher detached. (B, D), (B, E) -> scalar >= 0.

    Minus the log-likelihood of the order of the teacher's `permutation_length` nearest neighbours, where each in turn
    is drawn by the softmax of the scores - alpha distance^beta among it and those after it. Raises ValueError if B is
    no multiple of `group_size` or a group has not that many neighbours.
    """
    s, t = (pairwise_distance(x) for x in in_groups(student, teacher, group_size))
    if not 0 < permutation_length < s.shape[1]:
        raise ValueError(f"permutation_length {permutation_length}: an image has {s.shape[1] - 1} neighbours")
    itself = torch.eye(s.shape[1], dtype=torch.bool, device=s.device)
    nearest = t.masked_fill(itself, torch.inf).topk(permutation_length, dim=2, largest=False).indices  # nearest first
    score = -alpha * s.gather(2, nearest).pow(beta)
    rest = score.flip(2).logcumsumexp(2).flip(2)  # over it and those after it
    return (rest - score).sum(2).mean()


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of unit attention maps, teacher detached. (B, C, H, W) and (B, E, H, W) -> scalar >= 0."""
    s, t = (F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher.detach().to(student.dtype)))
    return (s - t).square().mean()


@torch.no_grad()
def momentum_update(encoder_k: nn.Module, encoder_q: nn.Module, m: float) -> None:
    """Eq. 2, for parameters; the key encoder's BatchNorm keeps statistics of its own."""
    torch._foreach_lerp_(list(encoder_k.parameters()), list(encoder_q.parameters()), 1 - m)


@torch.no_grad()
def encode_keys(encoder_k: nn.Module, x: Tensor, order: Tensor | None, rank: int) -> Tensor:
    """Keys of the global batch, (batch, D), from this process's (B, 3, S, S); `order` shuffles the global batch."""
    if order is None:
        return common.gather(encoder_k([x])[0])
    share = common.send(order[rank * len(x) : (rank + 1) * len(x)], x.device)
    return common.gather(encoder_k([common.gather(x)[share]])[0])[common.send(order.argsort(), x.device)]


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    common.check_above_zero(args, "temperature", "consistency_weight")
    weights = ("distance_weight", "angle_weight", "rank_weight", "attention_weight")
    common.check_positive(args, "hidden_dim", "group_size", *weights, least=0)
    share, group_size = args.batch_size // world, args.group_size or args.batch_size
    least = 5 if args.rank_weight else 2
    if group_size < least or args.batch_size % group_size or (share % group_size and group_size % share):
        raise SystemExit(
            f"--group-size {group_size}: must be at least {least}, divide --batch-size {args.batch_size} and fit a "
            f"process's {share}"
        )
    views = [(common.RECIPES[args.augmentation], args.image_size)] * 2
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)
    if not 0 < args.queue_length <= len(source) or args.queue_length % args.batch_size:
        raise SystemExit(
            f"--queue-length {args.queue_length}: must be a multiple of --batch-size {args.batch_size} and at most the "
            f"{len(source)} images of {args.data}"
        )

    if args.teacher is None and args.data != "digits":
        raise SystemExit(f"--teacher is missing: {hub.HOW_TO_GET_A_TEACHER}; or train one with trainers/moco.py")
    teacher = hub.load_teacher(args.teacher or hub.digits_teacher(run), image_size=args.image_size)
    run.record_teacher(teacher)
    common.to_device(teacher, device)
    common.prepare_frozen(teacher.backbone, accelerator, args.image_size, fold=args.teacher_bn == "running")
    backbone = common.create_backbone(args.student, image_size=args.image_size, small_images=args.small_images)
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    untrained = copy.deepcopy(backbone)  # on the CPU until it is reported
    dim = teacher.num_features
    if teacher.head is None:
        run.say(f"the teacher has no projection head: its {dim}-d features, l2-normalised, are what is distilled (D6)")
    else:
        with torch.no_grad():
            dim = teacher.head(torch.zeros(1, dim, device=device)).shape[1]
    keep_map = args.attention_weight > 0
    if keep_map:
        x = torch.zeros(1, 3, args.image_size, args.image_size)
        with torch.no_grad(), accelerator.autocast():
            maps = [
                features_and_map(n, x.to(n.input_mean), True)[1].shape for n in (backbone.eval(), teacher.backbone)
            ]
        backbone.train()
        if not all(len(m) == 4 and m[2] == m[3] == maps[0][2] for m in maps):
            raise SystemExit(
                f"--attention-weight: student and teacher must end in (B, C, H, W) maps of one size, these in "
                f"{tuple(maps[0])} and {tuple(maps[1])}; leave it at 0"
            )
    head = create_head(args.head, backbone.num_features, args.hidden_dim, dim)
    encoder_q = Encoder(backbone, head, keep_map)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    encoder_q, encoder_k, teacher = (
        common.set_batch_norm_groups(network, args.bn_group_size, args.batch_size)
        for network in (encoder_q, encoder_k, teacher)
    )
    statistics = nn.ModuleList(m for m in teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    as_loaded = copy.deepcopy(statistics.state_dict())
    statistics.train(args.teacher_bn == "batch")
    if args.compile:
        backbone.compile()
        encoder_k.backbone.compile()
        teacher.compile()

    peak_lr = args.base_lr * args.batch_size / 256  # linear scaling rule
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, encoder_q.parameters(), peak_lr, **hyper)
    encoder_q, optimizer = accelerator.prepare(common.to_device(encoder_q, device), optimizer)
    common.to_device(encoder_k, device).load_state_dict(accelerator.unwrap_model(encoder_q).state_dict())
    queue = initial_queue(args.queue_length, dim).to(device)

    def embed(x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The teacher's unit embedding, (B, D), and its last feature map if that is wanted."""
        features, last = features_and_map(teacher.backbone if keep_map else teacher, x, keep_map)
        z = features if teacher.head is None else teacher.head(features)
        return F.normalize(z.to(queue.dtype), dim=1), last

    state = {"encoder_q": encoder_q, "encoder_k": encoder_k, "optimizer": optimizer, "queue": queue}
    state["teacher_bn"] = statistics  # they drift, D4
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---

    grouped = 0 < args.bn_group_size < args.batch_size
    collapsed = 0
    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        x1, x2 = batch.views

        at, unit = (data.epoch(step), 1) if args.lr_per_epoch else (data.progress(step), 1 / data.steps_per_epoch)
        common.set_lr(optimizer, common.cosine_schedule(at, epochs, peak_lr, warmup=args.warmup_epochs, unit=unit))

        s1, s2, *s_map = encoder_q(batch.views)
        # before this step's SGD: the keys come from the query encoder as it was
        momentum_update(encoder_k, accelerator.unwrap_model(encoder_q), args.encoder_momentum)
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        order = torch.randperm(args.batch_size, generator=g) if grouped else None
        with torch.no_grad(), accelerator.autocast():
            (t2, _), (t1, t_map) = embed(x2), embed(x1)  # in this order: the running statistics follow it
            keys = encode_keys(encoder_k, x2, order, rank).to(queue.dtype)  # (batch, D)
        k = keys[rank * share : (rank + 1) * share]

        # a group that spans processes: everyone computes the whole loss
        s, t = (common.gather(x) for x in (s1, t1)) if group_size > share else (s1, t1)
        parts = {
            "info_nce": info_nce(s1, k, queue, args.temperature),
            "rkd_distance": rkd_distance(s, t, group_size),
            "rkd_angle": rkd_angle(s, t, group_size),
            "consistency_1": consistency_loss(s1, t1),
            "consistency_2": consistency_loss(s2, t2),
        }
        loss = (
            parts["info_nce"] + args.distance_weight * parts["rkd_distance"] + args.angle_weight * parts["rkd_angle"]
        )
        if args.consistency:
            loss = loss + args.consistency_weight * (parts["consistency_1"] + parts["consistency_2"])
        if args.rank_weight:
            parts["hard_dark_rank"] = hard_dark_rank(s, t, group_size=group_size)
            loss = loss + args.rank_weight * parts["hard_dark_rank"]
        if keep_map:
            parts["attention"] = attention_transfer(s_map[0], t_map)
            loss = loss + args.attention_weight * parts["attention"]

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        start = step * args.batch_size % args.queue_length
        queue[start : start + args.batch_size] = keys  # the oldest go; the backward pass needed them
        run.watch(step, loss)

        if run.log_due(step):
            # z_std: 1 = spread over the sphere, 0 = all embeddings equal; the teacher's own is the goal
            health = {**common.health(s1), "teacher_z_std": common.z_std(common.gather(t1)).item()}
            seen = run.log(step, loss=loss, **parts, **health, lr=optimizer.param_groups[0]["lr"])
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

    statistics.load_state_dict(as_loaded)
    teacher.eval()
    networks = {"untrained student": untrained, "teacher": teacher, "distilled student": backbone}
    results = hub.knn(run, networks, source, queries)
    hub.finish(run, source, results)
    return results


if __name__ == "__main__":
    main(common.parse_args(Args))
