"""A whole training step on CIFAR-10: a trainer's own loop against its authors' step, alternating in one run.

    python tests/benchmarks/step.py smd [--rounds 12] [--threads 1]   # time: ours, ours without data, theirs
    python tests/benchmarks/step.py moco
    python tests/benchmarks/step.py smd --memory                      # peak memory, each alone in a process
    ACCELERATE_MIXED_PRECISION=bf16 python tests/benchmarks/step.py smd    # ours in bf16, as the launcher asks for it

"Ours" is the trainer itself, `main` and all: between its steps this file takes the clock and runs the other side.
"Ours, fixed batch" is the same step on one batch that was made beforehand: what is lost to the data. "Theirs" follows
golden/NOTES of the authors' scripts: a DataLoader over PIL transforms, torchvision's networks, one pass a view, SGD, the
loss read every step; the loss function is ours on both sides, a hundredth of the step. BatchNorm is over the whole batch
on both, as on one GPU of theirs. CIFAR-10 is found in CLEANDISTILL_DATA (default ../shared/data).
"""

import argparse
import copy
import dataclasses
import importlib
import io
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from views import DATA, official

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import hub
from trainers import moco, smd

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class TwoViews(Dataset):
    """The authors' dataset: each image opened once, then two PIL pipelines."""

    def __init__(self, data: str, size: int):
        source = common.open_source(data, resident=False)
        self.encoded = [source.read(i) for i in range(len(source))]
        self.pipeline = official(size)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(self.encoded[i])).convert("RGB")
        return [self.pipeline(image), self.pipeline(image)]


def their_batches(args) -> Iterator[list[torch.Tensor]]:
    """The batches of a loader that starts over when it is through."""
    loader = DataLoader(
        TwoViews(args.data, args.size), args.batch, shuffle=True, drop_last=True, num_workers=args.workers,
        pin_memory=DEVICE.type == "cuda", persistent_workers=args.workers > 0,
    )  # fmt: skip
    while True:
        for views in loader:
            yield [x.to(DEVICE, non_blocking=True) for x in views]


def their_smd(args) -> Callable[[], None]:
    """main_distill.py: each call is one step."""
    teacher = torchvision.models.resnet50()
    teacher.fc = nn.Identity()
    teacher.eval().to(DEVICE).requires_grad_(False)
    student = torchvision.models.resnet18(zero_init_residual=True)
    student.fc = nn.Linear(512, 2048)
    student.train().to(DEVICE)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    stream = their_batches(args)

    def step() -> None:
        x1, x2 = next(stream)
        with torch.no_grad():
            t1, t2 = teacher(x1), teacher(x2)
        s1, s2 = student(x1), student(x2)
        cosine = (smd.cosine_loss(s1, t1) + smd.cosine_loss(s2, t2)) / 2
        loss = cosine + (smd.smd_loss(s1, t1, 0.04) + smd.smd_loss(s2, t2, 0.04)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def their_moco(args) -> Callable[[], None]:
    """main_moco.py with its builder, v2, on one device: each call is one step."""
    query = torchvision.models.resnet18(num_classes=128)
    query.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), query.fc)
    key = copy.deepcopy(query).requires_grad_(False).train().to(DEVICE)
    query.train().to(DEVICE)
    queue = F.normalize(torch.randn(128, QUEUE, device=DEVICE), dim=0)
    optimizer = torch.optim.SGD(query.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    stream, at = their_batches(args), 0

    def step() -> None:
        nonlocal at
        x1, x2 = next(stream)
        q = F.normalize(query(x1), dim=1)
        with torch.no_grad():
            for k, p in zip(key.parameters(), query.parameters(), strict=True):
                k.data = k.data * 0.999 + p.data * (1 - 0.999)
            order = torch.randperm(len(x2), device=DEVICE)
            keys = F.normalize(key(x2[order]), dim=1)[order.argsort()]
        loss = moco.info_nce(q, keys, queue.clone().T, 0.2)
        queue[:, at : at + len(keys)] = keys.T
        at = (at + len(keys)) % QUEUE
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


QUEUE = 16384
THEIRS = {"smd": their_smd, "moco": their_moco}
LEAST = {"smd": 1.3, "moco": 1.0}  # times as fast as theirs, our goal on a CPU


class Done(Exception):
    """Ends our `main` when enough was measured."""


def run_ours(args, between: Callable[[common.Batches], Iterator[int]]) -> None:
    """The trainer's main on CIFAR-10, with a random ResNet-50 teacher; `between` yields the steps and keeps the clock."""
    teacher = hub.Teacher(common.create_backbone("resnet50"), {"source": "random", "architecture": "resnet50"})
    original, trainer = hub.Run.start, importlib.import_module(f"trainers.{args.method}")

    def start(run: hub.Run, first: int, total: int, data: common.Batches, *_) -> Iterator[int]:
        original(run, first, total, data)
        return between(data)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(hub, "load_teacher", lambda *_, **__: teacher):
        with mock.patch.object(hub.Run, "start", start):
            flags = {
                "run_dir": Path(folder), "data": args.data, "teacher": "random", "image_size": args.size,
                "batch_size": args.batch, "group_size": 0, "bn_group_size": 0, "save_every": 10**9,
                "num_workers": args.workers, "student": "resnet18", "backbone": "resnet18", "queue_length": QUEUE,
            }  # fmt: skip
            known = {field.name for field in dataclasses.fields(trainer.Args)}
            try:
                trainer.main(trainer.Args(**{k: v for k, v in flags.items() if k in known}))
            except Done:
                pass


def wait() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args) -> dict[str, list[float]]:
    """Seconds per step of each side in each round of `--block` steps; the first round does not count."""
    theirs, seconds = THEIRS[args.method](args), {"ours": [], "ours, fixed batch": [], "theirs": []}

    def between(data: common.Batches) -> Iterator[int]:
        step, make, kept = 0, data.batch, data.batch(0)
        for i in range(args.rounds + 1):
            for name in seconds:
                data.batch = (lambda _: kept) if name == "ours, fixed batch" else make
                start = wait()
                for _ in range(args.block):
                    if name == "theirs":
                        theirs()
                    else:
                        yield step  # main does this step before it asks for the next
                        step += name == "ours"
                if i:
                    seconds[name].append((wait() - start) / args.block)
        raise Done

    run_ours(args, between)
    return seconds


def peak_memory(args) -> None:
    """Print this process's peak before and after some steps, MiB: on a GPU what torch allocated, else resident."""

    def peak() -> float:
        if DEVICE.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def between(_: common.Batches) -> Iterator[int]:
        before = peak()
        yield from range(args.rounds)
        print(f"{args.side}: {before:.0f} MiB before the first step, {peak():.0f} MiB after {args.rounds}")
        raise Done

    if args.side == "ours":
        return run_ours(args, between)
    step, before = THEIRS[args.method](args), peak()
    for _ in range(args.rounds):
        step()
    print(f"{args.side}: {before:.0f} MiB before the first step, {peak():.0f} MiB after {args.rounds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", help=f"a trainer; the authors' step is here for {', '.join(THEIRS)}")
    parser.add_argument("--data", default=str(DATA / "cifar10"), help="what a trainer's --data takes")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=1, help="steps of one side in a row; above --workers prefetch")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=32, help="side of the views; theirs decode CIFAR-10 at any size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="theirs: data workers beside the step")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.method not in THEIRS:
        parser.error(f"{args.method}: no step of its authors here; split.py shows every trainer's own")
    if args.side:
        return peak_memory(args)
    if args.memory:
        for side in ("ours", "theirs"):
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True)
        return
    seconds = measure(args)
    print(f"{args.method}, ResNet-18, batch {args.batch}, {args.size} px, {DEVICE}, {args.threads} thread(s)")
    for name, times in seconds.items():
        print(f"  {name:<20}{statistics.median(times) * 1e3:9.1f} ms/step")
    for name, other, least in (("theirs", "ours", LEAST[args.method]), ("ours, fixed batch", "ours", 0.95)):
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))
        print(f"  time of {name} / time of {other}: {ratio:.2f} (at least {least})")


if __name__ == "__main__":
    main()
