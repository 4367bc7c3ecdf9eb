"""kNN classification of features in memory or in files. A chapter of common.py."""

import io
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


class StoredFeatures:
    """(N, D) float32 rows of an open, unbuffered file from byte `start` on, read and written in slices.

    No more of them is in memory than a caller holds. `change` is applied to every slice that is read.
    """

    def __init__(self, file: io.RawIOBase, start: int, shape: Sequence[int], change: Callable | None = None):
        self.file, self.start, self.shape, self.change = file, start, tuple(shape), change

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        first, last, _ = rows.indices(len(self))
        values = torch.empty(last - first, self.shape[1], dtype=torch.float32)
        left = self._at(first, values)
        while left:  # one call moves 2 GiB at most
            read = self.file.readinto(left)
            if not read:
                raise SystemExit(f"{self.file.name}: cut short; delete it")
            left = left[read:]
        return values if self.change is None else self.change(values)

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        """`rows` are consecutive. Raises SystemExit where the disk is full."""
        left = self._at(int(rows[0]), values.contiguous())
        try:
            while left:
                left = left[self.file.write(left) :]
        except OSError as error:
            raise SystemExit(f"{self.file.name}: not written ({error.strerror}); choose another place") from None

    def _at(self, row: int, values: Tensor) -> memoryview:
        self.file.seek(self.start + 4 * self.shape[1] * row)
        return memoryview(values.numpy()).cast("B")

    def changed(self, change: Callable[[Tensor], Tensor]) -> "StoredFeatures":
        return StoredFeatures(self.file, self.start, self.shape, change)


def readable_rows(features: Tensor) -> Tensor:
    """(N,) bool: which rows of `extract_features` are of an image, not all NaN for one that could not be read."""
    return ~features.isnan().all(1)


@torch.no_grad()
def knn_accuracy(
    gallery: Tensor | StoredFeatures,
    gallery_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int | Sequence[int] = 20,
    *,
    temperature: float = 0.07,
    vote: Literal["weighted", "majority"] = "weighted",
    metric: Literal["cosine", "euclidean"] = "cosine",
    chunk: int = 1024,
) -> float | dict[int, float]:
    """Top-1 accuracy in percent of k-nearest-neighbour classification; for several k a dict {k: accuracy}.

    gallery (N, D), queries (M, D), labels (N,) and (M,). "weighted" votes with exp(similarity / temperature) (Wu et al.
    2018, arXiv:1805.01978, Sec. 3.4), similarity being the cosine or minus the squared distance; "majority" counts
    each neighbour once. Equal votes go to the smallest label. Exact; memory is bounded by `chunk` x 10,000 scores
    and 32 MiB of features at a time, whatever the gallery. Images that could not be read, a row of NaN each, are left
    out on both sides. Raises ValueError for a k above N.
    """
    ks = [k] if isinstance(k, int) else list(k)
    if max(ks) > len(gallery):
        raise ValueError(f"k = {max(ks)} neighbours of a gallery of {len(gallery)}")
    asked = readable_rows(queries)
    if not asked.all():
        queries, query_labels = queries[asked], query_labels[asked.to(query_labels.device)]
    num_classes = int(torch.cat([gallery_labels, query_labels]).max()) + 1
    best, neighbour = _nearest(gallery, queries, max(ks), metric, chunk)  # (M, max k) each
    # relative to the nearest neighbour: only ratios count, and exp overflows below temperature 0.012
    weight = ((best - best[:, :1]) / temperature).exp() if vote == "weighted" else (best > -torch.inf).to(best.dtype)
    correct = dict.fromkeys(ks, 0)
    for w, near, target in zip(weight.split(chunk), neighbour.split(chunk), query_labels.split(chunk), strict=True):
        label = gallery_labels.to(w.device)[near]
        for number in ks:
            votes = w.new_zeros(len(w), num_classes).scatter_add_(1, label[:, :number], w[:, :number])
            correct[number] += int((votes.argmax(1) == target.to(w.device)).sum())
    accuracy = {number: 100.0 * hits / max(1, len(queries)) for number, hits in correct.items()}
    return accuracy[k] if isinstance(k, int) else accuracy


def _nearest(
    gallery: Tensor | StoredFeatures, queries: Tensor, k: int, metric: str, chunk: int
) -> tuple[Tensor, Tensor]:
    """The k greatest similarities of every query and where in the gallery they are, both (M, k), best first."""
    best = queries.new_full((len(queries), k), -torch.inf)
    neighbour = torch.zeros_like(best, dtype=torch.long)
    block = min(10_000, max(1, 2**23 // queries.shape[1]))
    # one buffer for all products: new memory each time costs a third
    scores = queries.new_empty(min(chunk, len(queries)), min(block, len(gallery)))
    for start in range(0, len(gallery), block):
        part = gallery[start : start + block].to(queries.device)
        part = F.normalize(part, dim=1) if metric == "cosine" else part
        readable = readable_rows(part)
        missing = None if readable.all() else ~readable
        for at in range(0, len(queries), chunk):
            rows = slice(at, at + chunk)
            query = F.normalize(queries[rows], dim=1) if metric == "cosine" else queries[rows]
            score = torch.mm(query, part.T, out=scores[: len(query), : len(part)])
            if metric == "euclidean":
                score.mul_(2).sub_(part.square().sum(1)).sub_(query.square().sum(1, keepdim=True))
            if missing is not None:
                score[:, missing] = -torch.inf
            top, index = score.topk(min(k, len(part)), dim=1)
            found = torch.cat([neighbour[rows], index + start], 1)
            best[rows], order = torch.cat([best[rows], top], 1).topk(k, dim=1)
            neighbour[rows] = found.gather(1, order)
    return best, neighbour
