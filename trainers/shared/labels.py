"""What of a column can be labels, and why the rest cannot. A chapter of common.py."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# (N,) long with -1 for "no label", or None; the classes' names; why there are none or what is missing
Labels = tuple[Tensor | None, Sequence[str], str]
LABEL_COLUMNS = ("label", "labels", "fine_label")  # what a column of labels is usually called
NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")


def read_labels(values: Sequence, what: str) -> Labels:
    """A column's values -> (labels, class names, "" or a line on what is missing), labels None if it holds no classes.

    Whole numbers from 0 stand for themselves, floats that are whole too; true and false are 1 and 0. Words are numbered
    in sorted order, those that are numbers by size; so are numbers below 0 or far above the count of classes. A null, NaN,
    "" or -1 (where nothing is below it) is -1, no label. Words and odd numbers that hardly come twice are captions or
    keys, fractions are measurements: None, and the line says what `what` holds.
    """
    nested = {type(v).__name__ for v in values if isinstance(v, list | dict)}
    if nested:
        return None, [], f"{what} holds {' and '.join(sorted(nested))}s, not one class an image"
    known = {v for v in values if not (v is None or v == "" or v != v)}
    if not any(isinstance(v, int | float) and v < -1 for v in known):
        known -= {-1, "-1"}
    if not known:
        return None, [], f"{what} holds no label at all"
    kinds = {type(v) for v in known}
    if kinds <= {int, float} and all(float(v).is_integer() for v in known):
        low, high = int(min(known)), int(max(known))
        order = sorted(known)
        if low >= 0 and high < 10 * len(known) + 10_000:
            order = range(high + 1)
        names = [str(int(v)) for v in order]
    elif kinds == {bool}:
        order, names = [False, True], ["False", "True"]
    elif kinds == {str}:
        numbers = all(map(NUMBER.fullmatch, known))
        order = names = sorted(known, key=lambda v: (float(v) if numbers else 0, v))
    else:
        kind = "fractions" if kinds <= {int, float} else " and ".join(sorted(k.__name__ for k in kinds))
        return None, [], f"{what} holds {kind}, no classes"
    count = sum(v in known for v in values)
    if not isinstance(order, range) and len(order) > max(9, count // 2):
        return None, [], f"{what} holds {len(order)} different values in {count} rows, no classes"
    return _numbered(values, order, names, what)


def read_named_labels(values: Sequence[int | None], names: Sequence[str], what: str) -> Labels:
    """The labels of a column whose classes have names: as `read_labels`, but every class counts, seen or not."""
    return _numbered(values, range(len(names)), names, what)


def _numbered(values: Sequence, order: Sequence, names: Sequence[str], what: str) -> Labels:
    number = {v: i for i, v in enumerate(order)}
    labels = torch.tensor([number.get(v, -1) for v in values], dtype=torch.long)
    missing = int((labels < 0).sum())
    if missing == len(values):
        return None, [], f"{what} holds no label at all"
    line = f"{missing} of {len(values)} labels in {what} are missing (null, NaN or -1)" if missing else ""
    return labels, names, line
