"""kNN of 10,000 queries in a gallery of 50,000 features of 512 dimensions: seconds, and memory as the gallery grows.

    python tests/benchmarks/knn.py [--rounds 5] [--threads 2]

Ours (`common.knn_accuracy`, chunks) against the way that small repositories write it (one matrix of all similarities,
then topk), alternating in one run. Peak memory is that of a process of its own for each size of the gallery.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common


def features(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(100, (count,), generator=g)
    centres = torch.randn(100, 512, generator=torch.Generator().manual_seed(0))
    return torch.randn(count, 512, generator=g) * 4 + centres[labels], labels


def plain(gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int) -> float:
    """Weighted kNN in one piece."""
    similarity = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    best, index = similarity.topk(k, dim=1)
    votes = F.one_hot(gallery_labels[index], 100) * (best / 0.07).exp().unsqueeze(2)
    return (votes.sum(1).argmax(1) == query_labels).float().mean().item() * 100


def peak(gallery: int, queries: int) -> None:
    """MiB that knn_accuracy adds to this process's memory at its peak (Linux: the kernel's high-water mark, reset)."""

    def status(key: str) -> float:
        return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) / 2**10

    data = [*features(gallery, 1), *features(queries, 2)]
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    common.knn_accuracy(*data, 20)
    added = status("VmHWM") - before
    print(f"  gallery {gallery:>9,} ({gallery * 2048 / 2**20:6.0f} MiB): peak {added:6.0f} MiB above the inputs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gallery", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.gallery:
        return peak(args.gallery, 1000)
    data = [*features(50_000, 1), *features(10_000, 2)]
    sides = {
        "ours": lambda: common.knn_accuracy(*data, 20),
        "one matrix": lambda: plain(*data, 20),
        "the products alone": lambda: [data[2] @ part.T for part in data[0].split(10_000)],
    }
    seconds = {name: [] for name in sides}
    for i in range(args.rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            result = run()
            if i:
                seconds[name].append(time.perf_counter() - start)
            elif name != "the products alone":
                print(f"  {name}: {result:.2f} %")
    print(f"10,000 queries, 50,000 x 512 gallery, k 20, {args.threads} thread(s)")
    for name, times in seconds.items():
        print(f"  {name:<20}{statistics.median(times):7.2f} s   ({min(times):.2f} to {max(times):.2f})")
    for gallery in (50_000, 200_000, 800_000):
        subprocess.run(
            [sys.executable, __file__, "--gallery", str(gallery), "--threads", str(args.threads)], check=True
        )


if __name__ == "__main__":
    main()
