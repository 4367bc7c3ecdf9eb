"""Small detection sets: a few pictures pasted on each canvas, written once as VOC's XML and once as COCO's JSON."""

import io
import json
import sys
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import torch
import torch.nn.functional as F
from conftest import DATA
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torchvision.io import write_png

SIDE = 256


def coloured_digits() -> dict[str, dict[str, list[torch.Tensor]]]:
    """{"train": {"red zero": [(3, 8, 8) uint8, ...]}, ...} from scikit-learn, which is at hand everywhere."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    ink = torch.from_numpy(digits.images / 16).unsqueeze(1)
    inks = {"red zero": (0, (230, 40, 40)), "green one": (1, (40, 200, 60)), "blue four": (4, (70, 90, 240))}
    pictures = {"train": {}, "val": {}}
    for name, (label, colour) in inks.items():
        images = ink[torch.from_numpy(digits.target) == label] * torch.tensor(colour).view(3, 1, 1)
        images = images.to(torch.uint8)
        pictures["train"][name], pictures["val"][name] = list(images[:120]), list(images[120:])
    return pictures


def tiny_imagenet(
    classes: tuple[str, ...] = ("alp", "goldfish", "school bus"),
) -> dict[str, dict[str, list[torch.Tensor]]]:
    """The same from Tiny-ImageNet, cut at its boxes."""
    import datasets
    from PIL import Image

    pictures = {}
    for split, file in (("train", "train"), ("val", "validation")):
        table = datasets.Dataset.from_parquet(str(DATA / "tiny-imagenet-100" / f"{file}.parquet"))
        table = table.cast_column("image", datasets.Image(decode=False))
        names = table.features["label"].names
        kept = {name: [] for name in classes}
        for row in table:
            if (name := names[row["label"]]) in kept:
                image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
                x0, y0, x1, y1 = row["bbox"]
                image = image.crop((x0, y0, x1 + 1, y1 + 1))
                if min(image.size) >= 16:
                    kept[name].append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        pictures[split] = kept
    return pictures


def overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def make_canvas(pictures: dict[str, list], rng: np.random.RandomState) -> tuple[torch.Tensor, list[tuple]]:
    """(3, 256, 256) uint8 and [(class, (x, y, width, height)), ...], two to four objects that do not overlap."""
    ground = torch.from_numpy(rng.rand(1, 3, 5, 5)).float()
    canvas = F.interpolate(ground, (SIDE, SIDE), mode="bicubic", align_corners=True)[0].clamp(0, 1) * 255
    canvas += torch.from_numpy(rng.randn(3, SIDE, SIDE) * 8).float()
    things, names = [], sorted(pictures)
    for _ in range(rng.randint(2, 5)):
        name = names[rng.randint(len(names))]
        picture = pictures[name][rng.randint(len(pictures[name]))].float()
        scale = rng.randint(56, 112) / max(picture.shape[1:])
        height, width = (round(side * scale) for side in picture.shape[1:])
        for _ in range(20):
            x, y = rng.randint(SIDE - width + 1), rng.randint(SIDE - height + 1)
            if not any(overlap((x, y, width, height), box) for _, box in things):
                resized = F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)[0]
                canvas[:, y : y + height, x : x + width] = resized
                things.append((name, (x, y, width, height)))
                break
    return canvas.clamp(0, 255).to(torch.uint8), things


def write_scenes(folder: Path, pictures: dict, train: int = 64, val: int = 24, seed: int = 0) -> tuple[Path, Path]:
    """folder/voc and folder/coco with the same images in train and val; returns both."""
    rng = np.random.RandomState(seed)
    names = sorted(pictures["train"])
    number = {name: 7 * (len(names) - i) for i, name in enumerate(names)}  # COCO's ids have gaps and another order
    for split, count in (("train", train), ("val", val)):
        voc, coco = folder / "voc" / split, folder / "coco"
        for path in (voc / "Annotations", voc / "JPEGImages", coco / "annotations", coco / "images" / split):
            path.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(count):
            canvas, things = make_canvas(pictures[split], rng)
            write_png(canvas, str(voc / "JPEGImages" / f"{i:04}.png"))
            write_png(canvas, str(coco / "images" / split / f"{i:04}.png"))
            images.append({"id": 100 + i, "file_name": f"{i:04}.png", "height": SIDE, "width": SIDE})
            xml = ""
            for name, (x, y, width, height) in things:
                corners = [[x, y, x + width, y, x + width, y + height, x, y + height]]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": 100 + i, "category_id": number[name], "iscrowd": 0,
                     "bbox": [x, y, width, height], "area": width * height, "segmentation": corners}
                )  # fmt: skip
                xml += (
                    f"<object><name>{escape(name)}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                    f"<ymin>{y + 1}</ymin><xmax>{x + width}</xmax><ymax>{y + height}</ymax></bndbox></object>\n"
                )
            xml = f"<annotation><filename>{i:04}.png</filename>\n{xml}</annotation>\n"
            (voc / "Annotations" / f"{i:04}.xml").write_text(xml)
        categories = [{"id": number[name], "name": name} for name in names]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (coco / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder / "voc", folder / "coco"


default_cfgs = generate_default_cfgs(
    {"resnet10_scenes.none": {"input_size": (3, 128, 128), "mean": (0.5,) * 3, "std": (0.25,) * 3, "num_classes": 0,
     "classifier": "fc", "first_conv": "conv1", "pool_size": (4, 4), "interpolation": "bilinear", "crop_pct": 1.0}}
)  # fmt: skip


@register_model
def resnet10_scenes(pretrained: bool = False, **kwargs) -> ResNet:
    """A ResNet that learns from scratch on one core in seconds."""
    plan = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 32, 48, 64), "stem_width": 16}
    return build_model_with_cfg(ResNet, "resnet10_scenes", pretrained, **{**plan, **kwargs})


if __name__ == "__main__":  # python tests/scenes.py FOLDER: the set of configs/eval_detection/scenes_cpu.toml
    write_scenes(Path(sys.argv[1]), tiny_imagenet(), train=128, val=32)
