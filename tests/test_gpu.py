"""What only a CUDA device can show: precisions, compiled networks, resuming, and that it computes what a CPU computes."""

import copy
import itertools
import math
import shutil

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from runs import TRAINERS, tiny_run
from test_views import EVERYTHING, draw, images

import common
import hub
import trainers.shared.networks as networks
import trainers.shared.views as views

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("digits_once"),
]


@pytest.fixture(autouse=True)
def launcher(monkeypatch):
    """Sets the precision as a launcher would, for this test alone."""
    AcceleratorState._reset_state(True)
    yield lambda precision: monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("method", TRAINERS)
def test_every_trainer_trains_in_every_precision(method, precision, launcher, tmp_path, tiny_teacher):
    launcher(precision)
    losses = [line["loss"] for line in tiny_run(method, tmp_path, tiny_teacher)]
    assert len(losses) == 8 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("method", TRAINERS)
def test_first_losses_are_those_of_a_cpu(method, launcher, tmp_path, tiny_teacher, monkeypatch):
    """Convolutions in full float32: TF32 keeps three digits."""
    launcher("no")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    on_gpu = tiny_run(method, tmp_path / "gpu", tiny_teacher)[0]["loss"]
    AcceleratorState._reset_state(True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        on_cpu = tiny_run(method, tmp_path / "cpu", tiny_teacher)[0]["loss"]
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("precision", ["no", "fp16"])
@pytest.mark.parametrize("method", ["smd", "moco", "swav"])
def test_a_resumed_run_comes_close_to_the_uninterrupted_one(method, precision, launcher, tmp_path, tiny_teacher):
    """Close and not equal: cuDNN may choose other algorithms, and atomic sums have no order."""
    launcher(precision)
    whole = tiny_run(method, tmp_path / "whole", tiny_teacher)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(hub.checkpoints(tmp_path / "resumed")[0])
    AcceleratorState._reset_state(True)
    resumed = tiny_run(method, tmp_path / "resumed", tiny_teacher, resume=True)
    assert [line["step"] for line in resumed] == list(range(8))
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02, abs=0.01)


@pytest.mark.parametrize("method", ["smd", "simsiam", "supervised"])
def test_compiled_networks_train(method, launcher, tmp_path, tiny_teacher):
    launcher("bf16")
    losses = [line["loss"] for line in tiny_run(method, tmp_path, tiny_teacher, compile=True)]
    assert len(losses) == 8 and all(map(math.isfinite, losses))


def test_views_are_those_of_a_cpu():
    x, params = images(64, 32, 32), draw(EVERYTHING, 64, 32, 32, 32)
    expected = views.colour_batch(views.crop_batch(x, params, 32, EVERYTHING), params, EVERYTHING)
    found = views.colour_batch(views.crop_batch(x.cuda(), params, 32, EVERYTHING), params, EVERYTHING).cpu()
    close = (found - expected).abs().amax((1, 2, 3)) < 1e-5
    # hue is a jump where two channels are equal: there rounding may choose the other side
    assert close.double().mean() > 0.9
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=0)


def test_batch_norm_in_groups_is_that_of_a_cpu():
    torch.manual_seed(0)
    on_cpu = common.set_batch_norm_groups(torch.nn.Sequential(torch.nn.BatchNorm2d(6)), 4, 16)
    on_gpu = copy.deepcopy(on_cpu).cuda()
    x = torch.randn(16, 6, 5, 5, requires_grad=True)
    y = x.detach().cuda().requires_grad_()
    weight = torch.randn(16, 6, 5, 5)
    (on_cpu(x) * weight).sum().backward()
    (on_gpu(y) * weight.cuda()).sum().backward()
    torch.testing.assert_close(y.grad.cpu(), x.grad, atol=1e-4, rtol=1e-4)
    for name, value in on_cpu.state_dict().items():
        torch.testing.assert_close(on_gpu.state_dict()[name].cpu(), value, atol=1e-5, rtol=1e-5)


@pytest.fixture
def alone():
    """A group of one process."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("last", [False, True], ids=["", "channels last"])
@pytest.mark.parametrize("shape", [(16, 6, 5, 5), (32, 6, 1, 1), (16, 6)], ids=["maps", "pixels", "vectors"])
def test_synchronised_batch_norm_alone_is_batch_norm(alone, shape, last):
    """Values, gradients and running statistics, by CUDA's own kernels: those of float64, rounded."""
    torch.manual_seed(0)
    means = 10 * torch.arange(6.0).sub(2).view(1, 6, *[1] * (len(shape) - 2))
    images, grad = (3 * torch.randn(shape) + means).cuda(), torch.randn(shape).cuda()
    images = images.to(memory_format=torch.channels_last) if last and images.dim() == 4 else images

    def measure(norm: torch.nn.Module, x: torch.Tensor, function) -> list[torch.Tensor]:
        y = function(x.requires_grad_(), norm.weight, norm.bias, norm.running_mean, norm.running_var)
        gradients = torch.autograd.grad(y, [x, *norm.parameters()], grad.to(y.dtype))
        return [y, *gradients, norm.running_mean, norm.running_var]

    def synchronised(*tensors) -> torch.Tensor:
        return networks._SyncBatchNorm.apply(*tensors, 0.3, 1e-5, None)

    def usual(x, weight, bias, mean, var) -> torch.Tensor:
        return F.batch_norm(x, mean, var, weight, bias, True, 0.3, 1e-5)

    for affine, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16, torch.float16)):
        norm, x = torch.nn.BatchNorm2d(6, affine=affine).cuda(), images.to(dtype)
        for p in norm.parameters():
            torch.nn.init.normal_(p)
        grad = grad.to(dtype)  # what float64 gets is what we get
        theirs = measure(copy.deepcopy(norm).double(), x.double(), usual)
        ours = measure(norm, x, synchronised)
        assert ours[0].dtype == ours[1].dtype == dtype and all(f.dtype == torch.float32 for f in ours[2:])
        close = {"rtol": max(1e-4, torch.finfo(dtype).eps), "atol": 2e-4 if dtype == torch.float32 else 1e-3}
        for found, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                found.double(), expected, **close, msg=lambda text, case=(dtype, affine): f"{case}: {text}"
            )


def test_knn_on_the_device_is_that_of_a_cpu():
    g = torch.Generator().manual_seed(0)
    gallery, queries = torch.randn(3000, 64, generator=g), torch.randn(500, 64, generator=g)
    labels, wanted = torch.randint(10, (3000,), generator=g), torch.randint(10, (500,), generator=g)
    on_cpu = common.knn_accuracy(gallery, labels, queries, wanted)
    on_gpu = common.knn_accuracy(gallery.cuda(), labels, queries.cuda(), wanted)
    assert on_gpu == pytest.approx(on_cpu, abs=0.41)  # two queries of 500 whose neighbours are all but equally near


def test_features_are_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    network, x = common.create_backbone("test_resnet").eval(), torch.rand(8, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
        found = network.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
