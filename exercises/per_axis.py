"""Exercise 3: normalise each axis before the sum, and see who is heard."""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo import group_advantage
from reward_model import combine


def advantage(scores: Tensor, weights: Tensor) -> Tensor:
    """Advantages per axis: scores (P, G, K), weights (K,) → (P, G)."""
    # Normalise each axis inside its group by [E3], then take the weighted mean.
    raise NotImplementedError("write me")


def demonstrate(advantage: Callable) -> None:
    """Groups with a loud and a quiet axis: whom does each advantage follow?"""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.2, 0.02])  # (K,)
    scores = 0.5 + spread * torch.randn(200, 8, 2, generator=generator)  # (P, G, K)
    weights = torch.ones(2)  # (K,)
    summed, _ = group_advantage(combine(scores, weights))  # (P, G)
    own = advantage(scores, weights)  # (P, G)
    for name, a in (("weighted sum", summed), ("each axis", own)):
        follows = [torch.corrcoef(torch.stack([
            a.flatten(), (axis - axis.mean(1, keepdim=True)).flatten()]))[0, 1].item()
            for axis in scores.unbind(-1)]
        print(f"{name}: follows the loud axis {follows[0]:.2f}, "
              f"the quiet one {follows[1]:.2f}")


if __name__ == "__main__":
    demonstrate(advantage)
