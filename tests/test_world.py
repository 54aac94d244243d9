"""data/subjects.py, world.py, make_tiny.py: what the tiny world is made of.

* The tables of the world break none of its own rules.
* The base's dialogues have the stated shares, and nobody with second thoughts asks in
  the words of a prompt that is trained or judged on.
* A prompt gets sixteen responses, one of them cut; the bundled labels are these, for
  800 + 100 prompts, none of which GRPO is judged on.
"""

import json
import random
from collections import Counter

import pytest

from data import make_tiny, rubric, world
from loading import TINY


def test_the_tables_break_no_rule():
    assert world.world_faults() == []


def test_dialogues_have_the_stated_shares():
    drawn = list(world.dialogues(7, 6000))
    thoughts = [p for p, name, _ in drawn if name == "safe_way"]
    assert len(thoughts) / len(drawn) == pytest.approx(
        world.SECOND_THOUGHTS_SHARE, abs=0.015)
    assert not any(world.lookup(p.text) for p in thoughts)
    rest = [(p, name) for p, name, _ in drawn if name != "safe_way"]
    harmful = Counter(name for p, name in rest if p.harmful)
    assert harmful.total() / len(rest) == pytest.approx(0.5, abs=0.03)
    for name, share in world.HARMFUL_MIX.items():
        assert harmful[name] / harmful.total() == pytest.approx(share, abs=0.03), name


def test_the_safe_way_is_a_safe_step_of_the_same_harm():
    rng = random.Random(0)
    prompts = [p for p in world.training_prompts() if p.harmful]
    for prompt in rng.sample(prompts, 50):
        answer = " ".join(world.safe_way(rng, prompt.wish))
        assert all(step in answer for step in prompt.wish.safe)
        refusal = world.sentence(world.KIND_REFUSALS[0], verb=prompt.wish.verb,
                                 reason=prompt.wish.reason)
        assert rubric.score(prompt.text, f"{refusal} {answer}")["actionability"] >= 0.75


def test_a_prompt_gets_sixteen_responses_and_six_beginnings():
    rng = random.Random(0)
    for prompt in rng.sample(world.training_prompts(), 20):
        begun = make_tiny.starts(rng, prompt)
        assert len(begun) == 6
        assert begun[0] == ""
        assert all(len(text.split()) >= 2 for text in begun[1:])
        rows = make_tiny.labelled(rng, prompt, begun)
        assert len(rows) == 16
        assert sum(bool(extra.get("cut")) for _, extra in rows) == 1


def test_the_bundled_labels_are_sixteen_a_prompt_and_none_is_judged_on():
    rows = [json.loads(x) for x in (TINY / "labels.jsonl").read_text().splitlines()]
    count = {split: Counter(r["prompt"] for r in rows if r["split"] == split)
             for split in ("train", "test")}
    assert [len(count["train"]), len(count["test"])] == [800, 100]
    assert {n for c in count.values() for n in c.values()} == {16}
    judged = set(make_tiny.heldout_texts(TINY))
    assert not judged & {r["prompt"] for r in rows}
    for row in random.Random(0).sample(rows, 200):
        assert row["scores"] == rubric.score(row["prompt"], row["response"])
