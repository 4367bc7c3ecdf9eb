"""kNN of 10,000 queries in a gallery of 50,000 features of 512 dimensions: seconds, and memory as the gallery grows.

    python tests/benchmarks/knn.py [--rounds 5] [--threads 2]

Ours (`common.knn_accuracy`, chunks) against scikit-learn's brute force and the way that small repositories write it (one
matrix of all similarities, then topk), alternating in one run. Peak memory is that of a process of its own for each:
what it adds to its inputs, and in all, packages included. Scikit-learn votes by majority and so do ours beside it.

Two idle AMD EPYC cores, `--threads 2 --rounds 3`: ours 3.79 s (cosine) and 4.38 s (Euclidean), scikit-learn 16.25 and
6.66, one matrix 4.45, the products alone 3.42; peak above the inputs 69 MiB, scikit-learn's cosine 1541 MiB, its Euclidean
4 MiB. 1,281,167 features (2502 MiB) in a file, 1,000 queries: 191 MiB above the inputs, 1085 MiB in all.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
from trainers import eval_knn


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


def scikit_learn(metric: str, gallery: Tensor, gallery_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    model = KNeighborsClassifier(20, algorithm="brute", metric=metric).fit(gallery.numpy(), gallery_labels.numpy())
    return 100 * model.score(queries.numpy(), query_labels.numpy())


def ours(metric: str, *data: Tensor) -> float:
    return common.knn_accuracy(*data, 20, metric=metric, vote="majority")


SIDES = {
    "ours, cosine": lambda *data: ours("cosine", *data),
    "scikit-learn, cosine": lambda *data: scikit_learn("cosine", *data),
    "ours, euclidean": lambda *data: ours("euclidean", *data),
    "scikit-learn, euclidean": lambda *data: scikit_learn("euclidean", *data),
    "one matrix": lambda *data: plain(*data, 20),
    "the products alone": lambda gallery, _, queries, __: [queries @ part.T for part in gallery.split(10_000)],
}


def stored(file: Path, count: int) -> tuple[common.StoredFeatures, Tensor]:
    """A gallery in a file, as eval_knn.py keeps it, written in slices."""
    run = SimpleNamespace(accelerator=Accelerator(cpu=True))
    rows, labels = eval_knn.new_rows(file, {}, {"gallery": count}, 512, run)["gallery"], []
    for at in torch.arange(count).split(50_000):
        rows[at], part = features(len(at), 1 + int(at[0]))
        labels.append(part)
    return rows, torch.cat(labels)


def peak(side: str, gallery: int, queries: int) -> None:
    """MiB that a side adds to this process's memory at its peak (Linux: the kernel's high-water mark, reset)."""

    def status(key: str) -> float:
        return int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0]) / 2**10

    with tempfile.TemporaryDirectory() as folder:
        in_file = side == "in a file"
        data = stored(Path(folder) / "rows", gallery) if in_file else features(gallery, 1)
        data = [*data, *features(queries, 2)]
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        (ours("cosine", *data) if in_file else SIDES[side](*data))
    print(
        f"  {side:<24} gallery {gallery:>9,} ({gallery * 2048 / 2**20:5.0f} MiB), {queries:,} queries: "
        f"peak {status('VmHWM') - before:6.0f} MiB above the inputs, {status('VmHWM'):6.0f} MiB in all",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        return peak(args.peak[0], int(args.peak[1]), int(args.peak[2]))
    data = [*features(50_000, 1), *features(10_000, 2)]
    seconds, cpu = {name: [] for name in SIDES}, {name: [] for name in SIDES}
    for i in range(args.rounds + 1):
        for name, run in SIDES.items():
            start, used = time.perf_counter(), time.process_time()
            with threadpool_limits(args.threads):  # scikit-learn's own; torch has been told
                result = run(*data)
            if i:
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
            elif name != "the products alone":
                print(f"  {name}: {result:.2f} %", flush=True)
    print(f"10,000 queries, 50,000 x 512 gallery, k 20, {args.threads} thread(s)")
    for name, times in seconds.items():
        print(
            f"  {name:<24}{statistics.median(times):7.2f} s   ({min(times):.2f} to {max(times):.2f}), CPU {statistics.median(cpu[name]):.2f} s"
        )
    for metric in ("cosine", "euclidean"):
        theirs, mine = f"scikit-learn, {metric}", f"ours, {metric}"
        wall, busy = (
            statistics.median(t / m for t, m in zip(times[theirs], times[mine], strict=True))
            for times in (seconds, cpu)
        )
        print(f"  {metric}: ours {wall:.2f} times as fast as scikit-learn, {busy:.2f} in CPU time")
    cases = [(name, 50_000, 10_000) for name in SIDES if name != "the products alone"]
    cases += [("ours, cosine", n, 1000) for n in (200_000, 800_000)]
    cases += [("in a file", n, 1000) for n in (50_000, 200_000, 400_000, 1_281_167)]
    for case in cases:
        peak_of = [sys.executable, __file__, "--threads", str(args.threads), "--peak", *map(str, case)]
        subprocess.run(peak_of, check=True)


if __name__ == "__main__":
    main()
