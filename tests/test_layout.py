"""Rules about the files themselves. Every test counts what it looked at and fails on zero."""

import ast
import importlib
import re
import subprocess
import textwrap
from collections import defaultdict

import pytest
from conftest import CONFIGS, METHODS, ROOT
from runs import TRAINERS

import common

BLOCK = re.compile(r"^ *# --- shared block: (\w+) ---\n(.*?)^ *# --- end shared block ---\n", re.S | re.M)
SHARED_BLOCKS = {"setup", "data", "resume", "checkpoint", "release"}
FIELD = re.compile(r'^    (\w+): [^\n]+\n    """(.*?)"""', re.S | re.M)


SAME = [  # parts of a method that two trainers have in common, to the letter
    ({"swav", "swav_disco"}, {"SwAV", "all_sum", "sinkhorn", "swapped_prediction_loss", "enqueue", "warmup_cosine",
                              "prototype_health", "why_stuck"}),
]  # fmt: skip


def source(method):
    return (ROOT / "trainers" / f"{method}.py").read_text()


def args_class(method):
    return next(n for n in ast.parse(source(method)).body if isinstance(n, ast.ClassDef) and n.name == "Args")


def test_something_is_collected():
    assert len(METHODS) >= 5 and set(TRAINERS) <= set(METHODS)
    assert len(CONFIGS) >= 2 * len(METHODS) and {c.parent.name for c in CONFIGS} == set(METHODS)


def test_the_top_level_is_as_agreed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed}
    allowed = {"trainers", "common.py", "hub.py", "configs", "tests", "pyproject.toml", "README.md", "LICENSE"}
    assert {t for t in top if not t.startswith(".")} == allowed


def test_shared_blocks_are_identical():
    found = defaultdict(dict)
    for method in METHODS:
        for name, body in BLOCK.findall(source(method)):
            found[name][method] = textwrap.dedent(body)
    assert set(found) == SHARED_BLOCKS
    for name, copies in found.items():
        assert set(TRAINERS) <= set(copies), f"{name} is missing from {set(TRAINERS) - set(copies)}"
        assert len(set(copies.values())) == 1, f"shared block {name!r} differs between {sorted(copies)}"
        assert len(next(iter(copies.values())).splitlines()) <= 15, (
            f"{name} is too long to repeat: move it to common.py"
        )


def test_parts_that_trainers_have_in_common_are_identical():
    assert SAME
    for methods, names in SAME:
        for name in names:
            copies = {
                ast.get_source_segment(source(method), node)
                for method in methods
                for node in ast.parse(source(method)).body
                if getattr(node, "name", "") == name
            }
            assert len(copies) == 1, f"{name} differs between {sorted(methods)}, or is in none of them"
            assert all(f" {name}(" in source(method) for method in methods), (
                f"{name} is not in all of {sorted(methods)}"
            )


@pytest.mark.parametrize("method", METHODS)
def test_trainer_reads_in_one_sitting(method):
    assert len(source(method).splitlines()) <= 500


@pytest.mark.parametrize("name", ["common.py", "hub.py"])
def test_shared_file_reads_in_one_sitting(name):
    assert len((ROOT / name).read_text().splitlines()) <= 900


def test_shared_code_knows_no_method():
    chapters = sorted((ROOT / "trainers" / "shared").glob("*.py"))
    chapters = [path for path in chapters if path.stem != "official"]  # the authors' files bear their methods' names
    assert len(chapters) >= 4
    for path in [ROOT / "common.py", *chapters]:
        code = re.sub(r"#.*", "", path.read_text())  # a recipe's comment names its source
        words = re.findall(r"\b(smd|simsiam|seed_loss|disco|swav|sskd)\b", code)
        assert not words, f"{path.name} names {set(words)}"


@pytest.mark.parametrize("method", METHODS)
def test_trainer_imports_no_other_trainer(method):
    modules = {n.module for n in ast.walk(ast.parse(source(method))) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(ast.parse(source(method))) if isinstance(n, ast.Import) for a in n.names}
    assert {"common", "hub"} <= modules and not {m for m in modules if m and m.startswith("trainers")}


def test_plumbing_imports_neither_common_nor_hub():
    """Arrows run one way: trainers -> common, hub -> trainers/shared."""
    files = sorted((ROOT / "trainers" / "shared").glob("*.py"))
    assert len(files) >= 15
    for file in files:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        modules = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        modules |= {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
        assert not modules & {"common", "hub"}, file.name


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_is_documented(method):
    body = args_class(method).body
    assert len([n for n in body if isinstance(n, ast.AnnAssign)]) >= 5
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), f"{field.target.id}: no doc"


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_is_read(method):
    declared = {n.target.id for n in args_class(method).body if isinstance(n, ast.AnnAssign)}
    tree = ast.parse(source(method))
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "args"}
    everyones = (ROOT / "trainers" / "shared" / "run.py", ROOT / "hub.py", ROOT / "common.py")
    run = "".join(path.read_text() for path in everyones)
    read |= set(re.findall(r"\bargs\.(\w+)", run)) | set(re.findall(r'getattr\((?:self\.|run\.)?args, "(\w+)"', run))
    assert declared and declared <= read | {"config"}, f"declared but never read: {declared - read}"


def test_flags_of_the_same_name_have_the_same_doc():
    docs = defaultdict(dict)
    for method in METHODS:
        for name, doc in FIELD.findall(source(method)):
            docs[name][method] = doc
    own = {
        "augmentation",
        "milestones",
        "lr_decay",
        "label_smoothing",
        "schedule",
        "optimizer",
        "group_size",
        "queue_length",
        "temperature",
        "head",
        "base_lr",
        "ce_weight",
        "kd_weight",
        "method_weight",
        "data",  # annotations have layouts of their own, and Detectron2 decays no normalisation
        "weight_decay",
    }
    shared = {name: copies for name, copies in docs.items() if len(copies) > 1 and name not in own}
    assert len(shared) >= 20
    for name, copies in shared.items():
        plain = {
            re.sub(r" *\[[^\]]*\]$", "", doc) for doc in copies.values()
        }  # the source in brackets is the method's
        assert len(plain) == 1, f"--{name}: {copies}"


def test_functions_that_trainers_repeat_are_identical():
    found = defaultdict(dict)
    for method in METHODS:
        for node in ast.parse(source(method)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[node.name][method] = ast.get_source_segment(source(method), node)
    repeated = ("info_nce", "consistency_loss", "momentum_update", "initial_queue", "recipes", "choose_images")
    repeated += ("kd", "attention", "same_size", "MapRegressor")
    for name in repeated:
        assert len(found[name]) > 1 and len(set(found[name].values())) == 1, f"{name}: {sorted(found[name])}"


@pytest.mark.parametrize("method", TRAINERS)
def test_equations_of_the_docstring_are_implemented(method):
    stated = set(re.findall(r"\((\d+)\)$", ast.get_docstring(ast.parse(source(method))), re.M))
    cited = set(re.findall(r"Eq\. (\d+)", source(method)))
    assert stated <= cited, f"stated {stated}, cited {cited}"
    assert "Differences from" in ast.get_docstring(ast.parse(source(method))) or "D1" in source(method)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_config_is_recorded_and_parses_strictly(config):
    header = [line for line in config.read_text().splitlines() if line.startswith("#")]
    for key in ("command", "hardware", "result"):
        assert any(line.startswith(f"#   {key}") for line in header), key
    assert f"trainers/{config.parent.name}.py --config {config.relative_to(ROOT)}" in "\n".join(header)
    trainer = importlib.import_module(f"trainers.{config.parent.name}")
    args = common.parse_args(trainer.Args, ["--config", str(config)])
    assert args.config == config and args != trainer.Args(config=config), "a config that changes nothing"


def test_documents_name_no_machine():
    texts = [p for p in ROOT.rglob("*") if p.suffix in {".py", ".toml", ".md"} and ".venv" not in p.parts]
    assert len(texts) > 20
    for path in texts:
        assert not re.search(r"/(home|root|work|Users)/\w", path.read_text()), path
