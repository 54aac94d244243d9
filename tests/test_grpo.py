"""GRPO's objective, its update, its loop and its command line.

* [E3] Advantages are numpy's; a flat group gets exactly 0; groups never mix; per-axis
  gives each axis the say that its weight gives it; gdpo is TRL's, but for sample stds.
* [E4] [E5] [E7] The gradient of the loss equals exact enumeration over a toy
  vocabulary, for every normalisation and KL estimator, where clipping acts.
* [E6] Each estimator's value and gradient have the expectation that its comment states,
  and no token overflows or is pushed the wrong way.
* On a real (tiny) Qwen with LoRA the gradient equals a naive reference with repeated
  prompts and full logits; padding, row order and micro-batches do not change it.
* One inner step has ratio 1; two steps clip; the gradient is clipped to norm 1.
* [E8] Weighted tokens of another sampler stand for the policy's; the weight is exactly
  1 where sampler and trainer are one; a ratio that would overflow stays finite.
* A dead group costs nothing without KL, pays its KL with it, and always counts.
* The loss, the entropy and the KL that an update reports are exact; its advantages, as
  it reports them, are numpy's and the ones that it trained on.
* The loop draws every prompt once a round, and no two of a step alike; the rate falls
  in a line; an adapter that does not move is refused.
* Bad settings and losses are refused in one line; --help says what TRL calls them.
"""

import dataclasses
import inspect
import itertools
import math
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import (
    PROMPTS,
    Recorder,
    flat,
    make_batch,
    make_run,
    numpy_advantage,
    relative,
    row_logs,
    train_batch,
)

import grpo
import lora
import model as qwen
from plumbing.figures import Clock
from plumbing.files import UserError
from sample import Rollout, reference_hidden, sample_batch, score_batch

LOSSES, KLS = ["grpo", "dapo", "dr_grpo"], ["k1", "k2", "k3"]
every_loss = pytest.mark.parametrize("loss", LOSSES)


# ---------------------------------------------------------- [E3] reward → advantage


def random_rewards(groups: int = 5, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(groups, size, generator=generator, dtype=torch.float64)


def test_advantage_equals_numpy_with_population_std():
    reward = random_rewards()
    advantage, alive = grpo.group_advantage(reward)
    wanted = torch.from_numpy(numpy_advantage(reward.numpy()))
    torch.testing.assert_close(advantage, wanted, rtol=1e-12, atol=1e-12)
    assert alive.tolist() == [True] * 5


def test_flat_groups_get_exactly_zero_and_are_dead():
    reward = random_rewards()
    reward[1] = 0.7
    reward[3] = 0.7 + 1e-9 * torch.randn(8, dtype=torch.float64)  # rounding noise
    advantage, alive = grpo.group_advantage(reward)
    assert alive.tolist() == [True, False, True, False, True]
    assert (advantage[[1, 3]] == 0).all()
    assert (advantage[[0, 2, 4]] != 0).all()
    # The same in fp32, where the mean of equal numbers may not be that number.
    equal = torch.full((1, 7), 0.7)
    assert (grpo.group_advantage(equal)[0] == 0).all()


def test_min_std_is_where_a_group_dies():
    reward = torch.tensor([[0.5, 0.5 + 2e-3]], dtype=torch.float64)  # std is 1e-3
    assert not grpo.group_advantage(reward, min_std=1.001e-3)[1].item()
    assert grpo.group_advantage(reward, min_std=0.999e-3)[1].item()


def test_groups_do_not_leak():
    reward = random_rewards()
    whole, _ = grpo.group_advantage(reward)
    reward[2] = reward[2] * 50 - 10
    changed, _ = grpo.group_advantage(reward)
    others = [0, 1, 3, 4]
    assert torch.equal(changed[others], whole[others])


def test_without_dividing_the_advantage_keeps_the_scale_of_the_reward():
    reward = random_rewards()
    advantage, _ = grpo.group_advantage(reward, divide=False)
    torch.testing.assert_close(advantage, reward - reward.mean(1, keepdim=True))
    scores = torch.stack([reward, reward / 2], -1)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    mean_only, _ = grpo.make_advantage(scores, weights, "mean-only")
    torch.testing.assert_close(mean_only, advantage * (1 + 3 / 2) / 4)


def axes_case() -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.stack([random_rewards(4, 6, seed=k) for k in range(3)], -1)
    scores[..., 1] /= 20  # an axis with little spread
    return scores, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


def test_group_normalises_the_sum_and_per_axis_each_before_the_sum():
    scores, weights = axes_case()
    axes, share = [scores[..., k].numpy() for k in range(3)], weights.numpy() / 8
    after = numpy_advantage(sum(w * a for w, a in zip(share, axes, strict=True)))
    before = sum(w * numpy_advantage(a) for w, a in zip(share, axes, strict=True))
    for kind, wanted in (("group", after), ("per-axis", before)):
        advantage, alive = grpo.make_advantage(scores, weights, kind)
        torch.testing.assert_close(advantage, torch.from_numpy(wanted), rtol=1e-12,
                                   atol=0)
        assert alive.all()
    assert np.abs(after - before).max() > 0.1  # the two really differ here


def test_per_axis_ignores_an_axis_that_is_flat_or_has_no_weight():
    scores, weights = axes_case()
    weights[2] = 0
    wanted, _ = grpo.make_advantage(scores, weights, "per-axis")
    scores[..., 2] = random_rewards(4, 6, seed=9) * 100
    advantage, alive = grpo.make_advantage(scores, weights, "per-axis")
    assert torch.equal(advantage, wanted)
    assert alive.all()
    # Axis 1 flat in group 0: only axis 0 is left to speak. Axis 2, though it varies,
    # does not bring a group to life.
    scores[0, :, 1] = 0.3
    scores[1, :, :2] = 0.3
    advantage, alive = grpo.make_advantage(scores, weights, "per-axis")
    only = numpy_advantage(scores[..., 0].numpy())[0] / 3
    torch.testing.assert_close(advantage[0], torch.from_numpy(only))
    assert (advantage[1] == 0).all()
    assert torch.equal(advantage[2:], wanted[2:])
    assert alive.tolist() == [True, False, True, True]


def test_gdpo_is_per_axis_with_std_1_over_the_step():
    scores, weights = axes_case()
    scores[1] = 0.3  # a dead group, which counts and stays at exactly 0
    plain, _ = grpo.make_advantage(scores, weights, "per-axis")
    advantage, alive = grpo.make_advantage(scores, weights, "gdpo")
    assert alive.tolist() == [True, False, True, True]
    assert (advantage[1] == 0).all()
    wanted = (plain - plain.mean()) / (plain.std(correction=0) + 1e-4)
    torch.testing.assert_close(advantage[alive], wanted[alive])
    assert advantage.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert plain.std(correction=0).item() < 0.8  # axes that disagree make a short sum


@pytest.mark.peer
@pytest.mark.parametrize("std", ["population", "sample"])
def test_gdpo_is_what_trl_computes(std):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    source = inspect.getsource(trainer.GRPOTrainer)
    lines = source.partition('aggregation == "normalize_then_sum":\n')[2]
    lines = lines.partition("\n        else:")[0]  # TRL's own, of the installed version
    scores, weights = axes_case()

    def population(values, dim=None, keepdim=False):
        return values.std(dim=dim, correction=0, keepdim=keepdim)

    names = {
        "torch": torch, "device": "cpu", "num_generations": scores.shape[1],
        "nanstd": population if std == "population" else trainer.nanstd,
        "rewards_per_func": scores.flatten(0, 1),
        "unscorable_mask": torch.zeros(scores.shape[0] * scores.shape[1]).bool(),
        "self": types.SimpleNamespace(reward_funcs=[None] * 3,
                                      reward_weights=weights / weights.sum())}
    exec(textwrap.dedent(lines), names)
    advantage, _ = grpo.make_advantage(scores, weights, "gdpo")
    rtol = 1e-12 if std == "population" else 0.1
    torch.testing.assert_close(names["advantages"].view_as(advantage), advantage,
                               rtol=rtol, atol=1e-12)


# ------------------------------------------- [E4]-[E7] against exact enumeration
# A toy policy: sequences of at most 3 tokens over 4, where token 0 ends a sequence and
# each context has logits of its own. All 40 sequences fit on a page.

V, C, END = 4, 3, 0
CLIP, BETA, TOKENS = 0.2, 0.3, 7
SEQUENCES = sorted({(*s[:s.index(END)], END) if END in s else s
                    for s in itertools.product(range(V), repeat=C)})
CONTEXTS = sorted({s[:t] for s in SEQUENCES for t in range(len(s))})
# What a response's token counts, when it is the only row of its step.
SHARE = {"grpo": lambda n: 1 / n, "dapo": lambda n: 1 / TOKENS,
         "dr_grpo": lambda n: 1 / C}
PULL = {"k1": lambda d: 1.0, "k2": lambda d: -d, "k3": lambda d: 1 - math.exp(d)}
VALUE = {"k1": lambda d: -d, "k2": lambda d: d * d / 2,
         "k3": lambda d: math.exp(d) - d - 1}


def places(sequence: tuple[int, ...]) -> list[tuple[int, int]]:
    """(row of the table, token) for every token of a sequence."""
    return [(CONTEXTS.index(sequence[:t]), v) for t, v in enumerate(sequence)]


def toy() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits θ, θ_old and θ_ref (13, 4), and an advantage for each sequence (40,)."""
    random = np.random.default_rng(3)
    old = random.normal(size=(len(CONTEXTS), V))
    theta, ref = (old + 0.5 * random.normal(size=old.shape) for _ in range(2))
    return theta, old, ref, random.normal(size=len(SEQUENCES))


def logs(table: np.ndarray) -> np.ndarray:
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


def enumerate_objective(tables, advantage, loss: str, kl: str):
    """Oracle, in plain numpy: Σ_o π_old(o) J(o), its gradient in θ, and the clipped.

    The gradient is written out by hand: ∇ log π is one-hot minus softmax, ρ A counts
    where clipping does not act, and PULL is the slope of each estimator.
    """
    theta, old, ref = map(logs, tables)
    value, gradient, clipped = 0.0, np.zeros_like(theta), 0
    for sequence, adv in zip(SEQUENCES, advantage, strict=True):
        at = places(sequence)
        weight = math.exp(sum(old[p] for p in at)) * SHARE[loss](len(sequence))
        for p in at:
            ratio, delta = math.exp(theta[p] - old[p]), ref[p] - theta[p]
            off = ratio > 1 + CLIP if adv > 0 else ratio < 1 - CLIP
            clipped += off
            bound = 1 + CLIP if adv > 0 else 1 - CLIP
            value += weight * (adv * (bound if off else ratio)
                               - BETA * VALUE[kl](delta))
            slope = (0 if off else adv * ratio) - BETA * PULL[kl](delta)
            context, token = p
            gradient[context] -= weight * slope * np.exp(theta[context])
            gradient[context, token] += weight * slope
    return value, gradient, clipped


def padded(table: torch.Tensor) -> torch.Tensor:
    """log π of every token of every sequence (40, 3), 0 behind the end."""
    logp = table.log_softmax(-1)
    rows = [torch.stack([logp[p] for p in places(s)]) for s in SEQUENCES]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def toy_mask() -> torch.Tensor:
    return torch.tensor([[t < len(s) for t in range(C)] for s in SEQUENCES])


@pytest.mark.parametrize("kl", KLS)
@every_loss
def test_gradient_equals_exact_enumeration(loss, kl):
    *tables, advantage = toy()
    value, wanted, count = enumerate_objective(tables, advantage, loss, kl)
    theta, old, ref = (torch.tensor(t, requires_grad=i == 0)
                       for i, t in enumerate(tables))
    logp, logp_old, logp_ref, mask = padded(theta), padded(old), padded(ref), toy_mask()
    chance = (logp_old * mask).sum(1).exp()
    assert chance.sum().item() == pytest.approx(1, abs=1e-12)  # all sequences are here
    total, clipped = 0.0, 0
    for row in range(len(SEQUENCES)):
        one = slice(row, row + 1)
        weight = grpo.token_weights(mask[one].double(), loss, rows=1, tokens=TOKENS,
                                    length=C)
        own, off = grpo.grpo_loss(
            logp[one], logp_old[one], logp_ref[one], torch.tensor(advantage[one]),
            weight, CLIP, BETA, kl)
        total, clipped = total + chance[row] * own, clipped + int(off.sum())
    total.backward()
    assert total.item() == pytest.approx(-value, rel=1e-12)
    assert relative(theta.grad, -torch.from_numpy(wanted)) < 1e-12
    assert clipped == count
    assert 10 < count < int(mask.sum()) / 2  # clipping acts, and not everywhere


def test_the_enumeration_itself_agrees_with_finite_differences():
    *tables, advantage = toy()
    _, gradient, _ = enumerate_objective(tables, advantage, "grpo", "k3")
    step = 1e-6
    for place in itertools.product(range(len(CONTEXTS)), range(V)):
        sides = []
        for sign in (1, -1):
            theta = tables[0].copy()
            theta[place] += sign * step
            sides.append(enumerate_objective([theta, *tables[1:]], advantage,
                                             "grpo", "k3")[0])
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(
            gradient[place], abs=1e-8)


def test_on_policy_sum_over_tokens_is_the_gradient_of_the_expected_advantage():
    # With a constant denominator (Dr. GRPO) nothing biases the policy gradient.
    table, *_, advantage = toy()
    theta, advantage = torch.tensor(table, requires_grad=True), torch.tensor(advantage)
    logp, mask = padded(theta), toy_mask()
    chance = (logp * mask).sum(1).exp()
    wanted, = torch.autograd.grad((chance * advantage).sum(), theta, retain_graph=True)
    weight = grpo.token_weights(mask.double(), "dr_grpo", rows=1, length=1)
    total = sum(chance[row].detach() * grpo.grpo_loss(
        logp[row:row + 1], logp[row:row + 1].detach(), None, advantage[row:row + 1],
        weight[row:row + 1], beta=0)[0] for row in range(len(SEQUENCES)))
    assert relative(torch.autograd.grad(total, theta)[0], -wanted) < 1e-12


def loss_inputs(width: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """The toy's logp, logp_old, logp_ref (40, width), advantage (40,) and mask."""
    *tables, advantage = toy()
    inputs = [torch.nn.functional.pad(padded(torch.tensor(t)), (0, width - C))
              for t in tables]
    mask = torch.nn.functional.pad(toy_mask(), (0, width - C))
    return inputs, torch.tensor(advantage), mask


def loss_gradient(inputs, advantage, mask, loss: str, kl: str):
    logp = inputs[0].clone().requires_grad_()
    weight = grpo.token_weights(mask.double(), loss, length=C)
    value, clipped = grpo.grpo_loss(logp, *inputs[1:], advantage, weight, CLIP, BETA,
                                    kl)
    value.backward()
    return value.item(), logp.grad, clipped


@pytest.mark.parametrize("kl", KLS)
@every_loss
def test_what_stands_in_the_padding_changes_nothing(loss, kl):
    inputs, advantage, mask = loss_inputs(C)
    value, wanted, clipped = loss_gradient(inputs, advantage, mask, loss, kl)
    inputs, advantage, mask = loss_inputs(C + 4)
    generator = torch.Generator().manual_seed(0)
    for garbage in (1e3, 1e30, math.inf, math.nan):
        rubbish = [torch.where(mask, x, garbage * torch.randn(
            x.shape, generator=generator, dtype=x.dtype)) for x in inputs]
        again, gradient, off = loss_gradient(rubbish, advantage, mask, loss, kl)
        assert again == pytest.approx(value, rel=1e-14)
        assert torch.equal(off[:, :C], clipped)
        assert not off[:, C:].any()
        assert relative(gradient[mask], wanted[mask[:, :C]]) < 1e-14


def test_token_weights_are_those_of_the_whole_step():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    wanted = {"grpo": [1 / 9, 1 / 3, 1 / 6], "dapo": [1 / 6] * 3,
              "dr_grpo": [1 / 12] * 3}
    for loss, weight in wanted.items():
        whole = grpo.token_weights(mask, loss)
        expected = mask * torch.tensor(weight)[:, None]
        torch.testing.assert_close(whole, expected)
        # Some rows of the step, with the step's own sizes, get the same numbers.
        some = grpo.token_weights(mask[1:, :2], loss, rows=3, tokens=6, length=4)
        torch.testing.assert_close(some, whole[1:, :2])


# ------------------------------------------------- [E6] the estimators' expectations


def one_token() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of π, with gradient, and log ref, over one token of 6."""
    generator = torch.Generator().manual_seed(1)
    logits, ref = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), ref.log_softmax(-1)


def test_k1_and_k3_have_the_mean_of_kl():
    logits, ref = one_token()
    logp = logits.log_softmax(-1)
    kl = (logp.exp() * (logp - ref)).sum().item()
    assert kl > 0.1
    for kind in ("k1", "k3"):
        mean = (logp.exp() * grpo.kl_estimate(logp, ref, kind)).sum().item()
        assert mean == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize("kind", KLS)
def test_gradient_of_each_estimator_is_what_its_comment_says(kind):
    logits, ref = one_token()
    logp = logits.log_softmax(-1)
    loss = (logp.exp().detach() * grpo.kl_estimate(logp, ref, kind)).sum()
    gradient, = torch.autograd.grad(loss, logits)
    logp = logits.log_softmax(-1)
    wanted = {"k1": 0 * logits.sum(), "k2": (logp.exp() * (logp - ref)).sum(),
              "k3": (ref.exp() * (ref - logp)).sum()}[kind]
    wanted, = torch.autograd.grad(wanted, logits)
    assert (gradient - wanted).abs().max() < 1e-10
    assert kind == "k1" or wanted.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_of_an_abandoned_token_stays_finite_and_pulls_back(dtype):
    delta = torch.tensor([10.0, 25.0, 1000.0], dtype=dtype)
    logp = (-delta).requires_grad_()
    value = grpo.kl_estimate(logp, torch.zeros(3, dtype=dtype), "k3")
    slope, = torch.autograd.grad(value.sum(), logp)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert value[0].item() == pytest.approx(math.exp(10) - 11, rel=1e-6)
    assert value[0] < value[1] < value[2]
    assert (slope < 0).all()  # a smaller loss is a larger log π


# ---------------------------------------------------- a real Qwen, small, in float64


def naive_objective(run, batch, advantage, on_policy: bool = False,
                    weighted: bool = False) -> torch.Tensor:
    """The objective in words: one row after the other, from scratch."""
    s, total, rows = run.settings, 0.0, batch.sampled.responses()
    tokens = sum(map(len, rows))
    for row, response in enumerate(rows):
        logp, ref, *_ = row_logs(run, batch, row, response)
        old = batch.sampled.logp[row, :len(response)]
        ratio = (logp - (logp.detach() if on_policy else old)).exp()
        adv, (low, high) = advantage[row], (1 - s.clip, 1 + s.clip)
        bounded = ratio.clamp(max=high) if adv > 0 else ratio.clamp(min=low)
        delta = ref - logp
        kl = {"k1": -delta, "k2": delta ** 2 / 2, "k3": delta.exp() - 1 - delta}[s.kl]
        share = {"grpo": 1 / (len(rows) * len(response)), "dapo": 1 / tokens,
                 "dr_grpo": 1 / (len(rows) * s.max_new_tokens)}[s.loss]
        w = (logp.detach() - old).exp().clamp(max=2) if weighted else 1
        total = total + share * (w * bounded * adv - s.beta * kl).sum()
    return total


def naive_gradient(run, batch, advantage, on_policy: bool = False,
                   weighted: bool = False) -> torch.Tensor:
    loss = -naive_objective(run, batch, advantage, on_policy, weighted)
    return flat(torch.autograd.grad(loss, lora.parameters(run.model, "policy")))


@pytest.fixture
def gradient(monkeypatch):
    """What `train_batch` hands to its optimizer, but not clipped to norm 1."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_",
                        lambda parameters, _: flat(p.grad for p in parameters).norm())
    return lambda *arguments, **named: train_batch(*arguments, **named)[0]


CASES = [(loss, "k3", 0.3) for loss in LOSSES] + [
    ("grpo", "k1", 0.3), ("grpo", "k2", 0.3), ("dapo", "k3", 0.0)]


@pytest.mark.parametrize(("loss", "kl", "beta"), CASES)
def test_gradient_equals_the_naive_reference(loss, kl, beta, gradient):
    run = make_run(loss=loss, kl=kl, beta=beta)
    batch, advantage, _ = make_batch(run)
    wanted = naive_gradient(run, batch, advantage)
    assert relative(gradient(run, batch, advantage), wanted) < 1e-12
    clipped = sum(group_sums(run, batch, advantage, p)["clipped"] for p in range(3))
    assert 3 < clipped < batch.sampled.mask.sum() / 2  # clipping acts, not everywhere


def group_sums(run, batch, advantage, p: int) -> dict[str, float]:
    reference = reference_hidden(run, batch, p) if run.settings.beta > 0 else None
    with lora.using(run.model, "policy"):
        sums = grpo.train_group(run, batch, advantage, p, reference,
                                batch.sampled.logp, on_policy=False)
    return dict(zip(grpo.SUMS, sums.tolist(), strict=True))


@every_loss
def test_micro_batches_do_not_change_the_gradient(loss, gradient, monkeypatch):
    run = make_run(loss=loss)
    batch, advantage, _ = make_batch(run)
    wanted = gradient(run, batch, advantage)
    lengths = [len(row) for row in batch.group(0)]
    assert len(qwen.micro_batches(lengths)) == 1
    for limit, count in ((1, 4), (12, 3)):
        monkeypatch.setattr(qwen, "TOKENS_PER_PASS", limit)
        assert len(qwen.micro_batches(lengths)) == count
        assert relative(gradient(run, batch, advantage), wanted) < 1e-12


@every_loss
def test_padding_does_not_change_the_gradient(loss, gradient):
    run = make_run(loss=loss)
    batch, advantage, _ = make_batch(run)
    wanted, old = gradient(run, batch, advantage), batch.sampled
    mask = torch.nn.functional.pad(old.mask, (0, 6))
    batch.sampled = Rollout(
        torch.nn.functional.pad(old.tokens, (0, 6)).masked_fill(~mask, 17), mask,
        torch.nn.functional.pad(old.logp, (0, 6)).masked_fill(~mask, 1e4), old.ended)
    assert relative(gradient(run, batch, advantage), wanted) < 1e-12


@every_loss
def test_row_and_group_order_do_not_change_the_gradient(loss, gradient):
    run = make_run(loss=loss)
    batch, advantage, _ = make_batch(run)
    wanted, old = gradient(run, batch, advantage), batch.sampled
    groups, inside = [2, 0, 1], [3, 1, 0, 2]
    order = torch.tensor([4 * p + g for p in groups for g in inside])
    batch.prompts = [PROMPTS[p] for p in groups]
    batch.sampled = Rollout(*(getattr(old, f.name)[order]
                              for f in dataclasses.fields(Rollout)))
    assert relative(gradient(run, batch, advantage[order]), wanted) < 1e-12


# ----------------------------------------------------------------- the inner steps


def test_one_inner_step_is_the_policy_gradient(gradient):
    run = make_run(inner_steps=1, beta=0.0)
    batch, advantage, _ = make_batch(run)
    rows, score = batch.sampled.responses(), 0.0
    for row, response in enumerate(rows):
        logp = row_logs(run, batch, row, response)[0]
        score = score + advantage[row] * logp.mean() / len(rows)
    wanted = flat(torch.autograd.grad(-score, lora.parameters(run.model, "policy")))
    # The ratio is 1 by definition: what the sampler noted (noise here) does not enter.
    own = gradient(run, batch, advantage, on_policy=True)
    assert relative(own, wanted) < 1e-12


@pytest.mark.parametrize(("inner_steps", "lr", "clips"), [
    (1, 0.3, False), (2, 0.3, True), (2, 1e-9, False)])
def test_clipping_starts_with_the_second_inner_step(inner_steps, lr, clips):
    run = make_run(inner_steps=inner_steps)
    run.score = lambda prompt, rows: torch.tensor([[len(r) / 9, 0.5] for r in rows])
    batch = score_batch(run, PROMPTS, sample_batch(run, PROMPTS, 1, 4))
    optimizer = torch.optim.AdamW(lora.parameters(run.model, "policy"), lr)
    metrics = grpo.update(run, batch, optimizer, Clock())
    assert metrics["dead_groups"] < 1
    assert (metrics["clip_share"] > 0) == clips


def test_the_later_inner_steps_remember_the_policy_of_the_first():
    run = make_run(inner_steps=2, beta=0.0)
    batch, advantage, alive = make_batch(run)
    policy = lora.parameters(run.model, "policy")

    class Mover(Recorder):  # moves the policy once, after the first inner step
        def step(self) -> None:
            super().step()
            if len(self.gradients) == 1:
                with torch.no_grad():
                    for p in self.parameters:
                        p.mul_(1.1)

    logs = [row_logs(run, batch, row, ids)[0].detach()
            for row, ids in enumerate(batch.sampled.responses())]
    mover = Mover(policy)
    grpo.train_batch(run, batch, advantage, alive, mover, Clock())
    # π_old is what the trainer computed then, not what the sampler noted (noise here).
    noted = torch.nn.utils.rnn.pad_sequence(logs, batch_first=True)
    batch.sampled = dataclasses.replace(batch.sampled, logp=noted)
    wanted = naive_gradient(run, batch, advantage)
    # Both were clipped to norm 1.
    unit = wanted / max(1, wanted.norm())
    assert relative(mover.gradients[1], unit) < 1e-4


# ------------------------------------------- [E8] a sampler that is not the trainer


def test_weighted_tokens_of_the_sampler_stand_for_tokens_of_the_policy():
    """E[w f] over π_sampled = E[f] over π_old, by enumeration; the cap is 2."""
    _, old, sampled, values = toy()
    old, sampled = (torch.tensor(t).log_softmax(-1) for t in (old, sampled))
    mask = torch.ones_like(old, dtype=torch.bool)
    w = grpo.sampler_weight(old, sampled, mask, cap=math.inf)
    anything = torch.tensor(np.resize(values, old.shape))
    torch.testing.assert_close((sampled.exp() * w * anything).sum(-1),
                               (old.exp() * anything).sum(-1), rtol=1e-12, atol=1e-12)
    assert (sampled.exp() * w).sum(-1).tolist() == pytest.approx([1.0] * len(old))
    assert (w > 2).any()
    capped = grpo.sampler_weight(old, sampled, mask)
    torch.testing.assert_close(capped, w.clamp(max=2))
    assert (grpo.sampler_weight(old, sampled + math.nan, ~mask) == 1).all()  # padding


@every_loss
def test_the_weight_multiplies_the_surrogate_alone(loss, gradient, monkeypatch):
    run = make_run(loss=loss, inner_steps=1)
    batch, advantage, _ = make_batch(run)
    plain = gradient(run, batch, advantage, on_policy=True)
    # Where sampler and trainer are one, what it noted changes nothing, to the bit.
    noted = batch.sampled
    batch.sampled = dataclasses.replace(noted, logp=noted.logp + 1)
    assert torch.equal(gradient(run, batch, advantage, on_policy=True), plain)
    batch.sampled = noted
    monkeypatch.setattr(grpo, "sampler_is_trainer", lambda model: False)
    own, metrics = train_batch(run, batch, advantage, on_policy=True)
    wanted = naive_gradient(run, batch, advantage, on_policy=True, weighted=True)
    assert relative(own, wanted) < 1e-12
    assert relative(own, plain) > 1e-3
    with torch.no_grad():
        squares = [(row_logs(run, batch, row, ids)[0] - noted.logp[row, :len(ids)])
                   .square() for row, ids in enumerate(noted.responses())]
    assert metrics["off_sampler_rms"] == pytest.approx(
        torch.cat(squares).mean().sqrt().item(), rel=1e-10)


def test_a_ratio_that_would_overflow_stays_finite_and_pulls_back():
    logp = torch.tensor([[5.0, 200.0, 2e4]], requires_grad=True)
    loss, clipped = grpo.grpo_loss(logp, torch.zeros(1, 3), None, torch.tensor([-1.0]),
                                   torch.full((1, 3), 1 / 3), beta=0.0)
    loss.backward()
    assert loss.isfinite()
    assert logp.grad.isfinite().all()
    assert (logp.grad > 0).all()  # a smaller loss is a smaller log π
    assert logp.grad[0, 0].item() == pytest.approx(math.exp(5) / 3, rel=1e-6)
    assert not clipped.any()


def test_the_gradient_is_clipped_to_norm_1_and_reported_before():
    run = make_run()
    batch, advantage, alive = make_batch(run)
    advantage *= 100
    wanted = naive_gradient(run, batch, advantage)
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.train_batch(run, batch, advantage, alive, recorder, Clock(),
                               batch.sampled.logp)
    assert wanted.norm() > 2
    assert metrics["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-9)
    assert relative(recorder.gradients[0], wanted / wanted.norm()) < 1e-5
    assert len(recorder.gradients) == 2  # inner_steps
    assert relative(recorder.gradients[1], recorder.gradients[0]) < 1e-12


# ----------------------------------------------------------------------- dead groups


def count_groups(monkeypatch) -> list[int]:
    """The numbers of the groups that `train_group` sees, as it sees them."""
    seen, original = [], grpo.train_group

    def spy(run, batch, advantage, p, *rest):
        seen.append(p)
        return original(run, batch, advantage, p, *rest)

    monkeypatch.setattr(grpo, "train_group", spy)
    return seen


@every_loss
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_dead_group_only_pays_kl_and_still_counts(loss, beta, gradient, monkeypatch):
    run = make_run(loss=loss, beta=beta, inner_steps=1)
    batch, advantage, alive = make_batch(run, dead=1)
    seen = count_groups(monkeypatch)
    own = gradient(run, batch, advantage, alive, on_policy=True)
    assert seen == ([0, 1, 2] if beta else [0, 2])
    # The reference divides by all rows and tokens, the dead group's among them.
    wanted = naive_gradient(run, batch, advantage, on_policy=True)
    assert relative(own, wanted) < 1e-12


def test_a_step_of_dead_groups_moves_nothing_without_kl():
    run = make_run(beta=0.0)
    batch, advantage, alive = make_batch(run)
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.train_batch(run, batch, 0 * advantage, alive & False, recorder,
                               Clock())
    assert metrics == {"grad_norm": 0.0, "trained_tokens": 0}
    assert recorder.gradients == []


# ----------------------------------------------------------------- what is reported


def test_reported_kl_and_entropy_are_exact_over_the_vocabulary():
    run = make_run()
    batch, advantage, _ = make_batch(run)
    rows, kl, entropy = batch.sampled.responses(), 0.0, 0.0
    with torch.no_grad():
        for row, response in enumerate(rows):
            *_, policy, ref = row_logs(run, batch, row, response)
            kl += (policy.exp() * (policy - ref)).sum().item()
            entropy -= (policy.exp() * policy).sum().item()
        loss = -naive_objective(run, batch, advantage).item()
    metrics = train_batch(run, batch, advantage)[1]
    tokens = sum(map(len, rows))
    assert metrics["kl"] == pytest.approx(kl / tokens, rel=1e-10)
    assert metrics["entropy"] == pytest.approx(entropy / tokens, rel=1e-10)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-10)


def update_case() -> tuple:
    """A run; its batch, of which group 1 is dead; R (3, 4) in numpy."""
    run = make_run()
    batch = make_batch(run)[0]
    batch.scores.view(3, 4, 2)[1] = 0.5
    table = batch.scores.numpy().astype(float)
    return run, batch, ((table[:, 0] + 3 * table[:, 1]) / 4).reshape(3, 4)


def test_an_update_reports_the_advantages_that_numpy_makes_of_the_scores():
    run, batch, reward = update_case()
    advantage = numpy_advantage(reward)
    advantage[1] = 0
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.update(run, batch, recorder, Clock())
    assert metrics["advantage"].numpy() == pytest.approx(advantage.ravel(), abs=1e-5)
    assert metrics["advantage_std"] == pytest.approx(advantage.std(), rel=1e-5)
    assert metrics["dead_groups"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["group", "per-axis", "gdpo", "mean-only"])
def test_an_update_trains_on_the_advantages_of_its_kind(kind):
    _, batch, _ = update_case()
    run = make_run(advantage=kind, min_std=0.1)
    advantage, alive = grpo.make_advantage(batch.scores.view(3, 4, 2), run.weights,
                                           kind, 0.1)
    assert alive.tolist() == [True, False, False]  # by default, group 2 lives
    wanted, figures = train_batch(run, batch, advantage.flatten(), alive,
                                  on_policy=True)
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.update(run, batch, recorder, Clock())
    assert torch.equal(recorder.gradients[0], wanted)
    assert torch.equal(metrics["advantage"], advantage.flatten())
    assert {name: metrics[name] for name in figures} == figures


# --------------------------------------------------------------------------- the loop


def test_every_prompt_is_drawn_once_a_round_and_none_twice_a_step():
    prompts = [dataclasses.replace(PROMPTS[0], index=i) for i in range(7)]
    order = grpo.shuffled(prompts, seed=0)
    drawn = [grpo.draw_prompts(order, 3) for _ in range(14)]
    assert all(len({p.index for p in chosen}) == 3 for chosen in drawn)
    first, again, other = (grpo.shuffled(prompts, seed) for seed in (0, 0, 1))
    rounds = [[next(first).index for _ in prompts] for _ in range(3)]
    assert all(sorted(numbers) == list(range(7)) for numbers in rounds)
    assert rounds[0] != rounds[1]
    assert [next(again).index for _ in prompts] == rounds[0]
    assert [next(other).index for _ in prompts] != rounds[0]


def test_each_groups_rate_falls_in_a_line_from_its_own_peak():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w], "peak": peak} for w, peak in
                                   zip(weights, (1.0, 10.0), strict=True)])
    rates = []
    for step in range(1, 5):
        grpo.set_rates(optimizer, step, 4)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[1.0, 10.0], [0.75, 7.5], [0.5, 5.0], [0.25, 2.5]]


def test_an_adapter_that_stays_at_zero_is_refused():
    run = make_run()
    with torch.no_grad():
        for layer in lora.layers(run.model).values():
            layer.lora_B["policy"].zero_()
    with pytest.raises(UserError, match="still zero after step 1"):
        grpo.require_movement(run, {"step": 1, "grad_norm": 0.1})
    # All groups were dead: no news; or the method only collects.
    grpo.require_movement(run, {"step": 1, "grad_norm": 0.0})
    grpo.require_movement(run, {"step": 1})
    with torch.no_grad():
        list(lora.layers(run.model).values())[-1].lora_B["policy"][0, 0] = 1e-6
    grpo.require_movement(run, {"step": 1, "grad_norm": 0.1})


# ------------------------------------------------------------------ what is refused


def test_a_loss_that_is_not_finite_is_refused():
    run = make_run()
    batch, advantage, _ = make_batch(run)
    advantage[0] = math.nan
    with pytest.raises(UserError, match="loss is not finite"):
        group_sums(run, batch, advantage, 0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"clip": 0.0}, "--clip is 0.0; it must be above 0 and below 1"),
    ({"clip": 1.0}, "--clip is 1.0; it must be above 0 and below 1"),
    ({"clip": math.nan}, "--clip is nan"),
    ({"beta": -0.1}, "--beta is -0.1; it must be at least 0"),
    ({"beta": math.nan}, "--beta is nan"),
    ({"inner_steps": 0}, "--inner-steps is 0; it must be at least 1"),
    ({"min_std": -1e-3}, "--min-std is -0.001; it must be at least 0"),
    ({"group_size": 1}, "--group-size is 1; it must be at least 2"),
    ({"loss": "dr_grpo", "advantage": "gdpo"}, "does not go with --advantage gdpo"),
    ({"loss": "dr_grpo", "advantage": "per-axis"}, "go with --advantage per-axis")])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        grpo.Settings(**changes).resolved()


def test_dr_grpo_divides_by_no_std():
    assert grpo.Settings().resolved().advantage == "group"
    assert grpo.Settings(loss="dr_grpo").resolved().advantage == "mean-only"


def command(*arguments: str) -> subprocess.CompletedProcess:
    script = Path(grpo.__file__)
    return subprocess.run([sys.executable, script, *arguments], capture_output=True,
                          text=True, env=os.environ | {"COLUMNS": "200"}, check=False)


def test_help_names_the_options_and_what_trl_calls_them():
    done = command("--help")
    assert done.returncode == 0, done.stderr
    for field in dataclasses.fields(grpo.Settings):
        assert f"--{field.name.replace('_', '-')} " in done.stdout
    for name in ("reward_weights", "max_steps", "num_generations", "num_iterations",
                 "max_completion_length", "learning_rate", "epsilon", "loss_type",
                 "scale_rewards", "multi_objective_aggregation"):
        assert name in done.stdout


def test_a_bad_option_ends_in_one_line_and_status_2():
    done = command("--group-size", "1")
    assert done.returncode == 2
    assert done.stdout == ""
    line, = done.stderr.splitlines()
    assert line.startswith("grpo.py: error: --group-size is 1")
