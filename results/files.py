"""What the tables, the page and the pictures share: a folder's files, read and written.

Nothing of the project is imported here: a folder of results can be read on a machine
that has Python alone.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path


class BadInput(Exception):
    """A folder or file that cannot be shown; the message says which, and why."""


def require_keys(value: object, keys: tuple[str, ...], source: str) -> None:
    """Refuse a JSON value that is no object, or lacks one of the keys."""
    if not isinstance(value, dict):
        raise BadInput(f"{source} holds no JSON object")
    if missing := [key for key in keys if key not in value]:
        raise BadInput(f"{source} lacks {', '.join(missing)}")


def read_json(path: Path, *keys: str) -> dict:
    """The object of a JSON file, which must have these keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}: {error}") from error
    require_keys(value, keys, str(path))
    return value


def read_rows(path: Path, *keys: str) -> list[dict]:
    """The objects of a JSONL file, each of which must have these keys."""
    rows = []
    try:
        # Not `splitlines`, which also cuts at U+2028, which a response may hold.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if line:
                rows.append(json.loads(line))
                require_keys(rows[-1], keys, f"{path}, line {number},")
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot read {path}, line {len(rows) + 1}: {error}") from error
    return rows


def scored_steps(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl about steps whose responses were scored.

    DPO and SFT also have lines about training on pairs, without responses; best of n,
    which trains nothing, has no lines at all.
    """
    steps = [row for row in read_rows(folder / "metrics.jsonl") if "R" in row]
    for row in steps:
        require_keys(row, ("step", "axes", "length"), f"{folder}/metrics.jsonl")
    return steps


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` so that a reader sees the old file or the new one, never a part.

    The temporary file lies in the same folder: a rename is atomic only within one
    file system.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            with contextlib.suppress(OSError):  # some file systems have no permissions
                os.chmod(temporary, 0o644)  # mkstemp lets nobody else read it
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error
