"""Damaged small files of a run folder are one line that names them; kills and stops between them lose nothing."""

import errno
import os
import threading
import time

import pytest
import torch
from accelerate import Accelerator
from tools import make_backbone, make_run, stop_message

import common
import hub
from trainers import simsiam
from trainers.shared.run import hold

DAMAGES = [b"[" * 100_000, b"null", b"[1]", b"\xff\xfe", b'{"a": ', bytes(50)]


@pytest.fixture(scope="module")
def backbone():
    return make_backbone("test_resnet")


@pytest.fixture
def run_dir(tmp_path, backbone):
    make_run(tmp_path / "run", backbone).close()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n')
    return tmp_path / "run"


def resumed(run_dir) -> hub.Run:
    return hub.Run(simsiam.Args(run_dir=run_dir, image_size=32, resume=True), simsiam.__file__, Accelerator(cpu=True))


def put(file, content: bytes | None) -> None:
    """The content instead of the file's; a folder for None."""
    file.unlink(missing_ok=True)
    file.write_bytes(content) if content is not None else file.mkdir()


@pytest.mark.parametrize("content", [*DAMAGES, None])
@pytest.mark.parametrize("name", ["args.json", "environment.json"])
def test_a_damaged_record_of_the_flags_is_named_with_the_remedy(run_dir, name, content):
    put(run_dir / name, content)
    words = ["--run-dir", str(run_dir), "--resume"]
    for call in (lambda: common.parse_args(simsiam.Args, words), lambda: resumed(run_dir)):
        message = stop_message(call)
        assert message.startswith(f"--resume: {run_dir / name}: ") and message.endswith("restore or delete it")


@pytest.mark.parametrize("content", [*DAMAGES, None])
def test_of_a_damaged_record_of_the_data_nothing_is_said(run_dir, content):
    put(run_dir / "data.json", content)
    resumed(run_dir)._record_data(common.Source("x", 4, pixels=torch.zeros(4, 3, 8, 8, dtype=torch.uint8)))


def test_a_record_of_other_data_without_its_count_is_one_line(run_dir):
    (run_dir / "data.json").write_text('{"fingerprint": "x"}')
    source = common.Source("x", 4, pixels=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert "other images" in stop_message(resumed(run_dir)._record_data, source)


def test_a_log_that_cannot_be_read_is_named_by_resume_and_by_build(run_dir):
    put(run_dir / "metrics.jsonl", None)
    for call in (lambda: resumed(run_dir).start(0, 1), lambda: hub.build_release(run_dir)):
        assert f"{run_dir / 'metrics.jsonl'}: cannot be read" in stop_message(call)


@pytest.mark.parametrize("name", ["args.json", "environment.json", "data.json", "simsiam.py"])
def test_a_run_without_one_of_its_records_can_be_released(run_dir, name):
    (run_dir / name).unlink(missing_ok=True)
    assert (hub.build_release(run_dir) / "model.safetensors").exists()


@pytest.mark.parametrize("content", [None, b"(" * 100_000, b"\x00"])
def test_a_damaged_copy_of_the_trainer_costs_the_title_only(run_dir, content):
    put(run_dir / "simsiam.py", content)
    assert (hub.build_release(run_dir) / "README.md").exists()


def test_half_a_checkpoint_of_a_killed_run_goes_with_the_next_one(tmp_path, backbone):
    (tmp_path / "run" / ".step_00000002").mkdir(parents=True)
    make_run(tmp_path / "run", backbone)
    assert [p.name for p in (tmp_path / "run").glob(".step_*")] == []


def test_a_checkpoint_that_was_just_written_is_not_written_again_when_a_stop_follows(run_dir, backbone, monkeypatch):
    run, state = resumed(run_dir), {"model": backbone}
    next(iter(run.start(0, 5)))
    run.save(4, state, backbone)
    run._signal, written = 15, []
    monkeypatch.setattr(torch, "save", lambda *_: written.append(_))
    with pytest.raises(SystemExit) as stop:
        run._stop_while_waiting(state, backbone, 4)
    assert stop.value.code == 143 and not written


def test_a_teacher_that_a_killed_run_left_training_is_waited_for(run_dir, monkeypatch):
    folder = run_dir.parent / "digits_teacher"
    folder.mkdir()
    held = threading.Event()

    def orphan():
        lock = hold(folder / ".lock")
        held.set()
        time.sleep(0.5)
        (folder / "release").mkdir()
        (folder / "release" / "config.json").touch()
        lock.release()

    monkeypatch.setattr(hub, "_train_digits_teacher", lambda _: pytest.fail("two at once"))
    thread = threading.Thread(target=orphan)
    thread.start()
    held.wait()
    assert hub.digits_teacher(resumed(run_dir)) == str(folder)
    thread.join()


def test_no_room_for_the_digits_teacher_is_one_line(run_dir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = resumed(run_dir)
    monkeypatch.setattr(hub, "hold", full)
    message = stop_message(hub.digits_teacher, run)
    assert "digits_teacher" in message and os.strerror(errno.ENOSPC) in message and "--teacher" in message


@pytest.mark.parametrize("spec", ["folder", "org/name"])
def test_a_stop_signal_while_a_teacher_is_loaded_keeps_its_exit_code(run_dir, monkeypatch, spec):
    def stopped(*_, **__):
        raise SystemExit(143)

    monkeypatch.setattr(common, "create_backbone", stopped)
    monkeypatch.setattr(hub, "pull", stopped)
    with pytest.raises(SystemExit) as stop:
        hub.load_teacher(run_dir if spec == "folder" else spec)
    assert stop.value.code == 143
