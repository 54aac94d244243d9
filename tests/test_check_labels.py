"""The free-English labels keep what the datasheet promises.

Claims: the checker counts as a person would on rows made by hand, and finds twins, bad
marks and tied axes; the bundled labels break no limit; the datasheet shows the
checker's figures.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data import check_labels
from plumbing.files import UserError
from plumbing.rows import read_rows

ROOT = Path(__file__).parent.parent
DATASHEET = (ROOT / "data" / "README.md").read_text()


def row(prompt="p", response="r", split="train", **scores):
    marks = dict.fromkeys(check_labels.AXES, 0.5) | scores
    return {"prompt": prompt, "response": response, "split": split, "scores": marks}


def spread(count: int = 200) -> list[dict]:
    """Rows whose marks are drawn independently: nothing to complain about."""
    random = np.random.default_rng(0)
    return [row(f"p{i}", f"r{i}", **dict(zip(
        check_labels.AXES, random.choice(check_labels.MARKS, 4), strict=True)))
        for i in range(count)]


# ------------------------------------------------------------------------ the checker


def test_similarity_is_shared_runs_of_three_words_over_all_runs():
    texts = [("train", "a b c d e"), ("test", "x b c d e y"), ("test", "q r s t")]
    # runs: abc bcd cde | xbc bcd cde dey: two in common of five
    [(score, one, other)] = check_labels.alike(texts, 0.3)
    assert (score, one, other) == (2 / 5, texts[0][1], texts[1][1])
    assert check_labels.alike(texts, 0.5) == []


def test_only_texts_of_different_sides_are_compared():
    twins = [("train", "one two three four"), ("train", "One, two: three four!")]
    assert check_labels.alike(twins, 0.9) == []
    assert len(check_labels.alike([twins[0], ("judge", twins[1][1])], 0.9)) == 1


def test_short_texts_are_compared_whole():
    assert len(check_labels.alike([("train", "No."), ("test", "no")], 1.0)) == 1
    assert check_labels.alike([("train", "No."), ("test", "Never.")], 0.1) == []


def test_grpo_prompts_and_labelled_prompts_are_sides_too():
    asked, said = check_labels.sides(
        [row("how do I do it", split="judge")],
        [{"prompt": "how do I do it", "split": "train"}])
    assert len(check_labels.alike(asked, 0.9)) == 1
    assert said == [("judge", "r")]


def test_agreement_compares_first_and_second_marks():
    second = [dict(r, first=r["scores"], scores=dict(r["scores"])) for r in spread(20)]
    for r in second:
        r["scores"]["safety"] = 1 - r["scores"]["safety"]
    table = {axis: figures for axis, *figures in check_labels.agreement(second)}
    assert table["politeness"] == [20, pytest.approx(1), 1, 0]
    count, correlation, equal, difference = table["safety"]
    marks = np.array([r["first"]["safety"] for r in second])
    assert count == 20
    assert correlation == pytest.approx(-1)
    assert equal == np.mean(marks == 0.5)
    assert difference == np.mean(abs(2 * marks - 1))
    with pytest.raises(UserError, match="first"):
        check_labels.agreement([row()])


def test_a_row_without_an_axis_is_refused():
    incomplete = row()
    del incomplete["scores"]["safety"]
    with pytest.raises(UserError, match="row 2 has no score of safety"):
        check_labels.marks([row(), incomplete])


def test_faults_are_named():
    assert check_labels.faults(spread(), 0) == []
    assert "3 texts are alike" in check_labels.faults(spread(), 3)[0]
    tied = [row(**{a: m for a in check_labels.AXES}) for m in check_labels.MARKS]
    assert len(check_labels.faults(tied, 0)) == 6  # every pair of axes
    [fault] = check_labels.faults([*spread(), row(safety=0.6)], 0)
    assert fault.startswith("row 201")
    cautious = [r for r in spread(400) if r["scores"]["safety"] != 0.25]
    assert check_labels.faults(cautious, 0) == ["safety never uses 0.25"]


# ------------------------------------------------------------------- the bundled data


@pytest.fixture(scope="module")
def labels():
    return read_rows(ROOT / "data" / "labels.jsonl", responses=True, labels=True)


def test_the_bundled_labels_break_no_limit(capsys):
    check_labels.main([])
    assert "across splits: 0" in capsys.readouterr().out


def test_there_are_enough_of_them(labels):
    prompts = {r["prompt"]: r["category"] for r in labels}
    adversarial = [c for c in prompts.values() if c != "benign"]
    assert len(labels) >= 1500
    assert len(prompts) >= 300
    assert len(adversarial) >= 200
    assert len(set(adversarial)) >= 14
    shares = {split: np.mean([r["split"] == split for r in labels])
              for split in ("train", "judge", "test")}
    for split, share in {"train": 0.60, "judge": 0.25, "test": 0.15}.items():
        assert shares[split] == pytest.approx(share, abs=0.02)
    lengths = [len(r["response"].split()) for r in labels]
    assert max(lengths) <= 95
    assert 0.05 < np.mean([bool(r.get("cut")) for r in labels]) < 0.15


def test_every_prompt_lies_in_one_split_and_one_category(labels):
    for field in ("split", "category"):
        pairs = {(r["prompt"], r[field]) for r in labels}
        assert len(pairs) == len({r["prompt"] for r in labels})


def test_no_opening_is_a_cue(labels):
    assert check_labels.openings(labels)[0][1] <= 0.01 * len(labels)


def test_the_datasheet_shows_the_figures_of_the_checker(labels):
    assert f"{len(labels):,} labelled responses" in DATASHEET
    assert f"to {len({r['prompt'] for r in labels})} prompts" in DATASHEET
    for split in ("train", "judge", "test"):
        own = [r for r in labels if r["split"] == split]
        prompts = len({r["prompt"] for r in own})
        assert f"| {split} | {prompts} | {len(own)} |" in DATASHEET
    values = check_labels.marks(labels)
    for k, axis in enumerate(check_labels.AXES):
        counts = [str(int((values[:, k] == m).sum())) for m in check_labels.MARKS]
        assert f"| {axis} | {' | '.join(counts)} |" in DATASHEET
    for one, other, r in check_labels.correlations(labels):
        assert f"| {one} | {other} | {r:.2f} |" in DATASHEET
    second = read_rows(ROOT / "data" / "second_scores.jsonl", True, True)
    assert len(second) >= 150
    for axis, _, *figures in check_labels.agreement(second):
        cells = "{:.2f} | {:.0%} | {:.2f}".format(*figures)
        assert f"| {axis} | {cells} |" in DATASHEET


def test_the_datasheet_counts_the_prompts():
    prompts = [json.loads(line) for line in
               (ROOT / "data" / "prompts.jsonl").read_text().splitlines()]
    held = sum(p["split"] == "heldout" for p in prompts)
    flat = re.sub(r"\s+", " ", DATASHEET)
    assert (f"{len(prompts)} further prompts, {len(prompts) - held} to train on and "
            f"{held} held out") in flat
    assert len(prompts) - held >= 520
    assert held >= 110
