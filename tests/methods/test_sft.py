"""SFT on the best is what it is called.

* It imitates the best answer of a group; a step [S1], with shared prefixes, is the
  naive one: a mean over the tokens of all its answers.
"""

import pytest
import torch
from oracles import make_batch, make_run, relative, row_logs

import lora
from methods import sft
from methods.offline import Group


def test_a_step_on_the_best_equals_the_naive_one():
    run = make_run(sft.Settings)
    batch, _, _ = make_batch(run)
    policy = lora.parameters(run.model, "policy")
    examples, terms, tokens = [], [], 0
    for p, prompt in enumerate(batch.prompts):
        reward, responses = batch.reward[4 * p:4 * p + 4], batch.group(p)
        examples.append(sft.make_example(run, Group(prompt.ids, responses, reward)))
        best = int(reward.argmax())
        assert examples[p] == (prompt.ids, responses[best])
        terms.append(row_logs(run, batch, 4 * p + best, responses[best])[0].sum())
        tokens += len(responses[best])
    naive = -sum(terms) / tokens  # [S1]
    with lora.using(run.model, "policy"):
        loss, trained = sft.learn(run, examples)
    assert loss == pytest.approx(naive.item(), rel=1e-9)
    assert trained == tokens
    gradient = torch.cat([p.grad.flatten() for p in policy])
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(naive, policy)])
    assert relative(gradient, wanted) < 1e-9
