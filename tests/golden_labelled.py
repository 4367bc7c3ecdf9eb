"""Replays the authors' recorded steps of distillation with labels; a chapter of golden.py, whose `replay` calls it.

The .npz files of SSKD and RepDistiller (sskd_steps.json and rep_steps.json describe them) hold their own images and
labels; networks are named in the file's name. A trainer's `main` runs on them in the file's precision.
"""

import contextlib
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
from torch import nn

import common
import hub

# How file names shorten the authors' names of networks.
SHORT = {
    "wrn402": "wrn_40_2", "wrn401": "wrn_40_1", "wrn162": "wrn_16_2", "vgg13": "vgg13_cifar", "resnet50": "resnet50_cifar",
    "mobilenetv2": "mobilenetv2_cifar", "shufflev1": "shufflenet_v1_cifar", "shufflev2": "shufflenet_v2_cifar",
}  # fmt: skip
# Our method names -> RepDistiller's, which are the records' keys.
REP_NAMES = {
    "fitnet": "hint", "at": "attention", "sp": "similarity", "ab": "abound", "ft": "factor",
}  # fmt: skip


@torch.no_grad()
def initialise(model: nn.Module, prefix: str = "", rounded: bool = True) -> nn.Module:
    """The recorded runs' rule: tensors of two or more dimensions from RandomState(crc32(official name)), biases zero."""
    transposed = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d)}
    for name, p in model.named_parameters():
        if isinstance(model, common.CifarMobileNetV2) and not rounded:  # RepDistiller's, whose records are not rounded
            name = name.replace("classifier.", "classifier.0.")
        if p.ndim >= 2:
            draw = np.random.RandomState(zlib.crc32(f"{prefix}{name}".encode())).standard_normal(tuple(p.shape))
            fan_in = p[:, 0].numel() if name in transposed else p[0].numel()
            draw *= math.sqrt(2 / fan_in)
            p.copy_(torch.from_numpy(draw.astype(np.float32) if rounded else draw))
        elif name.endswith("bias"):
            p.zero_()
    return model


class RecordedBatches:
    """Stands in for common.Batches: the same recorded batch at every step, all in epoch 0."""

    resident, kept, steps_per_epoch = True, "recorded", 1000

    def __init__(self, views: list[torch.Tensor], labels: torch.Tensor, indices: torch.Tensor, source: common.Source):
        self.recorded, self.source = common.Batch(views, labels, indices), source
        self.views = [(None, views[0].shape[-1])]

    def epoch(self, step: int) -> int:
        return 0

    progress = epoch

    def batch(self, step: int) -> common.Batch:
        return self.recorded


def networks_of(name: str) -> tuple[str, str]:
    """(teacher, student) that a file's name tells."""
    pair = re.search(r"^(?:sskd_(?:calib|plain)|rep)_(.+)_f\d\d$", name)[1]
    first, second = re.fullmatch(r"(wrn_\d+_\d+|[^_]+)_(.+)", pair).groups()
    return tuple(SHORT.get(n.lower(), n) for n in (first, second))


def replay_labelled(trainer: ModuleType, npz_path: Path, **flags) -> dict[str, list]:
    """Run `trainer` over a record of SSKD (trainers sskd, supervised) or RepDistiller (kd with a `method`, crd, ab, ft).

    Returned: {"loss": [...], ...}, one list per logged metric, over both phases or stages; "head_steps", the first
    one's steps; "norms", {part: {official name: norm}} after the last step, part being a name in the checkpoint.
    """
    arrays, name = np.load(npz_path), npz_path.stem
    teacher_name, student_name = networks_of(name)
    rep, double = name.startswith("rep_"), name.endswith("f64")
    x, labels = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["target"])
    x = x.double() if double else x
    batch = len(labels)
    light = student_name.startswith(("mobilenetv2", "shufflenet"))
    at_64 = 64 / batch  # lr is the authors' for whatever batch they recorded
    known = {
        "data": "recorded", "student": student_name, "backbone": student_name, "teacher": "recorded", "image_size": 32,
        "batch_size": batch, "base_lr": (0.04 if light else 0.2) * at_64, "head_lr": 0.2 * at_64, "log_every": 1,
        "save_every": 10**6, "num_workers": 0, "bn_group_size": 0, "schedule": "step", "weight_decay": 5e-4,
    }  # fmt: skip
    indices, classes = torch.arange(batch), 100
    views = [x] if rep else list(x.unbind(1))
    source = common.Source("recorded", batch, labels=labels, classes=[str(i) for i in range(classes)])
    source.fingerprint = lambda: "recorded"
    record = {}
    if rep:
        record = json.loads((npz_path.parent / "rep_steps.json").read_text())
        method = trainer.Args(**flags).run_dir.name  # one trainer a method, but for kd's seven
        method = flags.setdefault("method", "kd") if method == "kd" else method
        key = REP_NAMES.get(method, method)
        init, indices = len(arrays[f"{key}/init_loss"]), torch.from_numpy(arrays["index"])
        source.size = int(re.search(r"n_data (\d+)", record["how"])[1])
        slow = method == "ft" and student_name.startswith(("resnet8", "resnet20", "resnet32", "resnet56", "wrn"))
        known |= {"init_lr": 0.04 * at_64} if slow else {}
        known |= {"init_epochs": 2.0, "epochs": 3.0, "total_steps": init + len(arrays[f"{key}/loss"])}
    elif "head_lr" in trainer.Args.__dataclass_fields__:
        known |= {
            "head_epochs": 5.0,
            "epochs": 5.0,
            "total_steps": len(arrays["ssp/loss"]) + len(arrays["student/loss"]),
        }
    else:
        views, known = views[:1], {**known, "total_steps": len(arrays["vanilla/loss"])}
    batches = RecordedBatches(views, labels, indices, source)

    def network(architecture: str, **_) -> nn.Module:
        """Takes its input as it is: the recorded images are what the authors' networks saw."""
        model = timm.create_model(architecture, num_classes=classes)
        model.register_buffer("input_mean", torch.zeros(3, 1, 1), persistent=False)
        model.register_buffer("input_std", torch.ones(3, 1, 1), persistent=False)
        model.input_side = None
        return initialise(model, rounded=not rep)

    @torch.no_grad()
    def load_teacher(*_, **__) -> hub.Teacher:
        model = network(teacher_name)
        if "plain" not in name:  # 30 training passes, so that its logits depend on the input
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.momentum = 1 - 0.9**30  # one pass stands for 30: on one batch they all see the same statistics
            model.train()(x.flatten(0, -4))
        return hub.Teacher(model, {"source": "recorded", "architecture": teacher_name})

    replacements = [
        (common, "open_source", lambda data, role="train", **_: source if role == "train" else None),
        (common, "Batches", lambda *_, **__: batches),
        (common, "create_backbone", network),
        (hub, "load_teacher", load_teacher),
    ]
    for attribute, make in STAND_INS.items():
        if hasattr(trainer, attribute):
            replacements.append((trainer, attribute, make(getattr(trainer, attribute))))
    if rep:
        drawn = mock.Mock(draw=lambda *_: torch.from_numpy(arrays["contrast_idx"][:, 1:]))
        replacements.append((common, "OtherClasses", lambda *_: drawn))
        known["crd_negatives"] = arrays["contrast_idx"].shape[1] - 1
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        run_dir = Path(folder) / "run"
        fields = trainer.Args.__dataclass_fields__
        args = trainer.Args(**{**{k: v for k, v in known.items() if k in fields}, "run_dir": run_dir, **flags})
        for owner, attribute, value in replacements:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        torch.set_default_dtype(torch.float64 if double else torch.float32)
        torch.set_num_threads(1)
        try:
            trainer.main(args)
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        saved = torch.load(hub.checkpoints(run_dir)[0] / "state.pt", weights_only=True)["state"]
    assert len(lines) == args.total_steps, f"{len(lines)} of {args.total_steps} steps were logged"
    keys = dict.fromkeys(key for line in lines for key in line)
    result: dict = {key: [line[key] for line in lines if key in line] for key in keys}
    result["norms"], result["memory"] = {}, saved.get("memory")
    for part in saved.keys() & {"ssp_head", "student", "model", "connected", "paraphraser"}:
        for key, tensor in saved[part].items():
            where, name = official(part, key, rep)
            if rep and student_name == "mobilenetv2_cifar":
                name = name.replace("classifier.", "classifier.0.")
            result["norms"].setdefault(where, {})[name] = tensor.double().norm().item()
    return result


# A checkpoint's part and name of a tensor -> the record's, first match wins.
SSKD_NAMES = [(r"ssp_head/", "ssp/proj_head."), (r"student/head\.", "student/proj_head."), (r"", "")]
REP_PARTS = [
    (r"student/helper\.translator\.", "translator/encoder."),
    (r"student/helper\.(\w+)\.", r"\1/"),
    (r"student/(backbone\.)?", "student/"),
    (r"connected/backbone\.", "copy/"),
    (r"connected/connectors\.", "connector/connectors."),
    (r"paraphraser/", "paraphraser/"),
]


def official(part: str, key: str, rep: bool) -> tuple[str, str]:
    """Under which part and name a record keeps a tensor of a checkpoint."""
    name = f"{part}/{key}"
    pattern, new = next((p, n) for p, n in (REP_PARTS if rep else SSKD_NAMES) if re.match(p, name))
    where, _, name = re.sub(f"^{pattern}", new, name).partition("/")
    return where, name


def _head(create):
    return lambda dim: initialise(create(dim), "proj_head.")


def _helper(create):
    def stand_in(*args):
        helper = create(*args)
        for name, part in helper.named_children():
            initialise(part, f"{name}.encoder." if name == "translator" else f"{name}.", rounded=False)
        return helper

    return stand_in


def _connectors(create):
    return lambda *shapes: initialise(create(*shapes), "connector.connectors.", rounded=False)


def _paraphraser(create):
    return lambda width: initialise(create(width), "paraphraser.", rounded=False)


def _memory(_):
    names = iter(("memory_v1", "memory_v2"))

    def stand_in(count: int, dim: int) -> torch.Tensor:
        draw = np.random.RandomState(zlib.crc32(next(names).encode())).standard_normal((count, dim))
        return torch.from_numpy(draw / np.linalg.norm(draw, axis=1, keepdims=True))

    return stand_in


STAND_INS = {
    "create_head": _head, "create_helper": _helper, "create_connectors": _connectors, "Paraphraser": _paraphraser,
    "initial_memory": _memory,
}  # fmt: skip
