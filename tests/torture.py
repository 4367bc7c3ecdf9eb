"""Is anything ever lost? Kills, crashes at every file event, full disks, damaged folders and files, dead data workers.

    python tests/torture.py --minutes 10 [--only kills --only disks] [--seed 0]

A tiny run is disturbed in one way at a time and then continued as a scheduler would, with --resume alone. It survives if
the end is the undisturbed run's: the same log, the same released weights, byte for byte. A loss is anything else: a
traceback, a hang, exit code 0 with other weights, a run that cannot be continued. Prints tried / survived for each kind
and exits with 1 on any loss.
"""

import argparse
import atexit
import contextlib
import errno
import functools
import itertools
import json
import multiprocessing.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import safetensors.torch
import torch
from runs import metrics, photographs

import common
import hub
from trainers import simsiam, smd, supervised
from trainers.shared import sources
from trainers.shared.card import draw_curve

HANGS = 90  # seconds; a whole run takes less than one on an idle core
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@dataclass
class Outcome:
    code: int | None  # negative: the signal that ended it; None: it hung
    said: str

    def problem(self, *allowed: int) -> str:
        """What is wrong about an end with one of these codes, "" if nothing."""
        if "Traceback" in self.said:
            return f"a traceback: {self.said.strip().splitlines()[-1][:200]}"
        if self.code not in allowed:
            return f"exit code {self.code}: {self.said.strip()[-200:]}"
        return ""


@dataclass
class Child:
    """`call` in a fork of this process, which has imported everything; `meddle` runs there first."""

    call: Callable[[], object]
    meddle: Callable[[], None] = lambda: None
    log: Path | None = field(default_factory=lambda: Path(tempfile.mkstemp(suffix=".log")[1]))  # None: its parent's
    pid: int = 0

    def __post_init__(self):
        sys.stdout.flush()
        if (pid := os.fork()) > 0:
            self.pid = pid
            return
        code = 1
        try:
            for number in SIGNALS:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            if self.log is not None:
                out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1), os.dup2(out, 2)
            os.closerange(3, 256)  # a new process inherits none, and locks are held by open files
            torch.set_num_threads(1)
            self.meddle()
            self.call()
            code = 0
        except SystemExit as stop:  # as the interpreter does it
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException as error:
            code = 130 if isinstance(error, KeyboardInterrupt) else 1
            sys.excepthook(*sys.exc_info())
        finally:
            try:
                sys.stdout.flush(), sys.stderr.flush()
                atexit._run_exitfuncs()
                multiprocessing.util._exit_function()
            finally:
                os._exit(code)

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> Outcome:
        """Waits for it; one that hangs is killed and has no code."""
        deadline, status, hung = time.time() + HANGS, None, False
        while status is None:
            pid, found = os.waitpid(self.pid, os.WNOHANG)
            status = found if pid else None
            if status is None and time.time() > deadline:
                hung = True
                self.kill(signal.SIGKILL)
            time.sleep(0.01)
        said = self.log.read_text(errors="replace")
        self.log.unlink(missing_ok=True)
        return Outcome(None if hung else os.waitstatus_to_exitcode(status), said)


class ForkedTeacher(Child):
    """What hub.py starts to train the digits' teacher, without the seconds that a new Python takes."""

    def __init__(self, command: list[str], env: dict):
        super().__init__(lambda: train(supervised, [*command[2:], *TEACHER]), log=None)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        self.kill(signal.SIGTERM)


def train(trainer: ModuleType, words: list[str]) -> None:
    hub.subprocess = SimpleNamespace(Popen=ForkedTeacher)
    trainer.main(common.parse_args(trainer.Args, words))


def tiny(trainer: str, steps: int) -> list[str]:
    config = common.ROOT / "configs" / trainer / "tiny.toml"
    return ["--config", str(config), "--total-steps", str(steps), "--save-every", "2"]


TEACHER = [*tiny("supervised", 8), "--subset", "64"]


@dataclass(frozen=True, eq=False)
class Plan:
    """A trainer and its flags, and the folder of its undisturbed run."""

    trainer: ModuleType
    flags: list[str]
    whole: Path

    def start(self, run_dir: Path, *more: str, meddle: Callable[[], None] = lambda: None) -> Child:
        words = [*self.flags, "--run-dir", str(run_dir), *more]
        return Child(lambda: train(self.trainer, words), meddle)

    def continued(self, run_dir: Path) -> str:
        """What is wrong after --resume, as a scheduler would have it; "" if nothing."""
        outcome = self.start(run_dir, "--resume").end()
        return f"--resume: {problem}" if (problem := outcome.problem(0)) else self.difference(run_dir)

    def ended(self, outcome: Outcome, run_dir: Path, *codes: int) -> str:
        """What is wrong about a disturbed run's own end; success must be the whole run's."""
        problem = outcome.problem(*codes)
        if not problem and outcome.code == 0 and (problem := self.other_training(run_dir)):
            problem = f"exit code 0 with {problem}"
        return problem

    def difference(self, run_dir: Path, but: tuple[str, ...] = ("versions",)) -> str:
        if problem := self.other_training(run_dir):
            return problem
        ours, theirs = (json.loads((r / "results.json").read_text()) for r in (run_dir, self.whole))
        if {k: v for k, v in ours.items() if k not in but} != {k: v for k, v in theirs.items() if k not in but}:
            return f"other figures in results.json: {ours}"
        left = [path.name for path in run_dir.iterdir() if path.name.startswith(".") and path.name != ".lock"]
        return f"left behind: {', '.join(left)}" if left else ""

    def other_training(self, run_dir: Path) -> str:
        if metrics(run_dir) != metrics(self.whole):
            return "another log"
        return "" if same_weights(run_dir / "release", self.whole / "release") else "other weights in release/"


def same_weights(ours: Path, theirs: Path) -> bool:
    if not (ours / "model.safetensors").exists():
        return False
    a, b = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (ours, theirs))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Torture:
    """The undisturbed runs, and every way to disturb one. Each way gives (what was done, what is wrong or "")."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.count, self.decks = folder, random.Random(seed), 0, {}
        sources._digits = functools.cache(sources._digits)
        sources._digits("train"), sources._digits("test")
        small = photographs(folder / "small", count=40, sides=(16, 16))
        large = photographs(folder / "large", count=40)
        self.plan = Plan(simsiam, [*tiny("simsiam", 8), "--data", str(small)], self.new_folder())
        streamed = ["--data", str(large), "--num-workers", "2"]
        self.streamed = Plan(simsiam, [*tiny("simsiam", 24), *streamed], self.new_folder())
        self.taught = Plan(smd, [*tiny("smd", 6), "--subset", "64"], self.new_folder())
        self.kept = {plan.whole.parent for plan in (self.plan, self.streamed, self.taught)}
        common.parse_args(simsiam.Args, self.plan.flags)  # imports once what every child would import
        self.seconds = {
            plan: self.check_whole(plan.start(plan.whole)) for plan in (self.streamed, self.taught, self.plan)
        }
        draw_curve(self.plan.whole, folder / "curve.png")  # likewise
        self.events = self.count_events(self.plan.start)
        self.build_events = self.count_events(self.start_build)

    @staticmethod
    def check_whole(child: Child) -> float:
        """The seconds that it takes."""
        start, outcome = time.time(), child.end()
        if problem := outcome.problem(0):
            raise SystemExit(f"the undisturbed run fails: {problem}\n{outcome.said}")
        return time.time() - start

    def new_folder(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}" / "run"

    def each(self, kind: str, choices: Iterable):
        """One of the choices, at random; none comes again before all have come."""
        if kind not in self.decks:
            choices = list(choices)
            self.decks[kind] = itertools.cycle(self.rng.sample(choices, len(choices)))
        return next(self.decks[kind])

    def copied(self, plan: Plan) -> Path:
        run_dir = self.new_folder()
        shutil.copytree(plan.whole.parent, run_dir.parent)
        return run_dir

    # --- the ways ---

    def kills(self) -> tuple[str, str]:
        """SIGKILL at up to three random moments."""
        run_dir, moments = self.new_folder(), []
        for attempt in range(self.rng.randint(1, 3)):
            child = self.plan.start(run_dir, *(["--resume"] if attempt else []))
            moments.append(round(self.rng.uniform(0, self.seconds[self.plan]), 2))
            time.sleep(moments[-1])
            child.kill(signal.SIGKILL)
            if problem := self.plan.ended(child.end(), run_dir, 0, -signal.SIGKILL):
                return f"after {moments} s", problem
        return f"after {moments} s", self.plan.continued(run_dir)

    def signals(self) -> tuple[str, str]:
        """SIGTERM, SIGUSR1 or Ctrl-C at a random moment: code 143 with a checkpoint, or the run was through."""
        run_dir, number = self.new_folder(), self.rng.choice(SIGNALS)
        child, moment = self.plan.start(run_dir), self.rng.uniform(0.05, self.seconds[self.plan])
        while not (run_dir / ".lock").exists() and not exited(child.pid):  # before, the code is not ours
            time.sleep(0.01)
        time.sleep(moment)
        child.kill(number)
        # once the run has given its signals back, before it ends, the code is the system's own
        problem = self.plan.ended(child.end(), run_dir, 0, 143, 130, -number)
        return f"{signal.Signals(number).name} after {moment:.2f} s", problem or self.plan.continued(run_dir)

    def teachers(self) -> tuple[str, str]:
        """The run, or it and the digits' teacher that it has trained, is killed or stopped at a random moment."""
        run_dir, number = self.new_folder(), self.rng.choice([signal.SIGKILL, signal.SIGTERM])
        child, both = self.taught.start(run_dir), self.rng.random() < 0.5
        while not (run_dir / ".lock").exists() and not exited(child.pid):
            time.sleep(0.01)
        moment = self.rng.uniform(0.05, self.seconds[self.taught])
        time.sleep(moment)
        victims = [*(children(child.pid) if both else []), child.pid]
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, number)
        problem = self.taught.ended(child.end(), run_dir, 0, 143, -number)
        done = f"{number.name} of {len(victims)} after {moment:.2f} s"
        problem = problem or self.taught.continued(run_dir)
        teachers = (r.parent / "digits_teacher" / "release" for r in (run_dir, self.taught.whole))
        return done, problem or ("" if same_weights(*teachers) else "another teacher")

    def count_events(self, start: Callable[..., Child]) -> int:
        """How many file events there are in an undisturbed `start(run_dir)`."""
        run_dir, counter = self.new_folder(), self.folder / "events"

        def meddle() -> None:
            seen = [0]
            at_file_event(run_dir.parent, lambda *_: seen.__setitem__(0, seen[0] + 1))
            atexit.register(lambda: counter.write_text(str(seen[0])))

        self.check_whole(start(run_dir, meddle=meddle))
        return int(counter.read_text())

    def crashes(self) -> tuple[str, str]:
        """The process is gone at one of its own file events."""
        return self.at_random_event(gone_at)

    def disks(self) -> tuple[str, str]:
        """From one file event on nothing can be written any more, then space is made."""
        return self.at_random_event(full_from)

    def at_random_event(self, way: Callable) -> tuple[str, str]:
        run_dir, n = self.new_folder(), self.each(way.__name__, range(1, self.events + 1))
        child = self.plan.start(run_dir, meddle=lambda: at_file_event(run_dir.parent, way(n)))
        problem = self.plan.ended(child.end(), run_dir, 0, 1, GONE)
        return f"{way.__name__} {n} of {self.events} file events", problem or self.plan.continued(run_dir)

    def small_disks(self) -> tuple[str, str]:
        """A file system of a few hundred kilobytes; then its content on a larger one."""
        place, run_dir = self.new_folder(), self.new_folder()
        size = sum(f.stat().st_size for f in self.plan.whole.rglob("*"))
        kilobytes = self.rng.randint(4, int(1.3 * size) // 1024)
        place.mkdir(parents=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True
        ).returncode:
            return "no tmpfs can be mounted here", "skipped"
        try:
            problem = self.plan.ended(self.plan.start(place / "run").end(), place / "run", 0, 1)
            if (place / "run").exists():
                shutil.copytree(place / "run", run_dir)
        finally:
            subprocess.run(["umount", "--lazy", place], capture_output=True)
        return f"a disk of {kilobytes} KiB", problem or self.plan.continued(run_dir)

    def releases(self) -> tuple[str, str]:
        """hub.py build is gone or out of space at a file event, beside a release with an exported file; then once more."""
        way, n = self.each("builds", itertools.product([gone_at, full_from], range(1, self.build_events + 1)))
        run_dir = self.copied(self.plan)
        (run_dir / "release" / "model.onnx").write_bytes(b"exported")
        child = self.start_build(run_dir, lambda: at_file_event(run_dir.parent, way(n)))
        problem = child.end().problem(0, 1, GONE)
        if not problem and self.rng.random() < 0.5:
            problem = self.start_build(run_dir).end().problem(0)
        problem = problem or self.plan.continued(run_dir)
        if not problem and not (run_dir / "release" / "model.onnx").exists():
            problem = "model.onnx is lost"
        return f"hub.py build, {way.__name__} {n} of {self.build_events}", problem

    def start_build(self, run_dir: Path, meddle: Callable[[], None] = lambda: None) -> Child:
        if not run_dir.exists():
            shutil.copytree(self.plan.whole, run_dir)
        return Child(lambda: hub._build(run_dir), meddle)

    def damages(self) -> tuple[str, str]:
        """A file of the newest checkpoint is cut, zeroed or gone, or a foreign folder claims to be newer."""
        run_dir = self.copied(self.plan)
        shutil.rmtree(run_dir / "release"), (run_dir / "results.json").unlink()
        newest, kind = hub.checkpoints(run_dir)[0], self.rng.choice(["cut", "zeroed", "gone", "empty", "foreign"])
        if kind in ("empty", "foreign"):
            foreign = run_dir / f"step_{self.rng.choice([9, 99, 10**7]):08d}"
            foreign.mkdir()
            for file in newest.iterdir() if kind == "foreign" else ():
                (foreign / file.name).write_bytes(self.rng.randbytes(100))
            done = f"{kind} {foreign.name}"
        else:
            file = self.rng.choice(sorted(newest.iterdir()))
            damage(file, kind, self.rng)
            done = f"{newest.name}/{file.name} {kind}"
        return done, self.built(run_dir) or self.plan.continued(run_dir)

    def built(self, run_dir: Path) -> str:
        """What is wrong about hub.py build in a damaged folder: it refuses, or the release is of a step that it names."""
        outcome = self.start_build(run_dir).end()
        if (problem := outcome.problem(0, 1)) or outcome.code == 1:
            return f"hub.py build: {problem}" if problem else ""
        if same_weights(run_dir / "release", self.plan.whole / "release"):
            return ""
        _, before = hub.checkpoints(self.plan.whole)
        honest = f"released {before.name}, passed over" in outcome.said
        return (
            "" if honest and same_weights(run_dir / "release", before) else "hub.py build: other weights in release/"
        )

    def records(self) -> tuple[str, str]:
        """A small file of the run folder is damaged: build, report, list, inspect and --resume work, or name it."""
        records = [
            (plan, name)
            for plan in (self.plan, self.taught)
            for name in sorted(f.name for f in plan.whole.iterdir() if f.suffix in (".json", ".jsonl", ".py"))
        ]
        kinds = ("cut", "zeroed", "gone", "not JSON", "other types", "a folder")
        (plan, name), kind = self.each("records", itertools.product(records, kinds))
        run_dir = self.copied(plan)
        file = run_dir / name
        content = file.read_bytes()
        damage(file, kind, self.rng)
        commands = [hub._build, hub._inspect, lambda run: hub._report((run,)), lambda run: hub._list(run.parent)]
        outcomes = [Child(lambda command=command: command(run_dir)).end() for command in commands]
        problem = next(filter(None, (outcome.problem(0, 1) for outcome in outcomes)), "")
        if not problem and not same_weights(run_dir / "release", plan.whole / "release"):
            problem = "hub.py build: other weights in release/"
        if problem:
            return f"{file.name} {kind}", problem
        outcome = plan.start(run_dir, "--resume").end()
        outcomes.append(outcome)
        unnamed = [o.said for o in outcomes if o.code == 1 and kind != "other types" and file.name not in o.said]
        problem = outcome.problem(0, 1) or "".join(f"does not name the file: {said}" for said in unnamed[:1])
        if not problem and outcome.code == 1:  # it asks for the file
            shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
            file.write_bytes(content)
            problem = plan.continued(run_dir)
        elif not problem and file.name != "metrics.jsonl":
            tells = ("report_problem",) if name == "results.json" else ()  # of the damage, which is mended
            problem = plan.difference(run_dir, ("versions", *tells))
        elif not problem:  # what was lost stays lost
            known = all(line in metrics(plan.whole) for line in (metrics(run_dir) if file.exists() else ()))
            whole = same_weights(run_dir / "release", plan.whole / "release")
            problem = "" if known and whole else "another log or other weights"
        return f"{file.name} {kind}", problem

    def workers(self) -> tuple[str, str]:
        """A data worker is killed: one line that says so, after the checkpoint that was due."""
        run_dir = self.new_folder()
        child, victim, moment = self.streamed.start(run_dir), None, self.rng.uniform(0, self.seconds[self.streamed])
        while victim is None and not exited(child.pid):
            victim = self.rng.choice(children(child.pid) or [None])
            time.sleep(0.01)
        time.sleep(moment)
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        outcome = child.end()
        problem = self.streamed.ended(outcome, run_dir, 0, 1)
        if not problem and outcome.code == 1 and "worker" not in outcome.said:
            problem = f"not a word of the worker: {outcome.said.strip()[-200:]}"
        return f"a worker killed after {moment:.2f} s", problem or self.streamed.continued(run_dir)


GONE = 137


def gone_at(n: int) -> Callable[[int, str], None]:
    return lambda number, _: os._exit(GONE) if number == n else None


def full_from(n: int) -> Callable[[int, str], None]:
    def full(number: int, event: str) -> None:
        if number >= n and event in ("write", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return full


def damage(file: Path, how: str, rng: random.Random) -> None:
    content = file.read_bytes()
    file.unlink()
    if how == "a folder":
        file.mkdir()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif how == "not JSON":
        file.write_bytes(rng.choice([b"null", b"[1]", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b""]))
    elif how == "other types":
        with contextlib.suppress(ValueError):
            first = json.loads(content.splitlines()[0] if file.suffix == ".jsonl" else content)
            values = [None, 1e999, -1, [], {}, [None], "x" * 5000, True]
            content = json.dumps({key: rng.choice([value, *values]) for key, value in first.items()}).encode()
        file.write_bytes(content)


def at_file_event(folder: Path, act: Callable[[int, str], None]) -> None:
    """Call act(number, event) before every event that changes something below `folder`, in this process from now on."""
    number, inside = 0, str(folder)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal number
        if event == "open":
            event = "write" if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else ""
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:  # below an open folder, as rmtree goes
            arguments = (os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), os.fsdecode(arguments[0])),)
        if event and any(inside in os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)):
            number += 1
            act(number, event)

    sys.addaudithook(hook)
    for owner, name, position in (
        (torch, "save", 1),
        (safetensors.torch, "save_file", 1),
    ):  # written by no Python code
        original = getattr(owner, name)

        def write(*arguments, original=original, position=position, **options):
            target = arguments[position]
            hook("open", (str(target), "w", os.O_WRONLY))
            original(*arguments, **options)
            hook("open", (str(target), "w", os.O_WRONLY))  # whole, and not yet renamed

        setattr(owner, name, write)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def exited(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


WAYS = (
    "kills", "signals", "teachers", "crashes", "disks", "small_disks", "releases", "damages", "records", "workers",
)  # fmt: skip


def main(minutes: float, only: list[str], seed: int) -> dict[str, tuple[int, int]]:
    """{kind: (tried, survived)}, each kind at least once; prints every loss and what was done."""
    ways, deadline = only or list(WAYS), time.time() + 60 * minutes
    found = dict.fromkeys(ways, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="torture"))  # a TemporaryDirectory would be deleted by every fork that ends
    try:
        torture, turn = Torture(folder, seed), 0
        print(f"one run: {torture.seconds[torture.plan]:.1f} s, {torture.events} file events", flush=True)
        while time.time() < deadline or turn < len(ways):
            way, turn = ways[turn % len(ways)], turn + 1
            done, problem = getattr(torture, way)()
            tried, survived = found[way]
            if problem != "skipped":
                found[way] = tried + 1, survived + (not problem)
            if problem and problem != "skipped":
                print(f"LOST {way}: {done}: {problem}", flush=True)
            for run in folder.glob("run*"):
                if run not in torture.kept:
                    shutil.rmtree(run, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for way, (tried, survived) in found.items():
        print(f"{way:12} {survived} of {tried} survived")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", action="append", choices=WAYS, default=[])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = main(options.minutes, options.only, options.seed)
    sys.exit(any(tried != survived for tried, survived in counts.values()))
