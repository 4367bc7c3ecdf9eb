"""What every test shares: one thread, no way out to the internet, real images where there are any."""

import functools
import os
import signal
from pathlib import Path

# All three are read when torch and huggingface_hub are imported. A test that wants a Hub starts its own, in a new process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
DATA = Path(os.environ.get("CLEANDISTILL_DATA", ROOT.parent / "shared" / "data"))
METHODS = sorted(p.stem for p in (ROOT / "trainers").glob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))

torch.set_num_threads(1)


@pytest.fixture
def real_images() -> Path:
    """The folder of real images; a test that asks for it is skipped, and counted, where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"no real images in {DATA}: set CLEANDISTILL_DATA")
    return DATA


@pytest.fixture(scope="module")
def digits_once():
    """Every run of a trainer opens the embedded digits: draw them once."""
    from trainers.shared import sources

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_digits", functools.cache(sources._digits))
        yield


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> Path:
    """A run folder of the supervised trainer, a few steps old."""
    from runs import tiny_run

    folder = tmp_path_factory.mktemp("teacher") / "run"
    tiny_run("supervised", folder, folder)
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    from runs import photographs

    return photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A trainer called in this process takes SIGTERM, SIGUSR1 and SIGINT for itself; give them back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
