"""results/plot.py: panels hold a run's own figures, and the pictures are written."""

import json
import sys

import pytest

from results import plot


def metrics_of(steps: int) -> list[dict]:
    axes = {"a": {"mean": 0.5, "std": 0.1}, "b": {"mean": 0.25, "std": 0.1}}
    return [{"step": i, "R": i / 10, "axes": axes, "kl": 0.01 * i, "length": 20}
            for i in range(1, steps + 1)]


def a_summary(seconds: float, parameters: int = 9) -> dict:
    side = {"gold": {"a": 0.5, "b": 0.25, "R": 0.5}, "kl": 0.125}
    return {"before": side, "after": side, "training_seconds": seconds,
            "trained_parameters": parameters}


@pytest.mark.peer
def test_a_run_gives_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    # DPO has lines about training on pairs, too, which have no scores.
    rows = [*metrics_of(12), {"step": 13, "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows))
    assert plot.write(tmp_path) == tmp_path / "curves.png"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file is left


@pytest.mark.peer
def test_a_comparison_gives_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    best = a_summary(0.0, parameters=0)
    best["after"] = best["after"] | {"kl_is_a_bound": True}
    plot.write_comparison({"GRPO": [a_summary(1.0), a_summary(2.0)], "best": [best]},
                          tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_comparison_draws_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot.write_comparison({"GRPO": [a_summary(1.0)]}, tmp_path / "plot.png")
    assert capsys.readouterr().err == "no picture: pip install matplotlib\n"
    assert list(tmp_path.iterdir()) == []


def test_the_running_mean_looks_back_ten_steps():
    means = plot.running_mean([float(i) for i in range(20)])
    assert means[0] == 0
    assert means[3] == 1.5  # of 0, 1, 2, 3
    assert means[19] == 14.5  # of 10 to 19


def test_panels_hold_what_the_run_has():
    metrics = metrics_of(12)
    assert len(plot.curves(metrics)) == 3
    golden = [m | {"R_gold": 0.5} for m in metrics]
    scores = plot.curves(golden)["mean scores of the responses"]
    assert list(scores) == ["R", "R by the gold rubric", "a", "b"]
    for line in metrics:
        del line["kl"]
    assert len(plot.curves(metrics)) == 2
