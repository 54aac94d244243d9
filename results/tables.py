"""Print what runs did, in Markdown: `python results/tables.py RUN [RUN ...]`.

For every run folder: the mean scores of held-out answers before → after, by everyone
who judged that run; then what the text became like; then ten pairs of answers of the
first run. The ten are drawn by `random.Random(0)`, so that nobody picked them.
"""

import json
import random
import sys
from pathlib import Path

SHOWN = 10  # pairs of answers


def judges_of(run: dict) -> list[str]:
    """Who judged this run: `--reward gold` has no reward model, most have no judge."""
    return [who for who in ("reward_model", "judge", "gold") if who in run["before"]]


def axes_of(run: dict) -> list[str]:
    """The axes that it was judged on."""
    return [axis for axis in run["before"][judges_of(run)[0]] if axis != "R"]


def score_table(runs: dict[str, dict]) -> list[str]:
    """A row for each run and judge. "Mean of axes" weighs all alike, whatever R did."""
    axes = axes_of(next(iter(runs.values())))
    lines = ["| run | scored by | " + " | ".join([*axes, "mean of axes"]) + " |",
             "|" + "---|" * (len(axes) + 3)]
    for name, run in runs.items():
        for who in judges_of(run):
            pairs = [[run[when][who][axis] for when in ("before", "after")]
                     for axis in axes]
            pairs.append([sum(c) / len(axes) for c in zip(*pairs, strict=True)])
            cells = [f"{old:.3f} → {new:.3f}" for old, new in pairs]
            lines.append(f"| {name} | {who.replace('_', ' ')} | "
                         + " | ".join(cells) + " |")
    return lines


def text_table(runs: dict[str, dict]) -> list[str]:
    """What else changed, and the judge's gain in R as a share of the reward model's."""
    lines = ["| run | judge's gain in R | KL, nats a token | perplexity under the "
             "base | distinct 3-grams | response tokens | cut off |", "|" + "---|" * 7]
    for name, run in runs.items():
        before, after = run["before"], run["after"]
        gain = {who: after[who]["R"] - before[who]["R"] for who in after
                if who in ("reward_model", "judge")}
        share = "–"
        if len(gain) == 2 and gain["reward_model"] > 0:
            share = f"{gain['judge'] / gain['reward_model']:.0%} of the reward model's"
        cells = [share, f"{after['kl']:.3f}"]
        cells += [f"{before[key]:{form}} → {after[key]:{form}}" for key, form in (
            ("base_perplexity", ".2f"), ("distinct_3_grams", ".3f"), ("length", ".1f"),
            ("cut_off", ".0%"))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def answer_list(run: dict) -> list[str]:
    """Ten held-out prompts with the answers before and after, drawn by seed 0."""
    rows, lines = run["answers"], []
    drawn = random.Random(0).sample(range(len(rows)), min(SHOWN, len(rows)))
    for number, i in enumerate(drawn, 1):
        pieces = {key: " ".join(text.split()) for key, text in rows[i].items()}
        lines += [f"{number}. **{pieces['prompt']}**",
                  f"   * before: {pieces['before']}", f"   * after: {pieces['after']}"]
    return lines


def main(words: list[str]) -> str | None:
    """Print all three, or return what is wrong."""
    usage = "usage: python results/tables.py RUN [RUN ...], folders with summary.json"
    if not words or not all((Path(w) / "summary.json").is_file() for w in words):
        return usage
    # By the path as typed: two runs may share the name of their last folder.
    runs = {w: json.loads((Path(w) / "summary.json").read_text()) for w in words}
    if len({tuple(axes_of(run)) for run in runs.values()}) > 1:
        return "tables.py: error: these runs have different axes; compare one at a time"
    first = next(iter(runs.values()))
    parts = (score_table(runs), text_table(runs), answer_list(first))
    print("\n\n".join("\n".join(part) for part in parts))
    return None


if __name__ == "__main__":
    if problem := main(sys.argv[1:]):
        print(problem, file=sys.stderr)
        sys.exit(2)
