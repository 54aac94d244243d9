"""A comparison of methods is made of its runs, and of nothing else.

* Its tables hold mean ± standard deviation of the runs' own figures.
* An interrupted comparison goes on where it was; a folder of another command, of other
  settings, or of somebody's own run is refused before anything runs.
* A run that is still being written is left alone; after a failure no other run begins,
  and one line says which file tells more.
* The settings that are compared are among those of the search.
* Bad input costs one line; a search's prompts are not those of the evaluation.
* slow: a search tries all its settings and sorts them by the rubric; an ablation goes
  on and draws its curves.
"""

import dataclasses
import json
import re
import types
from pathlib import Path

import pytest
import torch

import grpo
from loading import TINY
from methods import __main__ as methods
from methods import compare, ppo
from plumbing.files import (
    UserError,
    only_writer,
    read_json,
    write_checksums,
    write_json,
)
from plumbing.options import option
from results import tables

PPO = compare.program_of("ppo")
SHORT = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "4"]


# -------------------------------------------------------------------------- the tables


def test_the_tables_hold_mean_and_deviation_of_the_runs():
    def summary(r: float) -> dict:
        figures = {"gold": {"safety": r, "R": 0.99},
                   "reward_model": {"safety": r + 0.1, "R": 0.99},
                   "kl": 0.25, "tokens_an_answer": 30,
                   "behaviour": {"harmful": {"refuse_kind_step": 0.5}, "benign": {}}}
        return {"before": figures, "after": figures, "training_seconds": 9.0,
                "peak_rss_gb": 0.5, "sampled_tokens": 1000, "trained_tokens": 2000,
                "trained_parameters": 12345}

    lines = tables.comparison_tables({"GRPO": [summary(0.5), summary(0.7)]})
    # The mean of 0.5 and 0.7, and their deviation: 0.2 / √2. R has the run's weights,
    # which are not the same in every row: the mean of the axes is shown instead.
    assert "| GRPO | 0.600 ± 0.141 | 0.600 ± 0.141 | 0.700 ± 0.141 | 0.250 ± 0.000 | " \
        "50% ± 0% | 0% ± 0% |" in lines
    assert "| GRPO | 9 ± 0 | 9.00 ± 0.00 | 0.50 ± 0.00 | 1,000 | 2,000 | 12,345 | " \
        "30 |" in lines
    assert lines[2].startswith("| (the base) | 0.600")
    bound = summary(0.5)
    bound["after"] = bound["after"] | {"kl_is_a_bound": True}
    assert "| ≤ 0.250 |" in tables.comparison_tables({"best of 8": [bound]})[3]


# -------------------------------------------------------------------- its runs' folders


def broken_off(name: str, program: list[str], folder: Path) -> Path:
    """The folder of a run of seed 0 that was cut short: settings, and no checksums."""
    out, note = compare.note_of(name, program, 0, folder)
    write_json(out / "config.json", {})
    write_json(folder / f"{out.name}.json", note)
    return out


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    commands = []

    def finish(words, **_):
        commands.append(words[1:])
        out = Path(words[-1])
        write_json(out / "summary.json", {"seconds": len(commands)})
        write_checksums(out, ["summary.json"])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", finish)
    programs = {"GRPO": compare.GRPO, "PPO": PPO, "DPO": compare.program_of("dpo")}
    for name in ("GRPO", "PPO"):
        broken_off(name, programs[name], tmp_path)
    out = broken_off("DPO", programs["DPO"], tmp_path)
    (out / "config.json").rename(out / "samples.jsonl")  # nothing to go on with
    summaries = compare.run_all(programs, [0], tmp_path)
    assert sorted(commands) == [  # they run side by side
        ["-m", "methods", "dpo", "--device", "cpu", "--seed", "0", "--out",
         str(tmp_path / "dpo-0")],
        ["-m", "methods", "ppo", "--resume", str(tmp_path / "ppo-0")],
        [str(compare.ROOT / "grpo.py"), "--resume", str(tmp_path / "grpo-0")]]
    assert not (tmp_path / "dpo-0" / "samples.jsonl").exists()  # begun again
    assert summaries["PPO"][0]["settings"] == compare.note_of(
        "PPO", PPO, 0, tmp_path)[1]["settings"]
    assert compare.run_all(programs, [0], tmp_path) == summaries
    assert len(commands) == 3


def test_a_folder_of_other_settings_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", None)
    broken_off("GRPO", compare.GRPO, tmp_path)
    with pytest.raises(UserError, match="grpo-0 is of another command"):
        compare.run_all({"GRPO": [*compare.GRPO, "--steps", "3"]}, [0], tmp_path)
    broken_off("PPO", PPO, tmp_path)

    @dataclasses.dataclass(frozen=True)
    class Changed(ppo.Settings):
        lr: float = option(1e-3, "a default of tomorrow")

    monkeypatch.setattr(ppo, "Settings", Changed)
    with pytest.raises(UserError, match="of another command or of other set"):
        compare.run_all({"PPO": PPO}, [0], tmp_path)


def test_a_folder_that_is_not_ours_is_refused_before_anything_runs(tmp_path,
                                                                   monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", None)
    write_json(tmp_path / "dpo-1" / "config.json", {})  # somebody's own run
    with pytest.raises(UserError, match="dpo-1 is not from such a comparison"):
        compare.run_all({"PPO": PPO, "DPO": compare.program_of("dpo")}, [0, 1],
                        tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["dpo-1"]
    assert (tmp_path / "dpo-1" / "config.json").is_file()


def test_a_run_that_has_hardly_begun_elsewhere_is_left_alone(tmp_path):
    out = broken_off("PPO", PPO, tmp_path)
    (out / "config.json").rename(out / "samples.jsonl")
    with only_writer(out), pytest.raises(UserError, match="another process"):
        compare.run_all({"PPO": PPO}, [0], tmp_path)
    assert (out / "samples.jsonl").is_file()


@pytest.mark.slow
def test_a_run_that_is_still_being_written_is_left_alone(tmp_path, monkeypatch):
    def cut(*_):
        raise RuntimeError("power cut")

    program = [*PPO, *SHORT, "--reward", "gold"]
    out, note = compare.note_of("PPO", program, 0, tmp_path)
    monkeypatch.setattr(grpo, "sample_batch", cut)
    with pytest.raises(RuntimeError, match="power cut"):
        methods.main(note["command"][2:])
    write_json(tmp_path / "ppo-0.json", note)
    files = {path: path.read_bytes() for path in out.iterdir()}
    assert out / "config.json" in files
    with only_writer(out), pytest.raises(UserError, match="ended with status 2"):
        compare.run_all({"PPO": program}, [0], tmp_path)
    assert "another process is writing" in (tmp_path / "ppo-0.txt").read_text()
    assert files == {path: path.read_bytes() for path in out.iterdir()}


def test_after_a_failure_no_other_run_begins(tmp_path, monkeypatch):
    commands = []

    def fail(words, **_):
        commands.append(words)
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(compare.subprocess, "run", fail)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(UserError, match="ended with status 1"):
        compare.run_all({"PPO": PPO}, [0, 1, 2], tmp_path)
    assert len(commands) == 1


@pytest.mark.parametrize("program", [compare.GRPO, PPO], ids=["grpo", "ppo"])
def test_a_run_that_fails_ends_the_comparison_in_one_line(program, tmp_path):
    programs = {"broken": [*program, "--weights", "safety=x"]}
    with pytest.raises(UserError, match=r"status 2; see .*broken-0\.txt"):
        compare.run_all(programs, [0], tmp_path)
    assert "safety=x" in (tmp_path / "broken-0.txt").read_text()


# -------------------------------------------------------------------- what is compared


def test_settings_of_the_comparison_are_among_those_of_the_search(tmp_path):
    sizes = {name: compare.note_of("GRPO", compare.GRPO, 0, tmp_path)[1]["settings"][
        name] for name in ("group_size", "prompts_per_step")}
    for name, program in compare.COMPARED.items():
        method = "grpo" if program[0] == "grpo.py" else program[2]
        if method == "best_of_n":
            continue
        settings = compare.note_of(name, program, 0, tmp_path)[1]["settings"]
        grid = [sizes | options for options in compare.SEARCH[method]]
        assert any(options.items() <= settings.items() for options in grid), name


def test_a_search_has_held_out_prompts_of_its_own(tmp_path):
    compare.write_validation_prompts(tmp_path / "validation.jsonl", 5)
    ours, bundled = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "validation.jsonl", TINY / "prompts.jsonl"))
    held_out = [row["prompt"] for row in ours if row["split"] == "heldout"]
    assert len(set(held_out)) == 10
    assert not {*held_out} & {row["prompt"] for row in bundled}
    assert ([row for row in ours if row["split"] == "train"]
            == [row for row in bundled if row["split"] == "train"])


@pytest.mark.parametrize(("words", "problem"), [
    (["compare", "--seeds", "0,x"], "--seeds 0,x: expected different numbers"),
    (["compare", "--seeds", "0,0"], "--seeds 0,0: expected different numbers"),
    (["compare", "--seeds", "0,00"], "--seeds 0,00: expected different numbers"),
    (["ablate", "--seeds", "²"], "--seeds ²: expected different numbers"),
    (["search", "--seeds", "0,1"], "a search takes one seed: --seeds 0")])
def test_bad_seeds_are_refused_before_anything_runs(words, problem, tmp_path,
                                                    monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", None)
    with pytest.raises(UserError, match=re.escape(problem)):
        methods.main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [
    ["compare", "--steps", "3"], ["compare", "ablate"], ["search", "--lr", "1"]],
    ids=" ".join)
def test_a_comparison_has_no_options_of_a_run(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare.subprocess, "run", None)
    with pytest.raises(SystemExit) as end:
        methods.main([*words, "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------- whole programs


@pytest.mark.slow
def test_a_search_tries_all_settings_and_sorts_them_by_the_rubric(tmp_path, monkeypatch,
                                                                  capsys):
    monkeypatch.setattr(compare, "SEARCH", {
        "grpo": [{"steps": 1, "eval_prompts": 4, "max_new_tokens": 8, "lr": lr}
                 for lr in (1e-3, 2e-3)],
        "sft": [{"steps": 1, "eval_prompts": 4, "max_new_tokens": 8}]})
    methods.main(["search", "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert len(re.findall(r"^\| \w+ \| steps=1 ", table, re.M)) == 3
    gold = [float(x) for x in re.findall(r"lr=\S+ \| (\S+)", table)]
    assert len(gold) == 2
    assert gold == sorted(gold, reverse=True)


@pytest.mark.slow
def test_an_ablation_runs_goes_on_and_draws_its_curves(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare, "ABLATED", {
        "plain": [*compare.GRPO, *SHORT],
        "best of 4": [*compare.program_of("best_of_n"), *SHORT[4:]]})
    monkeypatch.setattr(compare, "LONG", {"a long run": [*compare.GRPO, *SHORT]})
    words = ["ablate", "--seeds", "3", "--out", str(tmp_path)]
    methods.main(words)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| plain | " in table
    assert "| best of 4 | " in table
    assert "a long run" not in table
    summaries = read_json(tmp_path / "summaries.json")
    assert "\n".join(tables.comparison_tables(summaries)) + "\n" == table
    for picture in ("plot.png", "a-long-run-3/curves.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    # A second time nothing is run again.
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/summary.json")}
    methods.main(words)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/summary.json")}
    assert len(times) == 3
