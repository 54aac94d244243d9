"""results/: every figure of its READMEs, and of the main one, is the runs' own.

In 0.5b/:
* The tables and answers are what `results/tables.py` prints for the folders beside it.
* The noise that the text states is the largest difference between the two seeds.
* The commands name the settings of the runs; the checkpoint is named, no machine is.
In methods/:
* The tables of the methods, their ablations, their search and their cost are made from
  the summaries beside them, and these are of today's methods and settings.
* Every method that trains improves the gold scores in every seed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

import baselines

ROOT = Path(__file__).parent.parent
HOME = ROOT / "results" / "0.5b"
REWARDS, RUNS = ["reward", "judge"], ["equal", "equal-seed-1", "safety"]
TEXT = (HOME / "README.md").read_text()


@pytest.fixture(scope="module")
def printed():
    return subprocess.run(
        [sys.executable, str(ROOT / "results" / "tables.py"), *REWARDS, *RUNS],
        cwd=HOME, check=True, capture_output=True, text=True).stdout


def gains(name: str, who: str) -> dict[str, float]:
    run = json.loads((HOME / name / "summary.json").read_text())
    return {axis: run["after"][who][axis] - old
            for axis, old in run["before"][who].items()}


def test_the_tables_are_what_the_command_prints(printed):
    for line in filter(None, printed.splitlines()):
        assert line in TEXT


def test_the_main_readme_shows_the_same_figures(printed):
    text = (ROOT / "README.md").read_text()
    report = json.loads((HOME / "reward" / "reward.json").read_text())["report"]
    found = [r["spearman"] for r in report["axes"].values()]
    assert f"{sum(found) / 4:.3f}" in text
    assert " / ".join(f"{x:.3f}" for x in found) in " ".join(text.split())
    rows = [line for line in printed.splitlines()
            if re.match(r"\| equal \| (reward model|judge) \|", line)]
    assert len(rows) == 2
    for line in rows:
        assert line in text


def test_the_noise_between_two_seeds_is_stated():
    for who, name in (("reward_model", "reward model"), ("judge", "judge")):
        one, two = gains("equal", who), gains("equal-seed-1", who)
        largest = max(abs(one[axis] - two[axis]) for axis in one)
        assert f"{largest:.3f} by the {name}" in " ".join(TEXT.split()), (name, largest)


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


METHODS = ROOT / "results" / "methods"


def summaries(name: str) -> dict[str, list[dict]]:
    return json.loads((METHODS / f"{name}.json").read_text())


def cells(lines: list[str]) -> dict[str, dict[str, str]]:
    """A Markdown table: first cell → title → cell."""
    titles, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                        for line in lines)
    return {row[0]: dict(zip(titles, row, strict=True)) for row in rows}


@pytest.mark.parametrize(("name", "table"), [
    ("compare", baselines.comparison), ("ablate", baselines.comparison),
    ("search", baselines.searched)])
def test_a_table_of_the_methods_is_that_of_its_runs(name, table):
    text, lines = (METHODS / "README.md").read_text(), table(summaries(name))
    assert "\n".join(lines) in text


def test_the_main_readme_shows_the_comparison():
    """In one table of fewer columns, under the same titles."""
    lines = baselines.comparison(summaries("compare"))
    whole, costs = cells(lines[:lines.index("")]), cells(lines[lines.index("") + 1:])
    text = (ROOT / "README.md").read_text().splitlines()
    [start] = [i for i, line in enumerate(text) if line.startswith("| method |")]
    shown = cells(text[start:text.index("", start)])
    assert list(shown) == list(whole)
    for name, row in shown.items():
        for title, cell in row.items():
            assert cell == (whole[name] | costs.get(name, {})).get(title, "–"), title
    assert len(row) >= 10


def test_the_methods_and_settings_are_todays(tmp_path):
    for kind, programs in (("compare", baselines.COMPARED),
                           ("ablate", baselines.ABLATED)):
        assert list(summaries(kind)) == list(programs)
        for name, runs in summaries(kind).items():
            for run in runs:
                _, note = baselines.claim(name, programs[name], run["seed"], tmp_path)
                assert run["settings"] == note["settings"], (kind, name)
    wanted = [" ".join([method, *(f"{k}={v}" for k, v in options.items())])
              for method, grid in baselines.SEARCH.items() for options in grid]
    assert list(summaries("search")) == wanted


def test_every_method_that_trains_improves_in_every_seed():
    for name, runs in summaries("compare").items():
        assert [run["seed"] for run in runs] == [0, 1, 2]
        for run in runs:
            gain = run["after"]["gold"]["R"] - run["before"]["gold"]["R"]
            assert gain > 0.05, (name, run["seed"], gain)


def test_the_main_readme_says_how_many_comply():
    text, shares = (ROOT / "README.md").read_text(), {}
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
    printed = subprocess.run(
        [sys.executable, str(ROOT / "results" / "tables.py"), *sorted(names)],
        cwd=METHODS, check=True, capture_output=True, text=True).stdout
    for name in names:
        [line] = [line for line in printed.splitlines()
                  if re.match(rf"\| {re.escape(name)} \| [\d,]+ \|", line)]
        assert line in text
