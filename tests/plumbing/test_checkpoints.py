"""Claims about plumbing/resume.py.

* A checkpoint brings back parameters and moments to the bit, and its JSON object.
* A broken, altered or foreign checkpoint is refused in one line.
* A checkpoint is due after so many steps, or about every five minutes.
* Lines that came after a checkpoint are cut off; others may not have changed.
* Ctrl-C, SIGTERM and a closed terminal are noted; a second signal insists, but for that
  of a terminal; the old handlers come back, and nohup is minded.
"""

import errno
import hashlib
import signal
import sys
import time

import pytest
import safetensors.torch
import torch

from plumbing.files import UserError
from plumbing.resume import (
    CheckpointTimer,
    Stop,
    checkpoint_about,
    keep_lines,
    load_checkpoint,
    save_checkpoint,
)


def training() -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """Two tensors from a fixed seed, and an AdamW that moves them."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 2).requires_grad_(), torch.randn(4).requires_grad_()]
    return weights, torch.optim.AdamW(weights, lr=0.1)


def take_steps(weights, optimizer, count: int, first: int) -> None:
    for i in range(first, first + count):
        optimizer.zero_grad()
        sum(((i + 1) * w).square().sum() for w in weights).backward()
        optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """A checkpoint after two steps, and its parameters."""
    weights, optimizer = training()
    take_steps(weights, optimizer, 2, 0)
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, weights, optimizer, {"step": 2, "lines": [3, "é"]})
    return path, weights


# ------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_brings_back_parameters_and_moments(saved):
    whole, optimizer = training()
    take_steps(whole, optimizer, 5, 0)
    other, optimizer = training()
    assert load_checkpoint(saved[0], other, optimizer) == {"step": 2, "lines": [3, "é"]}
    take_steps(other, optimizer, 3, 2)
    for a, b in zip(whole, other, strict=True):
        assert torch.equal(a, b)


def test_what_no_optimiser_moves_comes_back_too(tmp_path):
    weights, optimizer = training()
    kept = [torch.tensor(7), torch.arange(6).view(2, 3), torch.zeros(0, 4)]
    save_checkpoint(tmp_path / "x", weights + kept, optimizer, {})
    other, optimizer = training()
    blank = [torch.zeros_like(tensor) for tensor in kept]
    load_checkpoint(tmp_path / "x", other + blank, optimizer)
    assert all(map(torch.equal, weights + kept, other + blank))
    assert not optimizer.state_dict()["state"]  # no step was taken yet


def test_the_object_is_read_without_the_tensors(saved):
    about = checkpoint_about(saved[0])
    assert (about["step"], about["lines"]) == (2, [3, "é"])


def rewritten(path, change) -> None:
    """The checkpoint with other tensors, its object unchanged."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("name", [
    "parameter.0", "parameter.1", "optimizer.0.exp_avg", "optimizer.1.exp_avg_sq",
    "optimizer.0.step"])
def test_an_altered_tensor_is_refused(saved, name):
    rewritten(saved[0], lambda tensors: tensors[name].view(-1)[:1].add_(1))
    with pytest.raises(UserError, match=r"not a checkpoint of this run \(its SHA-256"):
        load_checkpoint(saved[0], *training())


def test_a_broken_file_is_refused(saved):
    path, _ = saved
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"x" * 1000):
        path.write_bytes(broken)
        for read in (checkpoint_about, lambda p: load_checkpoint(p, *training())):
            with pytest.raises(UserError, match="not a checkpoint of this run"):
                read(path)
    path.unlink()
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        checkpoint_about(path)


@pytest.mark.parametrize("metadata", [
    None, {"other": "x"}, {"about": "{"}, {"about": "[1]"}, {"about": "[" * 10_000}])
def test_a_file_without_an_object_is_refused(tmp_path, metadata):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "x", metadata)
    with pytest.raises(UserError, match="not a checkpoint of this run"):
        checkpoint_about(tmp_path / "x")


def test_a_checkpoint_of_other_sizes_is_refused(saved):
    weights, _ = training()
    wider = [torch.zeros(3, 3).requires_grad_(), torch.zeros(4).requires_grad_()]
    for parameters, trained, message in (
            (wider, weights, r"parameter 0 has shape \[3, 2\], not \[3, 3\]"),
            (weights, wider, "moments of parameter 0 have shapes"),
            ([*weights, torch.zeros(1)], weights, r"parameter\.2")):
        with pytest.raises(UserError, match=message):
            load_checkpoint(saved[0], parameters, torch.optim.AdamW(trained))


# ----------------------------------------------------------------------------- timers


def test_a_checkpoint_is_due_after_so_many_steps():
    due = CheckpointTimer(3)
    assert [step for step in range(1, 11) if due(step)] == [3, 6, 9]


def test_without_a_number_a_checkpoint_is_due_every_five_minutes(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    due, steps = CheckpointTimer(None), []
    for step in range(1, 11):  # of two minutes each
        now[0] += 120
        if due(step):
            steps.append(step)
    assert steps == [3, 6, 9]  # after 6, 12 and 18 minutes


# ------------------------------------------------------------------------------ lines


def test_lines_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "lines.jsonl"
    for content in (b"one\ntwo\nthree\n", b"one\ntwo\nthr", b"one\ntwo\n"):
        path.write_bytes(content)
        keep_lines(path, 2, hashlib.sha256(b"one\ntwo\n").hexdigest())
        assert path.read_bytes() == b"one\ntwo\n"
    keep_lines(path, 0, None)
    assert path.read_bytes() == b""
    keep_lines(tmp_path / "new.jsonl", 0, None)  # a run that only begins
    assert (tmp_path / "new.jsonl").read_bytes() == b""


def test_lines_that_have_changed_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    wanted = hashlib.sha256(b"one\ntwo\n").hexdigest()
    for content in (b"one\nTwo\nthree\n", b"one\n", b"one\ntwo"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="has changed since the checkpoint"):
            keep_lines(path, 2, wanted)
        assert path.read_bytes() == content


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_stops_at_once(number, capsys):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        assert "stopping after this step" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


@pytest.fixture
def hang_up():
    """SIGHUP as it is where no nohup has been, but for ending the tests."""
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    yield signal.SIGHUP
    signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_asks_for_a_stop_however_often(hang_up, capsys):
    before = signal.getsignal(hang_up)
    with Stop() as stop:
        for _ in range(3):  # the terminal's, the shell's, systemd's
            signal.raise_signal(hang_up)
        assert stop.asked
        assert capsys.readouterr().err.count("stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(hang_up) is before


def test_under_nohup_a_closed_terminal_stops_nothing(hang_up):
    signal.signal(hang_up, signal.SIG_IGN)
    with Stop() as stop:
        signal.raise_signal(hang_up)
        assert not stop.asked
    assert signal.getsignal(hang_up) is signal.SIG_IGN


def test_a_stop_is_asked_for_though_the_terminal_is_gone(hang_up, monkeypatch):
    class Gone:
        def write(self, _):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

    with Stop() as stop, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", Gone())
        signal.raise_signal(hang_up)
    assert stop.asked
