"""Print what runs did, in Markdown: `python results/tables.py FOLDER [FOLDER ...]`.

For every reward model's folder: how its scores agree with the labels of the test
prompts. For every run folder: the mean scores of held-out answers before → after, by
everyone who judged that run; then what the text became like, what the training cost
and, in the tiny world, what the answers do; then ten pairs of answers of the first run.
The ten are drawn by `random.Random(0)`, so that nobody picked them.
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


def cost_table(runs: dict[str, dict]) -> list[str]:
    """What the training took, without the evaluations before and after it."""
    lines = ["| run | sampled tokens | trained tokens | training seconds | seconds for "
             "1,000 sampled tokens | peak GB |", "|" + "---|" * 6]
    for name, run in runs.items():
        sampled, seconds = run["sampled_tokens"], run["training_seconds"]
        each = f"{1e3 * seconds / sampled:.3g}" if sampled else "–"
        lines.append(f"| {name} | {sampled:,} | {run['trained_tokens']:,} | "
                     f"{seconds:.1f} | {each} | {run['peak_rss_gb']:.2f} |")
    return lines


def behaviour_table(runs: dict[str, dict], title: str = "run") -> list[str]:
    """What the tiny world's answers do, in shares by the rubric's own names."""
    lines = [f"| {title} | prompts | before | after |", "|---|---|---|---|"]
    for name, run in runs.items():
        for side in ("harmful", "benign"):
            pair = [", ".join(f"{kind} {share:.0%}" for kind, share in
                              sorted(run[when]["behaviour"][side].items(),
                                     key=lambda item: -item[1]) if share >= 0.02)
                    for when in ("before", "after")]
            lines.append(f"| {name} | {side} | {pair[0]} | {pair[1]} |")
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


def reward_table(reports: dict[str, dict]) -> list[str]:
    """Reward models on their test prompts; Spearman with its 95% interval."""
    lines = ["| reward model | axis | rows | Spearman | 95% interval | MAE | MAE of "
             "predicting the mean |", "|" + "---|" * 7]
    for name, report in reports.items():
        axes = report["axes"]
        for axis, r in axes.items():
            lines.append(f"| {name} | {axis} | {r['rows']} | {r['spearman']:.3f} | "
                         f"{r['low']:.3f} to {r['high']:.3f} | {r['mae']:.3f} | "
                         f"{r['mae_of_mean']:.3f} |")
        mean = sum(r["spearman"] for r in axes.values()) / len(axes)
        lines.append(f"| {name} | mean | | {mean:.3f} | | | |")
    return lines


def read(words: list[str], file: str) -> dict[str, dict]:
    """That file of every folder which has it, by the path as typed.

    The whole path, since two runs may share the name of their last folder.
    """
    found = {w: Path(w) / file for w in words}
    return {w: json.loads(path.read_text()) for w, path in found.items()
            if path.is_file()}


def main(words: list[str]) -> str | None:
    """Print all tables, or return what is wrong."""
    rewards, runs = read(words, "reward.json"), read(words, "summary.json")
    if not words or len(rewards) + len(runs) != len(words):
        return ("usage: python results/tables.py FOLDER [FOLDER ...], run folders with "
                "summary.json or reward models with reward.json")
    if len({tuple(axes_of(run)) for run in runs.values()}) > 1:
        return "tables.py: error: these runs have different axes; compare one at a time"
    parts = []
    if rewards:
        parts.append(reward_table({w: r["report"] for w, r in rewards.items()}))
    if runs:
        first = next(iter(runs.values()))
        parts += [score_table(runs), text_table(runs), cost_table(runs)]
        tiny = {name: run for name, run in runs.items() if "behaviour" in run["after"]}
        if tiny:
            parts.append(behaviour_table(tiny))
        parts.append(answer_list(first))
    print("\n\n".join("\n".join(part) for part in parts))
    return None


if __name__ == "__main__":
    if problem := main(sys.argv[1:]):
        print(problem, file=sys.stderr)
        sys.exit(2)
