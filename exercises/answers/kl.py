"""Exercise 5, worked."""

import torch
from torch import Tensor

from exercises.kl import demonstrate
from grpo import kl_estimate


def expected_gradient(logits: Tensor, ref_logits: Tensor, kind: str) -> Tensor:
    """E over y ~ π of the gradient of the estimator at y: (V,), (V,) → (V,)."""
    logits = logits.detach().requires_grad_()
    logp = logits.log_softmax(0)  # (V,)
    estimate = kl_estimate(logp, ref_logits.log_softmax(0), kind)  # (V,)
    mean = (logp.detach().exp() * estimate).sum()
    return torch.autograd.grad(mean, logits)[0]


if __name__ == "__main__":
    demonstrate(expected_gradient)
