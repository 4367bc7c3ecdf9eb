"""What several test files need to run trainers on tiny data: arguments, metrics, subprocesses."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT
from filelock import FileLock
from torchvision.io import write_jpeg

import common

# what learns step by step; evaluations without a loop are elsewhere
TRAINERS = [
    "smd",
    "seed",
    "disco",
    "rkd",
    "swav_disco",
    "sskd",
    "kd",
    "crd",
    "ab",
    "ft",
    "simsiam",
    "moco",
    "swav",
    "supervised",
    "eval_finetune",
]
LABELLED = [
    "supervised",
    "sskd",
    "kd",
    "crd",
    "ab",
    "ft",
    "eval_finetune",
]  # learn from labels: report accuracy and not kNN
ENV = {
    **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def tiny_flags(method: str, run_dir: Path, teacher: Path, /, **changes) -> list[str]:
    """The command line of configs/<method>/tiny.toml with a teacher where the method takes one."""
    flags = {"config": ROOT / "configs" / method / "tiny.toml", "run-dir": run_dir, **changes}
    if "teacher" in importlib.import_module(f"trainers.{method}").Args.__dataclass_fields__:
        flags["teacher"] = teacher.parent / "zoo" if method == "ab" else teacher
    if method == "eval_finetune":
        flags["checkpoint"] = teacher
    words = []
    for key, value in flags.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def tiny_run(method: str, run_dir: Path, teacher: Path, /, **changes) -> list[dict]:
    """Train in this process; returns the lines of metrics.jsonl without the speed."""
    trainer = importlib.import_module(f"trainers.{method}")
    args = common.parse_args(trainer.Args, tiny_flags(method, run_dir, teacher))
    trainer.main(dataclasses.replace(args, **changes))
    return metrics(run_dir)


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines]


def command(method: str, processes: int = 1) -> list[str]:
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    return [sys.executable, *launcher, str(ROOT / "trainers" / f"{method}.py")]


def launch(words: list[str], **env) -> subprocess.CompletedProcess:
    done = subprocess.run(words, env={**ENV, **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def run_pair(folder: Path, cases: list[tuple[str, list[str], bool]]) -> None:
    """Each of these (trainer, its command line, float64 or not) in one and the same pair of processes, in order."""
    file = folder / "cases.json"
    file.write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "together.py"), str(file)],
        env=ENV, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def made_once(tmp_path_factory, name: str, make) -> Path:
    """A folder that `make(folder)` fills once for all workers of a test run; who comes second waits for it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / f"once_{name}"
    with FileLock(f"{folder}.lock"):
        if not (folder / ".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / ".made").touch()
    return folder


def photographs(folder: Path, count: int = 64, sides: tuple[int, int] = (100, 140)) -> Path:
    """A folder of smooth random JPEGs in ten classes, as many as digits, train/ and val/, too large to stay in memory."""
    g = torch.Generator().manual_seed(0)
    for i in range(count):
        height, width = torch.randint(sides[0], sides[1] + 1, (2,), generator=g).tolist()
        image = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=g), (height, width), mode="bicubic")[
            0
        ]
        path = folder / ("val" if i % 8 == 0 else "train") / f"class{i % 10}" / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jpeg(image.clamp(0, 1).mul(255).to(torch.uint8), str(path), quality=90)
    return folder
