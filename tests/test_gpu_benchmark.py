"""tests/benchmarks/gpu.py loses no minute on a GPU: what fails or hangs is recorded, and what follows still runs."""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from runs import ENV

import common
from trainers.shared.fitting import fitted, given_names

FILE = ROOT / "tests" / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CARRIED", ROOT / "nothing carried")
    return module


def bench_of(gpu, folder, minutes=2.0, **changes):
    args = {"small": True, "pretend": False, "trainers": ["simsiam"], "parts": list(gpu.PARTS)} | changes
    bench = gpu.Bench(argparse.Namespace(minutes=minutes, out=folder / "gpu.json", **args))
    bench.results["machine"] = {"device": "CPU", "torch": "", "cores": 1}
    return bench


def test_steps_of_a_trainer_are_measured_in_three_precisions(gpu, tmp_path):
    bench = bench_of(gpu, tmp_path, parts=["steps"])
    gpu.run_parts(bench)
    written = json.loads((tmp_path / "gpu.json").read_text())
    part = written["parts"]["steps"]
    assert written["schema"] == 1 and part["error"] is None and part["not_reached"] == []
    assert [row["precision"] for row in part["rows"]] == ["bf16", "fp32", "fp16"]
    for row in part["rows"][:2]:  # fp16 needs a GPU
        assert row["trainer"] == "simsiam" and row["step_ms"] > row["data_ms"] > 0
    assert "| simsiam | bf16 |" in gpu.tables(written)


@pytest.mark.parametrize("small, images", [(True, 5748), (False, 50000)], ids=["trial", "CIFAR-10"])
def test_every_trainer_gets_what_is_asked_for(small, images, gpu, tmp_path):
    for name in gpu.TRAINERS:
        args_class = importlib.import_module(f"trainers.{name}").Args
        spec = {"trainer": name, "small": small, "data": "digits" if small else str(tmp_path), "compiled": False}
        args = common.parse_args(args_class, gpu.words_of(spec, args_class, str(tmp_path)))
        assert args.batch_size == (16 if small else 256) and args.num_workers == 0 and args.compile is False
        assert fitted(args, given_names(args), images, processes=1, cores=0) == {}, name


def pretended_env() -> dict[str, str]:
    env = {k: v for k, v in ENV.items() if k != "ACCELERATE_USE_CPU"}
    return env | {"PYTHONPATH": str(ROOT / "tests" / "pretended_gpu")}


@pytest.fixture
def pretended():
    """Skips where no device can be pretended."""
    code = "import device; device.install()"
    done = subprocess.run([sys.executable, "-c", code], env=pretended_env(), capture_output=True, text=True)
    if "NotHere" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])


def test_a_trainer_of_two_stages_is_measured_on_a_pretended_gpu(pretended, gpu, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = {"trainer": "ab", "compiled": False, "precisions": ["bf16"], "data": "digits"}
    (row,) = bench_of(gpu, tmp_path, pretend=True).measure("steps", spec, 120)
    assert "error" not in row and row["batch"] == 16 and row["size"] == 16 and row["fitted"] == {}
    assert row["step_ms"] > 0 and row["first_stage_ms"] > 0 and row["launches"] > 50 and row["waits_at"] == {}


def test_what_only_a_gpu_can_show_is_right_on_a_pretended_one(pretended):
    """A part of test_gpu.py; `gpu.py --pretend` runs more of it."""
    some = "synchronised or views or batch_norm or knn or features or [simsiam-no] or compiled"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pretend_in_tests"]
    words += ["tests/test_gpu.py", "-k", some]
    done = subprocess.run(words, cwd=ROOT, env=pretended_env(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "11 passed, 3 skipped" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


def test_every_trainer_starts_where_datasets_and_pyarrow_are_not_installed():
    code = (
        "import sys, importlib\nsys.modules.update(dict.fromkeys(('datasets', 'pyarrow')))\n"
        "[importlib.import_module('trainers.' + name) for name in sys.argv[1:]]"
    )
    names = [file.stem for file in (ROOT / "trainers").glob("*.py")]
    done = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_part_that_crashes_and_one_that_hangs_do_not_stop_the_next(gpu, tmp_path, monkeypatch):
    seen = []

    def crash(bench, part, until):
        part["rows"] = [1]
        raise RuntimeError("out of luck")

    def hang(bench, part, until):
        words = [sys.executable, "-c", "print('begun', flush=True); import time; time.sleep(60)"]
        part["exit_code"] = bench.process(words, until - time.monotonic(), tmp_path / "log")

    def last(bench, part, until):
        seen.append(json.loads(bench.args.out.read_text())["parts"])

    monkeypatch.setattr(gpu, "PARTS", {"tests": crash, "steps": hang, "authors": last})
    began = time.monotonic()
    gpu.run_parts(bench_of(gpu, tmp_path, minutes=0.15))
    assert time.monotonic() - began < 9
    assert seen[0]["tests"]["error"] == "RuntimeError: out of luck" and seen[0]["tests"]["rows"] == [1]
    assert seen[0]["steps"]["exit_code"] is None and (tmp_path / "log").read_text() == "begun\n"


def test_a_measurement_that_hangs_keeps_its_rows_and_says_so(gpu, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text(
        "import sys, time\nopen(sys.argv[-1], 'w').write('{\"a\": 1}\\n')\nprint('stuck', flush=True)\ntime.sleep(60)"
    )
    monkeypatch.setattr(gpu, "HERE", child)
    rows = bench_of(gpu, tmp_path).measure("steps", {"trainer": "smd"}, 2)
    assert rows[0] == {"a": 1} and rows[1]["trainer"] == "smd" and rows[1]["error"] == "not done in 2 s: stuck"


def test_results_are_never_half_written(gpu, tmp_path, monkeypatch):
    bench = bench_of(gpu, tmp_path)
    bench.save()
    before = bench.args.out.read_text()
    bench.results["parts"]["bad"] = {1, 2}  # not JSON
    with pytest.raises(TypeError):
        bench.save()
    assert bench.args.out.read_text() == before


def test_without_a_gpu_or_a_package_it_ends_in_one_line(gpu, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no CUDA device here; --small"):
        gpu.check(bench_of(gpu, tmp_path, small=False))
    monkeypatch.setitem(gpu.NEEDED, "no_such_package", "the part tests")
    gpu.check(bench_of(gpu, tmp_path))
    assert "no_such_package is not installed, which costs the part tests" in capsys.readouterr().out
    monkeypatch.setitem(gpu.NEEDED, "no_such_package", "everything")
    with pytest.raises(SystemExit, match="no_such_package: not installed"):
        gpu.check(bench_of(gpu, tmp_path))
