"""The augmentation engine against torchvision: same parameter, same image; same recipe, same distribution."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

import trainers.shared.views as views

torch.set_num_threads(1)
MANY = 6000
OPS = (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation, tvf.adjust_hue)
EVERYTHING = views.Recipe(jitter=(0.8, 0.8, 0.8, 0.5), grey=0.3, blur=0.5, permute=0.5)


def images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth noise with saturated and grey regions. -> (count, 3, height, width) uint8."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=g) * 1.6 - 0.3
    x = tvf.resize(coarse, [height, width], antialias=True) + 0.1 * torch.randn(count, 3, height, width, generator=g)
    x[..., :2, :] = x[:, :1, :2, :]  # rows without any chroma
    return (x.clamp(0, 1) * 255).byte()


def draw(recipe: views.Recipe, count: int, height: int, width: int, size: int, seed: int = 0, view: int = 0):
    sides = torch.full((count,), height), torch.full((count,), width)
    return views.sample_params(recipe, seed, 0, torch.arange(count), view, *sides, size)


def rows_of(params: views.Params, rows: Tensor) -> views.Params:
    return views.Params(**{f.name: getattr(params, f.name)[rows] for f in fields(params)})


def reference_colours(x: Tensor, params: views.Params, recipe: views.Recipe) -> Tensor:
    """The same parameters through torchvision's functional, one image at a time."""
    out = []
    for i, y in enumerate(x):
        if recipe.grey_first and params.grey[i]:
            y = tvf.rgb_to_grayscale(y, 3)
        if params.jitter[i]:
            for op in params.order[i].tolist():
                y = OPS[op](y, params.factors[i, op].item())
        if not recipe.grey_first and params.grey[i]:
            y = tvf.rgb_to_grayscale(y, 3)
        y = y[params.permutation[i]]
        if params.sigma[i]:
            y = tvf.gaussian_blur(y, [13, 13], [params.sigma[i].item()] * 2)
        out.append(y)
    return torch.stack(out)


# Parameters


def test_uniforms_are_uniform():
    u = views.uniforms(0, 0, torch.arange(MANY), 0, 8)
    assert u.dtype == torch.float64 and u.min() >= 0 and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 5 * (1 / 12 / MANY) ** 0.5
    assert (u.var(0) - 1 / 12).abs().max() < 5 * (1 / 180 / MANY) ** 0.5
    for column in u.T:
        assert ks_2samp(column, torch.rand(MANY, generator=torch.Generator().manual_seed(1))).pvalue > 1e-4


@pytest.mark.parametrize("other", ["seed", "epoch", "view", "index", "column"])
def test_uniforms_of_neighbours_are_independent(other):
    indices = torch.arange(MANY)
    u = views.uniforms(3, 5, indices, 1, 4)
    changed = {
        "seed": views.uniforms(4, 5, indices, 1, 4),
        "epoch": views.uniforms(3, 6, indices, 1, 4),
        "view": views.uniforms(3, 5, indices, 0, 4),
        "index": views.uniforms(3, 5, indices + 1, 1, 4),
        "column": u.roll(1, 1),
    }[other]
    assert not torch.isclose(u, changed).all(1).any()
    correlation = torch.corrcoef(torch.cat((u, changed), 1).T)[:4, 4:]
    if other == "column":
        correlation = correlation.diagonal()
    assert correlation.abs().max() < 5 / MANY**0.5


def test_words_do_not_commute():
    """(seed, epoch, view) = (1, 2, 3) in any other order is another stream."""
    u = [views.uniforms(a, b, torch.arange(9), c, 2) for a, b, c in [(1, 2, 3), (2, 1, 3), (3, 2, 1), (1, 3, 2)]]
    assert len({tuple(x.flatten().tolist()) for x in u}) == 4


def test_the_stream_is_pinned():
    """Another hash is another run: a resumed or repeated one would see other views."""
    expected = torch.tensor(
        [[0.41012420183845366, 0.06388428493798981], [0.7358915966404102, 0.17499303897160368]], dtype=torch.float64
    )
    assert torch.equal(views.uniforms(1, 2, torch.tensor([3, 2**40]), 4, 2), expected)


def test_recipes_are_the_authors():
    v1, v2 = views.MOCO_V1, views.MOCO_V2
    assert (v1.scale, v1.jitter, v1.jitter_prob, v1.grey, v1.grey_first) == ((0.2, 1.0), (0.4,) * 4, 1.0, 0.2, True)
    assert (v2.scale, v2.jitter, v2.jitter_prob) == ((0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8)
    assert (v2.grey, v2.grey_first, v2.blur, v2.blur_sigma) == (0.2, False, 0.5, (0.1, 2.0))
    crops = views.SWAV_MULTICROP
    assert (crops.scale, crops.jitter, crops.jitter_prob) == ((0.14, 1.0), (0.8, 0.8, 0.8, 0.2), 0.8)
    assert (crops.grey, crops.grey_first, crops.blur, crops.blur_sigma) == (0.2, False, 0.5, (0.1, 2.0))
    assert [r.flip for r in views.RECIPES.values()] == [0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("recipe", [*views.RECIPES.values(), EVERYTHING])
def test_params_do_not_depend_on_the_batch(recipe):
    g = torch.Generator().manual_seed(0)
    heights, widths = torch.randint(40, 300, (2, 64), generator=g)
    indices = torch.randperm(64, generator=g)
    whole = views.sample_params(recipe, 7, 2, indices, 1, heights, widths, 32)
    for rows in (torch.arange(64).flip(0), torch.tensor([5]), torch.tensor([60, 3, 17])):
        part = views.sample_params(recipe, 7, 2, indices[rows], 1, heights[rows], widths[rows], 32)
        for f in fields(part):
            assert torch.equal(getattr(part, f.name), getattr(whole, f.name)[rows]), f.name
    other = views.sample_params(recipe, 8, 2, indices, 1, heights, widths, 32)
    names = [f.name for f in fields(other) if f.name != "order"]  # random even where nothing is jittered
    same = all(torch.equal(getattr(other, name), getattr(whole, name)) for name in names)
    assert same == (recipe == views.EVAL)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),
        (60, 300, (0.9, 1.0), (3 / 4, 4 / 3)),  # nothing fits: always the fallback
        (300, 60, (0.9, 1.0), (3 / 4, 4 / 3)),
        (40, 61, (0.7, 1.0), (3 / 4, 4 / 3)),  # often several tries, sometimes the fallback
    ],
)
def test_boxes_are_distributed_like_torchvisions(height, width, scale, ratio):
    ours = draw(views.Recipe(scale=scale, ratio=ratio), MANY, height, width, 32).box
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = torch.tensor([tv.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(MANY)]).double()
    assert (ours == ours.round()).all() and (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    derived = [torch.cat((b, b[:, 2:3] * b[:, 3:], b[:, 3:] / b[:, 2:3]), 1) for b in (ours, theirs)]
    for mine, reference in zip(derived[0].T, derived[1].T, strict=True):
        assert ks_2samp(mine, reference).pvalue > 1e-4
    for at, side in ((0, height), (1, width)):  # the last corner is as likely as the others, which KS cannot see
        mine, reference = ((b[:, at] + b[:, at + 2] == side).double().mean() for b in (ours, theirs))
        assert abs(mine - reference) < 5 * (0.5 / MANY) ** 0.5


def test_colours_are_distributed_like_torchvisions():
    recipe = replace(views.MOCO_V2, jitter=(0.4, 1.3, 0.2, 0.1))
    ours = draw(recipe, MANY, 32, 32, 32)
    jitter = tv.ColorJitter(*recipe.jitter)
    torch.manual_seed(0)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(MANY)]
    theirs = torch.tensor([d[1:] for d in drawn])
    for mine, reference in zip(ours.factors.T, theirs.T, strict=True):
        assert ks_2samp(mine, reference).pvalue > 1e-4
    place = torch.tensor((64, 16, 4, 1))
    mine, reference = (
        torch.bincount((o * place).sum(1), minlength=256) for o in (ours.order, torch.stack([d[0] for d in drawn]))
    )
    assert ((mine > 0) == (reference > 0)).all() and (mine > 0).sum() == 24
    assert (mine[mine > 0] - MANY / 24).abs().max() < 5 * (MANY / 24) ** 0.5
    for happens, probability in ((ours.jitter, 0.8), (ours.grey, 0.2), (ours.flip, 0.5), (ours.sigma > 0, 0.5)):
        assert abs(happens.double().mean() - probability) < 5 * (probability * (1 - probability) / MANY) ** 0.5
    sigma = ours.sigma[ours.sigma > 0]
    reference = torch.empty(MANY, dtype=torch.float64).uniform_(0.1, 2.0, generator=torch.Generator().manual_seed(0))
    assert ks_2samp(sigma, reference).pvalue > 1e-4
    assert (torch.corrcoef(ours.factors.T) - torch.eye(4)).abs().max() < 5 / MANY**0.5
    gates = torch.stack((ours.flip, ours.jitter, ours.grey, ours.sigma > 0)).double()
    assert (torch.corrcoef(gates) - torch.eye(4)).abs().max() < 5 / MANY**0.5


def test_padded_corners_and_permutations():
    params = draw(replace(views.CIFAR, permute=0.6), MANY, 32, 32, 32)
    assert set(params.box[:, 0].tolist()) == set(params.box[:, 1].tolist()) == set(range(-4, 5))
    counts = torch.bincount((params.box[:, 0] + 4).long())
    assert (counts - MANY / 9).abs().max() < 5 * (MANY / 9) ** 0.5
    assert (params.box[:, 2:] == 32).all()
    assert (params.permutation.sort(1).values == torch.arange(3)).all()
    kept = (params.permutation == torch.arange(3)).all(1).double().mean()
    assert abs(kept - (0.4 + 0.6 / 6)) < 5 * (0.25 / MANY) ** 0.5


# Crops


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (96, 64, 32), (40, 50, 64), (33, 47, 30)])
def test_crops_are_torchvisions(kind, height, width, size):
    recipe = views.Recipe(interpolation=kind)
    x, params = images(48, height, width), draw(recipe, 48, height, width, size)
    mine = views.crop_batch(x, params, size, recipe)
    assert mine.dtype == torch.float32 and params.flip.any() and not params.flip.all()
    for i, y in enumerate(mine):
        box = [int(v) for v in params.box[i]]
        expected = tvf.resized_crop(
            x[i].float() / 255, *box, [size, size], interpolation=InterpolationMode(kind), antialias=True
        )
        expected = expected.flip(2) if params.flip[i] else expected
        torch.testing.assert_close(y, expected.clamp(0, 1), atol=1e-5, rtol=0)
    exact = views.crop_batch(x.double() / 255, params, size, recipe)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(mine.double(), exact, atol=1e-5, rtol=0)


def test_padded_crops_are_exact():
    x, params = images(64, 32, 32), draw(views.CIFAR, 64, 32, 32, 32)
    x[..., 0, :] = 255  # an edge that a wrong shift would move
    mine = views.crop_batch(x, params, 32, views.CIFAR)
    for i, y in enumerate(mine):
        top, left = (int(v) + 4 for v in params.box[i, :2])
        expected = tvf.pad(x[i], [4])[:, top : top + 32, left : left + 32]
        assert torch.equal(y, (expected.flip(2) if params.flip[i] else expected).float() / 255)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 71), (20, 20)])
def test_padded_crops_see_a_larger_image_whole(height, width):
    x, params = images(64, height, width), draw(views.CIFAR, 64, height, width, 32)
    mine = views.crop_batch(x, params, 32, views.CIFAR)
    small = tvf.resize(x.float() / 255, [32], antialias=True)
    corners = (params.box[:, :2] / params.box[:, 2:] * 32).round().int() + 4
    assert {c.max().item() for c in corners.T} == {8, small.shape[3] - 24} and corners.min() == 0
    for i, y in enumerate(mine):
        top, left = corners[i].tolist()
        expected = tvf.pad(small[i], [4])[:, top : top + 32, left : left + 32]
        assert ((expected == 0) == (y.flip(2) if params.flip[i] else y).eq(0)).all(), "black where it was padded"
        torch.testing.assert_close(y, expected.flip(2) if params.flip[i] else expected, atol=0.02, rtol=0)
        streamed = views.crop_one(x[i], params, i, 32, views.CIFAR).float() / 255
        torch.testing.assert_close(streamed, expected.flip(2) if params.flip[i] else expected, atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct, short", [(0.875, 36), (1.0, 32)])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (40, 61), (61, 40), (30, 37), (40, 42), (42, 40), (9, 12)])
def test_centre_crops_are_torchvisions(height, width, crop_pct, short, kind):
    recipe = replace(views.EVAL, crop_pct=crop_pct, interpolation=kind)
    x, params = images(4, height, width), draw(recipe, 4, height, width, 32)
    resized = tvf.resize(x.float() / 255, [short], InterpolationMode(kind), antialias=True)
    expected = tvf.center_crop(resized, [32, 32]).clamp(0, 1)
    torch.testing.assert_close(views.crop_batch(x, params, 32, recipe), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [32, 90])
def test_bicubic_views_are_what_pillow_makes_of_the_same_image(side):
    """The authors' transforms ran on Pillow images: rounded to bytes after each of two passes, here not at all."""
    recipe = replace(views.EVAL, crop_pct=1.0, interpolation="bicubic")
    x = images(4, side, side) // 2 + 64  # keeps the overshoot inside: bytes clip it between the passes too
    theirs = tv.Compose([tv.ToPILImage(), tv.Resize(64, InterpolationMode.BICUBIC), tv.CenterCrop(64), tv.ToTensor()])
    expected = torch.stack([theirs(image) for image in x])
    resident = views.crop_batch(x, draw(recipe, 4, side, side, 64), 64, recipe)
    streamed = [views.crop_one(image, draw(recipe, 4, side, side, 64), i, 64, recipe) for i, image in enumerate(x)]
    for ours in (resident, torch.stack(streamed).float() / 255):
        assert (ours - expected).abs().max() < 1.5 / 255
    bilinear = replace(recipe, interpolation="bilinear")
    assert (views.crop_batch(x, draw(bilinear, 4, side, side, 64), 64, bilinear) - expected).abs().max() > 6 / 255


def test_whole_centre_is_the_image():
    x, whole = images(3, 32, 32), replace(views.EVAL, crop_pct=1.0)
    assert torch.equal(views.crop_batch(x, draw(whole, 3, 32, 32, 32), 32, whole), x.float() / 255)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", ["moco_v2", "linear", "cifar", "eval"])
def test_both_paths_cut_the_same_box(name, kind):
    recipe = replace(views.RECIPES[name], interpolation=kind)
    for height, width in [(64, 64)] if recipe.crop == "padded" else [(96, 80), (33, 64)]:
        size = 64 if recipe.crop == "padded" else 32
        x, params = images(32, height, width), draw(recipe, 32, height, width, size)
        if kind == "bicubic":  # torch's uint8 kernel also clips between its two passes: keep the overshoot inside
            x = x // 2 + 64
        resident = views.crop_batch(x, params, size, recipe) * 255
        streamed = torch.stack([views.crop_one(x[i], params, i, size, recipe) for i in range(32)])
        assert streamed.dtype == torch.uint8 and views.crop_one(x[0], params, 0, size, recipe).is_contiguous()
        assert (resident - streamed).abs().max() < 1.5
        assert recipe.crop == "centre" or (resident - streamed.flip(3)).abs().max() > 20


# Colours


@pytest.mark.parametrize("op", range(4), ids=["brightness", "contrast", "saturation", "hue"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_jitter_is_torchvisions(op, dtype):
    x = images(40, 24, 24).to(dtype) / 255
    factors = torch.linspace(-0.5, 0.5, 40) if op == 3 else torch.linspace(0, 2, 40)
    expected = torch.stack([OPS[op](image, f.item()) for image, f in zip(x, factors, strict=True)])
    mine = x.clone()
    views.JITTER[op](mine, factors.to(dtype)[:, None, None, None])
    assert mine.dtype == dtype and mine.min() >= 0 and mine.max() <= 1
    torch.testing.assert_close(mine, expected, atol=1e-4 if op == 3 else 1e-5, rtol=0)
    assert (mine - x).abs().max() > 0.1


@pytest.mark.parametrize("size", [30, 32, 64, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blur_is_torchvisions(size, dtype):
    x, sigma = images(12, size, size).to(dtype) / 255, torch.linspace(0.1, 2.0, 12)
    expected = torch.stack([tvf.gaussian_blur(i, [13, 13], [s.item()] * 2) for i, s in zip(x, sigma, strict=True)])
    torch.testing.assert_close(views._blur(x, views._blur_taps(sigma.double()).to(dtype)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", [*views.RECIPES.values(), EVERYTHING, replace(EVERYTHING, grey_first=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_colour_pipeline_is_torchvisions(recipe, dtype):
    params, x = draw(recipe, 96, 32, 32, 32), images(96, 32, 32).to(dtype) / 255
    before, mine = x.clone(), views.colour_batch(x, params, recipe)
    assert torch.equal(x, before) and mine.dtype == dtype
    # A contrast of 1.8 after a hue of 1e-4 amplifies it; torchvision's hue is single precision whatever comes in.
    torch.testing.assert_close(mine, reference_colours(x, params, recipe), atol=3e-4, rtol=0)


@pytest.mark.parametrize("recipe", [views.MOCO_V1, views.MOCO_V2, EVERYTHING], ids=["v1", "v2", "everything"])
@pytest.mark.parametrize("size", [32, 30])
def test_pixels_do_not_depend_on_the_batch(recipe, size):
    params, source = draw(recipe, 80, 40, 40, size), images(80, 40, 40)
    x = views.crop_batch(source, params, size, recipe)
    whole = views.colour_batch(x, params, recipe)
    for rows in (torch.arange(80).flip(0), torch.tensor([11]), torch.tensor([70, 2, 33, 5]), torch.arange(40, 80)):
        part = rows_of(params, rows)
        cropped = views.crop_batch(source[rows], part, size, recipe)
        torch.testing.assert_close(cropped, x[rows], atol=1e-6, rtol=0)
        torch.testing.assert_close(views.colour_batch(x[rows], part, recipe), whole[rows], atol=2e-6, rtol=0)


def test_views_and_epochs_differ():
    x, sides = images(8, 32, 32), (torch.full((8,), 32),) * 2
    out = []
    for epoch, view in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        params = views.sample_params(views.MOCO_V2, 0, epoch, torch.arange(8), view, *sides, 32)
        out.append(views.colour_batch(views.crop_batch(x, params, 32, views.MOCO_V2), params, views.MOCO_V2))
    assert torch.equal(out[0], out[3])
    assert min((out[0] - out[i]).abs().amax((1, 2, 3)).min() for i in (1, 2)) > 0.05


@pytest.mark.parametrize("kind", ["train", "train_nocrop", "test"])
@pytest.mark.parametrize("streamed", [False, True])
def test_rotations_are_the_authors(kind, streamed):
    """SSKD's own data set on six images: the same flips and corners give the same four views."""
    g = np.load(GOLDEN / "loss" / "sskd_dataset.npz")
    x = torch.from_numpy(g["rows"]).view(-1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.5071, 0.4866, 0.4409), (0.2675, 0.2565, 0.2761)))
    for k, recipe in enumerate(views.SSKD_ROTATIONS):
        params = draw(recipe, len(x), 32, 32, 32)
        corner = torch.from_numpy(g["train_crop_top_left"][:, k]) - 4.0 if kind == "train" else torch.zeros(6, 2)
        params.box = torch.cat([corner, torch.full((6, 2), 32.0)], 1).double()
        params.flip = torch.zeros(6, dtype=torch.bool) if kind == "test" else torch.from_numpy(g[f"{kind}_flipped"])
        if streamed:
            crop = torch.stack([views.crop_one(x[i], params, i, 32, recipe) for i in range(6)]) / 255
        else:
            crop = views.crop_batch(x, params, 32, recipe)
        theirs = torch.from_numpy(g[f"{kind}_views"])[:, k]
        crop = crop if kind == "train_nocrop" else (crop - mean) / std  # that one was recorded before normalisation
        torch.testing.assert_close(crop, theirs, atol=1e-5, rtol=0)


def test_rotations_share_one_flip_and_nothing_else():
    flips, boxes = [], []
    for k, recipe in enumerate(views.rotations(views.LINEAR)):
        params = draw(recipe, MANY, 30, 50, 32, view=k)
        flips.append(params.flip)
        boxes.append(params.box)
        height, width = (50, 30) if k % 2 else (30, 50)
        assert (params.box[:, 0] + params.box[:, 2]).max() <= height
        assert (params.box[:, 1] + params.box[:, 3]).max() <= width
    assert all(torch.equal(f, flips[0]) for f in flips) and abs(flips[0].double().mean() - 0.5) < 0.03
    assert all((boxes[0] != b).any(1).double().mean() > 0.9 for b in boxes[1:])


def test_turned_crops_of_oblong_images_lie_inside_them():
    x = torch.full((16, 3, 30, 50), 255, dtype=torch.uint8)
    for recipe in views.rotations(views.LINEAR):
        params = draw(recipe, 16, 30, 50, 24)
        assert views.crop_batch(x, params, 24, recipe).min() > 0.999
        assert views.crop_one(x[0], params, 0, 24, recipe).min() == 255


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_views():
    x, params = images(64, 32, 32), draw(EVERYTHING, 64, 32, 32, 32)
    expected = views.colour_batch(views.crop_batch(x, params, 32, EVERYTHING), params, EVERYTHING)
    mine = views.colour_batch(views.crop_batch(x.cuda(), params, 32, EVERYTHING), params, EVERYTHING)
    torch.testing.assert_close(mine.cpu(), expected, atol=3e-4, rtol=0)
