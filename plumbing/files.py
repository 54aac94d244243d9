"""Files and errors: one clear line for bad input, and nothing half-written.

Every file is written to a temporary name in its own folder, flushed and renamed; a
folder that is finished carries SHA-256 checksums; one process at a time writes it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

CHECKSUMS = "SHA256SUMS"
CHECKPOINT = "checkpoint.safetensors"  # only in a folder that is not finished


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do about it.

    It may quote a stranger's file, so it is cut to a length that a terminal can show.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= 1000 else message[:1000] + " …")


def require(condition: bool, message: str) -> None:
    """Refuse with one line unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def one_line_errors():
    """Turn a UserError into one line on stderr and exit status 2: no traceback."""
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print(f"{Path(sys.argv[0]).name}: error: out of memory; lower --group-size, "
              "--prompts-per-step or --max-new-tokens (python -m benchmarks.plan tells "
              "what a run needs)",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped by the keyboard; nothing more was written", file=sys.stderr)
        sys.exit(130)


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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too, outlives a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another "
                        "folder with --out") from error


def append_line(file, record: dict) -> None:
    """Add a JSON line to a file opened with `append`, at once and whole.

    Raises:
        UserError: the disk is full, or gone.
    """
    data = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    try:
        while data:  # a disk that is nearly full takes a part
            data = data[file.write(data):]
    except OSError as error:
        raise UserError(f"cannot write {file.name}: {error.strerror}; make room, and "
                        "go on from the checkpoint with --resume"
                        ) from error


def append(path: Path):
    """Open a file for `append_line`: without a buffer, which a full disk would keep."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


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
    require(isinstance(content, dict), f"{path} must hold a JSON object, not "
            f"{type(content).__name__}")
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
    require(bool(rows), f"{path} has no rows; each line is a JSON object")
    return rows


def _checked_row(line: str, place: str, responses: bool, labels: bool) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from error
    require(isinstance(row, dict), f"{place}: expected a JSON object, found "
            f"{type(row).__name__}")
    for field in ("prompt", "response") if responses else ("prompt",):
        require(isinstance(row.get(field), str), f"{place}: \"{field}\" must be a text")
    halves = any("\ud800" <= c <= "\udfff" for c in json.dumps(row, ensure_ascii=False))
    require(not halves, f"{place}: the row holds half a surrogate pair; save the file "
            "as proper UTF-8")
    require(bool(row["prompt"].strip()), f"{place}: the prompt is empty")
    if labels:
        _check_scores(row.get("scores"), place)
    return row


def _check_scores(scores: object, place: str) -> None:
    require(isinstance(scores, dict) and bool(scores), f"{place}: \"scores\" must name "
            "at least one axis")
    for axis, score in scores.items():
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        require(number and 0 <= score <= 1,  # false for NaN too
                f"{place}: score of {axis} is {json.dumps(score)}, expected a number "
                "from 0 to 1")


def write_checksums(folder: Path, names: list[str] | None = None) -> None:
    """List SHA-256s as `sha256sum` does: of `names`, or of every file of `folder`.

    "Every" leaves out what will not stay: checkpoints, and temporary files of a process
    that was killed.
    """
    if names is None:
        names = sorted(f.name for f in folder.iterdir() if f.is_file()
                       and f.name not in (CHECKSUMS, CHECKPOINT)
                       and not f.name.startswith("."))
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
        require(bool(name) and Path(name).name == name and file.is_file(),
                f"{listing} names a file that is not there: {name!r}")
        require(file_sha256(file) == digest, f"{file} is not the file that was written "
                f"(its SHA-256 differs from {CHECKSUMS}); restore or retrain it")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Refuse a second process that writes the same run folder.

    The lock is on the folder itself and dies with the process, so that a run that was
    killed can be resumed at once.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; choose another "
                        "--out") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is writing {folder}; choose another "
                            "--out, or wait for it") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if it is empty: a refused run leaves nothing behind
    finally:
        os.close(handle)
