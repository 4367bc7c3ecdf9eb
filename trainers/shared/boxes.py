"""Where boxes come from: PASCAL VOC's XML folders, COCO's JSON files, a column of a table. A chapter of common.py."""

import contextlib
import dataclasses
import io
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
from torch import Tensor
from torchvision.io import write_png
from torchvision.ops import box_convert
from torchvision.utils import draw_bounding_boxes

from trainers.shared.folders import first_line, is_clutter
from trainers.shared.sources import MAX_PIXELS, Source, _read_file, open_dataset
from trainers.shared.tables import named_config, open_table

# By a split's own name, without folder and year; VOC's val is part of its trainval.
SPLITS = {"train": ("trainval", "train", "training"), "eval": ("test", "val", "validation", "valid", "testing")}
ROBOFLOW = "_annotations.coco.json"
BOX_KEYS, NAME_KEYS = ("bbox", "bboxes", "boxes"), ("category", "categories", "category_id", "label", "labels")


@dataclass
class Annotated:
    """Images and the objects in them, in COCO's terms.

    An object has bbox (x, y, width, height, from 0), category_id (1 to the number of classes), name, area, iscrowd,
    difficult (VOC's: neither missed nor wrong) and perhaps segmentation; `sizes` are the (height, width) that COCO states.
    """

    source: Source
    objects: list[list[dict]]
    classes: Sequence[str] = ()
    sizes: list[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def bad(self) -> dict[int, str]:
        return self.source.bad

    def fingerprint(self) -> str:
        """A checksum of the images, as their source has it, and of all boxes and classes."""
        boxes = [(t["name"], *t["bbox"]) for things in self.objects for t in things]
        return f"{zlib.crc32(json.dumps(boxes).encode(), int(self.source.fingerprint(), 16)):08x}"

    def take(self, keep: Sequence[int]) -> "Annotated":
        """The images of these indices, in this order."""
        sizes = None if self.sizes is None else [self.sizes[i] for i in keep]
        objects = [self.objects[i] for i in keep]
        return dataclasses.replace(self, source=self.source.take(keep), objects=objects, sizes=sizes)


def open_objects(
    data: str,
    role: Literal["train", "eval"] = "train",
    *,
    split: str = "",
    classes: Sequence[str] = (),
    image_column: str = "",
    objects_column: str = "",
    box_format: Literal["xywh", "xyxy"] = "xywh",
    config: str = "",
    max_pixels: int = MAX_PIXELS,
) -> Annotated | None:
    """Open `--data`: a folder in VOC's or COCO's layout, or any `datasets` layout with a column of objects.

    `role` chooses the split where `split` names none; several are joined by "+", as VOC2007/trainval+VOC2012/trainval;
    "eval" gives None where there is no second split. Classes are numbered in the order of `classes` or else of their
    names, whatever the format. `config` and `max_pixels` are those of `open_source`. Boxes that are none are left out, the
    source's notes count them. Raises SystemExit with the remedy: no such split or column, a file that is not what it
    should be, a class that `classes` lacks.
    """
    if not data:
        raise SystemExit(
            "--data is missing: a folder in PASCAL VOC's or COCO's layout, or a datasets layout with a column of objects"
        )
    data, config = named_config(data, config)
    path = Path(data).expanduser()
    voc, coco = _voc_splits(path), _coco_splits(path)
    if config and (voc or coco):
        raise SystemExit(f"--data-config {config}: {data} has no configurations; leave it out")
    if voc or coco:
        names = _choose(list(voc or coco), role, split, data)
        if not names:
            return None
        read = partial(_open_voc, data, voc) if voc else partial(_open_coco, data, path, coco)
        parts = [read(name) for name in names]
        files = [file for part in parts for file in part[0]]
        notes = [part[4] for part in parts if part[4]]
        source = Source(data, len(files), partial(_read_file, files), where=files.__getitem__, notes=notes)
        sizes = [size for part in parts for size in part[2]] if coco else None
        found = Annotated(source, [each for part in parts for each in part[1]], sizes=sizes)
        known = {name for part in parts for name in part[3]}
    else:
        found = _open_column(data, role, split, image_column, objects_column, box_format, config)
        if found is None:
            return None
        known = {thing["name"] for things in found.objects for thing in things}
    found.source.max_pixels = max_pixels
    if not any(map(usable_objects, found.objects)):
        raise SystemExit(
            f"--data {data}: no object of some area in any of its {len(found)} images; is it the right split, and box format?"
        )
    found.classes = list(classes or sorted(known))
    if unknown := sorted(known - set(found.classes)):
        raise SystemExit(
            f"--data {data}: {len(unknown)} classes to evaluate on are not in the training split: {', '.join(unknown[:5])}"
        )
    number = {name: i for i, name in enumerate(found.classes, start=1)}
    for things in found.objects:
        for thing in things:
            thing["category_id"] = number[thing["name"]]
    return found


def _choose(names: list[str], role: str, split: str, data: str) -> list[str]:
    """The splits asked for, else the one with the usual name; none to evaluate on is no error."""
    if split:
        flag, asked = "--split" if role == "train" else "--query-split", split.split("+")
        if wrong := [name for name in asked if name not in names]:
            raise SystemExit(f"{flag} {split}: {data} has no {wrong[0]} but {', '.join(names)}")
        return asked
    plain = [re.sub(r"\d+$", "", name.rpartition("/")[2]) for name in names]
    found = next(([n for n, p in zip(names, plain, strict=True) if p == w] for w in SPLITS[role] if w in plain), [])
    if len(found) == 1 or not found and role == "eval":
        return found
    raise SystemExit(
        f"--data {data}: name the split to {'train' if role == 'train' else 'evaluate'} on with "
        f"{'--split' if role == 'train' else '--query-split'}, several joined by +: {', '.join(names)}"
    )


def _xywh(box, box_format: str = "xywh") -> tuple[float, ...] | None:
    """x, y, width and height of a box that is finite and of some area; None for anything else."""
    try:
        x, y, width, height = map(float, box)
    except (TypeError, ValueError):
        return None
    if box_format == "xyxy":
        width, height = width - x, height - y
    return (x, y, width, height) if math.isfinite(x + y + width + height) and min(width, height) > 0 else None


def _left_out(where: str, names: list[str]) -> str:
    """A line about objects whose boxes are none."""
    some = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return f"{where}: {len(names)} boxes are empty, missing or no numbers and left out: {some}" if names else ""


def _thing(name: str, box: Sequence[float], **more) -> dict:
    x, y, width, height = map(float, box)
    return {"name": name, "bbox": [x, y, width, height], "area": width * height, "iscrowd": 0, "difficult": 0, **more}


def _voc_splits(path: Path) -> dict[str, tuple[Path, Path | None]]:
    """{"VOC2007/trainval": (folder, its list of names)} below a VOCdevkit; a folder without lists is a split of its own."""
    splits = {}
    for folder in (path, *sorted(path.iterdir())) if path.is_dir() else ():
        if (folder / "Annotations").is_dir():
            lists = sorted((folder / "ImageSets" / "Main").glob("*.txt"))
            lists = [
                file for file in lists if "_" not in file.stem and not is_clutter(file.name)
            ]  # aeroplane_train.txt is about one class
            prefix = "" if folder == path else f"{folder.name}/"
            splits |= {prefix + file.stem: (folder, file) for file in lists} or {folder.name: (folder, None)}
    return splits


def _open_voc(data: str, splits: dict, name: str) -> tuple[list[str], list[list[dict]], None, set[str], str]:
    folder, listed = splits[name]
    every = sorted(f.stem for f in (folder / "Annotations").glob("*.xml") if not is_clutter(f.name))
    stems = listed.read_text().split() if listed else every
    files, objects = [], []
    for stem in stems:
        file = folder / "Annotations" / f"{stem}.xml"
        try:
            root = ElementTree.parse(file).getroot()
            things = []
            for node in root.findall("object"):
                x0, y0, x1, y1 = (float(node.find("bndbox").findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax"))
                # pixels counted from 1, the last one included
                box, difficult = (x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1), int(node.findtext("difficult") or 0)
                things.append(_thing(node.findtext("name").strip(), box, difficult=difficult))
        except (OSError, ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise SystemExit(f"--data {data}: {file} is no VOC annotation ({first_line(error)})") from None
        files.append(str(folder / "JPEGImages" / (root.findtext("filename") or f"{stem}.jpg")))
        objects.append(things)
    if not files:
        raise SystemExit(f"--data {data}: split {name} is empty")
    return files, objects, None, {thing["name"] for things in objects for thing in things}, ""


def _coco_splits(path: Path) -> dict[str, Path]:
    """{"train2017": .../instances_train2017.json} from a folder's annotations/, or {"train": train/_annotations.coco.json}.

    The second is how Roboflow exports a data set: every split's file beside its images, or one file beside all of them.
    """
    files = {file.stem.removeprefix("instances_"): file for file in sorted((path / "annotations").glob("*.json"))}
    exported = [path / ROBOFLOW, *sorted(path.glob(f"*/{ROBOFLOW}"))]
    files |= {"train" if file.parent == path else file.parent.name: file for file in exported if file.is_file()}
    return {name: file for name, file in files.items() if not is_clutter(file.name)}


def _open_coco(data: str, path: Path, splits: dict, name: str):
    file = splits[name]
    try:
        content = json.loads(file.read_text())
        names = {each["id"]: str(each["name"]) for each in content["categories"]}
        images = {each["id"]: each for each in content["images"]}
        found: dict[int, list[dict]] = {number: [] for number in images}
        left_out = []
        for each in content["annotations"]:
            kept = {key: each[key] for key in ("area", "iscrowd", "segmentation") if each.get(key)}
            if each["category_id"] not in names or each["image_id"] not in found:
                raise ValueError(f"annotation {each.get('id')} is of a category or an image that is not listed")
            if box := _xywh(each.get("bbox")):
                found[each["image_id"]].append(_thing(names[each["category_id"]], box, **kept))
            else:
                left_out.append(f"annotation {each.get('id')}")
        files = [each["file_name"] for each in images.values()]
        sizes = [(each.get("height", 0), each.get("width", 0)) for each in images.values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise SystemExit(f"--data {data}: {file} is no COCO file of instances ({problem})") from None
    if not files:
        raise SystemExit(f"--data {data}: {file} lists no images")
    folders = list(dict.fromkeys([path / name, path / "images" / name, path / "images", path, file.parent]))
    folder = next((f for f in folders if (f / files[0]).exists()), None)
    if folder is None:
        raise SystemExit(f"--data {data}: {files[0]} of {file.name} is not in {', '.join(map(str, folders))}")
    note = _left_out(str(file), left_out)
    return [str(folder / f) for f in files], list(found.values()), sizes, set(names.values()), note


def _open_column(
    data: str, role: str, split: str, image_column: str, objects_column: str, box_format: str, config: str
) -> Annotated | None:
    """A column that holds, for every image, boxes and their classes: a dict of lists or a list of dicts."""
    table = open_table(data, role, split, config)
    if table is None:
        return None
    columns = table.features
    inner = {name: _inner(feature) for name, feature in columns.items()}
    fitting = [name for name, fields in inner.items() if any(key in fields for key in BOX_KEYS)]
    if not fitting or objects_column and objects_column not in fitting:
        raise SystemExit(
            f"{f'--objects-column {objects_column}' if objects_column else f'--data {data}'}: no column of objects with bbox "
            f"and category; {data} has the columns {', '.join(columns)}"
        )
    column = objects_column or fitting[0]
    box_key = next(key for key in BOX_KEYS if key in inner[column])
    name_key = next((key for key in NAME_KEYS if key in inner[column]), None)
    if name_key is None:
        raise SystemExit(f"--data {data}: the objects in {column} have no category but {', '.join(inner[column])}")
    kind, objects, left_out = getattr(inner[column][name_key], "names", None), [], []
    for row, value in enumerate(table[column][:]):
        things = []
        try:
            if isinstance(value, dict):
                keys = [key for key in (box_key, name_key, "iscrowd", "difficult") if value.get(key) is not None]
                value = [dict(zip(keys, each, strict=True)) for each in zip(*(value[k] for k in keys), strict=True)]
            for each in value or ():
                flags = {key: int(each[key]) for key in ("iscrowd", "difficult") if each.get(key)}
                label = kind[each[name_key]] if kind else str(each[name_key])
                if box := _xywh(each[box_key], box_format):
                    things.append(_thing(label, box, **flags))
                else:
                    left_out.append(f"in row {row}")
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise SystemExit(
                f"--data {data}: row {row} of {column} holds no boxes with categories ({error})"
            ) from None
        objects.append(things)
    source = open_dataset(data, role, split, image_column, config=config)
    if left_out:
        source.notes = [*source.notes, _left_out(data, left_out)]
    return Annotated(source, objects)


def _inner(feature) -> dict:
    """The fields of a `datasets` feature that is a struct, or a list of structs in any of its spellings."""
    feature = feature[0] if isinstance(feature, list) else feature
    feature = getattr(feature, "feature", feature)
    fields = {}
    for key, value in feature.items() if isinstance(feature, dict) else ():
        if key in NAME_KEYS:  # a list of labels beside a list of boxes
            value = getattr(value, "feature", value)
        fields[key] = value
    return fields


def usable_objects(things: list[dict]) -> list[dict]:
    """The objects to train on: no crowds, no empty boxes; VOC's difficult ones are, as in Detectron2."""
    return [t for t in things if not t["iscrowd"] and min(t["bbox"][2:]) > 0]


def boxes_inside(boxes: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) as corners, cut at the image's edge, and (N,) bool: those of which at least a tenth is in the image."""
    cut = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
    area, left = ((each[:, 2:] - each[:, :2]).clamp(min=0).prod(1) for each in (boxes, cut))
    return cut, left >= 0.1 * area


def object_bitmap(segmentation: list | dict, height: int, width: int) -> Tensor:
    """COCO's polygons or run lengths -> (H, W) uint8."""
    from pycocotools import mask

    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return torch.from_numpy(mask.decode(mask.merge(segmentation) if isinstance(segmentation, list) else segmentation))


def average_precision(annotated: Annotated, found: list[dict], kind: Literal["bbox", "segm"]) -> dict[str, float]:
    """COCO's figures in percent, and VOC 2007's at 11 recalls; sizes of which there are no objects are left out."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects = [{**t, "image_id": i} for i, things in enumerate(annotated.objects) for t in things]
    for number, thing in enumerate(objects, start=1):  # 0 would mean "not matched"
        # an area outside every range: neither missed nor wrong, and not a crowd either
        thing |= {"id": number, "area": -1.0 if thing["difficult"] else thing["area"]}
    sizes = annotated.sizes or [(0, 0)] * len(annotated)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": height, "width": width} for i, (height, width) in enumerate(sizes)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(annotated.classes, start=1)],
        "annotations": objects,
    }
    wanted = "bbox" if kind == "bbox" else "segmentation"
    found = [{k: t[k] for k in ("image_id", "category_id", "score", wanted)} for t in found]
    if not found:
        return dict.fromkeys(("AP", "AP50", "AP75", "AP50_11point"), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    figures = {name: 100 * float(value) for name, value in zip(names, evaluation.stats, strict=False) if value >= 0}
    precision = evaluation.eval["precision"][0, ::10, :, 0, 2]  # IoU 0.5, recall 0, 0.1, ..., any class, any size
    return {**figures, "AP50_11point": 100 * float(precision[precision >= 0].mean())}


def draw_objects(annotated: Annotated, found: list[dict], count: int, folder: Path) -> None:
    """The first readable images as PNG, with their true and their found boxes."""
    folder.mkdir(exist_ok=True)
    for i in [i for i in range(len(annotated)) if i not in annotated.bad][:count]:
        sure = [t for t in found if t["image_id"] == i and t["score"] >= 0.5]
        image = annotated.source.decode(i)
        scale = max(1, 512 // max(image.shape[1:]))  # names are readable on small images too
        image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        for things, colour in ((annotated.objects[i], "lime"), (sure, "red")):
            names = [annotated.classes[t["category_id"] - 1] for t in things]
            texts = [f"{n} {t['score']:.2f}" if "score" in t else n for n, t in zip(names, things, strict=True)]
            boxes = scale * box_convert(torch.tensor([t["bbox"] for t in things]).view(-1, 4), "xywh", "xyxy")
            image = draw_bounding_boxes(image, boxes, texts, colour, width=2) if things else image
        write_png(image, str(folder / f"{i:04}.png"))
