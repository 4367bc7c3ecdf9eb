"""SimSiam: Exploring Simple Siamese Representation Learning (Chen & He, CVPR 2021, arXiv:2011.10566v1).

    D(p, z) = - p/||p||_2 . z/||z||_2                                            (1)
    L = 1/2 D(p1, stopgrad(z2)) + 1/2 D(p2, stopgrad(z1))                         (4)

Encoder f: backbone and a 3-layer projector whose hidden width is the backbone's; predictor h: a 2-layer bottleneck.
Reference code: github.com/facebookresearch/simsiam @ a7bc177. Differences from it:
  D1. `--fix-pred-lr` is on by default: the paper's headline run has it, the code's default has not.
  D2. No never-trained bias in the projector's last Linear (the code keeps one from the layer that it replaces).

Run:  accelerate launch trainers/simsiam.py --data IMAGENET_FOLDER --config configs/simsiam/resnet50_in1k.toml
Results: configs/simsiam/*.toml record command, hardware, time and accuracy of each run.
"""

import copy
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    run_dir: Path = Path("runs/simsiam")
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
    """recipe of the random views [Sec. 3: MoCo-v2's]"""

    # --- models ---
    backbone: str = "resnet50"
    """timm name of the network to train"""
    small_images: bool = False
    """3x3 stride-1 stem and no max-pool, ResNets only; for images of 64 px and below"""
    init_from: str | None = None
    """start from this checkpoint instead of random weights: the same forms as --teacher"""

    # --- method ---
    proj_dim: int = 2048
    """d, width of the projection z and the prediction p [Sec. 3, "Baseline settings"]"""
    pred_hidden_dim: int = 512
    """bottleneck of the predictor h, a quarter of d [Sec. 3]"""
    fix_pred_lr: bool = True
    """keep the predictor's learning rate constant, D1 [Sec. 4.2, Table 1(c)]"""
    bn_group_size: int = 0
    """images per BatchNorm group; 0: the whole batch (SyncBN) [Sec. 3]"""

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


class SimSiam(nn.Module):
    """Encoder f = projector(backbone) and predictor h of Fig. 1: two views (B, 3, S, S) -> p1, p2, z1, z2, (B, d) each."""

    def __init__(self, backbone: nn.Module, proj_dim: int, pred_hidden_dim: int):
        super().__init__()
        width = backbone.num_features
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True),
            nn.Linear(width, proj_dim, bias=False), nn.BatchNorm1d(proj_dim, affine=False),
        )  # fmt: skip
        self.predictor = nn.Sequential(
            nn.Linear(proj_dim, pred_hidden_dim, bias=False), nn.BatchNorm1d(pred_hidden_dim), nn.ReLU(inplace=True),
            nn.Linear(pred_hidden_dim, proj_dim),
        )  # fmt: skip

    def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z1, z2 = self.projector(self.backbone(x1)), self.projector(self.backbone(x2))
        return self.predictor(z1), self.predictor(z2), z1, z2


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D(p, stopgrad(z)), Eq. 1 with the stop-gradient of Eq. 3. p, z: (B, d) -> scalar in [-1, 1]."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def main(args: Args) -> dict[str, float]:
    # --- shared block: setup ---
    accelerator = hub.create_accelerator(args)
    run = hub.Run(args, __file__, accelerator)
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    # --- end shared block ---

    # --- shared block: data ---
    args, source, queries = common.open_data(args, run)
    # --- end shared block ---
    views = [(common.RECIPES[args.augmentation], args.image_size)] * 2
    place = {"device": device, "rank": rank, "world": world}
    data = common.Batches(source, views, args.batch_size, seed=args.seed, num_workers=args.num_workers, **place)

    backbone = common.create_backbone(args.backbone, image_size=args.image_size, small_images=args.small_images)
    if args.init_from:
        hub.load_weights(backbone, args.init_from)
    untrained = copy.deepcopy(backbone)  # on the CPU until it is reported
    model = SimSiam(backbone, args.proj_dim, args.pred_hidden_dim)
    model = common.set_batch_norm_groups(model, args.bn_group_size, args.batch_size)
    if args.compile:
        backbone.compile()

    peak_lr = args.base_lr * args.batch_size / 256  # linear scaling rule [Sec. 3]
    encoder = {"params": [*model.backbone.parameters(), *model.projector.parameters()]}
    predictor = {"params": list(model.predictor.parameters()), **({"fixed_lr": peak_lr} if args.fix_pred_lr else {})}
    hyper = {"momentum": args.momentum, "weight_decay": args.weight_decay, "device": device}
    optimizer = common.create_optimizer(args.optimizer, [encoder, predictor], peak_lr, **hyper)
    model, optimizer = accelerator.prepare(common.to_device(model, device), optimizer)

    state = {"model": model, "optimizer": optimizer}
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

        p1, p2, z1, z2 = model(*batch.views)
        loss = 0.5 * negative_cosine(p1, z2) + 0.5 * negative_cosine(p2, z1)  # Eq. 4

        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        run.watch(step, loss)

        if run.log_due(step):
            # z_std: 1 = healthy, 0 = collapsed, the paper's std of z/||z|| times sqrt(d) [Sec. 4.1, Fig. 2 middle]
            seen = run.log(step, loss=loss, **common.health(z1), lr=optimizer.param_groups[0]["lr"])
            # BatchNorm props up a few outliers in a collapsed batch of B: measured, z_std then stays near 2 / sqrt(B)
            floor = max(0.2, 3 / args.batch_size**0.5)
            collapsed = collapsed + 1 if seen["loss"] < -0.85 and seen["z_std"] < floor else 0
            if collapsed == 3:
                raise SystemExit(
                    f"step {step}: SimSiam has collapsed to one output for all images (loss {seen['loss']:.3f}, z_std "
                    f"{seen['z_std']:.3f}): lower --base-lr, raise --batch-size, or use stronger views (--augmentation)"
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
