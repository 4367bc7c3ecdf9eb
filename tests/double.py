"""Runs a trainer in float64: `double.py trainers/smd.py --flags`. What differs then is the algorithm, not the rounding."""

import importlib.util
import sys

import torch

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
sys.argv = sys.argv[1:]
spec = importlib.util.spec_from_file_location("trainer", sys.argv[0])
trainer = sys.modules["trainer"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trainer)
trainer.main(trainer.common.parse_args(trainer.Args))
