"""What every test shares: one thread, and no way out to the internet."""

import os

# Both are read when torch and huggingface_hub are imported. A test that wants a Hub starts its own, in a new process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
