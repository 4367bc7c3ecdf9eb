"""What every test shares: one thread, and no way out to the internet."""

import os
import signal

# Both are read when torch and huggingface_hub are imported. A test that wants a Hub starts its own, in a new process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A trainer called in this process takes SIGTERM and SIGUSR1 for itself; give them back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
