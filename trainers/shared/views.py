"""Random views: parameters from a counter-based hash, crops as matrix products, colour and blur batched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, permutations
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from trainers.shared.networks import send

BLUR_RADIUS = 6  # taps on each side: three standard deviations of the widest blur in use, sigma 2
LEAST_PX = BLUR_RADIUS + 1  # side of a view: the blur reflects its borders
CHUNK_PIXELS = 2**17  # pixels per channel of one piece of work on a CPU: a piece and its temporaries stay in L2
ORDERS = np.array(list(permutations(range(4))))  # of brightness, contrast, saturation, hue
CHANNELS = np.array(list(permutations(range(3))))
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601 with torchvision's digits


@dataclass(frozen=True)
class Recipe:
    """What one random view is made of; data, not code. Each instance's comment states its source."""

    crop: Literal["resized", "padded", "centre"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)  # share of the area, "resized"
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, "resized"
    padding: int = 4  # "padded": short side to size, zero pixels on each side, a corner
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
    turns: int | None = None  # quarter turns counter-clockwise, after a flip that all views share and before the crop


# facebookresearch/moco main_moco.py @ 64444f4, without --aug-plus: the grey comes before the jitter.
MOCO_V1 = Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.4), jitter_prob=1.0, grey=0.2, grey_first=True)
# facebookresearch/moco main_moco.py @ 64444f4, --aug-plus; simsiam main_simsiam.py @ a7bc177 has the same.
MOCO_V2 = Recipe(scale=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5)
# facebookresearch/swav src/multicropdataset.py @ 06b1b7c: the large crops; the small ones differ by their scale alone.
SWAV_MULTICROP = Recipe(scale=(0.14, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5)
# facebookresearch/moco main_lincls.py @ 64444f4: torchvision's RandomResizedCrop as it is, and a flip.
LINEAR = Recipe()
# He et al. 2016, section 4.2: four pixels of padding and a flip; torchvision RandomCrop(32, padding=4).
CIFAR = Recipe(crop="padded")
# torchvision references/classification presets.py: Resize(256), CenterCrop(224).
EVAL = Recipe(crop="centre", flip=0.0)
# Ours, for the embedded digits: a flip or a tight crop would change the digit, the colours carry nothing.
DIGITS = Recipe(scale=(0.6, 1.0), flip=0.0, grey=0.2, permute=0.8)
RECIPES = {
    "moco_v1": MOCO_V1, "moco_v2": MOCO_V2, "multi_crop": SWAV_MULTICROP,
    "linear": LINEAR, "cifar": CIFAR, "eval": EVAL, "digits": DIGITS,
}  # fmt: skip


def rotations(recipe: Recipe) -> tuple[Recipe, ...]:
    """Four views of an image for tasks on rotations: k x 90 degrees, one flip before, a crop (and colours) of its own."""
    return tuple(replace(recipe, turns=k) for k in range(4))


# xuguodong03/SSKD cifar.py and student.py @ 661b972: flip, np.rot90, then RandomCrop(32, padding=4) for each of the four.
SSKD_ROTATIONS = rotations(CIFAR)


def ssl_small(jitter: float, grey: float, blur: float) -> Recipe:
    """WOWNICE/ssl-small main_moco_final.py @ 815aea9: MoCo v2's with the jitter's strength and two probabilities free."""
    strength = 0.8 * jitter
    return replace(MOCO_V2, jitter=(strength, strength, strength, min(0.5, 0.4 * jitter)), grey=grey, blur=blur)


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


def uniforms(seed: int, epoch: int | np.ndarray, indices: Tensor, view: int, count: int) -> Tensor:
    """Numbers in [0, 1), a pure function of (seed, epoch, sample index, view, column). (B,) -> (B, count) float64.

    One epoch for all samples, or one each (B,).
    """
    step = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment; arrays throughout, they wrap without a warning
    state = np.zeros(1, np.uint64)
    for word in (seed, epoch, view, indices.numpy()):
        state = _mix((state ^ np.asarray(word).astype(np.uint64)) + step)
    bits = _mix(state[:, None] + step * np.arange(1, count + 1, dtype=np.uint64))
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def _resized_boxes(recipe: Recipe, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """torchvision's RandomResizedCrop.get_params for every row at once. u: (B, 22) -> (B, 4)."""
    low, high = recipe.scale
    area = (heights * widths)[:, None] * (low + (high - low) * u[:, :10])
    low, high = math.log(recipe.ratio[0]), math.log(recipe.ratio[1])
    ratio = np.exp(low + (high - low) * u[:, 10:20])
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    valid = (w > 0) & (w <= widths[:, None]) & (h > 0) & (h <= heights[:, None])
    first = np.arange(len(u)), valid.argmax(1)  # ten tries, the first that fits
    h, w, found = h[first], w[first], valid[first]
    h = np.where(found, h, np.minimum(heights, np.rint(widths / min(recipe.ratio))))  # none: the largest legal middle
    w = np.where(found, w, np.minimum(widths, np.rint(heights * max(recipe.ratio))))
    top = np.floor(np.where(found, (heights - h + 1) * u[:, 20], (heights - h) / 2))
    left = np.floor(np.where(found, (widths - w + 1) * u[:, 21], (widths - w) / 2))
    return np.stack((top, left, h, w), 1)


def _middle_boxes(recipe: Recipe, size: int, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Resize(size / crop_pct) then CenterCrop(size) as boxes in source pixels, edges may be fractional. -> (B, 4)."""
    short = int(size / recipe.crop_pct)
    h = np.where(heights <= widths, short, np.floor(short * heights / widths))
    w = np.where(heights <= widths, np.floor(short * widths / heights), short)
    box = np.stack((np.rint((h - size) / 2), np.rint((w - size) / 2), np.full_like(h, size), np.full_like(w, size)), 1)
    return box * np.stack((heights / h, widths / w) * 2, 1)


def sample_params(
    recipe: Recipe,
    seed: int,
    epoch: int | np.ndarray,
    indices: Tensor,
    view: int,
    heights: Tensor,
    widths: Tensor,
    size: int,
) -> Params:
    """The parameters of one view, distributed like torchvision's. indices, heights, widths: (B,), size: the output."""
    # Every recipe reads the same columns, so that changing one part of a recipe leaves the rest of a view as it was.
    u = uniforms(seed, epoch, indices, view, 34).numpy()
    heights, widths = heights.numpy().astype(np.float64), widths.numpy().astype(np.float64)
    if recipe.turns is not None:
        u[:, 22] = uniforms(seed, epoch, indices, 0, 23).numpy()[:, 22]  # the first view's flip
        heights, widths = (widths, heights) if recipe.turns % 2 else (heights, widths)
    if recipe.crop == "resized":
        box = _resized_boxes(recipe, u, heights, widths)
    elif recipe.crop == "padded":
        sides = np.stack((heights, widths), 1)
        resized = np.floor(sides * size / sides.min(1, keepdims=True))  # an image of another side is seen whole
        corner = np.floor((resized + 2 * recipe.padding - size + 1) * u[:, 20:22]) - recipe.padding
        box = np.concatenate((corner, np.full_like(corner, size)), 1) * np.tile(sides / resized, 2)
    else:
        box = _middle_boxes(recipe, size, heights, widths)
    strength, centre = np.array(recipe.jitter), np.array((1.0, 1.0, 1.0, 0.0))
    low = np.maximum(centre - strength, (0.0, 0.0, 0.0, -0.5))
    start, stop = recipe.blur_sigma
    columns = (
        box,
        u[:, 22] < recipe.flip,
        (u[:, 23] < recipe.jitter_prob) & any(recipe.jitter),
        low + (centre + strength - low) * u[:, 24:28],
        ORDERS[(u[:, 28] * len(ORDERS)).astype(np.int64)],
        u[:, 29] < recipe.grey,
        (start + (stop - start) * u[:, 31]) * (u[:, 30] < recipe.blur),
        CHANNELS[(u[:, 33] * len(CHANNELS) * (u[:, 32] < recipe.permute)).astype(np.int64)],
    )
    return Params(*map(torch.from_numpy, columns))


def _send(tables: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Host tables (B, n) to the device in one copy for which nobody waits."""
    packed = torch.cat(list(tables), 1).to(dtype)
    return send(packed, device).split([table.shape[1] for table in tables], 1)


def _sampling_points(start: Tensor, length: Tensor, size: int, source: int, recipe: Recipe) -> Tensor:
    """What `_resampling` needs of [start, start + length): where the taps and the outputs lie and which taps count.

    (B,), (B,) -> (B, source + size + source) float64, in units of the filter's width.
    """
    inverse = (size / length.abs()).clamp(max=1.0)[:, None]  # the filter widens when shrinking, never when enlarging
    taps = torch.arange(source, dtype=torch.float64) + 0.5
    centres = (start[:, None] + (torch.arange(size) + 0.5) * (length / size)[:, None]) * inverse
    reach = length.abs()[:, None] / 2 if recipe.crop == "resized" else math.inf  # there, no tap outside the box
    box = ((taps - (start + length / 2)[:, None]).abs() < reach).double()
    if recipe.crop == "padded":
        centres = centres.where(
            (centres > 0) & (centres < source * inverse), -math.inf
        )  # black, whatever the filter's reach
    return torch.cat((taps * inverse, centres, box), 1)


def _resampling(points: Tensor, size: int, source: int, recipe: Recipe) -> Tensor:
    """Antialiased resampling as matrices, torch's `upsample_*2d_aa`, from `_sampling_points`. -> (B, size, source).

    A negative length mirrored; the rows sum to 1, or to 0 where no tap is left (padding).
    """
    taps, centres, box = points.split((source, size, source), 1)
    x = (centres[:, :, None] - taps[:, None]).abs_()
    if recipe.interpolation == "bilinear":
        weights = torch.addcmul(box[:, None], box[:, None], x.clamp_(max=1.0), value=-1)
    else:  # Keys 1981 with a = -1/2, as PIL and torch do it when antialiasing
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * box[:, None]
    return weights.div_(weights.sum(2, keepdim=True).clamp_(min=1e-6))


def _pieces(count: int, pixels: int, device: torch.device) -> list[slice]:
    """On a CPU, pieces of a batch small enough for the cache and for malloc to reuse; elsewhere the whole batch."""
    length = max(1, CHUNK_PIXELS // pixels if device.type == "cpu" else count)
    return [slice(at, at + length) for at in range(0, count, length)]


def _turn(images: Tensor, flip: Tensor, turns: int) -> Tensor:
    """Flip those of (B, 3, H, W) images that `flip` names, then turn all of them by `turns` x 90 degrees."""
    # a quarter turn is a flip and a transposition, two are both flips: those along the width cancel, or make one
    (flip,) = _send([flip[:, None] ^ (turns in (1, 2))], images.device, torch.bool)
    images = images.flip(2) if turns > 1 else images
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
    return images.mT if turns % 2 else images


def crop_batch(images: Tensor, params: Params, size: int, recipe: Recipe) -> Tensor:
    """Resident path: crop, antialiased resize and flip as two matrix products; float images keep dtype and range.

    images: (B, 3, H, W) uint8, any device -> (B, 3, size, size) float32 in [0, 1].
    """
    flip = params.flip
    if recipe.turns is not None:
        images, flip = _turn(images, flip, recipe.turns), torch.zeros_like(flip)
    count, _, height, width = images.shape
    gain, dtype = (1.0, images.dtype) if images.is_floating_point() else (255.0, torch.float32)
    if recipe.crop == "centre" and recipe.crop_pct == 1 and height == width == size and not recipe.flip:
        return images / gain
    top, left, h, w = params.box.unbind(1)
    left, w = torch.where(flip, left + w, left), torch.where(flip, -w, w)
    out = images.new_empty(count, 3, size, size, dtype=dtype)
    for at in _pieces(count, max(height * width, size * size), images.device):
        y = images[at].to(dtype, memory_format=torch.contiguous_format)
        points = (
            _sampling_points(top[at], h[at], size, height, recipe),
            _sampling_points(left[at], w[at], size, width, recipe),
        )
        rows, columns = _send(points, y.device, dtype)
        rows, columns = _resampling(rows, size, height, recipe), _resampling(columns, size, width, recipe)
        y = torch.bmm(y.reshape(-1, 3 * height, width), columns.mT).view(-1, height, size)
        rows = rows[:, None].expand(-1, 3, -1, -1).reshape(-1, size, height)  # matmul would broadcast far more slowly
        torch.div(torch.bmm(rows, y).view(-1, 3, size, size), gain, out=out[at])
    return out.clamp_(0, 1) if recipe.interpolation == "bicubic" else out  # only it overshoots


def crop_one(image: Tensor, params: Params, row: int, size: int, recipe: Recipe) -> Tensor:
    """Streamed path, in a worker: the same boxes, torch's uint8 kernels. (3, H, W) -> (3, size, size) uint8."""
    mode, flip = InterpolationMode(recipe.interpolation), bool(params.flip[row])
    if recipe.turns is not None:
        image, flip = _turn(image[None], params.flip[row : row + 1], recipe.turns)[0], False
    if recipe.crop == "centre":
        out = tvf.center_crop(tvf.resize(image, [int(size / recipe.crop_pct)], mode, antialias=True), [size, size])
    elif recipe.crop == "padded":
        top, left = (params.box[row, :2] / params.box[row, 2:] * size).round().int().tolist()
        out = tvf.crop(tvf.resize(image, [size], mode, antialias=True), top, left, size, size)  # zeros outside
    else:
        out = tvf.crop(image, *(int(v) for v in params.box[row]))
        out = out[None].contiguous(memory_format=torch.channels_last)[0]  # the layout that torch's uint8 kernel likes
        out = tvf.resize(out, [size, size], mode, antialias=True)
    return (out.flip(2) if flip else out).contiguous()


def _luma(x: Tensor) -> Tensor:
    """Grey values. (N, 3, ...) -> (N, ...)."""
    r, g, b = x.unbind(1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _luma(x.mean((2, 3)))[:, None, None, None]  # the mean of the grey image: both are linear
    x.mul_(factor).add_(mean.mul_(1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    grey = _luma(x)[:, None].mul_(1 - factor)
    x.mul_(factor).add_(grey).clamp_(0, 1)


@lru_cache(maxsize=8)
def _hue_centres(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor((1 / 2, 1 / 3, 2 / 3), dtype=dtype).view(3, 1, 1).to(device)


def _turn_hue(x: Tensor, turn: Tensor) -> None:
    """Turn the hue hexagon without building HSV: value and chroma stay, so only the angle is needed.

    turn: (N, 1, 1) in [1/2, 3/2], 1 is none. Rounding may leave [0, 1].
    """
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    chroma = (high - low).mul_(6).clamp_min_(1e-12)  # six times it: the angle is in turns, so that frac_ wraps it
    # Away from red the angle is 1/6 + (g + b - r - min) / (6 chroma) in all sextants; its side is the sign of g - b.
    angle = torch.add(g, b, out=high).sub_(r).sub_(low).div_(chroma).add_(1 / 6)
    angle.copysign_(g - b).add_(turn).frac_()
    # Back: r = min + chroma (6 t(1/2) - 1), g, b = min + chroma (2 - 6 t(1/3, 2/3)); t(c): |angle - c| in [1/6, 1/3].
    torch.sub(angle[:, None], _hue_centres(x.dtype, x.device), out=x).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(low.sub_(chroma, alpha=1 / 6), chroma, r, out=r)
    low, chroma, rest = low.add_(chroma, alpha=0.5)[:, None], chroma[:, None], x[:, 1:]
    torch.addcmul(low, chroma, rest, value=-1, out=rest)


def _hue(x: Tensor, turn: Tensor) -> None:
    _turn_hue(x, turn[:, 0] + 1)
    x.clamp_(0, 1)


def _grey(x: Tensor, rows: Tensor) -> None:
    """Some of the samples in place. x: (N, 3, S, S), rows: (M,)."""
    x.index_copy_(0, rows, _luma(x.index_select(0, rows))[:, None].expand(-1, 3, -1, -1))


JITTER = (_brightness, _contrast, _saturation, _hue)


def _jitter(x: Tensor, factors: Tensor, order: Tensor) -> None:
    """ColorJitter in place with an order per sample. x: (N, 3, S, S), factors: (N, 4), order: (N, 4) sorted; a CPU's."""
    factors = factors.to(x)[:, :, None, None, None]
    for ops in order.T.tolist():  # without copies: in sorted rows, those that share an operation are few slices
        start = 0
        for op, run in groupby(ops):
            stop = start + len(list(run))
            JITTER[op](x[start:stop], factors[start:stop, op])
            start = stop


def _colour_matrices(params: Params, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All colours but hue as matrices on (r, g, b), in float64 on the CPU.

    A view is three blends, a turn of the hue and three blends more, those that a sample's order leaves out being none;
    then grey and the permutation. -> blends (B, 6, 3, 3), weights of the pixels' mean in them (B, 6, 1, 3), turn (B, 1)
    and the last matrix (B, 3, 3).
    """
    one, luma = torch.eye(3, dtype=torch.float64), torch.tensor([LUMA], dtype=torch.float64).expand(3, 3)
    factors = torch.where(params.jitter[:, None], params.factors, torch.tensor((1.0, 1.0, 1.0, 0.0)).double())
    keep, lose = factors[:, :3, None, None], 1 - factors[:, :3, None, None]
    place = params.order.argsort(1)  # of each operation
    stage = place[:, :3] + 2 * (place[:, :3] > place[:, 3:])
    each = torch.arange(len(stage))
    blends = one.repeat(len(stage), 6, 1, 1)
    blends[each[:, None], stage] = keep * one
    blends[each, stage[:, 2]] += lose[:, 2] * luma  # saturation: towards the grey image
    means = torch.zeros(len(stage), 6, 1, 3, dtype=torch.float64)
    means[each, stage[:, 1]] = lose[:, 1] * luma[:1]  # contrast: towards its mean
    grey = torch.where(params.grey[:, None, None], luma, one)
    if recipe.grey_first and any(recipe.jitter):
        blends[:, 0], means[:, 0] = blends[:, 0] @ grey, means[:, 0] @ grey
        grey = one
    return blends, means, factors[:, 3:], one[params.permutation] @ grey


def _colour_at_once(x: Tensor, params: Params, recipe: Recipe) -> Tensor:
    """`colour_batch` for a GPU: few launches, whatever the batch; every sample goes through all of them."""
    blends, means, turn, last = (m.flatten(1) for m in _colour_matrices(params, recipe))
    turn = turn.to(x.dtype) + 1  # rounded as on a CPU
    blends, means, turn, last, taps = _send((blends, means, turn, last, _blur_taps(params.sigma)), x.device, x.dtype)
    shape, x = x.shape, x.flatten(2)
    if any(recipe.jitter):
        for i, (blend, mean) in enumerate(zip(blends.split(9, 1), means.split(3, 1), strict=True)):
            if i == 3:
                _turn_hue(x.view(shape), turn[:, :, None])  # the next blend clamps
            bias = torch.bmm(mean.unflatten(1, (1, 3)), x.mean(2, keepdim=True))
            x = torch.baddbmm(bias, blend.unflatten(1, (3, 3)), x).clamp_(0, 1)
    if recipe.grey or recipe.permute:
        x = torch.bmm(last.unflatten(1, (3, 3)), x)
    return _blur(x.view(shape), taps) if recipe.blur else x.view(shape)


@lru_cache(maxsize=8)
def _blur_basis(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[t, i, j] = 1 where tap t of output i reads input j, reflected at the borders. -> (taps, size * size)."""
    taps = torch.arange(2 * BLUR_RADIUS + 1)
    reads = (torch.arange(size) + taps[:, None] - BLUR_RADIUS).abs()
    reads = torch.where(reads >= size, 2 * (size - 1) - reads, reads)
    return torch.nn.functional.one_hot(reads, size).reshape(len(taps), -1).to(device, dtype)


def _blur_taps(sigma: Tensor) -> Tensor:
    """Weights of a Gaussian of each standard deviation; of none for 0. (N,) -> (N, 13) float64."""
    taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1)
    return (taps / sigma[:, None].clamp(min=1e-3)).square().mul(-0.5).softmax(1)


def _blur(x: Tensor, taps: Tensor) -> Tensor:
    """Gaussian blur with the weights of `_blur_taps`, reflected borders. x: (N, 3, S, S), taps: (N, 13)."""
    size = x.shape[-1]
    band = taps @ _blur_basis(size, x.dtype, x.device)
    band = band.view(-1, 1, size, size).expand(-1, 3, -1, -1).reshape(-1, size, size)
    x = x.reshape(-1, size, size)
    if x.device.type != "cpu" or size <= 32:
        return torch.bmm(torch.bmm(band, x), band.mT).view(-1, 3, size, size)
    # on a CPU, most of a large band is zeros not worth multiplying
    cuts = [(at, at + 16, max(0, at - BLUR_RADIUS), at + 16 + BLUR_RADIUS) for at in range(0, size, 16)]
    x = torch.cat([torch.bmm(band[:, a:b, lo:hi], x[:, lo:hi]) for a, b, lo, hi in cuts], 1)
    x = torch.cat([torch.bmm(x[:, :, lo:hi], band[:, a:b, lo:hi].mT) for a, b, lo, hi in cuts], 2)
    return x.view(-1, 3, size, size)


def colour_batch(x: Tensor, params: Params, recipe: Recipe) -> Tensor:
    """Jitter, grey, channel permutation and blur on x's device. (B, 3, S, S) in [0, 1] -> same."""
    if not (any(recipe.jitter) or recipe.grey or recipe.blur or recipe.permute):
        return x
    if x.device.type != "cpu":
        return _colour_at_once(x, params, recipe)
    code = torch.where(params.jitter, (params.order * torch.tensor((64, 16, 4, 1))).sum(1), 256)  # unjittered last
    by_order, out = code.argsort(stable=True), torch.empty_like(x)
    for at in _pieces(len(x), x.shape[-1] ** 2, x.device):
        rows = by_order[at]
        jittered = rows[params.jitter[rows]]
        grey, blurred = params.grey[rows].nonzero()[:, 0], params.sigma[rows].nonzero()[:, 0]
        y = x.index_select(0, rows)
        if len(grey) and recipe.grey_first:
            _grey(y, grey)
        if len(jittered):
            _jitter(y[: len(jittered)], params.factors[jittered], params.order[jittered])
        if len(grey) and not recipe.grey_first:
            _grey(y, grey)
        if recipe.permute:
            y = y.gather(1, params.permutation[rows][:, :, None, None].expand_as(y))
        if len(blurred):
            taps = _blur_taps(params.sigma[rows[blurred]]).to(y.dtype)
            y.index_copy_(0, blurred, _blur(y.index_select(0, blurred), taps))
        out.index_copy_(0, rows, y)
    return out
