"""--compile in every trainer that has it, by dynamo and autograd's tracing: the backend after them needs a C++ compiler or a GPU."""

import functools
import importlib

import pytest
import torch
from conftest import METHODS
from runs import TRAINERS, tiny_run

import common
import hub

COMPILED = [
    method
    for method in METHODS
    if "compile" in importlib.import_module(f"trainers.{method}").Args.__dataclass_fields__ and method in TRAINERS
]


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is compiled, by a backend that traces forward and backward and runs them as they are."""
    from torch._dynamo.backends.debugging import aot_eager

    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    # what comes after the steps would be traced again, in eval mode and for other batches
    monkeypatch.setattr(hub, "knn", lambda *_, **__: {})
    monkeypatch.setattr(common, "top1_accuracy", lambda *_, **__: 0.0)
    yield seen
    torch._dynamo.reset()


@pytest.mark.parametrize("method", COMPILED)
def test_a_compiled_network_gives_the_same_losses(method, tmp_path, tiny_teacher, digits_once, graphs):
    changes = {"total_steps": 1, "log_every": 1, "save_every": 100}
    plain = tiny_run(method, tmp_path / "plain", tiny_teacher, **changes)
    assert not graphs
    compiled = tiny_run(method, tmp_path / "compiled", tiny_teacher, **changes, compile=True)
    assert graphs
    for a, b in zip(plain, compiled, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
