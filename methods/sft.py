"""SFT on the best: imitate the best answer of each group.

Rejection sampling, in one round, on answers of the base itself (RAFT, arXiv 2304.06767,
goes on with those of the policy).

[S1]  L = −mean_t log π(token of the best)

    python -m methods sft
"""

import dataclasses

from methods import offline
from methods.offline import Group, response_logp
from plumbing import parallel
from plumbing.options import option
from run import Prompt, Run


@dataclasses.dataclass(frozen=True)
class Settings(offline.Settings):
    """Options of `python -m methods sft`; the tiny model's defaults won a search."""

    lr: float = option(3e-3, "AdamW's learning rate", real=5e-5, above=0)
    epochs: int = option(6, "passes over the examples", real=1, low=1)


def make_example(run: Run, group: Group) -> tuple[list[int], list[int]]:
    """The prompt and the answer that the reward likes best."""
    return group.prompt, group.responses[int(group.reward.argmax())]


def learn(run: Run, examples: list[tuple]) -> tuple[float, int]:
    """Add the gradient of [S1], mean over the tokens of some best answers."""
    total, tokens = 0.0, sum(len(best) for _, best in examples)
    for prompt, best in parallel.shard(examples):
        with run.model.shared_prefix(prompt) as prefix:
            # [S1] L = −mean_t log π(token of the best)
            loss = -response_logp(run, prompt, [best], prefix).sum() / tokens
            loss.backward()
        total += loss.item()
    return total, tokens


def train(run: Run, prompts: list[Prompt]) -> bool:
    """Sample from the base, then imitate; False: asked to stop."""
    return offline.train(run, prompts, make_example, learn)
