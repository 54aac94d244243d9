"""Every method is a file of `methods/`, and all of them live in one house.

* Every method that trains moves the policy, and leaves the same files as grpo.py; page,
  tables and chat take its run.
* A run is resumed by its own method only (that it ends with the same bytes:
  test_resume.py).
* A method that nobody has heard of costs a file of 40 lines: it runs, stops, resumes
  and reports like the others.
* An option that a method does not have, a number out of bounds and an unknown name are
  refused before anything runs.
* slow: two processes make the run of one.
"""

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import grpo
import methods
import run
import sample
from methods import __main__ as program
from plumbing.files import UserError, read_json, verify_checksums
from results import __main__ as results

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "4", "--device", "cpu"]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------ its run


@pytest.mark.parametrize("method", ["ppo", "dpo", "sft"])
def test_every_method_runs_and_leaves_the_files_of_a_run(method, tmp_path, capsys):
    folder = tmp_path / "run"
    program.main([method, *SHORT, "--out", str(folder)])
    assert files_of(folder) == {
        "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "SHA256SUMS",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/SHA256SUMS"}
    verify_checksums(folder)
    lines = read_lines(folder / "metrics.jsonl")
    assert sum(m["tokens"] for m in lines) > 0
    assert sum(m["trained_tokens"] for m in lines) > 0
    summary = read_json(folder / "summary.json")
    assert summary["after"]["kl"] > 1e-9  # it has moved
    # The folder names what the method uses, and no more.
    config, defaults = read_json(folder / "config.json"), settings_of(method)
    assert config["method"] == method
    assert ("lam" in config, "beta" in config, "inner_steps" in config) == (
        method == "ppo", method != "sft", False)
    assert config["rank"] == grpo.Settings().resolved().rank
    assert config["epochs"] == defaults.epochs
    advantages = [row["advantage"] for row in read_lines(folder / "samples.jsonl")]
    if method == "ppo":  # of the critic, whitened over the step's tokens
        assert min(advantages[:8]) < 0 < max(advantages[:8])
        assert min(advantages[8:]) < 0 < max(advantages[8:])
        # GRPO's words have no meaning here.
        assert not {"dead_groups", "clip_share"} & lines[0].keys()
    assert "tiny" in summary["model"]
    # What is made for runs of grpo.py takes these too: the page and the chat.
    assert results.main([str(folder)]) == 0
    assert (folder / "report.html").is_file()
    sample.main(["--adapter", str(folder), "--max-new-tokens", "4", "Hello!"])
    assert "aligned: " in capsys.readouterr().out


def settings_of(method: str) -> run.Settings:
    """The defaults of a method for the tiny model."""
    return importlib.import_module(f"methods.{method}").Settings().resolved()


# ------------------------------------------------------------- interrupted, and resumed


def outcome(folder: Path) -> dict:
    """All that a run leaves, without seconds and memory."""
    summary = read_json(folder / "summary.json")
    return {
        "files": files_of(folder),
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "samples": (folder / "samples.jsonl").read_bytes(),
        "metrics": [{k: v for k, v in line.items() if not k.startswith("seconds")}
                    for line in read_lines(folder / "metrics.jsonl")],
        "summary": {k: v for k, v in summary.items()
                    if k not in ("seconds", "training_seconds", "peak_rss_gb")}}


def before_line(step: int, action) -> object:
    """`run.Log.write` that does something before the line of this step."""
    write = run.Log.write

    def write_after(log, metrics, samples=()):
        if metrics["step"] == step:
            action()
        return write(log, metrics, samples)

    return write_after


def cut() -> None:
    raise RuntimeError("power cut")


def test_a_run_is_resumed_by_its_own_method_only(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run.Log, "write", before_line(1, cut))
        with pytest.raises(RuntimeError, match="power cut"):
            program.main(["ppo", *SHORT, "--out", str(folder)])
    for other in (lambda: program.main(["dpo", "--resume", str(folder)]),
                  lambda: grpo.main(["--resume", str(folder)])):
        with pytest.raises(UserError, match="is a run of 'ppo', not of .*; go on with: "
                           f"python -m methods ppo --resume {folder}"):
            other()


# ----------------------------------------------------------------- a method of your own


# The example of methods/README.md, word for word.
REINFORCE = re.search(r"^```python\n(.*?)^```$", (ROOT / "methods" / "README.md")
                      .read_text(), re.M | re.S)[1]


def test_a_method_costs_a_file_of_40_lines(tmp_path, monkeypatch, capsys):
    assert len(REINFORCE.splitlines()) <= 40
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "reinforce.py").write_text(REINFORCE)
    # As if the file lay beside the others, where `NAMES` lists it.
    monkeypatch.setattr(methods, "__path__", [*methods.__path__,
                                              str(tmp_path / "more")])
    monkeypatch.setattr(program, "NAMES", [*program.NAMES, "reinforce"])
    words = ["reinforce", *SHORT, "--steps", "4", "--group-size", "2", "--reward",
             "gold", "--save-every", "2"]
    try:
        program.main([*words, "--out", str(tmp_path / "whole")])
        with monkeypatch.context() as patch:
            patch.setattr(run.Log, "write", before_line(
                3, lambda: signal.raise_signal(signal.SIGTERM)))
            with pytest.raises(SystemExit) as end:
                program.main([*words, "--out", str(tmp_path / "run")])
        assert end.value.code == 130
        command = f"python -m methods reinforce --resume {tmp_path / 'run'}"
        assert f"go on with: {command}\n" in capsys.readouterr().err
        assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 3
        program.main(["reinforce", "--resume", str(tmp_path / "run")])
    finally:
        sys.modules.pop("methods.reinforce", None)
        vars(methods).pop("reinforce", None)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["after"]["kl"] > 1e-9
    # The mean of R is that of the steps before, not of the one that it is taken from.
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    rows, mean = read_lines(tmp_path / "run" / "samples.jsonl"), 0.0
    for line in lines:
        own = [row for row in rows if row["step"] == line["step"]]
        assert [row["advantage"] for row in own] == pytest.approx(
            [row["R"] - mean for row in own], abs=2e-4)
        mean += 0.1 * (line["R"] - mean)
    capsys.readouterr()
    assert results.main([str(tmp_path / "run")]) == 0
    assert "| gold | " in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").is_file()
    sample.main(["--adapter", str(tmp_path / "run"), "--max-new-tokens", "4", "Hello!"])
    assert "aligned: " in capsys.readouterr().out


# ---------------------------------------------------------------------- what is refused


def test_every_name_is_a_method_and_help_says_its_options(capsys):
    assert {"ppo", "dpo", "sft", "best_of_n"} <= set(program.NAMES)
    for name in program.NAMES:
        module = importlib.import_module(f"methods.{name}")
        assert hasattr(module, "train") or hasattr(module, "method"), name
        assert issubclass(module.Settings, run.Settings), name
        with pytest.raises(SystemExit) as end:
            program.main([name, "--help"])
        assert end.value.code == 0
        assert module.__doc__.split("\n")[0] in " ".join(
            capsys.readouterr().out.split()), name


@pytest.mark.parametrize(("words", "problem"), [
    (["dpo", "--lam", "1", "--value-lr", "1"], "--lam 1 --value-lr 1"),
    (["sft", "--beta", "1"], "--beta 1"),
    (["ppo", "--inner-steps", "2"], "--inner-steps 2")], ids=" ".join)
def test_options_of_another_method_are_refused(words, problem, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        program.main([*words, "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert f"unrecognized arguments: {problem}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("words", "problem"), [
    (["dpo", "--beta", "0"], "--beta is 0.0; it must be above 0"),
    (["sft", "--group-size", "1"], "--group-size is 1; it must be at least 2"),
    (["best_of_n", "--group-size", "1"], "--group-size is 1; it must be at least 2"),
    (["ppo", "--group-size", "0"], "--group-size is 0; it must be at least 1"),
    (["ppo", "--gamma", "1.5"], "--gamma is 1.5; it must be at least 0 and at most 1"),
    (["ppo", "--lam", "-1"], "--lam is -1.0; it must be at least 0 and at most 1"),
    (["ppo", "--beta", "-1"], "--beta is -1.0; it must be at least 0"),
    (["ppo", "--value-lr", "0"], "--value-lr is 0.0; it must be above 0"),
    (["ppo", "--clip", "1"], "--clip is 1.0; it must be above 0 and below 1"),
    (["sft", "--lr", "nan"], "--lr is nan; it must be above 0"),
    (["sft", "--epochs", "0"], "--epochs is 0; it must be at least 1"),
    (["rlhf"], "rlhf: expected one of .*ppo.*; or python grpo.py"),
    (["offline"], "offline: expected one of "),
    ([], "no name: expected one of ")], ids=" ".join)
def test_bad_input_is_refused_before_anything_runs(words, problem, tmp_path,
                                                   monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        program.main(words)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------- several processes


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "dpo", "sft"])
def test_two_processes_make_the_run_of_one(method, tmp_path):
    words = [method, *SHORT, "--prompts-per-step", "3", "--reward", "gold"]
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(free_port()), "-m", "methods", *words, "--out",
         str(tmp_path / "two")], cwd=ROOT, text=True, capture_output=True, check=False,
        timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("mean score before and after") == 1
    verify_checksums(tmp_path / "two")
    program.main([*words, "--out", str(tmp_path / "one")])
    folders = [tmp_path / "one", tmp_path / "two"]
    one, two = ([row["response"] for row in read_lines(folder / "samples.jsonl")]
                for folder in folders)
    count = 12 if method == "ppo" else len(one)  # before anything was learnt
    assert one[:count] == two[:count]
    one, two = (read_lines(folder / "metrics.jsonl") for folder in folders)
    assert len(one) == len(two)
    step = 0 if method == "ppo" else 2  # the first that learns
    for name in ("loss", "grad_norm", "value_loss", "value_grad_norm"):
        if method == "ppo" or not name.startswith("value"):
            assert two[step][name] == pytest.approx(one[step][name], rel=1e-3), name
    assert two[step]["trained_tokens"] == one[step]["trained_tokens"]
