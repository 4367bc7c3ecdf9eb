"""Few launches and no wait on a device, whatever the batch; counted on meta tensors, which raise where a wait would be."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate import debug_launcher
from test_views import EVERYTHING, draw, images
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
from trainers import disco, moco, rkd
from trainers.shared import networks, views

torch.set_num_threads(1)
RECIPES = {**views.RECIPES, "ssl_small": views.ssl_small(1.0, 0.2, 0.5), "everything": EVERYTHING}
RECIPES |= {f"turned by {k}": recipe for k, recipe in enumerate(views.rotations(EVERYTHING))}
NO_KERNEL = {"aten::detach", "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::new_empty"}


class Launches(TorchDispatchMode):
    """Counts the operations, but for views, that take or give a tensor of `device`."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.counts, self.copies = device, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        there = [
            any(isinstance(x, Tensor) and x.device.type == self.device for x in tree_leaves(tensors))
            for tensors in ((args, kwargs), out)
        ]
        name = func._schema.name
        if any(there) and not func.is_view and name not in NO_KERNEL:
            self.counts[name] += 1
            self.copies += name == "aten::_to_copy" and not there[0]
        return out


def view(recipe: views.Recipe, x: Tensor, size: int, number: int = 0) -> Tensor:
    params = draw(recipe, len(x), *x.shape[2:], size, view=number)
    return views.colour_batch(views.crop_batch(x, params, size, recipe), params, recipe)


# Views


@pytest.mark.parametrize("name", RECIPES)
def test_two_views_are_at_most_150_launches_whatever_the_batch(name):
    totals = []
    for count, size in ((5, 32), (700, 32), (64, 96)):
        x = torch.zeros(count, 3, 40, 50, dtype=torch.uint8, device="meta")
        view(RECIPES[name], x, size)  # fills the tables that are kept
        with Launches() as seen:
            out = [view(RECIPES[name], x, size, number) for number in range(2)]
        assert {(o.device.type, tuple(o.shape)) for o in out} == {("meta", (count, 3, size, size))}
        # a view's crop, its colours and its flip before a turn
        assert seen.copies <= 4 + 2 * (RECIPES[name].turns is not None)
        totals.append(seen.counts.total())
    assert 0 < totals[0] <= 150 and len(set(totals)) == 1


MORE = {
    **RECIPES,
    "grey first": replace(EVERYTHING, grey_first=True),
    "grey first and no jitter": views.Recipe(grey=0.5, grey_first=True),
    "blur alone": views.Recipe(blur=0.5),
    "brightness alone": views.Recipe(jitter=(0.4, 0.0, 0.0, 0.0)),
}


@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("name", [n for n, r in MORE.items() if any(r.jitter) or r.grey or r.blur or r.permute])
def test_colours_made_at_once_are_those_made_in_slices(name, size):
    """What a GPU computes and what a CPU does; float32 rounds the angle of a hue to 1e-6 on both."""
    params, x = draw(MORE[name], 80, size, size, size), images(80, size, size).double() / 255
    for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 3e-6)):
        before = x.to(dtype)
        mine = views._colour_at_once(before, params, MORE[name])
        torch.testing.assert_close(mine, views.colour_batch(before, params, MORE[name]), atol=atol, rtol=0)
        assert torch.equal(before, x.to(dtype)) and mine.dtype == dtype


# BatchNorm


def grouped(kind: type, groups: int, share: int = 16, **options) -> nn.Module:
    torch.manual_seed(0)
    norm = kind(5, **options).double()
    for p in norm.parameters():
        nn.init.normal_(p)
    return common.set_batch_norm_groups(norm, share // groups, share)


def passed(norm: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one pass."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * torch.linspace(-1, 1, y.numel()).double().view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]


@pytest.mark.parametrize(
    ("kind", "shape", "options"),
    [
        (nn.BatchNorm2d, (16, 5, 3, 4), {}),
        (nn.BatchNorm2d, (32, 5, 3, 4), {"affine": False}),  # two patches an image
        (nn.BatchNorm1d, (16, 5), {}),
        (BatchNormAct2d, (16, 5, 3, 4), {}),
    ],
)
@pytest.mark.parametrize("groups", [4, 8])
def test_groups_at_once_are_batch_norm_of_each_group(kind, shape, options, groups):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    expected, norm = passed(grouped(kind, groups, **options), x), grouped(kind, groups, **options)
    norm._one_by_one = lambda y: norm._at_once(y, groups)
    found = passed(norm, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert x.dim() == 2 or found[0].is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_of_many_small_groups_is_one_call_on_a_device():
    norm = grouped(nn.BatchNorm2d, 8).to("meta")
    for side, calls in ((16, 1), (1024, 8)):  # large groups are worth a call each: nothing is copied
        with Launches() as seen:
            norm(torch.empty(16, 5, side, side, dtype=torch.float64, device="meta"))
        assert seen.counts["aten::native_batch_norm"] + seen.counts["aten::cudnn_batch_norm"] == calls
        assert seen.counts.total() <= 10


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    over = [d for d in range(x.dim()) if d != 1]
    return x.mean(over), (x.var(over, correction=0) + eps).rsqrt()


def gather_stats(x, means, invstds, running_mean, running_var, momentum, eps, counts) -> tuple[Tensor, Tensor]:
    n, total = counts[:, None], counts.sum()
    mean = (means * n).sum(0) / total
    var = ((invstds**-2 - eps + means**2) * n).sum(0) / total - mean**2
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * total / (total - 1), momentum)
    return mean, (var + eps).rsqrt()


def along(v: Tensor, x: Tensor) -> Tensor:
    return v.view([1, -1] + [1] * (x.dim() - 2))


def elemt(x, weight, bias, mean, invstd, eps) -> Tensor:
    return (x - along(mean, x)) * along(invstd * weight, x) + along(bias, x)


def backward_reduce(grad, x, mean, invstd, weight, *_) -> tuple[Tensor, ...]:
    over = [d for d in range(x.dim()) if d != 1]
    sum_dy, sum_dy_xmu = grad.sum(over), (grad * (x - along(mean, x))).sum(over)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def backward_elemt(grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts) -> Tensor:
    n = counts.sum()
    centred = (x - along(mean, x)) * along(invstd**2 * sum_dy_xmu / n, x)
    return (grad - along(sum_dy / n, x) - centred) * along(invstd * weight, x)


KERNELS = {
    "batch_norm_stats": stats, "batch_norm_gather_stats_with_counts": gather_stats, "batch_norm_elemt": elemt,
    "batch_norm_backward_reduce": backward_reduce, "batch_norm_backward_elemt": backward_elemt,
}  # fmt: skip
SHARES = (10, 6)


def synchronised_input(kind: type) -> Tensor:
    shape = (16, 5) if kind is nn.BatchNorm1d else (16, 5, 3, 4)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _synchronised(folder: str) -> None:
    """One pass over this process's share by the Function that is meant for CUDA; rank r writes folder/r.pt."""
    rank, found = dist.get_rank(), {}
    for kind in (nn.BatchNorm2d, BatchNormAct2d, nn.BatchNorm1d):
        with mock.patch.object(dist, "get_backend", lambda *_: "nccl"):
            norm = grouped(kind, 1)
        assert isinstance(norm, networks.GroupedBatchNorm)
        norm._synchronised = norm._synchronised_on_cuda
        x = synchronised_input(kind).split(SHARES)[rank].clone().requires_grad_()
        with mock.patch.multiple(torch, **KERNELS), Launches("cpu") as seen:
            y = norm(x)
        waits = {"aten::nonzero", "aten::_local_scalar_dense", "aten::index", "aten::masked_select"}
        assert seen.counts["c10d::allreduce_"] == 1 and not waits & set(seen.counts)
        with mock.patch.multiple(torch, **KERNELS):
            (y * y.detach().cos()).sum().backward()
        found[kind.__name__] = [y.detach(), x.grad, *(p.grad for p in norm.parameters()), *norm.buffers()]
    torch.save(found, f"{folder}/{rank}.pt")


def test_synchronised_batch_norm_on_cuda_is_batch_norm_of_all_images_and_never_waits(tmp_path):
    debug_launcher(_synchronised, (str(tmp_path),), num_processes=2)
    two = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    for kind in (nn.BatchNorm2d, BatchNormAct2d, nn.BatchNorm1d):
        norm, x = grouped(kind, 1), synchronised_input(kind).requires_grad_()
        y = norm(x)
        (y * y.detach().cos()).sum().backward()
        parts = list(zip(*(t[kind.__name__] for t in two), strict=True))
        for (one, other), whole in zip(parts[:2], (y.detach(), x.grad), strict=True):
            torch.testing.assert_close(torch.cat((one, other)), whole, rtol=1e-10, atol=1e-12)
        for (one, other), p in zip(parts[2:4], norm.parameters(), strict=True):
            torch.testing.assert_close(one + other, p.grad, rtol=1e-10, atol=1e-12)
        for (one, other), buffer in zip(parts[4:], norm.buffers(), strict=True):
            torch.testing.assert_close(one, buffer, rtol=1e-10, atol=1e-12)
            assert torch.equal(one, other)


# Optimisers and momentum encoders


def parameters(device: str = "cpu", dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """With every layout and what LARS leaves alone: a zero weight, a zero gradient."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=g, dtype=dtype) for s in ((4, 3, 3, 3), (7, 5), (6,), (), (2, 8, 1, 1), (3,))]
    tensors[0] = tensors[0].contiguous(memory_format=torch.channels_last)
    params = [nn.Parameter(t.to(device)) for t in [*tensors, torch.zeros(5, dtype=dtype)]]
    set_gradients(params, g)
    params[-2].grad.zero_()
    return params


def set_gradients(params: list[nn.Parameter], g: torch.Generator, factor: float = 1.0) -> None:
    for p in params:
        p.grad = torch.empty_like(p).copy_(factor * torch.randn(p.shape, generator=g, dtype=p.dtype))  # in p's layout


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lars_of_all_tensors_at_once_is_lars_of_each(clip, dtype):
    one, all_ = parameters(dtype=dtype), parameters(dtype=dtype)
    for params in (one, all_):
        params[0].grad = params[0].grad.contiguous()  # not as its weight lies in memory
        lars = common.LARS(params, 0.3, clip=clip, momentum=0.9, weight_decay=0.01)
        for some in [params] if params is all_ else [[p] for p in params]:
            lars._scale_gradients(some, 0.3, 0.01, None)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(one, all_, strict=True))
    assert not one[-2].grad.any() and torch.equal(one[-1].grad, parameters(dtype=dtype)[-1].grad)
    assert not torch.equal(one[0].grad, parameters(dtype=dtype)[0].grad)


def test_lars_is_a_few_dozen_launches_whatever_the_number_of_tensors():
    totals = []
    for times in (1, 20):
        params = [p for _ in range(times) for p in parameters("cpu")]
        lars = common.LARS(params, 0.3, clip=True, momentum=0.9, weight_decay=0.01)
        with torch.no_grad(), Launches() as seen:
            lars._scale_gradients(
                params, 0.3, 0.01, None
            )  # as on a device; meta tensors count otherwise once dynamo ran
        totals.append(seen.counts.total())
    assert totals[0] == totals[1] <= 30


def test_lars_under_a_grad_scaler_unscales_and_skips_by_itself():
    """Fused as on a GPU: no wait for whether a gradient overflowed, and momentum that a skipped step leaves at zero."""
    plain, scaled = parameters(), parameters()
    hyper = {"momentum": 0.9, "weight_decay": 0.01}
    first, second = common.LARS(plain, 0.3, **hyper), common.LARS(scaled, 0.3, **hyper, fused=True)
    scaler, g = torch.amp.GradScaler("cpu", init_scale=1024.0), torch.Generator()
    for step in range(4):
        overflow, late = step == 0, step < 2
        set_gradients(plain, g.manual_seed(step))
        set_gradients(scaled, g.manual_seed(step), scaler.scale(torch.ones(())).item())
        if late:  # as prototypes that are frozen at first
            plain[1].grad = scaled[1].grad = None
        if overflow:
            scaled[0].grad[0, 0] = torch.inf
        else:
            first.step()
        before = [p.detach().clone() for p in scaled]
        with mock.patch.object(Tensor, "item", side_effect=AssertionError("a wait")):
            scaler.step(second)
        scaler.update()
        assert all(torch.equal(p, b) for p, b in zip(scaled, before, strict=True)) == overflow
        torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-14)
    assert second.param_groups[0]["weight_decay"] == 0.01


def test_on_a_gpu_lars_is_fused():
    params = [nn.Parameter(torch.zeros(2, device="meta"))]
    with mock.patch.object(common.LARS, "__init__", return_value=None) as made:
        common.create_optimizer("lars", params, 0.1, momentum=0.9, weight_decay=0.0, device=torch.device("cuda"))
    assert made.call_args.kwargs["fused"] is True


@pytest.mark.parametrize("trainer", [moco, disco, rkd], ids=["moco", "disco", "rkd"])
def test_a_momentum_update_is_one_call_and_the_same_numbers(trainer):
    g = torch.Generator().manual_seed(0)
    pair = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 2)) for _ in range(2)]
    pair[0].to(memory_format=torch.channels_last)
    for p in [*pair[0].parameters(), *pair[1].parameters()]:
        p.data.normal_(generator=g)
    expected = [
        k.detach().lerp(q.detach(), 1 - 0.996) for k, q in zip(pair[0].parameters(), pair[1].parameters(), strict=True)
    ]
    with Launches("cpu") as seen:
        trainer.momentum_update(*pair, 0.996)
    assert all(torch.equal(k, e) for k, e in zip(pair[0].parameters(), expected, strict=True))
    assert seen.counts.total() == seen.counts["aten::_foreach_lerp_"] == 1
