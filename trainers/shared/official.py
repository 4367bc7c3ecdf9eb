"""The authors' own checkpoints: where they are, how they name things, how a file of somebody else's is opened.

A chapter of hub.py. The layouts come from the code that writes and reads these files; no released file was at hand.
"""

import argparse
import collections
import errno
import hashlib
import http.client
import io
import os
import pathlib
import pickletools
import re
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
from torch import Tensor
from tqdm import tqdm

import common


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
    """How an authors' file names things, less every leading "module."; the first whose prefix or marker occurs is it."""

    name: str
    prefix: str  # of the backbone's and the head's keys
    ignored: tuple[str, ...] = ()  # what else the file may hold
    marker: str = ""  # where the prefix alone does not tell
    mean: tuple[float, float, float] | None = common.IMAGENET_MEAN  # that its network was trained with;
    std: tuple[float, float, float] | None = common.IMAGENET_STD  # None: the architecture's own


_SWAV_STD = (0.228, 0.224, 0.225)  # src/multicropdataset.py there; 0.228 in the evaluation too
LAYOUTS = (
    Layout("SEED", "student.", ("teacher.", "queue", "small_queue")),
    Layout("MoCo", "encoder_q.", ("encoder_k.", "teacher_encoder_", "queue")),  # DisCo's students too
    Layout("SimSiam", "encoder.", ("predictor.",)),  # SMD's students too
    Layout("SwAV", "", ("prototypes.",), marker="projection_head.", std=_SWAV_STD),  # DeepCluster-v2 and SeLa-v2 too
    Layout("DINO", "backbone.", ("head.",)),  # a head with GELUs that no method here distils
    Layout("torchvision", ""),
)
CIFAR = Layout("CIFAR", "", mean=None, std=None)  # SSKD's and RepDistiller's teachers, recognised by their shapes
HEADS = ("projection_head", "fc", "classifier", "linear")
# What the authors call a network of timm's.
ALIASES = {"efficientb0": "efficientnet_b0", "efficientb1": "efficientnet_b1", "mobilenetv3": "mobilenetv3_large_100"}

HOW_TO_GET_A_TEACHER = (
    "--teacher takes a run or release folder, an official .pth.tar file, timm/NAME (e.g. timm/resnet50), a Hub id "
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


def open_foreign(path: Path) -> Foreign:
    """An authors' file, recognised by its keys. Raises SystemExit with the remedy if it is none."""
    content = read_foreign(path)
    layout, state = _recognise(content, path)
    if zoo := _zoo_name(state):
        layout, state = CIFAR, {_plain(k): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith(layout.ignored)}
    backbone = {k[len(layout.prefix) :]: v for k, v in state.items() if k.startswith(layout.prefix)}
    head_name = next((name for name in HEADS if any(k.startswith(f"{name}.") for k in backbone)), HEADS[0])
    head = {k: backbone.pop(k) for k in list(backbone) if k.startswith(f"{head_name}.")}
    architecture = zoo or str(content.get("arch", "")) or _resnet_name(backbone)
    architecture = ALIASES.get(architecture, architecture)
    if "_conv_stem.weight" in backbone:
        architecture = f"tf_{architecture}"  # the authors' EfficientNets pad and normalise as TensorFlow's do
        backbone = _timm_efficientnet(backbone)
    strays = [k for k in state if not k.startswith(layout.prefix)]
    return Foreign(layout, architecture, backbone, head_name, head, strays)


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
    key = next((k for k in ("state_dict", "model", "teacher") if isinstance(content.get(k), dict)), None)
    tensors = {k: v for k, v in (content[key] if key else content).items() if isinstance(v, Tensor)}
    state = {re.sub(r"^(module\.)+", "", k): v for k, v in tensors.items()}
    if not state:
        raise SystemExit(f"{path}: holds no tensors; {HOW_TO_GET_A_TEACHER}")
    return next(x for x in LAYOUTS if any(k.startswith(x.marker or x.prefix) for k in state)), state


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
    for name, (kind, _) in common.ZOO.items():
        if (last := shapes.get(f"{kind.head_name}.weight")) is not None:
            with torch.device("meta"):
                network = timm.create_model(name, num_classes=last[0])
            if {k: v.shape for k, v in network.state_dict().items()} == shapes:
                return name
    return ""


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
        reason = "no torch file" if "Unsupported operand" in str(error) else common.first_line(error).split(". ")[0]
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
            f"{url}: download failed ({common.first_line(error)}); run again to continue it, or fetch it by hand and "
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
