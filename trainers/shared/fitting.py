"""Flags that nobody gave, fitted to data that are too small for their defaults. A chapter of common.py."""

import dataclasses
import os
import weakref
from collections.abc import Collection, Sequence
from functools import partial

from trainers.shared.sources import Source, available_cores

FITTED = frozenset(
    "batch_size group_size bn_group_size queue_length num_workers k topk perplexity crd_negatives".split()
)
_GIVEN: dict[int, tuple[weakref.ref, frozenset[str]]] = {}  # by the id of flags that were parsed


def remember_given(args, names: Collection[str]):
    """Note which flags somebody gave, on the command line or in a file that was named there; returns `args`."""
    _GIVEN[id(args)] = weakref.ref(args, partial(_GIVEN.pop, id(args))), frozenset(names)
    return args


def given_names(args) -> frozenset[str]:
    """The flags that somebody gave. Of `args` that were made and not parsed: those that differ from their defaults."""
    known = _GIVEN.get(id(args))
    if known is not None and known[0]() is args:
        return known[1]
    return frozenset(f.name for f in dataclasses.fields(args) if getattr(args, f.name) != f.default)


def named_in(argv: Sequence[str]) -> set[str]:
    """The fields that the words of a command line set."""
    names = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    return names | {name[3:] for name in names if name.startswith("no_")}


def fitted(args, given: Collection[str], images: int, processes: int, cores: int) -> dict[str, object]:
    """{flag: new value} for flags that were not `given` and do not fit `images`, `processes` and a process's `cores`.

    The batch is at most the images, a multiple of the processes and of given groups, and divides a given queue; a group
    divides the batch and its share of a process, near its default; the queue is the largest multiple of the batch that
    the images fill; k, topk and negatives are fewer than the images. `cores` 0: no images are read while training.
    """
    free = {field.name: getattr(args, field.name) for field in dataclasses.fields(args) if field.name not in given}
    new: dict[str, object] = {}
    batch = getattr(args, "batch_size", 0)
    if free.get("batch_size", 0) > images:
        groups = [getattr(args, name, 0) for name in ("group_size", "bn_group_size") if name not in free]
        queue = 0 if "queue_length" in free else getattr(args, "queue_length", 0)

        def fits(b: int) -> bool:
            return not (b % processes or any(group > 0 and b % group for group in groups) or queue > 0 and queue % b)

        sizes = range(images, 0, -1)
        batch = next((b for b in sizes if fits(b)), next((b for b in sizes if b % processes == 0), batch))
        new["batch_size"] = batch
    for name in ("group_size", "bn_group_size"):
        if batch and free.get(name, 0) > 0:
            new[name] = _group(free[name], batch, batch // processes)
    if batch and free.get("queue_length", 0) > 0:
        new["queue_length"] = min(free["queue_length"], images) // batch * batch or free["queue_length"]
    if "num_workers" in free and cores:
        new["num_workers"] = min(free["num_workers"], cores)
    if "k" in free:
        new["k"] = tuple(k for k in free["k"] if k <= images) or (images,)
    if "topk" in free:
        new["topk"] = max(1, min(free["topk"], images - 1))
    if "perplexity" in free and free["perplexity"] >= images > 3:
        new["perplexity"] = (images - 1) / 3
    if "crd_negatives" in free:
        new["crd_negatives"] = max(1, min(free["crd_negatives"], images - 1))
    return {name: value for name, value in new.items() if value != getattr(args, name)}


def _group(usual: int, batch: int, share: int) -> int:
    """The size of a group that divides the batch and goes with a process's share of it, at most or near the usual one."""
    sizes = [d for d in range(1, batch + 1) if batch % d == 0 and (share % d == 0 or d % share == 0)]
    below = [d for d in sizes if usual / 2 <= d <= usual]
    return max(below) if below else min(sizes[min(1, len(sizes) - 1) :], key=lambda d: (max(d / usual, usual / d), -d))


def fit_to_data(args, source: Source, run, queries: Source | None = None):
    """`args`, with flags that nobody gave fitted to the data, which `run` says in one line, and records.

    It says too what opening the data found. Flags that were given stay as they are, for the checks that refuse them.
    """
    notes = [note for opened in (source, queries) if opened is not None for note in opened.notes]
    if source.no_labels:
        notes.append(f"{'no labels: ' * (source.labels is None)}{source.no_labels}")
    for note in dict.fromkeys(notes):
        run.say(f"data: {note}".encode(errors="backslashreplace").decode())  # names that are not UTF-8
    processes = run.accelerator.num_processes
    streamed = any(opened is not None and opened.pixels is None for opened in (source, queries))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # processes that share this machine's cores
    cores = max(1, available_cores() // here) if streamed else 0
    new = run.same_everywhere(fitted(args, given_names(args), len(source), processes, cores))
    if new:
        changes = [f"--{name.replace('_', '-')} {_text(getattr(args, name))} to {_text(v)}" for name, v in new.items()]
        run.say(
            f"fitted to {len(source)} images, {cores or available_cores()} cores: {', '.join(changes)}; a flag that is given stays"
        )
        args = remember_given(dataclasses.replace(args, **new), given_names(args))
        run.adopt(args)
    return args


def _text(value) -> str:
    return (
        " ".join(map(str, value))
        if isinstance(value, tuple)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
