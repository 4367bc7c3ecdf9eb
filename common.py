"""What every trainer must agree on to be comparable: flags, data, views, backbones, LARS, schedules, kNN, run folder.

Nothing in here knows which method is being trained: what stands in a paper's algorithm box or hyper-parameter table
belongs in `trainers/<method>.py`. Everything a run does is a function of its flags, its seed and the step number, and
of nothing else: not of how many processes share the batch, not of how often it was killed.
"""

import dataclasses
import difflib
import io
import math
import os
import sys
import tomllib
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import timm
import torch
import torch.nn.functional as F
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

# Chapters that would make this file too long to read: networks of our own, where images and boxes come from, the random views.
from trainers.shared.boxes import (
    Annotated,
    average_precision,
    boxes_inside,
    draw_objects,
    object_bitmap,
    open_objects,
    usable_objects,
)
from trainers.shared.cifar_zoo import OFFICIAL_NAMES, ZOO, CifarMobileNetV2, CifarNetwork, CifarResNet, WideResNet
from trainers.shared.fitting import fit_to_data
from trainers.shared.flags import ROOT, check_above_zero, check_positive, check_share, parse_args
from trainers.shared.folders import first_line
from trainers.shared.knn import StoredFeatures, knn_accuracy, readable_rows
from trainers.shared.networks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    fold_batch_norm,
    gather,
    multiply_adds,
    send,
    set_batch_norm_groups,
    timm_size,
)
from trainers.shared.sources import (
    RESIDENT_PX,
    OtherClasses,
    Source,
    available_cores,
    check_bad,
    count_classes,
    decode_rgb,
    labelled_pair,
    labelled_queries,
    open_source,
)
from trainers.shared.views import (
    CIFAR,
    DIGITS,
    EVAL,
    LEAST_PX,
    LINEAR,
    MOCO_V1,
    MOCO_V2,
    RECIPES,
    SSKD_ROTATIONS,
    SWAV_MULTICROP,
    Recipe,
    colour_batch,
    crop_batch,
    crop_one,
    rotations,
    sample_params,
    ssl_small,
    uniforms,
)
from trainers.shared.workers import read_batches


def source_options(args) -> dict:
    """What `open_source` takes of the data flags, whichever split is opened."""
    columns = {"image_column": args.image_column, "label_column": args.label_column, "config": args.data_config}
    return {**columns, "max_pixels": max_pixels(args)}


def max_pixels(args) -> int:
    """--max-megapixels in pixels."""
    check_above_zero(args, "max_megapixels")
    return int(args.max_megapixels * 1e6)


def open_data(args, run) -> tuple:
    """The data flags' images: (args, images to train on, images to evaluate on or None).

    `args` come back with the flags that nobody gave fitted to the data; `run` says what was found and fitted.
    """
    options, query_split = source_options(args), getattr(args, "query_split", "")
    source = open_source(args.data, "train", split=args.split, subset=args.subset, seed=args.seed, **options)
    queries = open_source(args.data, "eval", split=query_split, train_split=args.split, **options)
    return fit_to_data(args, source, run, queries), source, queries


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    views: list[Tensor]  # one (B, 3, S, S) float in [0, 1] per view, this process's share
    labels: Tensor | None  # (B,) long
    indices: Tensor  # (B,) long, position in the source


class Batches:
    """`batch(step)`: this process's share of the global batch of that step, a pure function of (seed, step).

    The order of an epoch comes from (seed, epoch), each view's crop and colours from (seed, epoch, image, view): the
    same images and views whatever the number of processes or workers and wherever a run was resumed. The last partial
    batch of an epoch is dropped. `views` lists (recipe, side in pixels), one per view.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[tuple[Recipe, int]],
        batch_size: int,
        *,
        seed: int,
        device: torch.device,
        num_workers: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if batch_size > len(source):
            raise SystemExit(f"--batch-size {batch_size}: larger than the {len(source)} images of {source.name}")
        self.source, self.views, self.batch_size, self.seed = source, list(views), batch_size, seed
        self.device, self.rank, self.world, self.num_workers = device, rank, world, num_workers
        self.steps_per_epoch = len(source) // batch_size
        self.resident = source.pixels is not None
        self.kept, self._pixels = "resident (decoded once, in memory)", source.pixels
        if self.resident and device.type == "cuda":
            # half of what is free: networks, optimizer and activations come later
            fits = source.pixels.nbytes <= torch.cuda.mem_get_info(device)[0] // 2
            self._pixels = source.pixels.to(device) if fits else source.pixels
            self.kept = f"resident (decoded once, {'on the GPU' if fits else 'too large for the GPU: in the host'})"
        self._order: tuple[int, Tensor] | None = None
        self._stream: Iterator | None = None
        self._next = -1  # the step that the running stream would give
        self.while_waiting: Callable[[int], None] | None = None  # called with the step, until its batch is there

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def progress(self, step: int) -> float:
        """Epochs done before a step, with fractions."""
        return step / self.steps_per_epoch

    def indices(self, step: int) -> Tensor:
        """Which images this process sees at this step, (batch_size / world,) long."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            g = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(len(self.source), generator=g)
        share = self.batch_size // self.world
        start = at * self.batch_size + self.rank * share
        return self._order[1][start : start + share]

    def batch(self, step: int) -> Batch:
        epoch, views, device = self.epoch(step), [], self.device
        if self.resident:
            indices = self.indices(step)
            images = send(self._pixels[send(indices, self._pixels.device)], device)
            heights, widths = (torch.full((len(indices),), side) for side in images.shape[2:])
        else:
            crops, indices, heights, widths = self._streamed(step)
        for v, (recipe, size) in enumerate(self.views):
            params = sample_params(recipe, self.seed, epoch, indices, v, heights, widths, size)
            if self.resident:
                crop = crop_batch(images, params, size, recipe)
            else:
                crop = send(crops[v], device).float().div_(255)
            views.append(colour_batch(crop, params, recipe))
        labels = self.source.labels
        return Batch(views, None if labels is None else send(labels[indices], device), indices)

    def samples(self) -> Dataset:
        """What the workers read; a trainer whose samples are no square views has its own, with its own `collate`."""
        return Crops(self.source, self.views, self.seed)

    def _streamed(self, step: int) -> tuple[list, Tensor, Tensor, Tensor]:
        """This step's samples from the workers, the (B,) indices of the images that were read, their heights and widths.

        Asking for another step than the next restarts the stream there.
        """
        if step != self._next:
            self._stream = read_batches(
                self.samples(),
                StepSampler(self, step),
                self.num_workers,
                pin_memory=self.device.type == "cuda",
                generator=torch.Generator().manual_seed(self.seed),  # else iter() would draw from the global RNG
                while_waiting=lambda: self.while_waiting and self.while_waiting(self._next - 1),
            )
        self._next = step + 1
        crops, facts, bad = next(self._stream)
        for i, why in bad:
            self.source.bad.setdefault(i, why)
        check_bad(self.source.name, self.source.bad, len(self.source))
        return crops, *facts.unbind(1)


class StepSampler:
    """Yields, from `first_step` on and without end, the (epoch, index) pairs of this process's batches."""

    def __init__(self, batches: Batches, first_step: int):
        self.batches, self.first_step = batches, first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.first_step
        while True:
            epoch = self.batches.epoch(step)
            yield [(epoch, i) for i in self.batches.indices(step).tolist()]
            step += 1


class Crops(Dataset):
    """Decodes image `index` once and cuts every view's crop from it; runs in the data workers."""

    def __init__(self, source: Source, views: Sequence[tuple[Recipe, int]], seed: int):
        self.source, self.views, self.seed = source, views, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], tuple[int, int, int], list[tuple[int, str]]]:
        epoch, index = key
        image, index, bad = self.decode(index)
        height, width = image.shape[1:]
        crops = []
        for v, (recipe, size) in enumerate(self.views):
            sides = torch.tensor([height]), torch.tensor([width])
            params = sample_params(recipe, self.seed, epoch, torch.tensor([index]), v, *sides, size)
            crops.append(crop_one(image, params, 0, size, recipe))
        return crops, (index, height, width), bad

    def decode(self, index: int) -> tuple[Tensor, int, list[tuple[int, str]]]:
        """The image, or the nearest readable one after it; which one it is, and what was wrong with those before it."""
        bad = []
        for i in range(index, index + 100):
            i %= len(self.source)
            try:
                return self.source.decode(i), i, bad
            except (ValueError, OSError) as error:
                bad.append((i, f"{self.source.where(i)}: {error}"))
        return torch.zeros(3, 8, 8, dtype=torch.uint8), index, bad  # 100 in a row: the caller stops the run

    @staticmethod
    def collate(samples: list) -> tuple[list[Tensor], Tensor, list[tuple[int, str]]]:
        """Views, (index, height, width) of the images that were read, and those that could not be."""
        views = [torch.stack(crops) for crops in zip(*(s[0] for s in samples), strict=True)]
        return views, torch.tensor([s[1] for s in samples]), [b for s in samples for b in s[2]]


def eval_batches(
    source: Source, recipe: Recipe, size: int, batch_size: int, device: torch.device, num_workers: int, rank=0, world=1
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of a source, in order and once: (x (B, 3, S, S) in [0, 1], indices (B,)).

    Where an image cannot be read x holds another's: leave out the indices that are then in `source.bad`.
    """
    share = torch.arange(len(source)).tensor_split(world)[rank]
    if source.pixels is None:
        keys = [[(0, i) for i in part.tolist()] for part in share.split(batch_size)]
        batches = read_batches(Crops(source, [(recipe, size)], 0), keys, num_workers)
        for (crops, _, bad), part in zip(batches, share.split(batch_size), strict=True):
            source.bad.update(bad)
            check_bad(source.name, source.bad, len(source))
            yield crops[0].to(device).float().div_(255), part
        return
    for part in share.split(batch_size):
        images = source.pixels[part].to(device)
        sides = [torch.full((len(part),), side) for side in images.shape[2:]]
        yield crop_batch(images, sample_params(recipe, 0, 0, part, 0, *sides, size), size, recipe), part


# ---------------------------------------------------------------------------------------------------------------------
# Backbones
# ---------------------------------------------------------------------------------------------------------------------


def create_backbone(
    name: str,
    *,
    image_size: int | Sequence[int] | None = None,
    small_images: bool = False,
    num_classes: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    say: bool = True,
    **kwargs,
) -> nn.Module:
    """A timm model, (B, 3, H, W) in [0, 1] -> (B, D) pooled features with D = `num_features`, or (B, num_classes).

    It normalises its own input with `mean` and `std` (default: those of its timm config), in a hook that leaves the
    state-dict keys timm's. A network of fixed input size (ViT) is built for images of `image_size` px, the sides of the
    views, or the nearest size that it can have (`timm_size`; None: its own), and resizes others; with `say` it says so.
    `small_images` takes the ResNet with a 3x3 stem of the same name (`resnet18_small`, ...). The CIFAR zoo is also known
    by its authors' names: `vgg13` is theirs, timm's network of that name is `vgg13.tv_in1k`. `kwargs` go to
    `timm.create_model`. Raises SystemExit for a name that timm does not know.
    """
    if not kwargs.get("pretrained"):
        name = OFFICIAL_NAMES.get(name, name)
    if small_images and not name.endswith("_small"):
        name = f"{name}_small"
        if not timm.is_model(name):
            known = ", ".join(timm.list_models("resnet*_small"))
            raise SystemExit(f"--small-images: there is no {name}; the 3x3 stem exists for {known}")
    if not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists the names"
        raise SystemExit(f"{name}: timm has no such model; {hint}")
    sides = [image_size] if isinstance(image_size, int) else list(image_size or ())
    sized = timm_size(name, sides) if sides else {}
    try:
        model = timm.create_model(name, num_classes=num_classes, **kwargs, **sized)
    except (OSError, RuntimeError) as error:
        if not kwargs.get("pretrained"):
            raise
        if sized and not isinstance(error, OSError):  # published weights that timm cannot bring to another size
            options = {"small_images": small_images, "num_classes": num_classes, "mean": mean, "std": std, **kwargs}
            return say_size(create_backbone(name, **options), sides)
        raise SystemExit(f"timm/{name}: no pretrained weights ({first_line(error)}); check the connection") from None
    # what comes out without a classifier: MobileNetV3 pools before its last convolution and calls that num_features
    model.num_features = getattr(model, "head_hidden_size", model.num_features)
    config, given = model.pretrained_cfg, {**kwargs, **sized}
    for key, value in (("mean", mean or config["mean"]), ("std", std or config["std"])):
        model.register_buffer(f"input_{key}", torch.tensor(value).view(-1, 1, 1), persistent=False)
    fixed = config.get("fixed_input_size") and not given.get("dynamic_img_size")
    model.input_side = given.get("img_size", config["input_size"][-1]) if fixed else None
    model.model_args = {k: v for k, v in given.items() if k != "pretrained"}
    model.register_forward_pre_hook(_normalise_input)
    return say_size(model, sides) if say else model


def say_size(model: nn.Module, sides: Sequence[int]) -> nn.Module:
    """Print, in a run's main process, where a network of fixed size does not simply run at its published one."""
    name, side = model.pretrained_cfg["architecture"], model.input_side
    own, others = model.pretrained_cfg["input_size"][-1], sorted({size for size in sides if size != side})
    if side and sides and (others or side != own) and os.environ.get("RANK", "0") == "0":
        what = f"takes images of {side} px, those of {' and '.join(map(str, others))} px are resized"
        what = what if others else f"built for images of {side} px instead of {own}"
        print(f"{name}: {what}; {multiply_adds(model, side) / 1e9:.3g} G multiply-adds an image", flush=True)
    return model


def how_built(model: nn.Module) -> dict:
    """The arguments with which `create_backbone` builds a network of the same sizes that normalises alike."""
    statistics = {key: getattr(model, f"input_{key}").flatten().tolist() for key in ("mean", "std")}
    return {**statistics, **model.model_args}


def _normalise_input(model: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    if model.input_side and x.shape[-1] != model.input_side:
        x = F.interpolate(x, (model.input_side, model.input_side), mode="bicubic", antialias=True)
    return ((x - model.input_mean) / model.input_std,)


def forward_stages(model: nn.Module, x: Tensor, *, preact: bool = False) -> tuple[list[Tensor], Tensor]:
    """One pass of a network from `create_backbone`, x (B, 3, H, W) in [0, 1], with everything that distillation looks at.

    -> ([feature maps (B, C, H, W), the stem's first, ..., pooled features (B, D)], logits (B, num_classes)). The maps
    are timm's `forward_intermediates`; with `preact`, for the CIFAR zoo only, before each stage's last activation.
    """
    (x,) = _normalise_input(model, (x,))
    x, maps = model.forward_intermediates(x, **({"preact": True} if preact else {}))
    pooled = model.forward_head(x, pre_logits=True)
    return [*maps, pooled], model.get_classifier()(pooled)


Shape = tuple[int, ...]  # of one image's features, without the batch


@torch.no_grad()
def stage_shapes(model: nn.Module, size: int) -> list[Shape]:
    """What shapes the features of `forward_stages` have for images of `size` px, without the batch."""
    training = model.training
    features, _ = forward_stages(model.eval(), model.input_mean.new_zeros(2, 3, size, size))
    model.train(training)
    return [tuple(f.shape[1:]) for f in features]


class FeatureMaps(nn.Module):
    """A network's maps of images of any size, (B, 3, H, W) normalised -> {"0": (B, C, H / stride, W / stride), ...}.

    The last map of every stride from 4 on, fine to coarse, or that of `stage` alone; `strides` and `channels` describe
    them. A network of a single stride (ViT) gives its last map at strides 4, 8, 16 and 32. What comes after the maps is
    taken out of the backbone. Raises SystemExit for a network without maps.
    """

    def __init__(self, backbone: nn.Module, stage: int | None = None):
        super().__init__()
        config, name = backbone.pretrained_cfg, backbone.pretrained_cfg["architecture"]
        try:
            if config.get("fixed_input_size"):
                state = backbone.state_dict()
                backbone = create_backbone(name, **{**how_built(backbone), "dynamic_img_size": True})
                backbone.load_state_dict(state)
            with torch.no_grad():
                maps = backbone.eval().forward_intermediates(torch.zeros(1, 3, 256, 256), intermediates_only=True)
            prune = backbone.prune_intermediate_layers  # timm's; the CIFAR networks have none
        except (TypeError, AttributeError, AssertionError, RuntimeError) as error:
            raise SystemExit(
                f"{name} gives no feature maps of images of any size ({first_line(error)}); choose another network"
            ) from None
        last = {256 // m.shape[-1]: i for i, m in enumerate(maps)}
        self.indices = [last[stride] for stride in sorted(last) if stride >= 4] if stage is None else [stage]
        self.strides = [256 // maps[i].shape[-1] for i in self.indices]
        self.channels = [maps[i].shape[1] for i in self.indices]
        self.single = stage is None and len(self.indices) == 1
        if self.single:
            self.strides, self.channels = [4, 8, 16, 32], self.channels * 4
        prune(self.indices, prune_norm=not self.single)
        self.backbone = backbone

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        options = {"indices": self.indices, "norm": self.single, "stop_early": True, "intermediates_only": True}
        maps = self.backbone.forward_intermediates(x, **options)
        if self.single:
            maps = [F.interpolate(maps[0], (x.shape[2] // s, x.shape[3] // s), mode="bilinear") for s in self.strides]
        return {str(i): each for i, each in enumerate(maps)}


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------------------------------


class SGD(torch.optim.SGD):
    """torch's, whose momentum starts at zero: fused, torch's own is undefined where a GradScaler skips the first step."""

    def _init_group(self, group, params, grads, momentum_buffer_list):
        sparse = super()._init_group(group, params, grads, momentum_buffer_list)
        if group["fused"] and group["momentum"]:
            for i, (w, buffer) in enumerate(zip(params, momentum_buffer_list, strict=True)):
                if buffer is None:
                    momentum_buffer_list[i] = torch.zeros_like(w)
                elif buffer.stride() != w.stride():  # resumed from another device; the kernel wants one layout
                    momentum_buffer_list[i] = torch.empty_like(w).copy_(buffer)
        return sparse


class LARS(SGD):
    """SGD whose gradients are first scaled layer by layer (You et al. 2017, arXiv:1708.03888), as NVIDIA's LARC does.

    For every tensor w with gradient g, both of non-zero norm, biases included:
        a = trust_coefficient |w| / (|g| + weight_decay |w| + eps),   g <- a (g + weight_decay w)
    then torch's SGD with momentum and no weight decay; a zero norm leaves g as it is, without weight decay. `clip`
    bounds the step by the learning rate: a <- min(a / lr, 1). The learning rate stays outside the momentum buffer.
    """

    def __init__(self, params, lr: float, *, trust_coefficient=0.001, clip=False, eps=1e-8, **sgd):
        super().__init__(params, lr, **sgd)
        self.trust_coefficient, self.clip, self.eps = trust_coefficient, clip, eps

    @torch.no_grad()
    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        scale = getattr(self, "grad_scale", None)  # a GradScaler's, which leaves dividing by it to fused optimizers
        self.grad_scale = None
        for group, decay in zip(self.param_groups, decays, strict=True):
            params = [w for w in group["params"] if w.grad is not None]
            # on a GPU all tensors in a few launches, on a CPU one by one as the cache holds them
            for some in [params] if params and params[0].device.type != "cpu" else [[w] for w in params]:
                self._scale_gradients(some, group["lr"], decay, scale)
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    def _scale_gradients(self, params: list[Tensor], lr: float, decay: float, scale: Tensor | None) -> None:
        """g <- a (g + weight_decay w) as one flat tensor, and no wait for the norms."""
        # as they lie in memory: flat without a copy
        orders = [sorted(range(w.dim()), key=w.stride, reverse=True) for w in params]
        weights = [w.permute(order) for w, order in zip(params, orders, strict=True)]
        grads = [w.grad.permute(order) for w, order in zip(params, orders, strict=True)]
        w_norm, g_norm = torch.stack(torch._foreach_norm(weights)), torch.stack(torch._foreach_norm(grads))
        w, g = _flat(weights), _flat(grads)
        if scale is not None:
            g, g_norm = g / scale, g_norm / scale
        a = self.trust_coefficient * w_norm / (g_norm + decay * w_norm + self.eps)
        if self.clip:
            a = (a / lr).clamp(max=1)
        scaled = (w_norm > 0) & (g_norm > 0)
        a, scaled = (_flat([v.expand(w.numel()) for v, w in zip(x, weights, strict=True)]) for x in (a, scaled))
        parts = torch.where(scaled, (decay * w).add_(g).mul_(a), g).split([w.numel() for w in weights])
        torch._foreach_copy_(grads, [part.view_as(t) for part, t in zip(parts, grads, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]) if len(tensors) > 1 else tensors[0].flatten()


def create_optimizer(
    name: str, params, lr: float, *, momentum: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """sgd with momentum, adamw (momentum is its first beta) or lars over `params`, fused where the device can."""
    fused = {"fused": True} if device.type == "cuda" else {}
    if name == "adamw":
        return torch.optim.AdamW(params, lr, betas=(momentum, 0.999), weight_decay=weight_decay, **fused)
    if name == "lars":
        return LARS(params, lr, momentum=momentum, weight_decay=weight_decay, **fused)
    return SGD(params, lr, momentum=momentum, weight_decay=weight_decay, **fused)


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a network, channels last: convolutions are faster so on GPUs and on CPUs (MobileNetV3 by half)."""
    return model.to(device, memory_format=torch.channels_last)


def prepare_frozen(backbone: nn.Module, accelerator: Accelerator, size: int, *, fold: bool = True) -> None:
    """Make a frozen network in eval mode cheaper to ask at every step, in place, for images of `size` px.

    On CUDA its BatchNorm is folded into its convolutions (not where `fold` is off: batch statistics are wanted). Weights
    of convolutions and linear layers are kept in autocast's precision, which would cast them at every pass: same numbers.
    """
    if fold and accelerator.device.type == "cuda":
        fold_batch_norm(backbone, torch.rand(2, 3, size, size, device=accelerator.device))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    for module in backbone.modules() if dtype else ():
        if type(module) in (nn.Conv2d, nn.Linear):  # others compute with their weights
            module.to(dtype)


def cosine_schedule(
    position: float, total: float, start: float, end: float = 0.0, *, warmup: float = 0.0, unit: float = 1.0
) -> float:
    """Value at `position` of `total`: linear up to start over the warm-up, then half a cosine from start to end.

    All in one measure, steps or epochs; `unit` is how far the position moves at a time, so that the warm-up begins
    above zero and reaches start with its last move.
    """
    if position < warmup:
        return start * min(1.0, (position + unit) / warmup)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (position - warmup) / max(unit, total - warmup)))


def step_schedule(epoch: float, start: float, milestones: Sequence[int], factor: float) -> float:
    """start x factor for every milestone (in epochs) that has passed."""
    return start * factor ** sum(epoch >= milestone for milestone in milestones)


def scheduled_lr(
    schedule: str, at: float, epochs: float, peak: float, milestones: Sequence[int], factor: float
) -> float:
    """`peak` after `at` of `epochs`: a "cosine" to zero, or "step", x factor at every milestone."""
    return cosine_schedule(at, epochs, peak) if schedule == "cosine" else step_schedule(at, peak, milestones, factor)


def two_stages(args, first_epochs: float, total_steps: int, steps_per_epoch: int) -> tuple[int, int]:
    """(steps of a first stage of `first_epochs`, steps of both): its share of --total-steps, or before those of --epochs.

    `total_steps` is --total-steps where that is given, else the second stage's; 0 stays 0, for `Run.start` to refuse.
    """
    if args.total_steps:
        return round(total_steps * first_epochs / ((first_epochs + args.epochs) or 1)), total_steps
    first = round(first_epochs * steps_per_epoch) if total_steps else 0
    return first, first + total_steps


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Every parameter group's learning rate; a group that holds its own keeps it under "fixed_lr"."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("fixed_lr", lr)


# ---------------------------------------------------------------------------------------------------------------------
# What features are worth
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract_features(
    model: Callable[[Tensor], Tensor],
    source: Source,
    recipe: Recipe,
    size: int,
    accelerator: Accelerator,
    *,
    batch_size: int = 256,
    num_workers: int = 0,
    into: "Callable[[int, int], StoredFeatures | Tensor] | None" = None,
) -> "Tensor | StoredFeatures":
    """(N, D) float32 CPU features of a source's images in order, the same on every process; each computes its share.

    An image that could not be read has a row of NaN, see `readable_rows`. `into` makes the place for them, called with N and D: rows of a file that all processes can write; None: memory.
    """
    features, world = None, accelerator.num_processes
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()
    shares = eval_batches(
        source, recipe, size, batch_size, accelerator.device, num_workers, accelerator.process_index, world
    )
    for x, indices in shares:
        with accelerator.autocast():
            y = model(x).float().cpu()
        if source.pixels is None:
            y[[i in source.bad for i in indices.tolist()]] = torch.nan
        if features is None:
            features = into(len(source), y.shape[1]) if into else y.new_zeros(len(source), y.shape[1])
        features[indices] = y
    if training:
        model.train()
    if isinstance(features, StoredFeatures):
        accelerator.wait_for_everyone()
    elif world > 1:
        for part in features.split(65536):
            part.copy_(accelerator.reduce(part.to(accelerator.device), "sum").cpu())
    return features


def fingerprint(network: nn.Module) -> str:
    """A checksum of a network's weights and buffers."""
    crc = 0
    for tensor in network.state_dict().values():
        crc = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), crc)
    return f"{crc:08x}"


def eval_recipe(size: int) -> Recipe:
    """The evaluation view: the whole image where it is small, else the usual centre crop."""
    return dataclasses.replace(EVAL, crop_pct=1.0) if size <= RESIDENT_PX else EVAL


def top1_accuracy(model: nn.Module, source: Source, size: int, accelerator: Accelerator, **options) -> float:
    """Percent of a labelled source's images that a classifier names right. `options` go to `extract_features`."""
    logits = extract_features(model, source, eval_recipe(size), size, accelerator, **options)
    right = (logits.argmax(1) == source.labels)[readable_rows(logits)]
    return 100 * right.double().mean().item()


class EpochAccuracy:
    """Top-1 on a labelled evaluation split every `every` steps: the last one and the best; belongs into a checkpoint."""

    def __init__(self, queries: Source | None, size: int, accelerator: Accelerator, every: int, **options):
        self.queries, self.every = queries, every
        self.look = partial(top1_accuracy, source=queries, size=size, accelerator=accelerator, **options)
        self.last = self.best = self.best_at = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"last": self.last, "best": self.best, "best_at": self.best_at}

    def load_state_dict(self, state: dict[str, float]) -> None:
        vars(self).update(state)

    def after(self, step: int, model: nn.Module, final: bool) -> dict[str, float]:
        """To be called when `step` steps are done: {"eval_top1": percent} where it is time to look, else {}."""
        if self.queries is None or step < 1 or (step % self.every and not final):
            return {}
        self.last = self.look(model)
        if self.last > self.best:
            self.best, self.best_at = self.last, step
        return {"eval_top1": self.last}

    def results(self, teacher: nn.Module, steps_per_epoch: int, say: Callable[[str], None]) -> dict[str, float]:
        """What a run reports at its end, and says; {} where there is nothing to evaluate on."""
        if self.queries is None:
            return {}
        found = {"top1 teacher": self.look(teacher), "top1 last epoch": self.last, "top1 best epoch": self.best}
        epoch = self.best_at / steps_per_epoch
        say(f"top-1 on {len(self.queries)} images of {self.queries.name}: teacher {found['top1 teacher']:.2f} %, student "
            f"{self.last:.2f} % after the last epoch, {self.best:.2f} % at its best, epoch {epoch:.4g}")  # fmt: skip
        return found


def knn_table(
    networks: dict[str, nn.Module], gallery: Source, queries: Source, size: int, accelerator: Accelerator, **options
) -> dict[str, float]:
    """kNN top-1 (k 20, weighted) in percent of raw pixels and of each network's features, printed as a table.

    At most 50,000 gallery images, every n-th. `options` go to `extract_features`.
    """
    every = -(-len(gallery) // 50_000)
    gallery = gallery.take(range(0, len(gallery), every)) if every > 1 else gallery
    rows = {"raw pixels": lambda x: F.interpolate(x, (32, 32), mode="area").flatten(1), **networks}
    accuracy, k, device, world = {}, min(20, len(gallery)), accelerator.device, accelerator.num_processes
    share = torch.arange(len(queries)).tensor_split(world)[accelerator.process_index]
    for name, network in rows.items():
        before = next((p.device for p in network.parameters()), device) if isinstance(network, nn.Module) else device
        network = to_device(network, device) if before != device else network
        g, q = (
            extract_features(network, s, eval_recipe(size), size, accelerator, **options) for s in (gallery, queries)
        )
        _ = network.to(before) if before != device else None
        hits = torch.zeros(1, dtype=torch.float64)
        if len(share):  # of the queries, every process's
            hits += knn_accuracy(g, gallery.labels, q[share].to(device), queries.labels[share], k) * len(share)
        hits = accelerator.reduce(hits.to(device), "sum") if world > 1 else hits
        accuracy[f"knn {name}"] = hits.item() / len(queries)
    if accelerator.is_main_process:
        print(f"\nkNN top-1 on {len(queries)} images of {queries.name}, {len(gallery)} in the gallery (k {k}, cosine)")
        for name, value in accuracy.items():
            print(f"  {name[4:]:<20} {value:6.2f} %")
    return accuracy


def open_knn(data: str, subset: str, size: int) -> Callable[[Callable[[Tensor], Tensor]], float]:
    """What measures a function of images in [0, 1], on a CPU: its kNN top-1 in percent (k 20, weighted) on `data`.

    At most as many queries as there are images in the gallery, of which `subset` chooses.
    """
    gallery, queries = labelled_pair(data, open_source(data, "train", subset=subset), open_source(data, "eval"))
    queries = queries.take(range(0, len(queries), -(-len(queries) // len(gallery))))

    def top1(function: Callable[[Tensor], Tensor]) -> float:
        accelerator, recipe = Accelerator(cpu=True), eval_recipe(size)
        g, q = (extract_features(function, s, recipe, size, accelerator) for s in (gallery, queries))
        return knn_accuracy(g, gallery.labels, q, queries.labels, min(20, len(gallery)))

    return top1


def z_std(z: Tensor) -> Tensor:
    """Health of (B, D) embeddings: sqrt(D) x mean standard deviation of the unit vectors; 1 = spread out, 0 = collapsed."""
    z = F.normalize(z.detach().double(), dim=1)
    return z.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5


def effective_rank(z: Tensor) -> Tensor:
    """exp(entropy of the normalised singular values) of centred (B, D) embeddings (Roy & Vetterli 2007), in 1..min(B, D)."""
    z = z.detach().double()
    z = z - z.mean(dim=0)
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z  # its eigenvalues are the squares, much sooner than an SVD
    s = torch.linalg.eigvalsh(gram.nan_to_num()).clamp_min(0).sqrt()  # a NaN is the loss's to report
    p = s / s.sum().clamp_min(1e-12)
    return torch.exp(-(p * p.clamp_min(1e-12).log()).sum())


def health(z: Tensor) -> dict[str, float]:
    """z_std and effective_rank (of the first 512) of the global batch; z (B, D): this process's share. All must call it."""
    z = gather(z.detach())
    figures = torch.stack([z_std(z), effective_rank(z[:512])])  # one wait for the device
    return dict(zip(("z_std", "effective_rank"), figures.tolist(), strict=True))
