"""SwAV's steps once more, from the equations: what `main` logs must equal this, in float64.

The authors' trajectory was not recorded. This takes the crops and the initial weights that `main` drew and nothing else
of the trainer: the backbone's forward pass is timm's, all that follows it (head, Sinkhorn, queue, loss, LARC, momentum,
schedule) is written out here, for one process and one BatchNorm group.
"""

import contextlib
import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from runs import metrics
from tools import make_backbone
from torch import nn

import common
import hub

RECIPE = {
    "backbone": "test_resnet", "image_size": 16, "large_crops": 3, "small_crops": 2, "small_crop_size": 8,
    "small_crop_scale": (0.2, 0.4), "batch_size": 8, "subset": "24", "hidden_dim": 12, "projection_dim": 6, "num_prototypes": 10,
    "queue_length": 16, "queue_start_epoch": 1, "freeze_prototypes_steps": 4, "warmup_epochs": 1.0, "base_lr": 60.0,
    "start_lr": 30.0, "final_lr": 6.0, "weight_decay": 0.05, "total_steps": 9, "log_every": 1, "num_workers": 0,
}  # fmt: skip


def trajectories(trainer: ModuleType, run_dir: Path, with_head: bool = True) -> tuple[list[dict], list[float]]:
    """What `main` logged, one line a step, and the losses derived here. A trainer with --teacher gets a random one."""
    views, networks = [], []
    batch, prepare = common.Batches.batch, Accelerator.prepare
    backbone, head = make_backbone("test_resnet").double(), None
    if with_head:
        head = [nn.Linear(backbone.num_features, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 6)]
        head = nn.Sequential(*head).double()
    teacher = hub.Teacher(backbone, {"source": "a test", "architecture": "test_resnet"}, head)

    def record(self, step):
        got = batch(self, step)
        got.views = [x.double() for x in got.views]
        views.append(got.views)
        return got

    def keep(self, network, optimizer):
        networks.append(copy.deepcopy(network))
        return prepare(self, network, optimizer)

    def half_the_mean_square(crops, z):
        t = [teacher(x) if head is None else head(teacher(x)) for x in crops]
        return 0.5 * (z - torch.stack(t)).square().mean()

    fields = trainer.Args.__dataclass_fields__
    known = {**RECIPE, "student": RECIPE["backbone"], "teacher": "a test", "run_dir": run_dir}
    replacements = [
        (common.Batches, "batch", record),
        (Accelerator, "prepare", keep),
        (hub, "load_teacher", lambda *_, **__: teacher),
    ]
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, value in replacements:
                stack.enter_context(mock.patch.object(owner, name, value))
            trainer.main(trainer.Args(**{k: v for k, v in known.items() if k in fields}))
    finally:
        torch.set_default_dtype(dtype)
    extra = half_the_mean_square if "teacher" in fields else lambda crops, z: 0.0
    return metrics(run_dir), derive(views, networks[0], extra)


def derive(views: list, network: nn.Module, extra: Callable) -> list[float]:
    """The losses of `RECIPE` from each step's views and the initial weights; `extra(crops, z)` is added to each."""
    backbone, head, prototypes = network.backbone.double().train(), network.head, network.prototypes.weight
    weights = [*network.parameters()]
    speed = [torch.zeros_like(w) for w in weights]
    queue: list[list[torch.Tensor]] = [[], []]  # per large crop that gives codes: batches, the oldest first
    losses = []
    for step, crops in enumerate(views):
        with torch.no_grad():
            prototypes /= prototypes.norm(dim=1, keepdim=True)
        features = torch.cat([backbone(torch.cat(crops[:3])), backbone(torch.cat(crops[3:]))])  # one pass a size
        hidden = F.linear(features, head[0].weight, head[0].bias)
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        z = F.linear((hidden * head[1].weight + head[1].bias).relu(), head[3].weight, head[3].bias)
        z = z / z.norm(dim=1, keepdim=True)
        z = z.view(5, 8, -1)
        log_p = [(F.linear(x, prototypes) / 0.1).log_softmax(1) for x in z]
        loss = 0.0
        for a in (0, 1):
            rows = torch.cat([*queue[a], z[a]] if len(queue[a]) == 2 else [z[a]]).detach()
            q = (rows @ prototypes.detach().T / 0.05).exp().T  # prototypes x images
            for _ in range(3):
                q = q / q.sum(1, keepdim=True) / len(q)
                q = q / q.sum(0, keepdim=True) / q.shape[1]
            q = (q * q.shape[1]).T[-8:]
            loss = loss - sum((q * log_p[v]).sum(1).mean() for v in range(5) if v != a) / 4 / 2
            if step >= 3:  # epoch 1: three steps of 8 in 24 images
                queue[a] = [*queue[a], z[a].detach()][-2:]
        loss = loss + extra(crops, z)
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, weights)
        lr = [30.0, 45.0, 60.0][step] if step < 3 else 6.0 + 27.0 * (1 + math.cos(math.pi * (step - 3) / 6))
        with torch.no_grad():
            for w, g, v in zip(weights, grads, speed, strict=True):
                if w is prototypes and step < 4:
                    continue
                if w.norm() > 0 and g.norm() > 0:
                    g = (g + 0.05 * w) * 0.001 * w.norm() / (g.norm() + 0.05 * w.norm() + 1e-8)
                v.mul_(0.9).add_(g)
                w -= lr * 8 / 256 * v
    return losses
