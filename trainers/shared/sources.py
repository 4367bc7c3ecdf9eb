"""Where images come from: the embedded digits, folders, TSV, parquet and `datasets`, the Hub. A chapter of common.py."""

import base64
import dataclasses
import io
import math
import os
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
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

RESIDENT_PX = 96  # images up to this side are decoded once and kept in memory
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
SPLITS = {"train": ("train", "training"), "eval": ("validation", "val", "valid", "test", "testing")}


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

    def _bytes(self, i: int) -> bytes:
        try:
            return self.read(i)
        except OSError:  # a missing file is among the bad images, it must not lose the results
            return b""

    def decode(self, i: int) -> Tensor:
        """Image i as (3, H, W) uint8 RGB; raises ValueError if it is not an image."""
        return self.pixels[i] if self.pixels is not None else decode_rgb(self.read(i))


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


def decode_rgb(data: bytes) -> Tensor:
    """Encoded image -> (3, H, W) uint8 RGB; raises ValueError for anything that is not a whole image."""
    try:
        return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except (RuntimeError, ValueError):  # formats that torchvision lacks: BMP, TIFF, CMYK JPEG, ...
        try:
            with Image.open(io.BytesIO(data)) as image:
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        except Exception as error:  # PIL raises a dozen kinds, struct.error and SyntaxError among them
            raise ValueError(f"{len(data)} bytes that are no whole image ({error})") from None


def open_source(
    data: str,
    role: Literal["train", "eval"] = "train",
    *,
    split: str = "",
    image_column: str = "",
    label_column: str = "",
    subset: str = "",
    seed: int = 0,
    resident: bool | None = None,
) -> Source | None:
    """Open `--data`: "digits", an image folder, TSV or parquet files, any `datasets` layout, or a dataset id on the Hub.

    `role` chooses the split where `split` names none; "eval" gives None where there is no second split. `subset` is a
    count ("5000") or a share ("10%", of every class where there are labels) drawn once from `seed`, or a text file of
    image names, one a line. Small images are decoded into memory unless `resident=False`. Raises SystemExit with the
    remedy if there are no images, no such split or no such column.
    """
    path = Path(data).expanduser()
    if data == "digits":
        source = _digits(_pick_split(("train", "test"), role, split, data))
    elif path.suffix == ".tsv" and path.is_file() or path.is_dir() and any(path.glob("*.tsv")):
        source = _open_tsv(path, role, split)
    elif path.is_dir() and not _has_tables(path):
        source = _open_folder(path, role, split)
    else:
        source = _open_dataset(data, role, split, image_column, label_column)
    if source is None:
        return None
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


def _has_tables(path: Path) -> bool:
    """Whether a folder is a `datasets` layout (parquet, arrow, csv, json) and not a plain tree of image files."""
    tables = {".parquet", ".arrow", ".csv", ".json", ".jsonl"}
    return any(f.suffix in tables for pattern in ("*", "data/*", "*/*.parquet") for f in path.glob(pattern))


def _pick_split(names: Sequence[str], role: str, split: str, data: str) -> str | None:
    """The split to open: the one asked for, else the usual names; a single split serves training only."""
    if split:
        if split not in names:
            flag = "--split" if role == "train" else "--query-split"
            raise SystemExit(f"{flag} {split}: {data} has {', '.join(names) or 'no splits'}")
        return split
    found = [name for wanted in SPLITS[role] for name in names if name == wanted]
    if not found and role == "train" and len(names) > 1:
        raise SystemExit(f"--data {data}: no split is called train; choose one with --split: {', '.join(names)}")
    return found[0] if found else names[0] if role == "train" else None


def _open_folder(path: Path, role: str, split: str) -> Source | None:
    """A tree of image files: train/ and val/ below it are splits, the folders below those are classes."""
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    named = [name for name in folders if name == split or name in SPLITS["train"] + SPLITS["eval"]]
    if named or split:
        chosen = _pick_split(named or folders, role, split, str(path))
        if chosen is None:
            return None
        path = path / chosen
    elif role == "eval":
        return None
    files = sorted(os.path.join(d, f) for d, _, fs in os.walk(path, followlinks=True) for f in fs)
    files = [f for f in files if os.path.splitext(f)[1].lower() in IMAGE_SUFFIXES]
    if not files:
        raise SystemExit(f"--data {path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in this folder or below it")
    parts = [os.path.relpath(f, path).split(os.sep) for f in files]
    labels, classes = None, []
    if all(len(p) > 1 for p in parts):  # a file at the top means that the folders are not classes
        classes = sorted({p[0] for p in parts})
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[p[0]] for p in parts])
    read = partial(_read_file, files)
    where, names = files.__getitem__, partial(list, files)
    return Source(str(path), len(files), read, labels=labels, classes=classes, where=where, file_names=names)


def _open_tsv(path: Path, role: str, split: str) -> Source | None:
    """SEED's format: a line an image, tab-separated: its name, its label, perhaps more, and last a base64 JPEG.

    A file, or a folder of them, one a split. `train.lineidx` beside `train.tsv` holds the offsets of its lines; without
    it they are found by reading the file once.
    """
    files = {file.stem: file for file in sorted(path.glob("*.tsv"))} if path.is_dir() else {"train": path}
    if path.is_file() and (role == "eval" or split):
        return _pick_split((), role, split, str(path))  # None, or the error that there are no splits
    chosen = _pick_split(list(files), role, split, str(path))
    if chosen is None:
        return None
    file, index = files[chosen], files[chosen].with_suffix(".lineidx")
    with open(file, "rb") as f:
        if index.exists():
            offsets = np.array(index.read_text().split(), dtype=np.int64)
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
    labels, classes = _number([int(kind) for kind in kinds] if all(map(str.isdigit, kinds)) else list(kinds))
    read, where = partial(_read_line, str(file), offsets), partial(_row_name, str(file))
    return Source(
        str(file), len(heads), read, labels=labels, classes=classes, where=where, file_names=partial(list, names)
    )


def _number(values: list) -> tuple[Tensor, list[str]]:
    """Labels and class names: whole numbers stand for themselves, anything else is numbered in sorted order."""
    if all(isinstance(v, int) and v >= 0 for v in values):
        return torch.tensor(values), [str(i) for i in range(max(values) + 1)]
    classes = sorted(map(str, set(values)))
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[str(v)] for v in values]), classes


def open_table(data: str, role: str, split: str):
    """A split of a parquet file or shard pattern, a local `datasets` folder, or a dataset id on the Hub; None without it."""
    import datasets  # takes a second: only runs that use it pay

    datasets.disable_progress_bars()
    path = Path(data).expanduser()
    local = path.exists() or "*" in data
    if not local and (data.startswith((".", "/", "~")) or path.suffix or data.count("/") > 1):
        raise SystemExit(f"--data {data}: no such file or folder")
    try:
        if path.is_dir() and (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            opened = datasets.load_from_disk(str(path))
        elif local and not path.is_dir():
            opened = datasets.load_dataset("parquet", data_files=str(path))
        else:
            opened = datasets.load_dataset(str(path) if local else data)
    except Exception as error:  # datasets raises whatever its readers raise
        remedy = "is the file whole?" if local else "check the id and the connection, or give a local folder"
        raise SystemExit(f"--data {data}: cannot be opened ({first_line(error)}); {remedy}") from None
    if isinstance(opened, datasets.DatasetDict):
        name = _pick_split(list(opened), role, split, data)
        if name is None:
            return None
        opened = opened[name]
    elif role == "eval" or split:
        return _pick_split((), role, split, data)  # None, or the error that there are no splits
    return opened


def _open_dataset(data: str, role: str, split: str, image_column: str, label_column: str) -> Source | None:
    """An image column of a table, with its label column if there is one."""
    import datasets

    opened = open_table(data, role, split)
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
    named = [k for k, f in columns.items() if isinstance(f, datasets.ClassLabel)]
    named += [k for k in ("label", "labels", "fine_label") if k in columns]
    if label_column and label_column not in columns:
        raise SystemExit(f"--label-column {label_column}: {data} has the columns {', '.join(columns)}")
    labels, classes = None, []
    if label_column or named:
        label_column = label_column or named[0]
        values = opened[label_column][:]
        if isinstance(columns[label_column], datasets.ClassLabel):
            classes = columns[label_column].names
            labels = torch.tensor(values)
        else:
            labels, classes = _number(values)
    raw = opened.select_columns([image_column])
    if isinstance(columns[image_column], datasets.Image):
        raw = raw.cast_column(image_column, datasets.Image(decode=False))
    read, names = partial(_read_row, raw, image_column), None
    if isinstance(columns[image_column], datasets.Image):
        names = partial(_row_paths, raw, image_column)
    return Source(
        data,
        len(raw),
        read,
        labels=labels,
        classes=classes,
        where=partial(_row_name, data),
        file_names=names,
        licence=opened.info.license or _card_licence(data, path if path.exists() or "*" in data else None),
    )


def _card_licence(data: str, path: Path | None) -> str:
    """The licence that a data set's card states, next to local files or on the Hub; nothing where there is no card."""
    from huggingface_hub import DatasetCard

    readme = None if path is None else (path if path.is_dir() else path.parent) / "README.md"
    if readme is not None and not readme.is_file():
        return ""
    try:
        stated = DatasetCard.load(data if readme is None else readme, ignore_metadata_errors=True).data
    except Exception:  # no card there, no connection, not YAML: nothing is stated
        return ""
    licence = stated.get("license_name") or stated.get("license") or ""
    return licence if isinstance(licence, str) else " and ".join(licence)


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
    if not force and (max(first.shape[1:]) > RESIDENT_PX or len(source) * first.numel() > memory // 4):
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


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def count_classes(data: str, source: Source) -> int:
    """How many classes there are to learn. Raises SystemExit where there are no labels, or one below 0."""
    if source.labels is None:
        raise SystemExit(f"--data {data}: no labels to learn from; class folders or --label-column give them")
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
            raise SystemExit(f"--data {data}: no labels to evaluate with; class folders or --label-column give them")
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
