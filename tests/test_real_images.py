"""Real photographs, where CLEANDISTILL_DATA has them: CIFAR-10, Tiny-ImageNet (some grey), ImageNet JPEGs."""

import io
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from runs import tiny_run

import common

pytestmark = pytest.mark.data
CPU = torch.device("cpu")


def pil(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("data", "count", "side", "classes", "column"),
    [
        ("cifar10/test.parquet", 10_000, 32, 10, "img"),
        ("tiny-imagenet-100/validation.parquet", 2500, 64, 100, "image"),
    ],
)
def test_real_images_of_a_parquet_file_are_resident(data, count, side, classes, column, real_images):
    source = common.open_source(str(real_images / data))
    assert source.pixels.shape == (count, 3, side, side) and source.pixels.dtype == torch.uint8
    table = pq.read_table(real_images / data, columns=[column, "label"])
    assert torch.equal(source.labels, torch.tensor(table["label"].to_pylist()))
    assert len(set(source.labels.tolist())) == classes
    rows = [0, 1, count // 2, count - 1]
    for i in rows:
        # libjpeg's two builds round differently
        difference = (source.pixels[i].int() - pil(table[column][i].as_py()["bytes"]).int()).abs()
        assert difference.max() <= 4, f"row {i}"


def test_grey_real_images_become_three_equal_channels(real_images):
    file = real_images / "tiny-imagenet-100/validation.parquet"
    column = pq.read_table(file, columns=["image"])["image"].to_pylist()
    grey = [i for i, row in enumerate(column) if Image.open(io.BytesIO(row["bytes"])).mode == "L"]
    assert grey
    pixels = common.open_source(str(file)).pixels[grey]
    assert torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])


def test_real_images_of_a_folder_splits_by_name(real_images):
    train = common.open_source(str(real_images / "cifar10"), subset="1%")
    test = common.open_source(str(real_images / "cifar10"), "eval")
    assert (len(train), len(test)) == (500, 10_000) and not train.bad and not test.bad


def test_large_real_images_are_streamed(real_images):
    source = common.open_source(str(real_images / "imagenet-jpeg"))
    assert source.pixels is None and len(source) == 40 and source.labels is None
    views = [(common.MOCO_V2, 224), (common.MOCO_V2, 96)]
    alone, workers = (
        common.Batches(source, views, 8, seed=0, device=CPU, num_workers=n).batch(5) for n in (0, 2)
    )  # step 5 is the second epoch's first
    for view, other, (_, side) in zip(alone.views, workers.views, views, strict=True):
        assert view.shape == (8, 3, side, side) and torch.equal(view, other)
        assert 0 <= view.min() and view.max() <= 1 and view.std(dim=(1, 2, 3)).min() > 0.005
    assert not source.bad


def test_smd_learns_from_real_images(real_images, tiny_teacher, tmp_path):
    lines = tiny_run(
        "smd", tmp_path / "run", tiny_teacher, data=str(real_images / "cifar10"), subset="640", batch_size=32,
        image_size=32, total_steps=60, cosine_epochs=100.0, temperature=0.4, optimizer="adamw", base_lr=0.04,
        augmentation="moco_v2", save_every=1000,
    )  # fmt: skip
    cosine = [line["cos_term"] for line in lines]
    assert all(map(math.isfinite, cosine)) and sum(cosine[-10:]) / 10 < sum(cosine[:10]) / 10 - 0.1


@pytest.mark.parametrize("method", ["simsiam", "smd"])
def test_trainers_run_on_large_real_images(method, real_images, tiny_teacher, tmp_path):
    lines = tiny_run(
        method, tmp_path / "run", tiny_teacher, data=str(real_images / "imagenet-jpeg"), image_size=64, total_steps=3,
        augmentation="moco_v2",
    )  # fmt: skip
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) for line in lines)
    assert (tmp_path / "run" / "release" / "model.safetensors").exists()
