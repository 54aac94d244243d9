"""Stop, save and go on: a run that was interrupted ends as if nothing had happened.

A checkpoint is one file, written whole; what came after it is cut off the files of
lines again.
"""

import hashlib
import json
import signal
import time
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from plumbing import machine
from plumbing.files import UserError, require, write_whole


class Stop:
    """Ctrl-C, SIGTERM or a closed terminal ask for a stop after the current step.

    Inside `with Stop() as stop:`, a loop looks at `stop.asked` after every step. Ctrl-C
    or SIGTERM insists when it comes second. SIGHUP never does: a terminal that closes
    sends it twice. Under nohup, which ignores it, it stays ignored.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is None or (
                    name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN):
                continue
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if not self.asked:
            self.asked = True
            machine.say("\nstopping after this step; once more to stop at once")
        elif number in (signal.SIGINT, signal.SIGTERM):
            raise KeyboardInterrupt


class CheckpointTimer:
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
            shapes = {key: tuple(value.shape)
                      for key, value in state.get(i, {}).items()}
            if shapes not in ({}, {"step": (), "exp_avg": shape, "exp_avg_sq": shape}):
                raise ValueError(f"moments of parameter {i} have shapes {shapes}")
        for i, parameter in enumerate(parameters):
            saved = tensors[f"parameter.{i}"]
            if saved.shape != parameter.shape:
                raise ValueError(f"parameter {i} has shape {list(saved.shape)}, not "
                                 f"{list(parameter.shape)}")
            parameter.copy_(saved)
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
