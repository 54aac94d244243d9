"""benchmarks/: what is printed is what was measured.

* Every case runs on the tiny model, for our side; slow: for the peers' sides too.
* Figures are medians over all rounds of all processes, with smallest and largest; a
  ratio is the other side's seconds over ours; a share is work over time over speed.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as program
from benchmarks import cases
from model import TINY

ROOT = Path(__file__).parent.parent
STEP = {"model": str(TINY), "prompts": 2, "prompt_tokens": 20, "group_size": 4,
        "response_tokens": 8, "steps": 2}
SMALL = {
    "step": STEP,
    "sampled": {"model": str(TINY), "rows": 4, "prompt_tokens": 20,
                "response_tokens": 8, "steps": 2},
    "logprobs": {"rows": 64, "vocabulary": 2000, "width": 64, "steps": 2},
    "block": {"rows": 2, "tokens": 16, "steps": 2},
    "loading": {"model": str(TINY)},
}


@pytest.mark.parametrize("name", SMALL)
def test_every_case_measures_our_side(name):
    found = cases.CASES[name]("ours", **SMALL[name])
    assert len(found["rounds"]) == SMALL[name].get("steps", 1)
    assert all(r["all"] > 0 for r in found["rounds"])
    if name == "step":
        assert set(found["rounds"][0]) == {"all", "sampling", "reference", "training"}
        assert found["tokens"] == 64
        # The training's products: forward and backward, at least twice the reference's.
        assert found["flops"]["training"] > 2 * found["flops"]["reference"] > 0


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize(("name", "side"), [
    ("step", "trl"), ("step", "trl, tuned"), ("sampled", "generate"),
    ("logprobs", "naive"), ("logprobs", "trl selective"), ("logprobs", "trl chunked"),
    ("block", "peft"), ("loading", "from_pretrained")])
def test_every_case_measures_the_peers(name, side):
    pytest.importorskip("trl")
    words = json.dumps({"case": name, "side": side, **SMALL[name]})
    end = subprocess.run([sys.executable, "-m", "benchmarks.cases", words], cwd=ROOT,
                         capture_output=True, text=True, check=False)
    assert end.returncode == 0, end.stderr
    assert json.loads(end.stdout.splitlines()[-1])["rounds"][0]["all"] > 0


def test_figures_are_medians_of_all_rounds_and_shares_of_the_machine():
    def process(first: float, second: float) -> dict:
        return {"rounds": [{"all": first, "training": first / 2},
                           {"all": second, "training": second / 2}],
                "peak_gb": first, "tokens": 30, "gemm": [80.0, 120.0],
                "flops": {"training": 25.0}, "bandwidth": [5.0, 15.0], "bytes": 10.0}

    found = program.summarise([process(1.0, 2.0), process(3.0, 10.0)])
    assert (found["seconds"], found["low"], found["high"]) == (2.5, 1.0, 10.0)
    assert found["rounds"] == 4
    assert found["phases"] == {"training": 1.25}
    assert found["tokens_per_second"] == 12
    # 25 FLOP in 0.75 s and in 3.25 s, at 100 FLOP/s; 10 bytes at 10 bytes/s.
    assert found["share_of_gemm"]["training"] == pytest.approx(
        (25 / 0.75 + 25 / 3.25) / 2 / 100)
    assert found["share_of_bandwidth"] == pytest.approx((1 / 1.5 + 1 / 6.5) / 2)


def test_a_ratio_is_the_other_sides_seconds_over_ours():
    side = {"low": 1.0, "high": 3.0, "peak_gb": 1.0, "phases": {}}
    lines = program.compared({"row": {"ours": side | {"seconds": 2.0},
                                      "trl": side | {"seconds": 5.0}}})
    assert "| row | ours | 2.00 (1.00 to 3.00) |  |" in lines[2]
    assert "| row | trl | 5.00 (1.00 to 3.00) | 2.50 × |" in lines[3]


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path):
    end = subprocess.run([sys.executable, "-m", "benchmarks", str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True, check=False)
    assert end.returncode == 2
    assert len(end.stderr.splitlines()) == 1
