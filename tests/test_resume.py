"""A run is a function of its flags, seed and step: killed, stopped and resumed runs equal the uninterrupted one."""

import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from runs import ENV, TRAINERS, command, launch, metrics, tiny_flags, tiny_run

import common
import hub
from trainers import supervised


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize("data", ["digits", "photographs"])
def test_resumed_run_repeats_the_uninterrupted_one(method, data, tmp_path, tiny_teacher, photo_folder):
    changes = {} if data == "digits" else {"data": str(photo_folder)}
    whole = tiny_run(method, tmp_path / "whole", tiny_teacher, **changes)
    assert [line["step"] for line in whole] == list(range(8)), "the test must take every step it claims to check"
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", resumed)
    for folder in hub.checkpoints(resumed)[:1]:
        shutil.rmtree(folder)
    assert [f.name for f in hub.checkpoints(resumed)] == ["step_00000006"]
    assert tiny_run(method, resumed, tiny_teacher, resume=True, **changes) == whole
    ours, theirs = (torch.load(r / "step_00000008" / "state.pt") for r in (resumed, tmp_path / "whole"))
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


def kill_when(process: subprocess.Popen, run_dir, step: int, number: int) -> None:
    """Send a signal once the run has logged `step`."""
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        log = run_dir / "metrics.jsonl"
        if log.exists() and f'{{"step": {step},' in log.read_text():
            process.send_signal(number)
            return
        time.sleep(0.005)
    raise AssertionError(f"the run ended (code {process.poll()}) before step {step}")


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_continue_exactly(workers, tmp_path, tiny_teacher, photo_folder):
    """SIGKILL at three random steps; with photographs, so that the workers' part is checked too."""
    changes = {"data": photo_folder, "num-workers": workers, "total-steps": 24, "save-every": 2}
    launch(command("smd") + tiny_flags("smd", tmp_path / "whole", tiny_teacher, **changes))
    whole, killed = metrics(tmp_path / "whole"), tmp_path / "killed"
    assert len(whole) == 24
    rng, at = random.Random(workers), 0
    for attempt in range(3):
        resume = {"resume": True} if hub.checkpoints(killed) else {}
        words = command("smd") + tiny_flags("smd", killed, tiny_teacher, **changes, **resume)
        process = subprocess.Popen(words, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        at = min(20, at + rng.randint(3, 6))
        kill_when(process, killed, at, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        shutil.rmtree(killed / ".release", ignore_errors=True)
        assert hub.checkpoints(killed), f"no checkpoint after kill {attempt}"
    launch(command("smd") + tiny_flags("smd", killed, tiny_teacher, **changes, resume=True))
    assert metrics(killed) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_leaves_a_checkpoint_and_code_143(number, tmp_path, tiny_teacher):
    flags = tiny_flags("simsiam", tmp_path, tiny_teacher, **{"save-every": 100000, "total-steps": 100000})
    process = subprocess.Popen(command("simsiam") + flags, env=ENV, stdout=subprocess.PIPE, text=True)
    kill_when(process, tmp_path, 5, number)
    assert process.wait(60) == 143
    (saved,) = hub.checkpoints(tmp_path)
    assert 6 <= int(saved.name[5:]) == len(metrics(tmp_path))
    assert "--resume continues" in process.stdout.read()


def test_generators_are_part_of_a_checkpoint(tmp_path):
    args = supervised.Args(run_dir=tmp_path / "run", tracker="none")
    run = hub.Run(args, supervised.__file__, Accelerator(cpu=True))
    backbone = common.create_backbone("test_resnet")
    queue = torch.arange(4.0)
    run.save(3, {"model": backbone, "queue": queue}, backbone)
    drawn = [torch.rand(3), np.random.rand(3), random.random()]
    queue.zero_()
    assert run.resume({"model": backbone, "queue": queue}) == 3
    assert queue.tolist() == [0, 1, 2, 3]
    assert (
        torch.equal(torch.rand(3), drawn[0]) and (np.random.rand(3) == drawn[1]).all() and random.random() == drawn[2]
    )


def test_only_the_newest_checkpoints_are_kept(tmp_path, tiny_teacher):
    tiny_run("supervised", tmp_path / "run", tiny_teacher, save_every=1, keep=3)
    assert [f.name for f in hub.checkpoints(tmp_path / "run")] == [f"step_0000000{i}" for i in (8, 7, 6)]
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert facts["num_processes"] == 1 and (tmp_path / "run" / "supervised.py").exists()
    assert not [p for p in os.listdir(tmp_path / "run") if p.startswith(".") and p != ".lock"], (
        "nothing half-written stays"
    )
