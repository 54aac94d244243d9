"""benchmarks/: what is printed is what was measured.

* Every case runs on the tiny model, for our side; slow: for the peers' sides too.
* Figures are medians over all rounds of all processes, with smallest and largest; a
  ratio is the other side's seconds over ours; a share is work over time over speed.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.__main__ as program
import frozen
from benchmarks import cases
from loading import TINY
from plumbing.files import UserError, read_json, write_json

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


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                           reason="memory is measured on Linux only")


@linux
@pytest.mark.parametrize("name", SMALL)
def test_every_case_measures_our_side(name):
    measured = cases.CASES[name]("ours", **SMALL[name])
    assert len(measured["rounds"]) == SMALL[name].get("steps", 1)
    assert all(r["all"] > 0 for r in measured["rounds"])
    if name == "step":
        assert measured["rounds"][0].keys() == {
            "all", "sampling", "reference", "training"}
        assert measured["tokens"] == 64
        # The training's products: forward and backward, at least twice the reference's.
        assert measured["flops"]["training"] > 2 * measured["flops"]["reference"] > 0


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize(("name", "side"), [
    ("step", "trl"), ("step", "trl, compact head, no checkpointing"),
    ("sampled", "generate"), ("sampled", "generate, shared prompt"),
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
                "flops": {"training": 25.0}, "product_rate": [5.0, 15.0], "bytes": 10.0}

    summary = program.summarise([process(1.0, 2.0), process(3.0, 10.0)])
    assert (summary["seconds"], summary["low"], summary["high"]) == (2.5, 1.0, 10.0)
    assert summary["rounds"] == 4
    assert summary["phases"] == {"training": 1.25}
    assert summary["tokens_per_second"] == 12
    # 25 FLOP in 0.75 s and in 3.25 s, at 100 FLOP/s; 10 bytes at 10 bytes/s.
    assert summary["share_of_gemm"]["training"] == pytest.approx(
        (25 / 0.75 + 25 / 3.25) / 2 / 100)
    assert summary["share_of_product"] == pytest.approx((1 / 1.5 + 1 / 6.5) / 2)


def test_a_ratio_is_the_other_sides_seconds_over_ours():
    side = {"low": 1.0, "high": 3.0, "peak_gb": 1.0, "phases": {}}
    lines = program.compared({"row": {"ours": side | {"seconds": 2.0},
                                      "trl": side | {"seconds": 5.0}}})
    assert "| row | ours | 2.00 (1.00 to 3.00) |  |" in lines[2]
    assert "| row | trl | 5.00 (1.00 to 3.00) | 2.50 × |" in lines[3]
    [*_, line] = program.brief({"row": {"ours": side | {"seconds": 2.0},
                                        "trl": side | {"seconds": 5.0}}})
    assert line == "| row | 2.00 s, 1.00 GB | trl 5.00 s, 1.00 GB (2.50 ×) |"


@linux
def test_flops_are_the_same_whichever_library_multiplies(monkeypatch):
    counts = []
    monkeypatch.setattr(cases, "gemm_speed", lambda: 1.0)
    for smallest in (1, 1 << 60):
        monkeypatch.setattr(frozen, "ONEDNN_FROM", smallest)
        counts.append(cases.our_step(**STEP | {"steps": 1})["flops"])
    assert counts[0] == counts[1]


def test_growth_rows_are_drawn_by_what_grows(tmp_path):
    side = {"low": 1.0, "high": 3.0}
    rows = {f"growth, prompt tokens, G = 16 = {n}": {"ours": side | {
        "seconds": n / 4, "peak_gb": 2.0}} for n in (64, 256)}
    rows["growth, prompts = 1"] = rows["growth, prompt tokens, G = 16 = 64"]
    grown = program.series(rows)
    assert [n for n, _ in grown["prompt tokens, G = 16"]] == [64, 256]
    assert [r["seconds"] for _, r in grown["prompts"]] == [16]
    assert "| prompts = 1 | 16.00 (1.00 to 3.00) | 2.00 |" in program.growth(rows)
    pytest.importorskip("matplotlib")
    program.draw(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


def test_the_readme_and_the_page_show_what_was_measured():
    report = read_json(ROOT / "benchmarks" / "results.json")
    assert (ROOT / "benchmarks" / "results.md").read_text() == program.tables(report)
    text = (ROOT / "README.md").read_text()
    rest = {n: r for n, r in report["rows"].items() if not n.startswith("growth")}
    shown = [line for line in program.brief(rest)[2:] if line in text]
    assert len(shown) == len(re.findall(r"^\|.* ×\)", text, re.M)) == 2
    assert report["sha256"] in (ROOT / "results" / "0.5b" / "README.md").read_text()


def test_the_measured_step_grows_at_most_linearly():
    report = read_json(ROOT / "benchmarks" / "results.json")
    grown = program.series({n: r for n, r in report["rows"].items()
                            if n.startswith("growth")})
    assert len(grown) == 5
    for title, points in grown.items():
        (first, start), *others = points
        for value, figures in others:
            assert figures["seconds"] / start["seconds"] < 1.15 * value / first, title
    # A longer prompt costs a group once: 448 tokens more, for 16 responses as for 4.
    once, often = (grown[f"prompt tokens{group}"] for group in ("", ", G = 16"))
    more = [points[-1][1]["seconds"] - points[0][1]["seconds"]
            for points in (once, often)]
    assert more[1] < 2 * more[0]  # computed for each response, it would be 4


def test_names_of_rows_differ_and_end_in_what_grows():
    rows = program.all_rows("DIR")
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        if row.name.startswith("growth"):
            assert int(row.name.split(" = ")[-1]) in row.case.values()


def test_a_part_measured_again_keeps_the_other_rows(tmp_path):
    report = {"date": "1", "machine": "m", "versions": {"torch": "2"}, "rows": {}}
    write_json(tmp_path / "r.json", report | {"rows": {"step": {}}, "date": "0"})
    assert program.earlier_rows(tmp_path / "r.json", report) == {"step": {}}
    with pytest.raises(UserError, match="another machine"):
        program.earlier_rows(tmp_path / "r.json", report | {"machine": "n"})


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path):
    end = subprocess.run([sys.executable, "-m", "benchmarks", str(tmp_path)], cwd=ROOT,
                         capture_output=True, text=True, check=False)
    assert end.returncode == 2
    assert len(end.stderr.splitlines()) == 1
