"""The same flags on one and on two processes give the same losses. Asserts that there were two."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from runs import TRAINERS, made_once, metrics, run_pair, tiny_flags, tiny_run
from together import run_here

import common
from trainers.shared.networks import GroupedBatchNorm
from trainers.swav import sinkhorn

# name -> trainer, changes to its tiny config, float64 or not; one pair of processes runs all of them
CASES = {f"{method} on {data}": (method, {"total-steps": 5, "data": data}, True)
         for method in TRAINERS for data in ("digits", "photographs")}  # fmt: skip
CASES["smd in single precision"] = ("smd", {"total-steps": 5}, False)
CASES["smd in one group"] = ("smd", {"total-steps": 4, "group-size": 0}, True)
RELATIONS = {"rank-weight": 1, "attention-weight": 1, "consistency": True, "image-size": 64, "subset": 96}
CASES["rkd in one group"] = ("rkd", {"total-steps": 4, "group-size": 0, **RELATIONS}, True)
CASES |= {
    f"disco in groups of {n}": ("disco", {"total-steps": 4, "save-every": 4, "bn-group-size": n}, True) for n in (0, 8)
}
CASES |= {f"swav in groups of {n}": ("swav", {"bn-group-size": n}, True) for n in (0, 2)}


def compare(one: list[dict], two: list[dict], steps: int, tolerance: float) -> None:
    assert len(one) == len(two) == steps
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() >= {"loss", "lr"}
        for key in a:
            loose = 1e3 if key == "effective_rank" else 1  # the roots of eigenvalues that are zero but for rounding
            assert b[key] == pytest.approx(a[key], rel=loose * tolerance), f"{key} at step {a['step']}"


@pytest.fixture(scope="session")
def case(tmp_path_factory, tiny_teacher, photo_folder):
    """The command line of a case with its run folder."""

    def words(name: str, run_dir: Path) -> tuple[str, list[str], bool]:
        method, changes, double = CASES[name]
        changes = {**changes, **({"data": photo_folder} if changes.get("data") == "photographs" else {})}
        return method, tiny_flags(method, run_dir, tiny_teacher, **changes), double

    return words


@pytest.fixture(scope="session")
def on_two(tmp_path_factory, case) -> Path:
    """A folder of run folders by the cases' names, all from one pair of processes."""
    return made_once(
        tmp_path_factory, "on_two", lambda folder: run_pair(folder, [case(name, folder / name) for name in CASES])
    )


@pytest.fixture
def both(case, on_two, tmp_path):
    """The run folders of a case on one process, this one, and on two."""

    def run(name: str) -> tuple[Path, Path]:
        run_here(*case(name, tmp_path / "one"))
        for number, run_dir in enumerate((tmp_path / "one", on_two / name), start=1):
            assert json.loads((run_dir / "environment.json").read_text())["num_processes"] == number
        return tmp_path / "one", on_two / name

    return run


@pytest.mark.parametrize("method", TRAINERS)
@pytest.mark.parametrize("data", ["digits", "photographs"])
def test_two_processes_train_as_one(method, data, both):
    one, two = both(f"{method} on {data}")
    compare(metrics(one), metrics(two), 5, 1e-8)


def test_two_processes_train_as_one_in_single_precision(both):
    one, two = both("smd in single precision")
    compare(metrics(one), metrics(two), 5, 1e-5)


@pytest.mark.parametrize("method", ["smd", "rkd"])
def test_a_group_that_spans_both_processes_is_one_group(method, both):
    """Pairs of images are gathered with their gradients: 16 images in one group on 2 x 8."""
    one, two = both(f"{method} in one group")
    compare(metrics(one), metrics(two), 4, 1e-8)


@pytest.mark.parametrize("group_size", [0, 8])
def test_a_teacher_in_batch_mode_has_the_same_groups_on_both_processes(group_size, both):
    """DisCo's teacher and students: one group of all 16 images spans 2 x 8; with groups of 8 the keys are shuffled."""
    folders = both(f"disco in groups of {group_size}")
    compare(*map(metrics, folders), 4, 1e-8)
    one, two = (torch.load(folder / "step_00000004" / "state.pt")["state"] for folder in folders)
    assert len(one["teacher_bn"]) > 5
    for part in ("teacher_bn", "encoder_k", "queue"):
        torch.testing.assert_close(two[part], one[part], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("group_size", [0, 2])
def test_multi_crop_groups_do_not_depend_on_the_processes(group_size, both):
    """SwAV's crops of two sizes, its head's batch of all crops and its queue: whole-batch statistics and pairs of images."""
    one, two = both(f"swav in groups of {group_size}")
    compare(metrics(one), metrics(two), 8, 1e-8)


def _sinkhorn(folder: str) -> None:
    """Codes of this process's half of 24 images; rank r writes folder/r.pt."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    scores = torch.rand(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    torch.save({"codes": sinkhorn(scores.chunk(world)[rank], 0.05, 3), "world": world}, f"{folder}/{rank}.pt")


def test_sinkhorn_of_two_processes_is_that_of_all_images(tmp_path):
    debug_launcher(_sinkhorn, (str(tmp_path),), num_processes=2)
    two = [torch.load(tmp_path / f"{r}.pt") for r in (0, 1)]
    assert [t["world"] for t in two] == [2, 2]
    scores = torch.rand(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    whole = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(torch.cat([t["codes"] for t in two]), whole, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(sinkhorn(scores[:12], 0.05, 3), whole[:12], rtol=1e-3), "halves alone give other codes"


def _grouped_batch_norm(group_size: int, folder: str) -> None:
    """One forward and backward over this process's share; rank r writes folder/r.pt."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, 3, 3, generator=g, dtype=torch.float64).chunk(world)[rank].requires_grad_()
    target = torch.randn(16, 5, 3, 3, generator=g, dtype=torch.float64).chunk(world)[rank]
    bn = common.set_batch_norm_groups(torch.nn.Sequential(torch.nn.BatchNorm2d(5)).double(), group_size, 16)
    y = bn(x)
    (y * target).sum().backward()
    assert world == 1 or isinstance(bn[0], GroupedBatchNorm)
    torch.save(
        {"y": y.detach(), "grad": x.grad, "world": world, "buffers": dict(bn.named_buffers())}, f"{folder}/{rank}.pt"
    )


@pytest.mark.parametrize("group_size", [0, 8, 4])
def test_batch_norm_groups_do_not_depend_on_the_processes(group_size, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    _grouped_batch_norm(group_size, str(tmp_path / "one"))
    debug_launcher(_grouped_batch_norm, (group_size, str(tmp_path / "two")), num_processes=2)
    one = torch.load(tmp_path / "one" / "0.pt")
    two = [torch.load(tmp_path / "two" / f"{r}.pt") for r in (0, 1)]
    assert [t["world"] for t in two] == [2, 2]
    for key in ("y", "grad"):
        torch.testing.assert_close(torch.cat([t[key] for t in two]), one[key], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(two[0]["buffers"], one["buffers"], rtol=1e-10, atol=1e-12)  # rank 0's are the ones kept


def test_batch_norm_groups_are_batch_norm_of_each_group():
    x = torch.randn(12, 5, 3, 3, dtype=torch.float64)
    grouped = common.set_batch_norm_groups(torch.nn.Sequential(torch.nn.BatchNorm2d(5)).double(), 4, 12)
    plain = [torch.nn.BatchNorm2d(5).double()(part) for part in x.split(4)]
    torch.testing.assert_close(grouped(x), torch.cat(plain))
    assert list(grouped.state_dict()) == list(torch.nn.Sequential(torch.nn.BatchNorm2d(5)).state_dict())
    with pytest.raises(SystemExit, match="--bn-group-size 5"):
        common.set_batch_norm_groups(torch.nn.BatchNorm2d(5), 5, 12)


def test_processes_that_do_not_see_each_other_are_refused(tmp_path, tiny_teacher, monkeypatch):
    """A launcher's environment without a process group: each would believe that it is alone, on the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="2 processes that do not see each other.*ACCELERATE_USE_CPU=true torchrun"):
        tiny_run("supervised", tmp_path / "run", tiny_teacher)
