"""A run's folder: log, signals, atomic checkpoints, exact resume. A chapter of hub.py."""

import contextlib
import errno
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.distributed as dist
import torchvision
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, set_seed, tqdm
from filelock import FileLock, Timeout
from torch import Tensor, nn

from trainers.shared.boxes import Annotated
from trainers.shared.files import give_usual_mode, one_line, read_json, read_lines, write_whole
from trainers.shared.flags import ROOT, changed_flag, check_positive, stored_args
from trainers.shared.folders import first_line
from trainers.shared.sources import RESIDENT_PX, Source, available_cores
from trainers.shared.views import LEAST_PX

SKIPPED = 20  # steps in a row whose loss is not finite that fp16 may take; its scale has been halved as often

# What a launcher's configuration may ask for that would change what a run computes, by the variable that carries it.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
# What it may ask for that has a flag of ours, or none: not used, and said so. The value that asks for nothing, and our way.
UNUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "--batch-size is the batch of one optimizer step"),
    "ACCELERATE_GRADIENT_CLIPPING": ("none", "no trainer clips gradients but by its own flags"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "--compile is the flag"),
}


def create_accelerator(args) -> Accelerator:
    """The launcher's devices, processes and precision, and nothing else of its: a run is a function of its flags.

    Raises SystemExit for DeepSpeed, FSDP, Megatron-LM, fp8 and for settings that do not fit this machine.
    """
    asked = [
        name for variable, name in REFUSED.items() if os.environ.get(variable, "").lower() in ("true", "1", "yes")
    ]
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    asked += [] if precision in ("no", "bf16", "fp16") else [f"precision {precision}"]
    if asked:
        raise SystemExit(
            f"the launcher asks for {' and '.join(asked)}, which changes what a run computes: launch with torchrun, "
            "or with an accelerate config that sets processes, devices and precision (no, bf16, fp16) alone"
        )
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            log_with=None if args.tracker == "none" else args.tracker,
            project_dir=args.run_dir,
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except (
        ValueError,
        ImportError,
    ) as error:  # a precision that the device lacks, a tracker or launcher misconfigured
        raise SystemExit(f"the launcher's settings do not fit this machine: {first_line(error)}") from None
    for variable, (usual, way) in UNUSED.items():
        value = os.environ.get(variable, usual)
        if value.lower() != usual and accelerator.is_main_process:
            print(f"{variable}={value} is not used: {way}", flush=True)
    return accelerator


class Run:
    """A run's folder, log, progress, stop signals and checkpoints; made once at the top of `main`.

    Refuses a folder that holds or is just making another run, and with --resume flags that make another run of it;
    seeds every generator and checks that the launcher's processes see each other. Raises SystemExit with the remedy.
    args.json, environment.json and the trainer's own source are written by the first of `start`, `save` and `finish`:
    once nothing can be refused any more.
    """

    released: int | None = None  # the step whose network lies in release/
    report_problem = ""

    def __init__(self, args, trainer_file: str, accelerator: Accelerator):
        self.dir, self.args, self.accelerator = Path(args.run_dir), args, accelerator
        self.trainer = Path(trainer_file).stem
        world = accelerator.num_processes
        if world != int(os.environ.get("WORLD_SIZE", 1)):
            raise SystemExit(
                f"launched as {os.environ['WORLD_SIZE']} processes that do not see each other: on a CPU machine use "
                f"ACCELERATE_USE_CPU=true torchrun --nproc_per_node {os.environ['WORLD_SIZE']} {trainer_file}"
            )
        positive = ("batch_size", "save_every", "keep", "log_every")
        check_positive(args, *(name for name in positive if hasattr(args, name)))
        check_positive(args, "image_size", least=LEAST_PX)
        not_negative = ("num_workers", "bn_group_size", "total_steps")
        check_positive(args, *(name for name in not_negative if hasattr(args, name)), least=0)
        if getattr(args, "batch_size", world) % world:
            raise SystemExit(f"--batch-size {args.batch_size}: must be a multiple of the {world} processes")
        if args.tracker != "none" and [t.value for t in accelerator.log_with] != [args.tracker]:
            raise SystemExit(f"--tracker {args.tracker}: not installed; pip install {args.tracker}, or --tracker none")
        if world == 1 and accelerator.device.type == "cpu" and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
            torch.set_num_threads(available_cores())  # `accelerate launch` leaves a CPU run a single thread
        set_seed(args.seed, device_specific=False)
        self._start = self._first_step = self._total = self._images = 0
        self._bar = None
        self._first_bad, self._watched, self._saved = None, 0, None
        torch.backends.cudnn.benchmark = accelerator.device.type == "cuda"  # batches of one size or two
        self._trainer, self._lock, self._records, self._accepted = Path(trainer_file), None, {}, False
        if problem := self.same_everywhere(self._refusal() if accelerator.is_main_process else ""):
            raise SystemExit(problem)
        self._stop_group = dist.new_group(backend="gloo") if world > 1 else None  # asks without a wait for the GPU
        self._signal, self._signalled, self._stepping, self._before = 0, 0.0, False, {}
        if threading.current_thread() is threading.main_thread():
            sys.excepthook = _ctrl_c_in_one_line
            self._before = {
                n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
            }
        else:
            self.say("not in the main thread: signals do not stop this run, it cannot save a checkpoint when killed")
        launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"} & set(os.environ)
        self._parent = os.getppid() if launched else None

    def _refusal(self) -> str:
        """Why this run may not use its folder, or ""; the main process holds the folder's lock from here on."""
        args, resume = self.args, getattr(self.args, "resume", False)
        found = [name for name in ("step_*", "metrics.jsonl", "results.json") if any(self.dir.glob(name))]
        if found and not resume:
            remedy = "--resume it, or choose" if hasattr(args, "resume") else "choose"
            if found == ["metrics.jsonl"]:
                remedy = f"it has no checkpoint yet, --resume starts it again at step 0; or {remedy.split()[-1]}"
            return f"--run-dir {self.dir}: holds a run already: {remedy} another folder"
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = hold(self.dir / ".lock")
        except Timeout:
            return f"--run-dir {self.dir}: another run is using this folder now: wait for its end, or choose another folder"
        except OSError as error:
            return f"--run-dir {self.dir}: not writable ({error.strerror}); choose another folder"
        if self._lock is None:
            self.say(f"{self.dir}: this file system has no locks: nothing stops a second run in the same folder")
        try:
            stored = stored_args(self.dir, self._trainer.stem) if resume else None
        except SystemExit as stop:
            return str(stop)
        return changed_flag(args, stored) if stored else ""

    def close(self) -> None:
        """Give back the folder's lock and the signals; a run that is not closed keeps them until its process ends."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._lock is not None:
            self._lock.release(force=True)

    def _accept(self) -> None:
        """Write what was remembered and what was run, and start the tracker: nothing can be refused any more."""
        if self._accepted:
            return
        self._accepted = True
        if self.accelerator.is_main_process:
            for name, text in {**self._facts(), **self._records}.items():
                write_whole(self.dir / name, text)
        if self.args.tracker != "none":
            simple = {k: v if isinstance(v, int | float | str) else str(v) for k, v in vars(self.args).items()}
            self.accelerator.init_trackers(self.dir.name, config=simple)

    def _record(self, name: str, facts: dict) -> None:
        """A JSON file of the run folder, from the main process; kept back until the run is accepted."""
        if self.accelerator.is_main_process:
            text = json.dumps(facts, indent=2, default=str) + "\n"
            write_whole(self.dir / name, text) if self._accepted else self._records.update({name: text})

    def _facts(self) -> dict[str, str]:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
        device = self.accelerator.device
        facts = {
            "trainer": self._trainer.stem,
            "commit": commit,
            "num_processes": self.accelerator.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
            "mixed_precision": self.accelerator.mixed_precision,
            "float32_matmul": torch.get_float32_matmul_precision(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
        }
        return {
            "args.json": json.dumps(vars(self.args), indent=2, default=str) + "\n",
            "environment.json": json.dumps(facts, indent=2) + "\n",
            self._trainer.name: self._trainer.read_text(),
        }

    def adopt(self, args) -> None:
        """Go on with these flags, which were fitted to the data; args.json will have them."""
        self.args = args

    def same_everywhere(self, value):
        """The main process's value on every process: what is on disk may differ from one look to the next."""
        if self.accelerator.num_processes == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def say(self, text: str) -> None:
        """One line on the terminal, from the main process, above the progress bar if there is one."""
        if self.accelerator.is_main_process:
            text = text.encode(errors="backslashreplace").decode()  # file names need not be UTF-8
            tqdm.write(text) if self._bar is not None else print(text, flush=True)

    # --- signals ---

    def _on_signal(self, number: int, _) -> None:
        """Within the steps: remember to stop after this one. Before and after them there is nothing to save: end at once.

        A signal that comes again changes nothing, as launchers repeat what they get; but Ctrl-C from a second after the
        first on ends the run without a checkpoint.
        """
        if self._signal:
            if number == signal.SIGINT and time.monotonic() - self._signalled > 1:
                if not self._stepping:
                    raise SystemExit(130)
                os.write(2, b"stopped at once by a second Ctrl-C: no checkpoint of this step\n")
                os._exit(130)
            return
        self._signal, self._signalled = number, time.monotonic()
        by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        main = self.accelerator.is_main_process
        if self._stepping:
            if main and number == signal.SIGINT:
                os.write(2, b"\nstopping: a checkpoint after this step; Ctrl-C again ends at once\n")
            return
        if main:
            how = "; --resume continues it" if hasattr(self.args, "resume") else ""
            os.write(2, f"\nstopped by {by} outside the training steps, nothing lost{how}\n".encode())
        raise SystemExit(130 if number == signal.SIGINT else 143)

    def stop_requested(self) -> bool:
        """True on every process at once after SIGTERM, SIGUSR1 or Ctrl-C, or once the launcher is gone; ask once per step."""
        if self._parent and os.getppid() != self._parent:
            self._signal = signal.SIGTERM
        if self._stop_group is None:
            return bool(self._signal)
        flag = torch.tensor([self._signal])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._stop_group)
        return bool(flag)

    def _stop_while_waiting(self, state: dict, backbone: nn.Module | None, step: int) -> None:
        if self.stop_requested():
            if step not in (self._first_step, self._saved):
                self.save(step, state, backbone)
            self.stop(step)

    # --- log ---

    def start(
        self,
        first_step: int,
        total_steps: int,
        data=None,
        state: dict | None = None,
        backbone: nn.Module | None = None,
    ) -> Iterator[int]:
        """The steps to do; forgets logged steps that a resumed run does again, and states what runs where.

        `state` and `backbone`, as for `save`, are what a stop signal keeps that comes while a batch of `data` is waited for.
        Raises SystemExit if a resumed run's data are not those of data.json.
        """
        if total_steps < 1:
            raise SystemExit(f"--epochs {self.args.epochs}: must give at least one step; or set --total-steps")
        self._first_step, self._total, self._start = first_step, total_steps, time.perf_counter()
        self._images, self._last_line = self.args.batch_size, 0.0
        if state is not None and self.accelerator.num_processes == 1:  # several agree on a stop only between steps
            data.while_waiting = partial(self._stop_while_waiting, state, backbone)
        if data is not None:
            self._record_data(data.source)
        self._accept()
        if self.accelerator.is_main_process:
            log = self.dir / "metrics.jsonl"
            lines = read_lines(log)
            kept = [line for line in lines if 0 <= _logged_step(line) < first_step]
            if len(kept) != len(lines):
                write_whole(log, "".join(f"{line}\n" for line in kept))
            if data is not None:
                how = data.kept if data.resident else f"streamed ({data.num_workers} workers)"
                self.say(f"data: {data.source.name}, {len(data.source)} images, {how}")
                side = max(size for _, size in data.views)
                network = getattr(self.args, "student", getattr(self.args, "backbone", ""))
                stem = getattr(self.args, "small_images", True) is False and timm.is_model(f"{network}_small")
                if side <= 64 and stem and self.args.data != "digits":
                    self.say(f"images of {side} px: ResNets learn better with --small-images (3x3 stem, no max-pool)")
            processes, threads = self.accelerator.num_processes, torch.get_num_threads()
            self.say(f"{total_steps - first_step} steps from {first_step} on {processes} x {self.accelerator.device}"
                     f" ({threads} threads, precision {self.accelerator.mixed_precision}), into {self.dir}")  # fmt: skip
            if sys.stderr.isatty():
                self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
        return self._steps(range(first_step, total_steps))

    def _steps(self, steps: range) -> Iterator[int]:
        self._stepping = True
        try:
            yield from steps
        except (
            GeneratorExit
        ):  # the loop was left: by an error, or stopped, and then what a launcher repeats is ignored
            if not self._signal:
                self.close()
            raise
        finally:
            self._stepping = False

    def _record_data(self, source: Source) -> None:
        problem = ""
        if self.accelerator.is_main_process:
            facts = {"name": source.name, "images": len(source), "licence": source.licence}
            facts["fingerprint"] = source.fingerprint()
            with contextlib.suppress(SystemExit):  # of a damaged one nothing can be said
                before = read_json(self.dir / "data.json") if getattr(self.args, "resume", False) else {}
                kept = {key for key in ("images", "fingerprint") if before.get(key, facts[key]) != facts[key]}
                if kept:
                    problem = (
                        f"--resume: --data {source.name} holds other images than those of this run ({one_line(before.get('images'))} then, "
                        f"{len(source)} now): give it its data back, or choose another --run-dir"
                    )
        if problem := self.same_everywhere(problem):
            raise SystemExit(problem)
        if self.accelerator.is_main_process:
            self._record("data.json", facts)

    def watch(self, step: int, loss: Tensor) -> None:
        """Remember, on the device and without waiting for it, the first step whose loss was not finite.

        A GradScaler skips steps that overflow: with it, the first of those since the last finite loss.
        """
        finite = loss.detach().isfinite().all()
        bad = torch.where(finite, torch.inf, float(step))
        if self._first_bad is not None:
            bad = torch.minimum(self._first_bad, bad)
        if self.accelerator.scaler is not None:
            bad = torch.where(finite, torch.inf, bad)
        self._first_bad, self._watched = bad, step

    def check(self) -> None:
        """Stop with the step's number if a watched loss was not finite; with a GradScaler, if so for SKIPPED steps."""
        if self._first_bad is None or not math.isfinite(first := self._first_bad.item()):
            return
        if self.accelerator.scaler is None or self._watched - first >= SKIPPED:
            raise SystemExit(
                f"step {int(first)}: the loss is not finite. A learning rate far too high, or fp16 overflow: start again "
                f"with a lower --base-lr in another --run-dir; or use bf16 and --resume, from the newest checkpoint in {self.dir}"
            )

    def log_due(self, step: int) -> bool:
        if self._bar is not None:
            self._bar.update()
        return step % self.args.log_every == 0 or step + 1 == self._total

    def log(self, step: int, **metrics: float | Tensor) -> dict[str, float]:
        """Append one line to metrics.jsonl; tensors are averaged over the processes. Returns plain numbers."""
        self.check()
        names = [k for k, v in metrics.items() if isinstance(v, Tensor)]
        if names:
            values = torch.stack([metrics[k].detach().mean() for k in names])
            if self.accelerator.num_processes > 1:
                values = self.accelerator.reduce(values, "mean")
            metrics |= dict(zip(names, values.tolist(), strict=True))
        if self.accelerator.is_main_process:
            done, seconds = step + 1 - self._first_step, time.perf_counter() - self._start
            rate = done * self._images / seconds
            try:
                with open(self.dir / "metrics.jsonl", "a") as f:
                    f.write(json.dumps({"step": step, **metrics, "images_per_s": round(rate, 1)}) + "\n")
            except OSError as error:
                raise SystemExit(f"{self.dir}: no log written ({error.strerror}); free space, then --resume") from None
            left = (self._total - step - 1) * seconds / done
            shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            if self._bar is not None:
                self._bar.set_postfix_str(f"{shown}  {rate:.0f} images/s")
            elif seconds - self._last_line > 10 or step + 1 == self._total:  # a log file needs no line per step
                self._last_line = seconds
                self.say(f"step {step + 1}/{self._total}  {shown}  {rate:.0f} images/s  {left / 60:.1f} min left")
            if self.args.tracker != "none":
                self.accelerator.log(metrics, step=step)
        return metrics

    # --- checkpoints ---

    def save(self, step: int, state: dict, backbone: nn.Module | None) -> None:
        """Write step_<step>/ whole or not at all: everything in `state`, every process's RNG, `backbone` for releases.

        `state` maps names to modules, optimisers or tensors; an evaluation has no backbone to release: None. Older
        checkpoints beyond --keep go once the new one is in place. A full disk stops the run and leaves the previous
        checkpoint; weights that are not finite stop it too, as no good checkpoint may make room for them.
        """
        self.check()
        self._accept()
        modules = [v for v in state.values() if isinstance(v, nn.Module)]
        if backbone is not None and not self.same_everywhere(
            _finite(t for m in modules for t in m.state_dict().values())
        ):
            before = next((f"; {folder} stays" for folder in checkpoints(self.dir) if _step(folder) < step), "")
            raise SystemExit(
                f"step {step}: the weights are not finite and were not saved{before}. A learning rate far too high, or fp16 "
                "overflow: start again with a lower --base-lr in another --run-dir; or use bf16 and --resume"
            )
        rng = {"python": random.getstate(), "numpy": _numpy_rng(), "torch": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state()
        everyone = [rng]
        if self.accelerator.num_processes > 1:
            everyone = [None] * self.accelerator.num_processes
            dist.all_gather_object(everyone, rng)
        if self.accelerator.is_main_process:
            target, beside = self.dir / f"step_{step:08d}", self.dir / f".step_{step:08d}"
            content = {name: self._content(value) for name, value in state.items()}
            if self.accelerator.scaler is not None:
                content["grad_scaler"] = self.accelerator.scaler.state_dict()
            try:
                for half in self.dir.glob(".step_*"):  # of a run that was killed
                    shutil.rmtree(half, ignore_errors=True)
                beside.mkdir()
                torch.save({"step": step, "state": content, "rng": everyone}, beside / "state.pt")
                if backbone is not None:
                    self.write_network(beside, state, backbone)
                for file in beside.iterdir():
                    with open(file, "rb") as f:
                        os.fsync(f.fileno())
                shutil.rmtree(target, ignore_errors=True)
                os.replace(beside, target)
            except Exception as error:  # a full disk is an OSError, torch's RuntimeError or safetensors' own
                shutil.rmtree(beside, ignore_errors=True)
                raise SystemExit(
                    f"{target}: the checkpoint could not be written ({_why(error)}); free space in {self.dir}, "
                    "then --resume continues from the checkpoint before"
                ) from None
            for old in [c for c in checkpoints(self.dir) if _step(c) <= step][self.args.keep :]:
                shutil.rmtree(old, ignore_errors=True)
        self._saved = step
        self.accelerator.wait_for_everyone()

    def write_network(self, folder: Path, state: dict, backbone: nn.Module) -> None:
        """A release's model.safetensors, config.json and, if `state` has a head on `backbone`, head.safetensors."""
        view = {k: v for k, v in vars(self.args).items() if k in ("interpolation", "crop_pct")}
        facts = run_facts(vars(self.args), self.trainer)
        save_backbone(folder, backbone, getattr(self.args, "image_size", 224), run=facts, **view)
        save_head(folder, self._head(state, backbone))

    def _head(self, state: dict, backbone: nn.Module) -> nn.Module | None:
        """The projection head that is trained on this backbone, if the method has one."""
        modules = (self.accelerator.unwrap_model(v) for v in state.values() if isinstance(v, nn.Module))
        owner = next((m for m in modules if getattr(m, "backbone", None) is backbone), None)
        return next((getattr(owner, name) for name in ("head", "projector") if hasattr(owner, name)), None)

    def _content(self, value):
        if isinstance(value, nn.Module):
            return self.accelerator.unwrap_model(value).state_dict()
        return value.state_dict() if hasattr(value, "state_dict") else value

    def resume(self, state: dict) -> int:
        """Load the newest whole checkpoint into `state` and the generators; returns the step to go on with.

        0 where there is no checkpoint yet: a script that requeues runs may always pass --resume. What cannot be read on
        every process is set aside by name. Raises SystemExit if checkpoints are there and none can be used.
        """
        folders, aside, saved = self.same_everywhere(checkpoints(self.dir)), [], None
        if not folders and self.same_everywhere((self.dir / "results.json").exists()):
            raise SystemExit(f"--resume: no checkpoint in {self.dir}, but the results of a run: choose another folder")
        if not folders:
            self.say(f"--resume: no checkpoint in {self.dir} yet: starting at step 0")
            return 0
        for folder in folders:
            saved, why = _read_checkpoint(folder, state)
            problems = self._everyones(why)
            if not any(problems):
                break
            saved, why = None, next(filter(None, problems))
            aside.append((folder, f"{folder.name} {why}"))
            self.say(f"{aside[-1][1]}: trying the one before")
        if saved is None:
            raise SystemExit(
                f"--resume: no whole checkpoint in {self.dir}: {aside[-1][1]}; start again in another folder, or bring one back"
            )
        step = saved["step"]
        if (folder / "model.safetensors").exists() and not self._whole_weights(saved, state):
            older = next(
                (f for f in folders if _step(f) < step and self._whole_weights(_read_checkpoint(f, state)[0], state)),
                None,
            )
            remedy = f"remove it, and --resume goes on from {older.name}" if older else "no older one is: start again"
            raise SystemExit(
                f"--resume: {folder} holds weights that are not finite: {remedy}; lower --base-lr needs another --run-dir"
            )
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for each, _ in aside:
                with contextlib.suppress(OSError):
                    shutil.rmtree(each.with_name(f"unreadable_{each.name}"), ignore_errors=True)
                    each.rename(each.with_name(f"unreadable_{each.name}"))
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.copy_(saved["state"][name])
                continue
            value = self.accelerator.unwrap_model(value) if isinstance(value, nn.Module) else value
            if isinstance(saved["state"][name], dict):
                for theirs, ours in zip(
                    saved["state"][name].get("param_groups", ()), getattr(value, "param_groups", ()), strict=False
                ):
                    theirs.update(
                        {k: ours[k] for k in ("fused", "foreach", "capturable") if k in ours}
                    )  # this machine's
            try:
                value.load_state_dict(saved["state"][name])
            except (RuntimeError, ValueError) as error:
                reason = str(error).strip().splitlines()
                raise SystemExit(
                    f"--resume: {folder} does not fit these flags: {name}: {reason[min(1, len(reason) - 1)].strip()}"
                ) from None
        if self.accelerator.scaler is not None and "grad_scaler" in saved["state"]:
            self.accelerator.scaler.load_state_dict(saved["state"]["grad_scaler"])
        if len(saved["rng"]) == self.accelerator.num_processes:
            rng = saved["rng"][self.accelerator.process_index]
            random.setstate(rng["python"])
            np.random.set_state(("MT19937", rng["numpy"]["keys"].numpy().astype(np.uint32), *rng["numpy"]["rest"]))
            torch.set_rng_state(rng["torch"])
            if "cuda" in rng and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"])
        else:
            self.say(
                f"{folder.name} was written by {len(saved['rng'])} processes: dropout starts from new random numbers"
            )
        self.say(f"resumed from {folder} at step {step}")
        return step

    def _whole_weights(self, saved: dict | None, state: dict) -> bool:
        modules = [saved["state"][k] for k, v in state.items() if isinstance(v, nn.Module)] if saved else []
        return saved is not None and _finite(t for tensors in modules for t in tensors.values())

    def _everyones(self, value) -> list:
        """Every process's value, on every process."""
        values = [value] * self.accelerator.num_processes
        if len(values) > 1:
            dist.all_gather_object(values, value)
        return values

    def stop(self, step: int) -> None:
        """End a run that was asked to stop, after its checkpoint: exit code 143, so that a scheduler requeues it.

        A scheduler sees 143 where it runs `python trainers/...` itself, one process a GPU (srun does). torchrun waits for
        the checkpoint and exits with 1; `accelerate launch` of one process is gone before it (-15, 143 in a shell) and the
        trainer saves alone. Neither passes SIGUSR1 on: they die of it, and the trainer saves because its parent is gone.
        """
        saved = self.dir / f"step_{step:08d}"
        self.say(
            f"stopped by a signal after step {step}; --resume continues from {saved if saved.exists() else self.dir}"
        )
        if self._bar is not None:
            self._bar.close()
        sys.exit(143)

    def record_teacher(self, teacher: nn.Module, role: str = "teacher") -> None:
        """Keep what is known about the network that this one learns or, in another role, starts from: for the card."""
        facts = ", ".join(f"{k} {v}" for k, v in teacher.facts.items())
        self.say(f"{role}: {facts}, {teacher.num_features}-d features")
        self._record("teacher.json", {**teacher.facts, "role": role})

    def attempt(self, what: str, call, *args, **options):
        """What `call` returns; where it fails one line, and None. For all that only reports on a finished run."""
        try:
            return call(*args, **options)
        except (Exception, SystemExit) as error:  # a plotting library's, a tracker's, memory, a full disk
            if isinstance(error, SystemExit) and not isinstance(error.code, str):
                raise  # a signal's
            self.say(f"{what}: failed, the run is whole ({one_line(first_line(error))})")
            self.report_problem = self.report_problem or f"{what}: {one_line(first_line(error))}"
            return None

    def finish(self, source: Source | Annotated | None, results: dict) -> None:
        """Close the log, write results.json and, where images could not be read, bad_images.txt.

        results.json holds `results`, the trainer's name, the step, the data's fingerprint, the versions, what a figure
        needs to be believed later, and the first part of the report that failed. A run that has its release cannot fail here;
        an evaluation, whose results these are, raises SystemExit.
        """
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._accept()
        if self.accelerator.is_main_process:
            if self.released is None:
                self._write_results(source, results)
            else:
                self.attempt("results.json", self._write_results, source, results)
            if source is not None and source.bad:
                lines = "".join(f"{why}".replace("\n", "\\n") + "\n" for why in source.bad.values())
                self.attempt("bad_images.txt", write_whole, self.dir / "bad_images.txt", lines)
                self.say(f"{len(source.bad)} images could not be read: {self.dir / 'bad_images.txt'}")
        self.accelerator.wait_for_everyone()
        if self.args.tracker != "none":
            self.attempt(f"--tracker {self.args.tracker}", self.accelerator.end_training)
        self.close()

    def _write_results(self, source: Source | Annotated | None, results: dict) -> None:
        facts = self.attempt("environment.json", read_json, self.dir / "environment.json") or {}
        record = {"trainer": facts.get("trainer", "unknown"), **results}
        if self.released is not None:
            record["step"] = self.released
        if source is not None:
            record["data_fingerprint"] = self.attempt("the data's fingerprint", source.fingerprint)
        record["versions"] = {k: facts.get(k) for k in ("commit", "python", "torch", "torchvision", "timm")}
        if self.report_problem:
            record["report_problem"] = self.report_problem
        write_whole(self.dir / "results.json", json.dumps(record, indent=2, default=str) + "\n")


def _ctrl_c_in_one_line(kind: type, error: BaseException, trace) -> None:
    """For what comes after a run has closed: the release and its upload. Python ends with the signal's own code."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


_held: dict[Path, tuple[FileLock, threading.Thread]] = {}  # by this process


def hold(file: Path, timeout: float = 0) -> FileLock | None:
    """Lock a file until the lock is released or the process ends; None where the file system has no locks.

    Raises filelock.Timeout if another process or thread has it. An earlier run of the same thread is over, however it
    ended (a notebook keeps what failed alive): its lock is taken over.
    """
    file, me = file.absolute(), threading.current_thread()
    earlier, owner = _held.get(file, (None, me))
    if earlier is not None and (owner is me or not owner.is_alive()):
        earlier.release(force=True)
    lock = FileLock(file, timeout=timeout, thread_local=False)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or getattr(error, "errno", 0) not in (
            0,
            None,
            errno.ENOLCK,
            errno.ENOSYS,
            errno.ENOTSUP,
        ):
            raise
        return None
    _held[file] = lock, me
    return lock


def _why(error: Exception) -> str:
    """Why a file could not be written, in the system's words; torch's zip writer and safetensors hide them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    known = [
        os.strerror(number)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
        if os.strerror(number) in str(error)
    ]
    writer = any(word in str(error) for word in ("inline_container", "PytorchStreamWriter", "iostream"))
    return known[0] if known else "the disk took only part of it" if writer else first_line(error)


def _logged_step(line: str) -> int:
    """The step of a line of metrics.jsonl; -1 if the line is cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all are finite; waits for the device once."""
    checks = [t.isfinite().all() for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    return not checks or bool(torch.stack(checks).all())


def _read_checkpoint(folder: Path, state: dict) -> tuple[dict | None, str]:
    """A checkpoint's content and why it cannot be used: it is damaged, or not of this trainer or step."""
    try:
        saved = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        names, step = set(saved["state"]) - {"grad_scaler"}, saved["step"]
    except Exception as error:  # a damaged archive raises whatever its reader meets first
        return None, f"is not whole ({first_line(error)})"
    if names != set(state):
        return None, f"was written by another trainer (it holds {', '.join(sorted(names))})"
    return (saved, "") if step == _step(folder) else (None, f"is a renamed folder (it holds step {step})")


def _step(folder: Path) -> int:
    return int(folder.name[5:])


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoint folders, newest first."""
    return sorted((p for p in Path(run_dir).glob("step_*") if p.name[5:].isdigit()), key=lambda p: -int(p.name[5:]))


def run_facts(args: dict, trainer: str | None) -> dict:
    """What tells one run's checkpoints from another's that lies in its folder; never changes on --resume."""
    data = Path(str(args.get("data", ""))).name
    return {
        "trainer": trainer,
        "network": args.get("student", args.get("backbone")),
        "data": data,
        "seed": args.get("seed"),
    }


def _numpy_rng() -> dict:
    _, keys, *rest = np.random.get_state()
    return {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest}


def save_backbone(
    folder: Path,
    backbone: nn.Module,
    image_size: int,
    interpolation: str = "bilinear",
    crop_pct: float | None = None,
    run: dict | None = None,
) -> None:
    """model.safetensors and config.json, as timm reads them; the view is the one that `eval_recipe` cuts."""
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in backbone.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    give_usual_mode(folder / "model.safetensors")
    cfg = backbone.pretrained_cfg
    num_classes = getattr(backbone, "num_classes", 0)
    side = getattr(backbone, "input_side", None)  # of a network that takes no other: timm builds it for input_size
    config = {
        "architecture": cfg["architecture"],
        "num_classes": num_classes,
        "num_features": backbone.num_features,
        "pretrained_cfg": {
            "input_size": [3, side or image_size, side or image_size],
            "fixed_input_size": side is not None,
            "interpolation": interpolation,
            "crop_pct": crop_pct or (1.0 if image_size <= RESIDENT_PX else 0.875),
            "mean": backbone.input_mean.flatten().tolist(),
            "std": backbone.input_std.flatten().tolist(),
            "num_classes": num_classes,
            "pool_size": cfg.get("pool_size"),
            "first_conv": cfg.get("first_conv"),
            "classifier": cfg.get("classifier"),
        },
    }
    if model_args := getattr(backbone, "model_args", None):
        config["model_args"] = model_args
    if run is not None:
        config["run"] = run
    if hasattr(backbone, "started_from"):
        config["started_from"] = backbone.started_from
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_head(folder: Path, head: nn.Module | None) -> None:
    """head.safetensors, for methods that distil a teacher's embedding: what can be rebuilt from its keys alone."""
    known = (nn.Linear, nn.ReLU, nn.Dropout, nn.modules.batchnorm._BatchNorm)
    leaves = [] if head is None else [m for m in head.modules() if not isinstance(m, nn.Sequential)]
    if any(list(m.parameters()) for m in leaves) and all(isinstance(m, known) for m in leaves):
        weights = {f"head.{k}": v.detach().cpu().contiguous().clone() for k, v in head.state_dict().items()}
        safetensors.torch.save_file(weights, folder / "head.safetensors", metadata={"format": "pt"})
        give_usual_mode(folder / "head.safetensors")
