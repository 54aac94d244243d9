"""Files and errors: one clear line for bad input, and nothing half-written.

Every file is written to a temporary name in its own folder, flushed and renamed; a
folder that is finished carries SHA-256 checksums; one process at a time writes it.
"""

import codecs
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from plumbing import machine
from plumbing.words import lasting_output, program

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
    """Turn bad input, a faulty machine and too little memory into one line, status 2.

    Everything else is a mistake of ours, and keeps its traceback. Until the block ends,
    words that cannot be shown stop nothing.
    """
    with lasting_output(), _one_line():
        yield


@contextlib.contextmanager
def _one_line():
    try:
        yield
    except KeyboardInterrupt:
        machine.say("\nstopped by the keyboard; nothing more was written (a run that "
                    "has begun goes on with --resume)")
        sys.exit(130)
    except Exception as error:
        line = explanation(error)
        if line is None:
            raise
        machine.say(f"{program()}: error: {line}")
        sys.exit(2)


def explanation(error: Exception) -> str | None:
    """What a person can do about an error, in one line; None: it is our mistake."""
    if machine.out_of_memory(error):
        return ("out of memory; lower --group-size, --prompts-per-step or "
                "--max-new-tokens (python -m benchmarks.plan tells what a run needs)")
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in machine.FAULTS:
        return f"cannot use {error.filename or 'a file'}: {error.strerror}"
    return None


def write_whole(path: Path, content: bytes | str) -> None:
    """Write `path` so that a reader sees the old file or the new one, never a part.

    The temporary file lies in the same folder: a rename is atomic only within one
    file system.
    """
    # A path may hold bytes that are no UTF-8, as half surrogates: JSON's "\\udcff".
    data = (content.encode("utf-8", "backslashreplace") if isinstance(content, str)
            else content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                machine.sync(file.fileno())
            machine.let_all_read(name)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first fault is the one to tell
                os.unlink(name)
            raise
        machine.sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; make room and go on "
                        "with --resume, or choose another folder with --out") from error


def append_line(file, record: dict) -> None:
    """Add a JSON line to a file opened with `append`, at once and whole.

    Raises:
        UserError: the disk is full, or gone.
    """
    data = (to_json(record) + "\n").encode("utf-8", "backslashreplace")
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


def finite(content: object) -> object:
    """The same with null for every number that JSON has not: NaN and infinities."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def to_json(content: object, indent: int | None = None) -> str:
    """JSON as every parser reads it; `finite` comes first."""
    return json.dumps(finite(content), indent=indent, ensure_ascii=False,
                      allow_nan=False)


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, whole."""
    write_whole(path, to_json(content, indent=1) + "\n")


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


def write_checksums(folder: Path, names: Sequence[str]) -> None:
    """List the SHA-256s of our own files, `names`, as `sha256sum` does.

    By name: what else lies in a folder (a log, somebody's notes) may change.
    """
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in sorted(names)]
    write_whole(folder / CHECKSUMS, "".join(lines))


# Lines that `sha256sum` writes, without --tag and with it. A backslash in front says
# that the name is escaped; "*" that the file was read as binary.
PLAIN = re.compile(r"(\\?)(?P<sum>[0-9a-fA-F]{64}) [ *](?P<name>.+)", re.DOTALL)
TAGGED = re.compile(r"(\\?)SHA256 \((?P<name>.+)\) = (?P<sum>[0-9a-fA-F]{64})",
                    re.DOTALL)
ESCAPES = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


def verify_checksums(folder: Path) -> None:
    """Refuse a folder in which a listed file was altered; many carry no list.

    The list may be ours, or anything that `sha256sum` writes.

    Raises:
        UserError: a line is no checksum, names a file that is not in this folder, or
            the file has another SHA-256.
    """
    listing = folder / CHECKSUMS
    if not listing.is_file():
        return
    try:
        # As the shell has names: bytes that are no UTF-8 stay what they are.
        text = os.fsdecode(listing.read_bytes().removeprefix(codecs.BOM_UTF8))
    except OSError as error:
        raise UserError(f"cannot read {listing}: {error.strerror}") from error
    lines = text.removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        match = PLAIN.fullmatch(line) or TAGGED.fullmatch(line)
        require(match is not None, f"{listing}:{number}: no checksum, as sha256sum "
                f"writes it: {line!r:.99}; restore the list, or delete it")
        name = match["name"]
        if match[1]:
            name = re.sub(r"\\[\\nr]", lambda m: ESCAPES[m[0]], name)
        file, parts = folder / name, Path(name).parts
        require(".." not in parts and not Path(name).is_absolute()
                and os.path.isfile(file), f"{listing}:{number} names a file that is "
                f"not there: {name!r:.99}")
        require(file_sha256(file) == match["sum"].lower(), f"{file} is not the file "
                f"that was written (its SHA-256 differs from {CHECKSUMS}); restore or "
                "retrain it")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Refuse a second process that writes the same run folder, and one without room.

    The lock is on the folder itself and dies with the process, so that a run that was
    killed can be resumed at once. Where folders have no locks a note says so.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = machine.open_folder(folder)
            if handle is not None:
                stack.callback(os.close, handle)
            free = machine.lock(handle)
            if free:
                stack.callback(_remove_if_empty, folder)  # of a run that was refused
                tempfile.TemporaryFile(dir=folder).close()  # is there a file to be had?
        except OSError as error:
            raise UserError(f"cannot write into {folder}: {error.strerror}; choose "
                            "another --out") from error
        require(free, f"another process is writing {folder}; choose another --out, or "
                "wait for it")
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
