"""Claims about grpo.py.

* [E2] R is the weighted mean of the scores, and only the weights' proportions count.
* [E3] Advantages are numpy's; a flat group gets exactly 0; groups never mix; GDPO gives
  each axis the say that its weight gives it.
* [E4] [E5] [E7] The gradient of the loss equals exact enumeration over a toy
  vocabulary, for every normalisation and KL estimator, where clipping acts.
* [E6] Each estimator's value and gradient have the expectation that its comment states,
  and no token overflows or is pushed the wrong way.
* On a real (tiny) Qwen with LoRA the gradient equals a naive reference with repeated
  prompts and full logits; padding, row order and micro-batches do not change it.
* One inner step has ratio 1; the sampler's log-probs are the trainer's; two steps clip.
* A dead group costs nothing without KL, pays its KL with it, and always counts.
* What is reported is what numpy says, and the reported KL is exact.
* Bad settings, weights, scores and losses are refused in one line.
* --plan counts what autograd keeps in earnest, and reads no weights.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
import lora
import model as qwen
from data import rubric
from run import UserError, append
from sample import Rollout, draw_uniforms

LOSSES, KLS = ["grpo", "dapo", "dr_grpo"], ["k1", "k2", "k3"]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def relative(found, wanted) -> float:
    """|found − wanted| / |wanted|, over whole gradients."""
    return float((found - wanted).norm() / wanted.norm())


# -------------------------------------------------------------- [E2] scores → reward


def test_reward_is_the_weighted_mean_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.4, 1.0]], dtype=torch.float64)
    weights = torch.tensor([2.0, 1.0, 5.0], dtype=torch.float64)
    wanted = [(2 * 0.9 + 0.5 + 5 * 0.1) / 8, (2 * 0.2 + 0.4 + 5 * 1.0) / 8]
    assert grpo.combine(scores, weights).tolist() == pytest.approx(wanted, abs=1e-15)
    # Only proportions count, so that --lr keeps its meaning when weights change.
    torch.testing.assert_close(grpo.combine(scores, 7 * weights),
                               grpo.combine(scores, weights))
    # An axis of weight 0 is out, whatever it says.
    other = scores.clone()
    other[:, 1] = 100.0
    weights[1] = 0
    assert torch.equal(grpo.combine(other, weights), grpo.combine(scores, weights))


# ---------------------------------------------------------- [E3] reward → advantage


def numpy_advantage(reward: np.ndarray) -> np.ndarray:
    mean = reward.mean(1, keepdims=True)
    return (reward - mean) / (reward.std(1, keepdims=True) + 1e-4)  # population std


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
    flat = torch.full((1, 7), 0.7)
    assert (grpo.group_advantage(flat)[0] == 0).all()


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


def gdpo_case() -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.stack([random_rewards(4, 6, seed=k) for k in range(3)], -1)
    scores[..., 1] /= 20  # an axis with little spread
    return scores, torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)


def test_group_normalises_the_sum_and_gdpo_each_axis_before_the_sum():
    scores, weights = gdpo_case()
    axes, share = [scores[..., k].numpy() for k in range(3)], weights.numpy() / 8
    after = numpy_advantage(sum(w * a for w, a in zip(share, axes, strict=True)))
    before = sum(w * numpy_advantage(a) for w, a in zip(share, axes, strict=True))
    for kind, wanted in (("group", after), ("gdpo", before)):
        found, alive = grpo.make_advantage(scores, weights, kind)
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-12, atol=0)
        assert alive.all()
    assert np.abs(after - before).max() > 0.1  # the two really differ here


def test_gdpo_ignores_an_axis_that_is_flat_or_has_no_weight():
    scores, weights = gdpo_case()
    weights[2] = 0
    wanted, _ = grpo.make_advantage(scores, weights, "gdpo")
    scores[..., 2] = random_rewards(4, 6, seed=9) * 100
    found, alive = grpo.make_advantage(scores, weights, "gdpo")
    assert torch.equal(found, wanted)
    assert alive.all()
    # Axis 1 flat in group 0: only axis 0 is left to speak. Axis 2, though it varies,
    # does not bring a group to life.
    scores[0, :, 1] = 0.3
    scores[1, :, :2] = 0.3
    found, alive = grpo.make_advantage(scores, weights, "gdpo")
    only = numpy_advantage(scores[..., 0].numpy())[0] / 3
    torch.testing.assert_close(found[0], torch.from_numpy(only))
    assert (found[1] == 0).all()
    assert torch.equal(found[2:], wanted[2:])
    assert alive.tolist() == [True, False, True, True]


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
        part, off = grpo.grpo_loss(
            logp[one], logp_old[one], logp_ref[one], torch.tensor(advantage[one]),
            mask[one], CLIP, BETA, kl, loss, rows=1, tokens=TOKENS, length=C)
        total, clipped = total + chance[row] * part, clipped + int(off.sum())
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
    total = sum(chance[row].detach() * grpo.grpo_loss(
        logp[row:row + 1], logp[row:row + 1].detach(), None, advantage[row:row + 1],
        mask[row:row + 1], beta=0, loss="dr_grpo", rows=1, length=1)[0]
        for row in range(len(SEQUENCES)))
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
    value, clipped = grpo.grpo_loss(logp, *inputs[1:], advantage, mask, CLIP, BETA, kl,
                                    loss, length=C)
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
        found = loss_gradient(rubbish, advantage, mask, loss, kl)
        assert found[0] == pytest.approx(value, rel=1e-14)
        assert torch.equal(found[2][:, :C], clipped)
        assert not found[2][:, C:].any()
        own = found[1][mask]
        assert relative(own, wanted[mask[:, :C]]) < 1e-14


def test_token_weights_are_those_of_the_whole_step():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    wanted = {"grpo": [1 / 9, 1 / 3, 1 / 6], "dapo": [1 / 6] * 3,
              "dr_grpo": [1 / 12] * 3}
    for loss, weight in wanted.items():
        whole = grpo.token_weights(mask, loss)
        expected = mask * torch.tensor(weight)[:, None]
        torch.testing.assert_close(whole, expected)
        # A part of the step, told what the step is, gets the same numbers.
        part = grpo.token_weights(mask[1:, :2], loss, rows=3, tokens=6, length=4)
        torch.testing.assert_close(part, whole[1:, :2])


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
    found, = torch.autograd.grad(loss, logits)
    logp = logits.log_softmax(-1)
    wanted = {"k1": 0 * logits.sum(), "k2": (logp.exp() * (logp - ref)).sum(),
              "k3": (ref.exp() * (ref - logp)).sum()}[kind]
    wanted, = torch.autograd.grad(wanted, logits)
    assert (found - wanted).abs().max() < 1e-10
    assert kind == "k1" or wanted.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_of_an_abandoned_token_stays_finite_and_pulls_back(dtype):
    gap = torch.tensor([10.0, 25.0, 1000.0], dtype=dtype)
    logp = (-gap).requires_grad_()
    value = grpo.kl_estimate(logp, torch.zeros(3, dtype=dtype), "k3")
    slope, = torch.autograd.grad(value.sum(), logp)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert value[0].item() == pytest.approx(math.exp(10) - 11, rel=1e-6)
    assert value[0] < value[1] < value[2]
    assert (slope < 0).all()  # a smaller loss is a larger log π


# ---------------------------------------------------- a real Qwen, small, in float64

CONFIG = qwen.Config(
    model_type="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4,
    tie_word_embeddings=True)


class StubTokenizer:
    """Ids 20 to 23 exist in the model only, as in Qwen's padded vocabulary."""

    stop_ids = (2, 3)
    valid = 20

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Recorder:
    """An optimizer that keeps each step's gradient and moves nothing."""

    def __init__(self, parameters) -> None:
        self.parameters, self.gradients = list(parameters), []

    def step(self) -> None:
        self.gradients.append(flat(p.grad for p in self.parameters))

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


def tiny_model() -> qwen.Qwen:
    """Random weights, wide enough that every path carries gradient; B is not zero."""
    generator = torch.Generator().manual_seed(0)
    tiny = qwen.Qwen(CONFIG).double()
    with torch.no_grad():
        for name, weight in sorted(tiny.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            norm = name.endswith("norm.weight")
            weight.copy_(1 + 0.2 * noise if norm else 0.4 * noise)
        tiny.requires_grad_(False)
        lora.attach(tiny, "policy", rank=3, alpha=6)
        for layer in lora.layers(tiny).values():
            b = layer.lora_B["policy"]
            b.copy_(0.2 * torch.randn(b.shape, generator=generator, dtype=b.dtype))
    return tiny


PROMPTS = [grpo.Prompt("first", [1, 7, 9, 4, 11], 0), grpo.Prompt("second", [1, 6], 1),
           grpo.Prompt("third", [1, 15, 4, 4, 8, 13, 10], 2)]


def make_run(**changes) -> grpo.Run:
    settings = grpo.resolve(grpo.Settings(**{
        "prompts_per_step": 3, "group_size": 4, "max_new_tokens": 9, "temperature": 0.7,
        "inner_steps": 2, "beta": 0.3, "device": "cpu", "lr": 1e-3} | changes))
    return grpo.Run(settings, tiny_model(), StubTokenizer(), ["a", "b"],
                    torch.tensor([1.0, 3.0]), None, {}, Path("nowhere"))


def make_batch(run: grpo.Run, dead: int | None = None) -> grpo.Batch:
    """Responses of 1 to 9 tokens, with a logp_old that makes clipping act."""
    generator = torch.Generator().manual_seed(5)
    count, wide = 3 * run.settings.group_size, run.settings.max_new_tokens
    lengths = torch.randint(1, wide + 1, (count,), generator=generator)
    lengths[0], lengths[1] = wide, 1
    mask = torch.arange(wide) < lengths[:, None]
    tokens = torch.randint(StubTokenizer.valid, (count, wide), generator=generator)
    noise = torch.randn(count, wide, generator=generator, dtype=torch.float64)
    advantage = torch.randn(count, generator=generator, dtype=torch.float64)
    alive = torch.ones(3, dtype=torch.bool)
    if dead is not None:
        advantage.view(3, -1)[dead], alive[dead] = 0, False
    scores = torch.rand(count, 2, generator=generator)
    batch = grpo.Batch(PROMPTS, None, scores, grpo.combine(scores, run.weights),
                       advantage, alive)
    ended = lengths < wide
    blank = Rollout(tokens, mask, torch.zeros(count, wide), ended)
    logp = torch.zeros(count, wide, dtype=torch.float64)
    with torch.no_grad():
        for row, response in enumerate(blank.responses()):
            logp[row, :len(response)] = row_logs(run, batch, row, response)[0]
    batch.sampled = Rollout(tokens * mask, mask, (logp + 0.3 * noise) * mask, ended)
    return batch


def row_logs(run, batch, row: int, response: list[int]):
    """log π, log ref of one response, and both distributions: repeated prompt, full
    logits, nothing shared, nothing padded."""
    prompt = batch.prompts[row // run.settings.group_size].ids
    valid, temperature = run.tokenizer.valid, run.settings.temperature

    def every(name: str | None):
        with lora.using(run.model, name):
            hidden = run.model(torch.tensor([prompt + response]))[0]  # (T, D)
        hidden = hidden[len(prompt) - 1:-1]
        logits = (hidden @ run.model.unembed.T)[:, :valid] / temperature
        return torch.log_softmax(logits, -1)  # (C, V)

    policy, ref = every("policy"), every(None)
    chosen = torch.tensor(response)[:, None]
    return (policy.gather(1, chosen)[:, 0], ref.gather(1, chosen)[:, 0], policy, ref)


def naive_objective(run, batch, on_policy: bool = False) -> torch.Tensor:
    """The objective in words: one row after the other, from scratch."""
    s, total, rows = run.settings, 0.0, batch.sampled.responses()
    tokens = sum(map(len, rows))
    for row, response in enumerate(rows):
        logp, ref, *_ = row_logs(run, batch, row, response)
        old = batch.sampled.logp[row, :len(response)]
        ratio = (logp - (logp.detach() if on_policy else old)).exp()
        adv, (low, high) = batch.advantage[row], (1 - s.clip, 1 + s.clip)
        bounded = ratio.clamp(max=high) if adv > 0 else ratio.clamp(min=low)
        delta = ref - logp
        kl = {"k1": -delta, "k2": delta ** 2 / 2, "k3": delta.exp() - 1 - delta}[s.kl]
        share = {"grpo": 1 / (len(rows) * len(response)), "dapo": 1 / tokens,
                 "dr_grpo": 1 / (len(rows) * s.max_new_tokens)}[s.loss]
        total = total + share * (bounded * adv - s.beta * kl).sum()
    return total


def naive_gradient(run, batch, on_policy: bool = False) -> torch.Tensor:
    loss = -naive_objective(run, batch, on_policy)
    return flat(torch.autograd.grad(loss, lora.parameters(run.model, "policy")))


def gradient(run, batch, monkeypatch) -> torch.Tensor:
    """What `train_batch` hands to its optimizer, before it is clipped to norm 1."""
    monkeypatch.setattr(grpo.nn.utils, "clip_grad_norm_",
                        lambda parameters, _: flat(p.grad for p in parameters).norm())
    recorder = Recorder(lora.parameters(run.model, "policy"))
    grpo.train_batch(run, batch, recorder, grpo.Clock())
    return recorder.gradients[0]


CASES = [(loss, "k3", 0.3) for loss in LOSSES] + [
    ("grpo", "k1", 0.3), ("grpo", "k2", 0.3), ("dapo", "k3", 0.0)]


@pytest.mark.parametrize(("loss", "kl", "beta"), CASES)
def test_gradient_equals_the_naive_reference(loss, kl, beta, monkeypatch):
    run = make_run(loss=loss, kl=kl, beta=beta)
    batch = make_batch(run)
    wanted = naive_gradient(run, batch)
    assert relative(gradient(run, batch, monkeypatch), wanted) < 1e-12
    clipped = sum(part_sums(run, batch, p)["clipped"] for p in range(3))
    assert 3 < clipped < batch.sampled.mask.sum() / 2  # clipping acts, not everywhere


def part_sums(run, batch, p: int) -> dict[str, float]:
    reference = (grpo.reference_hidden(run, batch, p) if run.settings.beta > 0
                 else None)
    with lora.using(run.model, "policy"):
        sums = grpo.train_group(run, batch, p, reference)
    return dict(zip(grpo.SUMS, sums.tolist(), strict=True))


@every_loss
def test_micro_batches_do_not_change_the_gradient(loss, monkeypatch):
    run = make_run(loss=loss)
    batch = make_batch(run)
    wanted = gradient(run, batch, monkeypatch)
    lengths = [len(row) for row in grpo.group_rows(run, batch, 0)]
    assert len(grpo.micro_batches(lengths)) == 1
    for limit, parts in ((1, 4), (12, 3)):
        monkeypatch.setattr(qwen, "TOKENS_PER_PASS", limit)
        assert len(grpo.micro_batches(lengths)) == parts
        assert relative(gradient(run, batch, monkeypatch), wanted) < 1e-12


@every_loss
def test_padding_does_not_change_the_gradient(loss, monkeypatch):
    run = make_run(loss=loss)
    batch = make_batch(run)
    wanted, old = gradient(run, batch, monkeypatch), batch.sampled
    mask = torch.nn.functional.pad(old.mask, (0, 6))
    batch.sampled = Rollout(
        torch.nn.functional.pad(old.tokens, (0, 6)).masked_fill(~mask, 17), mask,
        torch.nn.functional.pad(old.logp, (0, 6)).masked_fill(~mask, 1e4), old.ended)
    assert relative(gradient(run, batch, monkeypatch), wanted) < 1e-12


@every_loss
def test_row_and_group_order_do_not_change_the_gradient(loss, monkeypatch):
    run = make_run(loss=loss)
    batch = make_batch(run)
    wanted, old = gradient(run, batch, monkeypatch), batch.sampled
    groups, inside = [2, 0, 1], [3, 1, 0, 2]
    order = torch.tensor([4 * p + g for p in groups for g in inside])
    batch.prompts = [PROMPTS[p] for p in groups]
    batch.advantage = batch.advantage[order]
    batch.sampled = Rollout(*(getattr(old, f.name)[order]
                              for f in dataclasses.fields(Rollout)))
    assert relative(gradient(run, batch, monkeypatch), wanted) < 1e-12


# ----------------------------------------------------------------- the inner steps


def test_one_inner_step_is_the_policy_gradient(monkeypatch):
    run = make_run(inner_steps=1, beta=0.0)
    batch = make_batch(run)
    rows, score = batch.sampled.responses(), 0.0
    for row, response in enumerate(rows):
        logp = row_logs(run, batch, row, response)[0]
        score = score + batch.advantage[row] * logp.mean() / len(rows)
    wanted = flat(torch.autograd.grad(-score, lora.parameters(run.model, "policy")))
    # The ratio is 1 by definition: what the sampler noted (noise here) does not enter.
    assert relative(gradient(run, batch, monkeypatch), wanted) < 1e-12


def test_the_samplers_logp_is_the_trainers():
    run = make_run()
    sampled = grpo.sample_batch(run, PROMPTS, step=1)
    batch = grpo.Batch(PROMPTS, sampled, *[None] * 4)
    assert sampled.ended.any()
    assert not sampled.ended.all()
    for p, prompt in enumerate(PROMPTS):
        rows = grpo.group_rows(run, batch, p)
        with torch.no_grad(), lora.using(run.model, "policy"), \
                run.model.shared_prefix(prompt.ids) as prefix:
            hidden, mask = grpo.response_hidden(run, prompt.ids, rows, prefix)
            targets = torch.tensor([t for r in rows for t in r])
            logp = grpo.token_stats(run, hidden[mask], targets, None, mask)["logp"]
        noted = sampled.logp[4 * p:4 * p + 4, :logp.shape[1]]
        assert (logp - noted).abs().max() < 1e-6  # the sampler notes fp32
        for g, row in enumerate(rows):
            naive = row_logs(run, batch, 4 * p + g, row)[0]
            assert (logp[g, :len(row)] - naive).abs().max() < 1e-12


def test_step_and_prompt_number_choose_the_random_numbers():
    run = make_run()
    one = grpo.sample_batch(run, PROMPTS, step=1).responses()
    again = grpo.sample_batch(run, PROMPTS[::-1], step=1).responses()
    assert again == one[8:] + one[4:8] + one[:4]
    assert grpo.sample_batch(run, PROMPTS, step=2).responses() != one


@pytest.mark.parametrize(("inner_steps", "lr", "clips"), [
    (1, 0.3, False), (2, 0.3, True), (2, 1e-9, False)])
def test_clipping_starts_with_the_second_inner_step(inner_steps, lr, clips):
    run = make_run(inner_steps=inner_steps)
    run.score = lambda prompt, rows: torch.tensor([[len(r) / 9, 0.5] for r in rows])
    sampled = grpo.sample_batch(run, PROMPTS, step=1)
    batch = grpo.score_batch(run, PROMPTS, sampled)
    assert batch.alive.any()
    optimizer = torch.optim.AdamW(lora.parameters(run.model, "policy"), lr)
    metrics = grpo.train_batch(run, batch, optimizer, grpo.Clock())
    assert (metrics["clip_share"] > 0) == clips


def test_the_gradient_is_clipped_to_norm_1_and_reported_before():
    run = make_run()
    batch = make_batch(run)
    batch.advantage *= 100
    wanted = naive_gradient(run, batch)
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.train_batch(run, batch, recorder, grpo.Clock())
    assert wanted.norm() > 2
    assert metrics["grad_norm"] == pytest.approx(wanted.norm().item(), rel=1e-9)
    assert relative(recorder.gradients[0], wanted / wanted.norm()) < 1e-5
    assert len(recorder.gradients) == 2  # inner_steps
    assert relative(recorder.gradients[1], recorder.gradients[0]) < 1e-12


# ----------------------------------------------------------------------- dead groups


def count_groups(monkeypatch) -> list[int]:
    """The numbers of the groups that `train_group` sees, as it sees them."""
    seen, original = [], grpo.train_group

    def spy(run, batch, p, *rest):
        seen.append(p)
        return original(run, batch, p, *rest)

    monkeypatch.setattr(grpo, "train_group", spy)
    return seen


@every_loss
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_dead_group_only_pays_kl_and_still_counts(loss, beta, monkeypatch):
    run = make_run(loss=loss, beta=beta, inner_steps=1)
    batch, seen = make_batch(run, dead=1), count_groups(monkeypatch)
    found = gradient(run, batch, monkeypatch)
    assert seen == ([0, 1, 2] if beta else [0, 2])
    # The reference divides by all rows and tokens, the dead group's among them.
    assert relative(found, naive_gradient(run, batch, on_policy=True)) < 1e-12


def test_a_step_of_dead_groups_moves_nothing_without_kl():
    run = make_run(beta=0.0)
    batch = make_batch(run)
    batch.advantage[:], batch.alive[:] = 0, False
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.train_batch(run, batch, recorder, grpo.Clock())
    assert metrics == {"grad_norm": 0.0, "trained_tokens": 0}
    assert recorder.gradients == []


# ----------------------------------------------------------------- what is reported


def test_reported_kl_and_entropy_are_exact_over_the_vocabulary():
    run = make_run()
    batch, kl, entropy, surprise = make_batch(run), 0.0, 0.0, 0.0
    rows = batch.sampled.responses()
    with torch.no_grad():
        for row, response in enumerate(rows):
            *_, policy, ref = row_logs(run, batch, row, response)
            surprise -= sum(ref[i, t].item() for i, t in enumerate(response))
            kl += (policy.exp() * (policy - ref)).sum().item()
            entropy -= (policy.exp() * policy).sum().item()
        loss = -naive_objective(run, batch).item()
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.train_batch(run, batch, recorder, grpo.Clock())
    tokens = sum(map(len, rows))
    assert metrics["kl"] == pytest.approx(kl / tokens, rel=1e-10)
    assert metrics["entropy"] == pytest.approx(entropy / tokens, rel=1e-10)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-10)
    assert grpo.against_base(run, batch) == pytest.approx((kl, surprise), rel=1e-10)


def test_distinct_3_grams_are_different_runs_over_all_runs():
    assert grpo.distinct_3_grams(["a b c d", "a b c d"]) == 2 / 4
    assert grpo.distinct_3_grams(["a b c", "b c d", "one"]) == 1
    assert grpo.distinct_3_grams(["one two"]) == 0


def test_describe_says_what_numpy_says():
    run = make_run()
    tokens = torch.tensor([[5, 2, 0], [5, 2, 0], [6, 7, 8], [3, 0, 0]] * 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]] * 3).bool()
    ended = torch.tensor([True, True, False, True] * 3)
    scores = torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    run.score = lambda prompt, rows: scores.view(3, 4, 2)[prompt.index]
    scores.view(3, 4, 2)[1] = 0.5
    batch = grpo.score_batch(run, PROMPTS, Rollout(tokens, mask, mask * 0.0, ended))
    table = scores.numpy().astype(float)
    reward = (table[:, 0] + 3 * table[:, 1]) / 4
    advantage = numpy_advantage(reward.reshape(3, 4))
    advantage[1] = 0
    assert batch.reward.numpy() == pytest.approx(reward, abs=1e-6)
    assert batch.advantage.numpy() == pytest.approx(advantage.ravel(), abs=1e-5)
    figures = grpo.describe(run, batch)
    axes = figures.pop("axes")
    for k, axis in enumerate("ab"):
        assert axes[axis]["mean"] == pytest.approx(table[:, k].mean(), rel=1e-5)
        assert axes[axis]["std"] == pytest.approx(table[:, k].std(), rel=1e-5)
    assert figures == pytest.approx({
        "R": reward.mean(), "R_std": reward.std(),
        "advantage_std": advantage.std(), "dead_groups": 1 / 3, "length": 2.0,
        "cut_off": 0.25, "distinct": 3.0, "tokens": 24}, rel=1e-5)
    # Where there is a gold rubric, its R of the same responses stands beside them.
    run.judges = {"gold": lambda prompt, rows: torch.tensor(
        [[float(prompt.index), len(r)] for r in rows])}
    gold = (np.repeat([0, 1, 2], 4) + 3 * np.array([2, 2, 3, 1] * 3)) / 4
    assert grpo.describe(run, batch)["R_gold"] == pytest.approx(gold.mean())


def test_samples_are_written_with_their_prompt_scores_and_advantage(tmp_path):
    run = make_run()
    batch = make_batch(run)
    with append(tmp_path / "samples.jsonl") as file:
        grpo.write_samples(run, batch, 4, file)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert len(lines) == 12
    for row, ids in enumerate(batch.sampled.responses()):
        scores = dict(zip("ab", batch.scores[row].tolist(), strict=True))
        assert lines[row]["step"] == 4
        assert lines[row]["prompt"] == PROMPTS[row // 4].text
        assert lines[row]["response"] == run.tokenizer.decode(ids)
        assert lines[row]["scores"] == pytest.approx(scores, abs=1e-4)
        for name, values in (("R", batch.reward), ("advantage", batch.advantage)):
            assert lines[row][name] == pytest.approx(values[row].item(), abs=1e-4)


def test_best_of_n_keeps_what_the_reward_likes_best():
    run = make_run(group_size=4)
    run.score = lambda prompt, rows: torch.tensor([[len(r) / 9, 0.5] for r in rows])
    batch = grpo.sample_and_score(run, PROMPTS, 0, grpo.Clock())
    best = batch.reward.view(3, 4).max(1).values
    assert (best > batch.reward.view(3, 4).mean(1)).any()  # there is a choice
    found, answers = grpo.evaluate(run, PROMPTS, "best", best_of=4)
    assert found["reward_model"]["R"] == pytest.approx(best.mean().item())
    assert len(answers) == len(PROMPTS)
    kept = grpo.best_rows(run, batch, 4)
    assert kept.reward.tolist() == best.tolist()
    rows = batch.sampled.responses()
    for p, row in enumerate(kept.sampled.responses()):
        assert row in rows[4 * p:4 * p + 4]
        assert len(row) / 9 == pytest.approx(kept.scores[p, 0].item())


def test_evaluation_repeats_itself_and_starts_at_kl_zero():
    run = make_run()
    run.score = lambda prompt, rows: torch.tensor([[len(r) / 9, 0.5] for r in rows])
    first, answers = grpo.evaluate(run, PROMPTS, "before")
    again, same = grpo.evaluate(run, PROMPTS, "before")
    assert (first, answers) == (again, same)
    lengths = [len(a.split()) for a in answers]
    assert first["length"] == pytest.approx(np.mean(lengths))
    assert first["reward_model"]["R"] == pytest.approx(
        (np.mean(lengths) / 9 + 3 * 0.5) / 4, rel=1e-6)
    assert first["kl"] > 0.01  # the adapter of these tests has B ≠ 0 …
    with torch.no_grad():
        for layer in lora.layers(run.model).values():
            layer.lora_B["policy"].zero_()
    assert grpo.evaluate(run, PROMPTS, "before")[0]["kl"] == pytest.approx(0, abs=1e-12)


def test_an_adapter_that_stays_at_zero_is_refused():
    run = make_run()
    with torch.no_grad():
        for layer in lora.layers(run.model).values():
            layer.lora_B["policy"].zero_()
    with pytest.raises(UserError, match="still zero after step 1"):
        grpo.require_movement(run, 1, {"grad_norm": 0.1})
    grpo.require_movement(run, 1, {"grad_norm": 0.0})  # all groups were dead: no news
    with torch.no_grad():
        list(lora.layers(run.model).values())[-1].lora_B["policy"][0, 0] = 1e-6
    grpo.require_movement(run, 1, {"grad_norm": 0.1})


# ------------------------------------------------------------------ what is refused


def test_a_loss_that_is_not_finite_is_refused():
    run = make_run()
    batch = make_batch(run)
    batch.sampled.logp[0, 0], batch.advantage[0] = -1e4, -1.0  # ratio e^9996
    with pytest.raises(UserError, match="loss is not finite"):
        part_sums(run, batch, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(bad):
    run = make_run()
    run.score = lambda prompt, rows: torch.tensor([[0.5, bad]] * len(rows))
    with pytest.raises(UserError, match="not finite"):
        grpo.score_batch(run, PROMPTS, make_batch(run).sampled)


AXES = ["politeness", "safety"]


@pytest.mark.parametrize(("text", "wanted"), [
    ("", [1, 1]), ("safety=2", [1, 2]), (" safety=0.5 , politeness=0 ", [0, 0.5]),
    ("safety=1e-3,", [1, 1e-3])])
def test_weights_are_read_and_unnamed_axes_keep_1(text, wanted):
    assert grpo.parse_weights(text, AXES).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(("text", "message"), [
    ("wisdom=1", "unknown axis 'wisdom'.*politeness, safety"),
    ("safety=-1", "must not be negative"), ("safety=nan", "must not be negative"),
    ("safety=inf", "must not be negative"), ("safety=lots", "not axis=number"),
    ("safety", "not axis=number"), ("safety=", "not axis=number"),
    ("=2", "unknown axis"), ("safety=0,politeness=0", "all weights are 0"),
    # Neither survives fp32: a sum of 0 or inf would make every reward NaN.
    ("safety=1e-60,politeness=1e-60", "weights"), ("safety=1e60", "weights")])
def test_bad_weights_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        grpo.parse_weights(text, AXES)


@pytest.mark.parametrize(("changes", "message"), [
    ({"group_size": 1}, "--group-size is 1"), ({"clip": 0.0}, "--clip"),
    ({"clip": 1.0}, "--clip"), ({"clip": math.nan}, "--clip"),
    ({"temperature": 0.0}, "--temperature must be positive"),
    ({"temperature": math.nan}, "--temperature"), ({"lr": math.inf}, "--lr"),
    ({"beta": -0.1}, "--beta must not be negative"), ({"beta": math.nan}, "--beta"),
    ({"steps": 0}, "--steps"), ({"inner_steps": 0}, "--inner-steps"),
    ({"max_new_tokens": -1}, "--max-new-tokens"), ({"rank": 0}, "--rank"),
    ({"seed": -1}, "--seed"), ({"min_std": -1e-3}, "--min-std"),
    ({"loss": "dr_grpo", "advantage": "gdpo"}, "does not go with --advantage gdpo")])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        grpo.resolve(grpo.Settings(**changes))


def test_resolve_fills_in_what_depends_on_the_model_and_keeps_what_was_asked():
    tiny, large = (grpo.resolve(grpo.Settings(size=s)) for s in ("tiny", "7b"))
    assert (tiny.model, large.model) == (qwen.SIZES["tiny"], qwen.SIZES["7b"])
    assert tiny.steps == grpo.DEFAULTS[True]["steps"]
    assert large.lr == grpo.DEFAULTS[False]["lr"]
    assert grpo.resolve(grpo.Settings(lr=0.5, steps=3)).lr == 0.5
    assert tiny.advantage == "group"
    assert grpo.resolve(grpo.Settings(loss="dr_grpo")).advantage == "mean-only"


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


# ----------------------------------------------------------------- the random numbers


def test_a_prompts_random_numbers_do_not_depend_on_the_batch():
    run = make_run()
    table = draw_uniforms(run.settings.seed, 1, PROMPTS[1].index, 4, 9)
    whole = grpo.sample_batch(run, PROMPTS, step=1).responses()[4:8]
    with lora.using(run.model, "policy"):
        alone = grpo.rollout(run.model, run.tokenizer, [PROMPTS[1].ids], table[None],
                             run.settings.temperature).responses()
    assert alone == whole


# ------------------------------------------------------------------------------ --plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 9, 7), (2, 20, 1)])
def test_the_plan_counts_what_a_backward_pass_keeps_in_earnest(dtype, sizes):
    model, _ = qwen.load(qwen.TINY, dtype=dtype)
    lora.attach(model, "policy", 4, 8)
    with grpo.FakeTensorMode():
        planned = grpo.skeleton(model.config, dtype)
        lora.attach(planned, "policy", 4, 8)
        found = grpo.kept_for_backward(planned, *sizes)
    assert found == grpo.kept_for_backward(model, *sizes) > 0


@pytest.mark.parametrize(("size", "billions", "gb"), [
    pytest.param("0.5b", "0.49", "0.99", marks=pytest.mark.slow),
    pytest.param("7b", "7.62", "15.23", marks=pytest.mark.slow),
    pytest.param("14b", "14.77", "29.54", marks=pytest.mark.slow)])
def test_the_plan_of_a_size_loads_nothing(monkeypatch, capsys, size, billions, gb):
    monkeypatch.setattr(grpo, "load", None)
    grpo.main(["--size", size, "--plan"])
    printed = capsys.readouterr().out
    # As the Qwen team counts its weights; two bytes each in bf16.
    assert f"{billions} billion weights" in printed
    rows = [line.split() for line in printed.splitlines()[3:]]
    base, *others, together = (float(row[-1]) for row in rows)
    assert f"{base:.2f}" == gb
    assert together == pytest.approx(base + sum(others), abs=0.02)


def test_the_gold_rubric_follows_the_order_of_the_axes():
    def gold(_prompt, rows):
        return torch.arange(4.0).repeat(len(rows), 1)

    reverse = list(rubric.AXES)[::-1]
    assert grpo.with_axes(gold, reverse)(None, [[1]]).tolist() == [[3, 2, 1, 0]]
    assert grpo.with_axes(gold, [*rubric.AXES, "brevity"]) is None


def test_a_folder_called_gold_is_not_the_rubric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gold").mkdir()
    model, _ = qwen.load(qwen.TINY)
    found = grpo.identify(grpo.resolve(grpo.Settings(reward="gold")), model)
    assert "reward model" not in found


def test_a_plan_for_an_unknown_model_ends_in_one_line():
    with pytest.raises(UserError, match="no such checkpoint folder: nobody/knows"):
        grpo.main(["--model", "nobody/knows", "--plan"])


def test_a_file_without_splits_holds_out_texts_and_not_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i % 10}?"}) + "\n"
                            for i in range(20)))
    settings = grpo.resolve(grpo.Settings(prompts=path, prompts_per_step=1))
    tokenizer = qwen.Tokenizer(qwen.TINY)
    trained, held = grpo.read_prompts(settings, tokenizer, 1024)
    assert (len(trained), len(held)) == (16, 4)  # two texts, each of which stands twice
    assert not {p.text for p in trained} & {p.text for p in held}
