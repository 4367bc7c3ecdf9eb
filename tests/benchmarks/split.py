"""Where a step's time goes in every trainer: data, networks without gradient (teacher, momentum encoder), the rest.

    python tests/benchmarks/split.py [TRAINER ...] [--steps 5] [--batch 64] [--size 32] [--threads 1]

A ResNet-18 on the embedded digits through the trainer's own `main`; a teacher is a random ResNet-50. The rest is the
student's forward and backward pass, the loss and the optimizer. On a GPU every part waits for the device to finish, which a
real run does not: there the sum is an upper bound.
"""

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.nn.modules import module

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common
import hub

NAMES = sorted(p.stem for p in (ROOT / "trainers").glob("*.py") if not p.stem.startswith("eval_"))


class Done(Exception):
    pass


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, args) -> list[dict[str, float]]:
    """Seconds per part of each of `--steps` steps, after two that do not count."""
    trainer, depth, began = importlib.import_module(f"trainers.{name}"), 0, 0.0
    steps: list[dict[str, float]] = []
    make, begin = common.Batches.batch, hub.Run.start

    def batch(self, step: int) -> common.Batch:
        at = now()
        got = make(self, step)
        steps[-1]["data"] += now() - at
        return got

    def enter(*_) -> None:
        nonlocal depth, began
        if not torch.is_grad_enabled():
            depth += 1
            began = now() if depth == 1 else began

    def leave(*_) -> None:
        nonlocal depth
        if not torch.is_grad_enabled():
            depth -= 1
            if depth == 0 and steps:
                steps[-1]["teacher"] += now() - began

    def start(run: hub.Run, first: int, total: int, data: common.Batches, *_) -> Iterator[int]:
        begin(run, first, total, data)
        for step in range(args.steps + 2):
            steps.append({"data": 0.0, "teacher": 0.0})
            at = now()
            yield step  # main does this step before it asks for the next
            steps[-1]["all"] = now() - at
        raise Done

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        known = {
            "run_dir": Path(folder), "student": "resnet18", "backbone": "resnet18", "teacher": "random", "epochs": 100.0,
            "image_size": args.size, "small_crop_size": args.size // 2, "batch_size": args.batch, "group_size": 0,
            "queue_length": 4 * args.batch, "bn_group_size": 0, "log_every": 10**9, "save_every": 10**9, "num_workers": 0,
        }  # fmt: skip
        fields = trainer.Args.__dataclass_fields__
        facts = {"source": "random", "architecture": "resnet50"}
        teacher = hub.Teacher(common.create_backbone("resnet50"), facts) if "teacher" in fields else None
        patches = [
            (common.Batches, "batch", batch),
            (hub.Run, "start", start),
            (hub, "load_teacher", lambda *_, **__: teacher),
        ]
        for owner, attribute, value in patches:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        for register, hook in (("pre_hook", enter), ("hook", leave)):
            stack.callback(getattr(module, f"register_module_forward_{register}")(hook).remove)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        with contextlib.suppress(Done):
            trainer.main(trainer.Args(**{k: v for k, v in known.items() if k in fields}))
    return steps[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32, help="side of the views; small crops have half of it")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'ms/step':<12}{'all':>9}{'data':>9}{'teacher':>9}{'student':>9}")
    for name in args.trainers:
        torch.manual_seed(0)
        steps = measure(name, args)
        part = {key: statistics.median(step[key] for step in steps) * 1e3 for key in ("all", "data", "teacher")}
        student = part["all"] - part["data"] - part["teacher"]
        print(f"{name:<12}" + "".join(f"{value:9.1f}" for value in (*part.values(), student)), flush=True)


if __name__ == "__main__":
    main()
