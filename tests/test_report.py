"""results/report.py and __main__.py: a page on which a class can move the weights.

* In a headless browser, sliders change R, advantages and order to what `grpo.py`
  computes from the same scores (1e-6), for every way of taking advantages; what the
  page leaves out of GDPO stands below its formula.
* Nothing leaves the page, the console stays empty, the keyboard is enough, no label is
  cut off, and a response is text whatever it holds.
* `python -m results` prints the tables of all folders, writes page and picture of each
  run that has its responses, and refuses bad input in one line.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo import group_advantage
from results import report
from results.__main__ import main

ROOT = Path(__file__).parent.parent
NASTY = "</script><script>document.title = 'broken'</script> <b>bold</b> \u2028 end"
AXES = ["politeness", "meaningfulness", "actionability", "safety"]


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n"
                            for row in rows), encoding="utf-8")


def write_run(folder: Path, weights: tuple[float, ...] = (0.25,) * 4,
              **config: object) -> list[list[list[float]]]:
    """Two steps of one prompt, five responses each, and a dead group; the scores."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, 4, generator=generator).round(decimals=4)
    scores[1] = 0.5  # dead
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "axes": AXES, "weights_used": weights, "group_size": 5, **config}))
    write_lines(folder / "metrics.jsonl", [{
        "step": step, "R": 0.5, "kl": 1.6e-4 * step, "entropy": 1.0, "length": 900.0,
        "axes": {axis: {"mean": 0.5} for axis in AXES}} for step in (1, 2)])
    write_lines(folder / "samples.jsonl", [{
        "step": step, "prompt": "Why?", "response": f"{NASTY} {i}",
        "scores": dict(zip(AXES, row, strict=True))}
        for step, group in enumerate(scores.tolist(), 1)
        for i, row in enumerate(group)])
    side = {"reward_model": {**dict.fromkeys(AXES, 0.5), "R": 0.5}, "kl": 0.125,
            "base_perplexity": 2.0, "distinct_3_grams": 0.5, "length": 40.0,
            "cut_off": 0.25}
    (folder / "summary.json").write_text(json.dumps({
        "before": side, "after": side, "sampled_tokens": 90, "trained_tokens": 90,
        "training_seconds": 10.0, "peak_rss_gb": 0.5,
        "answers": [{"prompt": "Why?", "before": "So.", "after": "Thus."}]}))
    return scores.tolist()


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    for word in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL",
                                                 "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    yield driver
    driver.quit()


def open_report(browser, folder: Path) -> None:
    browser.get(report.write(folder).as_uri())


def shown(browser) -> list[tuple[int, float, float]]:
    """(number, R, advantage) of the rows, from top to bottom."""
    return [tuple(row) for row in browser.execute_script(
        "const cell = (r, name) => r.querySelector(`[data-${name}]`).dataset[name];"
        "return [...document.querySelectorAll('#group tr')].map(r => ["
        "r.dataset.row, cell(r, 'reward'), cell(r, 'advantage')].map(Number))")]


def move(browser, weights: list[float]) -> None:
    for axis, weight in zip(AXES, weights, strict=True):
        browser.execute_script(
            "const s = document.getElementById('weight-' + arguments[0]);"
            "s.value = arguments[1]; s.dispatchEvent(new Event('input'));",
            axis, weight)


def expected_advantage(scores: torch.Tensor, weights: torch.Tensor,
                       kind: str) -> torch.Tensor:
    """(G,) from scores (G, K): by R, or the weighted mean of each axis' own."""
    if kind in ("group", "mean-only"):
        reward = scores @ weights / weights.sum()
        return group_advantage(reward[None], 1e-3, kind == "group")[0][0]
    return group_advantage(scores.T, 1e-3)[0].T @ weights / weights.sum()


@pytest.mark.parametrize("advantage", ["group", "per-axis", "gdpo", "mean-only"])
def test_sliders_give_what_python_computes(browser, advantage, tmp_path):
    scores = torch.tensor(write_run(tmp_path / "run", advantage=advantage,
                                    min_std=1e-3)[0], dtype=torch.float64)
    open_report(browser, tmp_path / "run")
    assert browser.find_element("id", "left-out").is_displayed() == (
        advantage == "gdpo")
    formula = browser.find_element("id", "formula").text
    assert ("each axis" in formula) == (advantage in ("per-axis", "gdpo"))
    for weights in ([1, 1, 1, 1], [0, 0, 0, 4], [0.3, 2.0, 0, 1.1], [0, 0, 0, 0]):
        move(browser, weights)
        used = torch.tensor(weights if any(weights) else [1.0] * 4,
                            dtype=torch.float64)
        reward = scores @ used / used.sum()
        wanted = expected_advantage(scores, used, advantage)
        rows = shown(browser)
        assert sorted(i for i, *_ in rows) == list(range(5))
        for i, r, a in rows:
            assert r == pytest.approx(float(reward[i]), abs=1e-6)
            assert a == pytest.approx(float(wanted[i]), abs=1e-6)
        assert [a for *_, a in rows] == sorted((a for *_, a in rows), reverse=True)


def test_the_page_opens_with_the_weights_of_the_run(browser, tmp_path):
    weights = (0.125, 0.125, 0.0, 0.75)  # 1, 1, 0 and 6
    scores = torch.tensor(write_run(tmp_path / "run", weights))
    open_report(browser, tmp_path / "run")
    reward = scores[0] @ torch.tensor(weights)  # whose sum is 1
    for i, r, _ in shown(browser):
        assert r == pytest.approx(float(reward[i]), abs=1e-6)
    assert [float(browser.find_element("id", f"weight-{a}").get_attribute("value"))
            for a in AXES] == [1, 1, 0, 6]


def test_a_dead_group_says_so(browser, tmp_path):
    write_run(tmp_path / "run")
    open_report(browser, tmp_path / "run")
    browser.execute_script("const s = document.getElementById('step'); s.value = '2';"
                           "s.dispatchEvent(new Event('change'));")
    assert all(a == 0 for *_, a in shown(browser))
    assert "dead group" in browser.find_element("id", "outcome").text


def test_the_keyboard_is_enough(browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    write_run(tmp_path / "run")
    open_report(browser, tmp_path / "run")
    before = shown(browser)
    reached = []
    for _ in range(8):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(browser.switch_to.active_element.get_attribute("id"))
    assert reached[:7] == ["step", "prompt", *(f"weight-{a}" for a in AXES), "reset"]
    slider = browser.find_element("id", "weight-safety")
    slider.send_keys(Keys.END)
    assert slider.get_attribute("value") == "4"
    assert shown(browser) != before
    browser.find_element("id", "reset").send_keys(Keys.ENTER)
    assert shown(browser) == before


def test_nothing_leaves_the_page_and_responses_are_text(browser, tmp_path):
    write_run(tmp_path / "run")
    browser.get_log("performance")  # what other pages did
    open_report(browser, tmp_path / "run")
    requests = [json.loads(entry["message"])["message"]
                for entry in browser.get_log("performance")]
    asked = {message["params"]["request"]["url"] for message in requests
             if message["method"] == "Network.requestWillBeSent"}
    assert asked == {(tmp_path / "run" / "report.html").as_uri()}
    assert browser.get_log("browser") == []
    assert browser.title == "run: a multi-objective GRPO run"
    cells = [cell.text for cell in browser.find_elements("css selector", "td.text")]
    assert all("<b>bold</b>" in cell for cell in cells)


def test_dark_mode_is_dark(browser, tmp_path):
    write_run(tmp_path / "run")
    open_report(browser, tmp_path / "run")
    for scheme, wanted in (("dark", "rgb(22, 24, 28)"),
                           ("light", "rgb(255, 255, 255)")):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {
            "features": [{"name": "prefers-color-scheme", "value": scheme}]})
        assert browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor") == wanted


def test_no_label_of_a_chart_is_cut_off(browser, tmp_path):
    write_run(tmp_path / "run")
    open_report(browser, tmp_path / "run")
    labels = browser.execute_script(
        "return [...document.querySelectorAll('svg')].flatMap(chart => {"
        "  const frame = chart.viewBox.baseVal;"
        "  return [...chart.querySelectorAll('text')].map(label => {"
        "    const box = label.getBBox();"
        "    return [label.textContent, box.x >= frame.x"
        "            && box.x + box.width <= frame.x + frame.width]; }); })")
    assert [text for text, inside in labels if not inside] == []
    # KL: 1.6e-4 and 3.2e-4, whose running mean ends in their middle.
    assert {"1.60e-4", "2.00e-4", "2.40e-4", "900", "step 1"} <= {
        text for text, _ in labels}


def test_a_label_has_three_digits_and_room(browser, tmp_path):
    write_run(tmp_path / "run")
    open_report(browser, tmp_path / "run")
    for value, label in ((0, "0.00"), (0.5, "0.500"), (-0.05, "-0.0500"),
                         (1.623e-4, "1.62e-4"), (0.001, "0.00100"), (12.345, "12.3"),
                         (1234.5, "1235"), (3.4e9, "3.40e9"), (-1e-17, "-1.00e-17")):
        assert browser.execute_script(f"return short({value})") == label


def test_a_method_without_advantages_in_groups_shows_those_of_grpo(browser, tmp_path):
    scores = torch.tensor(write_run(tmp_path / "run", method="ppo")[0])
    open_report(browser, tmp_path / "run")
    wanted = group_advantage(scores.mean(1)[None])[0][0]
    for i, _, a in shown(browser):
        assert a == pytest.approx(float(wanted[i]), abs=1e-5)  # float32 here
    assert "this run is one of ppo" in browser.find_element("id", "formula").text


def test_twins_of_a_prompt_stay_two_groups():
    rows = [{"step": 1, "prompt": "Why?", "response": str(i), "scores": {"a": i / 8}}
            for i in range(8)]
    assert [[response["text"] for response in group["responses"]]
            for group in report.groups(rows, 4)] == [
        ["0", "1", "2", "3"], ["4", "5", "6", "7"]]


# ---------------------------------------------------------------- python -m results


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_two_runs_give_their_tables_pages_and_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        write_run(folder)
    old = files_of(one)
    assert main([str(one), str(two)]) == 0
    out, err = capsys.readouterr()
    assert f"| {one} | reward model | 0.500 → 0.500 |" in out
    assert f"| {two} | reward model | 0.500 → 0.500 |" in out
    assert out.splitlines()[-5:] == [
        "", *(f"wrote {folder / name}" for name in ("report.html", "curves.png")
              for folder in (one, two))]
    assert err == ""
    for folder in (one, two):
        assert files_of(folder) == old | {"report.html", "curves.png"}
        assert "Why?" in (folder / "report.html").read_text()
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_page_is_written_and_one_line_says_why(
        tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("one", "two"):
        write_run(tmp_path / name)
    assert main([str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    assert capsys.readouterr().err == "no picture: pip install matplotlib\n"
    assert "report.html" in files_of(tmp_path / "two")
    assert "curves.png" not in files_of(tmp_path / "two")


def test_a_run_whose_responses_are_not_kept_stays_as_it_is(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "samples.jsonl").unlink()
    old = files_of(tmp_path / "run")
    assert main([str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "reward model" in out
    assert "wrote" not in out
    assert "no page" in err
    assert files_of(tmp_path / "run") == old


def test_best_of_n_trains_nothing_and_has_no_page(tmp_path, capsys):
    write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / "run" / name).write_text("")
    assert main([str(tmp_path / "run")]) == 0
    assert "no page" in capsys.readouterr().err


def test_a_run_that_has_not_ended_gets_a_page_and_no_table(tmp_path, capsys):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    assert main([str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("wrote ")
    assert "have not ended" in err
    assert "report.html" in files_of(tmp_path / "run")


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, capsys):
    write_run(tmp_path / "run")
    missing, run = str(tmp_path / "missing"), str(tmp_path / "run")
    old = files_of(tmp_path / "run")
    for words in ([], [run, missing], [str(tmp_path)]):
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        assert "python -m results" in err
    for name, text, problem in (
            ("metrics.jsonl", '{"step": 1, "R"', "cannot read"),
            ("metrics.jsonl", '{"R": 0.5}', "lacks step, axes, length"),
            ("samples.jsonl", '{"step": 1}\n', "line 1, lacks prompt"),
            ("config.json", "[]", "holds no JSON object"),
            ("summary.json", "{}", "lacks before, after")):
        whole = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(text)
        assert main([run]) == 2
        err = capsys.readouterr().err
        assert problem in err
        assert len(err.splitlines()) == 1
        assert files_of(tmp_path / "run") == old
        (tmp_path / "run" / name).write_text(whole)


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, capsys,
                                                          monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    write_run(tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("old")
    old = files_of(tmp_path / "run")
    monkeypatch.setattr(os, "replace", full)
    assert main([str(tmp_path / "run")]) == 2
    assert "report.html: No space left on device" in capsys.readouterr().err
    assert files_of(tmp_path / "run") == old
    assert (tmp_path / "run" / "report.html").read_text() == "old"


def test_the_command_has_an_exit_status(tmp_path):
    write_run(tmp_path / "run")
    for folder, status in (("run", 0), ("missing", 2)):
        end = subprocess.run(
            [sys.executable, "-m", "results", str(tmp_path / folder)], cwd=ROOT,
            check=False, capture_output=True, text=True)
        assert end.returncode == status, end.stderr
        assert "Traceback" not in end.stderr


def test_pages_are_written_before_words_that_a_terminal_may_not_know(tmp_path):
    write_run(tmp_path / "run")
    for shell in ("", " | head -1 > /dev/null"):
        words = shlex.join([sys.executable, "-m", "results", str(tmp_path / "run")])
        end = subprocess.run(
            ["bash", "-c", f"{words}{shell}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
            capture_output=True, check=False)
        assert end.returncode == 0, end.stderr
        assert b"\\u2192" in end.stdout or shell
        assert b"Traceback" not in end.stderr
        (tmp_path / "run" / "report.html").unlink()
