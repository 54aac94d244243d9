"""What runs did, in Markdown tables; `python -m results RUN [RUN ...]` prints them.

For every reward model's folder: how its scores agree with the labels of the test
prompts. For every run folder: the mean scores of held-out answers before → after, by
everyone who judged that run; then what the text became like, what the training cost
and, in the tiny world, what the answers do; then ten pairs of answers of the first run.
The ten are drawn by `random.Random(0)`, so that nobody picked them.

At the end stand the tables of a comparison: of methods with several seeds each, and of
settings. They take summaries, not folders.
"""

import random
from pathlib import Path
from statistics import mean, stdev

from results.files import BadInput, read_json

SUMMARY = "summary.json"  # a run's, written at its end
REPORT = "reward.json"  # a reward model's
ANSWERS = 10  # pairs that are shown


def number(value: float | None, digits: str = ".3f") -> str:
    """A figure; a dash for null, which stands for what is beyond any number."""
    return "–" if value is None else f"{value:{digits}}"


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
            pairs.append([sum(scores) / len(axes)
                          for scores in zip(*pairs, strict=True)])
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
        gains = {who: after[who]["R"] - before[who]["R"] for who in after
                 if who in ("reward_model", "judge")}
        share = "–"
        if len(gains) == 2 and gains["reward_model"] > 0:
            ratio = gains["judge"] / gains["reward_model"]
            share = f"{ratio:.0%} of the reward model's"
        cells = [share, number(after["kl"])]
        cells += [f"{number(before[key], digits)} → {number(after[key], digits)}"
                  for key, digits in (
                      ("base_perplexity", ".2f"), ("distinct_3_grams", ".3f"),
                      ("length", ".1f"), ("cut_off", ".0%"))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cost_table(runs: dict[str, dict]) -> list[str]:
    """What the training took, without the evaluations before and after it."""
    lines = ["| run | sampled tokens | trained tokens | training seconds | seconds for "
             "1,000 sampled tokens | peak GB |", "|" + "---|" * 6]
    for name, run in runs.items():
        sampled, seconds = run["sampled_tokens"], run["training_seconds"]
        per_1000 = f"{1e3 * seconds / sampled:.3g}" if sampled else "–"
        lines.append(f"| {name} | {sampled:,} | {run['trained_tokens']:,} | "
                     f"{seconds:.1f} | {per_1000} | {run['peak_rss_gb']:.2f} |")
    return lines


def behaviour_table(runs: dict[str, dict], title: str = "run") -> list[str]:
    """What the tiny world's answers do, in shares by the rubric's own names."""
    lines = [f"| {title} | prompts | before | after |", "|---|---|---|---|"]
    for name, run in runs.items():
        for side in ("harmful", "benign"):
            shares = [", ".join(f"{kind} {share:.0%}" for kind, share in
                                sorted(run[when]["behaviour"][side].items(),
                                       key=lambda item: -item[1]) if share >= 0.02)
                      for when in ("before", "after")]
            lines.append(f"| {name} | {side} | {shares[0]} | {shares[1]} |")
    return lines


def answer_list(run: dict) -> list[str]:
    """Ten held-out prompts with the answers before and after, drawn by seed 0."""
    rows, lines = run["answers"], []
    drawn = random.Random(0).sample(range(len(rows)), min(ANSWERS, len(rows)))
    for number, i in enumerate(drawn, 1):
        texts = {key: " ".join(text.split()) for key, text in rows[i].items()}
        lines += [f"{number}. **{texts['prompt']}**",
                  f"   * before: {texts['before']}", f"   * after: {texts['after']}"]
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
        average = sum(r["spearman"] for r in axes.values()) / len(axes)
        lines.append(f"| {name} | mean | | {average:.3f} | | | |")
    return lines


def read_each(folders: list[str], name: str, *keys: str) -> dict[str, dict]:
    """The file of this name in every folder that has one, by the folder as typed.

    By the whole path, since two runs may share the name of their last folder.
    """
    paths = {folder: Path(folder) / name for folder in folders}
    return {folder: read_json(path, *keys) for folder, path in paths.items()
            if path.is_file()}


def tables(folders: list[str]) -> str:
    """All tables of these folders, and ten answers of the first run, in Markdown.

    Raises:
        BadInput: a folder is neither a run that has ended nor a reward model; a file
            lacks what the tables show; the runs were judged on different axes.
    """
    rewards = read_each(folders, REPORT, "report")
    runs = read_each(folders, SUMMARY, "before", "after", "sampled_tokens",
                     "trained_tokens", "training_seconds", "peak_rss_gb", "answers")
    for folder in folders:
        if folder not in rewards and folder not in runs:
            raise BadInput(f"{folder} holds neither {SUMMARY} of a run that has ended "
                           f"nor {REPORT} of a reward model")
    if len({tuple(axes_of(run)) for run in runs.values()}) > 1:
        raise BadInput("these runs have different axes; show one at a time")
    sections = []
    if rewards:
        sections.append(reward_table(
            {name: model["report"] for name, model in rewards.items()}))
    if runs:
        sections += [score_table(runs), text_table(runs), cost_table(runs)]
        tiny = {name: run for name, run in runs.items() if "behaviour" in run["after"]}
        if tiny:
            sections.append(behaviour_table(tiny))
        sections.append(answer_list(next(iter(runs.values()))))
    return "\n\n".join("\n".join(lines) for lines in sections)


# ------------------------------------------------------------------- of a comparison


def mean_of_axes(scores: dict[str, float]) -> float:
    """All axes alike. A run's own R has its weights, and compares with no other's."""
    return mean(score for axis, score in scores.items() if axis != "R")


def mean_and_deviation(values: list[float], digits: str = ".3f") -> str:
    """Mean ± standard deviation over the seeds."""
    if len(values) == 1 or None in values:
        return number(None if None in values else values[0], digits)
    return f"{mean(values):{digits}} ± {stdev(values):{digits}}"


def comparison_tables(summaries: dict[str, list[dict]]) -> list[str]:
    """Two tables of a comparison: what came of each method, and what it cost.

    Args:
        summaries: by the method's name, the summary of its run with each seed.
    """
    return [*outcome_table(summaries), "", *training_table(summaries)]


def outcome_table(summaries: dict[str, list[dict]]) -> list[str]:
    """Scores, KL and behaviour after training, and of the base, over the seeds."""
    base = [{"after": run["before"]} for run in next(iter(summaries.values()))]
    axes = [axis for axis in base[0]["after"]["gold"] if axis != "R"]
    lines = ["| method | gold: mean of axes | " + " | ".join(axes) + " | reward model: "
             "mean of axes | KL, nats a token | kind refusals with a step | refusals "
             "of benign |",
             "|" + "---|" * (len(axes) + 6)]
    for name, runs in {"(the base)": base, **summaries}.items():
        after = [run["after"] for run in runs]
        cells = [mean_and_deviation([mean_of_axes(a["gold"]) for a in after])]
        cells += [mean_and_deviation([a["gold"][axis] for a in after]) for axis in axes]
        cells += [mean_and_deviation([mean_of_axes(a["reward_model"]) for a in after]),
                  ("≤ " if "kl_is_a_bound" in after[0] else "")
                  + mean_and_deviation([a["kl"] for a in after])]
        cells += [mean_and_deviation(
            [a["behaviour"][side].get(kind, 0.0) for a in after], ".0%")
            for side, kind in (("harmful", "refuse_kind_step"), ("benign", "refuse"))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def training_table(summaries: dict[str, list[dict]]) -> list[str]:
    """What training took, over the seeds, and what an answer takes afterwards."""
    lines = ["| method | training seconds, side by side | for 1,000 sampled "
             "tokens | peak GB | sampled tokens | trained tokens | trained "
             "parameters | sampled tokens an answer, in use |",
             "|" + "---|" * 8]
    for name, runs in summaries.items():
        cells = [mean_and_deviation([r["training_seconds"] for r in runs], ".0f"),
                 "–" if not runs[0]["sampled_tokens"] else mean_and_deviation(
                     [1e3 * r["training_seconds"] / r["sampled_tokens"]
                      for r in runs], ".2f"),
                 mean_and_deviation([r["peak_rss_gb"] for r in runs], ".2f")]
        cells += [f"{mean(r[key] for r in runs):,.0f}" for key in (
            "sampled_tokens", "trained_tokens", "trained_parameters")]
        cells.append(f"{mean(r['after']['tokens_an_answer'] for r in runs):,.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def search_table(summaries: dict[str, list[dict]]) -> list[str]:
    """Settings of each method, the best by the gold rubric first.

    Args:
        summaries: one summary each, by the method and its settings: "dpo lr=0.001 …".
    """
    rows = [(name.split(), run["after"]) for name, [run] in summaries.items()]
    rows.sort(key=lambda row: (row[0][0], -row[1]["gold"]["R"]))
    return ["| method | settings | gold R | reward model R | KL |", "|" + "---|" * 5,
            *(f"| {method} | {' '.join(settings)} | {after['gold']['R']:.3f} | "
              f"{after['reward_model']['R']:.3f} | {number(after['kl'])} |"
              for (method, *settings), after in rows)]
