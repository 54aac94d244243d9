"""results/tables.py: every figure it prints is the run's own.

* Scores before and after stand in the row of their run and judge; the mean of the axes
  weighs them alike, whatever the weights of the run were.
* The judge's gain is a share of the reward model's, where there is a judge and a gain.
* What the training cost counts its tokens and seconds alone.
* Ten answers are drawn by seed 0, not picked, and keep to one line each.
* A reward model's agreement with its test labels stands beside its interval, and the
  mean of its axes below.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "results" / "tables.py"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import tables

    return tables


def side(a: float, b: float, judge: tuple[float, float] | None) -> dict:
    found = {"reward_model": {"a": a, "b": b, "R": a}, "kl": 0.125,
             "base_perplexity": 2.0, "distinct_3_grams": 0.5, "length": 40.0,
             "cut_off": 0.25}
    if judge:
        found["judge"] = {"a": judge[0], "b": judge[1], "R": judge[0]}
    return found


def a_run(judge: bool = True) -> dict:
    return {"before": side(0.2, 0.6, (0.3, 0.5) if judge else None),
            "after": side(0.6, 0.5, (0.5, 0.5) if judge else None),
            "sampled_tokens": 4000, "trained_tokens": 12000, "training_seconds": 10.0,
            "peak_rss_gb": 0.5,
            "answers": [{"prompt": f"p{i}", "before": f"b{i}\n* x", "after": f"a{i}"}
                        for i in range(30)]}


def test_scores_stand_in_the_row_of_their_judge(tables):
    lines = tables.score_table({"one": a_run()})
    assert lines[2:] == [
        "| one | reward model | 0.200 → 0.600 | 0.600 → 0.500 | 0.400 → 0.550 |",
        "| one | judge | 0.300 → 0.500 | 0.500 → 0.500 | 0.400 → 0.500 |"]
    assert {line.count("|") for line in lines} == {6}


def test_the_judges_gain_is_a_share_of_the_reward_models(tables):
    lines = tables.text_table({"one": a_run(), "none": a_run(judge=False)})
    assert "| 50% of the reward model's | 0.125 | 2.00 → 2.00 |" in lines[2]
    assert "| none | – |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_the_cost_is_that_of_the_training(tables):
    none = a_run() | {"sampled_tokens": 0}
    assert tables.cost_table({"one": a_run(), "none": none})[2:] == [
        "| one | 4,000 | 12,000 | 10.0 | 2.5 | 0.50 |",
        "| none | 0 | 12,000 | 10.0 | – | 0.50 |"]


def test_ten_answers_are_drawn_by_seed_0_on_a_line_each(tables):
    lines = tables.answer_list(a_run())
    wanted = random.Random(0).sample(range(30), 10)
    assert [line for line in lines if "**" in line] == [
        f"{n}. **p{i}**" for n, i in enumerate(wanted, 1)]
    assert lines[1] == f"   * before: b{wanted[0]} * x"


def test_behaviours_of_the_tiny_world_stand_with_the_commonest_first(tables):
    run = a_run()
    for when, harmful in (("before", {"comply": 0.25, "evade": 0.75}),
                          ("after", {"other": 0.015, "comply": 0.985})):
        run[when]["behaviour"] = {"harmful": harmful, "benign": {"help": 1.0}}
    assert tables.behaviour_table({"one": run})[2:] == [
        "| one | harmful | evade 75%, comply 25% | comply 98% |",
        "| one | benign | help 100% | help 100% |"]


def a_report() -> dict:
    figures = {"rows": 9, "low": 0.25, "high": 0.75, "mae": 0.125, "mae_of_mean": 0.5}
    return {"axes": {"a": figures | {"spearman": 0.5},
                     "b": figures | {"spearman": 0.75, "rows": 7}}}


def test_a_reward_model_shows_its_axes_and_their_mean(tables):
    lines = tables.reward_table({"r": a_report()})
    assert lines[2:] == ["| r | a | 9 | 0.500 | 0.250 to 0.750 | 0.125 | 0.500 |",
                         "| r | b | 7 | 0.750 | 0.250 to 0.750 | 0.125 | 0.500 |",
                         "| r | mean | | 0.625 | | | |"]
    assert {line.count("|") for line in lines} == {8}


def test_every_run_shows_its_own_judges_under_the_path_that_was_typed(tables, tmp_path,
                                                                    capsys):
    gold = a_run()
    for when in ("before", "after"):
        gold[when]["gold"] = gold[when].pop("reward_model")
    names = []
    for folder, run in (("x", a_run(judge=False)), ("y", gold)):
        names.append(str(tmp_path / folder / "same"))
        (tmp_path / folder / "same").mkdir(parents=True)
        (tmp_path / folder / "same" / "summary.json").write_text(json.dumps(run))
    for order in (names, names[::-1]):
        assert tables.main(order) is None
        printed = capsys.readouterr().out
        assert f"| {names[0]} | reward model |" in printed
        assert f"| {names[1]} | judge |" in printed
        assert f"| {names[1]} | gold |" in printed


def test_runs_of_different_axes_are_refused(tables, tmp_path):
    for name, run in (("a", a_run()), ("b", a_run(judge=False))):
        if name == "b":
            for when in ("before", "after"):
                run[when]["reward_model"]["c"] = 0.5
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(run))
    problem = tables.main([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "different axes" in problem


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    for words in ([], [str(tmp_path)]):
        end = subprocess.run([sys.executable, str(PROGRAM), *words], check=False,
                             capture_output=True, text=True)
        assert end.returncode == 2
        assert len(end.stderr.splitlines()) == 1


def test_the_program_prints_all_parts(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(a_run()))
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "reward.json").write_text(json.dumps({"report": a_report()}))
    for words, gaps in ((["run"], 3), (["reward"], 0), (["reward", "run"], 4)):
        end = subprocess.run([sys.executable, str(PROGRAM), *words], check=True,
                             capture_output=True, text=True, cwd=tmp_path)
        assert end.stdout.count("\n\n") == gaps
