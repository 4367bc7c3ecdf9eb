"""A run's small files: written whole or not at all, read with one line where they are damaged. A chapter of hub.py."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write beside and rename into place, on the disk before it returns; the mode is the umask's.

    A file name in `content` that is not UTF-8 keeps its bytes. Raises SystemExit in one line, the old file in place.
    """
    content = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise SystemExit(f"{path}: {error.strerror}, not written; free space there, or choose another place") from None


def give_usual_mode(path: Path) -> None:
    """The mode that the umask gives a new file; safetensors makes its own readable to nobody else."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; {} where there is no file. Raises SystemExit in one line if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8 is a ValueError
        raise SystemExit(f"{path}: cannot be read ({type(error).__name__}: {error}); restore or delete it") from None
    if not isinstance(found, dict):
        raise SystemExit(f"{path}: holds a {type(found).__name__}, not an object; restore or delete it")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, whatever lies in it; [] where there is no file. Raises SystemExit if it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SystemExit(f"{path}: cannot be read ({error.strerror}); restore or delete it") from None


def read_records(path: Path) -> list[dict]:
    """The whole lines of a metrics.jsonl that name their step; a kill or a full disk cuts the last one."""
    records = []
    for line in read_lines(path):
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def reworded(error: SystemExit, text: str) -> SystemExit:
    """The error with another text; the exit code of a stop signal stays what it is."""
    return SystemExit(text) if isinstance(error.code, str) else error


def figures(results: dict) -> dict[str, float]:
    """The figures among a results.json's entries, without what no measurement gives."""
    return {k: v for k, v in results.items() if isinstance(v, float) and math.isfinite(v) and abs(v) < 1e15}


def one_line(value) -> str:
    """Text from a file for the terminal: no line breaks, control characters or bytes that are not UTF-8."""
    text = str(value).encode(errors="backslashreplace").decode()
    return "".join(c if c.isprintable() else " " for c in text)


def markdown(value) -> str:
    """Text from a file for a Markdown table: shown as it is, neither markup nor HTML."""
    text = one_line(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\|`[]!" else c for c in text)
