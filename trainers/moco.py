"""MoCo: Momentum Contrast (He et al., CVPR 2020, arXiv:1911.05722; v2: Chen et al. 2020, arXiv:2003.04297).

    L_q = - log exp(q.k+ / T) / sum_{i=0..K} exp(q.k_i / T)                       (1)
    theta_k <- m theta_k + (1 - m) theta_q                                        (2)

q = f_q(view 1), k+ = f_k(view 2), both l2-normalised; k_1 .. k_K is the queue, the keys of the batches before this one.
f is a backbone and a head. v1 is `--head linear --temperature 0.07 --augmentation moco_v1 --schedule step`; the defaults
are v2. "Efficacy of small SSL" (Shi et al., WACV 2022, arXiv:2107.14762) is `--head wide --temperature 0.1 --augmentation
ssl_small --batch-size 512 --epochs 800`, from a briefly trained student; DisCo's baselines set `--hidden-dim`.
Reference code: github.com/facebookresearch/moco @ 64444f4; github.com/WOWNICE/ssl-small @ 815aea9. Differences from it:
  D1. BatchNorm groups are `--bn-group-size` images of the global batch, not a GPU's share (32 of 256 there); keys are
      shuffled over the whole batch before they are grouped. One group needs no shuffle: its statistics are the same.
  D2. The order of the shuffle comes from (seed, step), so that a resumed run repeats it.
  D3. `--init-from` (ssl-small's --restart) takes the backbone, and the head where the file's has the same shapes; the
      queue starts fresh, there it keeps the teacher's embeddings.
  D4. Hide-and-seek draws per view 0, 4, 8 or 16 cells a side: its 0, 56, 28 and 14 px at 224 px, at any image size.
  D5. The learning rate is `--base-lr` x batch / 256; there it is `--lr`, whatever the batch. Equal in both papers' runs.
  D6. timm's ResNets start with the last BatchNorm scale of every block at zero, the authors' at one.

Run:  accelerate launch trainers/moco.py --data IMAGENET_FOLDER --config configs/moco/resnet50_in1k.toml
Results: configs/moco/*.toml record command, hardware, time and accuracy of each run.
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
    run_dir: Path = Path("runs/moco")
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
    augmentation: Literal["moco_v2", "moco_v1", "ssl_small", "digits"] = "moco_v2"
    """recipe of the random views; ssl_small is moco_v2 with the three flags below [MoCo main_moco.py --aug-plus]"""
    jitter_scale: float = 1.0
    """cj: jitter of 0.8, 0.8, 0.8, 0.4 times it, ssl_small only [ssl-small README; its code's default is 1.5]"""
    grey_prob: float = 0.5
    """probability of a grey view, ssl_small only [ssl-small README]"""
    blur_prob: float = 0.5
    """probability of a blurred view, ssl_small only [ssl-small README]"""
    hide_and_seek: bool = False
    """hide half of the cells of a random grid in each view, D4 [ssl-small]"""

    # --- models ---
    backbone: str = "resnet50"
    """timm name of the network to train"""
    small_images: bool = False
    """3x3 stride-1 stem and no max-pool, ResNets only; for images of 64 px and below"""
    init_from: str | None = None
    """start from this checkpoint instead of random weights: the same forms as --teacher"""

    # --- method ---
    head: Literal["none", "linear", "mlp", "wide", "deep", "dropout"] = "mlp"
    """linear is v1's, mlp v2's, wide, deep and dropout ssl-small's; none contrasts the backbone's features"""
    hidden_dim: int = 0
    """width of the head's hidden layer; 0: the backbone's [MoCo v2; twice that for wide; DisCo: 512 to 2048]"""
    embedding_dim: int = 128
    """D, width of q, k and the queue [Sec. 3.3]"""
    temperature: float = 0.2
    """T of Eq. 1 [MoCo v2 Sec. 3; v1 0.07, ssl-small 0.1]"""
    queue_length: int = 65536
    """K, embeddings in the queue; a multiple of --batch-size and no longer than the data [Sec. 4]"""
    encoder_momentum: float = 0.999
    """m of Eq. 2 [Sec. 3.2]"""
    bn_group_size: int = 32
    """images per BatchNorm group; 0: the whole batch (SyncBN) [Sec. 4: 256 on 8 GPUs]"""

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
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine to zero, or x --lr-decay at every milestone"""
    milestones: tuple[int, ...] = (120, 160)
    """epochs at which the step schedule decays [MoCo main_moco.py]"""
    lr_decay: float = 0.1
    """factor of the step schedule [MoCo main_moco.py]"""
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
    """f of Fig. 2: backbone, head, l2 norm; (B, 3, S, S) -> (B, D)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.backbone(x)), dim=1)


def create_head(kind: str, width: int, hidden_dim: int, embedding_dim: int) -> nn.Module:
    """The projection from `width` features to `embedding_dim`."""
    hidden = hidden_dim or (2 * width if kind == "wide" else width)
    last = nn.Linear(width if kind == "linear" else hidden, embedding_dim)
    first = [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
    return {
        "none": lambda: nn.Identity(),
        "linear": lambda: last,
        "mlp": lambda: nn.Sequential(*first, last),
        "wide": lambda: nn.Sequential(*first, last),
        "deep": lambda: nn.Sequential(*first, nn.Linear(hidden, hidden), nn.ReLU(inplace=True), last),
        "dropout": lambda: nn.Sequential(*first, nn.Dropout(0.5), last),
    }[kind]()


def initial_queue(length: int, dim: int) -> Tensor:
    """Random unit vectors, (K, D)."""
    return F.normalize(torch.randn(length, dim), dim=1)


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """L_q, Eq. 1. query, key: (B, D) and queue: (K, D), unit length -> scalar >= 0; only the query gets a gradient."""
    key, queue = key.detach(), queue.detach()
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], dim=1) / temperature  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


@torch.no_grad()
def momentum_update(encoder_k: nn.Module, encoder_q: nn.Module, m: float) -> None:
    """Eq. 2, for parameters; the key encoder's BatchNorm keeps statistics of its own."""
    torch._foreach_lerp_(list(encoder_k.parameters()), list(encoder_q.parameters()), 1 - m)


@torch.no_grad()
def encode_keys(encoder_k: nn.Module, x: Tensor, order: Tensor | None, rank: int) -> Tensor:
    """Keys of the global batch, (batch, D), from this process's (B, 3, S, S); `order` shuffles the global batch."""
    if order is None:
        return common.gather(encoder_k(x))
    share = common.send(order[rank * len(x) : (rank + 1) * len(x)], x.device)
    return common.gather(encoder_k(common.gather(x)[share]))[common.send(order.argsort(), x.device)]


def hide_and_seek(x: Tensor, u: Tensor, fill: Tensor) -> Tensor:
    """Half of the cells of a grid replaced by `fill` (3, 1, 1), what normalises to zero. x: (B, 3, S, S), u: (B, 257) in [0, 1).

    The first column of u chooses a grid of 0, 16, 8 or 4 cells a side, the others hide their cell where below 0.5.
    """
    choice, hidden = (u[:, 0] * 4).long().view(-1, 1, 1), torch.zeros(len(u), 16, 16, dtype=torch.bool)
    for number, cells in enumerate((16, 8, 4), start=1):
        grid = (u[:, 1 : 1 + cells**2] < 0.5).view(-1, cells, cells)
        hidden |= grid.repeat_interleave(16 // cells, 1).repeat_interleave(16 // cells, 2) & (choice == number)
    hidden = common.send(hidden.unsqueeze(1).to(x.dtype), x.device)
    return torch.where(F.interpolate(hidden, x.shape[2:], mode="nearest").bool(), fill.to(x), x)


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    recipe = common.RECIPES.get(args.augmentation) or common.ssl_small(
        args.jitter_scale, args.grey_prob, args.blur_prob
    )
    views = [(recipe, args.image_size)] * 2
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)
    common.check_positive(args, "embedding_dim")
    common.check_above_zero(args, "temperature")
    if not 0 < args.queue_length <= len(source) or args.queue_length % args.batch_size:
        raise SystemExit(
            f"--queue-length {args.queue_length}: must be a multiple of --batch-size {args.batch_size} and at most the "
            f"{len(source)} images of {args.data}"
        )

    backbone = common.create_backbone(args.backbone, image_size=args.image_size, small_images=args.small_images)
    head = create_head(args.head, backbone.num_features, args.hidden_dim, args.embedding_dim)
    if args.init_from and not hub.load_weights(backbone, args.init_from, head):
        run.say(f"--init-from {args.init_from}: no head of these shapes in it; the head starts fresh")
    untrained = copy.deepcopy(backbone)  # on the CPU until it is reported
    encoder_q = Encoder(backbone, head)
    encoder_k = copy.deepcopy(encoder_q).requires_grad_(False)
    encoder_q, encoder_k = (
        common.set_batch_norm_groups(encoder, args.bn_group_size, args.batch_size)
        for encoder in (encoder_q, encoder_k)
    )
    if args.compile:
        backbone.compile()
        encoder_k.backbone.compile()

    peak_lr = args.base_lr * args.batch_size / 256  # linear scaling rule
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, encoder_q.parameters(), peak_lr, **hyper)
    encoder_q, optimizer = accelerator.prepare(common.to_device(encoder_q, device), optimizer)
    common.to_device(encoder_k, device).load_state_dict(accelerator.unwrap_model(encoder_q).state_dict())
    dim = args.embedding_dim if args.head != "none" else backbone.num_features
    queue = initial_queue(args.queue_length, dim).to(device)

    state = {"encoder_q": encoder_q, "encoder_k": encoder_k, "optimizer": optimizer, "queue": queue}
    # --- shared block: resume ---
    total_steps = args.total_steps or round(args.epochs * data.steps_per_epoch)
    epochs = total_steps / data.steps_per_epoch  # the length of every schedule, in passes over the data
    first_step = run.resume(state) if args.resume else 0
    # --- end shared block ---

    share, grouped = args.batch_size // world, 0 < args.bn_group_size < args.batch_size
    collapsed = 0
    for step in run.start(first_step, total_steps, data, state, backbone):
        batch = data.batch(step)
        x_q, x_k = batch.views
        if args.hide_and_seek:
            x_q, x_k = (
                hide_and_seek(
                    x, common.uniforms(args.seed, data.epoch(step), batch.indices, 2 + v, 257), backbone.input_mean
                )
                for v, x in enumerate(batch.views)
            )

        at, unit = (data.epoch(step), 1) if args.lr_per_epoch else (data.progress(step), 1 / data.steps_per_epoch)
        if args.schedule == "cosine":
            lr = common.cosine_schedule(at, epochs, peak_lr, warmup=args.warmup_epochs, unit=unit)
        else:
            lr = common.step_schedule(at, peak_lr, args.milestones, args.lr_decay)
        common.set_lr(optimizer, lr)

        q = encoder_q(x_q)
        # before this step's SGD: the keys come from the query encoder as it was
        momentum_update(encoder_k, accelerator.unwrap_model(encoder_q), args.encoder_momentum)
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        order = torch.randperm(args.batch_size, generator=g) if grouped else None
        with torch.no_grad(), accelerator.autocast():
            keys = encode_keys(encoder_k, x_k, order, rank).to(queue.dtype)  # (batch, D)
        k = keys[rank * share : (rank + 1) * share]
        loss = info_nce(q, k, queue, args.temperature)

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        start = step * args.batch_size % args.queue_length
        queue[start : start + args.batch_size] = keys  # the oldest go; the backward pass needed them
        run.watch(step, loss)

        if run.log_due(step):
            # z_std: 1 = spread over the sphere, 0 = all embeddings equal
            seen = run.log(step, loss=loss, positive_cosine=(q * k).sum(1), **common.health(q), lr=lr)
            collapsed = collapsed + 1 if seen["z_std"] < 0.02 else 0
            if collapsed == 5:
                raise SystemExit(
                    f"step {step}: MoCo gives every image the same embedding (z_std {seen['z_std']:.4f}): lower --base-lr, or "
                    "check that --queue-length is many times --batch-size"
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
    networks = {"untrained": untrained, "trained": backbone}
    results = hub.knn(run, networks, source, queries)
    hub.finish(run, source, results)
    return results


if __name__ == "__main__":
    main(common.parse_args(Args))
