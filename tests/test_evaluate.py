"""Before and after: what an evaluation says, and what a step's responses were like.

* The reported KL and the base's surprise are exact over the vocabulary, however the
  responses are cut into batches.
* An evaluation repeats itself, and starts at KL 0.
* Best of n keeps what the reward likes best.
* Every judge scores the same answers; scores, lengths and 3-grams are numpy's.
* The first evaluation is made once; a resumed run reads it, unless it is damaged.
* `describe` says what numpy says.
"""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from oracles import PROMPTS, make_batch, make_run, row_logs

import evaluate
import lora
from run import BEFORE
from sample import Rollout, sample_batch, score_batch


def lengths_run(**changes):
    """A run whose axis a is the length of a response, whose axis b is always 0.5."""
    run = make_run(**changes)
    run.score = lambda prompt, rows: torch.tensor([[len(r) / 9, 0.5] for r in rows])
    return run


# ---------------------------------------------------------------------- the figures


def test_the_kl_and_the_bases_surprise_are_exact_over_the_vocabulary():
    run = make_run()
    batch, kl, surprise = make_batch(run)[0], 0.0, 0.0
    with torch.no_grad():
        for row, response in enumerate(batch.sampled.responses()):
            *_, policy, ref = row_logs(run, batch, row, response)
            surprise -= sum(ref[i, t].item() for i, t in enumerate(response))
            kl += (policy.exp() * (policy - ref)).sum().item()
    assert evaluate.kl_and_surprise(run, batch) == pytest.approx((kl, surprise),
                                                                 rel=1e-10)


def test_an_evaluation_reports_them_a_token_whatever_its_batches(monkeypatch):
    run = lengths_run()
    figures, answers = evaluate.evaluate(run, PROMPTS, "before")
    batch = score_batch(run, PROMPTS, sample_batch(run, PROMPTS, 0, 1))
    kl, surprise = evaluate.kl_and_surprise(run, batch)
    tokens = int(batch.sampled.mask.sum())
    assert figures["kl"] == pytest.approx(kl / tokens, rel=1e-10)
    assert figures["base_perplexity"] == pytest.approx(math.exp(surprise / tokens),
                                                       rel=1e-10)
    # Two batches, for three prompts.
    run.settings = dataclasses.replace(run.settings, prompts_per_step=1, group_size=2)
    again, same = evaluate.evaluate(run, PROMPTS, "before")
    assert same == answers
    reward = figures.pop("reward_model"), again.pop("reward_model")
    assert reward[0] == pytest.approx(reward[1])
    assert figures == pytest.approx(again, rel=1e-10)


def test_evaluation_repeats_itself_and_starts_at_kl_zero():
    run = lengths_run()
    first, answers = evaluate.evaluate(run, PROMPTS, "before")
    again, same = evaluate.evaluate(run, PROMPTS, "before")
    assert (first, answers) == (again, same)
    lengths = [len(a.split()) for a in answers]
    assert first["length"] == pytest.approx(np.mean(lengths))
    assert first["reward_model"]["R"] == pytest.approx(
        (np.mean(lengths) / 9 + 3 * 0.5) / 4, rel=1e-6)
    assert first["kl"] > 0.01  # the adapter of these tests has B ≠ 0 …
    with torch.no_grad():
        for layer in lora.layers(run.model).values():
            layer.lora_B["policy"].zero_()
    figures = evaluate.evaluate(run, PROMPTS, "before")[0]
    assert figures["kl"] == pytest.approx(0, abs=1e-12)


def test_every_judge_scores_the_answers():
    run = lengths_run()
    run.judges = {"judge": lambda prompt, rows: torch.tensor(
        [[float(prompt.index), len(r)] for r in rows])}
    figures, answers = evaluate.evaluate(run, PROMPTS, "before")
    length = np.mean([len(a.split()) for a in answers])
    assert figures["judge"] == pytest.approx(
        {"a": 1, "b": length, "R": (1 + 3 * length) / 4})
    assert figures["reward_model"] == pytest.approx(
        {"a": length / 9, "b": 0.5, "R": (length / 9 + 1.5) / 4})


def test_best_of_n_keeps_what_the_reward_likes_best():
    run = lengths_run(group_size=4)
    batch = score_batch(run, PROMPTS, sample_batch(run, PROMPTS, 0, 4))
    best = batch.reward.view(3, 4).max(1).values
    assert (best > batch.reward.view(3, 4).mean(1)).any()  # there is a choice
    figures, answers = evaluate.evaluate(run, PROMPTS, "best", best_of=4)
    assert figures["reward_model"]["R"] == pytest.approx(best.mean().item())
    assert len(answers) == len(PROMPTS)
    drawn = int(batch.sampled.mask.sum()) / len(PROMPTS)
    assert figures["tokens_an_answer"] == pytest.approx(drawn)
    chosen = evaluate.best_rows(batch)
    assert chosen.reward.tolist() == best.tolist()
    assert chosen.group_size == 1
    rows = batch.sampled.responses()
    for p, row in enumerate(chosen.sampled.responses()):
        assert row in rows[4 * p:4 * p + 4]
        assert len(row) / 9 == pytest.approx(chosen.scores[p, 0].item())


def test_distinct_3_grams_are_different_runs_over_all_runs():
    assert evaluate.distinct_3_grams(["a b c d", "a b c d"]) == 2 / 4
    assert evaluate.distinct_3_grams(["a b c", "b c d", "one"]) == 1
    assert evaluate.distinct_3_grams(["one two"]) == 0


# --------------------------------------------------------------- the first evaluation


def test_the_first_evaluation_is_made_once_unless_its_file_is_damaged(tmp_path,
                                                                     monkeypatch):
    run, titles, inner = lengths_run(), [], evaluate.evaluate
    run.folder = tmp_path
    monkeypatch.setattr(evaluate, "evaluate", lambda run, prompts, title: (
        titles.append(title) or inner(run, prompts, title)))
    before = evaluate.answers_before(run, PROMPTS)
    assert before == inner(run, PROMPTS, "before")
    assert evaluate.answers_before(run, PROMPTS) == before
    assert titles == ["before"]
    saved = json.loads((tmp_path / BEFORE).read_text())
    saved["figures"]["kl"] += 1
    (tmp_path / BEFORE).write_text(json.dumps(saved))
    assert evaluate.answers_before(run, PROMPTS) == before
    assert titles == ["before", "before"]
    assert json.loads((tmp_path / BEFORE).read_text())["figures"] == before[0]


# ----------------------------------------------------------------- a step's responses


def test_describe_says_what_numpy_says():
    run = make_run()
    tokens = torch.tensor([[5, 2, 0], [5, 2, 0], [6, 7, 8], [3, 0, 0]] * 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]] * 3).bool()
    ended = torch.tensor([True, True, False, True] * 3)
    scores = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    run.score = lambda prompt, rows: scores.view(3, 4, 2)[prompt.index]
    batch = score_batch(run, PROMPTS, Rollout(tokens, mask, mask * 0.0, ended))
    table = scores.numpy().astype(float)
    reward = (table[:, 0] + 3 * table[:, 1]) / 4
    assert batch.reward.numpy() == pytest.approx(reward, abs=1e-6)
    figures = evaluate.describe(run, batch)
    axes = figures.pop("axes")
    for k, axis in enumerate("ab"):
        assert axes[axis]["mean"] == pytest.approx(table[:, k].mean(), rel=1e-5)
        assert axes[axis]["std"] == pytest.approx(table[:, k].std(), rel=1e-5)
    assert figures == pytest.approx({
        "R": reward.mean(), "R_std": reward.std(), "length": 2.0, "cut_off": 0.25,
        "distinct": 3.0, "tokens": 24}, rel=1e-5)
    # Where there is a gold rubric, its R of the same responses stands beside them.
    run.judges = {"gold": lambda prompt, rows: torch.tensor(
        [[float(prompt.index), len(r)] for r in rows])}
    gold = (np.repeat([0, 1, 2], 4) + 3 * np.array([2, 2, 3, 1] * 3)) / 4
    assert evaluate.describe(run, batch)["R_gold"] == pytest.approx(gold.mean())
