"""What `datasets` opens: parquet files, its folders, the Hub's data sets; columns of labels. A chapter of common.py."""

import glob
import os
from pathlib import Path

from trainers.shared.folders import IMAGE_SUFFIXES, first_line, pick_split
from trainers.shared.labels import LABEL_COLUMNS, Labels, read_labels, read_named_labels


def open_table(data: str, role: str, split: str, config: str = ""):
    """A split of a parquet file or shard pattern, a local `datasets` folder, or a dataset id on the Hub; None without it."""
    import datasets  # takes a second: only runs that use it pay

    datasets.disable_progress_bars()
    path = Path(data).expanduser()
    shards = [] if path.exists() else _matching(path)
    local = path.exists() or bool(shards)
    if not local and (data.startswith((".", "/", "~")) or path.suffix or data.count("/") > 1 or glob.has_magic(data)):
        raise SystemExit(f"--data {data}: no such file or folder")
    if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES:
        raise SystemExit(f"--data {data}: is one image; give the folder that holds the images")
    try:
        if path.is_dir() and (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            opened = datasets.load_from_disk(str(path))
        elif shards or path.is_file():
            files = [glob.escape(file) for file in shards or [str(path)]]
            opened = datasets.load_dataset("parquet", data_files=files if shards else files[0])
        elif path.is_dir() and glob.has_magic(str(path.resolve())):  # `datasets` would take brackets for a pattern
            opened = datasets.load_dataset("parquet", data_files=_split_files(path))
        else:
            opened = datasets.load_dataset(str(path) if local else data, config or None)
    except Exception as error:  # datasets raises whatever its readers raise
        raise SystemExit(
            f"--data {data}: {_why_not(data if not local else str(path), config, error, local)}"
        ) from None
    if isinstance(opened, datasets.DatasetDict):
        name = pick_split(list(opened), role, split, data)
        if name is None:
            return None
        opened = opened[name]
    elif role == "eval" or split:
        return pick_split((), role, split, data)  # None, or the error that there are no splits
    return opened


def named_config(data: str, config: str) -> tuple[str, str]:
    """("org/name", "small") of org/name:small, unless a file or folder is called so or a configuration is given."""
    path = Path(data).expanduser()
    if config or ":" not in data or path.exists() or _matching(path):
        return data, config
    data, _, config = data.rpartition(":")
    return data, config


def _matching(pattern: Path) -> list[str]:
    """The files that a shard pattern names; brackets in its folders may also be meant as they are."""
    plain = os.path.join(glob.escape(str(pattern.parent)), pattern.name)
    files = [file for each in (plain, str(pattern)) for file in sorted(glob.glob(each, recursive=True))]
    return list(dict.fromkeys(file for file in files if os.path.isfile(file)))


def _split_files(path: Path) -> dict[str, list[str]]:
    """{split: its parquet files} of a folder, by `datasets`' own rules on names."""
    from datasets.data_files import get_data_patterns

    base = glob.escape(str(path.resolve()))
    return {
        str(split): [f"{base}/{pattern}" for pattern in patterns]
        for split, patterns in get_data_patterns(base).items()
    }


def _why_not(name: str, config: str, error: Exception, local: bool) -> str:
    """What kept `datasets` from opening a data set, and the remedy."""
    import datasets

    cause, cache = error, str(datasets.config.HF_CACHE_HOME)
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    kept = {cache, os.path.realpath(cache), str(datasets.config.HF_DATASETS_CACHE)}
    if cause is not None and (any(place in str(cause) for place in kept) or not _writable(cache)):
        return (
            f"its cache {cache} cannot be written ({first_line(cause)}); set HF_HOME to a folder that can, with space"
        )
    try:
        configs = datasets.get_dataset_config_names(name)
    except Exception:  # not a data set at all: the first error says more
        configs = []
    if len(configs) > 1 and config not in configs or config and configs:
        has = f"has the configurations {', '.join(configs[:20])}"
        return f"--data-config {config}: {has}" if config else f"{has}; choose one with --data-config"
    remedy = "is the file whole?" if local else "check the id and the connection, or give a local folder"
    return f"cannot be opened ({first_line(error)}); {remedy}"


def _writable(folder: str) -> bool:
    while not os.path.exists(folder) and os.path.dirname(folder) != folder:
        folder = os.path.dirname(folder)
    return os.path.isdir(folder) and os.access(folder, os.W_OK)


def may_hold_images(file: Path) -> bool:
    """Whether a parquet file has a column of bytes; one that cannot be read may."""
    import pyarrow
    import pyarrow.parquet

    try:
        kinds = pyarrow.parquet.read_schema(file).types
    except (OSError, ValueError):
        return True
    parts = [kind.field(i).type for kind in kinds if pyarrow.types.is_struct(kind) for i in range(kind.num_fields)]
    return any(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) for kind in [*kinds, *parts])


def column_labels(table, column: str, image_column: str) -> Labels:
    """The labels in a column of a table, or in the first one that has classes or a usual name; images are not read for it."""
    import datasets

    columns = {name: feature for name, feature in table.features.items() if name != image_column}
    named = [k for k, f in columns.items() if isinstance(f, datasets.ClassLabel)]
    named += [k for k in LABEL_COLUMNS if k in columns]
    column = column or next(iter(named), "")
    feature = columns.get(column)
    if feature is None:
        return None, [], f"no label column; name one with --label-column: {', '.join(columns)}" if columns else ""
    if isinstance(feature, datasets.ClassLabel):
        return read_named_labels(table[column][:], feature.names, column)
    if not isinstance(feature, datasets.Value):
        kind = "structs" if isinstance(feature, dict) else f"{type(feature).__name__.lower()}s"
        return None, [], f"{column} holds {kind}, not one class an image"
    return read_labels(table[column][:], column)


def card_licence(data: str, path: Path | None) -> str:
    """The licence that a data set's card states, next to local files or on the Hub; nothing where there is no card."""
    from huggingface_hub import DatasetCard

    readme = None if path is None else (path if path.is_dir() else path.parent) / "README.md"
    if readme is not None and not readme.is_file():
        return ""
    try:
        stated = DatasetCard.load(data if readme is None else readme, ignore_metadata_errors=True).data
    except Exception:  # no card there, no connection, not YAML: nothing is stated
        return ""
    licence = stated.get("license_name") or stated.get("license") or ""
    return licence if isinstance(licence, str) else " and ".join(licence)
