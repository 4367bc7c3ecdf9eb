"""Two MoCo-v2 views per image: ours against the authors' PIL pipeline, alternating in one run, one thread each.

    python tests/benchmarks/views.py [--rounds 7]

Images come from CLEANDISTILL_DATA (default ../shared/data): CIFAR-10 for the resident path, photographs for the other.
"""

import argparse
import io
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision import transforms as tv
from torchvision.io import ImageReadMode, decode_image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import trainers.shared.views as views

DATA = Path(os.environ.get("CLEANDISTILL_DATA", "../shared/data"))
RECIPE = views.MOCO_V2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PilBlur:
    """What MoCo's loader does: PIL's blur with a radius drawn from [0.1, 2]."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def official(size: int) -> tv.Compose:
    """The pipeline of MoCo v2 and SimSiam in torchvision's v1 transforms on PIL images."""
    return tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=(0.2, 1.0)),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            tv.RandomGrayscale(p=0.2),
            tv.RandomApply([PilBlur()], p=0.5),
            tv.RandomHorizontalFlip(),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )


def normalise(x: Tensor) -> Tensor:
    """Counted on our side too: the networks do it, on the batch."""
    return (x - torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def measure(alternatives: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each alternative in each round, in turn, after one round that does not count."""
    seconds = {name: [] for name in alternatives}
    for i in range(rounds + 1):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run(i)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict, count: int, baselines: dict[str, tuple[str, float]]) -> None:
    """A table: microseconds per image (two views), the ratio to the baseline per round (median), and what is asked."""
    print(f"\n{title}")
    for name, times in seconds.items():
        line = f"  {name:<44}{statistics.median(times) / count * 1e6:10.0f} us/image"
        if name in baselines:
            baseline, wanted = baselines[name]
            ratio = statistics.median(b / t for b, t in zip(seconds[baseline], times, strict=True))
            line += f"{ratio:8.1f}x  of {baseline} (at least {wanted})"
        print(line)


def resident(rounds: int, batch: int) -> None:
    """32 px: batches of CIFAR-10 held as uint8 against JPEG bytes in memory, opened as an image folder opens them."""
    import pyarrow.parquet as pq  # not at the top: step.py needs only the pipeline

    column = pq.read_table(DATA / "cifar10/train.parquet", columns=["img"])["img"]
    encoded = [row["bytes"] for row in column.slice(0, batch * (rounds + 1)).to_pylist()]
    images = torch.stack([decode_image(torch.frombuffer(bytearray(b), dtype=torch.uint8)) for b in encoded])
    opened = [Image.open(io.BytesIO(b)).convert("RGB") for b in encoded]
    pipeline, sides = official(32), torch.full((batch,), 32)

    def ours(step: int) -> list[Tensor]:
        indices = torch.arange(step * batch, (step + 1) * batch)
        out = []
        for view in range(2):
            params = views.sample_params(RECIPE, 0, 0, indices, view, sides, sides, 32)
            x = views.crop_batch(images[indices], params, 32, RECIPE)
            out.append(normalise(views.colour_batch(x, params, RECIPE)))
        return out

    def theirs(step: int, decode: bool) -> list[Tensor]:
        out = []
        for i in range(step * batch, (step + 1) * batch):
            image = Image.open(io.BytesIO(encoded[i])).convert("RGB") if decode else opened[i]
            out.append((pipeline(image), pipeline(image)))
        return [torch.stack(v) for v in zip(*out, strict=True)]

    seconds = measure(
        {"official": lambda s: theirs(s, True), "official, decoded": lambda s: theirs(s, False), "ours": ours}, rounds
    )
    title = f"32 px resident, batch {batch}, {torch.get_num_threads()} thread(s)"
    report(title, seconds, batch, {"ours": ("official, decoded", 3)})


def streamed(rounds: int) -> None:
    """224 px: decode once and cut two crops, against decode once and two whole pipelines."""
    encoded = [path.read_bytes() for path in sorted((DATA / "imagenet-jpeg").glob("*.JPEG"))]
    tensors = [torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in encoded]
    pipeline, count = official(224), len(encoded)

    def worker(step: int) -> list[tuple[views.Params, Tensor]]:
        """Per view the parameters of each sample and its crop, as workers send them."""
        out = []
        for i, raw in enumerate(tensors):
            image = decode_image(raw, ImageReadMode.RGB)
            index, height, width = torch.tensor([i]), torch.tensor([image.shape[1]]), torch.tensor([image.shape[2]])
            for view in range(2):
                params = views.sample_params(RECIPE, 0, step, index, view, height, width, 224)
                out.append((params, views.crop_one(image, params, 0, 224, RECIPE)))
        return out

    def whole(step: int) -> list[Tensor]:
        crops = worker(step)
        out = []
        for view in range(2):
            crop = torch.stack([c for _, c in crops[view::2]])
            ones = torch.ones(count, dtype=torch.int64)
            params = views.sample_params(RECIPE, 0, step, torch.arange(count), view, ones, ones, 224)  # boxes unused
            out.append(normalise(views.colour_batch(crop.float().div_(255), params, RECIPE)))
        return out

    def theirs(step: int) -> list[Tensor]:
        out = []
        for raw in encoded:
            image = Image.open(io.BytesIO(raw)).convert("RGB")
            out.append((pipeline(image), pipeline(image)))
        return [torch.stack(v) for v in zip(*out, strict=True)]

    seconds = measure({"official": theirs, "ours, worker": worker, "ours, worker and colours": whole}, rounds)
    title = f"224 px streamed, {count} photographs, {torch.get_num_threads()} thread(s)"
    report(title, seconds, count, {"ours, worker": ("official", 4), "ours, worker and colours": ("official", 1.5)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="ours; theirs has no use for a second")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    resident(args.rounds, args.batch)
    streamed(args.rounds)


if __name__ == "__main__":
    main()
