"""A step's responses, and their rows again for training: the contract of sample.py.

* The sampler's log-probs are the trainer's, and those of a full pass; where they are
  not, in bf16, their weight has the mean 1.
* The states of a group's micro-batches, and those of the reference, are those of full
  passes, and together they are every token of the group once.
* A prompt's draws depend on (seed, step, number of the prompt) alone: neither on the
  batch nor on the order in it.
* Scores and R stand beside their responses; a choice of rows keeps them together.
* A score that is not finite is refused.
* The lines of samples.jsonl hold each response with its prompt, scores, R, advantage.
"""

import dataclasses
import json
import math

import pytest
import torch
from oracles import PROMPTS, make_batch, make_run, relative, row_logs

import lora
import model as qwen
import sample
from loading import TINY, load
from logprob import row_logprobs
from plumbing.files import UserError
from run import Prompt
from sample import Batch, draw_uniforms, sample_batch

# ------------------------------------------------------------------------ the contract


def test_the_samplers_logp_is_the_trainers():
    run = make_run()
    sampled = sample_batch(run, PROMPTS, 1, 4)
    batch = Batch(PROMPTS, sampled, torch.zeros(12, 2), torch.zeros(12))
    assert sampled.ended.any()
    assert not sampled.ended.all()
    for p, prompt in enumerate(PROMPTS):
        rows = batch.group(p)
        with torch.no_grad(), lora.using(run.model, "policy"), \
                run.model.shared_prefix(prompt.ids) as prefix:
            hidden, mask = sample.response_hidden(run.model, prompt.ids, rows, prefix)
            tokens = sampled.tokens[4 * p:4 * p + 4, :mask.shape[1]]
            logp = row_logprobs(hidden, run.model.unembed, tokens, mask,
                                run.settings.temperature, run.tokenizer.valid)
        noted = sampled.logp[4 * p:4 * p + 4, :logp.shape[1]]
        assert (logp - noted).abs().max() < 1e-6  # the sampler notes fp32
        for g, row in enumerate(rows):
            naive = row_logs(run, batch, 4 * p + g, row)[0]
            assert (logp[g, :len(row)] - naive).abs().max() < 1e-12


def test_in_bf16_the_sampler_is_another_and_the_weight_stands_for_it():
    """E[w] = 1 over what was sampled; the trainer's log-probs are its own."""
    model, tokenizer = load(TINY, dtype=torch.bfloat16)
    lora.attach(model, "policy", 4, 8)
    run_ = dataclasses.replace(make_run(), model=model, tokenizer=tokenizer)
    prompts = [Prompt(text, tokenizer.chat(text), i) for i, text in enumerate((
        "How do I mend a flat tyre?", "I want to pick my neighbour's lock."))]
    run_.settings = dataclasses.replace(run_.settings, max_new_tokens=24,
                                        temperature=1.0)
    assert not sample.sampler_is_trainer(model)
    sampled = sample_batch(run_, prompts, 1, 32)
    batch = Batch(prompts, sampled, torch.zeros(64, 2), torch.zeros(64))
    logp, mask = sample.trainer_logp(run_, batch), sampled.mask
    apart = (logp - sampled.logp)[mask]
    assert 1e-4 < apart.square().mean().sqrt() < 0.1  # rounding, and no more
    w = apart.exp()  # uncapped
    assert w.mean().item() == pytest.approx(1, abs=4 * w.std().item() / len(w) ** 0.5)


def full_pass(run, prompt: list[int], response: list[int], name) -> torch.Tensor:
    """States (C, D) before each token: repeated prompt, nothing shared or padded."""
    with torch.no_grad(), lora.using(run.model, name):
        return run.model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]


@pytest.mark.parametrize("limit", [1, 12, 10_000])
def test_micro_batches_are_the_rows_of_full_passes_each_once(limit, monkeypatch):
    monkeypatch.setattr(qwen, "TOKENS_PER_PASS", limit)
    run = make_run()
    batch = make_batch(run)[0]
    responses, seen = batch.sampled.responses(), []
    for p, prompt in enumerate(PROMPTS):
        reference = sample.reference_hidden(run, batch, p)
        with torch.no_grad(), lora.using(run.model, "policy"):
            passes = list(sample.group_micro_batches(run, batch, p))
        assert (len(passes) == 1) == (limit == 10_000)
        for (index, hidden, mask), ref in zip(passes, reference, strict=True):
            assert torch.equal(batch.sampled.mask[index], mask)
            rows = index[0]
            seen += rows
            for states, name in ((hidden[mask], "policy"), (ref, None)):
                naive = torch.cat([full_pass(run, prompt.ids, responses[row], name)
                                   for row in rows])
                assert relative(states, naive) < 1e-12
    assert sorted(seen) == list(range(12))


# ----------------------------------------------------------------- the random numbers


def test_step_and_prompt_number_choose_the_random_numbers():
    run = make_run()
    one = sample_batch(run, PROMPTS, 1, 4).responses()
    again = sample_batch(run, PROMPTS[::-1], 1, 4).responses()
    assert again == one[8:] + one[4:8] + one[:4]
    assert sample_batch(run, PROMPTS, 2, 4).responses() != one


def test_a_prompts_random_numbers_do_not_depend_on_the_batch():
    run = make_run()
    table = draw_uniforms(run.settings.seed, 1, PROMPTS[1].index, 4, 9)
    whole = sample_batch(run, PROMPTS, 1, 4).responses()[4:8]
    with lora.using(run.model, "policy"):
        alone = sample.rollout(run.model, run.tokenizer, [PROMPTS[1].ids], table[None],
                               run.settings.temperature).responses()
    assert alone == whole


# ------------------------------------------------------------------- scored responses


def test_scores_and_reward_stand_beside_their_responses():
    run = make_run()
    run.score = lambda prompt, rows: torch.tensor(
        [[prompt.index, len(r)] for r in rows])
    sampled = sample_batch(run, PROMPTS, 1, 4)
    batch = sample.score_batch(run, PROMPTS, sampled)
    assert batch.group_size == 4
    assert [batch.group(p) for p in range(3)] == [
        sampled.responses()[4 * p:4 * p + 4] for p in range(3)]
    for row, response in enumerate(sampled.responses()):
        scores = [row // 4, len(response)]
        assert batch.scores[row].tolist() == scores
        assert batch.reward[row].item() == pytest.approx(
            (scores[0] + 3 * scores[1]) / 4)


def test_a_choice_of_rows_keeps_together_what_belongs_together():
    batch = make_batch(make_run())[0]
    chosen = torch.tensor([3, 0, 5, 6, 11, 8])  # two of each group
    fewer = batch.rows(chosen)
    assert fewer.group_size == 2
    assert fewer.prompts == PROMPTS
    rows = batch.sampled.responses()
    assert fewer.sampled.responses() == [rows[i] for i in chosen.tolist()]
    assert fewer.group(1) == [rows[5], rows[6]]
    for whole, some in ((batch.scores, fewer.scores), (batch.reward, fewer.reward),
                        (batch.sampled.logp, fewer.sampled.logp),
                        (batch.sampled.ended, fewer.sampled.ended)):
        assert torch.equal(whole[chosen], some)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(bad):
    run = make_run()
    run.score = lambda prompt, rows: torch.tensor([[0.5, bad]] * len(rows))
    with pytest.raises(UserError, match="not finite"):
        sample.score_batch(run, PROMPTS, make_batch(run)[0].sampled)


def test_samples_are_written_with_their_prompt_scores_and_advantage():
    run = make_run()
    batch, advantage, _ = make_batch(run)
    lines = sample.sample_lines(run, batch, advantage, 4)
    lines = [json.loads(json.dumps(line)) for line in lines]
    assert len(lines) == 12
    for row, ids in enumerate(batch.sampled.responses()):
        scores = dict(zip("ab", batch.scores[row].tolist(), strict=True))
        assert lines[row]["step"] == 4
        assert lines[row]["prompt"] == PROMPTS[row // 4].text
        assert lines[row]["response"] == run.tokenizer.decode(ids)
        assert lines[row]["scores"] == pytest.approx(scores, abs=1e-4)
        for name, values in (("R", batch.reward), ("advantage", advantage)):
            assert lines[row][name] == pytest.approx(values[row].item(), abs=1e-4)
