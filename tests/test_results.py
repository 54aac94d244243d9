"""results/: every figure of its README, and of the main one, is the runs' own.

* The tables and answers are what `results/tables.py` prints for the folders beside it.
* The files name the checkpoint that they were measured on, and no machine's paths.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOME = ROOT / "results" / "0.5b"
REWARDS, RUNS = ["reward", "judge"], ["equal", "safety"]


@pytest.fixture(scope="module")
def printed():
    return subprocess.run(
        [sys.executable, str(ROOT / "results" / "tables.py"), *REWARDS, *RUNS],
        cwd=HOME, check=True, capture_output=True, text=True).stdout


def test_the_tables_are_what_the_command_prints(printed):
    text = (HOME / "README.md").read_text()
    for line in filter(None, printed.splitlines()):
        assert line in text


def test_the_main_readme_shows_the_same_figures(printed):
    text = (ROOT / "README.md").read_text()
    report = json.loads((HOME / "reward" / "reward.json").read_text())["report"]
    for axis, r in report["axes"].items():
        cells = [f"{r['spearman']:.3f}", f"{r['low']:.3f} to {r['high']:.3f}",
                 f"{r['mae']:.3f}", f"{r['mae_of_mean']:.3f}"]
        assert f"| {axis} | {' | '.join(cells)} |" in text
    rows = [line for line in printed.splitlines()
            if re.match(r"\| \w+ \| (reward model|judge) \|", line)]
    assert len(rows) == 4
    for line in rows:
        assert line in text


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_there_as_it_was_written(name):
    config = json.loads((HOME / name / "config.json").read_text())
    assert config.get("system") is None
    assert (HOME / name / "metrics.jsonl").read_text().count("\n") == config["steps"]
    assert (HOME / name / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_the_checkpoint_is_named_and_no_machine_is():
    text = (HOME / "README.md").read_text()
    assert "Qwen2.5-Coder-0.5B-Instruct" in text
    assert re.search(r"\b[0-9a-f]{64}\b", text)
    for path in HOME.rglob("*"):
        if path.suffix in (".json", ".jsonl", ".md"):
            assert not re.search(r"\"/(?!/)\w+/", path.read_text()), path
