"""The documents and the code say the same.

* Every tag stands in exactly one map (README.md: the paper's; methods/README.md: the
  methods'), as a comment at one function, the one that the map names, and in the test
  file that the map names; every tag in the code is in a map.
* Links, anchors, files and functions that the documents name exist; their commands are
  ones that the programs accept.
* The documents' figures are those of the files that the commands wrote.
"""

import argparse
import ast
import functools
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import grpo
import reward_model
import sample
from benchmarks import __main__ as benchmarks
from benchmarks import plan
from data import check_labels, make_tiny
from methods import __main__ as methods
from methods import compare
from plumbing.options import parse_settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS = ("methods", "data", "results", "exercises", "benchmarks")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *(
    page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))


def test_the_documents_are_all_there():
    names = {str(page.relative_to(ROOT)) for page in DOCUMENTS}
    assert names >= {"README.md", "SECURITY.md", "benchmarks/README.md",
                     "benchmarks/results.md", "data/README.md", "exercises/README.md",
                     "methods/README.md", "results/0.5b/README.md",
                     "results/methods/README.md", "results/tiny/README.md"}


# ------------------------------------------------------------------------------- tags


CODE = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "methods").glob("*.py"))]
ROW = re.compile(
    r"^\| (\[[A-Z]\d\]) \|.*\| `([\w./]+): ([\w.]+)` \| `([\w./]+)` \|$", re.M)


def map_of(page: Path) -> dict[str, tuple[str, str, str]]:
    """A page's tags: (file, function, test file) of each."""
    rows = ROW.findall(page.read_text())
    assert len({tag for tag, *_ in rows}) == len(rows), page
    return {tag: tuple(row) for tag, *row in rows}


PAPER, OTHERS = map_of(ROOT / "README.md"), map_of(ROOT / "methods" / "README.md")


@functools.cache
def scopes(path: Path) -> list[tuple[int, int, str]]:
    """First line, last line and qualified name of each function and class."""
    spans = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}".lstrip(".")
                spans.append((child.lineno, child.end_lineno, name))
            walk(child, name)

    walk(ast.parse(path.read_text()), "")
    return spans


def functions_with(tag: str) -> list[tuple[str, str]]:
    """(file, innermost function) of every comment that opens with the tag."""
    places = []
    for path in CODE:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip().startswith(f"# {tag}"):
                inner = max((s for s in scopes(path) if s[0] <= number <= s[1]),
                            default=(0, 0, "no function"))
                places.append((str(path.relative_to(ROOT)), inner[2]))
    return places


def test_the_maps_have_every_tag_of_the_design_and_none_twice():
    assert sorted(PAPER) == [*(f"[E{i}]" for i in range(1, 9)), "[L1]"]
    assert OTHERS.keys() >= {"[P1]", "[P2]", "[P3]", "[P4]", "[D1]", "[S1]", "[B1]"}
    assert not PAPER.keys() & OTHERS.keys()


def test_no_other_document_has_a_map():
    for page in DOCUMENTS:
        if page.relative_to(ROOT).as_posix() not in ("README.md", "methods/README.md"):
            assert map_of(page) == {}, page


@pytest.mark.parametrize("tag", sorted(PAPER | OTHERS))
def test_a_tag_stands_at_the_one_function_that_the_map_names(tag):
    file, function, test = (PAPER | OTHERS)[tag]
    assert functions_with(tag) == [(file, function)]
    assert test.startswith("tests/")
    assert tag in (ROOT / test).read_text()


def test_tags_in_the_code_are_in_a_map():
    used = {tag for path in CODE
            for tag in re.findall(r"\[[A-Z]\d\]", path.read_text())}
    assert used == PAPER.keys() | OTHERS.keys()


# --------------------------------------------------------- links, files and functions


def slug(title: str) -> str:
    """The anchor that GitHub gives to a title."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {slug(title) for title in re.findall(r"^#+ (.*)$", prose, re.M)}


@each_document
def test_links_and_paths_of_a_document_resolve(document):
    text = document.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    paths = re.findall(r"`((?:tests|plumbing|" + "|".join(FOLDERS) + r")/[\w./-]*)`",
                       text)
    for name in paths:
        assert "NAME" in name or (ROOT / name).exists(), name


@each_document
def test_files_and_functions_that_a_document_names_exist(document):
    names = re.findall(r"`([\w/]+\.py)(?:: ([\w.]+))?`", document.read_text())
    for file, function in names:
        if "NAME" in file:
            continue
        path = next((folder / file for folder in (ROOT, ROOT / "tests", document.parent)
                     if (folder / file).is_file()), None)
        assert path, file
        assert not function or function in [name for _, _, name in scopes(path)], (
            file, function)


# --------------------------------------------------------------------------- commands


SETTINGS = {
    "grpo.py": grpo.Settings, "reward_model.py": reward_model.Settings,
    "sample.py": sample.Settings, "benchmarks": benchmarks.Settings,
    "benchmarks.plan": plan.Settings, "data.make_tiny": make_tiny.Settings,
    "data.check_labels": check_labels.Settings}
COMMAND = re.compile(r"(?:^|\s|\$ )(?:python|torchrun --nproc-per-node \d+) "
                     r"(?:-m ([\w.]+)|([\w/]+\.py))(?![\w/])(.*)$")


def lines_of_code(text: str) -> list[str]:
    """The lines of all code blocks of a page, and its code inside the text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(document: Path) -> list[tuple[str, list[str]]]:
    """(program or module, its words) of each command of a page."""
    text, programs = document.read_text(), []
    lines, common = lines_of_code(text), ""
    for line in lines:
        if line.startswith('S="'):  # what the page's next commands share
            common = line.removeprefix('S="').removesuffix('"')
        for piece in re.split(r" && | \| | > ", line.replace("$S", common)):
            if match := COMMAND.search(piece):
                words = shlex.split(match[3], comments=True)
                programs.append((match[1] or match[2], words))
    return programs


def refusal(program: str, words: list[str], capsys) -> str | None:
    """Why the program would not take these words; None if it would."""
    if program == "methods" and words:
        name, *words = words
        if name in ("--help", "NAME"):
            return None
        if name not in (*methods.NAMES, *compare.KINDS):
            return f"there is no method {name}"
        cls = (compare.Settings if name in compare.KINDS
               else importlib.import_module(f"methods.{name}").Settings)
    elif program in SETTINGS:
        cls = SETTINGS[program]
    else:  # a program whose words are no options
        path = ROOT / (program if program.endswith(".py")
                       else program.replace(".", "/") + ".py")
        if path.is_file() or (path.with_suffix("") / "__main__.py").is_file():
            return None if not any(w.startswith("--") for w in words) else str(words)
        return f"there is no {program}"
    if "--help" in words:
        return None
    try:
        parse_settings(cls, "", words)
    except (SystemExit, argparse.ArgumentError):
        return capsys.readouterr().err
    return None


@each_document
def test_the_commands_of_a_document_are_accepted(document, capsys):
    for program, words in commands(document):
        assert refusal(program, words, capsys) is None, (program, words)


def test_commands_are_seen_and_bad_ones_refused(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        '```sh\npip install x && python grpo.py --steps 3  # a comment\n'
        'S="--lr 1"\nA=1 python -m methods ppo $S > out.txt\n```\n'
        'Or `python reward_model.py --data\nFILE`, `torchrun --nproc-per-node 2 '
        'grpo.py`, or `python exercises/check.py 03`.\n')
    seen = [("grpo.py", ["--steps", "3"]), ("methods", ["ppo", "--lr", "1"]),
            ("reward_model.py", ["--data", "FILE"]), ("grpo.py", []),
            ("exercises/check.py", ["03"])]
    assert commands(page) == seen
    for command in seen:
        assert refusal(*command, capsys) is None, command
    for program, words in (
            ("grpo.py", ["--critic", "1"]), ("grpo.py", ["--loss", "ppo"]),
            ("grpo.py", ["--steps", "many"]), ("methods", ["dpo", "--gamma", "1"]),
            ("methods", ["rlhf"]), ("methods", ["compare", "--steps", "3"]),
            ("baselines.py", []), ("results.tables_of", []),
            ("results", ["--all"]), ("data.make_tiny", ["everything"])):
        assert refusal(program, words, capsys), (program, words)


def test_the_documents_have_commands():
    assert len(commands(ROOT / "README.md")) >= 8
    assert sum(len(commands(page)) for page in DOCUMENTS) > 80


# ---------------------------------------------------------------------------- figures


def test_the_four_answers_of_the_opening_have_these_rewards_and_advantages():
    lines = README.partition("| four answers")[2].splitlines()[2:6]
    table = torch.tensor([
        [float(x) for x in re.findall(r"[+-]?\d\.\d+", line.replace("−", "-"))]
        for line in lines])  # four scores, then R and A with either weights
    assert table.shape == (4, 8)
    for weights, column in (([1.0, 1, 1, 1], 4), ([1.0, 1, 1, 2], 6)):
        reward = reward_model.combine(table[:, :4], torch.tensor(weights))
        advantage = grpo.group_advantage(reward[None])[0][0]
        torch.testing.assert_close(table[:, column], reward, rtol=0, atol=6e-4)
        torch.testing.assert_close(table[:, column + 1], advantage, rtol=0, atol=6e-3)


@each_document
def test_a_checksum_has_64_digits(document):
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
    for axis, figures in report["axes"].items():
        cells = [f"{figures['spearman']:.3f}", f"{figures['low']:.3f} to "
                 f"{figures['high']:.3f}", f"{figures['mae']:.3f}",
                 f"{figures['mae_of_mean']:.3f}"]
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
def test_the_page_shows_what_each_size_needs(size):
    printed = plan.plan(grpo.Settings(size=size).resolved()).splitlines()
    weights = printed[0].split(": ")[1].removesuffix(" weights;").split(" weights")[0]
    fp32, bf16 = printed[-1].split()[-2:]
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"| {size} | {weights} | {fp32} | {bf16} |" in text
