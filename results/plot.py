"""RUN/curves.png, which `python -m results RUN` draws, and a picture of a comparison.

Needs matplotlib, which nothing else does: `pip install matplotlib`. The curves are R
and the axes by step (mean over the step's responses, thin, and their running mean over
ten steps), the exact KL to the base, and the length of the responses.
In the tiny world R by the gold rubric stands beside the learned one: where the first
falls and the second rises, the policy is gaming its reward model.
"""

import io
import sys
from pathlib import Path
from statistics import mean

from results.files import scored_steps, write_whole
from results.tables import mean_of_axes

WINDOW = 10  # steps of the running mean


def running_mean(values: list[float]) -> list[float]:
    """Mean of each value and up to WINDOW − 1 before it."""
    return [sum(values[max(0, i + 1 - WINDOW):i + 1]) / min(i + 1, WINDOW)
            for i in range(len(values))]


def curves(metrics: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Panels by title, and in each the lines by name."""
    scores = {"R": [m["R"] for m in metrics]}
    if all("R_gold" in m for m in metrics):  # the tiny world's rubric
        scores["R by the gold rubric"] = [m["R_gold"] for m in metrics]
    scores |= {axis: [m["axes"][axis]["mean"] for m in metrics]
               for axis in metrics[0]["axes"]}
    panels = {"mean scores of the responses": scores,
              "response tokens": {"length": [m["length"] for m in metrics]}}
    # --beta 0 computes no reference; null is beyond any number.
    if all(m.get("kl") is not None for m in metrics):
        panels["exact KL to the base, nats a token"] = {
            "KL": [m["kl"] for m in metrics]}
    return panels


def can_draw() -> bool:
    """Whether matplotlib is there; if not, say on stderr how to get it."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return False
    matplotlib.use("Agg")  # draws into files, without a display
    return True


def save(figure, path: Path) -> None:
    """Write a figure of matplotlib as PNG."""
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, dpi=110, format="png")
    write_whole(path, image.getvalue())


def write(folder: Path) -> Path:
    """Draw curves.png of a run that has scored steps, where one `can_draw`."""
    from matplotlib import pyplot

    metrics = scored_steps(folder)
    steps, panels = [m["step"] for m in metrics], curves(metrics)
    figure, charts = pyplot.subplots(1, len(panels), figsize=(12, 3.6))
    for chart, (title, lines) in zip(charts, panels.items(), strict=True):
        for name, values in lines.items():
            [line] = chart.plot(steps, running_mean(values), label=name)
            chart.plot(steps, values, alpha=0.25, linewidth=0.8, color=line.get_color())
        chart.set_title(title, fontsize=10)
        chart.set_xlabel("step")
        if len(lines) > 1:
            chart.legend(fontsize=8)
    path = folder / "curves.png"
    save(figure, path)
    pyplot.close(figure)  # it keeps every figure that is left open
    return path


def write_comparison(summaries: dict[str, list[dict]], path: Path) -> None:
    """Gold scores against seconds, and against KL; nothing without matplotlib.

    Args:
        summaries: by the method's name, the summary of its run with each seed.
    """
    if not can_draw():
        return
    from matplotlib import pyplot

    figure, (by_seconds, by_kl) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    base = mean(mean_of_axes(r["before"]["gold"])
                for r in next(iter(summaries.values())))
    for chart in (by_seconds, by_kl):
        chart.scatter([0], [base], marker="x", color="black", label="the base")
    for name, runs in summaries.items():
        gold = [mean_of_axes(r["after"]["gold"]) for r in runs]
        if "kl_is_a_bound" in runs[0]["after"]:
            name += " (KL: upper bound)"
        if runs[0]["trained_parameters"]:  # best of n is free only until it is used
            by_seconds.scatter([r["training_seconds"] for r in runs], gold, label=name)
        by_kl.scatter([r["after"]["kl"] for r in runs], gold, label=name)
    by_seconds.set(xlabel="training seconds", ylabel="gold: mean of axes, held out")
    by_kl.set(xlabel="KL to the base, nats a token")
    by_kl.legend(fontsize=8)
    save(figure, path)
    pyplot.close(figure)
