import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the suite may reach for the network
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

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
