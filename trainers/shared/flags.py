"""The flags of a run that is resumed: read from its folder, and compared with those given now. A chapter of common.py."""

import json
import os
from pathlib import Path

from trainers.shared.sources import first_line

# Flags that leave a run the run it was: how long it is, what it writes and where, and how fast. `compile` is among them
# because compiled or not the computation is the same to rounding, and a resumed run may find a machine without a compiler.
FREE_ON_RESUME = frozenset(
    "config run_dir resume epochs total_steps save_every keep log_every num_workers tracker push_to_hub compile "
    "eval_every eval_batch_size pictures".split()
)


def stored_args(run_dir: Path, trainer: str) -> dict:
    """The flags in a run folder's args.json, none where there is none; SystemExit if environment.json names another trainer."""
    facts = {}
    for name in ("environment.json", "args.json"):
        file = Path(run_dir) / name
        try:
            facts[name] = json.loads(file.read_text()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise SystemExit(f"--resume: {file}: not whole ({first_line(error)}); choose another --run-dir") from None
        if not isinstance(facts[name], dict):
            raise SystemExit(f"--resume: {file}: not whole (no table of values); choose another --run-dir")
    owner = facts["environment.json"].get("trainer", trainer)
    if owner != trainer:
        raise SystemExit(f"--resume: {run_dir} was written by another trainer, {owner}.py; choose another --run-dir")
    return facts["args.json"]


def changed_flag(args, stored: dict) -> str:
    """One line about the first flag that differs from the stored ones and makes another run of it; "" if none does."""
    defaults = vars(type(args)())  # of flags that are younger than the run
    for name, value in vars(args).items():
        before, now = (json.loads(json.dumps(v, default=str)) for v in (stored.get(name, defaults[name]), value))
        if name not in FREE_ON_RESUME and before != now and _place(before) != _place(now):
            return (
                f"--resume: --{name.replace('_', '-')} is {now!r}, the run in {args.run_dir} has {before!r}: "
                "leave the flag out, or choose another --run-dir for another run"
            )
    return ""


def _place(value):
    """A text as the path that it may be: runs/a, ./runs/a and the absolute one are the same."""
    return os.path.realpath(os.path.expanduser(value)) if isinstance(value, str) and value else value
