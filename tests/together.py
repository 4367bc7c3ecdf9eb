"""Runs several trainers one after the other: `together.py CASES.json`, a list of [trainer, its command line, double].

Starting Python and torch costs more than a tiny run: one pair of processes goes through all cases of a kind. In float64
(`double`) what differs between one process and two is the algorithm, not the rounding.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common


def run_here(method: str, words: list[str], double: bool = True) -> None:
    """One trainer's `main` in this process."""
    trainer = importlib.import_module(f"trainers.{method}")
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    try:
        trainer.main(common.parse_args(trainer.Args, words))
    finally:
        torch.set_default_dtype(dtype)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_here(*case)
