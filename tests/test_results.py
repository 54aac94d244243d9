"""results/: every figure of its READMEs, and of the main one, is the runs' own.

In 0.5b/:
* The tables and answers are what `python -m results` prints for the folders beside it.
* The noise that the text states is the largest difference between the two seeds.
* The commands name the settings of the runs; the checkpoint is named, no machine is.
In methods/:
* The tables of the methods, their ablations, their search and their cost are made from
  the summaries beside them, and these are of today's methods and settings.
* Every method that trains improves the gold scores in every seed; the share of harmful
  prompts that imitation complies with is what the text says.
In the main README:
* The small tables of both have the same rows and cells.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from methods import compare
from results import tables

ROOT = Path(__file__).parent.parent
MAIN = ROOT / "README.md"


def printed_by(folders: list[str], home: Path) -> str:
    """What `python -m results` prints for some folders of `home`."""
    return subprocess.run(
        [sys.executable, "-m", "results", *folders], cwd=home, check=True, text=True,
        capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout


def flowing(path: Path) -> str:
    """A page's text, whose lines may break anywhere."""
    return " ".join(path.read_text().split())


# ------------------------------------------------------------------------------- 0.5b/


HOME = ROOT / "results" / "0.5b"
REWARDS, RUNS = ["reward", "judge"], ["equal", "equal-seed-1", "safety"]
TEXT = (HOME / "README.md").read_text()


@pytest.fixture(scope="module")
def printed():
    return printed_by([*REWARDS, *RUNS], HOME)


def gains(name: str, who: str) -> dict[str, float]:
    run = json.loads((HOME / name / "summary.json").read_text())
    return {axis: run["after"][who][axis] - old
            for axis, old in run["before"][who].items()}


def test_the_tables_are_what_the_command_prints(printed):
    lines = list(filter(None, printed.splitlines()))
    assert len(lines) > 40
    for line in lines:
        assert line in TEXT


def test_the_rank_correlations_of_the_text_are_the_reports():
    report = json.loads((HOME / "reward" / "reward.json").read_text())["report"]
    spearmans = [figures["spearman"] for figures in report["axes"].values()]
    text = flowing(HOME / "README.md")
    assert f"{sum(spearmans) / 4:.3f}" in text
    assert " / ".join(f"{x:.3f}" for x in spearmans) in text


def test_the_main_readme_shows_the_same_figures(printed):
    text = MAIN.read_text()
    rows = [line for line in printed.splitlines()
            if re.match(r"\| equal \| (reward model|judge) \|", line)]
    assert len(rows) == 2
    for line in rows:
        assert line in text
    assert len(re.findall(r"^\| [\w-]+ \| (?:reward model|judge) \|", text, re.M)) == 2


def test_the_noise_between_two_seeds_is_stated():
    for who, name in (("reward_model", "reward model"), ("judge", "judge")):
        one, two = gains("equal", who), gains("equal-seed-1", who)
        largest = max(abs(one[axis] - two[axis]) for axis in one)
        assert f"{largest:.3f} by the {name}" in flowing(HOME / "README.md"), (
            name, largest)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_there_as_its_command_says(name):
    config = json.loads((HOME / name / "config.json").read_text())
    [command] = [line for line in TEXT.splitlines()
                 if line.endswith(f"--out runs/{name}")]
    [common] = re.findall(r'^S="(.*)"$', TEXT, re.M)
    words = dict(re.findall(r'--([\w-]+) ("[^"]*"|\S+)',
                            command.replace("$S", common)))
    for option, value in words.items():
        key = option.replace("-", "_")
        assert str(config[key]) == value.strip('"') or float(value) == config[key]
    assert (HOME / name / "metrics.jsonl").read_text().count("\n") == config["steps"]
    assert (HOME / name / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_checkpoint_is_named_and_no_machine_is():
    assert "Qwen2.5-Coder-0.5B-Instruct" in TEXT
    assert re.search(r"\b[0-9a-f]{64}\b", TEXT)
    for path in HOME.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md"):
            assert not re.search(r"\"/(?!/)\w+/", path.read_text()), path


# ---------------------------------------------------------------------------- methods/


METHODS = ROOT / "results" / "methods"


def summaries(name: str) -> dict[str, list[dict]]:
    return json.loads((METHODS / f"{name}.json").read_text())


def cells(lines: list[str]) -> dict[str, dict[str, str]]:
    """A Markdown table: first cell → title → cell."""
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                        for line in lines)
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


@pytest.mark.parametrize(("name", "table"), [
    ("compare", tables.comparison_tables), ("ablate", tables.comparison_tables),
    ("search", tables.search_table)])
def test_a_table_of_the_methods_is_that_of_its_runs(name, table):
    text, lines = (METHODS / "README.md").read_text(), table(summaries(name))
    assert "\n".join(lines) in text


def test_the_main_readme_shows_the_comparison():
    """In one table of fewer columns, with the cells of the methods' page."""
    outcomes = cells(tables.outcome_table(summaries("compare")))
    costs = cells(tables.training_table(summaries("compare")))
    text = MAIN.read_text().splitlines()
    [start] = [i for i, line in enumerate(text) if line.startswith("| method |")]
    shown = cells(text[start:text.index("", start)])
    assert list(shown) == ["(the base)", *compare.COMPARED]
    assert {*shown["GRPO"]} >= {"method", "gold: mean of axes", "KL, nats a token",
                                "training seconds", "trained parameters"}
    for name, row in shown.items():
        cost = costs.get(name, dict.fromkeys(costs["GRPO"], "–"))  # the base has none
        cost["training seconds"] = cost["training seconds, side by side"]
        for title, cell in row.items():
            assert cell == (cost | outcomes[name])[title], (name, title)


# Options that the published runs of all methods but GRPO did not have: their programs
# could not be resumed, and wrote no checkpoints.
NEW = ("save_every", "resume")


def difference(published: dict, grpo: dict, today: dict) -> dict[str, tuple]:
    """Today's settings that are not the published ones: name → (today's, published).

    A published None says: as GRPO has it; the program took GRPO's default then. What
    is published beside today's names are options that the method did not use.
    """
    inherited = {name: grpo.get(name) if value is None else value
                 for name, value in published.items()}
    return {name: (value, inherited.get(name, "missing"))
            for name, value in today.items()
            if not (name in inherited and inherited[name] == value)
            and not (name in NEW and name not in published and value is None)}


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Today's programs of a comparison, by its kind and their names."""
    of_search = {}
    with monkeypatch.context() as patch:
        patch.setattr(compare, "run_all",
                      lambda programs, *_: of_search.update(programs) or {})
        patch.setattr(compare, "write_table", lambda *_: None)
        compare.search([0], tmp_path)
    return {"compare": compare.COMPARED, "ablate": compare.ABLATED, "search": of_search}


@pytest.mark.parametrize("kind", ["compare", "ablate", "search"])
def test_the_methods_and_settings_are_todays(kind, programs, tmp_path):
    assert list(summaries(kind)) == list(programs[kind])
    grpo = summaries("compare")["GRPO"][0]["settings"]
    for name, runs in summaries(kind).items():
        for run in runs:
            today = compare.note_of(name, programs[kind][name], run["seed"],
                                    tmp_path)[1]["settings"]
            assert len(today) > 10
            assert difference(run["settings"], grpo, today) == {}, name


def test_another_setting_or_a_missing_one_is_a_difference():
    published = {"lr": 0.5, "steps": None, "lam": 1.0}
    grpo = {"lr": 0.25, "steps": 70}
    same = {"lr": 0.5, "steps": 70, "save_every": None}
    assert difference(published, grpo, same) == {}
    for change in ({"lr": 0.25}, {"steps": 60}, {"save_every": 5}, {"clip": 0.2},
                   {"steps": None}):
        assert difference(published, grpo, same | change).keys() == change.keys()


def test_every_method_that_trains_improves_in_every_seed():
    for name, runs in summaries("compare").items():
        assert [run["seed"] for run in runs] == [0, 1, 2]
        for run in runs:
            gain = run["after"]["gold"]["R"] - run["before"]["gold"]["R"]
            assert gain > 0.05, (name, run["seed"], gain)


def test_the_text_says_how_many_comply():
    text, shares = flowing(METHODS / "README.md"), {}
    for name, runs in summaries("compare").items():
        shares[name] = 100 * mean(run["after"]["behaviour"]["harmful"].get("comply", 0)
                                  for run in runs)
    base = 100 * mean(run["before"]["behaviour"]["harmful"]["comply"] for run in runs)
    three = [shares[name] for name in ("DPO", "SFT on the best", "best of 8")]
    assert f"comply with {min(three):.0f}-{max(three):.0f}% of the harmful" in text
    assert f"(the base: {base:.0f}%)" in text


def test_what_a_step_costs_is_the_runs_own():
    text = (METHODS / "README.md").read_text()
    names = [str(p.parent.relative_to(METHODS))
             for p in METHODS.glob("cost-*/*/summary.json")]
    assert len(names) == 8
    lines = printed_by(sorted(names), METHODS).splitlines()
    for name in names:
        [line] = [line for line in lines
                  if re.match(rf"\| {re.escape(name)} \| [\d,]+ \|", line)]
        assert line in text


def test_the_costs_over_those_of_grpo_are_the_runs_own():
    def ratios(method: str, key: str, digits: str) -> list[str]:
        sides = []
        for size in ("tiny", "0.5b"):
            own, grpo = (json.loads((METHODS / f"cost-{size}" / name / "summary.json")
                                    .read_text())[key] for name in (method, "grpo"))
            sides.append(f"{own / grpo:{digits}} ×")
        return sides

    text = (METHODS / "README.md").read_text()
    for title, name in (("PPO", "ppo"), ("PPO, one pass", "ppo-one-epoch"),
                        ("DPO, one pass", "dpo")):
        row = [title, *ratios(name, "training_seconds", ".1f"),
               *ratios(name, "peak_rss_gb", ".2f")]
        assert f"| {' | '.join(row)} |" in text
