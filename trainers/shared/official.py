"""The authors' own checkpoints: where they are, how they name things, how a file of somebody else's is opened.

A chapter of hub.py. The layouts come from the code that writes and reads these files; no released file was at hand.
"""

import argparse
import collections
import errno
import functools
import hashlib
import http.client
import inspect
import io
import json
import os
import pathlib
import pickletools
import re
import sys
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from trainers.shared.cifar_zoo import ZOO
from trainers.shared.folders import first_line
from trainers.shared.networks import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Official:
    """An authors' checkpoint: where it is, what it may be used for, and what it should reach."""

    url: str
    top1: float  # ImageNet linear probe, percent, as published
    source: str  # where that number and the file's address are published
    licence: str = "cc-by-nc-4.0"
    md5: str = ""  # the first digits, where published


_FB = "https://dl.fbaipublicfiles.com"
_MOCO, _SWAV, _VISSL = f"{_FB}/moco/moco_checkpoints", f"{_FB}/deepcluster", f"{_FB}/vissl/model_zoo"


def _simclr(run: str, top1: float) -> Official:
    epochs = int(run.split("ep_")[0].split("_")[-1])
    return Official(f"{_VISSL}/{run}/model_final_checkpoint_phase{epochs - 1}.torch", top1, "VISSL model zoo", "mit")


TEACHERS = {
    "simsiam_r50_100ep": Official(
        f"{_FB}/simsiam/models/100ep/pretrain/checkpoint_0099.pth.tar", 68.1, "simsiam README"
    ),
    "simsiam_r50_100ep_bs256": Official(
        f"{_FB}/simsiam/models/100ep-256bs/pretrain/checkpoint_0099.pth.tar", 68.3, "simsiam README"
    ),
    "moco_v1_r50_200ep": Official(
        f"{_MOCO}/moco_v1_200ep/moco_v1_200ep_pretrain.pth.tar", 60.6, "moco README", md5="b251726a"
    ),
    "moco_v2_r50_200ep": Official(
        f"{_MOCO}/moco_v2_200ep/moco_v2_200ep_pretrain.pth.tar", 67.7, "moco README", md5="59fd9945"
    ),
    "moco_v2_r50_800ep": Official(
        f"{_MOCO}/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar", 71.1, "moco README", md5="a04e12f8"
    ),
    "swav_r50_100ep": Official(f"{_SWAV}/swav_100ep_pretrain.pth.tar", 72.1, "swav README"),
    "swav_r50_200ep": Official(f"{_SWAV}/swav_200ep_pretrain.pth.tar", 73.9, "swav README"),
    "swav_r50_400ep": Official(f"{_SWAV}/swav_400ep_pretrain.pth.tar", 74.6, "swav README"),
    "swav_r50_800ep": Official(f"{_SWAV}/swav_800ep_pretrain.pth.tar", 75.3, "swav README"),
    "swav_r50_200ep_bs256": Official(f"{_SWAV}/swav_200ep_bs256_pretrain.pth.tar", 72.7, "swav README"),
    "swav_r50_400ep_bs256": Official(f"{_SWAV}/swav_400ep_bs256_pretrain.pth.tar", 74.3, "swav README"),
    "swav_r50_400ep_2x224": Official(f"{_SWAV}/swav_400ep_2x224_pretrain.pth.tar", 70.1, "swav README"),
    "swav_r50w2_400ep": Official(f"{_SWAV}/swav_RN50w2_400ep_pretrain.pth.tar", 77.3, "swav README"),
    "swav_r50w4_400ep": Official(f"{_SWAV}/swav_RN50w4_400ep_pretrain.pth.tar", 77.9, "swav README"),
    "swav_r50w5_400ep": Official(f"{_SWAV}/swav_RN50w5_400ep_pretrain.pth.tar", 78.5, "swav README"),
    "deepclusterv2_r50_400ep": Official(f"{_SWAV}/deepclusterv2_400ep_pretrain.pth.tar", 74.3, "swav README"),
    "deepclusterv2_r50_800ep": Official(f"{_SWAV}/deepclusterv2_800ep_pretrain.pth.tar", 75.2, "swav README"),
    "deepclusterv2_r50_400ep_2x224": Official(
        f"{_SWAV}/deepclusterv2_400ep_2x224_pretrain.pth.tar", 70.2, "swav README"
    ),
    "selav2_r50_400ep": Official(f"{_SWAV}/selav2_400ep_pretrain.pth.tar", 71.8, "swav README"),
    "selav2_r50_400ep_2x224": Official(f"{_SWAV}/selav2_400ep_2x224_pretrain.pth.tar", 67.2, "swav README"),
    "dino_r50": Official(
        f"{_FB}/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth", 75.3, "dino README", "apache-2.0"
    ),
    "simclr_r50_100ep": _simclr("simclr_rn50_100ep_simclr_8node_resnet_16_07_20.8edb093e", 64.4),
    "simclr_r50_200ep": _simclr("simclr_rn50_200ep_simclr_8node_resnet_16_07_20.a816c0ef", 66.61),
    "simclr_r50_400ep": _simclr("simclr_rn50_400ep_simclr_8node_resnet_16_07_20.36b338ef", 67.71),
    "simclr_r50_800ep": _simclr("simclr_rn50_800ep_simclr_8node_resnet_16_07_20.7e8feed1", 69.68),
    "simclr_r50_1000ep": _simclr("simclr_rn50_1000ep_simclr_8node_resnet_16_07_20.afe428c7", 68.8),
    "simclr_r50w2_100ep": _simclr("simclr_rn50w2_100ep_simclr_8node_resnet_16_07_20.05b37ec3", 69.82),
    "simclr_r50w2_1000ep": _simclr("simclr_rn50w2_1000ep_simclr_8node_resnet_16_07_20.e1e3bbf0", 73.84),
    "simclr_r50w4_1000ep": _simclr("simclr_rn50w4_1000ep_bs32_16node_simclr_8node_resnet_28_07_20.9e20b0ae", 71.61),
    "simclr_r101_100ep": _simclr("simclr_rn101_100ep_simclr_8node_resnet_16_07_20.1ff6cb4b", 62.76),
    "simclr_r101_1000ep": _simclr("simclr_rn101_1000ep_simclr_8node_resnet_16_07_20.35063cea", 71.56),
}


@dataclass(frozen=True)
class Layout:
    """How an authors' file names things, less WRAPPERS; the first whose prefix or marker occurs is it."""

    name: str
    prefix: str  # of the backbone's and the head's keys
    ignored: tuple[str, ...] = ()  # what else the file may hold
    marker: str | tuple[str, ...] = ""  # where the prefix alone does not tell
    plain: bool = False  # the network alone: what is left over is its classifier
    mean: tuple[float, float, float] | None = IMAGENET_MEAN  # that its network was trained with;
    std: tuple[float, float, float] | None = IMAGENET_STD  # None: the architecture's own


# The tensors lie under one of these, in a dictionary in a dictionary at worst; the averaged ones first, as timm takes them.
CONTAINERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "teacher",
    "ema_state_dict",
    "ema",
)
CONTAINERS += (
    "ema_model",
    "model_state",
    "network",
    "net",
    "module",
    "encoder",
    "backbone",
    "weights",
    "params",
    "student",
)
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")  # DataParallel, torch.compile, users' own modules
INNER_WRAPPERS = (*WRAPPERS, "backbone.", "encoder.", "online_encoder.", "feature_extractor.")

_SOLO = ("momentum_", "projector.", "predictor.", "classifier.", "prototypes.", "queue", "head.")
_LIGHTLY = (
    "projection_head",
    "prediction_head",
    "backbone_momentum.",
    "student_",
    "teacher_head.",
    "online_classifier.",
)
_LIGHTLY += ("momentum_", "prototypes.", "queue", "criterion.", "fc.")
_SWAV_STD = (0.228, 0.224, 0.225)  # src/multicropdataset.py there; 0.228 in the evaluation too
LAYOUTS = (
    Layout("lightly", "backbone.", _LIGHTLY, marker=("projection_head.layers.", "backbone_momentum.", "backbone.0.")),
    Layout("solo-learn", "backbone.", _SOLO, marker=("projector.", "momentum_projector.", "momentum_backbone.")),
    Layout("solo-learn", "encoder.", _SOLO, marker="momentum_encoder."),  # its older releases
    Layout("lightly", "teacher_backbone.", _LIGHTLY, marker="teacher_backbone."),
    Layout("SEED", "student.", ("teacher.", "queue", "small_queue")),
    Layout("MoCo", "encoder_q.", ("encoder_k.", "teacher_encoder_", "queue")),  # DisCo's students too
    Layout("SimSiam", "encoder.", ("predictor.",)),  # SMD's students too
    Layout("SwAV", "", ("prototypes.",), marker="projection_head.", std=_SWAV_STD),  # DeepCluster-v2 and SeLa-v2 too
    Layout(
        "DINO", "backbone.", ("head.",), marker=("head.mlp.", "head.last_layer.")
    ),  # a head with GELUs that no method here distils
    Layout("torchvision", ""),
)
CIFAR = Layout("CIFAR", "", mean=None, std=None)  # SSKD's and RepDistiller's teachers, recognised by their shapes
HEADS = ("projection_head", "fc", "_fc", "classifier", "linear", "head")
PLAIN = Layout("state dict", "", mean=None, std=None, plain=True)
# What the authors call a network of timm's.
ALIASES = {"efficientb0": "efficientnet_b0", "efficientb1": "efficientnet_b1", "mobilenetv3": "mobilenetv3_large_100"}

HOW_TO_GET_A_TEACHER = (
    "--teacher takes a run or release folder, an official .pth.tar file, ARCH@FILE (a timm name and a .pth or .safetensors "
    "file of its weights), timm/NAME (e.g. timm/resnet50), a Hub id "
    "(org/name), or a name that python hub.py list shows (e.g. simsiam_r50_100ep)"
)


@dataclass(frozen=True)
class Foreign:
    """What an authors' file holds: a timm architecture, its tensors, and the projection head's by their names."""

    layout: Layout
    architecture: str
    backbone: dict[str, Tensor]
    head_name: str
    head: dict[str, Tensor]
    strays: list[str]  # keys that the layout does not have


def open_foreign(path: Path, named: str = "") -> Foreign:
    """An authors' file, recognised by its keys; `named` is its architecture where they do not tell it.

    Raises SystemExit with the remedy if it is none.
    """
    content = read_foreign(path)
    layout, state = _recognise(content, path)
    if (zoo := _zoo_name(state)) and named in ("", zoo):
        layout, state, named = CIFAR, {_plain(k): v for k, v in state.items()}, zoo
    state = {k: v for k, v in state.items() if not k.startswith(layout.ignored)}
    backbone = {k[len(layout.prefix) :]: v for k, v in state.items() if k.startswith(layout.prefix)}
    strays = [k for k in state if not k.startswith(layout.prefix)]
    backbone, more = _unwrapped(backbone, INNER_WRAPPERS)
    strays += more
    if layout.name == "lightly" and "0.weight" in backbone:  # nn.Sequential(*list(resnet.children())[:-1])
        backbone = {re.sub(r"^[01]\.|^[4-7]\.", lambda found: _RESNET[found[0]], k): v for k, v in backbone.items()}
    head_name = next((name for name in HEADS if any(k.startswith(f"{name}.") for k in backbone)), HEADS[0])
    head = {k: backbone.pop(k) for k in list(backbone) if k.startswith(f"{head_name}.")}
    architecture = named or str(content.get("arch", "")) or _resnet_name(backbone)
    architecture = ALIASES.get(architecture, architecture)
    if "_conv_stem.weight" in backbone:
        # the authors' EfficientNets pad and normalise as TensorFlow's do
        architecture = f"tf_{architecture.removeprefix('tf_')}" if architecture else ""
        backbone = _timm_efficientnet(backbone)
    projects = any(re.match(rf"{head_name}\.\d", k) for k in head)
    if layout.name in ("torchvision", "SimSiam") and not projects and (named or not architecture.startswith("resnet")):
        layout = PLAIN
    return Foreign(layout, architecture, backbone, head_name, head, strays)


_RESNET = {"0.": "conv1.", "1.": "bn1.", **{f"{i + 3}.": f"layer{i}." for i in (1, 2, 3, 4)}}


def _recognise(content: dict, path: Path) -> tuple[Layout, dict[str, Tensor]]:
    """An authors' file's layout and its tensors by their names in it."""
    if "classy_state_dict" in content:
        try:
            model = content["classy_state_dict"]["base_model"]["model"]
            state = {k.removeprefix("_feature_blocks."): v for k, v in model["trunk"].items()}
            for key, tensor in model["heads"].items():  # "1.clf.0.weight": every MLP is one Linear, ReLUs in between
                number, _, _, kind = key.split(".")
                state[f"projection_head.{2 * int(number)}.{kind}"] = tensor
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise SystemExit(f"{path}: not VISSL's layout of a ResNet with an MLP head ({error!r})") from None
        return Layout("VISSL", ""), state
    for _ in range(4):
        if (inner := next((content[k] for k in CONTAINERS if isinstance(content.get(k), dict)), None)) is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor) and k != "n_averaged"}
    if not tensors:
        raise SystemExit(f"{path}: holds no tensors; {HOW_TO_GET_A_TEACHER}")
    state = {re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", k): v for k, v in tensors.items()}
    while wrapper := next((w for w in WRAPPERS if all(k.startswith(w) for k in state)), None):
        state = {k.removeprefix(wrapper): v for k, v in state.items()}
    return next(x for x in LAYOUTS if all(any(k.startswith(p) for k in state) for p in (x.prefix, x.marker))), state


def _unwrapped(state: dict[str, Tensor], wrappers: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str]]:
    """A network's tensors without the modules around it, of which most keys tell, and the keys that lie outside."""
    strays = []
    while True:
        counts = {w: sum(k.startswith(w) for k in state) for w in wrappers}
        wrapper = max(counts, key=counts.get)
        if 2 * counts[wrapper] <= len(state):
            return state, strays
        heads = tuple(f"{name}." for name in HEADS)
        strays += [k for k in state if not k.startswith((wrapper, *heads))]
        state = {k.removeprefix(wrapper): v for k, v in state.items() if k.startswith((wrapper, *heads))}


def converted(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict by timm's names and at the sizes of a network of its, as timm itself converts published files.

    What timm has no conversion for, or cannot convert, comes back as it is.
    """
    own = {k: v.shape for k, v in model.state_dict().items()}

    def misfits(state: dict[str, Tensor]) -> int:
        return len(own.keys() ^ state.keys()) + sum(k in own and own[k] != v.shape for k, v in state.items())

    if not misfits(state):
        return state
    modules = (timm.model_entrypoint(model.pretrained_cfg["architecture"]).__module__, type(model).__module__)
    for module in (sys.modules[name] for name in modules):
        convert = getattr(module, "checkpoint_filter_fn", None)
        if convert is None:
            continue
        options = {}
        if "adapt_layer_scale" in inspect.signature(convert).parameters:  # DeiT-III's files name it otherwise
            options["adapt_layer_scale"] = any(k.endswith(".gamma_1") for k in state)
        try:
            return min(state, convert(dict(state), model, **options), key=misfits)
        except Exception:  # not a file that it knows: the keys that do not fit are named later
            return state
    return state


def name_classifier(state: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """A plain state dict whose classifier, one Linear of another usual name, has timm's name."""
    wanted = config.get("classifier")
    if not isinstance(wanted, str) or f"{wanted}.weight" in state:
        return state
    for name in HEADS:
        if f"{name}.weight" in state:
            renamed = {f"{name}.{kind}": f"{wanted}.{kind}" for kind in ("weight", "bias")}
            return {renamed.get(k, k): v for k, v in state.items()}
    return state


# What timm.create_model or we take beside a network's own arguments: a file that somebody else wrote does not set it.
NOT_OF_A_MODEL = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path"}
NOT_OF_A_MODEL |= {
    "cache_dir",
    "scriptable",
    "exportable",
    "no_jit",
    "features_only",
    "in_chans",
    "num_classes",
    "mean",
}
NOT_OF_A_MODEL |= {"std", "say", "image_size", "small_images", "device", "dtype"}


def read_config(file: Path) -> dict:
    """A release's or a timm model's config.json, whole and sane. Raises SystemExit with one line that names the file."""

    def number(value, least: float, most: float, whole: bool = True) -> bool:
        kinds = int if whole else int | float
        return isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most

    def side(value) -> bool:
        return number(value, 1, 8192) or isinstance(value, list) and len(value) == 2 and all(map(side, value))

    def three(value, least: float, most: float) -> bool:
        return isinstance(value, list) and len(value) == 3 and all(number(v, least, most, False) for v in value)

    def names(value) -> bool:
        return isinstance(value, str) or isinstance(value, list) and all(isinstance(v, str) for v in value)

    def simple(key: str, value) -> bool:
        if key.endswith("_size"):
            return side(value) or isinstance(value, bool)
        if isinstance(value, list):
            return len(value) <= 16 and all(simple(key, v) for v in value)
        return isinstance(value, str | bool | None) or number(value, -1024, 1024, False)

    rules = {
        "architecture": lambda v: isinstance(v, str) and re.fullmatch(r"[\w.-]{1,200}", v),
        "num_classes": lambda v: number(v, 0, 1_000_000),
        "input_size": lambda v: isinstance(v, list) and len(v) == 3 and v[0] == 3 and v[1] == v[2] and number(v[1], 1, 8192),
        "fixed_input_size": lambda v: isinstance(v, bool),
        "mean": lambda v: three(v, -1000, 1000),
        "std": lambda v: three(v, 1e-6, 1000),
        "classifier": lambda v: v is None or names(v),
        "model_args": lambda v: isinstance(v, dict) and not set(v) & NOT_OF_A_MODEL and all(simple(k, x) for k, x in v.items()),
    }  # fmt: skip
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size < 1 << 20 else "longer than 1 MiB"
        config = json.loads(text)
        cfg = config.get("pretrained_cfg", config)
        wrong = "pretrained_cfg" if not isinstance(cfg, dict) else ""
        for key, rule in rules.items():
            given = [part[key] for part in (config, cfg) if isinstance(part, dict) and key in part]
            if not all(map(rule, given)) or key == "architecture" and key not in config:
                wrong = wrong or key
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise SystemExit(f"--teacher {file}: not a timm model's ({first_line(error)}); fetch it again") from None
    if wrong:
        value = json.dumps(config.get(wrong, (cfg or {}).get(wrong) if isinstance(cfg, dict) else None))[:40]
        raise SystemExit(f"--teacher {file}: not a timm model's: {wrong} {value}; mend or fetch it again")
    return config


def _timm_efficientnet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The keys of EfficientNet-PyTorch, which SEED and SMD train, as timm names them."""
    stage, block, before = -1, 0, None
    expanded = {k.split(".")[1] for k in state if k.endswith("._expand_conv.weight")}
    widths = {k.split(".")[1]: len(v) for k, v in state.items() if k.endswith("._project_conv.weight")}
    kernels = {k.split(".")[1]: v.shape[-1] for k, v in state.items() if k.endswith("._depthwise_conv.weight")}
    place, renamed = {}, {}
    for number in widths:  # a stage is a stretch of blocks of one width and kernel
        kind = widths[number], kernels.get(number)
        stage, block = (stage, block + 1) if kind == before else (stage + 1, 0)
        place[number], before = f"blocks.{stage}.{block}", kind
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    convs = {"_depthwise_conv": "conv_dw", "_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
    wide = convs | {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    plain = convs | {"_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # the first block does not expand
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "_blocks" and parts[1] in place:
            names = wide if parts[1] in expanded else plain
            parts[:3] = [place[parts[1]], names.get(parts[2], parts[2])]
        else:
            parts[0] = outside.get(parts[0], parts[0])
        renamed[".".join(parts)] = tensor
    return renamed


def _plain(key: str) -> str:
    """RepDistiller's MobileNetV2 has its classifier in a Sequential, SSKD's has not."""
    return key.replace("classifier.0.", "classifier.")


def _zoo_name(state: dict[str, Tensor]) -> str:
    """Which of the CIFAR networks has exactly these keys and shapes; "" if none."""
    shapes = {_plain(k): v.shape for k, v in state.items()}
    for name, (kind, _) in ZOO.items():
        if (last := shapes.get(f"{kind.head_name}.weight")) is not None:
            if _zoo_shapes(name, last[0]) == shapes:
                return name
    return ""


@functools.cache
def _zoo_shapes(name: str, num_classes: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=num_classes)
    return {k: v.shape for k, v in network.state_dict().items()}


def _resnet_name(state: dict[str, Tensor]) -> str:
    """Which ResNet a state dict without a name is, by its blocks; "" if none."""
    blocks = [len({k.split(".")[1] for k in state if k.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4)]
    bottleneck = "layer1.0.conv3.weight" in state
    depth = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 50 if bottleneck else 34, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
    number = depth.get(tuple(blocks))
    if number is None or "conv1.weight" not in state:
        return ""
    width, _, _, side = state["conv1.weight"].shape
    return f"resnet{number}{'_small' if side == 3 else ''}{f'w{width // 64}' if width > 64 else ''}"


def _numpy_globals() -> list:
    multiarray = np._core.multiarray
    scalars = [type(np.dtype(t)) for t in ("f8", "f4", "f2", "i8", "i4", "u1", "?")]
    functions = [multiarray.scalar, multiarray._reconstruct]
    old_names = [(f, f"numpy.core.multiarray.{f.__name__}") for f in functions]  # as numpy 1 wrote them
    return [np.dtype, np.ndarray, *scalars, *functions, *old_names]


def read_foreign(path: Path) -> dict:
    """A .pth/.pt file of somebody else's, opened without running what it may contain. Raises SystemExit if refused."""
    allowed = [argparse.Namespace, collections.defaultdict, dict, list, pathlib.PosixPath, *_numpy_globals()]
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):  # torch compresses nothing: what is announced lies in the file
            with zipfile.ZipFile(path) as archive:
                announced = sum(entry.file_size for entry in archive.infolist())
            if announced > 2 * path.stat().st_size + (1 << 20):
                raise ValueError(f"unpacks to {announced / 1e9:.3g} GB")
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol, which says nothing to a user
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises whatever its reader meets first
        named = str(error).split("GLOBAL ", 1)[1].split()[:1] if "GLOBAL " in str(error) else []
        if name := "".join(named) or _runs_code(path):
            raise SystemExit(
                f"{path}: refused, loading it would run code ({name}). If you trust it, convert it once: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW_FILE)"
            ) from None
        reason = "no torch file" if "Unsupported operand" in str(error) else first_line(error).split(". ")[0]
        raise SystemExit(f"{path}: not a whole checkpoint of torch's format ({reason}); fetch it again") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _runs_code(path: Path) -> str:
    """The first function or class, beyond torch's own, that a pickle of any protocol names; nothing is run for it."""
    strings, memo = [], {}
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            data = path.read_bytes()
        file = io.BytesIO(data)
        while file.tell() < len(data):  # torch's format before the archives is several pickles in a row
            for code, argument, _ in pickletools.genops(file):
                if code.name in ("GLOBAL", "INST"):
                    name = argument.replace(" ", ".")
                elif code.name == "STACK_GLOBAL":
                    name = ".".join(strings[-2:])
                else:
                    if "UNICODE" in code.name or "STRING" in code.name:
                        strings.append(str(argument))
                    elif code.name == "MEMOIZE":
                        memo[len(memo)] = strings[-1] if strings else ""
                    elif "PUT" in code.name:
                        memo[argument] = strings[-1] if strings else ""
                    elif code.name in ("BINGET", "LONG_BINGET", "GET"):
                        strings.append(memo.get(argument, ""))
                    continue
                if not name.startswith(
                    ("torch.", "collections.OrderedDict", "numpy.", "argparse.Namespace", "pathlib.")
                ):
                    return name
    except Exception:  # damaged, or no pickle at all
        pass
    return ""


def download(url: str, md5: str = "") -> Path:
    """Fetch a file once into torch's hub cache, going on where an earlier attempt stopped; a partial one is never used.

    `md5`: its first digits, checked if given. Raises SystemExit with the remedy.
    """
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.split("://")[1].replace("/", "_")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # the processes of a run all ask for it
            if not target.exists():
                _download(url, target, md5)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise SystemExit(
            f"{url}: download failed ({first_line(error)}); run again to continue it, or fetch it by hand and "
            "give the file as --teacher"
        ) from None
    return target


def _download(url: str, target: Path, md5: str, attempts: int = 5) -> None:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
        total, tag = int(answer.headers["Content-Length"] or 0), answer.headers["ETag"] or ""
    version = hashlib.sha256(f"{tag} {total}".encode()).hexdigest()[:8]  # another file at that address starts anew
    part = target.with_name(f"{target.name}.{version}.part")
    for attempt in range(attempts):
        done = part.stat().st_size if part.exists() and total else 0
        if total and done == total:
            break
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                going_on = answer.status == 206  # a server that knows no ranges sends everything again
                bar = {"total": total or None, "initial": done if going_on else 0, "desc": target.name[-40:]}
                with (
                    open(part, "ab" if going_on else "wb") as file,
                    tqdm(**bar, unit="B", unit_scale=True, leave=False) as progress,
                ):
                    while chunk := answer.read(1 << 20):
                        file.write(chunk)
                        progress.update(len(chunk))
            if not total or part.stat().st_size == total:
                break
            raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")
        except (OSError, http.client.HTTPException) as error:
            wrong = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if wrong or getattr(error, "errno", None) == errno.ENOSPC or attempt == attempts - 1:
                raise
            time.sleep(2**attempt / 4)
    if md5:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if not found.startswith(md5):
            part.unlink()
            raise ValueError(f"its md5 is {found}, published is {md5}...")
    os.replace(part, target)
