"""DPO is what it is called.

* Its gradient [D1] is the closed form, and its loss that of TRL.
* A pair is the best and the worst answer of a group; a step on pairs, with shared
  prefixes and padding, is the naive one.
"""

import collections
import types

import pytest
import torch
from oracles import make_batch, make_run, relative, row_logs

import lora
from methods import dpo
from methods.offline import Group


def test_the_gradient_of_dpo_is_the_closed_form():
    beta, generator = 0.3, torch.Generator().manual_seed(0)
    best, worst, *ref = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    best.requires_grad_()
    worst.requires_grad_()
    dpo.dpo_loss(best, worst, *ref, beta).sum().backward()
    margin = beta * ((best - ref[0]) - (worst - ref[1])).detach()
    wanted = -beta * torch.sigmoid(-margin)
    torch.testing.assert_close(best.grad, wanted)
    torch.testing.assert_close(worst.grad, -wanted)


@pytest.mark.peer
def test_the_loss_of_dpo_is_that_of_trl():
    theirs = pytest.importorskip("trl.trainer.dpo_trainer")
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    ref = torch.randn(4, generator=generator, dtype=torch.float64)  # 2 best, 2 worst

    class Anything:
        def __getattr__(self, name):
            return Anything()

        def __call__(self, *args, **kwargs):
            return args[0] if args else Anything()

    class Outputs:
        log_probs, entropy, is_top1 = logp, logp, logp > 0

        def __getattr__(self, name):  # what its metrics want
            return torch.ones(4, 7)

    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=Anything(),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        beta=0.3, label_smoothing=0.0, use_weighting=False, _total_train_tokens=0,
        _tp_size=1,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)))
    inputs = {"input_ids": torch.ones(4, 8, dtype=torch.long),
              "attention_mask": torch.ones(4, 8),
              "completion_mask": torch.ones(4, 8), "ref_chosen_logps": ref[:2],
              "ref_rejected_logps": ref[2:]}
    loss = theirs.DPOTrainer._compute_loss(
        trainer, lambda **_: Outputs(), inputs, return_outputs=False)
    ours = dpo.dpo_loss(*logp.sum(1).chunk(2), *ref.chunk(2), 0.3).mean()
    assert float(loss) == pytest.approx(float(ours), abs=1e-6)


def test_a_step_on_pairs_equals_the_naive_one():
    run = make_run(dpo.Settings, beta=0.3)
    batch, _, _ = make_batch(run)
    policy = lora.parameters(run.model, "policy")
    pairs, terms, tokens = [], [], 0
    for p, prompt in enumerate(batch.prompts):
        reward, responses = batch.reward[4 * p:4 * p + 4], batch.group(p)
        pairs.append(dpo.make_pair(run, Group(prompt.ids, responses, reward)))
        best, worst = int(reward.argmax()), int(reward.argmin())
        assert best != worst
        assert pairs[p][:3] == (prompt.ids, responses[best], responses[worst])
        tokens += len(responses[best]) + len(responses[worst])
        logs = [row_logs(run, batch, 4 * p + i, responses[i]) for i in (best, worst)]
        terms.append(dpo.dpo_loss(*(log.sum()[None] for log in (
            logs[0][0], logs[1][0], logs[0][1], logs[1][1])), 0.3))
    naive = torch.stack(terms).mean()
    with lora.using(run.model, "policy"):
        loss, trained = dpo.learn(run, pairs)
    assert loss == pytest.approx(naive.item(), rel=1e-9)
    assert trained == tokens
    gradient = torch.cat([p.grad.flatten() for p in policy])
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(naive, policy)])
    assert relative(gradient, wanted) < 1e-9
