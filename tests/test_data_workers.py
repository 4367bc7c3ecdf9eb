"""Data workers that die, find no room or are slow lose nothing; an unreadable image lends its label to no other's pixels."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import tiny_run
from torchvision.io import encode_png

import common
from trainers import eval_linear, eval_metrics
from trainers.shared import run as run_folder
from trainers.shared import sources

CPU = torch.device("cpu")
SIDE, COUNT = 100, 120


def shade(i: int) -> int:
    return 2 * i + 1


def shades(bad: tuple[int, ...] = ()) -> common.Source:
    """Images of one shade each, whose label is their index; those of `bad` are unreadable."""

    def read(i: int) -> bytes:
        return (
            b"cut"
            if i in bad
            else encode_png(torch.full((3, SIDE, SIDE), shade(i), dtype=torch.uint8)).numpy().tobytes()
        )

    return common.Source("shades", COUNT, read, labels=torch.arange(COUNT))


def batches(source: common.Source, **options) -> common.Batches:
    options = {"seed": 0, "device": CPU, **options}
    return common.Batches(source, [(common.eval_recipe(16), 16)] * 2, 24, **options)


@pytest.fixture
def photos(tmp_path) -> Path:
    for i in range(32):
        file = tmp_path / "photos" / f"c{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(torch.full((3, SIDE, SIDE), i, dtype=torch.uint8)).numpy().tobytes())
    return tmp_path / "photos"


def tiny_simsiam(photos: Path, run_dir: Path, **flags) -> list[dict]:
    flags = {"total_steps": 12, "save_every": 4, "batch_size": 8, "num_workers": 1, "log_every": 1, **flags}
    return tiny_run("simsiam", run_dir, run_dir, data=str(photos), **flags)


def stopped(call, *args, **flags) -> str | int:
    with pytest.raises(SystemExit) as stop:
        call(*args, **flags)
    return stop.value.code


def kill_workers() -> None:
    """SIGKILL, and the time that a signal handler of the main process needs to notice."""
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_label_and_index_of_a_streamed_sample_are_one_images(num_workers):
    data, seen = batches(shades(bad=(7,)), num_workers=num_workers), []
    for step in range(data.steps_per_epoch):
        batch = data.batch(step)
        for view in batch.views:
            assert torch.equal((view[:, 0, 0, 0] * 255).round().long(), shade(batch.indices))
        assert torch.equal(batch.labels, batch.indices)
        seen += batch.indices.tolist()
    assert sorted(seen) == sorted([*range(7), 8, *range(8, COUNT)])


def test_two_processes_and_a_resumed_run_read_the_same_image_in_place_of_a_bad_one():
    whole, resumed = batches(shades(bad=(7,))), batches(shades(bad=(7,)))
    halves = [batches(shades(bad=(7,)), rank=rank, world=2) for rank in (0, 1)]
    for step in range(whole.steps_per_epoch):
        batch, parts = whole.batch(step), [half.batch(step) for half in halves]
        assert torch.equal(batch.indices, torch.cat([part.indices for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
        assert torch.equal(batch.views[1], torch.cat([part.views[1] for part in parts]))
    again = resumed.batch(step)
    assert torch.equal(again.indices, batch.indices) and torch.equal(again.views[0], batch.views[0])


def test_an_image_that_cannot_be_read_has_no_features_and_no_part_in_knn():
    source = shades(bad=(7,))

    def model(x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 0, 0] * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([1.0, 0.0, 0.0])

    features = common.extract_features(model, source, common.eval_recipe(16), 16, Accelerator(cpu=True))
    assert common.readable_rows(features).tolist() == [i != 7 for i in range(COUNT)]
    assert features[torch.arange(COUNT) != 7].isfinite().all()
    labels = torch.arange(COUNT)
    for metric in ("cosine", "euclidean"):
        for vote in ("weighted", "majority"):
            options = {"metric": metric, "vote": vote}
            assert common.knn_accuracy(features, labels, features, labels, 1, **options) == 100
    # one readable neighbour: the unreadable ones have no vote, however many are asked for
    few, theirs = features[6:8], torch.tensor([1, 0])
    assert common.knn_accuracy(few, theirs, features[6:7], theirs[:1], 2, vote="majority") == 100


def test_a_probe_on_stored_features_reads_the_next_image_as_the_batches_do():
    readable = torch.tensor([True, False, False, True, True, False])
    assert eval_linear.stand_ins(readable).tolist() == [0, 3, 3, 3, 4, 0]
    assert eval_linear.stand_ins(torch.ones(3, dtype=torch.bool)).tolist() == [0, 1, 2]


def test_static_metrics_leave_out_an_image_that_cannot_be_read():
    images = eval_metrics.StaticSet(shades(bad=(7,)), common.MOCO_V2, "any", 16, 0)
    rows = torch.arange(4, 12)
    views, _ = eval_metrics.extract(lambda x: x.mean((2, 3)), images, rows, Accelerator(cpu=True), 4, 0)
    assert all(common.readable_rows(view).tolist() == [i != 7 for i in rows.tolist()] for view in views)


# ---------------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_during_a_save_does_not_lose_the_checkpoint(photos, tmp_path, monkeypatch):
    save = torch.save

    def die_then_save(*args):
        kill_workers()
        save(*args)

    monkeypatch.setattr(run_folder.torch, "save", die_then_save)
    message = stopped(tiny_simsiam, photos, tmp_path / "run")
    assert message.startswith("a data worker died") and "--num-workers" in message and "--resume" in message
    assert "\n" not in message
    assert torch.load(tmp_path / "run" / "step_00000004" / "state.pt", weights_only=True)["step"] == 4


def test_a_worker_that_dies_while_its_batch_is_waited_for_is_named(photos, tmp_path, monkeypatch):
    decode = sources.decode_rgb
    main = os.getpid()

    def stall(*args):
        if os.getpid() != main:
            time.sleep(60)
        return decode(*args)

    monkeypatch.setattr(sources, "decode_rgb", stall)
    threading.Timer(4, kill_workers).start()
    start = time.monotonic()
    message = stopped(tiny_simsiam, photos, tmp_path / "run", num_workers=2)
    assert message.startswith("a data worker died") and time.monotonic() - start < 30


def test_a_worker_without_shared_memory_says_so(photos, tmp_path, monkeypatch):
    def full(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    message = stopped(tiny_simsiam, photos, tmp_path / "run")
    assert "could not hand over its batch" in message and "/dev/shm" in message and "--num-workers" in message
    assert "\n" not in message


def test_an_error_of_the_program_in_a_worker_is_not_taken_for_a_death(photos, tmp_path, monkeypatch):
    def wrong(*args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(common, "crop_one", wrong)
    for num_workers in (0, 1):
        with pytest.raises(RuntimeError, match="a fault of ours"):
            tiny_simsiam(photos, tmp_path / str(num_workers), num_workers=num_workers)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_stop_signal_is_honoured_while_a_batch_is_waited_for(photos, tmp_path, monkeypatch, steps):
    get, main = common.Crops.__getitem__, os.getpid()
    read = multiprocessing.Value("i", 0)

    def stall(self, key):
        with read.get_lock():
            read.value += 1
            count = read.value
        if count > 8 * steps and os.getpid() != main:
            os.kill(main, signal.SIGTERM) if count == 8 * steps + 1 else None
            time.sleep(6)
        return get(self, key)

    whole = tiny_simsiam(photos, tmp_path / "whole", num_workers=0)
    monkeypatch.setattr(common.Crops, "__getitem__", stall)
    start = time.monotonic()
    code = stopped(tiny_simsiam, photos, tmp_path / "run")
    assert code == 143 and time.monotonic() - start < 20
    saved = [p.name for p in (tmp_path / "run").glob("step_*")]
    monkeypatch.setattr(common.Crops, "__getitem__", get)
    if not steps:
        assert not saved
        return
    (name,) = saved
    done = int(name[5:])
    assert 1 <= done <= steps
    lines = tiny_simsiam(photos, tmp_path / "run", num_workers=0, resume=True)
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole]


def test_no_signal_handler_of_torch_is_left_behind():
    before = signal.getsignal(signal.SIGCHLD)
    data = batches(shades(), num_workers=1)
    data.batch(0)
    assert signal.getsignal(signal.SIGCHLD) is before
