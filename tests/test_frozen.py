"""A frozen network that is asked at every step: BatchNorm folded into convolutions, weights cast once, equal features."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tools import make_backbone
from torch import nn

import common


@pytest.mark.parametrize(
    "name, folded", [("resnet18", 20), ("resnet18_small", 20), ("efficientnet_b0", 49), ("mobilenetv3_small_100", 34), ("test_vit", 0),
                     ("resnet20", 21), ("wrn_16_2", 7), ("vgg8", 5)],
)  # fmt: skip
def test_folded_batch_norm_gives_the_same_features(name, folded):
    backbone, x = make_backbone(name), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        before = backbone(x)
        common.fold_batch_norm(backbone, x[:2])
        torch.testing.assert_close(backbone(x), before, rtol=1e-5, atol=1e-5 * before.abs().max().item())
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in make_backbone(name).modules())
    assert norms - sum(isinstance(m, nn.BatchNorm2d) for m in backbone.modules()) == folded


def test_a_convolution_whose_result_is_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return y + self.bn(y)

    network, x = Twice().eval(), torch.rand(2, 3, 8, 8)
    network.bn.running_mean.fill_(0.3)
    with torch.no_grad():
        before = network(x)
        common.fold_batch_norm(network, x)
        assert torch.equal(network(x), before) and isinstance(network.bn, nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "test_vit"])
def test_weights_cast_once_give_what_autocast_gives(name, precision):
    precision("bf16")
    accelerator, x = Accelerator(cpu=True), torch.rand(4, 3, 32, 32)
    plain = make_backbone(name)
    cast = copy.deepcopy(plain)
    common.prepare_frozen(cast, accelerator, 32)
    assert any(p.dtype == torch.bfloat16 for p in cast.parameters())
    with torch.no_grad(), accelerator.autocast():
        assert torch.equal(cast(x), plain(x))
    AcceleratorState._reset_state(True)
