"""Every way a checkpoint enters or leaves: run folders, exact resume, teachers, releases, the Hugging Face Hub.

    python hub.py build runs/smd               # the run's student as a folder that timm loads, offline
    python hub.py push runs/smd org/name       # build and upload it
    python hub.py pull org/name                # its inverse
    python hub.py export runs/smd              # one file for ONNX Runtime; --format torchscript or pt2, --int8
    python hub.py inspect FILE_OR_FOLDER       # what a checkpoint is and whether we can load it
    python hub.py list [FOLDER]                # the official teachers that --teacher knows by name, and your runs
    python hub.py to-detectron2 runs/smd OUT.pkl    # a ResNet by the names that Detectron2 reads
    python hub.py report RUN RUN ...           # one table over many runs and evaluations

Nothing in here knows a loss.
"""

import difflib
import errno
import filecmp
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import safetensors.torch
import timm
import torch
import tyro
from filelock import FileLock, Timeout
from torch import Tensor, nn

import common

# Chapters that would make this file too long to read: the model card, export, the authors' own files, the run folder.
from trainers.shared.card import contradicts, is_ours, read_licence, set_licence, write_card
from trainers.shared.export import SUFFIXES, export
from trainers.shared.files import figures as figures_of
from trainers.shared.files import give_usual_mode, markdown, one_line, read_json, read_records, reworded, write_whole
from trainers.shared.official import (
    HOW_TO_GET_A_TEACHER,
    TEACHERS,
    converted,
    download,
    name_classifier,
    open_foreign,
    read_config,
)
from trainers.shared.run import Run, checkpoints, create_accelerator, hold, run_facts

# ---------------------------------------------------------------------------------------------------------------------
# Teachers
# ---------------------------------------------------------------------------------------------------------------------


class Teacher(nn.Module):
    """A frozen backbone in eval mode, (B, 3, H, W) in [0, 1] -> (B, num_features), and what is known about it.

    `head` maps features to the embedding of its pre-training, where the checkpoint holds one; `facts` has source,
    architecture, format and licence; `config` is a release's config.json.
    """

    def __init__(self, backbone: nn.Module, facts: dict, head: nn.Module | None = None, config: dict | None = None):
        super().__init__()
        self.backbone, self.head, self.facts, self.config = backbone, head, facts, config or {}
        self.num_features = backbone.num_features
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def load_teacher(
    spec: str | Path, *, num_classes: int = 0, image_size: int | None = None, flag: str = "--teacher"
) -> Teacher:
    """The teacher that `--teacher SPEC` names, on the CPU; every backbone tensor matched or an error that names it.

    spec: a run folder, a release folder, an official file, ARCH@FILE (a timm name and a state dict), "timm/NAME", a Hub
    id, or a name in TEACHERS. With `num_classes` the network ends in its classifier. A network of fixed input size is
    one for images of `image_size` px, or the nearest size that it can have, where timm can resample its weights; else,
    and where it is None, it keeps its own. Raises SystemExit, in terms of `flag`, where there is nothing to load or it
    does not fit; a file that would run code on loading is refused.
    """
    try:
        teacher = _load_teacher(str(spec), num_classes, image_size)
        own = getattr(teacher.backbone, "num_classes", 0)
        if num_classes and own != num_classes:
            raise SystemExit(f"--teacher {spec}: has a classifier of {own} classes, the data has {num_classes}")
        return teacher
    except SystemExit as error:
        raise reworded(error, str(error).replace("--teacher", flag)) from None


def _load_teacher(spec: str, num_classes: int, image_size: int | None) -> Teacher:
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path, num_classes, image_size, {"source": path.name})
    if path.is_file():
        return _load_foreign(path, "", num_classes, image_size, {"source": path.name, "licence": "unknown"})
    architecture, at, file = spec.removeprefix("timm/").partition("@")
    if at and (Path(file).suffix or Path(file).expanduser().exists()):
        path = Path(file).expanduser()
        if not path.is_file():
            raise SystemExit(
                f"--teacher {spec}: no file {file}; ARCH@FILE names a timm model and a file of its weights"
            )
        return _load_foreign(path, architecture, num_classes, image_size, {"source": path.name, "licence": "unknown"})
    if spec in TEACHERS:
        official = TEACHERS[spec]
        facts = {"source": spec, "url": official.url, "licence": official.licence}
        return _load_foreign(download(official.url, official.md5), "", num_classes, image_size, facts)
    if spec.startswith("timm/") and spec.count("/") == 1:
        # None: timm's own classifier; for another number of classes it would make a random one
        options = {"num_classes": None if num_classes else 0, "image_size": image_size}
        backbone = common.create_backbone(spec[5:], pretrained=True, **options)
        facts = {"source": spec, "licence": backbone.pretrained_cfg.get("license") or "unknown"}
        return Teacher(backbone, {**facts, "architecture": backbone.pretrained_cfg["architecture"], "format": "timm"})
    hub_id = spec.removeprefix("hf-hub:")
    if hub_id.count("/") == 1 and not path.suffix and not spec.startswith((".", "/", "~")):
        try:
            folder = pull(hub_id)
        except SystemExit as error:  # a mistyped path looks like org/name
            text = f"--teacher {spec}: no such file or folder here, and from the Hub: {error}"
            raise reworded(error, text) from None
        return _load_folder(folder, num_classes, image_size, {"source": f"hf-hub:{hub_id}"})
    close = difflib.get_close_matches(spec, TEACHERS, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise SystemExit(f"--teacher {spec}: no such file, folder or name; {hint}{HOW_TO_GET_A_TEACHER}")


def load_weights(backbone: nn.Module, spec: str, head: nn.Module | None = None) -> bool:
    """--init-from: copy the weights of the checkpoint `spec` (as for --teacher) into a backbone, strictly.

    A classifier of the backbone stays as it is: its classes are the new data's. A `head` gets the file's projection head
    if it holds one of the same keys and shapes; True says that it did.
    """
    found = load_teacher(spec, image_size=getattr(backbone, "input_side", None), flag="--init-from")
    own = backbone.state_dict()
    fresh = {k: own[k] for k in _classifier_keys(backbone.pretrained_cfg, own)}
    load_strictly(backbone, {**fresh, **found.backbone.state_dict()}, f"--init-from {spec}")
    backbone.started_from = found.facts  # its licence binds what is made of it
    if head is None or found.head is None:
        return False
    mine, theirs = ({k: v.shape for k, v in h.state_dict().items()} for h in (head, found.head))
    if mine != theirs:
        return False
    head.load_state_dict(found.head.state_dict())
    return True


def _classifier_keys(cfg: dict, state: dict) -> set[str]:
    """The keys of a classifier, under the names that a timm config gives it."""
    names = cfg.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return {k for k in state if k.startswith(tuple(f"{name}." for name in names))}


def _load_folder(path: Path, num_classes: int, image_size: int | None, facts: dict) -> Teacher:
    """A release folder, or a run folder's release or newest checkpoint."""
    folder = next((f for f in (path, path / "release", *checkpoints(path)) if (f / "config.json").exists()), None)
    if folder is None or not (folder / "model.safetensors").exists():
        raise SystemExit(
            f"--teacher {path}: neither config.json + model.safetensors nor a run with a checkpoint in it"
        )
    config = read_config(folder / "config.json")
    cfg, architecture = config.get("pretrained_cfg", config), config["architecture"]
    own = config.get("num_classes", cfg.get("num_classes", 0)) or 0
    if num_classes and own != num_classes:
        raise SystemExit(f"--teacher {path}: has a classifier of {own} classes, the data has {num_classes}")
    state = _read_tensors(folder / "model.safetensors")
    if not num_classes and own:  # a classifier that is not wanted, under the name that timm gives it
        unwanted = _classifier_keys(cfg, state)
        state = {k: v for k, v in state.items() if k not in unwanted}
    options = {"num_classes": own if num_classes else 0, "mean": cfg.get("mean"), "std": cfg.get("std")}
    options |= config.get("model_args") or {}
    if cfg.get("fixed_input_size") and "input_size" in cfg:
        options.setdefault("img_size", cfg["input_size"][-1])
    backbone = _resampled(architecture, lambda network: converted(state, network), image_size, options)
    if backbone is None:
        try:
            backbone = common.create_backbone(architecture, **options)
        except SystemExit as error:
            raise reworded(error, f"--teacher {folder / 'config.json'}: {error}") from None
        except Exception as error:  # arguments that this architecture does not take
            reason = common.first_line(error)
            raise SystemExit(f"--teacher {folder / 'config.json'}: builds no {architecture} ({reason})") from None
        load_strictly(backbone, state, str(folder))
        common.say_size(backbone, [image_size] if image_size else [])
    licence = read_licence(folder / "README.md")
    facts = {**facts, "architecture": architecture, "format": "release", "licence": licence}
    file = folder / "head.safetensors"
    head = _build_head(_read_tensors(file), "head", backbone.num_features, str(file)) if file.exists() else None
    return Teacher(backbone, facts, head, config)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # the safetensors reader has an exception type of its own
        reason = common.first_line(error)
        raise SystemExit(f"--teacher {file}: not a whole file ({reason}); fetch it again") from None


def _resampled(
    architecture: str, fit: Callable[[nn.Module], dict[str, Tensor]], image_size: int | None, options: dict
) -> nn.Module | None:
    """The network for images of `image_size` px with the weights that `fit` brings to that size; None if it cannot be."""
    options = {k: v for k, v in options.items() if k != "img_size"}
    known = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture.split(".")[0]) else None
    if image_size is None or known is None or not known.fixed_input_size or options.get("dynamic_img_size"):
        return None
    try:
        backbone = common.create_backbone(architecture, image_size=image_size, say=False, **options)
        load_strictly(backbone, fit(backbone), architecture)
    except (SystemExit, TypeError):
        return None
    return common.say_size(backbone, [image_size])


def _load_foreign(path: Path, named: str, num_classes: int, image_size: int | None, facts: dict) -> Teacher:
    """An authors' file, recognised by its keys; `named`: the architecture, where its user knows it."""
    found = open_foreign(path, common.OFFICIAL_NAMES.get(named, named))
    if not found.architecture:
        raise SystemExit(
            f"--teacher {path}: no key tells its architecture; name it: --teacher ARCH@{path}, where ARCH is the name of "
            "a timm model"
        )
    if not timm.is_model(found.architecture.split(".")[0]):
        if named:
            common.create_backbone(named)  # says what is near
        raise SystemExit(
            f"--teacher {path}: its architecture {found.architecture} is none that timm knows; if timm has it under another "
            f"name: --teacher ARCH@{path}"
        )
    facts = {**facts, "architecture": found.architecture, "format": found.layout.name}
    options = {"mean": found.layout.mean, "std": found.layout.std}
    state, projection = {**found.backbone, **found.head}, None

    def classifier(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
        names = _classifier_keys(network.pretrained_cfg, state) if found.layout.plain else found.head
        return {k: state[k] for k in names}

    def fit(network: nn.Module) -> dict[str, Tensor]:
        named = converted(state, network)
        named = name_classifier(named, network.pretrained_cfg) if found.layout.plain else named
        unwanted = {} if num_classes else classifier(named, network)
        return {k: v for k, v in named.items() if k not in unwanted}

    if num_classes:
        with torch.device("meta"):
            empty = timm.create_model(found.architecture)
        last = [v for k, v in classifier(fit(empty), empty).items() if k.endswith("weight") and v.dim() == 2]
        if not last or not found.layout.plain and len(last) != 1:
            raise SystemExit(f"--teacher {path}: holds no classifier, one Linear; a labelled teacher is needed here")
        options["num_classes"] = len(last[0])
    backbone = None if found.strays else _resampled(found.architecture, fit, image_size, options)
    if backbone is None:
        backbone = common.create_backbone(found.architecture, **options)
        load_strictly(backbone, fit(backbone), str(path), found.strays)
        common.say_size(backbone, [image_size] if image_size else [])
    if not num_classes and not found.layout.plain:
        projection = _build_head(found.head, found.head_name, backbone.num_features, str(path))
    return Teacher(backbone, facts, projection)


def load_strictly(model: nn.Module, state: dict[str, Tensor], where: str, strays: list[str] | None = None) -> None:
    """Load every tensor or none: SystemExit names the first missing, unexpected and misshapen keys."""
    wanted = model.state_dict()
    problems = {
        "missing": [k for k in wanted if k not in state],
        "unexpected": [k for k in state if k not in wanted] + (strays or []),
        "misshapen": [
            f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
            for k, v in wanted.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    found = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in problems.items()
        if keys
    ]
    if found:
        what = model.pretrained_cfg["architecture"] if hasattr(model, "pretrained_cfg") else "a projection head"
        raise SystemExit(f"{where}: does not fit {what}: {'; '.join(found)}")
    model.load_state_dict(state)


def _build_head(state: dict[str, Tensor], name: str, width: int, where: str) -> nn.Module | None:
    """The projection head on `width` features that a file's own keys describe, strictly loaded; None without keys.

    `name`.weight is one Linear; `name`.<index>.weight a chain of Linear and BatchNorm1d, ReLU where an index is skipped.
    """
    if not state:
        return None
    layers: dict[int, nn.Module] = {}
    numbers = {int(found[1]) for k in state if (found := re.fullmatch(rf"{name}\.(\d{{1,2}})\.\w+", k))}
    for i in sorted(numbers):
        key, biased = f"{name}.{i}.weight", f"{name}.{i}.bias" in state
        if f"{name}.{i}.running_mean" in state:
            layers[i] = nn.BatchNorm1d(width, affine=key in state)
        else:
            layers[i] = nn.Linear(width, _rows(state.get(key), width), bias=biased)
            width = layers[i].out_features
    if layers:
        head: nn.Module = nn.Sequential(*(layers.get(i, nn.ReLU()) for i in range(max(layers) + 1)))
    else:
        head = nn.Linear(width, _rows(state.get(f"{name}.weight"), 1), bias=f"{name}.bias" in state)
    load_strictly(nn.ModuleDict({name: head}), state, where)
    return head


def _rows(weight: Tensor | None, otherwise: int) -> int:
    return otherwise if weight is None or weight.dim() == 0 else len(weight)


def digits_teacher(run: Run) -> str:
    """The embedded data's own small teacher: trained once, next to the run, by trainers/supervised.py.

    Runs that need it at the same time wait for the one that trains it; a half-trained one is resumed next time.
    """
    folder = run.dir.parent / "digits_teacher"
    if run.accelerator.is_main_process and not _is_released(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _wait_for(folder.with_name(".digits_teacher.lock"), run, folder)
            if orphan := _wait_for(folder / ".lock", run, folder):  # a run was killed and its teacher trains on
                orphan.release(force=True)
        except OSError as error:
            raise SystemExit(
                f"{folder}: not writable ({error.strerror}); free space there, or give --teacher"
            ) from None
        try:
            if not _is_released(folder):
                run.say(f"no --teacher: training a small supervised one first, kept in {folder} for next time")
                _train_digits_teacher(folder)
        finally:
            if lock is not None:
                lock.release(force=True)
    run.accelerator.wait_for_everyone()
    return str(folder)


def _wait_for(file: Path, run: Run, folder: Path) -> FileLock | None:
    try:
        return hold(file)
    except Timeout:
        run.say(f"no --teacher: another run is training the small one in {folder}: waiting for it")
        return hold(file, timeout=-1)


def _is_released(folder: Path) -> bool:
    return (folder / "release" / "config.json").exists()


def _train_digits_teacher(folder: Path) -> None:
    command = [sys.executable, str(common.ROOT / "trainers" / "supervised.py"), "--run-dir", str(folder), "--resume"]
    outer = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    child = subprocess.Popen(command, env={k: v for k, v in os.environ.items() if k not in outer})
    try:
        code = child.wait()
    except BaseException:  # a signal: passed on, so that what is trained so far is saved
        child.terminate()
        child.wait()
        raise
    if code in (130, 143):  # the signal reached it first, as Ctrl-C does
        raise SystemExit(code)
    if code:
        raise SystemExit(f"the teacher's training failed (exit code {code}): {' '.join(command)}")


# ---------------------------------------------------------------------------------------------------------------------
# Releases and the Hub
# ---------------------------------------------------------------------------------------------------------------------


def release(run: Run, step: int, state: dict, backbone: nn.Module) -> None:
    """release/ from the network in memory, as it is after `step` steps; before anything is reported, which may fail.

    `state` is the checkpoint's, for the projection head. Raises SystemExit in one line where it cannot be written.
    """
    if run.accelerator.is_main_process:
        put = partial(run.write_network, state=state, backbone=backbone)
        _make_release(run.dir, put, partial(run.attempt, "the model card", write_card, run_dir=run.dir, step=step))
    run.released = step


def knn(run: Run, networks: dict[str, nn.Module], source: common.Source, queries: common.Source | None) -> dict:
    """`common.knn_table` of the images whose labels can be compared; {} and one line why where none can or it fails."""
    pair = run.attempt("kNN", common.labelled_queries, source, queries, run.say, "kNN")
    if pair is None:
        return {}
    pair = [replace(images, name=one_line(images.name)) for images in pair]
    options = {"num_workers": run.args.num_workers}
    return run.attempt("kNN", common.knn_table, networks, *pair, run.args.image_size, run.accelerator, **options) or {}


def finish(run: Run, source: common.Source | None, results: dict) -> Path:
    """End a training run whose release is written: its figures into results.json and the card, --push-to-hub.

    Nothing here can fail the run. Without a release of this run's end the newest checkpoint is released.
    """
    run.finish(source, results)
    folder = run.dir / "release"
    if run.accelerator.is_main_process:
        if run.released is None:
            build_release(run.dir)
        else:
            run.attempt(f"{folder}: its card", write_card, folder, run.dir, run.released)
        config = read_json(folder / "config.json")
        load = "import common, timm" if is_ours(config["architecture"]) else "import timm"
        without = ", num_classes=0" if config["num_classes"] else ""
        run.say(f"\nrelease: {folder}\n\n  {load}")
        run.say(f'  model = timm.create_model("local-dir:{folder}", pretrained=True{without})')
        run.say("  features = model.eval()(images)  # (B, 3, H, W), normalised as config.json says\n")
        if repo := getattr(run.args, "push_to_hub", None):
            if address := run.attempt("--push-to-hub", push, folder, repo):
                run.say(f"pushed to {address}")
            else:
                run.say(f"try again with: python hub.py push {run.dir} {repo}")
    run.accelerator.wait_for_everyone()
    return folder


def build_release(run_dir: str | Path, evaluations: Sequence[str | Path] = ()) -> Path:
    """release/ of a run: model.safetensors and config.json (what timm loads), README.md, the model card with its
    training.png, and, where the method trains a projection head, head.safetensors. Offline.

    Takes the newest checkpoint that is whole and this run's, and says which it passed over; files that were exported from
    just these weights stay. `evaluations` are run folders of evaluations, for the card. Written beside and renamed into
    place. Raises SystemExit if the run has no such checkpoint or an evaluation no results.
    """
    run_dir, evaluations = Path(run_dir), [Path(e) for e in evaluations]
    for evaluation in evaluations:
        if not read_json(evaluation / "results.json"):
            raise SystemExit(f"--evals {evaluation}: no results.json; an evaluation writes it at its end")
    passed = []
    for newest in checkpoints(run_dir):
        if (problem := _unfit(newest, run_dir)) is None:
            break
        passed.append(f"{newest.name} ({problem})")
    else:
        why = f": {'; '.join(passed)}" if passed else "; a run writes one every --save-every steps and at its end"
        raise SystemExit(f"{run_dir}: no checkpoint to release{why}")
    if passed:
        print(f"{run_dir}: released {newest.name}, passed over {'; '.join(passed)}", file=sys.stderr)

    def put(folder: Path) -> None:
        for name in ("model.safetensors", "config.json", "head.safetensors"):
            if (newest / name).exists():
                shutil.copy(newest / name, folder)
                give_usual_mode(folder / name)

    step = int(newest.name[5:])
    return _make_release(run_dir, put, partial(write_card, run_dir=run_dir, step=step, evaluations=evaluations))


def _unfit(checkpoint: Path, run_dir: Path) -> str | None:
    """Why a checkpoint cannot be released as this run's, None if it can: every tensor is read and must fit its network."""
    try:
        config = read_json(checkpoint / "config.json")
        if not config:
            return "no config.json"
        network = _load_folder(checkpoint, config.get("num_classes") or 0, None, {}).backbone
        if config.get("num_features") != network.num_features:
            return f"config.json says {config.get('num_features')} features, its network has {network.num_features}"
        if not all(bool(v.isfinite().all()) for v in network.state_dict().values()):
            return "weights that are not finite"
        args, environment = (read_json(run_dir / f"{name}.json") for name in ("args", "environment"))
        facts = run_facts(args, environment.get("trainer"))
        if args and environment and config.get("run", facts) != facts:
            return f"of another run: {one_line(config['run'])}"
        logged = [record["step"] for record in read_records(run_dir / "metrics.jsonl")]
        if logged and int(checkpoint.name[5:]) > max(logged) + args.get("log_every", 1):
            return f"metrics.jsonl ends at step {max(logged)}"
        state, step = checkpoint / "state.pt", int(checkpoint.name[5:])
        if state.exists() and torch.load(state, "cpu", weights_only=True, mmap=True)["step"] != step:
            return "its state.pt is of another step"
    except (Exception, SystemExit) as error:  # a damaged file raises whatever its reader meets first
        return one_line(common.first_line(error)).removeprefix("--teacher ")
    return None


def _make_release(run_dir: Path, put: Callable[[Path], None], card: Callable[[Path], None]) -> Path:
    """`put` writes a network's files into a folder, `card` its card; then it takes release/'s place whole."""
    folder, beside, aside = (run_dir / name for name in ("release", ".release", ".release_before"))
    try:
        if aside.exists() and not folder.exists():  # a build was killed between its two renames
            os.replace(aside, folder)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        put(beside)
        card(beside)
        before = folder / "model.safetensors"
        if before.exists() and filecmp.cmp(before, beside / "model.safetensors", shallow=False):
            for file in folder.iterdir():
                if file.is_file() and not (beside / file.name).exists():
                    shutil.copy(file, beside)
        if folder.exists():
            os.replace(folder, aside)
        os.replace(beside, folder)
        shutil.rmtree(aside, ignore_errors=True)
    except SystemExit:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    except Exception as error:  # a full disk is an OSError or safetensors' own
        shutil.rmtree(beside, ignore_errors=True)
        why = getattr(error, "strerror", None) or common.first_line(error)
        raise SystemExit(f"{folder}: {why}; once it can be written: python hub.py build {run_dir}") from None
    return folder


def to_detectron2(spec: str | Path, out: str | Path) -> str:
    """Write a ResNet as the pickle that MoCo's and DisCo's converter makes for Detectron2; returns the settings to read it.

    {"model": {name: array}, "__author__", "matching_heuristics": True}. What lies outside the stages is stem.*, a projection
    head stem.fc.*; layerN is res(N+1), bnN convN.norm, a downsample shortcut and shortcut.norm. `spec` as for --teacher.
    Raises SystemExit for a network that Detectron2 has no names for.
    """
    teacher = load_teacher(spec, flag="to-detectron2")
    state, architecture = teacher.backbone.state_dict(), teacher.facts["architecture"]
    block = r"layer[1-4]\.\d+\.(conv[123]\.weight|bn[123]\.\w+|downsample\.0\.weight|downsample\.1\.\w+)"
    other = [key for key in state if not re.fullmatch(rf"conv1\.weight|bn1\.\w+|{block}", key)]
    if other or state["conv1.weight"].shape[-1] != 7:
        why = f"has {other[0]}" if other else "begins with a 3x3 convolution"
        raise SystemExit(f"to-detectron2 {spec}: {architecture} {why}; Detectron2 knows plain ResNets only")
    if teacher.head is not None:
        state |= {f"fc.{key}": value for key, value in teacher.head.state_dict().items()}
    model = {}
    for key, value in state.items():
        name = key if key.startswith("layer") else f"stem.{key}"
        name = re.sub(r"layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        model[name] = value.numpy()
    content = {"model": model, "__author__": "cleandistill", "matching_heuristics": True}
    write_whole(Path(out), pickle.dumps(content))
    mean, std = (
        [round(255 * v, 3) for v in value.flatten().tolist()]
        for value in (teacher.backbone.input_mean, teacher.backbone.input_std)
    )
    convolutions = sum(bool(re.fullmatch(r"layer\d\.\d+\.conv\d\.weight", key)) for key in state)
    shape = state["layer1.0.conv2.weight"].shape
    bottleneck = "layer1.0.conv3.weight" in state
    settings = {
        "WEIGHTS": out,
        "PIXEL_MEAN": f'"{mean}"',
        "PIXEL_STD": f'"{std}"',
        "RESNETS.DEPTH": convolutions + 2,
        "RESNETS.STEM_OUT_CHANNELS": len(state["conv1.weight"]),
        "RESNETS.RES2_OUT_CHANNELS": len(state[f"layer1.0.bn{3 if bottleneck else 2}.weight"]),
        "RESNETS.STRIDE_IN_1X1": False,
    }
    if bottleneck:
        settings |= {"RESNETS.NUM_GROUPS": shape[0] // shape[1], "RESNETS.WIDTH_PER_GROUP": shape[1]}
    return "INPUT.FORMAT RGB " + " ".join(f"MODEL.{key} {value}" for key, value in settings.items())


RETRY_SECONDS = (1, 2, 4, 8)  # between attempts, for what may pass; the client's own uploads wait about as long


def push(
    folder: str | Path,
    repo_id: str,
    *,
    licence: str = "",
    accept_licence: bool = False,
    private: bool = False,
    evaluations: Sequence[str | Path] = (),
) -> str:
    """Upload a run's release (built first, see build_release) or a release folder to the Hub, in one commit.

    `licence` replaces the card's; one that contradicts the licence chain is refused without `accept_licence`. The folder
    stays as it is; the card that goes up names the repository. Returns its address. Raises SystemExit with one line: no
    such folder, no token, no right, no connection.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    if not (folder / "config.json").exists() or checkpoints(folder):
        folder = build_release(folder, evaluations)
    elif evaluations:
        raise SystemExit(f"--evals: {folder} is a release folder; figures are added when its run is pushed")
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        card = "---\nlicense: unknown\n---\n"
    except ValueError:
        raise SystemExit(
            f"{folder / 'README.md'}: is not UTF-8 text; save it as that, or build the release again"
        ) from None
    chain = read_licence(folder / "README.md")
    if licence and contradicts(licence, chain) and not accept_licence:
        raise SystemExit(
            f"--licence {licence}: what these weights come from asks for {chain}; --accept-licence takes it upon you"
        )
    card = set_licence(card, licence or chain).replace("ORG/NAME", repo_id)
    files = [CommitOperationAdd("README.md", card.encode())]
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != "README.md" and not file.name.startswith("."):
            files.append(CommitOperationAdd(file.name, str(file)))
    try:
        api = HfApi()
        # The client repeats by itself what belongs to an upload, but not this.
        _patiently(lambda: api.create_repo(repo_id, exist_ok=True, private=private or None))
        api.create_commit(repo_id, files, commit_message="cleandistill release")
        return f"{api.endpoint}/{repo_id}"
    except Exception as error:  # the Hub client's own, those of its HTTP library (it changed that), the system's
        raise SystemExit(_hub_problem("push", repo_id, error)) from None


def pull(repo_id: str, *, revision: str | None = None, local_dir: str | Path | None = None) -> Path:
    """A release's folder from the Hub (or its local cache), whole, with the files that build_release writes.

    Any timm model's repository does. What an interrupted download left is used by the next one. Raises SystemExit with
    one line: no such repository or revision, no right, no connection, no space.
    """
    from huggingface_hub import snapshot_download

    files = ["config.json", "model.safetensors", "head.safetensors", "README.md", "training.png", "*.onnx"]
    try:
        folder = _patiently(
            lambda: Path(snapshot_download(repo_id, revision=revision, local_dir=local_dir, allow_patterns=files))
        )
    except Exception as error:
        raise SystemExit(_hub_problem("pull", repo_id, error)) from None
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise SystemExit(
            f"{repo_id}: no config.json and model.safetensors there; not a release of ours nor a timm model"
        )
    return folder


def _patiently(call: Callable):
    """`call` again after RETRY_SECONDS where the Hub is overloaded or the connection broke; anything else at once."""
    for seconds in RETRY_SECONDS:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
            print(f"{common.first_line(error)}: trying again in {seconds} s", file=sys.stderr)
            time.sleep(seconds)
    return call()


def _may_pass(error: Exception) -> bool:
    """Whether the same request may well work in a moment."""
    code = getattr(getattr(error, "response", None), "status_code", None)
    if code is not None:
        return code in (408, 429, 500, 502, 503, 504)
    names = {kind.__name__ for kind in type(error).__mro__}  # its HTTP library's, whose package changed
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError"}) and "OfflineModeIsEnabled" not in names


def _hub_problem(verb: str, repo_id: str, error: Exception) -> str:
    """One line for what the Hub's client raised: its kind decides the remedy."""
    kind, reason = type(error).__name__, common.first_line(error)
    code = getattr(getattr(error, "response", None), "status_code", None)
    right = " with a token that may write there" if verb == "push" else ""
    if kind == "RevisionNotFoundError":
        remedy = "there is no such revision"
    elif kind == "RepositoryNotFoundError":
        remedy = "check the name (org/name); if it is private, log in: hf auth login"
    elif kind == "HFValidationError":
        remedy = "the name must be org/name"
    elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "free space there, or choose another folder (--to, or HF_HOME for the cache)"
    elif code in (401, 403) or "token" in reason.lower():
        remedy = f"log in{right}: hf auth login"
    elif code == 429 or code is not None and code >= 500:
        remedy = "the Hub is busy: try again later"
    elif (
        kind == "OfflineModeIsEnabled" or kind == "LocalEntryNotFoundError" and os.environ.get("HF_HUB_OFFLINE") == "1"
    ):
        remedy = "HF_HUB_OFFLINE is set: unset it to reach the Hub"
    else:
        remedy = "check the connection and try again"
    return f"{verb} {repo_id}: {kind}: {reason}; {remedy}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _build(run_dir: Path, /, evals: tuple[Path, ...] = ()) -> None:
    """Build the release folder of a run.

    Args:
        run_dir: the run's folder
        evals: run folders of evaluations whose figures the card shows
    """
    print(build_release(run_dir, evals))


def _push(
    folder: Path,
    repo_id: str,
    /,
    licence: str = "",
    accept_licence: bool = False,
    private: bool = False,
    evals: tuple[Path, ...] = (),
) -> None:
    """Upload a run's release to the Hugging Face Hub.

    Args:
        folder: a run folder or a release folder
        repo_id: org/name on the Hub
        licence: the card's licence, instead of the one that teacher and data ask for
        accept_licence: take a licence that contradicts theirs upon you
        private: make the repository private if it is made
        evals: run folders of evaluations whose figures the card shows
    """
    address = push(folder, repo_id, licence=licence, accept_licence=accept_licence, private=private, evaluations=evals)
    print(address)


def _pull(repo_id: str, /, revision: str | None = None, to: Path | None = None) -> None:
    """Download a release from the Hugging Face Hub.

    Args:
        repo_id: org/name on the Hub
        revision: branch, tag or commit
        to: folder to put it into, instead of the Hub's cache
    """
    print(pull(repo_id, revision=revision, local_dir=to))


def _inspect(spec: str, /) -> None:
    """Say what a checkpoint is and whether it loads: a folder, an official file, timm/NAME or a Hub id.

    Args:
        spec: as for --teacher
    """
    teacher = load_teacher(spec)
    count = sum(p.numel() for p in teacher.backbone.parameters())
    for key, value in {
        **teacher.facts,
        "features": teacher.num_features,
        "parameters": f"{count / 1e6:.2f} M",
    }.items():
        print(f"{key:>12}  {value}")
    print(f"{'head':>12}  {'none' if teacher.head is None else str(teacher.head).replace(chr(10), ' ')}")


def _export(
    spec: str,
    /,
    format: Literal["onnx", "torchscript", "pt2"] = "onnx",
    to: Path | None = None,
    head: bool = False,
    normalise: bool = False,
    image_size: int = 0,
    int8: bool = False,
    data: str = "",
    subset: str = "",
    max_loss: float = 1.0,
) -> None:
    """Write a network as one file that runs without this repository, after comparing it with torch.

    Args:
        spec: as for --teacher; a folder gets the file beside its release
        format: ONNX (pip install -e .[export]), traced TorchScript, or torch.export's .pt2
        to: file to write instead of the release's model.onnx, model_head.onnx, model_int8.onnx, model.ts, model.pt2
        head: what the projection head makes of the features, or, where there is none, the classifier's logits
        normalise: images in [0, 1] as input, mean and standard deviation baked in; otherwise normalised before, as for timm
        image_size: side of the images, pixels; 0: config.json's
        int8: 8-bit weights (onnx): a quarter of the size; what it prints says whether also faster
        data: for --int8: labelled images to measure kNN on, before and after; a run on the digits needs none
        subset: for --int8: how many images, or which share, of the training split make the gallery
        max_loss: for --int8: points of kNN accuracy that it may cost; no file if it costs more
    """
    network, folder = load_teacher(spec, flag="export"), Path(spec).expanduser()
    name = f"model{'_head' if head else ''}{'_int8' if int8 else ''}{SUFFIXES[format]}"
    if head and network.head is None:
        published = network.backbone.pretrained_cfg["num_classes"] if spec.startswith("timm/") else 0
        if not (classes := network.config.get("num_classes") or published):
            raise SystemExit(f"--head: {spec} holds neither a projection head nor a classifier; leave it out")
        network, head = load_teacher(spec, num_classes=classes, flag="export"), False
    release = folder if (folder / "config.json").exists() else folder / "release"
    if int8 and not data and (data := read_json(release.parent / "args.json").get("data")) != "digits":
        raise SystemExit("--data is missing: labelled images, to measure what --int8 costs")
    if to is None and not folder.is_dir():
        raise SystemExit(f"--to FILE is missing: {spec} is no folder to write beside")
    if to is None and not release.exists():
        build_release(folder)
    side = image_size or network.backbone.input_side
    side = side or (network.config.get("pretrained_cfg") or network.backbone.pretrained_cfg)["input_size"][-1]
    knn = {"int8_knn": partial(common.open_knn, data, subset, side) if int8 else None, "max_loss": max_loss}
    export(network, to or release / name, format, side=side, head=head, normalise=normalise, **knn)


def report(runs: Sequence[Path]) -> str:
    """One Markdown table over many runs' results.json: a row a figure, a column a checkpoint. Percentages as they are.

    Raises SystemExit for a folder without results.
    """
    table: dict[str, dict[str, float]] = {}  # row -> {column: figure}
    columns: list[str] = []
    for run in runs:
        results = read_json(run / "results.json")
        if not results:
            raise SystemExit(f"{run}: no results.json; a run writes it at its end")
        column = str(results.get("checkpoint") or run)
        columns += [column] if column not in columns else []
        data = Path(str(results.get("data") or read_json(run / "args.json").get("data", ""))).name
        for name, value in figures_of(results).items():
            row = f"{results.get('trainer', '?')} on {data}: {name}"
            if column in table.get(row, {}):  # the same evaluation twice: on other images or with other flags
                row += f" ({run.name})"
            table.setdefault(row, {})[column] = value
    lines = [["", *map(markdown, columns)], ["---"] + ["---:"] * len(columns)]
    for row, found in table.items():
        figures = (found.get(column) for column in columns)
        lines.append(
            [
                markdown(row),
                *("" if f is None else f"{f:.2f}" if abs(f) >= 1 or f == 0 else f"{f:.4f}" for f in figures),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _report(runs: tuple[Path, ...], /) -> None:
    """Print one table over many runs and evaluations.

    Args:
        runs: run folders with a results.json
    """
    print(report(runs))


def _run_line(run: Path) -> str:
    """What `list` shows of a run."""
    args, method = read_json(run / "args.json"), read_json(run / "environment.json").get("trainer", "?")
    found = list(figures_of(read_json(run / "results.json")).values())
    newest = next((f"step {int(c.name[5:])}" for c in checkpoints(run)), "no checkpoint")
    result = f"{found[-1]:.2f}" if found else newest
    network = args.get("student") or args.get("backbone") or Path(str(args.get("checkpoint"))).name
    licence, data = read_licence(run / "release" / "README.md"), Path(str(args.get("data", "?"))).name
    return one_line(f"{str(run):32}{result:>14}  {licence:14}{network}, {method}, {data}")


def _list(folder: Path = Path("runs"), /) -> None:
    """Show the official checkpoints that --teacher takes by name, as published, and the runs on this machine.

    Args:
        folder: where the runs are
    """
    print(f"{'teacher':32}{'linear top-1':>14}  {'licence':14}source")
    for name, official in TEACHERS.items():
        print(f"{name:32}{official.top1:>14.2f}  {official.licence:14}{official.source}")
    print(f"\n{'run':32}{'result':>14}  {'licence':14}network, method, data")
    for run in sorted(path.parent for path in folder.glob("*/args.json")):
        try:
            print(_run_line(run))
        except (OSError, SystemExit) as error:  # one damaged run does not hide the others
            print(one_line(error))
    if not folder.is_dir():
        print(f"no folder {folder} here; name the one that holds your runs: python hub.py list FOLDER")


def _to_detectron2(spec: str, out: Path, /) -> None:
    """Write a ResNet as the pickle that MoCo's and DisCo's converter makes for Detectron2, and print how to read it.

    Args:
        spec: a run folder, or anything else that --teacher takes
        out: the .pkl file to write
    """
    print(f"python train_net.py --config-file ... {to_detectron2(spec, out)}")


if __name__ == "__main__":
    sys.modules.setdefault("hub", sys.modules["__main__"])
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    app = tyro.extras.SubcommandApp()
    for function in (_build, _push, _pull, _export, _inspect, _list, _report, _to_detectron2):
        app.command(function, name=function.__name__[1:].replace("_", "-"))
    app.cli(description="Releases, teachers and the Hugging Face Hub.")
