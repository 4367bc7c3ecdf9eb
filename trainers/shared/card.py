"""A release's model card: what learnt what from whom, figures, training curve, how to load it, licences. A chapter of hub.py."""

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path

import timm
from huggingface_hub import EvalResult, ModelCardData

from trainers.shared.files import figures as figures_of
from trainers.shared.files import markdown, read_json, read_records, write_whole

# Licences that ask no more than a notice of what is made from the work; any other known one is handed down to a student.
PERMISSIVE = (
    "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "unlicense", "cc0-1.0", "cc-by-3.0",
    "cc-by-4.0", "pddl", "odc-by", "cdla-permissive-1.0", "cdla-permissive-2.0",
)  # fmt: skip
NON_COMMERCIAL = ("-nc", "noncommercial", "non-commercial", "research")


def is_non_commercial(licence: str) -> bool:
    """Whether a licence's name says non-commercial or research only."""
    return any(mark in licence.lower() for mark in NON_COMMERCIAL)


def inherited(licences: Sequence[str]) -> str:
    """The licence of weights that come out of parts under these: ours, or the one that binds.

    Of several that bind, the non-commercial ones; if those differ, their names joined.
    """
    binding = sorted({name for name in licences if name.lower() not in PERMISSIVE})
    return " and ".join([name for name in binding if is_non_commercial(name)] or binding) or "apache-2.0"


def contradicts(licence: str, chain: str) -> bool:
    """Whether publishing under `licence` drops a condition of `chain`; nothing contradicts a chain that is unknown."""
    if licence == chain or chain in ("unknown", *PERMISSIVE):
        return False
    return not (is_non_commercial(licence) and is_non_commercial(chain))


def read_licence(card: Path) -> str:
    """The licence in the front matter of a model's or a data set's card, "unknown" without one."""
    front = card.read_text(errors="replace").split("\n---", 1)[0] if card.is_file() else ""
    found = dict(re.findall(r"^(license(?:_name)?):[ \t]*(?:\n[ \t]*- )?(\S.*)$", front, re.M))
    return (found.get("license_name") or found.get("license") or "unknown").strip("\"' []")


def set_licence(card: str, licence: str) -> str:
    """A card's text with another licence for the weights."""
    card = re.sub(r"^license_name:.*\n", "", card, count=1, flags=re.M)
    front = "\n".join(f"{k}: {v}" for k, v in _licence_fields(licence).items())
    card = re.sub(r"^license:.*$", lambda _: front, card, count=1, flags=re.M)
    return re.sub(r"^(\| \*\*these weights\*\* \|).*$", lambda m: f"{m[1]} **{licence}** |", card, flags=re.M)


def _licence_fields(licence: str) -> dict[str, str]:
    """A licence as the Hub's front matter has it: one of its identifiers, or "other" and a name."""
    return {"license": licence} if re.fullmatch(r"[\w.-]+", licence) else {"license": "other", "license_name": licence}


def is_ours(architecture: str) -> bool:
    """Whether timm knows this network only after `import common`."""
    return timm.model_entrypoint(architecture).__module__.startswith("trainers.")


def write_card(folder: Path, run_dir: Path, step: int, evaluations: Sequence[Path] = ()) -> None:
    """README.md of the release in `folder`, of the network of this step, and, if matplotlib is installed, training.png.

    `evaluations` are run folders of evaluations of this checkpoint; their figures stand beside the run's own, which
    are left out if they are another step's. Raises SystemExit for a damaged file in the run folder.
    """
    args, facts, data = (read_json(run_dir / f"{name}.json") for name in ("args", "environment", "data"))
    config, method = read_json(folder / "config.json"), facts.get("trainer", "unknown")
    data_name = _without_path(data.get("name") or args.get("data", "unknown"))
    parts = {
        **({teacher.get("role", "teacher"): teacher} if (teacher := read_json(run_dir / "teacher.json")) else {}),
        **({"started from": start} if (start := config.get("started_from")) else {}),
        "data": {"source": data_name, "licence": data.get("licence") or "as its owners say"},
    }
    parts = {name: {"licence": "unknown", **part} for name, part in parts.items()}
    licence = inherited([p["licence"] for p in parts.values() if p["licence"] != "as its owners say"])
    figures = [
        (run.name if run in evaluations else method, figure, value)
        for run in (run_dir, *evaluations)
        if (found := read_json(run / "results.json")) and (run in evaluations or found.get("step", step) == step)
        for figure, value in figures_of(found).items()
    ]
    results = _eval_results(figures, data_name)
    front = ModelCardData(
        **_licence_fields(licence),
        library_name="timm",
        tags=["image-feature-extraction", "timm", "cleandistill", method],
        **({"model_name": f"{config['architecture']}, {method}", "eval_results": results} if results else {}),
    )
    title, citation = _title_and_citation(run_dir / f"{method}.py")
    classes = config["num_classes"]
    without = ", num_classes=0" if classes else ""  # features, not the classifier's logits
    own = "import common  # registers this architecture; clone cleandistill first\n" if is_ours(config["architecture"]) else ""  # fmt: skip
    cfg = config["pretrained_cfg"]
    mean, std = ([round(v, 4) for v in cfg[name]] for name in ("mean", "std"))
    restricted = "\nNot for commercial use: a part that these weights come from forbids it.\n" if is_non_commercial(licence) else ""  # fmt: skip
    curve = "\n![training curve](training.png)\n" if draw_curve(run_dir, folder / "training.png") else ""
    flags = {k: _without_path(v) for k, v in args.items() if k not in ("run_dir", "config", "push_to_hub")}
    write_whole(
        folder / "README.md",
        f"""---
{front.to_yaml()}
---
# {config["architecture"]}, {markdown(title)}

Trained with cleandistill ({markdown(method)}.py, step {step}, commit {markdown(facts.get("commit"))}).

| | |
|---|---|
| architecture | {config["architecture"]}, {config["num_features"]}-d features{f", {classes} classes" if classes else ""} |
{"".join(f"| {markdown(name)} | {markdown(_describe(part))} |" + chr(10) for name, part in parts.items())}
## Figures

| from | figure | value |
|---|---|---:|
{"".join(f"| {markdown(where)} | {markdown(figure)} | {value:.2f} |" + chr(10) for where, figure, value in figures)}{curve}
## Loading

With timm alone; x is (B, 3, {cfg["input_size"][1]}, {cfg["input_size"][2]}), normalised with mean {mean} and std {std}:

```python
{own}import timm
model = timm.create_model("hf-hub:ORG/NAME", pretrained=True{without})  # or "local-dir:this/folder"
features = model.eval()(x)  # (B, {config["num_features"]})
```

With cleandistill, to distil from it or to evaluate it: `--teacher ORG/NAME`, `--checkpoint ORG/NAME`; the files alone:
`hub.pull("ORG/NAME")`. For ONNX Runtime, TorchScript or torch.export:
`python hub.py export ORG/NAME --to model.onnx`
(`--format torchscript`, `pt2`).

## Licence chain

| part | licence |
|---|---|
| code | apache-2.0 |
{"".join(f"| {markdown(name)} | {markdown(part['licence'])} |" + chr(10) for name, part in parts.items())}| **these weights** | **{markdown(licence)}** |
{restricted}
## Flags

```json
{json.dumps(flags, indent=1)}
```
{citation}""",
    )


def _describe(part: dict) -> str:
    architecture = f" ({part['architecture']})" if "architecture" in part else ""
    return f"{part.get('source', 'unknown')}{architecture}"


def _without_path(value):
    """A flag's value for the public: of a path on the training machine, its last name."""
    if isinstance(value, list | tuple):
        return [_without_path(v) for v in value]
    if not isinstance(value, str):
        return value
    return Path(value).name if value.startswith(("/", "~", "../", "./")) else value


def _eval_results(figures: list[tuple[str, str, float]], data: str) -> list[EvalResult]:
    """The trained network's own accuracies, as the Hub's model-index wants them."""
    accuracy = [
        (where, figure, value)
        for where, figure, value in figures
        if re.search(r"knn|top1|k=", figure) and not re.search(r"raw pixels|untrained|teacher", figure)
    ]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=data,
            dataset_name=data,
            metric_type="accuracy",
            metric_name=f"{where}: {figure}, percent",
            metric_value=round(value, 2),
        )
        for where, figure, value in accuracy
    ]


def _title_and_citation(trainer: Path) -> tuple[str, str]:
    """A trainer's first line, and a BibTeX entry from it: TITLE (AUTHORS, VENUE YEAR, arXiv:ID)."""
    try:
        doc = (ast.get_docstring(ast.parse(trainer.read_bytes())) or "") if trainer.exists() else ""
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # a damaged copy costs the title only
        doc = ""
    title = doc.split("\n", 1)[0].rstrip(".")
    paper = re.match(
        r"(?P<title>.+?) \((?P<authors>[^,(]+), (?P<venue>[A-Z]\w+) (?P<year>\d{4})(?:, arXiv:(?P<id>[\d.]+))?", title
    )
    if paper is None:
        return title, ""
    authors = paper["authors"].replace(" et al.", " and others").replace(" & ", " and ")
    arxiv = f"\n  eprint = {{{paper['id']}}},\n  archivePrefix = {{arXiv}}," if paper["id"] else ""
    return (
        title,
        f"""
## Citation

```bibtex
@inproceedings{{{trainer.stem}{paper["year"]},
  title = {{{{{paper["title"]}}}}},
  author = {{{authors}}},
  booktitle = {{{paper["venue"]}}},
  year = {{{paper["year"]}}},{arxiv}
}}
```
""",
    )


def draw_curve(run_dir: Path, file: Path) -> bool:
    """The logged loss over the steps as a PNG; False without matplotlib (pip install -e .[plot]) or without a log."""
    lines = [(record["step"], figures_of(record)) for record in read_records(run_dir / "metrics.jsonl")]
    curves = {
        k: [(step, m[k]) for step, m in lines if k in m]
        for k in sorted({k for _, m in lines for k in m})
        if "loss" in k
    }
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    if not any(curves.values()):
        return False
    try:
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(frameon=False)
        figure.savefig(file, dpi=120)
    except Exception:  # a picture is never worth a release
        return False
    return True
