"""The README names only what is there."""

import importlib
import re
import shlex

import pytest
from conftest import METHODS, ROOT

import common

TEXT = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"trainers/(\w+)\.py((?: [^\n`|]*)?)", TEXT)


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) >= 10
    for link in links:
        assert (ROOT / link).exists(), link


def test_files_in_backticks_exist():
    files = re.findall(r"`((?:trainers|tests|configs)/[\w./-]+\.\w+)`", TEXT)
    files += re.findall(r"python (\S+\.py)", TEXT)
    files += [f"tests/benchmarks/{name}" for name in re.findall(r"`(\w+\.py)`", TEXT)]
    assert len(files) >= 5
    for file in files:
        assert (ROOT / file).exists(), file


def test_every_trainer_is_in_the_table():
    assert set(re.findall(r"\[(\w+)\.py\]\(trainers/\1\.py\) \|", TEXT)) == set(METHODS)


@pytest.mark.parametrize(("trainer", "flags"), [c for c in COMMANDS if c[1].strip(" .")])
def test_commands_parse(trainer, flags):
    module = importlib.import_module(f"trainers.{trainer}")
    args = common.parse_args(module.Args, [word for word in shlex.split(flags) if word != "..."])
    assert args != module.Args()


def test_nothing_is_left_to_fill_in():
    for path in [ROOT / "README.md", *(ROOT / "configs").rglob("*.toml")]:
        text = path.read_text()
        assert not re.search(r"\b[A-Z]+_TABLE\b|\bTODO\b|\bRES\b|\bHW\b", text), path
