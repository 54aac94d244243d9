"""Bookkeeping: errors, files, settings and tables. Nothing of the method lives here.

The files of the method (model, lora, logprob, sample, reward_model, grpo) stay readable
because what every program needs stands here once: one clear line for bad input, files
written whole, checksums, and a command line generated from one dataclass of settings.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

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
              "--prompts-per-step or --max-new-tokens (grpo.py --plan tells the need)",
              file=sys.stderr)
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
        raise UserError(f"cannot write {file.name}: {error.strerror}; make room; a run "
                        "of grpo.py goes on from its checkpoint with --resume"
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


def _checked_row(line: str, where: str, responses: bool, labels: bool) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    require(isinstance(row, dict), f"{where}: expected a JSON object, found "
            f"{type(row).__name__}")
    for field in ("prompt", "response") if responses else ("prompt",):
        require(isinstance(row.get(field), str), f"{where}: \"{field}\" must be a text")
    halves = any("\ud800" <= c <= "\udfff" for c in json.dumps(row, ensure_ascii=False))
    require(not halves, f"{where}: the row holds half a surrogate pair; save the file "
            "as proper UTF-8")
    require(bool(row["prompt"].strip()), f"{where}: the prompt is empty")
    if labels:
        _check_scores(row.get("scores"), where)
    return row


def _check_scores(scores: object, where: str) -> None:
    require(isinstance(scores, dict) and bool(scores), f"{where}: \"scores\" must name "
            "at least one axis")
    for axis, score in scores.items():
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        require(number and 0 <= score <= 1,  # false for NaN too
                f"{where}: score of {axis} is {json.dumps(score)}, expected a number "
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


# ----------------------------------------------------------------------- checkpoints


class Stop:
    """Ctrl-C and SIGTERM ask for a stop after the current step; a second one insists.

    Inside `with Stop() as stop:`, a loop looks at `stop.asked` after every step.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)


class Due:
    """When to write a checkpoint: every `every` steps, or about every five minutes."""

    MINUTES = 5

    def __init__(self, every: int | None) -> None:
        self.every, self.last = every, time.monotonic()

    def __call__(self, step: int) -> bool:
        """Is one due after this step? Call it once a step."""
        if self.every is not None:
            return step % self.every == 0
        due = time.monotonic() - self.last >= 60 * self.MINUTES
        if due:
            self.last = time.monotonic()
        return due


def save_checkpoint(path: Path, parameters: list[Tensor],
                    optimizer: torch.optim.Optimizer, about: dict) -> None:
    """Write parameters, the optimiser's moments and a JSON object as one file, whole.

    One file, so that its renaming replaces the last checkpoint at once: there is never
    a moment without a good one, nor one with halves of two.
    """
    tensors = {f"parameter.{i}": p for i, p in enumerate(parameters)}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in state.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = about | {"sha256": _tensors_sha256(tensors)}
    write_whole(path, safetensors.torch.save(tensors, {"about": json.dumps(about)}))


def _tensors_sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
                      if tensors[name].dim() else str(tensors[name].item()).encode())
    return digest.hexdigest()


def checkpoint_about(path: Path) -> dict:
    """The JSON object of a checkpoint, without its tensors."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
        if not isinstance(about, dict):
            raise ValueError("no JSON object")
    except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError,
            RecursionError) as error:
        raise _not_ours(path, error) from error
    return about


def _not_ours(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is not a checkpoint of this run ({error}); delete it to "
                     "start the training again")


@torch.no_grad()
def load_checkpoint(path: Path, parameters: list[Tensor],
                    optimizer: torch.optim.Optimizer) -> dict:
    """Put everything back that `save_checkpoint` wrote; return its JSON object.

    Raises:
        UserError: a broken file, or one of other sizes.
    """
    about = checkpoint_about(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if about.pop("sha256") != _tensors_sha256(tensors):
            raise ValueError("its SHA-256 differs")
        state: dict[int, dict[str, Tensor]] = {}
        for name in tensors:
            kind, _, rest = name.partition(".")
            if kind == "optimizer":
                number, _, key = rest.partition(".")
                state.setdefault(int(number), {})[key] = tensors[name]
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        for i, parameter in enumerate(trained):
            shape = tuple(parameter.shape)
            found = {key: tuple(value.shape) for key, value in state.get(i, {}).items()}
            if found not in ({}, {"step": (), "exp_avg": shape, "exp_avg_sq": shape}):
                raise ValueError(f"moments of parameter {i} have shapes {found}")
        for i, parameter in enumerate(parameters):
            found = tensors[f"parameter.{i}"]
            if found.shape != parameter.shape:
                raise ValueError(f"parameter {i} has shape {list(found.shape)}, not "
                                 f"{list(parameter.shape)}")
            parameter.copy_(found)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError,
            RuntimeError) as error:
        raise _not_ours(path, error) from error
    return about


def keep_lines(path: Path, count: int, sha256: str | None) -> None:
    """Keep the first `count` lines of a file: others came after the checkpoint.

    Args:
        sha256: of these lines, as the checkpoint has it; None where there is none.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    kept = b"".join(line + b"\n" for line in lines[:count])
    require(sha256 in (None, hashlib.sha256(kept).hexdigest()),
            f"{path} has changed since the checkpoint was written; put the old one "
            "back, or start another run")
    write_whole(path, kept)


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


# -------------------------------------------------------------------------- settings


def option(default: object, help: str, **extra: object) -> dataclasses.Field:
    """A field of a settings dataclass that is also a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help, **extra})


def parse_settings(cls: type, description: str, argv: list[str] | None = None):
    """Build `argparse` from the fields of a settings dataclass, and fill it.

    A field `group_size: int = option(8, "...")` becomes `--group-size N`; its default
    and help come from the field, so the two cannot drift apart.
    """
    return cls(**vars(_parser(cls, description).parse_args(argv)))


def given_options(cls: type, argv: list[str] | None = None) -> dict[str, object]:
    """Only the options that stand on the command line, whatever their value."""
    parser = _parser(cls, "")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _parser(cls: type, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    for field in dataclasses.fields(cls):
        extra = dict(field.metadata)
        extra["help"] = extra["help"].replace("%", "%%")  # argparse formats it
        if field.default not in (None, "", False):
            extra["help"] += " (default: %(default)s)"
        positional = extra.pop("positional", False)
        # `from __future__ import annotations` is not used, so a type is a type; for
        # `int | None` the type that reads the text is the first of the union.
        kind = getattr(field.type, "__args__", (field.type,))[0]
        name = field.name if positional else "--" + field.name.replace("_", "-")
        if kind is bool:
            parser.add_argument(name, action="store_true", **extra)
        else:
            parser.add_argument(name, type=kind, default=field.default, **extra)
    return parser


def saved_settings(cls: type, saved: dict, given: dict, where: Path):
    """Settings of an earlier run, to go on with.

    Args:
        saved: fields by name, as JSON holds them.
        given: options that were typed now; they must say the same.

    Raises:
        UserError: other settings, which are named; or a file that is not ours.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    missing = [name for name in fields if name not in saved]
    require(not missing, f"{where} lacks {', '.join(missing)}; it is not from this "
            "version of the program")
    other = [f"--{name.replace('_', '-')} {saved[name]} (not {value})"
             for name, value in given.items() if str(value) != str(saved[name])]
    require(not other, f"{where} was made with {', '.join(other)}; leave these out, or "
            "start another run")
    return cls(**{name: _saved_value(field, saved[name], where)
                  for name, field in fields.items()})


def _saved_value(field: dataclasses.Field, value: object, where: Path) -> object:
    """A setting from a file, with the type and the choices of the command line."""
    kinds = getattr(field.type, "__args__", (field.type,))
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    good = {bool: type(value) is bool, int: type(value) is int and abs(value) < 2 ** 31,
            float: type(value) in (int, float) and abs(value) < 1e30,
            str: isinstance(value, str), Path: isinstance(value, str)}[kind]
    if isinstance(value, str):
        good = good and len(value) < 4096 and value.isprintable()
    require(good and value in field.metadata.get("choices", [value]),
            f"{where}: {field.name} is {value!r}; it was changed by hand?")
    return kind(value)


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
