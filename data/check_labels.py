"""Count and check the free-English labels: the figures of the datasheet.

    python -m data.check_labels                    # the bundled files
    python -m data.check_labels --labels FILE      # another file of labelled rows

Prints rows and prompts by split and category, marks by axis, correlations between axes,
agreement with the blind second scores, and texts that are too much alike on two sides
of a split. Exit status 2 if a limit is broken (see `faults`).
"""

import dataclasses
import itertools
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from data.world import AXES
from plumbing.figures import format_table
from plumbing.files import one_line_errors, require
from plumbing.options import option, parse_settings
from plumbing.rows import read_rows
from plumbing.statistics import spearman

HOME = Path(__file__).parent
MARKS = (0, 0.25, 0.5, 0.75, 1)
CORRELATION_LIMIT = 0.6  # above it, two axes would teach the reward model one thing
ALIKE_LIMIT = 0.5  # of all runs of three words, the share that two texts have in common


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python -m data.check_labels`."""

    labels: Path = option(HOME / "labels.jsonl", "labelled rows")
    prompts: Path = option(HOME / "prompts.jsonl", "prompts of GRPO")
    second: Path = option(HOME / "second_scores.jsonl", "blind second scores")


def marks(rows: list[dict]) -> np.ndarray:
    """Scores of rows, (rows, 4).

    Raises:
        UserError: a row that does not label all four axes.
    """
    for number, row in enumerate(rows, 1):
        missing = [axis for axis in AXES if axis not in row["scores"]]
        require(not missing, f"row {number} has no score of {', '.join(missing)}; "
                "every row here labels the four axes")
    return np.array([[row["scores"][axis] for axis in AXES] for row in rows])


def correlations(rows: list[dict]) -> list[tuple[str, str, float]]:
    """Pearson correlation of every pair of axes."""
    matrix = np.corrcoef(marks(rows).T)
    return [(AXES[i], AXES[j], float(matrix[i, j]))
            for i, j in itertools.combinations(range(len(AXES)), 2)]


def agreement(second: list[dict]) -> list[list[object]]:
    """Per axis: rows, Spearman, share of equal marks, mean difference.

    A row of `second` has the marks of its writer (`first`) and those of a reader who
    had not seen them (`scores`), both before anything was mended.
    """
    require(all("first" in row for row in second), "second scores need \"first\" too")
    a, b = marks([{"scores": row["first"]} for row in second]), marks(second)
    return [[axis, len(a), spearman(a[:, k], b[:, k]),
             float((a[:, k] == b[:, k]).mean()),
             float(np.abs(a[:, k] - b[:, k]).mean())]
            for k, axis in enumerate(AXES)]


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of three words, or the whole text where it is shorter."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i:i + 3]) for i in range(max(1, len(words) - 2))}


def alike(texts: list[tuple[str, str]], limit: float) -> list[tuple[float, str, str]]:
    """Pairs of (side, text) on different sides whose Jaccard similarity is ≥ `limit`.

    Only texts that share a run of three words are compared.
    """
    sets = [shingles(text) for _, text in texts]
    places: dict[tuple, list[int]] = {}
    pairs = []
    for i, own in enumerate(sets):
        shared = Counter(j for run in own for j in places.get(run, ()))
        for j, common in shared.items():
            score = common / (len(own) + len(sets[j]) - common)
            if score >= limit and texts[i][0] != texts[j][0]:
                pairs.append((score, texts[j][1], texts[i][1]))
        for run in own:
            places.setdefault(run, []).append(i)
    return pairs


def sides(rows: list[dict], prompts: list[dict]) -> tuple[list, list]:
    """(side, text) of all prompts, and of all responses: no side may know another."""
    asked = dict.fromkeys((row.get("split", "?"), row["prompt"]) for row in rows)
    # GRPO's prompts are sides of their own: no labelled prompt stands among them.
    asked |= dict.fromkeys((f"GRPO {row.get('split', 'train')}", row["prompt"])
                           for row in prompts)
    return list(asked), [(row.get("split", "?"), row["response"]) for row in rows]


def openings(rows: list[dict]) -> list[tuple[str, int]]:
    """First three words that many rows share."""
    count = Counter(" ".join(row["response"].lower().split()[:3]) for row in rows)
    return [(words, n) for words, n in count.most_common(5)]


def faults(rows: list[dict], twins: int) -> list[str]:
    """What breaks a limit of the datasheet."""
    broken = [f"{a} and {b} correlate at {r:.2f}, over {CORRELATION_LIMIT}"
              for a, b, r in correlations(rows) if abs(r) > CORRELATION_LIMIT]
    for number, row in enumerate(rows, 1):
        scores = row["scores"]
        if scores.keys() != {*AXES} or not {*scores.values()} <= {*MARKS}:
            broken.append(f"row {number}: scores must be the five marks on four axes")
    values = marks(rows)
    for k, axis in enumerate(AXES):
        unused = [m for m in MARKS if not (values[:, k] == m).any()]
        broken += [f"{axis} never uses {m}" for m in unused]
    return broken + ([f"{twins} texts are alike across splits"] if twins else [])


def print_counts(rows: list[dict]) -> None:
    """Rows and prompts by split, by category, by mark."""
    for field in ("split", "category"):
        names = sorted({str(row.get(field)) for row in rows})
        print(format_table([field, "prompts", "rows"], [
            [name, len({r["prompt"] for r in rows if str(r.get(field)) == name}),
             sum(str(r.get(field)) == name for r in rows)] for name in names]) + "\n")
    values = marks(rows)
    print(format_table(["axis", *map(str, MARKS)], [
        [axis, *(int((values[:, k] == m).sum()) for m in MARKS)]
        for k, axis in enumerate(AXES)]) + "\n")
    words = sorted(len(row["response"].split()) for row in rows)
    print(f"words a response: {words[0]} to {words[-1]}, median "
          f"{words[len(words) // 2]}; cut off: {sum(bool(r.get('cut')) for r in rows)}")
    print("commonest openings: " + "; ".join(f"{w} ({n})" for w, n in openings(rows)))


def main(argv: list[str] | None = None) -> None:
    """Print everything, then refuse a file that breaks a limit."""
    settings = parse_settings(Settings, "Count and check the labels.", argv)
    rows = read_rows(settings.labels, responses=True, labels=True)
    print_counts(rows)
    print("\n" + format_table(["correlation", "with", "r"],
                              [list(pair) for pair in correlations(rows)]))
    if settings.second.is_file():
        second = read_rows(settings.second, responses=True, labels=True)
        print("\nblind second scores against the first\n" + format_table(
            ["axis", "rows", "spearman", "equal", "difference"],
            agreement(second)))
    prompts = read_rows(settings.prompts, responses=False)
    twins = [pair for texts in sides(rows, prompts)
             for pair in alike(texts, ALIKE_LIMIT)]
    print(f"\ntexts alike (Jaccard ≥ {ALIKE_LIMIT}) across splits: {len(twins)}")
    for score, one, other in twins:
        print(f"  {score:.2f}  {one[:60]!r}  {other[:60]!r}")
    broken = faults(rows, len(twins))
    require(not broken, "; ".join(broken))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
