"""Everything that is asked of a GPU, in one command and a fixed time: tests, steps, the authors' steps, a short training.

    python tests/benchmarks/gpu.py --pack             # before, where everything is installed: fills .gpu/ to carry along
    python tests/benchmarks/gpu.py --minutes 10       # on the machine with the GPU; needs no internet
    python tests/benchmarks/gpu.py --small            # a trial of all of it on a CPU, 3 minutes at most (71 s of CPU)
    python tests/benchmarks/gpu.py --pretend          # its tests and steps on a pretended GPU, 3 minutes at most

Parts, in this order, each with a share of the time and what earlier ones left of theirs:
  tests      tests/test_gpu.py
  steps      every trainer in bf16, fp32 and fp16, then compiled: time, data, launches, host waits, peak memory
  authors    SMD's and MoCo's steps against the authors' (DataLoader over PIL transforms), alternating, at 32 and 224 px
  training   SimSiam, then SMD from it: ResNet-18 with the 3x3 stem, CIFAR-10, bf16, with kNN at the end
All results so far are in one JSON file (--out) after every measurement. A part or a measurement that fails or hangs is
recorded there as an error, and the next goes on. `.gpu/site` holds pure-Python packages and `.gpu/data` CIFAR-10 as TSV,
compressed, which needs no `datasets`, and photographs; --pack copies both (about 40 MiB).
"""

import argparse
import contextlib
import gzip
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
CARRIED = ROOT / ".gpu"
PRETENDED = ROOT / "tests" / "pretended_gpu"
DATA = Path(os.environ.get("CLEANDISTILL_DATA", ROOT.parent / "shared" / "data"))
TRAINERS = sorted(p.stem for p in (ROOT / "trainers").glob("*.py") if not p.stem.startswith("eval_"))
NEEDED = {  # module: what is lost without it
    "torch": "everything", "torchvision": "everything", "timm": "everything", "accelerate": "everything",
    "tyro": "everything", "safetensors": "everything", "huggingface_hub": "everything", "PIL": "everything",
    "pytest": "the part tests", "sklearn": "the embedded digits: the tests, and steps where CIFAR-10 is missing too",
}  # fmt: skip
# Pure Python, what a bare PyTorch machine lacks, with what these need in their turn
PACKED = [
    "tyro",
    "docstring_parser",
    "typeguard",
    "typing_extensions",
    "timm",
    "accelerate",
    "pytest",
    "pluggy",
    "iniconfig",
]
SHARES = {"tests": 0.2, "steps": 0.35, "authors": 0.2, "training": 0.25}
PRECISIONS = {"bf16": "bf16", "fp32": "no", "fp16": "fp16"}  # our word: Accelerate's


class Done(Exception):
    """Ends a trainer's `main` when enough was measured."""


class Bench:
    """The results so far, the clock, and processes that cannot outlive their time."""

    def __init__(self, args):
        self.args, self.began = args, time.monotonic()
        self.results: dict = {"schema": 1, "command": sys.argv[1:], "machine": {}, "parts": {}}

    def left(self) -> float:
        """Seconds until the whole time is up."""
        return self.began + 60 * self.args.minutes - time.monotonic()

    def save(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        beside = self.args.out.with_suffix(".tmp")
        beside.write_text(json.dumps(self.results, indent=1) + "\n")
        beside.replace(self.args.out)

    def process(self, words: list, seconds: float, log: Path, grace: float = 0, **env: str) -> int | None:
        """Run a command with its output in `log`; its exit code, or None if its time was up and it was ended."""
        with open(log, "w") as f:
            child = subprocess.Popen(
                [str(word) for word in words], cwd=ROOT, stdout=f, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            )  # fmt: skip
        try:
            return child.wait(max(0.1, seconds - grace))
        except subprocess.TimeoutExpired:
            if grace:  # a trainer writes a checkpoint on SIGTERM
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(grace)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # its data workers too
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def measure(self, kind: str, spec: dict, seconds: float, **env: str) -> list[dict]:
        """Measurements of one kind in a process of their own: those that it finished, and an error if it did not end."""
        spec = {"small": self.args.small, "pretend": self.args.pretend, **spec}
        with tempfile.TemporaryDirectory() as folder:
            out, log = Path(folder) / "out", Path(folder) / "log"
            code = self.process([sys.executable, HERE, "--child", kind, json.dumps(spec), out], seconds, log, **env)
            rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
            if code != 0:
                why = f"not done in {seconds:.0f} s" if code is None else f"exit code {code}"
                rows.append({**spec, "error": f"{why}: {tail(log)}"})
        return rows


def tail(log: Path, count: int = 400) -> str:
    """The last characters of a log."""
    return log.read_text(errors="replace").strip()[-count:] if log.exists() else ""


# --- parts: each fills its own dictionary, so that what it has stays if it fails ---


def tests(bench: Bench, part: dict, until: float) -> None:
    """pytest's verdicts are read from its verbose output: a run that is ended keeps those before."""
    log = bench.args.out.with_suffix(".tests.log")
    words = [sys.executable, "-m", "pytest", "-v", "-rA", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    env = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "" if bench.args.small else "0")}
    if bench.args.pretend:
        words += ["-p", "pretend_in_tests"]
        env["PYTHONPATH"] = os.pathsep.join([str(PRETENDED), os.environ["PYTHONPATH"]])
        others = sorted({*TRAINERS, "eval_finetune"} - {*trainers_of(bench)})
        words += ["-k", " and ".join(f"not [{name}- and not [{name}]" for name in others)] if others else []
    code = bench.process(words, until - time.monotonic(), log, **env)
    verdicts = dict(re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", log.read_text(), flags=re.M))
    part.update(exit_code=code, counts=dict(Counter(verdicts.values())), log=log.name)
    part["failed"] = [name for name, verdict in verdicts.items() if verdict in ("FAILED", "ERROR")]
    if code not in (0, 5):
        part["error"] = f"{'out of time' if code is None else f'exit code {code}'}: {tail(log)}"


def trainers_of(bench: Bench) -> list[str]:
    """Those asked for, else all, or in a trial one of each kind."""
    return bench.args.trainers or (["simsiam", "smd"] if bench.args.small else TRAINERS)


def steps(bench: Bench, part: dict, until: float) -> None:
    """One process a trainer, all precisions; compiled ones after the others of all trainers."""
    part["rows"] = []
    names = trainers_of(bench)
    todo = [(name, False) for name in names] + ([] if bench.args.small else [(name, True) for name in names])
    part["not_reached"] = [f"{name}{', compiled' * compiled}" for name, compiled in todo]
    for name, compiled in todo:
        left = until - time.monotonic()
        if left < 10:
            return
        spec = {"trainer": name, "compiled": compiled, "precisions": ["bf16"] if compiled else list(PRECISIONS)}
        spec["data"] = "digits" if bench.args.small else cifar()
        part["rows"] += bench.measure("steps", spec, min(left, 90))
        part["not_reached"].pop(0)
        bench.save()


def authors(bench: Bench, part: dict, until: float) -> None:
    part["rows"] = []
    if cifar() == "digits":
        raise FileNotFoundError("no CIFAR-10 and no photographs here: run --pack before")
    todo = [(method, size) for size in (32, 224) for method in ("smd", "moco")]
    if bench.args.small:
        todo = todo[:1]
    for i, (method, size) in enumerate(todo):
        left = until - time.monotonic()
        if left < 10:
            return
        with tempfile.TemporaryDirectory() as folder:
            data = cifar() if size == 32 else photographs(Path(folder))
            spec = {"method": method, "size": size, "data": str(data)}
            precision = "no" if bench.args.small else "bf16"
            env = {"ACCELERATE_MIXED_PRECISION": precision}
            part["rows"] += bench.measure("authors", {**spec, "ours_in": precision}, left / (len(todo) - i), **env)
        bench.save()


def training(bench: Bench, part: dict, until: float) -> None:
    """SimSiam takes half of the time, SMD the rest; how many epochs that is, is told from the trainer's own speed."""
    with tempfile.TemporaryDirectory() as folder:
        for method in ("simsiam", "smd"):
            seconds = (until - time.monotonic()) / (2 if method == "simsiam" else 1)
            if seconds < 20:
                raise TimeoutError(f"{seconds:.0f} s left for {method}")
            if method == "smd" and not any((Path(folder) / "simsiam").glob("step_*")):
                raise RuntimeError("simsiam left no checkpoint, smd has nothing to learn from")
            part[method] = row = {}
            row.update(train(bench, method, Path(folder), seconds))
            bench.save()


def train(bench: Bench, method: str, folder: Path, seconds: float) -> dict:
    """One run in at most so many seconds: its curve, and its kNN if it came to its end."""
    began, run_dir, log = time.monotonic(), folder / method, bench.args.out.with_suffix(f".{method}.log")
    batch = 16 if bench.args.small else 512
    config = "tiny" if bench.args.small else "resnet18_cifar10"
    precision = "fp32" if bench.args.small else "bf16"  # a CPU's bf16 kernels have faults
    data = "digits" if bench.args.small else cifar()
    teacher = ["--teacher", folder / "simsiam"] if method == "smd" else []
    spec = {"trainer": method, "compiled": False, "precisions": [precision], "data": data, "batch": batch}
    spec |= {"teacher": str(folder / "simsiam")} if teacher else {}
    trial = bench.measure("steps", {**spec, "small_images": not bench.args.small}, min(90, seconds / 2))
    if "step_ms" not in trial[0]:
        raise RuntimeError(trial[0]["error"])
    # start-up and kNN take a fifth; a step costs as much as in the trial
    at_most = 8 if bench.args.small else 10**6
    count = min(at_most, int(0.8 * (seconds - (time.monotonic() - began)) / (trial[0]["step_ms"] / 1e3)))
    words = [sys.executable, ROOT / "trainers" / f"{method}.py", "--config", ROOT / f"configs/{method}/{config}.toml"]
    words += ["--data", data, "--run-dir", run_dir, "--batch-size", batch, "--total-steps", max(1, count), *teacher]
    env = {"ACCELERATE_MIXED_PRECISION": PRECISIONS[precision]}
    left = seconds - (time.monotonic() - began)
    code = bench.process(words, left, log, grace=min(10, left / 4), **env)
    file = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    every = max(1, len(lines) // 200)
    text = log.read_text(errors="replace")
    row = {"steps": count, "batch": batch, "exit_code": code, "curve": lines[::every], "log": log.name}
    row["knn"] = {
        name.strip(): float(value) for name, value in re.findall(r"^\s*([a-z][\w ]*?) +(\d+\.\d+) %", text, re.M)
    }
    row["fitted"] = re.findall(r"^fitted to .*", text, re.M)  # flags that are not those asked for
    if code != 0:
        row["error"] = f"{'out of time' if code is None else f'exit code {code}'}: {tail(log)}"
    return row


PARTS: dict[str, Callable[[Bench, dict, float], None]] = {
    "tests": tests, "steps": steps, "authors": authors, "training": training,
}  # fmt: skip


def run_parts(bench: Bench) -> None:
    """Each part's share of the time is of what is left for it and those after it: unused time is handed on."""
    names = [name for name in PARTS if name in bench.args.parts]
    for i, name in enumerate(names):
        part = bench.results["parts"][name] = {"error": None}
        began = time.monotonic()
        share = SHARES[name] / sum(SHARES[later] for later in names[i:])
        try:
            PARTS[name](bench, part, began + share * (bench.left() - 3))
        except Exception as error:
            part["error"] = f"{type(error).__name__}: {error}"
            part["traceback"] = traceback.format_exc()
        part["seconds"] = round(time.monotonic() - began, 1)
        bench.save()
        print(
            f"{name}: {part['seconds']:.0f} s{', ' + part['error'].splitlines()[0] if part['error'] else ''}",
            flush=True,
        )


# --- measurements, in a process of their own ---


def measure_steps(spec: dict, emit: Callable[[dict], None]) -> None:
    """A trainer's own `main`, with a random ResNet-50 as teacher, in each precision."""
    for precision in spec["precisions"]:
        row = {k: spec[k] for k in ("trainer", "compiled")} | {"precision": precision}
        try:
            with pretended(spec["pretend"]) as seen:
                measure_trainer(spec, precision, seen, row)
        except (Exception, SystemExit) as error:  # what was measured before stays
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error)[:400]}"
        emit({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()})


@contextlib.contextmanager
def pretended(asked: bool) -> Iterator:
    """On a pretended CUDA device where asked for: what it has seen, else None. Raises device.NotHere."""
    if not asked:
        yield None
        return
    sys.path[:0] = [str(PRETENDED)] if str(PRETENDED) not in sys.path else []
    import device

    device.install()
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device.CUDA)
    with device.pretend() as seen:
        yield seen


def networks_of(spec: dict) -> tuple[str, str]:
    """The network that learns and its teacher; ab needs two whose maps before the activation are known."""
    if spec["trainer"] == "ab":
        return ("resnet20", "resnet20") if spec["small"] else ("resnet8x4", "resnet32x4")
    return ("test_resnet", "test_resnet") if spec["small"] else ("resnet18", "resnet50")


def words_of(spec: dict, args_class: type, folder: str) -> list[str]:
    """The command line: what is not given may be fitted to the data, so all that could be is given."""
    size, batch = (16, 16) if spec["small"] else (32, spec.get("batch", 256))
    network, _ = networks_of(spec)
    flags = {
        "run_dir": folder, "data": spec["data"], "student": network, "backbone": network,
        "teacher": spec.get("teacher", "random"), "epochs": 100, "image_size": size, "small_crop_size": size // 2,
        "batch_size": batch, "group_size": 0, "bn_group_size": 0, "queue_length": 4 * batch, "log_every": 10**9,
        "save_every": 10**9, "num_workers": 0, "compile": spec["compiled"],
        "small_images": spec.get("small_images", False),
    }  # fmt: skip
    flags |= {"small_patch_size": size // 2, "crd_negatives": 4 * batch} if spec["small"] else {}
    return [
        f"--{name if value is not False else f'no-{name}'}{'' if isinstance(value, bool) else f'={value}'}"
        for name, value in flags.items()
        if name in args_class.__dataclass_fields__
    ]


def measure_trainer(spec: dict, precision: str, seen, row: dict) -> None:
    """Fill `row`, one figure after the other, from steps of the trainer's loop; a first stage is timed apart."""
    import torch
    from accelerate.state import AcceleratorState

    import common
    import hub

    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_MIXED_PRECISION"] = PRECISIONS[precision]
    small = spec["small"]
    trainer = importlib.import_module(f"trainers.{spec['trainer']}")
    cuda, begin = torch.cuda.is_available() and not seen, hub.Run.start
    warm, count = (1, 2) if small else (8, 20)
    first_stage = 0

    def now() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def two_stages(args, first_epochs: float, total_steps: int, steps_per_epoch: int) -> tuple[int, int]:
        nonlocal first_stage
        first_stage = warm + count
        return first_stage, first_stage + total_steps

    def timed(steps: Iterator[int], name: str) -> Iterator[int]:
        for _ in range(warm):
            yield next(steps)  # main does this step before it asks for the next
        at = now()
        for _ in range(count):
            yield next(steps)
        row[name] = (now() - at) / count * 1e3

    def start(run: hub.Run, first: int, total: int, data: common.Batches, *state) -> Iterator[int]:
        begin(run, first, total, data, *state)
        asked = {k: str(v) for k, v in vars(args).items()}
        row["fitted"] = {k: str(v) for k, v in vars(run.args).items() if str(v) != asked[k]}
        row.update(batch=data.batch_size, size=data.views[0][1])
        return measured(data)

    def measured(data: common.Batches) -> Iterator[int]:
        steps = iter(range(10**9))
        if first_stage:
            yield from timed(steps, "first_stage_ms")
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        yield from timed(steps, "step_ms")
        if cuda:
            row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        at = now()
        for step in range(count):
            data.batch(step)
        row["data_ms"] = (now() - at) / count * 1e3
        if cuda:
            yield from count_waits(row, steps)
            yield from count_launches(row, steps)
        elif seen:
            yield from count_pretended(row, steps, seen)
        raise Done

    _, teachers = networks_of(spec)

    def teacher(*_, num_classes: int = 0, **__) -> hub.Teacher:
        backbone = common.create_backbone(teachers, num_classes=num_classes)
        return hub.Teacher(backbone, {"source": "random", "architecture": teachers})

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for owner, name, function in ((hub.Run, "start", start), (common, "two_stages", two_stages)):
            stack.enter_context(mock.patch.object(owner, name, function))
        if seen:
            import steps as parts  # pretended_gpu/steps.py

            stack.enter_context(parts.told_apart(seen))
        args = common.parse_args(trainer.Args, words_of(spec, trainer.Args, folder))
        if "teacher" not in spec and hasattr(args, "teacher"):
            stack.enter_context(mock.patch.object(hub, "load_teacher", teacher))
        with contextlib.suppress(Done):
            trainer.main(args)


def count_pretended(row: dict, steps: Iterator[int], seen, count: int = 3) -> Iterator[int]:
    """Ops in a step, and what makes the host wait, by line."""
    import steps as parts

    seen.syncs.clear()  # what a first stage leaves behind is saved once
    for _ in range(count):
        yield next(steps)
    waits = parts.waits(seen)
    row.update(launches=sum(parts.ops(seen).values()), waits=sum(waits.values()) / count, waits_at=waits)


def count_waits(row: dict, steps: Iterator[int], count: int = 3) -> Iterator[int]:
    """How often the host waits for the GPU in a step, and the lines that do so most."""
    import torch

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(count):
                yield next(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)]
    row.update(waits=len(waits) / count, waits_at=dict(Counter(waits).most_common(5)))


def count_launches(row: dict, steps: Iterator[int], count: int = 3) -> Iterator[int]:
    """Kernels and graphs launched in a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            yield next(steps)
    row["launches"] = (
        sum(e.count for e in profiler.key_averages() if re.match(r"cu(da)?(Graph)?Launch", e.key)) / count
    )


def measure_authors(spec: dict, emit: Callable[[dict], None]) -> None:
    """step.py's measurement. In a row one side does more steps than the workers of the other have prepared."""
    sys.path.insert(0, str(HERE.parent))
    import step

    workers = 0 if spec["small"] else min(16, len(os.sched_getaffinity(0)))
    batch, rounds, block = (16, 2, 1) if spec["small"] else (256, 3, max(10, 3 * workers))
    args = argparse.Namespace(**spec, batch=batch, workers=workers, rounds=rounds, block=block)
    seconds = step.measure(args)
    row = {
        f"{name.replace(', ', '_').replace(' ', '_')}_ms": statistics.median(s) * 1e3 for name, s in seconds.items()
    }
    ratio = statistics.median(a / b for a, b in zip(seconds["theirs"], seconds["ours"], strict=True))
    emit({**spec, "batch": batch, "workers": workers, **row, "times_as_fast": ratio})


CHILDREN = {"steps": measure_steps, "authors": measure_authors}


# --- data, what is installed, and what is carried ---


def cifar() -> str:
    """CIFAR-10 as --data takes it: what was carried, the files of CLEANDISTILL_DATA, else the embedded digits."""
    if (CARRIED / "data/cifar10/train.tsv").exists():
        return str(CARRIED / "data/cifar10")
    return str(DATA / "cifar10") if importlib.util.find_spec("datasets") and (DATA / "cifar10").is_dir() else "digits"


def unpack() -> None:
    """Carried files are compressed, trainers read them plain."""
    for packed in CARRIED.glob("data/cifar10/*.tsv.gz"):
        if not packed.with_suffix("").exists():
            beside = packed.with_suffix(".part")
            with gzip.open(packed) as source, open(beside, "wb") as target:
                shutil.copyfileobj(source, target)
            beside.replace(packed.with_suffix(""))


def photographs(folder: Path, count: int = 1280) -> Path:
    """A folder of so many names of the few photographs there are: each is decoded anew every time."""
    files = sorted((CARRIED / "data/photographs").glob("*")) or sorted((DATA / "imagenet-jpeg").glob("*"))
    if not files:
        raise FileNotFoundError("no photographs here: run --pack before")
    for i in range(count):
        link = folder / f"train/class{i % 10}/{i:04}.jpeg"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(files[i % len(files)].resolve())
    return folder


def pack() -> None:
    """Fill .gpu/ from this machine: packages from where they are installed, data from CLEANDISTILL_DATA."""
    import pyarrow.parquet as pq

    if not (DATA / "cifar10").is_dir():
        raise SystemExit(f"--pack: no CIFAR-10 in {DATA / 'cifar10'}; CLEANDISTILL_DATA names the folder above it")
    for name in PACKED:
        for file in importlib.metadata.files(name):
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = CARRIED / "site" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), target)
    (CARRIED / "data/cifar10").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = pq.read_table(DATA / f"cifar10/{split}.parquet", columns=["img", "label"]).to_pylist()
        with gzip.open(CARRIED / f"data/cifar10/{split}.tsv.gz", "wb", compresslevel=6) as f:
            for i, row in enumerate(rows):
                f.write(b"%d\t%d\t%s\n" % (i, row["label"], b64encode(row["img"]["bytes"])))
    shutil.copytree(DATA / "imagenet-jpeg", CARRIED / "data/photographs", dirs_exist_ok=True)
    total = sum(file.stat().st_size for file in CARRIED.rglob("*") if file.is_file())
    print(f"{CARRIED}: {total / 2**20:.0f} MiB; copy it into the checkout on the machine with the GPU")


def check(bench: Bench) -> None:
    """What this machine is and lacks, one line for each thing missing; without a GPU only a trial goes on."""
    missing = {name: cost for name, cost in NEEDED.items() if not importlib.util.find_spec(name)}
    for name, cost in missing.items():
        print(f"{name} is not installed, which costs {cost}: run --pack where it is, and carry .gpu/")
    if "everything" in missing.values():
        raise SystemExit(f"{', '.join(missing)}: not installed, nothing can be measured")
    import torch
    import torchvision

    unpack()
    found = torch.cuda.is_available()
    if not (found or bench.args.small or bench.args.pretend):
        raise SystemExit("no CUDA device here; --small tries everything on a CPU")
    name = torch.cuda.get_device_name() if found else f"CPU ({'pretended GPU' if bench.args.pretend else 'trial'})"
    bench.results["machine"] = {
        "device": name, "torch": torch.__version__, "torchvision": torchvision.__version__, "cuda": torch.version.cuda,
        "python": platform.python_version(), "cores": len(os.sched_getaffinity(0)), "missing": missing, "data": cifar(),
    }  # fmt: skip
    if cifar() == "digits":
        print("CIFAR-10 is not here, which costs the parts authors and training: run --pack before, and carry .gpu/")


def tables(results: dict) -> str:
    """The results as Markdown, for a terminal and for the README."""

    def cell(row: dict, key: str, digits: int = 0) -> str:
        return f"{row[key]:.{digits}f}" if key in row else "-"

    machine, parts = results["machine"], results["parts"]
    lines = [f"**{machine['device']}**, torch {machine['torch']}, {machine['cores']} CPU cores", ""]
    if "counts" in parts.get("tests", {}):
        lines += [
            "GPU tests: " + ", ".join(f"{n} {verdict.lower()}" for verdict, n in parts["tests"]["counts"].items()),
            "",
        ]
    if rows := parts.get("steps", {}).get("rows"):
        lines += [
            "| trainer | precision | ms/step | first stage, ms | data, ms | launches | host waits | peak MiB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            name = f"| {row['trainer']} | {row.get('precision', '')}{', compiled' * row['compiled']} | "
            keys = ("step_ms", "first_stage_ms", "data_ms", "launches", "waits", "peak_mib")
            cells = " | ".join(cell(row, key, 1 if key.endswith("ms") else 0) for key in keys)
            lines.append(name + (cells + " |" if "step_ms" in row else "failed | | | | | |"))
        lines.append("")
        fitted = [f"{row['trainer']} {k} {v}" for row in rows for k, v in row.get("fitted", {}).items()]
        lines += ["Fitted to the data, not as asked for: " + ", ".join(dict.fromkeys(fitted)), ""] if fitted else []
    if rows := parts.get("authors", {}).get("rows"):
        lines += ["| step | ours, ms | ours, fixed batch, ms | theirs, ms | times as fast |", "|---|---|---|---|---|"]
        for row in rows:
            cells = [cell(row, key, 1) for key in ("ours_ms", "ours_fixed_batch_ms", "theirs_ms", "times_as_fast")]
            lines.append(f"| {row['method']}, {row['size']} px | {' | '.join(cells)} |")
        lines.append("")
    for method, row in parts.get("training", {}).items():
        if isinstance(row, dict) and "knn" in row:
            knn = ", ".join(f"{name} {value:.2f} %" for name, value in row["knn"].items())
            lines.append(f"{method}, {row['steps']} steps of {row['batch']}: kNN {knn or 'not reached'}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="for everything (default: 10; 3 for a trial)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu.json", help="results; logs are written beside it")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="default: all; pretended, tests and steps")
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, help="for the part steps (default: all)")
    parser.add_argument("--small", action="store_true", help="tiny networks and few steps: a trial on a CPU")
    parser.add_argument("--pretend", action="store_true", help="tests and steps on a pretended GPU; implies --small")
    parser.add_argument("--pack", action="store_true", help="fill .gpu/ from this machine, and end")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.pack:
        return pack()
    args.parts = args.parts or (["tests", "steps"] if args.pretend else list(PARTS))
    args.small = args.small or args.pretend
    args.minutes = args.minutes or (3 if args.small else 10)
    if args.small:  # one thread is the fastest for tiny networks, and leaves cores to others
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    paths = [str(ROOT), *([str(CARRIED / "site")] if (CARRIED / "site").is_dir() else [])]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["HF_HUB_OFFLINE"] = "1"
    if args.child:
        kind, spec, out = args.child
        with open(out, "a", buffering=1) as f:
            return CHILDREN[kind](json.loads(spec), lambda row: print(json.dumps(row), file=f, flush=True))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    check(bench)
    bench.save()
    run_parts(bench)
    text = tables(bench.results)
    args.out.with_suffix(".md").write_text(text + "\n")
    print(f"\n{text}\n\n{args.out}")


if __name__ == "__main__":
    main()
