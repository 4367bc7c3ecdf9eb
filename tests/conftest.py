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
from accelerate.state import AcceleratorState

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
    """A run folder of the supervised trainer, a few steps old; beside it "zoo", a CIFAR network's, which ab.py needs."""
    from runs import made_once, tiny_run

    def make(folder: Path) -> None:
        tiny_run("supervised", folder / "run", folder)
        tiny_run("supervised", folder / "zoo", folder, backbone="resnet20")

    return made_once(tmp_path_factory, "teacher", make) / "run"


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> Path:
    from runs import made_once, photographs

    return made_once(tmp_path_factory, "photographs", photographs)


@pytest.fixture
def precision(monkeypatch):
    """Sets what the launcher's --mixed_precision sets, for the runs of one test."""

    def choose(name: str) -> None:
        AcceleratorState._reset_state(True)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", name)

    yield choose
    AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A trainer called in this process takes SIGTERM, SIGUSR1 and SIGINT for itself; give them back."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
