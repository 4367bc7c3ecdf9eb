"""A pytest plugin: the tests that need a CUDA device, on the pretended one.

    PYTHONPATH=tests/pretended_gpu python -m pytest -p pretend_in_tests tests/test_gpu.py

It is there before a test file asks for it, and to the end: a process of its own. Nothing can be compiled for it.
"""

import contextlib

import pytest
from steps import device, stand_in_for_nccl

ON_IT = contextlib.ExitStack()


def pytest_configure() -> None:
    device.install()
    stand_in_for_nccl()
    ON_IT.enter_context(device.pretend())


def pytest_unconfigure() -> None:
    ON_IT.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "compile" in item.name:
            item.add_marker(pytest.mark.skip(reason="nothing is compiled for a pretended device"))
