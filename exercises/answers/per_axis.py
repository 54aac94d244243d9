"""Exercise 3, worked."""

import torch
from torch import Tensor

from exercises.per_axis import demonstrate
from grpo import group_advantage
from reward_model import combine


def advantage(scores: Tensor, weights: Tensor) -> Tensor:
    """Advantages per axis: scores (P, G, K), weights (K,) → (P, G)."""
    # A = Σ_k w_k A_k / Σ_k w_k, with A_k of [E3] from axis k alone
    parts = [group_advantage(axis)[0] for axis in scores.unbind(-1)]
    return combine(torch.stack(parts, -1), weights)


if __name__ == "__main__":
    demonstrate(advantage)
