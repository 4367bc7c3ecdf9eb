"""The thirteen CIFAR networks of SSKD's tables under timm's conventions. A chapter of common.py.

github.com/xuguodong03/SSKD @ 661b972 and github.com/HobbitLong/RepDistiller @ b84f547 share them. Parameters have the
authors' names, so that their released teachers load; the forward passes are written anew and checked against the
authors' logits. They take any image size: what is an 8x8 or 4x4 average pooling there is a global one here.
"""

import timm  # noqa: F401  (registers the models that ours stand beside)
import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

# The authors' --arch names where ours differ: timm has a vgg13 of its own, for ImageNet, which stays what it is.
OFFICIAL_NAMES = {
    "vgg13": "vgg13_cifar",
    "MobileNetV2": "mobilenetv2_cifar",
    "ShuffleV1": "shufflenet_v1_cifar",
    "ShuffleV2": "shufflenet_v2_cifar",
    "ResNet50": "resnet50_cifar",
}


def conv(width_in: int, width_out: int, kernel: int = 3, stride: int = 1, **options) -> nn.Conv2d:
    """A convolution that keeps the image's size at stride 1, without bias unless asked for."""
    return nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, **{"bias": False, **options})


def through(stage: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """A stage's output, and what its last block had before the activation."""
    *blocks, last = stage
    for block in blocks:
        x = block(x)
    before = last.preact(x)
    return last.activate(before), before


class CifarNetwork(nn.Module):
    """timm's interface; a subclass gives the layers, `maps` and `feature_info`.

    Feature maps are RepDistiller's: the stem's, then one a stage, after its last activation; with `preact` before it,
    the stem's excepted. (WideResNet's maps come before BatchNorm and activation, with `preact` after that BatchNorm.)
    """

    first_conv, head_name = "conv1", "fc"  # the authors' names
    head_parts: tuple[str, ...] = ()  # children behind the last feature map, beside the classifier
    num_maps, pool = 4, (8, 8)  # feature maps, and the size of the last one at 32 px

    def __init__(self, widths: tuple[int, ...], reductions: tuple[int, ...], num_features: int):
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        names = ("stem", *(f"stage{i}" for i in range(1, len(widths))))
        rows = zip(names, widths, reductions, strict=True)
        self.feature_info = [{"module": n, "num_chs": width, "reduction": r} for n, width, r in rows]

    def maps(self, x: Tensor, preact: bool) -> tuple[list[Tensor], Tensor]:
        """The feature maps, and the last one as the rest of the network takes it."""
        x = self.stem(x)
        maps = [x]
        for name in ("layer1", "layer2", "layer3", "layer4"):
            if hasattr(self, name):
                x, before = through(getattr(self, name), x)
                maps.append(before if preact else x)
        return maps, x

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)))

    def final(self, x: Tensor) -> Tensor:
        """From the last feature map to what is pooled."""
        return x

    def feature_modules(self) -> list[nn.Module]:
        """The children that make the feature maps: what two-stage distillation trains first."""
        return [m for name, m in self.named_children() if name not in (*self.head_parts, self.head_name)]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *,
        preact: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's: (`forward_features`, the chosen feature maps), or the maps alone; `preact` is explained above."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt {output_fmt}: feature maps are NCHW")
        take, _ = feature_take_indices(len(self.feature_info), indices)
        maps, x = self.maps(x, preact)
        chosen = [maps[i] for i in take]
        return chosen if intermediates_only else (self.final(x), chosen)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.final(self.maps(x, False)[1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3)) if self.global_pool else x
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return getattr(self, self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.global_pool = getattr(self, "global_pool", "avg") if global_pool is None else global_pool
        like = next(self.parameters())
        layer = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.head_name, layer.to(like.device, like.dtype))


@torch.no_grad()
def initialise(model: CifarNetwork, classifier_std: float | None = None) -> None:
    """Convolutions as He et al. 2015 by fan-out, biases zero; the classifier normal where the authors do it so."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                m.bias.zero_()
    if classifier_std is not None and model.num_classes:
        model.get_classifier().weight.normal_(0, classifier_std)
        model.get_classifier().bias.zero_()


# ---------------------------------------------------------------------------------------------------------------------
# ResNets: three stages of basic blocks, and ResNet-50
# ---------------------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(conv(width_in, width, 1, stride), nn.BatchNorm2d(width))

    def preact(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return y + (x if self.downsample is None else self.downsample(x))

    def activate(self, before: Tensor) -> Tensor:
        return F.relu(before)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.preact(x))


class CifarResNet(CifarNetwork):
    """ResNet for CIFAR (He et al. 2016, Sec. 4.2), depth 6n + 2, with projections where the width changes."""

    def __init__(self, depth: int, widths: tuple[int, ...], num_classes: int, in_chans: int = 3, global_pool="avg"):
        super().__init__(widths, (1, 1, 2, 4), widths[-1])
        self.conv1, self.bn1 = conv(in_chans, widths[0]), nn.BatchNorm2d(widths[0])
        for i, stride in enumerate((1, 2, 2)):
            blocks = [BasicBlock(widths[i], widths[i + 1], stride)]
            blocks += [BasicBlock(widths[i + 1], widths[i + 1], 1) for _ in range((depth - 2) // 6 - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.reset_classifier(num_classes, global_pool)
        initialise(self)


class Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != 4 * width:
            self.shortcut = nn.Sequential(conv(width_in, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def preact(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return self.bn3(self.conv3(y)) + self.shortcut(x)

    def activate(self, before: Tensor) -> Tensor:
        return F.relu(before)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.preact(x))


class CifarResNet50(CifarNetwork):
    """ResNet-50 with a 3x3 stem and no max-pool; timm's own would do but for the names of shortcut and linear."""

    head_name, num_maps, pool = "linear", 5, (4, 4)

    def __init__(self, num_classes: int, in_chans: int = 3, global_pool="avg"):
        super().__init__((64, 256, 512, 1024, 2048), (1, 1, 2, 4, 8), 2048)
        self.conv1, self.bn1 = conv(in_chans, 64), nn.BatchNorm2d(64)
        width_in = 64
        for i, (count, stride) in enumerate(zip((3, 4, 6, 3), (1, 2, 2, 2), strict=True)):
            width = 64 * 2**i
            blocks = [Bottleneck(width_in, width, stride)]
            blocks += [Bottleneck(4 * width, width, 1) for _ in range(count - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            width_in = 4 * width
        self.reset_classifier(num_classes, global_pool)
        initialise(self)


# ---------------------------------------------------------------------------------------------------------------------
# WideResNet
# ---------------------------------------------------------------------------------------------------------------------


class PreactBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv(width_in, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.convShortcut = conv(width_in, width, 1, stride) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x), inplace=True)
        y = self.conv2(F.relu(self.bn2(self.conv1(a)), inplace=True))
        return y + (x if self.convShortcut is None else self.convShortcut(a))


class Stage(nn.Module):
    """A Sequential under the name `layer`, as in the authors' keys."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.layer = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(CifarNetwork):
    """WRN-depth-k (Zagoruyko & Komodakis 2016), depth 6n + 4, without dropout."""

    head_parts = ("bn1",)

    def __init__(self, depth: int, k: int, num_classes: int, in_chans: int = 3, global_pool="avg"):
        widths = (16, 16 * k, 32 * k, 64 * k)
        super().__init__(widths, (1, 1, 2, 4), widths[-1])
        self.conv1 = conv(in_chans, widths[0])
        for i, stride in enumerate((1, 2, 2)):
            blocks = [PreactBlock(widths[i], widths[i + 1], stride)]
            blocks += [PreactBlock(widths[i + 1], widths[i + 1], 1) for _ in range((depth - 4) // 6 - 1)]
            setattr(self, f"block{i + 1}", Stage(blocks))
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.reset_classifier(num_classes, global_pool)
        initialise(self)
        if num_classes:
            nn.init.zeros_(self.fc.bias)

    def maps(self, x: Tensor, preact: bool) -> tuple[list[Tensor], Tensor]:
        maps = [self.conv1(x)]
        for block in (self.block1, self.block2, self.block3):
            maps.append(block(maps[-1]))
        x = maps[-1]
        if preact:  # a second pass through these three BatchNorms, as in the authors' code: statistics move twice
            norms = (self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1)
            maps[1:] = [bn(m) for bn, m in zip(norms, maps[1:], strict=True)]
        return maps, x

    def final(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x), inplace=True)


# ---------------------------------------------------------------------------------------------------------------------
# VGG
# ---------------------------------------------------------------------------------------------------------------------


class CifarVGG(CifarNetwork):
    """VGG with BatchNorm and one Linear (Simonyan & Zisserman 2015); the last two blocks share a size up to 32 px."""

    first_conv, head_name, num_maps, pool = "block0.0", "classifier", 5, (4, 4)

    def __init__(self, convolutions: int, num_classes: int, in_chans: int = 3, global_pool="avg"):
        widths = (64, 128, 256, 512, 512)
        super().__init__(widths, (1, 2, 4, 8, 8), widths[-1])
        for i, width in enumerate(widths):
            layers: list[nn.Module] = []
            for width_in in (in_chans if i == 0 else widths[i - 1], *[width] * (convolutions - 1)):
                layers += [conv(width_in, width, bias=True), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            setattr(self, f"block{i}", nn.Sequential(*layers[:-1]))  # the last activation is `maps`' own
        self.reset_classifier(num_classes, global_pool)
        initialise(self, classifier_std=0.01)

    def maps(self, x: Tensor, preact: bool) -> tuple[list[Tensor], Tensor]:
        large, maps = x.shape[-1] >= 64, []
        for i, block in enumerate((self.block0, self.block1, self.block2, self.block3, self.block4)):
            before = block(x if i == 0 or (i == 4 and not large) else F.max_pool2d(x, 2))
            x = F.relu(before)
            maps.append(before if preact and i else x)
        return maps, x


# ---------------------------------------------------------------------------------------------------------------------
# MobileNetV2
# ---------------------------------------------------------------------------------------------------------------------


def conv_bn(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [conv(width_in, width, kernel, stride, groups=groups), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]


class InvertedResidual(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int, expansion: int):
        super().__init__()
        middle = width_in * expansion
        layers = conv_bn(width_in, middle, 1) + conv_bn(middle, middle, 3, stride, groups=middle)
        self.conv = nn.Sequential(*layers, *conv_bn(middle, width, 1)[:-1])
        self.residual = stride == 1 and width_in == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class CifarMobileNetV2(CifarNetwork):
    """MobileNetV2 (Sandler et al. 2018) of half the width, ReLU for ReLU6; its feature maps have no activation."""

    first_conv, head_name, num_maps, pool = "conv1.0", "classifier", 5, (2, 2)
    head_parts = ("conv2",)
    SETTINGS = (
        (1, 8, 1, 1),
        (6, 12, 2, 1),
        (6, 16, 3, 2),
        (6, 32, 4, 2),
        (6, 48, 3, 1),
        (6, 80, 3, 2),
        (6, 160, 1, 1),
    )

    def __init__(self, num_classes: int, in_chans: int = 3, global_pool="avg"):
        super().__init__((16, 12, 16, 48, 160), (2, 2, 4, 8, 16), 1280)
        self.conv1 = nn.Sequential(*conv_bn(in_chans, 16, 3, 2))
        self.blocks, width_in = nn.ModuleList(), 16
        for expansion, width, count, stride in self.SETTINGS:
            widths = (width_in, *[width] * count)
            strides = (stride, *[1] * (count - 1))
            blocks = [InvertedResidual(widths[i], width, s, expansion) for i, s in enumerate(strides)]
            self.blocks.append(nn.Sequential(*blocks))
            width_in = width
        self.conv2 = nn.Sequential(*conv_bn(160, 1280, 1))
        self.reset_classifier(num_classes, global_pool)
        initialise(self, classifier_std=0.01)
        self.register_load_state_dict_pre_hook(_plain_classifier)

    def maps(self, x: Tensor, preact: bool) -> tuple[list[Tensor], Tensor]:
        maps = [x := self.conv1(x)]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in (1, 2, 4, 6):
                maps.append(x)
        return maps, x

    def final(self, x: Tensor) -> Tensor:
        return self.conv2(x)


def _plain_classifier(_, state: dict[str, Tensor], prefix: str, *__) -> None:
    """RepDistiller's MobileNetV2 has its classifier in a Sequential, SSKD's has not."""
    for name in ("weight", "bias"):
        if f"{prefix}classifier.0.{name}" in state:
            state[f"{prefix}classifier.{name}"] = state.pop(f"{prefix}classifier.0.{name}")


# ---------------------------------------------------------------------------------------------------------------------
# ShuffleNets
# ---------------------------------------------------------------------------------------------------------------------


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of `groups` groups, one of each in turn."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnitV1(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int):
        super().__init__()
        branch = width - width_in if stride == 2 else width  # the shortcut is concatenated
        middle, self.groups = branch // 4, 1 if width_in == 24 else 3
        self.stride = stride
        self.conv1, self.bn1 = conv(width_in, middle, 1, groups=self.groups), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(middle, middle, 3, stride, groups=middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv(middle, branch, 1, groups=3), nn.BatchNorm2d(branch)

    def preact(self, x: Tensor) -> Tensor:
        y = shuffle(F.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return y + x if self.stride == 1 else torch.cat([y, F.avg_pool2d(x, 3, 2, 1)], 1)

    def activate(self, before: Tensor) -> Tensor:
        return F.relu(before)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.preact(x))


class CifarShuffleNetV1(CifarNetwork):
    """ShuffleNet (Zhang et al. 2018) with 3 groups, a 1x1 stem, and an activation behind the depthwise convolution."""

    head_name, pool = "linear", (4, 4)

    def __init__(self, num_classes: int, in_chans: int = 3, global_pool="avg"):
        widths = (24, 240, 480, 960)
        super().__init__(widths, (1, 2, 4, 8), 960)
        self.conv1, self.bn1 = conv(in_chans, 24, 1), nn.BatchNorm2d(24)
        for i, count in enumerate((4, 8, 4)):
            units = [ShuffleUnitV1(widths[i], widths[i + 1], 2)]
            units += [ShuffleUnitV1(widths[i + 1], widths[i + 1], 1) for _ in range(count - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
        self.reset_classifier(num_classes, global_pool)


class ShuffleUnitV2(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(half, half, 1), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(half, half, 1), nn.BatchNorm2d(half)

    def preact(self, x: Tensor) -> Tensor:
        """Not shuffled: its channels are in another order than the output's, as in the authors' code."""
        kept, y = x.chunk(2, 1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        return torch.cat([kept, self.bn3(self.conv3(y))], 1)

    def activate(self, before: Tensor) -> Tensor:
        kept, y = before.chunk(2, 1)
        return shuffle(torch.cat([kept, F.relu(y)], 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.preact(x))


class ShuffleDownV2(nn.Module):
    def __init__(self, width_in: int, width: int):
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = conv(width_in, width_in, 3, 2, groups=width_in), nn.BatchNorm2d(width_in)
        self.conv2, self.bn2 = conv(width_in, half, 1), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv(width_in, half, 1), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv(half, half, 3, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return shuffle(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], 1), 2)


class CifarShuffleNetV2(CifarNetwork):
    """ShuffleNetV2 1x (Ma et al. 2018) with a 1x1 stem and no max-pool."""

    head_name, pool = "linear", (4, 4)
    head_parts = ("conv2", "bn2")

    def __init__(self, num_classes: int, in_chans: int = 3, global_pool="avg"):
        widths = (24, 116, 232, 464)
        super().__init__(widths, (1, 2, 4, 8), 1024)
        self.conv1, self.bn1 = conv(in_chans, 24, 1), nn.BatchNorm2d(24)
        for i, count in enumerate((3, 7, 3)):
            units = [ShuffleDownV2(widths[i], widths[i + 1]), *(ShuffleUnitV2(widths[i + 1]) for _ in range(count))]
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
        self.conv2, self.bn2 = conv(464, 1024, 1), nn.BatchNorm2d(1024)
        self.reset_classifier(num_classes, global_pool)

    def final(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(x)))


# ---------------------------------------------------------------------------------------------------------------------
# timm's registry
# ---------------------------------------------------------------------------------------------------------------------

ZOO: dict[str, tuple[type, dict]] = {
    "wrn_40_2": (WideResNet, {"depth": 40, "k": 2}),
    "wrn_40_1": (WideResNet, {"depth": 40, "k": 1}),
    "wrn_16_2": (WideResNet, {"depth": 16, "k": 2}),
    "resnet56": (CifarResNet, {"depth": 56, "widths": (16, 16, 32, 64)}),
    "resnet20": (CifarResNet, {"depth": 20, "widths": (16, 16, 32, 64)}),
    "resnet32x4": (CifarResNet, {"depth": 32, "widths": (32, 64, 128, 256)}),
    "resnet8x4": (CifarResNet, {"depth": 8, "widths": (32, 64, 128, 256)}),
    "vgg13_cifar": (CifarVGG, {"convolutions": 2}),
    "vgg8": (CifarVGG, {"convolutions": 1}),
    "mobilenetv2_cifar": (CifarMobileNetV2, {}),
    "shufflenet_v1_cifar": (CifarShuffleNetV1, {}),
    "shufflenet_v2_cifar": (CifarShuffleNetV2, {}),
    "resnet50_cifar": (CifarResNet50, {}),
}
# What the authors normalise CIFAR-100 with (SSKD teacher.py; RepDistiller's differ by 1e-4 in two figures).
_CIFAR = {"input_size": (3, 32, 32), "mean": (0.5071, 0.4866, 0.4409), "std": (0.2675, 0.2565, 0.2761)}
_CIFAR |= {"interpolation": "bilinear", "crop_pct": 1.0, "num_classes": 100}
default_cfgs = generate_default_cfgs(
    {
        f"{name}.none": {**_CIFAR, "classifier": kind.head_name, "first_conv": kind.first_conv, "pool_size": kind.pool}
        for name, (kind, _) in ZOO.items()
    }
)


def _register(name: str, network: type, architecture: dict) -> None:
    def entry(pretrained: bool = False, **kwargs) -> CifarNetwork:
        feature_cfg = {"feature_cls": "getter", "out_indices": tuple(range(network.num_maps))}
        return build_model_with_cfg(network, name, pretrained, feature_cfg=feature_cfg, **architecture, **kwargs)

    entry.__name__ = entry.__qualname__ = name
    globals()[name] = register_model(entry)


for _name, _made_of in ZOO.items():
    _register(_name, *_made_of)
