"""Replays the authors' recorded training steps through a trainer's own `main`.

`replay("smd", "tests/golden/steps/smd_phase1_epoch0.npz")` runs the real loop in float64 on the recorded run's images
and initial weights and returns what it logged. Nothing of the trainer is replaced but what it reads: the batches, the
initial values of its tensors and the teacher. The .json beside the .npz describes the run (golden/NOTES there).
"""

import contextlib
import importlib
import json
import math
import re
import tempfile
import zlib
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import timm
import torch
from accelerate import Accelerator
from golden_labelled import replay_labelled
from torch import nn

import common
import hub

# Our names -> the authors' (first match wins): the initial values are keyed by name.
NAMES = [
    (r"^backbone\.", "encoder."),
    (r"^(projector|head)\.", "encoder.fc."),
]


def official_name(name: str) -> str:
    for pattern, replacement in NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def initialise(model: nn.Module, rename=official_name) -> None:
    """The recorded runs' rule: a tensor of two or more dimensions is drawn from RandomState(crc32(name))."""
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            draw = np.random.RandomState(zlib.crc32(rename(name).encode())).standard_normal(tuple(p.shape))
            p.copy_(torch.from_numpy((draw * math.sqrt(2 / math.prod(p.shape[1:]))).astype(np.float32)))
        else:
            p.fill_(1.0 if name.rpartition(".")[0] in norms and name.endswith("weight") else 0.0)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.reset_running_stats()


def plain_backbone(name: str, **_) -> nn.Module:
    """A backbone that takes its input as it is: the recorded images are what the authors' networks saw."""
    model = timm.create_model(name, num_classes=0)
    model.register_buffer("input_mean", torch.zeros(3, 1, 1), persistent=False)
    model.register_buffer("input_std", torch.ones(3, 1, 1), persistent=False)
    return model


def regenerate(recipe: str) -> np.ndarray:
    """Images that a record describes instead of storing: "numpy.random.RandomState(0).randn(5,2,16,...)"."""
    seed, shape = re.search(r"RandomState\((\d+)\)\.randn\(([\d,]+)\)", recipe).groups()
    return np.random.RandomState(int(seed)).randn(*map(int, shape.split(","))).astype(np.float32)


class RecordedBatches:
    """Stands in for common.Batches: step i's views from an array, all steps inside one given epoch of `epochs`."""

    resident, kept = True, "recorded"

    def __init__(self, images: np.ndarray, patches: np.ndarray | None, epoch: int, epochs: float):
        self.images, self.at, self.views = torch.from_numpy(images).double(), epoch, [(None, images.shape[-1])]
        self.patches = None if patches is None else torch.from_numpy(patches).double()
        self.steps_per_epoch = len(images) / epochs
        self.source = mock.MagicMock(bad={}, licence="", __len__=lambda _: 0)
        self.source.name = "recorded images"

    def epoch(self, step: int) -> int:
        return self.at

    def progress(self, step: int) -> float:
        return float(self.at)

    def batch(self, step: int) -> common.Batch:
        views = [*self.images[step]] if self.images.ndim == 6 else [self.images[step]]
        views += [] if self.patches is None else self.patches[step].unbind(1)
        return common.Batch(views, None, torch.arange(len(views[0])))


def replay(trainer: str | ModuleType, npz_path: str | Path, **flags) -> dict[str, list]:
    """Run `trainer` over the recorded steps; {"loss": [...], ...}, one list per logged metric.

    `flags` are fields of the trainer's Args and override what the record says (architectures, learning rate, batch).
    Also returned, after the last step: "final_l2", {official parameter name: norm}, "buffers" likewise, "queue".
    """
    trainer = importlib.import_module(f"trainers.{trainer}") if isinstance(trainer, str) else trainer
    npz_path = Path(npz_path)
    if npz_path.name.startswith(("sskd_", "rep_")):
        return replay_labelled(trainer, npz_path, **flags)
    record, arrays = json.loads(npz_path.with_suffix(".json").read_text()), np.load(npz_path)
    steps, batch = record["steps"], record["batch"]
    if "images" in arrays:
        images = arrays["images"]
    else:
        images = regenerate(record["images"])
    patches = regenerate(record["image_small"]) if "image_small" in record else None
    optimizer = record["optimizer"]
    epoch = int(re.search(r"epoch (\d+)", optimizer)[1]) if "epoch" in optimizer else 0
    lr = float(re.search(r"lr ?=? ?([0-9.]*[0-9])", optimizer)[1])
    fields = {f.name for f in trainer.Args.__dataclass_fields__.values()}
    model = re.search(r"resnet\d+", record.get("student") or record.get("model") or record.get("encoder"))[0]
    teacher = re.search(r"resnet\d+", record["teacher"])[0] if "teacher" in record else None
    known = {
        "data": "recorded", "student": model, "backbone": model, "teacher": teacher, "image_size": images.shape[-1],
        "batch_size": batch, "base_lr": lr * 256 / batch, "group_size": 0, "epochs": 100.0, "total_steps": steps,
        "log_every": 1, "save_every": 10**6, "num_workers": 0, "queue_length": record.get("queue_length"),
        "bn_group_size": 0, "small_patches": 0 if patches is None else patches.shape[2],
    }  # fmt: skip
    prepared: list[nn.Module] = []
    # what the authors call the network that learns
    encoder = next(
        (n for n in ("encoder_q", "student") if f"{n}.<n>" in ",".join(record.get("naming_map", ()))), "encoder"
    )
    queues = iter(("queue", "small_queue"))
    guide = "teacher_encoder_q" if "teacher_encoder_q." in ",".join(record.get("naming_map", ())) else "teacher"
    teachers: list[hub.Teacher] = []

    def rename(name: str) -> str:
        return official_name(name).replace("encoder.", f"{encoder}.", 1)

    def initial_queue(length: int, dim: int) -> torch.Tensor:
        draw = np.random.RandomState(zlib.crc32(next(queues).encode())).standard_normal((dim, length))
        return torch.from_numpy((draw / np.sqrt((draw**2).sum(0, keepdims=True))).astype(np.float32)).T.double()

    def load_teacher(spec: str, **_) -> hub.Teacher:
        backbone, head, head_name = plain_backbone(spec), None, "fc"
        if "Linear(512,512), ReLU, Linear(512,128)" in record["teacher"]:
            head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
        elif "Linear(512,256) [0], BN1d [1]" in record["teacher"]:
            head, head_name = (
                nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128)),
                "projection_head",
            )
        initialise(backbone, lambda name: f"{guide}.{name}")
        if head is not None:
            initialise(head, lambda name: f"{guide}.{head_name}.{name}")
        teachers.append(hub.Teacher(backbone, {"source": spec, "architecture": spec}, head))
        return teachers[0]

    original_prepare = Accelerator.prepare

    def prepare(self, *objects, **options):
        for module in objects:
            if isinstance(module, nn.Module):
                initialise(module, rename)
                prepared.append(module)
        return original_prepare(self, *objects, **options)

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run_dir = Path(folder) / "run"
        args = trainer.Args(**{**{k: v for k, v in known.items() if k in fields}, "run_dir": run_dir, **flags})
        batches = RecordedBatches(images, patches, epoch, args.epochs)
        source = mock.MagicMock(
            labels=None, no_labels="", notes=(), bad={}, __len__=lambda _: 10**6, fingerprint=lambda: "recorded"
        )
        replacements = [
            (common, "open_source", lambda data, role="train", **_: source if role == "train" else None),
            (common, "Batches", lambda *_, **__: batches),
            (common, "create_backbone", plain_backbone),
            (hub, "load_teacher", load_teacher),
            (Accelerator, "prepare", prepare),
        ]
        if hasattr(trainer, "initial_queue"):
            replacements.append((trainer, "initial_queue", initial_queue))
        for owner, name, value in replacements:
            stack.enter_context(mock.patch.object(owner, name, value))
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        try:
            trainer.main(args)
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        saved = torch.load(hub.checkpoints(run_dir)[0] / "state.pt", weights_only=True)["state"]
    assert len(lines) == steps, f"{len(lines)} of {steps} recorded steps were logged"
    result: dict = {key: [line[key] for line in lines] for key in lines[0]}
    result["final_l2"] = {rename(n): p.norm().item() for m in prepared for n, p in m.named_parameters()}
    result["buffers"] = {rename(n): b.clone() for m in prepared for n, b in m.named_buffers()}
    for name, tensor in saved.get("encoder_k", {}).items():  # a momentum encoder is not prepared: no optimizer has it
        name = official_name(name).replace("encoder.", "encoder_k.", 1)
        if re.search(r"(running_mean|running_var|num_batches_tracked)$", name):
            result["buffers"][name] = tensor
        else:
            result["final_l2"][name] = tensor.norm().item()
    if "teacher_bn" in saved:  # numbered in the order of the network
        norms = [n for n, m in teachers[0].named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for key, tensor in saved["teacher_bn"].items():
            number, _, name = key.partition(".")
            result["buffers"][f"{guide}.{norms[int(number)].removeprefix('backbone.')}.{name}"] = tensor
    result |= {name: saved.get(name) for name in ("queue", "small_queue")}
    return result
