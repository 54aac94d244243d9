"""Best of n: no training, and n times the sampling whenever it is used.

Answer n times and keep what the reward likes best; n is --group-size.

[B1]  KL(best of n ‖ base) ≤ log n − (n − 1)/n nats a response     (arXiv 2401.01879)

    python -m methods best_of_n --group-size 8
"""

import dataclasses
import math

from evaluate import evaluate
from plumbing.options import no_option
from run import Log, Prompt, Run
from run import Settings as SharedSettings


@dataclasses.dataclass(frozen=True)
class Settings(SharedSettings):
    """Options of `python -m methods best_of_n`: none of those of a training."""

    steps: int = no_option(0)
    lr: float = no_option(0.0)
    rank: int = no_option(1)
    save_every: int | None = no_option(None)


def kl_bound(n: int) -> float:
    """Upper bound of the KL of best-of-n to its base, in nats a response."""
    # [B1] KL(best of n ‖ base) ≤ log n − (n − 1)/n
    return math.log(n) - (n - 1) / n


def train(run: Run, prompts: list[Prompt]) -> bool:
    """Nothing to learn: the log stays empty."""
    with Log(run, 0):
        return True


def answer(run: Run, held_out: list[Prompt]) -> tuple[dict, list[str]]:
    """The best of n answers to every prompt."""
    n = run.settings.group_size
    figures, answers = evaluate(run, held_out, "best", best_of=n)
    # The policy is the base, but the choice is not: its bound, for a token.
    figures["kl"] = kl_bound(n) / figures["length"]
    figures["kl_is_a_bound"] = True
    return figures, answers
