"""Flags: one strict parser for command line, TOML and the args.json of a run that is resumed. A chapter of common.py."""

import difflib
import io
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import tyro

from trainers.shared.files import one_line, read_json
from trainers.shared.fitting import FITTED, given_names, named_in, remember_given

ROOT = Path(__file__).resolve().parents[2]

# Flags that leave a run the run it was: how long it is, what it writes and where, and how fast. `compile` is among them
# because compiled or not the computation is the same to rounding, and a resumed run may find a machine without a compiler.
FREE_ON_RESUME = frozenset(
    "config run_dir resume epochs total_steps save_every keep log_every num_workers tracker push_to_hub compile "
    "eval_every eval_batch_size pictures".split()
)


def stored_args(run_dir: Path, trainer: str) -> dict:
    """The flags in a run folder's args.json, none where there is none; SystemExit if environment.json names another trainer."""
    try:
        args, facts = (read_json(Path(run_dir) / name) for name in ("args.json", "environment.json"))
    except SystemExit as stop:
        raise SystemExit(f"--resume: {stop}") from None
    owner = facts.get("trainer", trainer)
    if owner != trainer:
        raise SystemExit(
            f"--resume: {run_dir} was written by another trainer, {one_line(owner)}.py; choose another --run-dir"
        )
    return args


def changed_flag(args, stored: dict) -> str:
    """One line about the first flag that differs from the stored ones and makes another run of it; "" if none does."""
    defaults = vars(type(args)())  # of flags that are younger than the run
    later = FITTED - given_names(args)  # the same data will fit them as before
    for name, value in vars(args).items():
        before, now = (json.loads(json.dumps(v, default=str)) for v in (stored.get(name, defaults[name]), value))
        if name not in FREE_ON_RESUME | later and before != now and _place(before) != _place(now):
            return (
                f"--resume: --{name.replace('_', '-')} is {now!r}, the run in {args.run_dir} has {before!r}: "
                "leave the flag out, or choose another --run-dir for another run"
            )
    return ""


def _place(value):
    """A text as the path that it may be: runs/a, ./runs/a and the absolute one are the same."""
    return os.path.realpath(os.path.expanduser(value)) if isinstance(value, str) and value else value


def parse_args(args_class: type, argv: Sequence[str] | None = None):
    """Resolve flags: dataclass defaults < `--config FILE.toml` < command line, with one strict parser for all three.

    With the embedded data set and no `--config`, `configs/<trainer>/digits.toml` is the file: the papers' schedules are
    made for a million photographs. With `--resume` the flags of the run folder's args.json are the defaults. Raises
    SystemExit with one line that names the flag or key and the remedy.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    trainer = Path(sys.modules[args_class.__module__].__file__).stem
    configs = [i for i, word in enumerate(argv) if word == "--config" or word.startswith("--config=")]
    values = {}
    if configs:
        at = configs[0]
        name = "".join(argv[at + 1 : at + 2]) if argv[at] == "--config" else argv[at].partition("=")[2]
        if not name:
            raise SystemExit("--config needs a file: --config configs/<trainer>/<name>.toml")
        values = _read_config(args_class, Path(name))
    given = remember_given(args_class(**values), values)
    args = _parse(args_class, argv, given)
    if getattr(args, "resume", False) and (stored := stored_args(args.run_dir, trainer)):
        known = {key: value for key, value in stored.items() if key in vars(args) and key not in ("run_dir", "resume")}
        typed = _checked(args_class, {k: v for k, v in known.items() if v is not None}, f"{args.run_dir}/args.json: ")
        return _parse(args_class, argv, remember_given(args_class(**(known | typed | values)), {*known, *values}))
    demo = ROOT / "configs" / trainer / "digits.toml"
    if not configs and getattr(args, "data", None) == "digits" and demo.exists():  # nobody gave its flags
        return _parse(args_class, argv, remember_given(args_class(**_read_config(args_class, demo)), ()))
    return args


def _read_config(args_class: type, path: Path):
    """Flags with the file's values, checked by the command line's own parser, and the path itself as `config`."""
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"--config {path}: {error.strerror or error}; the shipped ones are in configs/") from None
    except ValueError as error:  # not TOML, or not even text
        raise SystemExit(f"--config {path}: not valid TOML: {error}") from None
    defaults = vars(args_class())
    for key, value in values.items():
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "the keys are the flags that --help lists"
            raise SystemExit(f"--config {path}: unknown key {key!r}; {hint}")
        if isinstance(value, dict) or isinstance(value, bool) != isinstance(defaults[key], bool):
            wanted = "true or false" if isinstance(defaults[key], bool) else "a number, a text or a list"
            raise SystemExit(f"--config {path}: {key} = {value!r}: must be {wanted}")
    return {**_checked(args_class, values, f"--config {path}: "), "config": path}


def _checked(args_class: type, values: dict, where: str) -> dict:
    """Values of TOML or JSON in the types of the flags, as the command line's own parser gives them."""
    argv = []
    for key, value in values.items():
        if isinstance(value, bool):
            argv.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            argv += [f"--{key}", *map(str, value)]
        else:
            argv.append(f"--{key}={value}")
    args = _parse(args_class, argv, args_class(), where=where)
    return {key: getattr(args, key) for key in values}


def _parse(args_class: type, argv: Sequence[str], default, where: str = ""):
    """tyro, with its boxed message folded into one line."""
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            args = tyro.cli(args_class, args=argv, default=default)
        return remember_given(args, named_in(argv) | given_names(default))
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        lines = [line.strip(" │") for line in box.getvalue().splitlines()]
        ruled = "\n".join("" if set(line) <= {"─", "-"} else line for line in lines[1:])
        message = ruled.strip().split("\n\n")[0].replace("\n", " ")
        close = [line.split()[0].rstrip(",") for line in lines if line.startswith("--")]
        wrong = message.removeprefix("Unrecognized options: ").partition(",")[0]
        close = difflib.get_close_matches(wrong, close, n=2, cutoff=0.4) if wrong.startswith("--") else []
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise SystemExit(f"{where}{message}; {hint}--help lists the flags") from None


def check_positive(args, *names: str, least: int = 1) -> None:
    """Stop with one line if any of these flags, where the trainer has them, is below 1 or `least`."""
    for name in names:
        if getattr(args, name, least) < least:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")


def check_share(args, *names: str) -> None:
    """Stop with one line if any of these pairs of flags is given and no range within (0, 1]."""
    for name in names:
        if (pair := getattr(args, name)) is not None and not 0 < pair[0] <= pair[1] <= 1:
            raise SystemExit(
                f"--{name.replace('_', '-')} {pair[0]} {pair[1]}: must be a share above 0 and one up to 1 that is not less"
            )


def check_above_zero(args, *names: str) -> None:
    """Stop with one line if any of these flags is given and not above 0."""
    for name in names:
        if (value := getattr(args, name)) is not None and not value > 0:
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must be above 0")
