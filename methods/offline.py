"""Learning from the base's own answers: what DPO and SFT on the best share.

First the loop of `grpo.py` runs as it does for GRPO, but its update only collects: the
adapter stays zero, so all answers are the base's. Then the answers become examples, and
several shuffled passes follow. Both halves write the same log, and what was collected
is part of the checkpoint: whoever resumes samples nothing twice.
"""

import dataclasses
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import grpo
import lora
from logprob import row_logprobs
from model import Cache, pad_rows
from plumbing import parallel
from plumbing.figures import Clock
from plumbing.files import require
from plumbing.options import option
from run import Log, Prompt, Run
from run import Settings as SharedSettings
from sample import Batch, response_hidden


@dataclasses.dataclass(frozen=True)
class Settings(SharedSettings):
    """Options of every method that learns from the base's answers."""

    epochs: int = option(3, "passes over the examples", real=1, low=1)


class Group(NamedTuple):
    """The base's answers to one prompt."""

    prompt: list[int]
    responses: list[list[int]]
    reward: Tensor  # (G,)


class Collected:
    """All groups of the first half, as tensors that a checkpoint keeps.

    Attributes:
        state: tokens (steps, B, C); lengths, rewards (steps, B); how many steps.
    """

    def __init__(self, run: Run) -> None:
        s = run.settings
        rows = (s.steps, s.prompts_per_step * s.group_size)
        self.tokens = torch.zeros(*rows, s.max_new_tokens, dtype=torch.long)
        self.lengths = torch.zeros(rows, dtype=torch.long)
        self.rewards = torch.zeros(rows)
        self.steps = torch.zeros((), dtype=torch.long)
        self.state = [self.tokens, self.lengths, self.rewards, self.steps]

    def update(self, batch: Batch, clock: Clock) -> dict:
        """Keep a step's answers, for `grpo.Method`; nothing is learnt yet.

        The advantages are GRPO's, and only go to samples.jsonl.
        """
        step, mask = int(self.steps), batch.sampled.mask
        self.tokens[step, :, :mask.shape[1]] = batch.sampled.tokens.cpu()
        self.lengths[step] = mask.sum(1).cpu()
        self.rewards[step] = batch.reward
        self.steps += 1
        advantage, alive = grpo.group_advantage(
            batch.reward.view(-1, batch.group_size))  # (P, G), (P,)
        return {"trained_tokens": 0, "advantage": advantage.flatten(),
                "advantage_std": advantage.std(correction=0).item(),
                "dead_groups": 1 - alive.float().mean().item()}

    def live_groups(self, run: Run, prompts: list[Prompt]) -> list[Group]:
        """Every group with a best answer: the std of its rewards is 1e-3 or more."""
        s, groups = run.settings, []
        order = grpo.shuffled(prompts, s.seed)  # drawn as `grpo.train` drew them
        for step in range(s.steps):
            rows = [ids[:n] for ids, n in zip(self.tokens[step].tolist(),
                                              self.lengths[step].tolist(), strict=True)]
            rewards = self.rewards[step].view(-1, s.group_size)  # (P, G)
            alive = grpo.group_advantage(rewards)[1]
            for p, prompt in enumerate(grpo.draw_prompts(order, s.prompts_per_step)):
                if alive[p]:
                    own = rows[p * s.group_size:(p + 1) * s.group_size]
                    groups.append(Group(prompt.ids, own, rewards[p]))
        return groups


def response_logp(run: Run, prompt: list[int], rows: list[list[int]],
                  prefix: Cache) -> Tensor:
    """log π (n,) of whole responses, with the active adapter."""
    hidden, mask = response_hidden(run.model, prompt, rows, prefix)
    logp = row_logprobs(hidden, run.model.unembed, pad_rows(rows, mask.device), mask,
                        run.settings.temperature, run.tokenizer.valid)
    return logp.sum(1)


def shuffled_batches(examples: list, run: Run) -> list[list]:
    """The examples of every step of every epoch, each epoch in a new order."""
    shuffle, order, batches = random.Random(run.settings.seed), list(examples), []
    size = run.settings.prompts_per_step
    for _ in range(run.settings.epochs):
        shuffle.shuffle(order)
        batches += [order[i:i + size] for i in range(0, len(order), size)]
    return batches


def train(run: Run, prompts: list[Prompt], make: Callable[[Run, Group], object],
          learn: Callable[[Run, list], tuple[float, int]]) -> bool:
    """Sample from the base as GRPO would, then learn from what was sampled.

    Args:
        make: a group → an example.
        learn: adds the gradient of the mean loss over some examples, with the policy
            active. Returns the loss (of this process's share of the examples) and the
            number of tokens of all of them.

    Returns:
        False when it was asked to stop; a checkpoint is written.
    """
    s, policy = run.settings, lora.parameters(run.model, "policy")
    optimizer = torch.optim.AdamW([{"params": policy, "peak": s.lr}], weight_decay=0.0)
    collected = Collected(run)
    state = policy + collected.state
    if not grpo.train(run, prompts, grpo.Method(optimizer, collected.update, state)):
        return False
    examples = [make(run, group) for group in collected.live_groups(run, prompts)]
    require(bool(examples), "the rewards of every group agree; there is nothing to "
            "learn from")
    batches = shuffled_batches(examples, run)
    with Log(run, s.steps + len(batches), optimizer, state) as log, \
            lora.using(run.model, "policy"):
        for number in range(log.done - s.steps + 1, len(batches) + 1):
            started = time.perf_counter()
            grpo.set_rates(optimizer, number, len(batches))
            loss, tokens = learn(run, batches[number - 1])
            total = torch.tensor(loss, dtype=torch.float64, device=run.model.device)
            parallel.all_reduce(total)
            [norm] = grpo.optimizer_step(optimizer)
            if not log.write({"step": s.steps + number, "loss": total.item(),
                              "tokens": 0, "trained_tokens": tokens, "grad_norm": norm,
                              "seconds": time.perf_counter() - started}):
                return False
    return True
