"""A trainer's or an evaluation's own `main` on the pretended device, its steps and their parts told apart.

As a program, `steps.py CASES.json OUT.json` does it for a list of cases in one process, or in every process of a pair
(gloo stands for NCCL), and writes what was seen. A case: its name, trainer, words (the command line), precision and, if
its trainer is to be spoilt first, the text to replace and the new one.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import device
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState

import common
import hub

OUTSIDE = ("log", "save", "evaluation")  # where the host may wait


@contextlib.contextmanager
def told_apart(seen):
    """Name the step and the part of it that an op belongs to, by what the trainers' shared parts call."""

    def around(stack, owner, name, phase, after=None):
        real = getattr(owner, name)

        def wrapper(self, *args, **kwargs):
            before, seen.phase = seen.phase, seen.phase if seen.phase in OUTSIDE else phase
            try:
                return real(self, *args, **kwargs)
            finally:
                seen.phase = after if after and seen.phase == phase else before

        stack.enter_context(mock.patch.object(owner, name, wrapper))

    real_due, real_start = hub.Run.log_due, hub.Run.start

    def due(self, step):
        answer = real_due(self, step)
        seen.phase = "log" if answer else seen.phase
        return answer

    def start(self, *args, **kwargs):
        for step in real_start(self, *args, **kwargs):
            seen.step, seen.phase = step, "forward"
            yield step
        seen.step, seen.phase = None, "end"

    with contextlib.ExitStack() as stack:
        around(stack, common.Batches, "batch", "views")
        around(stack, Accelerator, "backward", "backward", "forward")
        around(stack, AcceleratedOptimizer, "step", "optimizer")
        around(stack, AcceleratedOptimizer, "zero_grad", "optimizer")
        around(stack, hub.Run, "save", "save")
        around(stack, common.EpochAccuracy, "after", "evaluation")
        stack.enter_context(mock.patch.object(hub.Run, "log_due", due))
        stack.enter_context(mock.patch.object(hub.Run, "start", start))
        yield


@contextlib.contextmanager
def first_step_overflows():
    """What fp16 does to real networks: the first step's gradients are infinite, GradScaler skips it."""
    real, seen = Accelerator.backward, []

    def backward(self, loss, **options):
        real(self, loss if seen else loss * 1e36, **options)
        seen.append(loss)

    with mock.patch.object(Accelerator, "backward", backward):
        yield


def drive(trainer, words: list[str], precision: str = "no"):
    """Run `main` of a trainer (a module) on these flags; returns what was seen."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = precision
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device.CUDA)
    AcceleratorState._reset_state(False)
    overflow = first_step_overflows() if precision == "fp16" and "--resume" not in words else contextlib.nullcontext()
    with device.pretend() as seen, told_apart(seen), overflow:
        trainer.main(common.parse_args(trainer.Args, words))
    return seen


def load(name: str, old: str = "", new: str = ""):
    """A trainer, or one with a text replaced that must occur once."""
    if not old:
        return importlib.import_module(f"trainers.{name}")
    file = device.ROOT / "trainers" / f"{name}.py"
    text = file.read_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times: the sabotage no longer applies"
    module = type(sys)(f"spoilt_{name}")
    module.__file__, sys.modules[module.__name__] = str(file), module
    exec(compile(text.replace(old, new), str(file), "exec"), vars(module))
    return module


def waits(seen) -> dict[str, int]:
    """{line and what: how often} of what made the host wait in steps, outside logging, checkpoints and evaluation.

    From the third step on: the first two may fill caches.
    """
    inside = [(where, what) for step, phase, what, where, _ in seen.syncs if step >= 2 and phase not in OUTSIDE]
    return dict(Counter(f"{where}: {what}" for where, what in inside))


def ops(seen) -> dict[str, int]:
    """Ops of the step before the last, by its parts."""
    steps = sorted({step for step, _ in seen.ops if step is not None})
    if not steps:  # an evaluation without a loop
        return {}
    chosen = steps[-2] if len(steps) > 1 else steps[-1]
    return {phase: sum(count.values()) for (step, phase), count in seen.ops.items() if step == chosen}


def low_sums(seen) -> set[tuple[str, str]]:
    """(line, op) of sums and exponentials that a trainer's own lines did in low precision."""
    wide = {"_log_softmax", "_softmax", "exp", "log", "sum", "kl_div", "logsumexp", "sqrt", "pow"}
    return {(where, op) for where, op, _ in seen.low if op.split("::")[1] in wide}


class Parallel(torch.nn.Module):
    """DistributedDataParallel without its C++ reducer: equal weights and buffers, averaged gradients."""

    def __init__(self, module: torch.nn.Module, **_):
        super().__init__()
        self.module, self.averages = module, False
        for x in [*module.parameters(), *module.buffers()]:
            dist.broadcast(x.detach(), 0)
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self.average)

    def average(self, p: torch.Tensor) -> None:
        if self.averages:  # else a backward pass of another module that shares this parameter
            p.grad.div_(dist.get_world_size())
            dist.all_reduce(p.grad)

    def forward(self, *args, **kwargs):
        self.averages = self.training and torch.is_grad_enabled()
        for b in self.module.buffers():
            dist.broadcast(b, 0)
        return self.module(*args, **kwargs)


def stand_in_for_nccl() -> None:
    """gloo under NCCL's name."""
    real = dist.init_process_group

    def init(backend=None, *args, device_id=None, **kwargs):
        return real("gloo", *args, **kwargs)

    dist.init_process_group = torch.distributed.distributed_c10d.init_process_group = init
    dist.get_backend = lambda group=None: "nccl"
    torch.nn.parallel.DistributedDataParallel = Parallel


if __name__ == "__main__":
    device.install()
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        stand_in_for_nccl()
    found = {}
    for case in json.loads(Path(sys.argv[1]).read_text()):
        result = found[case["name"]] = {"error": ""}
        try:
            seen = drive(load(case["trainer"], *case.get("spoilt", ())), case["words"], case["precision"])
            result |= {"waits": waits(seen), "ops": ops(seen), "low": sorted(low_sums(seen))}
            result["copies"] = [copy for copy in seen.copies if copy[2] > 65536]
        except BaseException:
            result["error"] = traceback.format_exc()
        if os.environ.get("RANK", "0") == "0":
            Path(sys.argv[2]).write_text(json.dumps(found))
