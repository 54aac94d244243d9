"""results/tables.py: every figure it prints is the run's own.

* Scores before and after stand in the row of their run and judge; the mean of the axes
  weighs them alike, whatever the weights of the run were.
* The judge's gain is a share of the reward model's, where there is a judge and a gain.
* What the training cost counts its tokens and seconds alone.
* Ten answers are drawn by seed 0, not picked, and keep to one line each.
* A reward model's agreement with its test labels stands beside its interval, and the
  mean of its axes below.
* Tables of a comparison hold mean ± standard deviation over the seeds, or settings with
  the best first.
"""

import json
import random
from pathlib import Path

import pytest

from results import tables
from results.files import BadInput


def side(a: float, b: float, judge: tuple[float, float] | None) -> dict:
    figures = {"reward_model": {"a": a, "b": b, "R": a}, "kl": 0.125,
               "base_perplexity": 2.0, "distinct_3_grams": 0.5, "length": 40.0,
               "cut_off": 0.25}
    if judge:
        figures["judge"] = {"a": judge[0], "b": judge[1], "R": judge[0]}
    return figures


def a_run(judge: bool = True) -> dict:
    return {"before": side(0.2, 0.6, (0.3, 0.5) if judge else None),
            "after": side(0.6, 0.5, (0.5, 0.5) if judge else None),
            "sampled_tokens": 4000, "trained_tokens": 12000, "training_seconds": 10.0,
            "peak_rss_gb": 0.5,
            "answers": [{"prompt": f"p{i}", "before": f"b{i}\n* x", "after": f"a{i}"}
                        for i in range(30)]}


def test_scores_stand_in_the_row_of_their_judge():
    lines = tables.score_table({"one": a_run()})
    assert lines[2:] == [
        "| one | reward model | 0.200 → 0.600 | 0.600 → 0.500 | 0.400 → 0.550 |",
        "| one | judge | 0.300 → 0.500 | 0.500 → 0.500 | 0.400 → 0.500 |"]
    assert {line.count("|") for line in lines} == {6}


def test_the_judges_gain_is_a_share_of_the_reward_models():
    lines = tables.text_table({"one": a_run(), "none": a_run(judge=False)})
    assert "| 50% of the reward model's | 0.125 | 2.00 → 2.00 |" in lines[2]
    assert "| none | – |" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_the_cost_is_that_of_the_training():
    none = a_run() | {"sampled_tokens": 0}
    assert tables.cost_table({"one": a_run(), "none": none})[2:] == [
        "| one | 4,000 | 12,000 | 10.0 | 2.5 | 0.50 |",
        "| none | 0 | 12,000 | 10.0 | – | 0.50 |"]


def test_ten_answers_are_drawn_by_seed_0_on_a_line_each():
    lines = tables.answer_list(a_run())
    wanted = random.Random(0).sample(range(30), 10)
    assert [line for line in lines if "**" in line] == [
        f"{n}. **p{i}**" for n, i in enumerate(wanted, 1)]
    assert lines[1] == f"   * before: b{wanted[0]} * x"


def test_behaviours_of_the_tiny_world_stand_with_the_commonest_first():
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


def test_a_reward_model_shows_its_axes_and_their_mean():
    lines = tables.reward_table({"r": a_report()})
    assert lines[2:] == ["| r | a | 9 | 0.500 | 0.250 to 0.750 | 0.125 | 0.500 |",
                         "| r | b | 7 | 0.750 | 0.250 to 0.750 | 0.125 | 0.500 |",
                         "| r | mean | | 0.625 | | | |"]
    assert {line.count("|") for line in lines} == {8}


def write(folder: Path, name: str, value: dict) -> str:
    folder.mkdir(parents=True)
    (folder / name).write_text(json.dumps(value))
    return str(folder)


def test_every_run_shows_its_own_judges_under_the_path_that_was_typed(tmp_path):
    gold = a_run()
    for when in ("before", "after"):
        gold[when]["gold"] = gold[when].pop("reward_model")
    one = write(tmp_path / "x" / "same", "summary.json", a_run(judge=False))
    two = write(tmp_path / "y" / "same", "summary.json", gold)
    for order in ([one, two], [two, one]):
        text = tables.tables(order)
        assert f"| {one} | reward model |" in text
        assert f"| {two} | judge |" in text
        assert f"| {two} | gold |" in text


def test_runs_of_different_axes_are_refused(tmp_path):
    other = a_run(judge=False)
    for when in ("before", "after"):
        other[when]["reward_model"]["c"] = 0.5
    folders = [write(tmp_path / "a", "summary.json", a_run()),
               write(tmp_path / "b", "summary.json", other)]
    with pytest.raises(BadInput, match="different axes"):
        tables.tables(folders)


def test_a_folder_without_what_the_tables_show_is_refused(tmp_path):
    with pytest.raises(BadInput, match="holds neither summary"):
        tables.tables([str(tmp_path)])
    half = write(tmp_path / "half", "summary.json", {"before": {}})
    with pytest.raises(BadInput, match=r"summary\.json lacks after, sampled_tokens"):
        tables.tables([half])
    (tmp_path / "half" / "summary.json").write_text('{"before"')
    with pytest.raises(BadInput, match="cannot read"):
        tables.tables([half])


def test_runs_and_reward_models_have_their_sections(tmp_path):
    run = write(tmp_path / "run", "summary.json", a_run())
    reward = write(tmp_path / "reward", "reward.json", {"report": a_report()})
    for folders, sections in (([run], 4), ([reward], 1), ([run, reward], 5)):
        assert len(tables.tables(folders).split("\n\n")) == sections


def a_summary(r: float) -> dict:
    side = {"gold": {"safety": r, "R": 0.99},
            "reward_model": {"safety": r + 0.1, "R": 0.99},
            "kl": 0.25, "tokens_an_answer": 30,
            "behaviour": {"harmful": {"refuse_kind_step": 0.5}, "benign": {}}}
    return {"before": side, "after": side, "training_seconds": 9.0,
            "peak_rss_gb": 0.5, "sampled_tokens": 1000, "trained_tokens": 2000,
            "trained_parameters": 12345}


def test_a_comparison_shows_mean_and_deviation_over_the_seeds():
    lines = tables.comparison_tables({"GRPO": [a_summary(0.5), a_summary(0.7)]})
    # The mean of 0.5 and 0.7, and their deviation: 0.2 / √2. R has the run's weights,
    # which are not the same in every row: the mean of the axes is shown instead.
    assert "| GRPO | 0.600 ± 0.141 | 0.600 ± 0.141 | 0.700 ± 0.141 | 0.250 ± 0.000 | " \
        "50% ± 0% | 0% ± 0% |" in lines
    assert "| GRPO | 9 ± 0 | 9.00 ± 0.00 | 0.50 ± 0.00 | 1,000 | 2,000 | 12,345 | " \
        "30 |" in lines
    assert lines[2].startswith("| (the base) | 0.600")


def test_the_bound_of_a_kl_says_so_and_one_seed_has_no_deviation():
    bound = a_summary(0.5)
    bound["after"] = bound["after"] | {"kl_is_a_bound": True}
    bound["sampled_tokens"] = 0
    lines = tables.comparison_tables({"best of 8": [bound]})
    assert "| ≤ 0.250 |" in lines[3]
    assert "| best of 8 | 9 | – | 0.50 |" in lines[-1]


def test_a_search_shows_the_best_settings_of_each_method_first():
    summaries = {name: [{"after": {"gold": {"R": gold}, "kl": 0.125,
                                   "reward_model": {"R": 0.5}}}]
                 for name, gold in (("ppo lr=1 lam=0", 0.25), ("dpo lr=1", 0.75),
                                    ("ppo lr=2 lam=0", 0.5))}
    assert tables.search_table(summaries)[2:] == [
        "| dpo | lr=1 | 0.750 | 0.500 | 0.125 |",
        "| ppo | lr=2 lam=0 | 0.500 | 0.500 | 0.125 |",
        "| ppo | lr=1 lam=0 | 0.250 | 0.500 | 0.125 |"]


@pytest.mark.parametrize(("name", "table"), [
    ("compare", tables.comparison_tables), ("ablate", tables.comparison_tables),
    ("search", tables.search_table)])
def test_the_published_tables_are_those_of_the_published_summaries(name, table):
    folder = Path(tables.__file__).parent / "methods"
    summaries = json.loads((folder / f"{name}.json").read_text())
    assert "\n".join(table(summaries)) in (folder / "README.md").read_text()
