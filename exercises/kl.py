"""Exercise 5: what the three KL estimators do on average, when they are in a loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from grpo import kl_estimate


def expected_gradient(logits: Tensor, ref_logits: Tensor, kind: str) -> Tensor:
    """E over y ~ π of the gradient of the estimator at y: (V,), (V,) → (V,).

    Args:
        logits: of π, one token's choice over V; ref_logits: of the reference.
        kind: "k1", "k2" or "k3" of `kl_estimate`.
    """
    raise NotImplementedError("write me")


def demonstrate(expected_gradient: Callable) -> None:
    """Print the mean value and the mean gradient's length of each estimator."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = torch.randn(2, 6, generator=generator, dtype=torch.float64)  # (V,)
    pi, ref_pi = logits.softmax(0), ref.softmax(0)
    exact = (pi * (pi / ref_pi).log()).sum()
    print(f"exact KL {exact:.4f}")
    for kind in ("k1", "k2", "k3"):
        value = (pi * kl_estimate(pi.log(), ref_pi.log(), kind)).sum()
        pull = expected_gradient(logits, ref, kind).norm()
        print(f"{kind}: mean value {value:.4f}, mean gradient {pull:.4f}")


if __name__ == "__main__":
    demonstrate(expected_gradient)
