"""What goes wrong while a run is under way ends as SECURITY.md says.

* A full disk or a folder that cannot be written ends the run with one line and status
  2; what was saved stays good, and the run resumes.
* A reward that is not a number, or has other axes than the weights, is refused.
* Results before words: nothing that hears them (a terminal with fewer letters, a closed
  pipe, a full disk behind it) costs any; a figure beyond a float is null.
* Empty responses and endless ones are responses; steps without a live group are noted.
"""

import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import grpo
import run
from plumbing.files import (
    CHECKPOINT,
    CHECKSUMS,
    UserError,
    read_json,
    verify_checksums,
)
from results import tables
from sample import Rollout

ROOT = Path(__file__).parent.parent
SHORT = ["--steps", "3", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "4", "--device", "cpu",
         "--save-every", "1"]


def program(*words: str, before=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "grpo.py"), *words], cwd=ROOT,
                          check=False, capture_output=True, text=True,
                          preexec_fn=before, env=os.environ | environment)


def small_files() -> None:
    """No file may grow beyond 3 kB: for the program, a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_a_full_disk_ends_the_run_with_one_line_and_the_run_resumes(tmp_path):
    end = program(*SHORT, "--out", str(tmp_path / "run"), before=small_files)
    assert end.returncode == 2
    assert "Traceback" not in end.stderr
    assert last_line(end.stderr).startswith("grpo.py: error: cannot write ")
    assert "File too large" in last_line(end.stderr)
    again = program("--resume", str(tmp_path / "run"))
    assert again.returncode == 0, again.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    verify_checksums(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_loaded(
        tmp_path, monkeypatch):
    monkeypatch.setattr(run, "load", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into"):
        grpo.main(["--out", str(tmp_path / "file" / "run")])


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no such file|cannot read"):
        grpo.main(["--prompts", "gone.jsonl", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None or os.geteuid() != 0,
                    reason="a small tmpfs needs root")
def test_a_small_tmpfs_ends_the_run_the_same_way(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk],
                             check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        end = program(*SHORT, "--out", str(disk / "run"))
        assert end.returncode == 2
        assert "Traceback" not in end.stderr
        assert "No space left on device" in last_line(end.stderr)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    end = program(*SHORT, "--out", str(tmp_path / "file" / "run"))
    assert end.returncode == 2
    assert "Traceback" not in end.stderr
    assert "cannot write" in last_line(end.stderr)


# -------------------------------------------------------------- results before words


@pytest.mark.slow
def test_a_terminal_that_is_not_utf8_costs_nothing(tmp_path):
    end = program(*SHORT, "--out", str(tmp_path / "run"), PYTHONIOENCODING="ascii")
    assert end.returncode == 0, end.stderr
    assert "2 prompts \\xd7 4 responses" in end.stdout
    verify_checksums(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_a_pipe_that_closes_costs_nothing(tmp_path):
    words = [sys.executable, str(ROOT / "grpo.py"), *SHORT, "--out",
             str(tmp_path / "run")]
    end = subprocess.run(
        ["bash", "-c", shlex.join(words) + " 2>&1 | head -1; exit ${PIPESTATUS[0]}"],
        cwd=ROOT, check=False, capture_output=True, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert (end.returncode, end.stderr) == (0, "")
    assert len(end.stdout.splitlines()) == 1
    verify_checksums(tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_results_are_on_disk_before_anything_is_said(monkeypatch, tmp_path):
    def said(*_) -> None:
        verify_checksums(tmp_path / "run")
        assert (tmp_path / "run" / CHECKSUMS).is_file()
        assert not (tmp_path / "run" / CHECKPOINT).exists()
        raise RuntimeError("said")

    monkeypatch.setattr(run, "print_report", said)
    with pytest.raises(RuntimeError, match="said"):
        grpo.main([*SHORT, "--out", str(tmp_path / "run")])


def test_a_perplexity_beyond_a_float_is_null(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(evaluate, "kl_and_surprise", lambda *_: (math.inf, 1e9))
    with pytest.MonkeyPatch.context() as patch:  # and before.json is read again
        patch.setattr(grpo, "train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            grpo.main([*SHORT, "--out", str(tmp_path / "run")])
    inner, titles = grpo.evaluate, []
    for module in (grpo, evaluate):
        monkeypatch.setattr(module, "evaluate", lambda run_, held_out, title: (
            titles.append(title) or inner(run_, held_out, title)))
    grpo.main(["--resume", str(tmp_path / "run")])
    assert titles == ["after"]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(),
                         parse_constant=pytest.fail)
    for when in ("before", "after"):
        assert summary[when]["base_perplexity"] is summary[when]["kl"] is None
    assert "perplexity beyond any number" in capsys.readouterr().out
    assert "| – → – |" in tables.tables([str(tmp_path / "run")])


def with_scores(monkeypatch, scores) -> None:
    """Let the reward model give what `scores(responses)` returns."""
    monkeypatch.setattr(run, "learned_scorer", lambda *_: lambda _, rows: scores(rows))


def test_a_reward_that_is_not_a_number_is_refused(monkeypatch, tmp_path):
    with_scores(monkeypatch, lambda rows: torch.full((len(rows), 4), float("nan")))
    with pytest.raises(UserError, match="score that is not finite"):
        grpo.main([*SHORT, "--out", str(tmp_path / "run")])


def test_weights_of_other_axes_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown axis 'brevity'"):
        grpo.main([*SHORT, "--weights", "brevity=1", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def with_responses(monkeypatch, length: int, ended: bool) -> None:
    """Let every response have so many tokens, the last an end token if it ended."""
    def sample(run_, prompts, step, group_size):
        stop = run_.tokenizer.stop_ids[0]
        rows = len(prompts) * group_size
        tokens = torch.full((rows, length), 50)
        if ended:
            tokens[:, -1] = stop
        return Rollout(tokens, torch.ones_like(tokens, dtype=torch.bool),
                       torch.zeros(rows, length), torch.full((rows,), ended))

    for module in (grpo, evaluate):
        monkeypatch.setattr(module, "sample_batch", sample)


@pytest.mark.parametrize(("length", "ended"), [(1, True), (16, False)],
                         ids=["empty", "endless"])
def test_empty_and_endless_responses_are_responses(length, ended, monkeypatch,
                                                   tmp_path):
    with_responses(monkeypatch, length, ended)
    grpo.main([*SHORT, "--out", str(tmp_path / "run")])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for metrics in map(json.loads, lines):
        assert metrics["length"] == length
        assert metrics["cut_off"] == (0 if ended else 1)
        assert metrics["dead_groups"] == 1  # all alike: nothing to compare
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["after"]["cut_off"] == (0 if ended else 1)


def test_many_steps_without_a_live_group_are_noted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "DEAD_STEPS", 2)
    with_scores(monkeypatch, lambda rows: torch.full((len(rows), 4), 0.5))
    grpo.main([*SHORT, "--out", str(tmp_path / "run")])
    assert capsys.readouterr().err.count("for 2 steps every group was dead") == 1
