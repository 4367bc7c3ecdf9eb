"""tests/benchmarks/gpu.py loses no minute on a GPU: what fails or hangs is recorded, and what follows still runs."""

import argparse
import importlib.util
import json
import sys
import time

import pytest
from conftest import ROOT

FILE = ROOT / "tests" / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CARRIED", ROOT / "nothing carried")
    return module


def bench_of(gpu, folder, minutes=2.0, **changes):
    args = {"small": True, "pretend": None, "trainers": ["simsiam"], "parts": list(gpu.PARTS)} | changes
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
