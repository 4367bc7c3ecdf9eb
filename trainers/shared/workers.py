"""Processes that read ahead: how they start, hand over their batches, die and end. A chapter of common.py."""

import atexit
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from trainers.shared.sources import first_line

WAIT_SECONDS = 1  # for a batch, before looking whether the workers live and the run is to stop


def read_batches(
    dataset: Dataset,
    keys: Iterable,
    num_workers: int,
    *,
    single: bool = False,
    while_waiting: Callable[[], None] | None = None,
    **options,
) -> Iterator:
    """`dataset.collate` of the samples of each entry of `keys`, in order, read ahead by data workers (0: read here).

    With `single` an entry is one key and its sample is not collated. `while_waiting` is called once a second for as long
    as a batch is not there. `options` go to torch's DataLoader. Raises SystemExit with the remedy, here and nowhere else,
    where a worker died or shared memory is full.
    """
    how = {"batch_size": None, "sampler": keys} if single else {"batch_sampler": keys}
    if num_workers:
        options |= {"num_workers": num_workers, "timeout": WAIT_SECONDS, "worker_init_fn": WorkerInit()}
    loader = DataLoader(dataset, collate_fn=Shared(None if single else dataset.collate), **how, **options)
    try:
        stream = _without_child_signal(lambda: iter(loader))
        while True:
            try:
                batch = next(stream)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader timed out"):
                    raise
                if while_waiting:
                    while_waiting()
                continue
            if isinstance(batch, NotShared):
                raise SystemExit(
                    f"a data worker could not hand over its batch ({batch.why}): /dev/shm is too small? "
                    "Lower --num-workers (0 decodes in the main process) or --batch-size, or enlarge it"
                )
            yield batch
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
        if not num_workers or str(error).startswith("Caught "):  # an error of the program, not of the machine
            raise
        raise SystemExit(
            f"a data worker died ({first_line(error)}): too little memory or shared memory? "
            "Lower --num-workers (0 decodes in the main process); --resume continues from the last checkpoint"
        ) from None


def _without_child_signal(start: Callable):
    """`start()`; torch would have every dead worker raise from a signal handler, wherever the program is, even in a save."""
    if threading.current_thread() is not threading.main_thread():
        return start()
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return start()
    finally:
        signal.signal(signal.SIGCHLD, before)


@dataclasses.dataclass
class NotShared:
    """What a worker sends where its batch found no room in shared memory."""

    why: str


class Shared:
    """Puts a worker's batch into shared memory before it is sent: the thread that sends it would drop it without a word."""

    def __init__(self, collate: Callable | None):
        self.collate = collate

    def __call__(self, samples):
        batch = self.collate(samples) if self.collate else samples
        if get_worker_info() is not None:
            try:
                for tensor in tensors_in(batch):
                    tensor.share_memory_()
            except (RuntimeError, OSError) as error:
                return NotShared(first_line(error))
        return batch


def tensors_in(batch) -> Iterator[Tensor]:
    """All tensors of a sample, however deep in lists, dicts and dataclasses."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, list | tuple | dict) or dataclasses.is_dataclass(batch):
        parts = (
            batch if isinstance(batch, list | tuple) else (batch if isinstance(batch, dict) else vars(batch)).values()
        )
        for part in parts:
            yield from tensors_in(part)


class WorkerInit:
    """Data workers outlive a SIGTERM to the process group, so that the trainer can save, but not the trainer itself.

    Ignoring the signal outright would hang the exit: multiprocessing ends live workers with that very signal.
    """

    def __init__(self):
        self.closing = multiprocessing.Event()
        atexit.register(self.closing.set)  # runs before multiprocessing's own exit hook

    def __call__(self, _: int) -> None:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if self.closing.is_set() else None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        torch.set_num_threads(1)
