"""DPO: the best and the worst answer of a group, as one preference.

After arXiv 2305.18290. No sampling while it learns: the pairs are the base's own
answers, and all axes have become one "better than".

Kept     The loss, and the base as its reference.
Changed  A pair is the best and the worst of G answers by R, not by people's choice.
Dropped  Nothing.

[D1]  L = −log σ(β [(log π − log ref)(best) − (log π − log ref)(worst)]), log π summed
      over the response's tokens

    python -m methods dpo
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
from methods import offline
from methods.offline import Group, response_logp
from plumbing import parallel
from plumbing.options import option
from run import Prompt, Run


@dataclasses.dataclass(frozen=True)
class Settings(offline.Settings):
    """Options of `python -m methods dpo`; the tiny model's defaults won a search."""

    lr: float = option(2e-3, "AdamW's learning rate", real=5e-5, above=0)
    beta: float = option(0.5, "sharpness of the preference; at 0 there is no gradient",
                         real=0.1, above=0)


class Pair(NamedTuple):
    """Two of the base's answers to a prompt, and their log-probs under the base."""

    prompt: list[int]
    best: list[int]
    worst: list[int]
    ref: Tensor  # (2,)


def dpo_loss(best: Tensor, worst: Tensor, best_ref: Tensor, worst_ref: Tensor,
             beta: float) -> Tensor:
    """Loss (n,) of pairs from the log-probs (n,) of whole responses."""
    # [D1] L = −log σ(β [(log π − log ref)(best) − (log π − log ref)(worst)])
    return -F.logsigmoid(beta * ((best - best_ref) - (worst - worst_ref)))


@torch.no_grad()
def make_pair(run: Run, group: Group) -> Pair:
    """Best and worst of a group, and what the base says of both."""
    best, worst = (group.responses[int(i)]
                   for i in (group.reward.argmax(), group.reward.argmin()))
    with lora.using(run.model, None), run.model.shared_prefix(group.prompt) as prefix:
        ref = response_logp(run, group.prompt, [best, worst], prefix)
    return Pair(group.prompt, best, worst, ref)


def learn(run: Run, pairs: list[Pair]) -> tuple[float, int]:
    """Add the gradient of [D1], mean over some pairs; the loss and their tokens."""
    total = 0.0
    for pair in parallel.shard(pairs):
        with run.model.shared_prefix(pair.prompt) as prefix:
            logp = response_logp(run, pair.prompt, [pair.best, pair.worst], prefix)
            loss = dpo_loss(logp[:1], logp[1:], pair.ref[:1], pair.ref[1:],
                            run.settings.beta)
            loss = loss.sum() / len(pairs)
            loss.backward()
        total += loss.item()
    return total, sum(len(pair.best) + len(pair.worst) for pair in pairs)


def train(run: Run, prompts: list[Prompt]) -> bool:
    """Sample from the base, then learn from pairs; False: asked to stop."""
    return offline.train(run, prompts, make_pair, learn)
