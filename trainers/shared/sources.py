"""Where images come from: the embedded digits, folders, TSV, parquet and `datasets`, the Hub. A chapter of common.py."""

import base64
import dataclasses
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.shared import folders
from trainers.shared.folders import first_line, is_clutter, pick_split
from trainers.shared.images import MAX_PIXELS, decode_rgb
from trainers.shared.labels import LABEL_COLUMNS, Labels, read_labels
from trainers.shared.tables import card_licence, column_labels, may_hold_images, named_config, open_table

RESIDENT_PX = 96  # images up to this side are decoded once and kept in memory


@dataclass
class Source:
    """Images and perhaps labels. `pixels` (N, 3, H, W) uint8 if resident, else `read(i)` gives image i's encoded bytes."""

    name: str
    size: int
    read: Callable[[int], bytes] | None = None
    pixels: Tensor | None = None
    labels: Tensor | None = None
    classes: Sequence[str] = ()
    bad: dict[int, str] = dataclasses.field(default_factory=dict)  # unreadable images: index -> why
    where: Callable[[int], str] = str  # an image's file or row, for messages
    file_names: Callable[[], list[str]] | None = None  # the images' own names, where they have some
    licence: str = ""  # where it is stated
    no_labels: str = ""  # why there are no labels, or not for every image
    notes: Sequence[str] = ()  # what opening found, to be said at the start
    max_pixels: int = MAX_PIXELS  # an image of more is unreadable

    def __len__(self) -> int:
        return self.size

    def take(self, keep: Sequence[int]) -> "Source":
        """The images of these indices, in this order."""
        index = torch.as_tensor(keep, dtype=torch.long)
        rows = index.tolist()
        return dataclasses.replace(
            self,
            size=len(rows),
            read=None if self.read is None else partial(_nth, self.read, rows),
            pixels=None if self.pixels is None else self.pixels[index],
            labels=None if self.labels is None else self.labels[index],
            bad={},
            where=partial(_nth, self.where, rows),
            file_names=None,  # of no use once the images are chosen
        )

    def fingerprint(self) -> str:
        """A checksum that tells data sets apart: how many images, their labels, all pixels in memory or 32 files."""
        crc = zlib.crc32(f"{len(self)}".encode())
        if self.labels is not None:
            crc = zlib.crc32(self.labels.numpy().tobytes(), crc)
        some = range(0, len(self), max(1, len(self) // 32))
        for part in self.pixels.numpy() if self.pixels is not None else map(self._bytes, some):
            crc = zlib.crc32(part, crc)
        return f"{crc:08x}"

    def why_none(self) -> str:
        """The end of a sentence that says that there are no labels."""
        return f"{f' ({self.no_labels})' if self.no_labels else ''}; class folders or --label-column give them"

    def _bytes(self, i: int) -> bytes:
        try:
            return self.read(i)
        except OSError:  # a missing file is among the bad images, it must not lose the results
            return b""

    def decode(self, i: int) -> Tensor:
        """Image i as (3, H, W) uint8 RGB, upright; raises ValueError if it is not an image, or has over `max_pixels`."""
        return self.pixels[i] if self.pixels is not None else decode_rgb(self.read(i), self.max_pixels)


# Module-level functions and `partial`, not lambdas: where workers are spawned and not forked they must pickle.
def _nth(f: Callable, rows: list[int], i: int):
    return f(rows[i])


def _read_file(files: list[str], i: int) -> bytes:
    return Path(files[i]).read_bytes()


def _read_row(table, column: str, i: int) -> bytes:
    value = table[i][column]
    value = value if isinstance(value, dict) else {"bytes": value}
    return value["bytes"] if value.get("bytes") is not None else Path(value.get("path") or "empty cell").read_bytes()


def _row_name(data: str, i: int) -> str:
    return f"{data} row {i}"


def _read_line(file: str, offsets: np.ndarray, i: int) -> bytes:
    with open(file, "rb") as f:
        f.seek(offsets[i])
        return base64.b64decode(f.readline().rsplit(b"\t", 1)[-1].strip(), validate=True)


def open_source(
    data: str,
    role: Literal["train", "eval"] = "train",
    *,
    split: str = "",
    train_split: str = "",
    image_column: str = "",
    label_column: str = "",
    config: str = "",
    subset: str = "",
    seed: int = 0,
    resident: bool | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Source | None:
    """Open `--data`: "digits", an image folder, TSV or parquet files, any `datasets` layout, or a dataset id on the Hub.

    `role` chooses the split where `split` names none; "eval" gives None where there is no second split; `train_split` is
    what is trained on, if somebody named it. `config` is one of a data set's configurations, which may also stand behind
    its name (org/name:config). `subset` is a count ("5000") or a share ("10%", of every class where there are labels)
    drawn once from `seed`, or a text file of image names, one a line. Small images are decoded into memory unless
    `resident=False`; one of more than `max_pixels` is unreadable. Labels that cannot be used are none, `no_labels` says
    why. Raises SystemExit with the remedy if there are no images, no such split, column or configuration.
    """
    data, config = named_config(data, config)
    path = Path(data).expanduser()
    kind = "digits" if data == "digits" else _kind(path)
    if config and kind != "table":
        raise SystemExit(f"--data-config {config}: {data} has no configurations; leave it out")
    if kind == "digits":
        source = _digits(pick_split(("train", "test"), role, split, data))
    elif kind == "tsv":
        source = _open_tsv(path, role, split)
    elif kind == "folder":
        source = _open_folder(path, role, split, train_split, label_column)
    else:
        source = open_dataset(data, role, split, image_column, label_column, config)
    if source is None:
        return None
    source.max_pixels = max_pixels
    if subset and role == "train":
        source = source.take(_named(source, Path(subset)) if Path(subset).is_file() else _drawn(source, subset, seed))
    return source if resident is False or source.pixels is not None else _make_resident(source, force=bool(resident))


def _drawn(source: Source, subset: str, seed: int) -> list[int]:
    """A count of the images, or a share of them: of every class as of the whole, to one image. Drawn from the seed."""
    n = len(source)
    try:
        count = round(n * float(subset[:-1]) / 100) if subset.endswith("%") else int(subset)
    except ValueError:
        raise SystemExit(
            f'--subset {subset}: give a number of images ("5000"), a share ("10%") or a file of image names'
        ) from None
    if not 1 <= count <= n:
        raise SystemExit(f"--subset {subset}: asks for {count} of {n} images")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    if subset.endswith("%") and source.labels is not None:
        by_class = source.labels[order].argsort(stable=True)
        sizes = source.labels.unique(return_counts=True)[1]
        rank = torch.arange(n) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # within the class, as drawn
        quantile = torch.empty(n, dtype=torch.float64)
        quantile[by_class] = (rank.double() + 0.5) / sizes.repeat_interleave(sizes)
        order = order[quantile.argsort(stable=True)]
    return sorted(order[:count].tolist())


def _named(source: Source, file: Path) -> list[int]:
    """The images that a text file names, one a line; folders and suffixes do not count, and a missing name is an error."""
    try:
        wanted = [Path(line.strip()).stem for line in file.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"--subset {file}: not a text file of image names ({first_line(error)})") from None
    if source.file_names is None:
        raise SystemExit(f"--subset {file}: the images of {source.name} have no names; give a number or a share")
    names = [Path(name).stem for name in source.file_names()]
    at = {name: i for i, name in enumerate(names)}
    missing = [name for name in wanted if name not in at]
    if missing or not wanted:
        raise SystemExit(
            f"--subset {file}: {len(missing)} of its {len(wanted)} names are not in {source.name}, "
            f"{', '.join(missing[:3])}; one there is {names[0]}"
        )
    several = [name for name, count in Counter(names).items() if count > 1 and name in set(wanted)]
    if several:
        raise SystemExit(f"--subset {file}: {several[0]} is the name of several images in {source.name}")
    return sorted({at[name] for name in wanted})


def _digits(split: str) -> Source:
    """scikit-learn's 8x8 digits, drawn as (N, 3, 32, 32) in random colours on random grounds, shifted, turned, scaled.

    1,437 digits drawn 4 times to train on, the other 360 once to test; the same pixels on every machine.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # (1797, 1, 8, 8)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:1437].repeat(4) if split == "train" else order[1437:]
    g = torch.Generator().manual_seed(1 if split == "train" else 2)
    n = len(chosen)
    rand = partial(torch.rand, generator=g, dtype=torch.float32)
    angle = (rand(n) - 0.5) * (math.pi / 7.5)  # up to 12 degrees either way
    scale = 1.0 + 0.6 * rand(n)  # the digit takes 60 to 100 % of the side
    shift = (rand(n, 2) - 0.5) * 0.4
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(n, 2, 2)
    grid = F.affine_grid(torch.cat([turn * scale.view(n, 1, 1), shift.unsqueeze(2)], 2), [n, 1, 32, 32], False)
    ink = F.grid_sample(images[chosen], grid, align_corners=False)
    ground, colour = rand(2, n, 3, 1, 1)
    light = ground.mean(dim=1, keepdim=True)
    close = (colour.mean(dim=1, keepdim=True) - light).abs() < 0.25  # unreadable in grey: darken or brighten the ink
    colour = torch.where(close, torch.where(light > 0.5, 0.2 * colour, 1 - 0.2 * (1 - colour)), colour)
    noise = 0.04 * torch.randn(n, 3, 32, 32, generator=g, dtype=torch.float32)
    pixels = (ground + ink * (colour - ground) + noise).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Source(
        "digits", n, pixels=pixels, labels=labels[chosen], classes=[str(i) for i in range(10)], licence="cc-by-4.0"
    )


def _kind(path: Path) -> Literal["tsv", "folder", "table"]:
    """How local data are read: TSV as SEED writes it, a tree of image files, or a `datasets` layout.

    Files that lie about (.csv, .json, a .tsv or .parquet of something else) do not turn a folder of images into a table.
    """
    if not path.is_dir():
        return "tsv" if path.suffix == ".tsv" and path.is_file() else "table"
    files = [f for pattern in ("*", "data/*", "*/*.parquet") for f in path.glob(pattern) if not is_clutter(f.name)]
    if any(map(_is_seeds, _tsv_files(path))):
        return "tsv"
    readme = path / "README.md"
    card = readme.read_bytes() if readme.is_file() else b""
    if (
        any(f.name in ("dataset_dict.json", "state.json") for f in files)
        or b"\nconfigs:" in card.split(b"\n---", 1)[0]
    ):
        return "table"
    if any(f.suffix == ".arrow" or f.suffix == ".parquet" and may_hold_images(f) for f in files):
        return "table"
    if folders.has_images(path):
        return "folder"
    if any(f.suffix == ".tsv" for f in files):
        return "tsv"
    return "table" if any(f.suffix in {".parquet", ".csv", ".json", ".jsonl"} for f in files) else "folder"


def _tsv_files(path: Path) -> list[Path]:
    return [file for file in sorted(path.glob("*.tsv")) if not is_clutter(file.name)]


def _is_seeds(file: Path) -> bool:
    """Whether a .tsv is of SEED's format: an index beside it, or a first line that ends in an image's base64."""
    if file.with_suffix(".lineidx").exists():
        return True
    with open(file, "rb") as f:
        fields = f.readline(1 << 26).rstrip(b"\r\n").split(b"\t")
    begins = (b"/9j/", b"iVBORw", b"R0lGOD", b"UklGR", b"Qk", b"SUkq", b"TU0A")  # JPEG, PNG, GIF, WebP, BMP, TIFF
    return len(fields) > 2 and fields[-1].startswith(begins)


def _open_folder(path: Path, role: str, split: str, train_split: str, label_column: str) -> Source | None:
    """A tree of image files; `folders` says what is a split and what a class. Labels may also stand in a metadata table."""
    place, siblings, line = folders.choose_folder(path, role, split, train_split)
    if place is None:
        return None
    found = folders.look(place)
    if not found.images:
        some = ", ".join(sorted(folders.IMAGE_SUFFIXES))
        raise SystemExit(f"--data {place}: no images ({some}) in this folder or below it")
    files, kinds, why = folders.class_names(found.images, place, siblings)
    labels, classes = None, []
    notes = [line, *found.notes()]
    if kinds:
        classes = sorted(set(kinds))
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[name] for name in kinds])
        notes, why = [*notes, why], ""
    tables = found.tables if place == path else found.tables + folders.tables_above(place, path)
    if tables and (label_column or labels is None):
        own, names, said = _metadata_labels(found.images, tables, label_column)
        if own is not None:
            files, labels, classes, why = found.images, own, names, said
        elif label_column:
            labels, classes, why = None, [], said
    elif label_column and role == "train":
        raise SystemExit(
            f"--label-column {label_column}: {path} is a folder of images without a metadata.csv, .jsonl or .parquet"
        )
    elif label_column:
        labels, classes, why = None, [], f"no metadata.csv, .jsonl or .parquet in {place}"
    return Source(
        str(place),
        len(files),
        partial(_read_file, files),
        labels=labels,
        classes=classes,
        where=files.__getitem__,
        file_names=partial(list, files),
        no_labels=why,
        notes=[note for note in notes if note],
    )


def _metadata_labels(files: list[str], tables: list[str], column: str) -> Labels:
    """The labels of image files from `datasets`' metadata tables; the usual column where none is named."""
    rows, columns = {}, {}
    for table in tables:
        own, names = folders.read_metadata(table)
        rows |= own
        columns |= dict.fromkeys(names) if own else {}
    if column and column not in columns:
        raise SystemExit(
            f"--label-column {column}: {tables[0]} has the columns {', '.join(columns) or 'of no file_name'}"
        )
    column = column or next((name for name in LABEL_COLUMNS if name in columns), "")
    if not column:
        return (
            None,
            [],
            f"{tables[0]} has no column {LABEL_COLUMNS[0]}; name one with --label-column: {', '.join(columns)}",
        )
    values = [rows.get(os.path.normpath(file), {}).get(column) for file in files]
    return read_labels(_as_numbers(values), f"{column} of {os.path.basename(tables[0])}")


def _as_numbers(words: list) -> list:
    """Words of a text file as whole numbers if all are; else as they are."""
    known = [word for word in words if word not in (None, "")]
    if known and all(isinstance(word, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", word) for word in known):
        return [int(word) if word else None for word in words]
    return words


def _open_tsv(path: Path, role: str, split: str) -> Source | None:
    """SEED's format: a line an image, tab-separated: its name, its label, perhaps more, and last a base64 JPEG.

    A file, or a folder of them, one a split. `train.lineidx` beside `train.tsv` holds the offsets of its lines; without
    it they are found by reading the file once. Labels are whole numbers or words; -1 is no label.
    """
    files = {"train": path}
    if path.is_dir():
        every = _tsv_files(path)
        files = {file.stem: file for file in list(filter(_is_seeds, every)) or every}
    if path.is_file() and (role == "eval" or split):
        return pick_split((), role, split, str(path))  # None, or the error that there are no splits
    chosen = pick_split(list(files), role, split, str(path))
    if chosen is None:
        return None
    file, index = files[chosen], files[chosen].with_suffix(".lineidx")
    with open(file, "rb") as f:
        if index.exists():
            offsets = _line_offsets(index, file)
        else:
            offsets = np.cumsum([0, *map(len, f)][:-1], dtype=np.int64)
        heads = []
        for offset in offsets.tolist():
            f.seek(max(0, offset - 1))
            before, line = f.read(1) if offset else b"\n", f.read(512)
            fields = line.split(b"\t")
            if before != b"\n" or len(fields) < 3:
                remedy = f"delete {index.name} if it is older" if index.exists() else "see SEED's format"
                raise SystemExit(f"--data {file}: byte {offset} does not begin a line of name, label, image; {remedy}")
            heads.append([field.decode(errors="replace").strip() for field in fields[:2]])
    if not heads:
        raise SystemExit(f"--data {file}: no lines")
    names, kinds = zip(*heads, strict=True)
    labels, classes, why = read_labels(_as_numbers(list(kinds)), "the second column")
    read, where = partial(_read_line, str(file), offsets), partial(_row_name, str(file))
    return Source(
        str(file),
        len(heads),
        read,
        labels=labels,
        classes=classes,
        where=where,
        file_names=partial(list, names),
        no_labels=why,
    )


def _line_offsets(index: Path, file: Path) -> np.ndarray:
    """The offsets in a .lineidx, (N,) int64. Raises SystemExit unless they can be all lines of the file."""
    try:
        offsets = np.array(index.read_text().split(), dtype=np.int64)
        with open(file, "rb") as f:
            f.seek(offsets[-1] if len(offsets) else 0)
            f.readline()
            whole = not f.read(1)
        whole = whole and (len(offsets) == 0 or offsets[0] == 0 and bool((np.diff(offsets) > 0).all()))
    except (OSError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise SystemExit(
            f"--data {file}: {index.name} does not hold the offsets of all its lines; delete {index.name}"
        )
    return offsets


def open_dataset(
    data: str, role: str, split: str, image_column: str, label_column: str = "", config: str = ""
) -> Source | None:
    """An image column of a table, with its label column if there is one; None where there is no such split."""
    import datasets

    opened = open_table(data, role, split, config)
    if opened is None:
        return None
    columns, path = opened.features, Path(data).expanduser()
    images = [k for k, f in columns.items() if isinstance(f, datasets.Image)]
    if image_column and image_column not in columns:
        raise SystemExit(f"--image-column {image_column}: {data} has the columns {', '.join(columns)}")
    if not image_column and not images:
        raise SystemExit(f"--data {data}: no image column; name it with --image-column: {', '.join(columns)}")
    image_column = image_column or images[0]
    if image_column not in images and "binary" not in str(columns[image_column]):
        raise SystemExit(f"--image-column {image_column}: holds no images; {data} has {', '.join(columns)}")
    if label_column and label_column not in columns:
        raise SystemExit(f"--label-column {label_column}: {data} has the columns {', '.join(columns)}")
    labels, classes, why = column_labels(opened, label_column, image_column)
    raw = opened.select_columns([image_column])
    if isinstance(columns[image_column], datasets.Image):
        raw = raw.cast_column(image_column, datasets.Image(decode=False))
    read, names = partial(_read_row, raw, image_column), None
    if isinstance(columns[image_column], datasets.Image):
        names = partial(_row_paths, raw, image_column)
    return Source(
        f"{data}:{config}" if config else data,
        len(raw),
        read,
        labels=labels,
        classes=classes,
        where=partial(_row_name, data),
        file_names=names,
        licence=opened.info.license or card_licence(data, path if path.exists() or "*" in data else None),
        no_labels=why,
    )


def _row_paths(table, column: str) -> list[str]:
    """The file names that a `datasets` image column keeps beside the bytes, which are not read for it."""
    import pyarrow.compute

    paths = pyarrow.compute.struct_field(table.with_format("arrow")[:][column], "path").to_pylist()
    return [path or "" for path in paths]


def _make_resident(source: Source, force: bool) -> Source:
    """Decode images of one small size into one tensor, once; larger or mixed sizes come back as they were."""
    for i in range(min(len(source), 10)):
        try:
            first = source.decode(i)
            break
        except (ValueError, OSError):
            continue
    else:
        raise SystemExit(f"--data {source.name}: the first {min(len(source), 10)} images cannot be read")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    share = memory // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every process on this machine holds its own
    if not force and (max(first.shape[1:]) > RESIDENT_PX or len(source) * first.numel() > share):
        return source
    pixels = torch.empty(len(source), *first.shape, dtype=torch.uint8)
    bad: dict[int, str] = {}
    mixed: list[int] = []

    def put(i: int) -> None:
        if mixed:
            return
        try:
            image = source.decode(i)
        except (ValueError, OSError) as error:
            bad[i] = f"{source.where(i)}: {error}"
            return
        if image.shape == first.shape:
            pixels[i] = image
        else:
            mixed.append(i)

    with ThreadPoolExecutor(min(8, available_cores())) as pool:
        for _ in pool.map(put, range(len(source)), chunksize=256):
            pass
    if mixed:
        return source
    whole = dataclasses.replace(source, pixels=pixels, read=None)
    check_bad(source.name, bad, len(source))
    if not bad:
        return whole
    kept = whole.take([i for i in range(len(source)) if i not in bad])
    kept.bad = bad
    return kept


def check_bad(name: str, bad: dict, total: int) -> None:
    """More than 1 % unreadable images stop a run: then it is the data that is wrong, not a file."""
    if len(bad) > max(1, 0.01 * total):
        count, first = f"{len(bad)} of {total}", next(iter(bad.values()))
        raise SystemExit(f"--data {name}: {count} images cannot be read (over 1 %); remove them: {first}, ...")


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_classes(data: str, source: Source) -> int:
    """How many classes there are to learn. Raises SystemExit where there are no labels, or one below 0."""
    if source.labels is None:
        raise SystemExit(f"--data {data}: no labels to learn from{source.why_none()}")
    if (low := int(source.labels.min())) < 0:
        raise SystemExit(f"--data {data}: holds the label {low}; choose a labelled --split")
    return max(len(source.classes), int(source.labels.max()) + 1)


class OtherClasses:
    """Draws K images of other classes for every image of a batch, on one device.

    One from each of K equal slices of the N - N_class images, sorted by class and turned round by a random amount: every
    image is as likely, none comes twice (up to K = N - N_class), and the cost does not grow with N. labels: (N,).
    """

    def __init__(self, data: str, labels: Tensor, device: torch.device):
        self.order = labels.argsort(stable=True).to(device)
        counts = labels.bincount()
        if (counts > 0).sum() < 2:
            raise SystemExit(f"--data {data}: all images are of one class, none is a negative of another")
        self.counts, self.starts = counts.to(device), (counts.cumsum(0) - counts).to(device)

    def draw(self, labels: Tensor, k: int, g: torch.Generator) -> Tensor:
        """(B,) labels -> (B, k) indices; `g` lives on the device."""
        own, count = self.starts[labels][:, None], self.counts[labels][:, None]
        others, slices = len(self.order) - count, torch.arange(k + 1, device=labels.device)
        edges = slices * others // k
        width = (edges[:, 1:] - edges[:, :-1]).clamp(min=1)
        u = torch.rand(len(labels), k + 1, generator=g, device=labels.device, dtype=torch.float32)
        place = edges[:, :-1] + (u[:, 1:] * width).long() + (u[:, :1] * others).long()
        place = place % others
        return self.order[torch.where(place < own, place, place + count)]


def labelled_queries(
    train: Source, queries: Source | None, say: Callable[[str], None], what: str = "evaluation"
) -> tuple[Source, Source] | None:
    """The images of both splits whose labels can be compared, numbered as in the training split; None where none can.

    Classes are matched by name. Left out: images without a label (below 0), and evaluation images of a class that no
    training image has, which nothing could name right. `say` gets one line for what is missing or left out.
    """
    if queries is None:
        say(f"no {what}: the data has no split called val or test")
        return None
    for source, role in ((train, "training"), (queries, "evaluation")):
        if source.labels is None or not bool((source.labels >= 0).any()):
            say(f"no {what}: the {role} split ({source.name}) has no labels")
            return None
    labelled = train.labels >= 0
    gallery = train if bool(labelled.all()) else train.take(labelled.nonzero()[:, 0].tolist())
    known = {_class_name(gallery, i): i for i in gallery.labels.unique().tolist()}
    numbers = queries.labels.new_full((int(queries.labels.max()) + 1,), -1)
    for i in queries.labels.unique().tolist():
        if i >= 0:
            numbers[i] = known.get(_class_name(queries, i), -1)
    labels = torch.where(queries.labels >= 0, numbers[queries.labels.clamp(min=0)], -1)
    comparable = labels >= 0
    if not bool(comparable.any()):
        say(f"no {what}: {train.name} and {queries.name} have no class in common")
        return None
    unlabelled = int((queries.labels < 0).sum())
    others = len(queries) - unlabelled - int(comparable.sum())
    left_out = [f"{len(train) - len(gallery)} training images without a label"] if len(gallery) < len(train) else []
    left_out += [f"{unlabelled} evaluation images without a label"] if unlabelled else []
    left_out += [f"{others} evaluation images of classes that no training image has"] if others else []
    if left_out:
        say(f"{what}: left out {', '.join(left_out)}")
    queries = dataclasses.replace(queries, labels=labels, classes=gallery.classes)
    return gallery, queries if bool(comparable.all()) else queries.take(comparable.nonzero()[:, 0].tolist())


def _class_name(source: Source, label: int) -> str:
    return source.classes[label] if label < len(source.classes) else str(label)


def labelled_pair(data: str, train: Source, queries: Source | None) -> tuple[Source, Source]:
    """The training (or gallery) split and the split to evaluate on, with labels in one numbering.

    Each split numbers the classes that it holds; the queries' labels come back in the training split's numbers, matched
    by the classes' names. Raises SystemExit with the remedy: no such split, no labels, a class that was never trained.
    """
    if queries is None:
        raise SystemExit(
            f"--data {data}: no split to evaluate on; add one called val or test, or name one with --query-split"
        )
    for source, flag in ((train, "--split"), (queries, "--query-split")):
        if source.labels is None:
            raise SystemExit(f"--data {data}: no labels to evaluate with{source.why_none()}")
        if (low := int(source.labels.min())) < 0:
            raise SystemExit(f"--data {data}: holds the label {low}; choose a labelled split with {flag}")
    if list(train.classes) == list(queries.classes):
        return train, queries
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in queries.classes if name not in number]
    if unknown:
        raise SystemExit(
            f"--data {data}: {len(unknown)} classes to evaluate on are not in the training split: {', '.join(unknown[:5])}"
        )
    order = queries.labels.new_tensor([number[name] for name in queries.classes])
    return train, dataclasses.replace(queries, labels=order[queries.labels], classes=train.classes)
