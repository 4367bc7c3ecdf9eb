"""Random views: parameters from a counter-based hash, crops as matrix products, colour and blur batched."""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

GREY_WEIGHTS = (0.2989, 0.587, 0.114)  # ITU-R 601, torchvision rgb_to_grayscale
BLUR_RADIUS = 6  # taps on each side: three standard deviations of the widest blur in use, sigma 2
CHUNK_PIXELS = 2**16  # pixels per channel of one piece of work on a CPU: a piece and its temporaries stay in L2
ORDERS = torch.tensor(list(permutations(range(4))))  # of brightness, contrast, saturation, hue; lexicographic
CHANNELS = torch.tensor(list(permutations(range(3))))


@dataclass(frozen=True)
class Recipe:
    """What one random view is made of; data, not code. Each instance's comment states its source."""

    crop: Literal["resized", "padded", "centre"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)  # share of the area, "resized"
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, "resized"
    padding: int = 4  # zero pixels on each side, "padded"
    crop_pct: float = 0.875  # "centre": short side to size / crop_pct, then the middle
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_prob: float = 0.8
    grey: float = 0.0
    grey_first: bool = False  # before the jitter
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels; PIL's GaussianBlur radius is the standard deviation
    permute: float = 0.0  # probability of shuffling the three channels


# facebookresearch/moco main_moco.py @ 64444f4, without --aug-plus: the grey comes before the jitter.
MOCO_V1 = Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_prob=1.0, grey=0.2, grey_first=True)
# facebookresearch/moco main_moco.py @ 64444f4, --aug-plus; facebookresearch/simsiam main_simsiam.py @ a7bc177 is equal.
MOCO_V2 = Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
# facebookresearch/moco main_lincls.py @ 64444f4: torchvision's RandomResizedCrop as it is, and a flip.
LINEAR = Recipe()
# He et al. 2016, section 4.2: four pixels of padding and a flip; torchvision RandomCrop(32, padding=4).
CIFAR = Recipe(crop="padded")
# torchvision references/classification presets.py: Resize(256), CenterCrop(224).
EVAL = Recipe(crop="centre", flip=0.0)
# Ours, for the embedded digits: a flip or a tight crop would change the digit, the colours carry nothing.
DIGITS = Recipe(scale=(0.6, 1.0), flip=0.0, grey=0.2, permute=0.8)
RECIPES = {
    "moco_v1": MOCO_V1, "moco_v2": MOCO_V2, "linear": LINEAR, "cifar": CIFAR, "eval": EVAL, "digits": DIGITS,
}  # fmt: skip


@dataclass
class Params:
    """The random choices behind one view of B samples, on the CPU."""

    box: Tensor  # (B, 4) float64: top, left, height, width in source pixels
    flip: Tensor  # (B,) bool
    jitter: Tensor  # (B,) bool
    factors: Tensor  # (B, 4) float64: brightness, contrast, saturation, hue
    order: Tensor  # (B, 4) int64: which of the four comes at which place
    grey: Tensor  # (B,) bool
    sigma: Tensor  # (B,) float64, 0 = no blur
    permutation: Tensor  # (B, 3) int64


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014), a bijection of 64-bit words."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed: int, epoch: int, indices: Tensor, view: int, count: int) -> Tensor:
    """Numbers in [0, 1), a pure function of (seed, epoch, sample index, view, column). (B,) -> (B, count) float64."""
    step = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment; arrays throughout, they wrap without a warning
    state = np.zeros(1, np.uint64)
    for word in (seed, epoch, view):
        state = _mix((state ^ np.uint64(word & (2**64 - 1))) + step)
    state = _mix((state ^ indices.numpy().astype(np.uint64)) + step)
    bits = _mix(state[:, None] + step * np.arange(1, count + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def _resized_boxes(recipe: Recipe, u: Tensor, heights: Tensor, widths: Tensor) -> Tensor:
    """torchvision's RandomResizedCrop.get_params for every row at once. u: (B, 22) -> (B, 4)."""
    area, (low, high) = (heights * widths)[:, None], recipe.scale
    area = area * (low + (high - low) * u[:, :10])
    low, high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    ratio = (low + (high - low) * u[:, 10:20]).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    valid = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first = valid.byte().argmax(1, keepdim=True)  # ten tries, the first that fits; argmax takes the first of equals
    h, w, found = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0], valid.any(1)
    top, left = ((heights - h + 1) * u[:, 20]).floor(), ((widths - w + 1) * u[:, 21]).floor()

    central_h = torch.minimum(heights, (widths / min(recipe.ratio)).round())  # none fits: the largest legal middle
    central_w = torch.minimum(widths, (heights * max(recipe.ratio)).round())
    central = (((heights - central_h) / 2).floor(), ((widths - central_w) / 2).floor(), central_h, central_w)
    return torch.where(found[:, None], torch.stack((top, left, h, w), 1), torch.stack(central, 1))


def _middle(recipe: Recipe, height: int, width: int, size: int) -> tuple[float, float, float, float]:
    """Resize(size / crop_pct) then CenterCrop(size) as one box in source pixels; its edges may be fractional."""
    short = int(size / recipe.crop_pct)
    h, w = (short, int(short * width / height)) if height <= width else (int(short * height / width), short)
    top, left = round((h - size) / 2), round((w - size) / 2)
    return top * height / h, left * width / w, size * height / h, size * width / w


def sample_params(
    recipe: Recipe, seed: int, epoch: int, indices: Tensor, view: int, heights: Tensor, widths: Tensor, size: int
) -> Params:
    """The parameters of one view, distributed like torchvision's. indices, heights, widths: (B,), size: the output."""
    # Every recipe reads the same columns, so that changing one part of a recipe leaves the rest of a view as it was.
    u = uniforms(seed, epoch, indices, view, 36)
    heights, widths = heights.double(), widths.double()
    if recipe.crop == "resized":
        box = _resized_boxes(recipe, u[:, :22], heights, widths)
    elif recipe.crop == "padded":
        room = torch.stack((heights, widths), 1) + 2 * recipe.padding - size
        corner = ((room + 1) * u[:, 20:22]).floor() - recipe.padding
        box = torch.cat((corner, torch.full_like(corner, size)), 1)
    else:
        sides = zip(heights.int().tolist(), widths.int().tolist(), strict=True)
        box = torch.tensor([_middle(recipe, h, w, size) for h, w in sides], dtype=torch.float64).reshape(-1, 4)
    centre = torch.tensor((1.0, 1.0, 1.0, 0.0), dtype=torch.float64)
    strength = torch.tensor(recipe.jitter, dtype=torch.float64)
    low, high = centre - strength, centre + strength
    low[:3].clamp_(min=0)
    shuffled = CHANNELS[(u[:, 32] * 6).long()]
    return Params(
        box=box,
        flip=u[:, 22] < recipe.flip,
        jitter=(u[:, 23] < recipe.jitter_prob) & any(recipe.jitter),
        factors=low + (high - low) * u[:, 24:28],
        order=ORDERS[(u[:, 28] * 24).long()],
        grey=u[:, 29] < recipe.grey,
        sigma=torch.where(
            u[:, 30] < recipe.blur,
            recipe.blur_sigma[0] + (recipe.blur_sigma[1] - recipe.blur_sigma[0]) * u[:, 31],
            0.0,
        ),
        permutation=torch.where(u[:, 33:34] < recipe.permute, shuffled, torch.arange(3)),
    )


def _resampling(
    start: Tensor, length: Tensor, size: int, source: int, inside: bool, like: Tensor, kind: str
) -> Tensor:
    """Antialiased resampling of [start, start + length) as matrices, torch's `upsample_*2d_aa`. -> (B, size, source).

    `inside` keeps the taps inside the box (crop, then resize); a negative length mirrors; the rows sum to 1, or to 0
    where no tap is left (padding).
    """
    inverse = (size / length.abs()).clamp(max=1.0)[:, None]  # the filter widens when shrinking, never when enlarging
    taps = torch.arange(source, dtype=torch.float64) + 0.5
    centres = (start[:, None] + (torch.arange(size) + 0.5) * (length / size)[:, None]) * inverse
    middle, reach = (start + length / 2)[:, None], length.abs()[:, None] / 2 if inside else math.inf
    box = ((taps - middle).abs() < reach).double()
    packed = torch.cat((taps * inverse, centres, box), 1).to(like, non_blocking=True)  # one transfer
    taps, centres, box = packed.split((source, size, source), 1)
    x = (centres[:, :, None] - taps[:, None]).abs_()
    if kind == "bilinear":
        weights = torch.addcmul(box[:, None], box[:, None], x.clamp_(max=1.0), value=-1)
    else:  # Keys 1981 with a = -1/2, as PIL and torch do it when antialiasing
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * box[:, None]
    return weights.div_(weights.sum(2, keepdim=True).clamp_(min=1e-6))


def crop_batch(images: Tensor, params: Params, size: int, recipe: Recipe) -> Tensor:
    """Resident path: crop, antialiased resize and flip as two matrix products; a float input keeps its dtype and range.

    images: (B, 3, H, W) uint8, any device -> (B, 3, size, size) float32 in [0, 1].
    """
    height, width = images.shape[2:]
    x = images if images.is_floating_point() else images.float().div_(255)
    if recipe.crop == "centre" and recipe.crop_pct == 1 and height == width == size:
        return x.where(~params.flip.to(x.device)[:, None, None, None], x.flip(3)) if recipe.flip else x
    top, left, h, w = params.box.unbind(1)
    left, w = torch.where(params.flip, left + w, left), torch.where(params.flip, -w, w)
    inside, kind = recipe.crop == "resized", recipe.interpolation
    rows = _resampling(top, h, size, height, inside, x, kind)
    columns = _resampling(left, w, size, width, inside, x, kind)
    x = torch.bmm(x.reshape(len(x), 3 * height, width), columns.transpose(1, 2))
    rows = rows[:, None].expand(-1, 3, -1, -1).reshape(-1, size, height)  # matmul would broadcast far more slowly
    x = torch.bmm(rows, x.view(-1, height, size)).view(len(images), 3, size, size)
    return x.clamp_(0, 1) if kind == "bicubic" else x


def crop_one(image: Tensor, params: Params, row: int, size: int, recipe: Recipe) -> Tensor:
    """Streamed path, in a worker: the same boxes with torchvision's uint8 kernels. (3, H, W) -> (3, size, size) uint8."""
    mode = InterpolationMode(recipe.interpolation)
    if recipe.crop == "centre":
        out = tvf.center_crop(tvf.resize(image, [int(size / recipe.crop_pct)], mode, antialias=True), [size, size])
    else:
        top, left, height, width = (int(v) for v in params.box[row])
        out = tvf.crop(image, top, left, height, width)  # zeros outside, which only "padded" reaches
        out = tvf.resize(out, [size, size], mode, antialias=True)
    return out.flip(2) if params.flip[row] else out.clone()


def _luma(x: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, S, S)."""
    r, g, b = x.unbind(1)
    return (r * GREY_WEIGHTS[0]).add_(g, alpha=GREY_WEIGHTS[1]).add_(b, alpha=GREY_WEIGHTS[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _luma(x.mean((2, 3), keepdim=True))[:, None]  # the mean of the grey image: both are linear
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    grey = _luma(x)[:, None].mul_(1 - factor)
    x.mul_(factor).add_(grey).clamp_(0, 1)


def _hue(x: Tensor, turn: Tensor) -> None:
    """Turn the hue hexagon without building HSV: value and chroma stay, so only the angle is needed, in sixths."""
    r, g, b = x.unbind(1)
    high, low = torch.maximum(g, b), torch.minimum(g, b)
    high, low = torch.maximum(high, r, out=high), torch.minimum(low, r, out=low)
    chroma = high - low
    # The angle away from red is 1 + (g + b - r - min) / chroma in all six sextants; the side is the sign of g - b.
    angle = torch.add(g, b, out=high).sub_(r).sub_(low).div_(chroma.clamp_min(1e-12)).add_(1)
    angle = angle.copysign_(g - b).add_(turn[:, 0] * 6)
    angle.sub_((angle / 6).floor_(), alpha=6)
    # On [0, 6]: r = min + chroma * sat(|a - 3| - 1), g = min + chroma * sat(2 - |a - 2|), b likewise around 4.
    low.sub_(chroma)
    torch.addcmul(low, chroma, (angle - 3).abs_().clamp_(1, 2), out=r)
    low.add_(chroma, alpha=3)
    torch.addcmul(low, chroma, (angle - 2).abs_().clamp_(1, 2), value=-1, out=g)
    torch.addcmul(low, chroma, angle.sub_(4).abs_().clamp_(1, 2), value=-1, out=b)
    x.clamp_(0, 1)  # rounding may leave [0, 1]


def _grey(x: Tensor, rows: Tensor) -> None:
    x.index_copy_(0, rows, _luma(x.index_select(0, rows))[:, None].expand(-1, 3, -1, -1))


JITTER = (_brightness, _contrast, _saturation, _hue)


def _jitter(x: Tensor, factors: Tensor, order: Tensor) -> None:
    """ColorJitter in place with an order per sample. x: (N, 3, S, S), factors: (N, 4), order: (N, 4) sorted, CPU."""
    factors = factors.to(x, non_blocking=True)[:, :, None, None, None]
    grouped = order.argsort(dim=0, stable=True).to(x.device, non_blocking=True)
    for place in range(4):
        if x.is_cuda:  # few launches: one per operation, over gathered samples
            counts = order[:, place].bincount(minlength=4).tolist()
            for op, rows in enumerate(grouped[:, place].split(counts)):
                part = x.index_select(0, rows)
                JITTER[op](part, factors[rows, op])
                x.index_copy_(0, rows, part)
        else:  # few copies: sorted by order, the samples that share an operation are a few slices
            runs, counts = order[:, place].unique_consecutive(return_counts=True)
            start = 0
            for op, count in zip(runs.tolist(), counts.tolist(), strict=True):
                JITTER[op](x[start : start + count], factors[start : start + count, op])
                start += count


@lru_cache(maxsize=8)
def _blur_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[t, i, j] = 1 where tap t of output i reads input j, reflected at the borders. -> (taps, size * size)."""
    taps = torch.arange(2 * BLUR_RADIUS + 1)
    reads = (torch.arange(size) + taps[:, None] - BLUR_RADIUS).abs()
    reads = torch.where(reads >= size, 2 * (size - 1) - reads, reads)
    return torch.nn.functional.one_hot(reads, size).reshape(len(taps), -1).to(device, dtype)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation per sample, 13 taps, reflected borders. x: (N, 3, S, S), sigma: (N,)."""
    size = x.shape[-1]
    weights = (torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1) / sigma[:, None]).square().mul(-0.5).softmax(1)
    band = weights.to(x, non_blocking=True) @ _blur_basis(size, x.dtype, x.device)
    band = band.view(-1, 1, size, size).expand(-1, 3, -1, -1).reshape(-1, size, size)
    return torch.bmm(torch.bmm(band, x.reshape(-1, size, size)), band.transpose(1, 2)).view_as(x)


def colour_batch(x: Tensor, params: Params, recipe: Recipe) -> Tensor:
    """Jitter, grey, channel permutation and blur on x's device. (B, 3, S, S) in [0, 1] -> same."""
    if not (any(recipe.jitter) or recipe.grey or recipe.blur or recipe.permute):
        return x
    code = torch.where(params.jitter, (params.order * torch.tensor((64, 16, 4, 1))).sum(1), 256)
    by_order = code.argsort(stable=True)
    piece = len(x) if x.is_cuda else max(1, CHUNK_PIXELS // x.shape[-1] ** 2)
    out = torch.empty_like(x)
    for rows in by_order.split(piece):
        grey, blurred = params.grey[rows].nonzero()[:, 0], (params.sigma[rows] > 0).nonzero()[:, 0]
        there, grey, there_blurred = (i.to(x.device, non_blocking=True) for i in (rows, grey, blurred))
        y = x.index_select(0, there)
        if recipe.grey_first:
            _grey(y, grey)
        jittered = rows[params.jitter[rows]]
        _jitter(y[: len(jittered)], params.factors[jittered], params.order[jittered])
        if not recipe.grey_first:
            _grey(y, grey)
        if recipe.permute:
            channels = params.permutation[rows].to(x.device, non_blocking=True)
            y = y.gather(1, channels[:, :, None, None].expand_as(y))
        if recipe.blur:
            y.index_copy_(0, there_blurred, _blur(y.index_select(0, there_blurred), params.sigma[rows[blurred]]))
        out.index_copy_(0, there, y)
    return out
