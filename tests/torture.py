"""Is anything ever lost? Kills, crashes at every file event, full disks, damaged folders, dead data workers.

    python tests/torture.py --minutes 10 [--only kills --only disks] [--seed 0]

A tiny SimSiam run is disturbed in one way at a time and then continued as a scheduler would, with --resume alone. It
survives if the end is the undisturbed run's: the same log, the same released weights, byte for byte. A loss is anything
else: a traceback, a hang, exit code 0 with other weights, a run that cannot be continued. Prints tried / survived for
each kind and exits with 1 on any loss.
"""

import argparse
import atexit
import contextlib
import errno
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
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import safetensors.torch
import torch
from runs import metrics, photographs

import common
import hub
from trainers import simsiam

HANGS = 90  # seconds; a whole run takes two
TINY = ["--config", str(common.ROOT / "configs" / "simsiam" / "tiny.toml"), "--total-steps", "8", "--save-every", "2"]


@dataclass
class Outcome:
    code: int  # negative: the signal that ended it; None: it hung
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
    """simsiam.main on `words` in a fork of this process, which has imported everything; `meddle` runs there first."""

    words: list[str]
    meddle: Callable[[], None] = lambda: None
    pid: int = 0
    log: Path = field(default_factory=lambda: Path(tempfile.mkstemp(suffix=".log")[1]))

    def __post_init__(self):
        sys.stdout.flush()
        if (pid := os.fork()) > 0:
            self.pid = pid
            return
        code = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2)
            torch.set_num_threads(1)
            self.meddle()
            simsiam.main(common.parse_args(simsiam.Args, self.words))
            code = 0
        except SystemExit as stop:  # as the interpreter does it
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
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


class Torture:
    """The undisturbed run, and every way to disturb one. Each way gives (what was done, what is wrong or "")."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.count = folder, random.Random(seed), 0
        start = time.time()
        self.whole = self.new_folder()
        self.check_whole(Child(self.words(self.whole)).end())
        self.seconds = time.time() - start
        self.events = self.count_events()
        self.photographs = photographs(folder / "photographs", count=40)
        streamed = ["--data", str(self.photographs), "--num-workers", "2", "--total-steps", "24"]
        self.streamed = self.new_folder()
        self.check_whole(Child(self.words(self.streamed, *streamed)).end())

    @staticmethod
    def check_whole(outcome: Outcome) -> None:
        if problem := outcome.problem(0):
            raise SystemExit(f"the undisturbed run fails: {problem}\n{outcome.said}")

    def new_folder(self) -> Path:
        self.count += 1
        return self.folder / f"run{self.count}" / "run"

    def words(self, run_dir: Path, *more: str) -> list[str]:
        return [*TINY, "--run-dir", str(run_dir), *more]

    def continued(self, run_dir: Path, whole: Path | None = None, words: list[str] | None = None) -> str:
        """--resume as often as a scheduler would; what differs from the undisturbed run at the end."""
        whole = whole or self.whole
        if problem := Child([*(words or self.words(run_dir)), "--resume"]).end().problem(0):
            return f"--resume: {problem}"
        return self.difference(run_dir, whole)

    def difference(self, run_dir: Path, whole: Path) -> str:
        if metrics(run_dir) != metrics(whole):
            return "another log"
        ours, theirs = (safetensors.torch.load_file(r / "release" / "model.safetensors") for r in (run_dir, whole))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[k], theirs[k]) for k in ours):
            return "other weights in release/"
        ours, theirs = (json.loads((r / "results.json").read_text()) for r in (run_dir, whole))
        if ours != theirs:
            return "other figures in results.json"
        left = [path.name for path in run_dir.iterdir() if path.name.startswith(".") and path.name != ".lock"]
        return f"left behind: {', '.join(left)}" if left else ""

    # --- the ways ---

    def kills(self) -> tuple[str, str]:
        """SIGKILL at up to three random moments."""
        run_dir, moments = self.new_folder(), []
        for attempt in range(self.rng.randint(1, 3)):
            child = Child(self.words(run_dir, *(["--resume"] if attempt else [])))
            moments.append(self.rng.uniform(0, self.seconds))
            time.sleep(moments[-1])
            child.kill(signal.SIGKILL)
            outcome = child.end()
            if problem := outcome.problem(0, -signal.SIGKILL):
                return f"after {moments}", problem
        return f"after {moments} s", self.continued(run_dir)

    def signals(self) -> tuple[str, str]:
        """SIGTERM, SIGUSR1 or Ctrl-C at a random moment: code 143 with a checkpoint, or the run was through."""
        run_dir, number = self.new_folder(), self.rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        child, moment = Child(self.words(run_dir)), self.rng.uniform(0.3, self.seconds)
        time.sleep(moment)
        child.kill(number)
        # before `main` has set its handlers, and for Ctrl-C after the loop, the code is the system's own
        problem = child.end().problem(0, 143, 130, -number)
        return f"{signal.Signals(number).name} after {moment:.2f} s", problem or self.continued(run_dir)

    def count_events(self) -> int:
        run_dir, counter = self.new_folder(), self.folder / "events"

        def meddle() -> None:
            seen = [0]
            at_file_event(run_dir.parent, lambda *_: seen.__setitem__(0, seen[0] + 1))
            atexit.register(lambda: counter.write_text(str(seen[0])))

        self.check_whole(Child(self.words(run_dir), meddle).end())
        return int(counter.read_text())

    def crashes(self) -> tuple[str, str]:
        """The process is gone at one of its own file events."""
        run_dir, n = self.new_folder(), self.rng.randint(1, self.events)

        def meddle() -> None:
            at_file_event(run_dir.parent, lambda number, *_: os._exit(137) if number == n else None)

        problem = Child(self.words(run_dir), meddle).end().problem(0, 137)
        return f"gone at file event {n} of {self.events}", problem or self.continued(run_dir)

    def disks(self) -> tuple[str, str]:
        """From one file event on nothing can be written any more, then space is made."""
        run_dir, n = self.new_folder(), self.rng.randint(1, self.events)

        def meddle() -> None:
            def full(number: int, event: str) -> None:
                if number >= n and event in ("write", "os.mkdir"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            at_file_event(run_dir.parent, full)

        problem = Child(self.words(run_dir), meddle).end().problem(0, 1)
        return f"no space from file event {n} of {self.events} on", problem or self.continued(run_dir)

    def small_disks(self) -> tuple[str, str]:
        """A file system of a few hundred kilobytes; then its content on a larger one."""
        place, run_dir = self.new_folder(), self.new_folder()
        kilobytes = self.rng.randint(20, 1 + 3 * sum(f.stat().st_size for f in self.whole.rglob("*")) // 1024)
        place.mkdir(parents=True)
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", place], capture_output=True
        ).returncode:
            return "no tmpfs can be mounted here", "skipped"
        try:
            problem = Child(self.words(place / "run")).end().problem(0, 1)
            if (place / "run").exists():
                shutil.copytree(place / "run", run_dir)
        finally:
            subprocess.run(["umount", "--lazy", place], capture_output=True)
        return f"a disk of {kilobytes} KiB", problem or self.continued(run_dir)

    def damages(self) -> tuple[str, str]:
        """A file of the newest checkpoint is cut, zeroed or gone, or a foreign folder claims to be newer."""
        run_dir = self.new_folder()
        shutil.copytree(self.whole, run_dir)
        shutil.rmtree(run_dir / "release"), (run_dir / "results.json").unlink()
        newest, kind = hub.checkpoints(run_dir)[0], self.rng.choice(["cut", "zeroed", "gone", "empty", "foreign"])
        if kind in ("empty", "foreign"):
            foreign = run_dir / f"step_{self.rng.choice([9, 99, 10**7]):08d}"
            foreign.mkdir()
            for file in newest.iterdir() if kind == "foreign" else ():
                (foreign / file.name).write_bytes(self.rng.randbytes(100))
            return f"{kind} {foreign.name}", self.continued(run_dir)
        file = self.rng.choice(sorted(newest.iterdir()))
        content = file.read_bytes()
        file.unlink()
        if kind != "gone":
            file.write_bytes(content[: len(content) // 2] if kind == "cut" else bytes(len(content)))
        return f"{newest.name}/{file.name} {kind}", self.continued(run_dir)

    def workers(self) -> tuple[str, str]:
        """A data worker is killed: one line that says so, after the checkpoint that was due."""
        run_dir = self.new_folder()
        words = self.words(run_dir, "--data", str(self.photographs), "--num-workers", "2", "--total-steps", "24")
        child, victim, moment = Child(words), None, self.rng.uniform(0, 1.0)
        deadline = time.time() + 30
        while victim is None and time.time() < deadline and not exited(child.pid):
            victim = self.rng.choice(children(child.pid) or [None])
            time.sleep(0.01)
        time.sleep(moment)
        if victim is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        outcome = child.end()
        problem = outcome.problem(0, 1)
        if not problem and outcome.code == 1 and "worker" not in outcome.said:
            problem = f"not a word of the worker: {outcome.said.strip()[-200:]}"
        return f"a worker killed after {moment:.2f} s", problem or self.continued(run_dir, self.streamed, words)


def at_file_event(folder: Path, act: Callable[[int, str], None]) -> None:
    """Call act(number, event) before every event that changes something below `folder`, in this process from now on."""
    number, inside = 0, str(folder)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal number
        if event == "open":
            path, mode, flags = arguments
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            event = "write" if changes else ""
        elif event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "torch.save"):
            return
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


WAYS = ("kills", "signals", "crashes", "disks", "small_disks", "damages", "workers")


def main(minutes: float, only: list[str], seed: int) -> dict[str, tuple[int, int]]:
    """{kind: (tried, survived)}; prints every loss with its seed and what was done."""
    ways, deadline = only or list(WAYS), time.time() + 60 * minutes
    found = dict.fromkeys(ways, (0, 0))
    folder = Path(tempfile.mkdtemp(prefix="torture"))  # a TemporaryDirectory would be deleted by every fork that ends
    try:
        torture, turn = Torture(folder, seed), 0
        print(f"one run: {torture.seconds:.1f} s, {torture.events} file events", flush=True)
        while time.time() < deadline:
            way, turn = ways[turn % len(ways)], turn + 1
            done, problem = getattr(torture, way)()
            tried, survived = found[way]
            if problem != "skipped":
                found[way] = tried + 1, survived + (not problem)
            if problem and problem != "skipped":
                print(f"LOST {way}: {done}: {problem}", flush=True)
            for run in folder.glob("run*"):
                if run not in (torture.whole.parent, torture.streamed.parent):
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
