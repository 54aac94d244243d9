"""results/plot.py: the panels hold a run's own figures, and the picture is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "results" / "plot.py"


def write_run(folder: Path) -> None:
    axes = {"a": {"mean": 0.5, "std": 0.1}, "b": {"mean": 0.25, "std": 0.1}}
    lines = [{"step": i, "R": i / 10, "axes": axes, "kl": 0.01 * i, "length": 20}
             for i in range(1, 13)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def run_plot(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True,
                          text=True, check=False)


@pytest.mark.peer
def test_a_run_gives_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path)
    assert run_plot(str(tmp_path)).returncode == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_running_mean_looks_back_ten_steps(monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import plot

    values = [float(i) for i in range(20)]
    means = plot.running_mean(values)
    assert means[0] == 0
    assert means[3] == 1.5  # of 0, 1, 2, 3
    assert means[19] == 14.5  # of 10 to 19


def test_panels_hold_what_the_run_has(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import plot

    write_run(tmp_path)
    metrics = [json.loads(x) for x in
               (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(plot.curves(metrics)) == 3
    golden = [m | {"R_gold": 0.5} for m in metrics]
    scores = plot.curves(golden)["mean scores of the responses"]
    assert list(scores) == ["R", "R by the gold rubric", "a", "b"]
    for line in metrics:
        del line["kl"]
    assert len(plot.curves(metrics)) == 2


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    end = run_plot(str(tmp_path))
    assert end.returncode == 2
    assert len(end.stderr.splitlines()) == 1
