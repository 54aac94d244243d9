"""Bookkeeping: errors, files, settings and tables. Nothing of the method lives here.

The files of the method (model, lora, logprob, sample, reward_model, grpo) stay readable
because what every program needs stands here once: one clear line for bad input, files
written whole, checksums, and a command line generated from one dataclass of settings.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import sys
import tempfile
from pathlib import Path

CHECKSUMS = "SHA256SUMS"


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do about it."""


@contextlib.contextmanager
def one_line_errors():
    """Turn a UserError into one line on stderr and exit status 2: no traceback."""
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by the keyboard; nothing more was written", file=sys.stderr)
        sys.exit(130)


# ----------------------------------------------------------------------------- files


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `path` so that a reader sees the old file or the new one, never a part.

    The temporary file lies in the same folder: a rename is atomic only within one
    file system.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another "
                        "folder with --out") from error


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, whole."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        UserError: no such file, not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def read_rows(path: Path, responses: bool, labels: bool = False) -> list[dict]:
    """Read a JSONL file of prompts, with responses and scores where they are asked for.

    Args:
        path: one JSON object a line: `prompt`, `response`, `scores` {axis: 0..1}.
        responses: every row needs a `response`.
        labels: every row needs `scores`.

    Raises:
        UserError: naming file, line and what to mend.
    """
    try:
        # Not `splitlines`, which also cuts at U+2028 and others that JSON allows.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read {path}: {why}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            rows.append(_checked_row(line, f"{path}:{number}", responses, labels))
    if not rows:
        raise UserError(f"{path} has no rows; each line is a JSON object")
    return rows


def _checked_row(line: str, where: str, responses: bool, labels: bool) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for field in ("prompt", "response") if responses else ("prompt",):
        text = row.get(field)
        if not isinstance(text, str):
            raise UserError(f"{where}: \"{field}\" must be a text")
    if any("\ud800" <= c <= "\udfff" for c in json.dumps(row, ensure_ascii=False)):
        raise UserError(f"{where}: the row holds half a surrogate pair; save the file "
                        "as proper UTF-8")
    if not row["prompt"].strip():
        raise UserError(f"{where}: the prompt is empty")
    if labels:
        _check_scores(row.get("scores"), where)
    return row


def _check_scores(scores: object, where: str) -> None:
    if not isinstance(scores, dict) or not scores:
        raise UserError(f"{where}: \"scores\" must name at least one axis")
    for axis, score in scores.items():
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if not number or not 0 <= score <= 1:  # false for NaN too
            raise UserError(f"{where}: score of {axis} is {json.dumps(score)}, "
                            "expected a number from 0 to 1")


def write_checksums(folder: Path, names: list[str] | None = None) -> None:
    """List SHA-256s as `sha256sum` does: of `names`, or of every file of `folder`."""
    if names is None:
        names = sorted(f.name for f in folder.iterdir()
                       if f.is_file() and f.name != CHECKSUMS)
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in names]
    write_whole(folder / CHECKSUMS, "".join(lines))


def verify_checksums(folder: Path) -> None:
    """Refuse a folder of ours in which a file was altered; others carry no list.

    Raises:
        UserError: a listed file is missing or has another SHA-256.
    """
    listing = folder / CHECKSUMS
    if not listing.is_file():
        return
    for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        file = folder / name
        if not name or Path(name).name != name or not file.is_file():
            raise UserError(f"{listing} names a file that is not there: {name!r}")
        if file_sha256(file) != digest:
            raise UserError(f"{file} is not the file that was written (its SHA-256 "
                            f"differs from {CHECKSUMS}); restore or retrain it")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -------------------------------------------------------------------------- settings


def option(default: object, help: str, **extra: object) -> dataclasses.Field:
    """A field of a settings dataclass that is also a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


def parse_settings(cls: type, description: str, argv: list[str] | None = None):
    """Build `argparse` from the fields of a settings dataclass, and fill it.

    A field `group_size: int = option(8, "...")` becomes `--group-size N`; its default
    and help come from the field, so the two cannot drift apart.
    """
    parser = argparse.ArgumentParser(description=description)
    for field in dataclasses.fields(cls):
        extra = dict(field.metadata)
        extra["help"] = extra["help"].replace("%", "%%")  # argparse formats it
        if field.default not in (None, ""):
            extra["help"] += " (default: %(default)s)"
        positional = extra.pop("positional", False)
        # `from __future__ import annotations` is not used, so a type is a type; for
        # `int | None` the type that reads the text is the first of the union.
        kind = getattr(field.type, "__args__", (field.type,))[0]
        name = field.name if positional else "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=kind, default=field.default, **extra)
    return cls(**vars(parser.parse_args(argv)))


def require(condition: bool, message: str) -> None:
    """Refuse with one line unless `condition` holds."""
    if not condition:
        raise UserError(message)


# --------------------------------------------------------------------------- figures


def peak_rss_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # Linux counts KiB


def available_memory() -> int:
    """Bytes of main memory that a new allocation could use."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all memory is the best guess
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def format_table(header: list[str], rows: list[list[object]]) -> str:
    """Align columns: text to the left, numbers (three decimals) to the right."""
    cells = [header] + [
        [f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("  ".join(
            [first] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        ))
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """`75.3` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
