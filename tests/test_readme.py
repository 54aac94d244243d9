"""The README and the code say the same.

* Every tag of the map stands as a comment at one function, the one that the map names,
  and in the test file that the map names; every tag in the code is in the map.
* Files and links that the documents name exist; options in its commands exist.
* The documents' figures are those of the files that the commands wrote.
"""

import ast
import functools
import json
import re
from pathlib import Path

import pytest
import torch

import baselines
import grpo
import reward_model
import sample
from data import make_tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / name / "README.md" for name in (
    "", "data", "results/tiny", "results/0.5b", "results/methods", "exercises")]
MODULES = sorted(ROOT.glob("*.py"))
ROW = re.compile(
    r"^\| (\[[A-Z]\d\]) \|.*\| `([\w.]+): ([\w.]+)` \| `([\w.]+)` \|$", re.M)
MAP = {tag: (file, function, test) for tag, file, function, test in ROW.findall(README)}


@functools.cache
def parsed(path: Path) -> tuple[list[tuple[int, int, str]], list[str]]:
    """The first line, last line and name of each function; and all lines."""
    text = path.read_text()
    return [(n.lineno, n.end_lineno, n.name) for n in ast.walk(ast.parse(text))
            if isinstance(n, ast.FunctionDef)], text.splitlines()


def functions_with(tag: str) -> list[tuple[str, str]]:
    """(file, innermost function) of every comment that opens with the tag."""
    found = []
    for path in MODULES:
        spans, text = parsed(path)
        for number, line in enumerate(text, 1):
            if line.strip().startswith(f"# {tag}"):
                inner = max((s for s in spans if s[0] <= number <= s[1]),
                            default=(0, 0, "no function"))
                found.append((path.name, inner[2]))
    return found


def test_the_map_has_every_tag_of_the_design():
    assert sorted(MAP) == ["[B1]", "[D1]", *(f"[E{i}]" for i in range(1, 8)), "[L1]",
                           *(f"[P{i}]" for i in range(1, 5)), "[S1]"]


@pytest.mark.parametrize("tag", sorted(MAP))
def test_a_tag_stands_at_the_one_function_that_the_map_names(tag):
    file, function, test = MAP[tag]
    assert functions_with(tag) == [(file, function.split(".")[-1])]
    assert tag in (ROOT / "tests" / test).read_text()


def test_the_four_answers_of_the_opening_have_these_rewards_and_advantages():
    lines = README.partition("| four answers")[2].splitlines()[2:6]
    table = torch.tensor([
        [float(x) for x in re.findall(r"[+-]?\d\.\d+", line.replace("−", "-"))]
        for line in lines])  # four scores, then R and A with either weights
    assert table.shape == (4, 8)
    for weights, column in (([1.0, 1, 1, 1], 4), ([1.0, 1, 1, 2], 6)):
        reward = grpo.combine(table[:, :4], torch.tensor(weights))
        advantage = grpo.group_advantage(reward[None])[0][0]
        torch.testing.assert_close(table[:, column], reward, rtol=0, atol=6e-4)
        torch.testing.assert_close(table[:, column + 1], advantage, rtol=0, atol=6e-3)


def test_tags_in_the_code_are_in_the_map():
    used = {tag for path in MODULES
            for tag in re.findall(r"\[[BDELPS]\d\]", path.read_text())}
    assert used <= set(MAP)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_of_a_document_resolve(document):
    text = document.read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    paths = re.findall(r"`((?:data|tests)/[\w./-]*)`", text)
    for name in links:
        assert (document.parent / name).exists(), name
    for name in paths:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(("program", "settings"), [
    ("grpo.py", grpo.Settings), ("reward_model.py", reward_model.Settings),
    ("sample.py", sample.Settings), ("baselines.py", baselines.Settings)])
def test_options_in_the_commands_exist(program, settings):
    known = {"--" + name.replace("_", "-") for name in settings.__dataclass_fields__}
    for document in DOCUMENTS:
        text = document.read_text()
        for command in re.findall(rf"python {program}([^\n#`|]*)", text):
            assert set(re.findall(r"(--[\w-]+)", command)) <= known, command


def test_a_checksum_has_64_digits():
    for document in DOCUMENTS:
        for digits in re.findall(r"\b[0-9a-f]{48,}\b", document.read_text()):
            assert len(digits) == 64, digits


def test_the_datasheet_shows_what_was_measured():
    text = (ROOT / "data" / "README.md").read_text()
    figures = json.loads((ROOT / "data" / "tiny" / "measured.json").read_text())
    for side, shares in figures["shares"].items():
        for kind, share in shares.items():
            assert f"| {side} | {kind} | {share:.1%} |" in text, (side, kind)
    for axis, value in figures["gold"].items():
        assert re.search(rf"{axis}\s+{value:.3f}", text), axis
    for key in ("R", "R_best_of_64", "perplexity"):
        assert f"{figures[key]:.3f}" in text, key
    assert f"{figures['new_8_grams']:.1%}" in text
    for row in figures["samples"]:
        assert row["answer"].split("\n")[0] in text


def test_the_datasheet_shows_how_good_the_tiny_reward_model_is():
    text = (ROOT / "data" / "README.md").read_text()
    report = json.loads((ROOT / "data/tiny/reward/reward.json").read_text())["report"]
    for axis, found in report["axes"].items():
        cells = [f"{found['spearman']:.3f}", f"{found['low']:.3f} to "
                 f"{found['high']:.3f}", f"{found['mae']:.3f}",
                 f"{found['mae_of_mean']:.3f}"]
        assert f"| {axis} | {' | '.join(cells)} |" in text, axis


def test_the_readme_shows_the_results_of_its_command(capsys):
    results = json.loads((ROOT / "data" / "tiny" / "results.json").read_text())
    make_tiny.print_results(results)
    whole = (ROOT / "results" / "tiny" / "README.md").read_text()
    for line in capsys.readouterr().out.strip().splitlines():
        assert line in whole
    equal = [run for name, run in results.items() if name.startswith("equal")]
    for when in ("before", "after"):
        shares = [run[when]["behaviour"]["harmful"]["refuse_kind_step"]
                  for run in equal]
        text = f"{100 * min(shares):.0f}-{100 * max(shares):.0f}%"
        assert re.search(rf"kind refusals [\w\s%-]*\b{text}", README), text
    first = results["equal, seed 0"]
    for who in ("reward_model", "gold"):
        for axis, old in first["before"][who].items():
            new = first["after"][who][axis]
            assert re.search(rf"{who} {axis} +{old:.3f} +{new:.3f} +"
                             rf"{re.escape(f'{new - old:+.3f}')}\n", README), axis


@pytest.mark.parametrize("size", [
    pytest.param(size, marks=[] if size == "0.5b" else [pytest.mark.slow])
    for size in ("0.5b", "7b", "14b")])
def test_the_readme_shows_what_each_size_needs(size):
    printed = grpo.plan(grpo.resolve(grpo.Settings(size=size))).splitlines()
    weights = printed[0].split(": ")[1].removesuffix(" weights;").split(" weights")[0]
    fp32, bf16 = printed[-1].split()[-2:]
    assert f"| {size} | {weights} | {fp32} | {bf16} |" in README
