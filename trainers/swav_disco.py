"""DisCo on SwAV (Gao et al., ECCV 2022, arXiv:2104.09124, the SwAV testbed): SwAV's loss, and a teacher's embeddings.

    L = L_swav + mse_weight mean (z - t)^2, over images, all V crops and D dimensions
    l(z_v, q_a) = - sum_k q_a^k log p_v^k,   p_v = softmax_k(z_v . c_k / temperature)              (swapped prediction)
    L_swav = 1/2 sum_{a in 1, 2} 1/(V-1) sum_{v != a} l(z_v, q_a), a mean over the batch           (multi-crop)
    Q = B diag(u) exp(C Z_a / epsilon) diag(r), columns of sum 1, rows all but of equal sum        (Sinkhorn-Knopp)

z are the student's unit vectors, t the output of the frozen teacher's projection head for the same crop, as it is: not
normalised. L_swav is swav.py's to the letter, which explains it; the teacher has no part in the codes.
The papers' equation numbers are left out: no readable copy of them was at hand.
Reference code: github.com/Yuting-Gao/DisCo-pytorch @ 1d732c8, swav-master/main_swav_distill.py. Differences from it:
  D1. BatchNorm statistics span `--bn-group-size` images of the global batch with all their crops of one size (the head's:
      of all sizes). The default is the whole batch, as there.
  D2. There is one queue, a GPU's part of it there: the newest embeddings of the global batch in front. Its length must be
      a multiple of the batch; there 3840 is rounded down to 3584, the default.
  D3. The three learning rates are per 256 images: `--base-lr 0.3` is their 0.6 at a batch of 512.
  D4. Embeddings are normalised and scored in float32, codes and loss computed from that; there products are fp16.
  D5. timm's ResNets start with the last BatchNorm scale of every block at zero, the authors' at one.
  D6. `--mse-weight` is 1/2: their code adds the mean squared error to the sum over the two crops a, then halves it all.
  D7. A teacher without a projection head gives its pooled features, not normalised either; the student's head then ends in
      their width. There the teacher is a SwAV ResNet-50 with its head.
  D8. A teacher file that is missing or does not fit stops the run; there it silently means a random teacher.

Run:  accelerate launch trainers/swav_disco.py --data IMAGENET_FOLDER --config configs/swav_disco/efficientnet_b0_swav-r50_in1k.toml
Results: configs/swav_disco/*.toml record command, hardware, time and accuracy of each run.
"""

import copy
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # before PyPI's common and hub
import common
import hub

STD = (0.228, 0.224, 0.225)  # of SwAV's pixels and, in a release, of the network's input


@dataclass(frozen=True)
class Args:
    # --- run ---
    config: Path | None = None
    """TOML file of flags, one of configs/; the command line overrides it"""
    run_dir: Path = Path("runs/swav_disco")
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
    augmentation: Literal["multi_crop", "moco_v2", "digits"] = "multi_crop"
    """recipe of the random views; multi_crop is SwAV's, with jitter twice as strong as MoCo v2's [src/multicropdataset.py]"""
    crop_scale: tuple[float, float] | None = None
    """share of the image's area in a view; unset: the recipe's [--min_scale_crops, --max_scale_crops: 0.14 1]"""
    large_crops: int = 2
    """views of --image-size of each image; the first two give the codes [--nmb_crops, --crops_for_assign 0 1]"""
    small_crops: int = 6
    """further, smaller views of each image; 0: large ones only [--nmb_crops]"""
    small_crop_size: int = 96
    """side of a small crop, pixels [--size_crops]"""
    small_crop_scale: tuple[float, float] = (0.05, 0.14)
    """share of the image's area in a small crop [--min_scale_crops, --max_scale_crops]"""

    # --- models ---
    student: str = "efficientnet_b0"
    """timm name of the network to train"""
    small_images: bool = False
    """3x3 stride-1 stem and no max-pool, ResNets only; for images of 64 px and below"""
    teacher: str | None = None
    """run or release folder, official .pth.tar, timm/NAME, Hub id, or a name that `python hub.py inspect` knows"""
    init_from: str | None = None
    """start from this checkpoint instead of random weights: the same forms as --teacher"""

    # --- method ---
    hidden_dim: int = 2048
    """width of the head's hidden layer; 0: the backbone's [--hidden_mlp; 8192 with their wider networks]"""
    mse_weight: float = 0.5
    """weight of the mean squared error to the teacher's embedding, D6; tens for a teacher without a head [main_swav_distill.py]"""
    num_prototypes: int = 3000
    """K; with thousands on small data the loss stays at ln K: tens to hundreds there [--nmb_prototypes]"""
    temperature: float = 0.1
    """of the predictions p [--temperature]"""
    epsilon: float = 0.05
    """sharpness of the codes, smaller is sharper; from about 1 on they say nothing and the loss stays at ln K [--epsilon]"""
    sinkhorn_iterations: int = 3
    """rounds of scaling the codes [--sinkhorn_iterations]"""
    freeze_prototypes_steps: int = 5005
    """steps at the start without learning the prototypes [--freeze_prototypes_niters]"""
    queue_length: int = 3584
    """past embeddings per large crop that join the codes, for small batches; a multiple of --batch-size [--queue_length, D2]"""
    queue_start_epoch: int = 15
    """epoch from which the queue is filled, earlier embeddings are of no use [--epoch_queue_starts]"""
    bn_group_size: int = 0
    """images per BatchNorm group; 0: the whole batch (SyncBN) [--sync_bn, D1]"""

    # --- optimisation ---
    epochs: float = 200
    """passes over the data; the schedule's length unless --total-steps is given"""
    total_steps: int = 0
    """optimizer steps; 0: derived from --epochs, otherwise it wins"""
    batch_size: int = 512
    """images per optimizer step, over all processes"""
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    """lars is the authors' (SGD in LARC, trust 0.001, no clipping); adamw learns small data in a few passes"""
    base_lr: float = 0.3
    """learning rate per 256 images: lr = base_lr * batch_size / 256, D3 [--base_lr: 0.6 for 512]"""
    start_lr: float = 0.0
    """learning rate at the start of the warm-up, per 256 images [--start_warmup]"""
    final_lr: float = 0.0003
    """learning rate at the end of the cosine, per 256 images [--final_lr: 0.0006 for 512]"""
    warmup_epochs: float = 0
    """epochs of linear warm-up"""
    momentum: float = 0.9
    """SGD momentum"""
    weight_decay: float = 1e-6
    """L2 penalty on all parameters, biases and BatchNorm included"""
    compile: bool = False
    """torch.compile the networks; pays on GPUs for runs longer than a few minutes"""


class SwAV(nn.Module):
    """Backbone, head, prototypes: [(B, n, 3, S, S), ...], one tensor a size -> z (B, V, D) unit, scores z . c (B, V, K).

    Rows go through it image by image, so that a BatchNorm group is a group of images with all their crops.
    """

    def __init__(self, backbone: nn.Module, hidden_dim: int, projection_dim: int, num_prototypes: int):
        super().__init__()
        self.backbone, width = backbone, backbone.num_features
        hidden = hidden_dim or width
        first = [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        self.head = nn.Sequential(*first, nn.Linear(hidden, projection_dim))
        self.prototypes = nn.Linear(projection_dim, num_prototypes, bias=False)

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Tensor]:
        features = [self.backbone(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in crops]
        features = torch.cat(features, dim=1)  # (B, V, W)
        z = self.head(features.flatten(0, 1))
        with torch.autocast(z.device.type, enabled=False):  # D4
            z = F.normalize(z.to(self.prototypes.weight.dtype), dim=1).unflatten(0, features.shape[:2])
            return z, self.prototypes(z)


def all_sum(x: Tensor) -> Tensor:
    """x summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes q >= 0 of this process's rows, balanced over those of all processes. scores: (B, K) cosines -> (B, K).

    Each row sums to 1, over all rows each prototype gets about as much as any other.
    """
    q = ((scores - 1) / epsilon).exp()  # the constant cancels; without it exp(1 / epsilon) may overflow
    world = dist.get_world_size() if dist.is_initialized() else 1
    q *= len(q) * world / all_sum(q.sum())
    for _ in range(iterations):
        q /= all_sum(q.sum(dim=0))
        q /= q.sum(dim=1, keepdim=True)
    return q


def swapped_prediction_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """L. scores: (B, V, K), codes: (B, A, K) of the first A crops -> scalar >= 0; only the scores get a gradient."""
    log_p = (scores / temperature).log_softmax(dim=2)
    each = -torch.einsum("bak,bvk->av", codes.detach(), log_p) / len(scores)  # (A, V): l(z_v, q_a)
    return (each.sum() - each.diagonal().sum()) / (codes.shape[1] * (scores.shape[1] - 1))


def enqueue(queue: Tensor, embeddings: Tensor) -> None:
    """The newest in front, in place. queue: (A, L, D), embeddings of the global batch: (A, batch, D)."""
    queue.copy_(torch.cat([embeddings, queue], dim=1)[:, : queue.shape[1]])


def warmup_cosine(step: int, total: int, warmup: int, start: float, peak: float, final: float) -> float:
    """Linear from start at step 0 to peak at step warmup - 1, then half a cosine from peak towards final."""
    if step < warmup:
        return start + (peak - start) * step / max(1, warmup - 1)
    return common.cosine_schedule(step - warmup, total - warmup, peak, final)


@torch.no_grad()
def prototype_health(scores: Tensor, codes: Tensor, temperature: float) -> dict[str, Tensor]:
    """How the global batch uses the prototypes; all processes must call it. scores: (B, V, K), codes: (B, A, K).

    code_entropy, mean entropy of a code by ln K: 1 = codes tell no image from another. prototype_entropy, of the mean
    prediction: 1 = all prototypes alike, 0 = one has all. dead_prototypes: share of those below a tenth of 1/K in it.
    """
    count = scores.shape[2]
    world = dist.get_world_size() if dist.is_initialized() else 1
    used = all_sum((scores / temperature).softmax(dim=2).mean((0, 1))) / world  # (K,)
    entropy = [-(p * p.clamp_min(1e-12).log()).sum(-1).mean() / math.log(count) for p in (codes, used)]
    dead = (used < 0.1 / count).to(used.dtype).mean()
    return {"code_entropy": entropy[0], "prototype_entropy": entropy[1], "dead_prototypes": dead}


def why_stuck(figures: dict[str, float]) -> str:
    """The likely cause of a loss that stays at ln K, and the flag to turn."""
    if figures["z_std"] < 0.1:
        return f"all images get the same embedding (z_std {figures['z_std']:.3f}): lower --base-lr, or raise --freeze-prototypes-steps"
    if figures["code_entropy"] > 0.95:
        return f"the codes are all but uniform (entropy {figures['code_entropy']:.3f} of ln K): lower --epsilon"
    return "codes are sharp but not predicted: lower --num-prototypes, or raise --batch-size or --queue-length"


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
    small_recipe = dataclasses.replace(recipe, scale=args.small_crop_scale)
    recipe = dataclasses.replace(recipe, scale=args.crop_scale or recipe.scale)
    common.check_positive(args, "large_crops", "num_prototypes", least=2)
    common.check_positive(args, "sinkhorn_iterations", "small_crop_size")
    common.check_positive(args, "small_crops", "freeze_prototypes_steps", "queue_start_epoch", "mse_weight", least=0)
    common.check_above_zero(args, "temperature")
    if args.epsilon < 0.02:
        raise SystemExit(f"--epsilon {args.epsilon}: must be at least 0.02, below that codes leave float32's range")
    views = [(recipe, args.image_size)] * args.large_crops + [(small_recipe, args.small_crop_size)] * args.small_crops
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)
    if not 0 <= args.queue_length <= len(source) or args.queue_length % args.batch_size:
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
        args.student,
        image_size=[side for _, side in views],
        small_images=args.small_images,
        mean=common.IMAGENET_MEAN,
        std=STD,
    )
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    untrained = copy.deepcopy(backbone)  # on the CPU until it is reported
    dim = teacher.num_features
    if teacher.head is None:
        run.say(
            f"the teacher has no projection head: its {dim}-d features are what the student's embeddings follow (D7)"
        )
    else:
        with torch.no_grad():
            dim = teacher.head(torch.zeros(1, dim, device=device)).shape[1]
    student = SwAV(backbone, args.hidden_dim, dim, args.num_prototypes)
    student = common.set_batch_norm_groups(student, args.bn_group_size, args.batch_size)
    if args.compile:
        backbone.compile()
        teacher.compile()

    peak_lr, start_lr, final_lr = (lr * args.batch_size / 256 for lr in (args.base_lr, args.start_lr, args.final_lr))
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, student.parameters(), peak_lr, **hyper)
    student, optimizer = accelerator.prepare(common.to_device(student, device), optimizer)
    prototypes = accelerator.unwrap_model(student).prototypes.weight
    queue = torch.zeros(2, args.queue_length, dim, device=device)

    def embed(x: Tensor) -> Tensor:
        """The teacher's embedding, (N, D)."""
        features = teacher(x)
        return (features if teacher.head is None else teacher.head(features)).to(queue.dtype)

    state = {"student": student, "optimizer": optimizer, "queue": queue}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---

    warmup_steps = round(args.warmup_epochs * data.steps_per_epoch)
    queue_start = args.queue_start_epoch * data.steps_per_epoch
    part = slice(rank * args.queue_length // world, (rank + 1) * args.queue_length // world)
    chance, stuck = math.log(args.num_prototypes), 0
    patience = max(100, max(1, epochs / 50) * data.steps_per_epoch)  # steps at ln K that are no longer bad luck
    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        crops = [torch.stack(list(same), dim=1) for _, same in groupby(batch.views, key=lambda x: x.shape[-1])]

        lr = warmup_cosine(step, total_steps, warmup_steps, start_lr, peak_lr, final_lr)
        common.set_lr(optimizer, lr)

        with torch.no_grad():
            prototypes.copy_(F.normalize(prototypes, dim=1))
        z, scores = student(crops)
        with torch.no_grad(), accelerator.autocast():
            t = torch.cat([embed(x.flatten(0, 1)).unflatten(0, x.shape[:2]) for x in crops], dim=1)  # (B, V, D)
        with torch.no_grad():
            rows = list(scores[:, :2].unbind(1))
            if args.queue_length and (step - queue_start) * args.batch_size >= args.queue_length:  # it is full
                rows = [
                    torch.cat([known @ prototypes.T, own]) for known, own in zip(queue[:, part], rows, strict=True)
                ]
            codes = [sinkhorn(x, args.epsilon, args.sinkhorn_iterations)[-len(z) :] for x in rows]
            codes = torch.stack(codes, dim=1)  # (B, 2, K)
            if args.queue_length and step >= queue_start:
                enqueue(queue, common.gather(z[:, :2]).transpose(0, 1))
        swapped, mse = swapped_prediction_loss(scores, codes, args.temperature), F.mse_loss(z, t)
        loss = swapped + args.mse_weight * mse

        optimizer.zero_grad()
        accelerator.backward(loss)
        if step < args.freeze_prototypes_steps:
            prototypes.grad = None
        optimizer.step()
        run.watch(step, loss)

        if run.log_due(step):
            # z_std: 1 = spread over the sphere, 0 = all embeddings equal; the teacher's own is the goal
            health = {**common.health(z[:, 0]), **prototype_health(scores, codes, args.temperature)}
            health["teacher_z_std"] = common.z_std(common.gather(t[:, 0])).item()
            seen = run.log(step, loss=loss, swapped_term=swapped, mse_term=mse, **health, lr=lr)
            stuck = stuck + 1 if step >= args.freeze_prototypes_steps and seen["swapped_term"] > 0.995 * chance else 0
            if stuck >= max(5, patience / args.log_every):
                raise SystemExit(
                    f"step {step}: SwAV's loss has been at ln(--num-prototypes) = {chance:.3f} or above since the prototypes "
                    f"are learnt ({seen['swapped_term']:.3f}): {why_stuck(seen)}; or "
                    "lower --mse-weight"
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
