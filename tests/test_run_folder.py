"""One run a folder, its records true, its checkpoints kept: what resuming takes, refuses, sets aside and never deletes."""

import dataclasses
import errno
import json
import os
import shutil
import threading

import pytest
import torch
from accelerate import Accelerator, debug_launcher
from accelerate.state import AcceleratorState, GradientState
from runs import metrics, photographs
from tools import make_backbone, make_run, stop_message

import common
import hub
from trainers import simsiam, smd
from trainers.shared import run as run_module


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return photographs(tmp_path_factory.mktemp("pictures"), count=40, sides=(16, 16))


@pytest.fixture
def train(tmp_path, pictures):
    """Four steps of the smallest network in tmp_path/run, a checkpoint after each second one, with other flags if given."""

    def run(*words: str, **flags):
        usual = {
            "data": pictures,
            "image_size": 16,
            "batch_size": 8,
            "total_steps": 4,
            "save_every": 2,
            "log_every": 1,
        }
        usual |= {"backbone": "test_resnet", "proj_dim": 8, "pred_hidden_dim": 4}
        given = ({} if words else usual) | flags
        words = [*words, *("--resume" if k == "resume" else f"--{k}={v}" for k, v in given.items())]
        return simsiam.main(common.parse_args(simsiam.Args, ["--run-dir", str(tmp_path / "run"), *words]))

    return run


def files(folder) -> dict:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def steps(folder) -> list[int]:
    return [line["step"] for line in metrics(folder)]


# --- the flags and data of a run that goes on ---


def test_resume_alone_goes_on_with_the_flags_of_the_run(train, tmp_path):
    train()
    before = json.loads((tmp_path / "run" / "args.json").read_text())
    train("--resume", "--total-steps", "6", "--keep", "3", "--log-every", "2", "--save-every", "1")
    after = json.loads((tmp_path / "run" / "args.json").read_text())
    taken = {"resume": True, "total_steps": 6, "keep": 3, "log_every": 2, "save_every": 1}
    assert after == {**before, **taken}, "everything else is the run's own"
    assert steps(tmp_path / "run") == [0, 1, 2, 3, 4, 5] and (tmp_path / "run" / "step_00000005").exists()


CHANGES = {"batch_size": 16, "seed": 1, "base_lr": 0.5, "image_size": 32, "backbone": "test_vit", "proj_dim": 16}


@pytest.mark.parametrize("flag", [*CHANGES, "data"])
def test_a_flag_that_makes_another_run_is_refused_and_nothing_is_touched(train, tmp_path, flag):
    train(total_steps=2)
    before = files(tmp_path / "run")
    value = CHANGES.get(flag, tmp_path / "mistyped")
    message = stop_message(train, "--resume", **{flag: value})
    stored = json.loads((tmp_path / "run" / "args.json").read_text())[flag]
    assert message.startswith(f"--resume: --{flag.replace('_', '-')} is ") and str(value) in message
    assert repr(stored) in message and files(tmp_path / "run") == before


def test_a_flag_changed_in_code_is_refused_too(train, tmp_path):
    train(total_steps=2)
    args = common.parse_args(simsiam.Args, ["--run-dir", str(tmp_path / "run"), "--resume"])
    assert "--seed is 5" in stop_message(simsiam.main, dataclasses.replace(args, seed=5))


def test_the_same_folder_by_another_path_is_the_same_data(train, tmp_path, pictures, monkeypatch):
    train(total_steps=2)
    monkeypatch.chdir(pictures.parent)
    train("--resume", "--data", f"./{pictures.name}", "--total-steps", "3")
    assert steps(tmp_path / "run") == [0, 1, 2]


def test_flags_younger_than_the_run_have_their_defaults_and_older_ones_are_forgotten(train, tmp_path):
    train(total_steps=2)
    file = tmp_path / "run" / "args.json"
    stored = json.loads(file.read_text())
    del stored["momentum"]
    file.write_text(json.dumps({**stored, "abolished": 3}))
    train("--resume", "--total-steps", "3")
    assert json.loads(file.read_text())["momentum"] == 0.9 and steps(tmp_path / "run") == [0, 1, 2]


@pytest.mark.parametrize("text", ["", '{"data": "di', "[1]"])
def test_flags_that_are_cut_are_one_line(train, tmp_path, text):
    train(total_steps=2)
    (tmp_path / "run" / "args.json").write_text(text)
    assert "args.json" in stop_message(train, "--resume") and steps(tmp_path / "run") == [0, 1]


@pytest.mark.parametrize("change", ["grown", "others"])
def test_other_images_under_the_same_name_are_refused_before_anything_is_written(train, tmp_path, pictures, change):
    own = shutil.copytree(pictures, tmp_path / "own")
    train(data=own)
    before = files(tmp_path / "run")
    one, two, *_ = sorted((own / "train").rglob("*.jpg"))
    shutil.copy(one, own / "train" / "class1" / "new.jpg") if change == "grown" else shutil.copy(one, two)
    message = stop_message(train, "--resume", "--total-steps", "6")
    assert message.startswith("--resume: --data") and "other images" in message
    assert files(tmp_path / "run") == before


def test_a_finished_run_resumed_ends_well(train, tmp_path):
    train()
    log, weights = metrics(tmp_path / "run"), (tmp_path / "run" / "release" / "model.safetensors").read_bytes()
    train("--resume")
    assert metrics(tmp_path / "run") == log
    assert (tmp_path / "run" / "release" / "model.safetensors").read_bytes() == weights


def test_a_run_that_stops_in_its_setup_leaves_no_records(train, tmp_path):
    stop_message(train, data=tmp_path / "mistyped")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


# --- one run a folder ---


def elsewhere(call):
    """Run `call` in another thread, as another process would; returns what it gave or raised."""
    box = []

    def target():
        try:
            box.append(call())
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return box[0]


def test_a_second_run_in_a_folder_is_told_at_once(tmp_path):
    args = simsiam.Args(run_dir=tmp_path / "run")
    first = hub.Run(args, simsiam.__file__, Accelerator(cpu=True))
    second = elsewhere(lambda: hub.Run(args, simsiam.__file__, Accelerator(cpu=True)))
    assert isinstance(second, SystemExit) and "another run is using this folder" in str(second)
    first.close()
    third = elsewhere(lambda: hub.Run(args, simsiam.__file__, Accelerator(cpu=True)))
    assert isinstance(third, hub.Run)


def test_the_teacher_is_trained_once_while_others_wait_and_a_half_trained_one_is_kept(tmp_path, monkeypatch):
    half = tmp_path / "digits_teacher" / "step_00000001"
    half.mkdir(parents=True)
    started, trained = threading.Event(), []

    def pretend(folder):
        trained.append(half.exists())
        started.set()
        threading.Event().wait(0.5)
        (folder / "release").mkdir()
        (folder / "release" / "config.json").write_text("{}")

    monkeypatch.setattr(hub, "_train_digits_teacher", pretend)
    runs = [hub.Run(smd.Args(run_dir=tmp_path / n), smd.__file__, Accelerator(cpu=True)) for n in ("one", "two")]
    first = threading.Thread(target=hub.digits_teacher, args=(runs[0],))
    first.start()
    started.wait(10)
    assert hub.digits_teacher(runs[1]) == str(tmp_path / "digits_teacher")
    first.join()
    assert trained == [True], "once, and what was there is resumed"


# --- checkpoints ---


@pytest.mark.parametrize("kind", ["empty", "damaged"])
def test_what_cannot_be_resumed_is_set_aside_and_costs_no_checkpoint(train, tmp_path, kind):
    run = tmp_path / "run"
    train(total_steps=2, keep=1)
    for number in (98, 99):
        (run / f"step_000000{number}").mkdir()
        if kind == "damaged":
            (run / f"step_000000{number}" / "state.pt").write_bytes(b"\0" * 100)
    train("--resume", "--total-steps", "4")
    names = {p.name for p in run.glob("*step_*")}
    assert names == {"step_00000004", "unreadable_step_00000098", "unreadable_step_00000099"}


def test_a_foreign_folder_with_a_higher_number_costs_no_checkpoint(tmp_path):
    run = make_run(tmp_path / "run", make_backbone("test_resnet"), keep=1)
    (run.dir / "step_00000099").mkdir()
    backbone = make_backbone("test_resnet")
    for step in (4, 5):
        run.save(step, {"model": backbone}, backbone)
    assert {p.name for p in run.dir.glob("step_*")} == {"step_00000005", "step_00000099"}


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_resume(train, tmp_path):
    train()
    whole = metrics(tmp_path / "run")
    for folder in hub.checkpoints(tmp_path / "run"):
        shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "run" / "release")
    (tmp_path / "run" / "results.json").unlink()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    message = stop_message(train)
    assert "--resume starts it again at step 0" in message
    train("--resume")
    assert metrics(tmp_path / "run") == whole


def test_results_without_a_checkpoint_are_no_run_to_start_again(train, tmp_path):
    train()
    for folder in hub.checkpoints(tmp_path / "run"):
        shutil.rmtree(folder)
    assert "the results of a run" in stop_message(train, "--resume")


def test_weights_that_are_not_finite_replace_no_good_checkpoint(tmp_path):
    backbone = make_backbone("test_resnet")
    run = make_run(tmp_path / "run", backbone, keep=1)
    next(backbone.parameters()).data.view(-1)[0] = torch.nan
    message = stop_message(run.save, 4, {"model": backbone}, backbone)
    assert "step 4: the weights are not finite" in message and "step_00000003 stays" in message
    assert [c.name for c in hub.checkpoints(run.dir)] == ["step_00000003"]


def test_resume_refuses_weights_that_are_not_finite_and_names_an_older_checkpoint(tmp_path, monkeypatch):
    backbone = make_backbone("test_resnet")
    run = make_run(tmp_path / "run", backbone)
    next(backbone.parameters()).data.view(-1)[0] = torch.inf
    monkeypatch.setattr(run_module, "_finite", lambda _: True)
    run.save(4, {"model": backbone}, backbone)
    monkeypatch.undo()
    message = stop_message(run.resume, {"model": backbone})
    assert "step_00000004 holds weights that are not finite" in message and "goes on from step_00000003" in message


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_keeps_this_machines_kernels(tmp_path, kind):
    def optimizer(fused: bool):
        make = {"sgd": lambda p: torch.optim.SGD(p, 0.1, 0.9, fused=fused), "adamw": torch.optim.AdamW}[kind]
        return make(network.parameters()) if kind == "sgd" else make(network.parameters(), fused=fused)

    network = make_backbone("test_resnet")
    run = make_run(tmp_path / "run", network)
    for written, read in ((False, True), (True, False)):
        there = optimizer(written)
        network(torch.rand(2, 3, 32, 32)).sum().backward()
        there.step()
        run.save(4, {"optimizer": there}, network)
        here = optimizer(read)
        assert run.resume({"optimizer": here}) == 4
        assert here.param_groups[0]["fused"] is read
        here.step()


def _resume_where_one_cannot_read(folder: str) -> None:
    """Rank 1 cannot read the newest checkpoint; rank r writes the step that it goes on with to folder/r.pt."""
    AcceleratorState._reset_state(True)  # the parent's, which was forked
    rank = torch.distributed.get_rank()
    args = simsiam.Args(run_dir=f"{folder}/run", resume=True, batch_size=8)
    read = run_module._read_checkpoint
    if rank == 1:
        run_module._read_checkpoint = lambda f, s: (
            (None, "is not whole (x)") if f.name == "step_00000004" else read(f, s)
        )
    accelerator = Accelerator(cpu=True)
    torch.save(hub.Run(args, simsiam.__file__, accelerator).resume({"x": torch.zeros(2)}), f"{folder}/{rank}.pt")


def test_all_processes_resume_from_the_same_step(tmp_path):
    args = simsiam.Args(run_dir=f"{tmp_path}/run", batch_size=8)
    run = hub.Run(args, simsiam.__file__, Accelerator(cpu=True))
    for step in (2, 4):
        run.save(step, {"x": torch.ones(2)}, None)
    run.close()
    debug_launcher(_resume_where_one_cannot_read, (str(tmp_path),), num_processes=2)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)] == [2, 2]


# --- small files ---


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    run_module.write_whole(file, "before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    message = stop_message(run_module.write_whole, file, "after")
    assert str(file) in message and os.strerror(errno.ENOSPC) in message and "free space" in message
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"results.json": "before"}


@pytest.mark.parametrize("name", ["args.json", "environment.json", "data.json", "simsiam.py"])
def test_a_full_disk_under_any_record_is_one_line(train, tmp_path, monkeypatch, name):
    write = os.replace

    def full(source, target):
        if str(target).endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(source, target)

    monkeypatch.setattr(os, "replace", full)
    message = stop_message(train)
    assert name in message and "free space" in message and not list((tmp_path / "run").glob(".*.half"))
    monkeypatch.undo()
    train(resume=True)
    assert (tmp_path / "run" / name).exists() and steps(tmp_path / "run") == [0, 1, 2, 3]


def test_a_file_name_that_is_not_text_keeps_its_bytes(tmp_path):
    run_module.write_whole(tmp_path / "bad_images.txt", "caf\udce9.jpg\n")
    assert (tmp_path / "bad_images.txt").read_bytes() == b"caf\xe9.jpg\n"


@pytest.mark.parametrize("error", ["[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0", "x"])
def test_a_checkpoint_that_could_not_be_written_is_told_in_plain_words(error):
    why = run_module._why(RuntimeError(error))
    assert "inline_container" not in why and "enforce" not in why and why


# --- what a launcher may decide ---


@pytest.fixture
def fresh_accelerate():
    """accelerate reads the launcher's variables once a process."""
    yield AcceleratorState._reset_state(True), GradientState._reset_state()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


UNUSED = {"GRADIENT_ACCUMULATION_STEPS": "4", "DYNAMO_BACKEND": "inductor", "GRADIENT_CLIPPING": "1.0"}


def test_a_launcher_changes_no_arithmetic(train, tmp_path, monkeypatch, capsys, fresh_accelerate):
    train()
    usual = metrics(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    monkeypatch.setattr("trainers.shared.run.available_cores", lambda: 1)
    for name, value in UNUSED.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    train()
    said = capsys.readouterr().out
    assert metrics(tmp_path / "run") == usual
    assert all(f"ACCELERATE_{name}={value} is not used" in said for name, value in UNUSED.items())


REFUSED = {
    "USE_DEEPSPEED": "DeepSpeed",
    "USE_FSDP": "FSDP",
    "USE_MEGATRON_LM": "Megatron",
    "USE_PARALLELISM_CONFIG": "parallelism",
}
PRECISIONS = {"fp8": "precision fp8", "fp12": "precision fp12"}


@pytest.mark.parametrize("name", [*REFUSED, *PRECISIONS])
def test_a_launcher_that_asks_for_more_is_refused(train, tmp_path, monkeypatch, fresh_accelerate, name):
    variable, value = (name, "true") if name in REFUSED else ("MIXED_PRECISION", name)
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    message = stop_message(train)
    assert {**REFUSED, **PRECISIONS}[name] in message and "torchrun" in message and not (tmp_path / "run").exists()
