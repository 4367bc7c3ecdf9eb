"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint and one line, whatever the run is doing, and never a traceback."""

import os
import signal
import subprocess
import threading
import time

import pytest
from accelerate import Accelerator
from runs import ENV, command, metrics, tiny_flags
from tools import make_backbone

import hub
from trainers import simsiam

STOPS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture
def run(tmp_path):
    return hub.Run(simsiam.Args(run_dir=tmp_path / "run"), simsiam.__file__, Accelerator(cpu=True))


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_within_the_steps_waits_for_the_checkpoint_and_repeats_are_ignored(run, number):
    backbone = make_backbone("test_resnet")
    with pytest.raises(SystemExit) as stop:
        for step in run.start(0, 5):
            assert not run.stop_requested()
            for again in (number, signal.SIGTERM, number):  # torchrun passes Ctrl-C on to workers that had it already
                send(again)
            assert run.stop_requested()
            run.save(step + 1, {"model": backbone}, backbone)
            run.stop(step + 1)
    assert stop.value.code == 143 and [c.name for c in hub.checkpoints(run.dir)] == ["step_00000001"]
    send(signal.SIGTERM)  # a launcher's last word must not spoil the exit code


@pytest.mark.parametrize("number", STOPS)
def test_a_stop_outside_the_steps_ends_at_once(run, number, capfd):
    with pytest.raises(SystemExit) as stop:
        send(number)
        time.sleep(0.1)
    assert stop.value.code == (130 if number == signal.SIGINT else 143)
    assert "nothing lost; --resume continues it" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once(run, monkeypatch, capfd):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    for _ in run.start(0, 1):
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert not codes, "the same key press, by way of the launcher"
        monkeypatch.setattr(run, "_signalled", run._signalled - 2)
        send(signal.SIGINT)
    assert codes == [130] and "second Ctrl-C" in capfd.readouterr().err


def test_signals_are_given_back_at_the_end(tmp_path):
    before = [signal.getsignal(number) for number in STOPS]
    run = hub.Run(simsiam.Args(run_dir=tmp_path / "run"), simsiam.__file__, Accelerator(cpu=True))
    assert [signal.getsignal(number) for number in STOPS] != before
    run.finish(None, {})
    assert [signal.getsignal(number) for number in STOPS] == before


def test_a_run_from_a_thread_trains_and_says_what_it_lacks(tmp_path, tiny_teacher, capfd):
    from runs import tiny_run

    errors = []

    def target():
        try:
            tiny_run("simsiam", tmp_path / "run", tiny_teacher, total_steps=2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert not errors and "not in the main thread" in capfd.readouterr().out
    assert (tmp_path / "run" / "release" / "config.json").exists()


def wait_for(process: subprocess.Popen, file, text: str) -> None:
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if file.exists() and text in file.read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended (code {process.poll()}) before {text}")


def test_ctrl_c_saves_and_says_so_in_one_line(tmp_path, tiny_teacher):
    flags = tiny_flags("simsiam", tmp_path, tiny_teacher, **{"save-every": 100000, "total-steps": 100000})
    process = subprocess.Popen(
        command("simsiam") + flags, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(process, tmp_path / "metrics.jsonl", '{"step": 5,')
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 143 and "--resume continues" in said
    assert error.strip() == "stopping: a checkpoint after this step; Ctrl-C again ends at once"
    (saved,) = hub.checkpoints(tmp_path)
    assert int(saved.name[5:]) == len(metrics(tmp_path))


def test_a_stop_while_the_teacher_trains_is_passed_on_and_keeps_what_is_trained(tmp_path):
    words = ["--run-dir", str(tmp_path / "runs" / "kd"), "--student", "resnet20", "--image-size", "16"]
    process = subprocess.Popen(
        command("kd") + words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    teacher = tmp_path / "runs" / "digits_teacher"
    wait_for(process, teacher / "metrics.jsonl", '"step": 0')
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in said and "failed" not in said
    assert hub.checkpoints(teacher), "the next run goes on with it"
