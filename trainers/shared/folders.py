"""Folders of images as people have them: what is an image, a split, a class, and what is no data. A chapter of common.py."""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLITS = {"train": ("train", "training"), "eval": ("validation", "val", "valid", "test", "testing")}
MORE_SPLITS = {"unlabeled", "unlabelled", "extra", "trainval", "dev", "holdout"}  # beside a train, never classes
# What systems leave in folders, beside the names that begin with a dot.
CLUTTER = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information",
    "lost+found", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "__pycache__",
}  # fmt: skip
METADATA = {f"metadata{suffix}" for suffix in (".csv", ".jsonl", ".parquet")}  # `datasets`' names for such tables


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by a system: no data."""
    return name.startswith(".") or name.lower() in CLUTTER


def split_word(name: str) -> str:
    """What split a name would be: "train" for train, Train, train2017, train_images, training for training_set."""
    return re.sub(r"[-_ ]*(set|data|images|imgs|\d+)$", "", name.lower())


def pick_split(names: Sequence[str], role: str, split: str, data: str) -> str | None:
    """The split to open: the one asked for, else the usual names; a single split, of any name, serves training only."""
    if split:
        if split not in names:
            flag = "--split" if role == "train" else "--query-split"
            raise SystemExit(f"{flag} {split}: {data} has {', '.join(names) or 'no splits'}")
        return split
    if role == "eval" and len(names) == 1:
        return None
    found = [name for wanted in SPLITS[role] for name in names if name == wanted]
    found = found or [name for wanted in SPLITS[role] for name in names if split_word(name) == wanted]
    if not found and role == "train" and len(names) > 1:
        raise SystemExit(f"--data {data}: no split is called train; choose one with --split: {', '.join(names)}")
    return found[0] if found else names[0] if role == "train" else None


# ---------------------------------------------------------------------------------------------------------------------
# What is in a folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What lies in and below a folder: images and metadata tables, sorted; what was passed over, for a line about it."""

    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    clutter: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)  # links to folders that were read already

    def notes(self) -> list[str]:
        """One line each about hidden names and about links."""
        lines = []
        if self.clutter:
            names = sorted({os.path.basename(path) for path in self.clutter})
            some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            lines.append(f"skipped {len(self.clutter)} hidden or system files and folders ({some})")
        if self.known:
            lines.append(f"skipped {len(self.known)} links to folders that are read already ({min(self.known)})")
        return lines


def walk(root: Path) -> Iterator[tuple[str, str]]:
    """("image" | "table" | "clutter" | "known", path) of all below a folder, every real folder once.

    Links to folders are followed after the folders themselves, and never to a folder above or one that was read: a loop
    of links ends, and no image comes twice. Raises SystemExit for a folder that may not be read.
    """
    above = Path(os.path.realpath(root)).parents
    seen, todo, links = {str(folder) for folder in above}, [str(root)], []
    while todo or links:
        if todo:
            folder = todo.pop()
        else:
            links.sort(reverse=True)  # of two links to one folder the first by name counts, on every machine
            folder = links.pop()
        real, there = os.path.realpath(folder), os.path.realpath(os.path.dirname(folder))
        if real in seen or there.startswith(f"{real}{os.sep}"):
            yield "known", folder
            continue
        seen.add(real)
        for entry in _entries(folder):
            if is_clutter(entry.name):
                yield "clutter", entry.path
            elif _is_folder(entry):
                (links if entry.is_symlink() else todo).append(entry.path)
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                yield "image", entry.path
            elif entry.name.lower() in METADATA:
                yield "table", entry.path


def _entries(folder: str | Path) -> Iterator[os.DirEntry]:
    try:
        yield from os.scandir(folder)
    except OSError as error:
        raise SystemExit(f"--data {folder}: cannot be read ({error.strerror})") from None


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def look(root: Path) -> Found:
    """All that lies below a folder, sorted by path."""
    found = Found()
    lists = {"image": found.images, "table": found.tables, "clutter": found.clutter, "known": found.known}
    for kind, path in walk(root):
        lists[kind].append(path)
    found.images.sort()
    found.tables.sort()
    return found


def has_images(root: Path) -> bool:
    """Whether there is an image in or below a folder."""
    return any(kind == "image" for kind, _ in walk(root))


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder that hold images, in them or below, by name."""
    below = [Path(entry.path) for entry in _entries(folder) if not is_clutter(entry.name) and _is_folder(entry)]
    real, above = set(), {os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)}
    kept = []
    for path in sorted(below, key=lambda path: (path.is_symlink(), path)):
        where = os.path.realpath(path)
        if where not in real | above and has_images(path):
            real.add(where)
            kept.append(path)
    return sorted(kept)


def images_in(folder: Path) -> bool:
    """Whether a folder itself holds an image file."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES and not is_clutter(path.name) for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def choose_folder(path: Path, role: str, split: str, train_split: str) -> tuple[Path | None, list[Path], str]:
    """(the folder to read, its sibling splits, a line about the choice or "") of a tree of images.

    The rule. Folders that hold no images do not count, nor does a folder that is alone (images/ in images/train). Then
    1. folders called train, val, test and the like, and no others, are splits;
    2. others beside them, all hold images and no folders, and a train or a val is there but not both: they are all
       classes, a class may well be called train;
    3. others beside them, but a train and a val or test are there, or a folder has class folders of the same names as
       one beside it: these, with class folders of their own, are splits;
    4. anything else stops with a line that asks. `--split NAME` opens that folder, `--split .` says there are no splits.
    `train_split` is what --split said, for the role "eval", to which None is the answer where there is no other split.
    """
    if "." in (split, train_split):
        return (path if role == "train" or split else None), [], ""
    place, below = path, subfolders(path)
    while len(below) == 1 and split_word(below[0].name) not in sum(SPLITS.values(), ()) and not images_in(place):
        place, below = below[0], subfolders(below[0])
    words = {folder: split_word(folder.name) for folder in below}
    named = [folder for folder in below if words[folder] in sum(SPLITS.values(), ())]
    if any(words[folder] in SPLITS["train"] for folder in named):
        named = [folder for folder in below if folder in named or words[folder] in MORE_SPLITS]
    others = [folder for folder in below if folder not in named]
    if split:
        place = path if (path / split).is_dir() else place
        every = [entry.name for entry in _entries(place) if not is_clutter(entry.name) and _is_folder(entry)]
        chosen = place / pick_split(sorted(every), role, split, str(path))
        return chosen, [folder for folder in below if folder != chosen], ""
    verdict, listed = _verdict(path, place, named, others, words), ", ".join(folder.name for folder in named)
    if role == "eval" and train_split and named:
        verdict = "splits"  # who gave --split said so
    if verdict == "classes":
        line = f"{path}: {listed} is taken for a class, as {others[0].name} beside it; --split {named[0].name} if it is a split"
        return (path if role == "train" else None), [], line
    if verdict == "none":
        return (path if role == "train" else None), [], ""
    if verdict != "splits":
        if role == "eval":
            return None, [], ""
        raise SystemExit(verdict)
    chosen = pick_split([folder.name for folder in named], role, "", str(path))
    if role == "eval" and chosen == train_split:
        chosen = None
    line = f"{path}: {listed} are splits" if others or place != path else ""
    line += f", {', '.join(folder.name for folder in others)} too" if others else ""
    return (None if chosen is None else place / chosen), [f for f in named if f.name != chosen], line


def _verdict(path: Path, place: Path, named: list[Path], others: list[Path], words: dict[Path, str]) -> str:
    """ "splits", "classes" or "none" of `choose_folder`'s rule, or the question that it asks."""
    roles = {role for role, usual in SPLITS.items() for folder in named if words[folder] in usual}
    if named and not others and ("train" in roles or not images_in(place)):
        return "splits"
    # twenty folders tell what the others are like: a data set of many classes is not listed once more
    inner = {folder: {each.name for each in subfolders(folder)} for folder in named + others[:20]}
    if not named:
        splits = sum(SPLITS.values(), ())
        others = others[:20]
        holders = [f for f in others if inner[f] and all(split_word(name) in splits for name in inner[f])]
        if holders:
            some = ", ".join(folder.name for folder in holders[:3])
            return (
                f"--data {path}: {some} hold splits of their own; give one, --data {holders[0]}, or all with --split ."
            )
        return "none"
    nested = [folder for folder in named if inner[folder]]
    if nested and (len(roles) == 2 or any(inner[a] & inner[b] for a in nested for b in others[:20])):
        return "splits"
    plain = all(folder.name.lower() == words[folder] for folder in named)  # train_images is no class
    if plain and others and not nested and len(roles) == 1 and not any(inner[folder] for folder in others[:20]):
        return "classes"
    named = sorted(named, key=lambda folder: words[folder] not in SPLITS["train"])
    listed, rest = (", ".join(folder.name for folder in group[:4]) for group in (named, others))
    return (
        f"--data {path}: is {listed} a split or a class? Beside it: {rest or 'images'}. "
        f"--split {named[0].name} opens it as a split, --split . takes every folder for a class"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------


def class_names(images: list[str], root: Path, siblings: Sequence[Path]) -> tuple[list[str], list[str], str]:
    """(the images to use, the class of each or [], why there are no classes or a line about what was left out).

    The folders below `root` are classes, or those in the only folder there. One folder is not a class, unless a sibling
    split has it beside others. Images beside the class folders are left out if they are few (1 %); else the folders are
    not classes.
    """
    parts = [os.path.relpath(file, root).split(os.sep) for file in images]
    while len(images) > 1 and len({p[0] for p in parts}) == 1 and all(len(p) > 2 for p in parts):
        parts = [p[1:] for p in parts]
    loose = [file for file, p in zip(images, parts, strict=True) if len(p) == 1]
    folders = {p[0] for p in parts if len(p) > 1}
    if not folders:
        return images, [], "no class folders"
    if loose and (len(loose) > max(1, len(images) // 100) or len(folders) == 1):
        return images, [], f"{len(loose)} images, {os.path.basename(loose[0])} the first, lie beside the folders"
    if len(folders) == 1:
        known = [{folder.name for folder in subfolders(sibling)} for sibling in siblings]
        if not any(len(names) > 1 and folders <= names for names in known):
            return images, [], f"one folder, {min(folders)}, is not a class"
    line = f"left out {len(loose)} image beside the class folders ({loose[0]})" if len(loose) == 1 else ""
    line = line or (f"left out {len(loose)} images beside the class folders ({loose[0]}, ...)" if loose else "")
    kept = [(file, p[0]) for file, p in zip(images, parts, strict=True) if len(p) > 1]
    return [file for file, _ in kept], [name for _, name in kept], line


def tables_above(folder: Path, root: Path) -> list[str]:
    """The metadata tables in the folders from `root` down to, and without, `folder`."""
    between = [parent for parent in folder.parents if parent == root or root in parent.parents]
    return [str(file) for parent in between for file in sorted(parent.iterdir()) if file.name.lower() in METADATA]


def read_metadata(file: str) -> tuple[dict[str, dict], list[str]]:
    """A metadata.csv, .jsonl or .parquet as `datasets` has it: ({image's path: its row}, the columns).

    ({}, columns) where no column is called file_name. Raises SystemExit for a file that is not what its name says.
    """
    try:
        if file.lower().endswith(".parquet"):
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(file).to_pylist()
        else:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                if file.lower().endswith(".csv"):
                    rows = list(csv.DictReader(lines))
                else:
                    rows = [json.loads(line) for line in lines if line.strip()]
        columns = list(dict.fromkeys(key for row in rows for key in row if isinstance(key, str)))
        key = next((name for name in columns if name == "file_name" or name.endswith("_file_name")), None)
        if key is None:
            return {}, columns
        folder = os.path.dirname(file)
        table = {os.path.normpath(os.path.join(folder, row[key])): row for row in rows if row.get(key)}
        return table, [name for name in columns if name != key]
    except (OSError, ValueError, TypeError, AttributeError, csv.Error, RecursionError) as error:
        raise SystemExit(f"--data {file}: not a table of file names ({first_line(error)})") from None
