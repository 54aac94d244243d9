"""results/report.py: a page on which a class can move the weights.

* In a headless browser, sliders change R, advantages and order to what `grpo.py`
  computes from the same scores (1e-6), for every way of taking advantages.
* Nothing leaves the page, the console stays empty, the keyboard is enough, and a
  response is text whatever it holds.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import grpo
import run

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "results" / "report.py"
NASTY = "</script><script>document.title = 'broken'</script> <b>bold</b> \u2028 end"
AXES = ["politeness", "meaningfulness", "actionability", "safety"]


def write_run(folder: Path, advantage: str = "group",
              weights: tuple[float, ...] = (0.25,) * 4) -> list[list[list[float]]]:
    """Two steps of one prompt, five responses each, and a dead group; the scores."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, 4, generator=generator).round(decimals=4)
    scores[1] = 0.5  # dead
    folder.mkdir()
    run.write_json(folder / "config.json", {
        "axes": AXES, "weights_used": weights, "advantage": advantage,
        "min_std": 1e-3, "group_size": 5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps({
        "step": step, "R": 0.5, "kl": 0.1 * step, "entropy": 1.0, "length": 9.0,
        "axes": {axis: {"mean": 0.5} for axis in AXES}}) + "\n" for step in (1, 2)))
    (folder / "samples.jsonl").write_text("".join(json.dumps({
        "step": step + 1, "prompt": "Why?", "response": f"{NASTY} {i}",
        "scores": dict(zip(AXES, row, strict=True))}, ensure_ascii=False) + "\n"
        for step, group in enumerate(scores.tolist())
        for i, row in enumerate(group)), encoding="utf-8")
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
    subprocess.run([sys.executable, str(PROGRAM), str(folder)], check=True,
                   capture_output=True)
    browser.get((folder / "report.html").as_uri())


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


@pytest.mark.parametrize("advantage", ["group", "gdpo", "mean-only"])
def test_sliders_give_what_python_computes(browser, advantage, tmp_path):
    scores = torch.tensor(write_run(tmp_path / "run", advantage), dtype=torch.float64)
    open_report(browser, tmp_path / "run")
    for weights in ([1, 1, 1, 1], [0, 0, 0, 4], [0.3, 2.0, 0, 1.1], [0, 0, 0, 0]):
        move(browser, weights)
        used = torch.tensor(weights if any(weights) else [1.0] * 4,
                            dtype=torch.float64)
        reward = grpo.combine(scores[:1], used)[0]
        wanted, _ = grpo.make_advantage(scores[:1], used, advantage)
        rows = shown(browser)
        assert sorted(i for i, *_ in rows) == list(range(5))
        for i, r, a in rows:
            assert r == pytest.approx(float(reward[i]), abs=1e-6)
            assert a == pytest.approx(float(wanted[0, i]), abs=1e-6)
        assert [a for *_, a in rows] == sorted((a for *_, a in rows), reverse=True)


def test_the_page_opens_with_the_weights_of_the_run(browser, tmp_path):
    weights = (0.125, 0.125, 0.0, 0.75)  # 1, 1, 0 and 6
    scores = torch.tensor(write_run(tmp_path / "run", weights=weights))
    open_report(browser, tmp_path / "run")
    reward = grpo.combine(scores[0], torch.tensor(weights))
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
    assert "dead group" in browser.find_element("id", "told").text


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


def test_twins_of_a_prompt_stay_two_groups(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import report

    rows = [{"step": 1, "prompt": "Why?", "response": str(i), "scores": {"a": i / 8}}
            for i in range(8)]
    found = report.groups(rows, 4)
    assert [[r["text"] for r in group["responses"]] for group in found] == [
        ["0", "1", "2", "3"], ["4", "5", "6", "7"]]


def test_a_run_without_responses_is_refused_in_one_line(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    end = subprocess.run([sys.executable, str(PROGRAM), str(tmp_path / "run")],
                         check=False, capture_output=True, text=True)
    assert end.returncode == 2
    assert "no steps with responses" in end.stderr


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path):
    end = subprocess.run([sys.executable, str(PROGRAM), str(tmp_path)], check=False,
                         capture_output=True, text=True)
    assert end.returncode == 2
    assert len(end.stderr.splitlines()) == 1
