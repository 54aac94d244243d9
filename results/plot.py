"""Draw the curves of a run folder: `python results/plot.py RUN`.

Needs matplotlib, which nothing else does: `pip install matplotlib`. Writes curves.png
into the folder: R and the axes by step (mean over the step's responses, thin, and their
running mean over ten steps), the exact KL to the base, and the length of the responses.
In the tiny world R by the gold rubric stands beside the learned one: where the first
falls and the second rises, the policy is gaming its reward model.
"""

import json
import sys
from pathlib import Path

WINDOW = 10  # steps of the running mean


def running_mean(values: list[float]) -> list[float]:
    """Mean of each value and up to WINDOW − 1 before it."""
    return [sum(values[max(0, i + 1 - WINDOW):i + 1]) / min(i + 1, WINDOW)
            for i in range(len(values))]


def curves(metrics: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Panels by title, and in each the lines by name."""
    axes = {"R": [m["R"] for m in metrics]}
    if all("R_gold" in m for m in metrics):  # the tiny world's rubric
        axes["R by the gold rubric"] = [m["R_gold"] for m in metrics]
    axes |= {axis: [m["axes"][axis]["mean"] for m in metrics]
             for axis in metrics[0]["axes"]}
    panels = {"mean scores of the responses": axes,
              "response tokens": {"length": [m["length"] for m in metrics]}}
    if all("kl" in m for m in metrics):  # --beta 0 computes no reference
        panels["exact KL to the base, nats a token"] = {
            "KL": [m["kl"] for m in metrics]}
    return panels


def main(folder: Path) -> None:
    """Write curves.png."""
    try:
        import matplotlib
    except ImportError:
        print("plot.py: error: matplotlib is missing: pip install matplotlib",
              file=sys.stderr)
        sys.exit(2)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    # DPO and SFT also have lines about training on pairs, without responses.
    metrics = [m for m in map(json.loads, lines) if "R" in m]
    if not metrics:
        print(f"plot.py: error: {folder} has no steps with responses", file=sys.stderr)
        sys.exit(2)
    steps = [m["step"] for m in metrics]
    panels = curves(metrics)
    figure, places = pyplot.subplots(1, len(panels), figsize=(12, 3.6))
    for place, (title, named) in zip(places, panels.items(), strict=True):
        for name, values in named.items():
            [line] = place.plot(steps, running_mean(values), label=name)
            place.plot(steps, values, alpha=0.25, linewidth=0.8, color=line.get_color())
        place.set_title(title, fontsize=10)
        place.set_xlabel("step")
        if len(named) > 1:
            place.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        print("usage: python results/plot.py RUN, a folder with metrics.jsonl",
              file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]))
