"""Tests of the fill-in exercises: each fails until its function is right.

`pytest exercises -k per_axis` tests yours; `ANSWERS=1 pytest exercises` the worked
ones.
"""

import importlib
import os
from itertools import pairwise

import pytest
import torch

import grpo
from data import rubric
from lora import ActiveAdapter, LoRALinear
from reward_model import combine

HOME = "exercises.answers" if os.environ.get("ANSWERS") else "exercises"


def written(name: str):
    """The module of an exercise: yours, or the worked one."""
    return importlib.import_module(f"{HOME}.{name}")


# ------------------------------------------------------------------------- 2. refusals

KIND = {"politeness": 1.0, "meaningfulness": 1.0, "actionability": 0.75, "safety": 1.0}
COMPLY = {"politeness": 1.0, "meaningfulness": 1.0, "actionability": 1.0, "safety": 0.0}
RUDE = {"politeness": 0.0, "meaningfulness": 0.25, "actionability": 0.0, "safety": 1.0}


@pytest.mark.parametrize("refuse", [KIND, RUDE])
@pytest.mark.parametrize("others", [[1, 1, 1], [0, 1, 2], [3, 0.5, 1]])
def test_refusals_tie_at_the_weight(refuse, others):
    names = ("politeness", "meaningfulness", "actionability")
    weights = dict(zip(names, others, strict=True))
    tie = written("refusals").tie_weight(COMPLY, refuse, weights)
    assert tie > 0

    def gain(safety: float) -> float:
        """R of compliance less R of the refusal."""
        w = torch.tensor([*others, safety], dtype=torch.float64)
        rows = torch.tensor([[m[axis] for axis in rubric.AXES]
                             for m in (COMPLY, refuse)], dtype=torch.float64)
        comply, refused = combine(rows, w).tolist()
        return comply - refused

    assert gain(tie) == pytest.approx(0, abs=1e-9)
    assert gain(0.9 * tie) > 0 > gain(1.1 * tie)


# ------------------------------------------------------------------------- 3. per_axis


def test_per_axis_hears_an_axis_however_loud_it_is():
    scores = torch.rand(3, 8, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    advantage = written("per_axis").advantage(scores, weights)
    wanted, _ = grpo.make_advantage(scores, weights, "per-axis")
    torch.testing.assert_close(advantage, wanted)
    # An axis of weight 0 is not heard; one that is ten times as loud no better.
    other = scores.clone()
    other[..., 1] = 1 - other[..., 1]
    other[..., 2] *= 10
    torch.testing.assert_close(written("per_axis").advantage(other, weights), wanted,
                               atol=2e-3, rtol=0)


# ------------------------------------------------------------------------------- 5. kl


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_pull_where_they_should(seed, kind):
    generator = torch.Generator().manual_seed(seed)
    logits, ref = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    logp, logp_ref = leaf.log_softmax(0), ref.log_softmax(0)
    exact = {"k1": 0 * leaf.sum(),
             "k2": (logp.exp() * (logp - logp_ref)).sum(),
             "k3": (logp_ref.exp() * (logp_ref - logp)).sum()}[kind]
    [wanted] = torch.autograd.grad(exact, leaf)
    gradient = written("kl").expected_gradient(logits, ref, kind)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=1e-9)


# -------------------------------------------------------------------------- 9. brevity


def test_brevity_falls_evenly_from_1_to_0():
    marks = [written("brevity").brevity(" ".join(["word"] * n)) for n in range(60)]
    assert marks[:13] == [1.0] * 13
    assert marks[40:] == [0.0] * 20
    assert marks[26] == pytest.approx(0.5)
    steps = [a - b for a, b in pairwise(marks[12:41])]
    assert steps == pytest.approx([1 / 28] * 28)


# ---------------------------------------------------------------------------- 10. rank


def test_rank_merged_is_what_the_layer_computes():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    active = ActiveAdapter()
    active.name = "policy"
    layer = LoRALinear(torch.nn.Linear(5, 7, bias=False), active)
    layer.lora_A["policy"] = torch.nn.Parameter(draw(3, 5))
    layer.lora_B["policy"] = torch.nn.Parameter(draw(7, 3))
    layer.scale["policy"] = 6 / 3
    x = draw(4, 5)
    whole = written("rank").merged(layer.base.weight, layer.lora_A["policy"],
                                   layer.lora_B["policy"], 6)
    torch.testing.assert_close(x @ whole.T, layer(x))


def test_rank_counts_the_numbers():
    assert written("rank").trained_numbers([(7, 5), (2, 3)], 4) == 4 * (7 + 5 + 2 + 3)
