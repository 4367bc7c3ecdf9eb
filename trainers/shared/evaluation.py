"""What the evaluations with labels ask of their two splits. A chapter of common.py."""

import dataclasses


def labelled_pair(data: str, train, queries) -> tuple:
    """The training (or gallery) split and the split to evaluate on, `common.Source`s, with labels in one numbering.

    Each split numbers the classes that it holds; the queries' labels come back in the training split's numbers, matched
    by the classes' names. Raises SystemExit with the remedy: no such split, no labels, a class that was never trained.
    """
    if queries is None:
        raise SystemExit(
            f"--data {data}: no split to evaluate on; add one called val or test, or name one with --query-split"
        )
    for source, flag in ((train, "--split"), (queries, "--query-split")):
        if source.labels is None:
            raise SystemExit(f"--data {data}: no labels to evaluate with; class folders or --label-column give them")
        if (low := int(source.labels.min())) < 0:
            raise SystemExit(f"--data {data}: holds the label {low}; choose a labelled split with {flag}")
    if list(train.classes) == list(queries.classes):
        return train, queries
    number = {name: i for i, name in enumerate(train.classes)}
    unknown = [name for name in queries.classes if name not in number]
    if unknown:
        raise SystemExit(
            f"--data {data}: {len(unknown)} classes to evaluate on are not in the training split: {', '.join(unknown[:5])}"
        )
    order = queries.labels.new_tensor([number[name] for name in queries.classes])
    return train, dataclasses.replace(queries, labels=order[queries.labels], classes=train.classes)
