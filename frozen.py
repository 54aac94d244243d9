"""y = x Wᵀ for weights that never change: a product that owes no gradient to W."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Weights from which oneDNN takes a product. Below, MKL was as fast, and faster where
# there is a single row.
ONEDNN_FROM = 786_432
HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b: x (..., in), weight (out, in), bias (out,) → (..., out).

    On x86, PyTorch brings two libraries for products, and `F.linear` asks MKL in fp32.
    For large frozen weights oneDNN was faster where it was measured (two cores of an
    AMD EPYC): 2 to 3 times at the 1 to 32 rows of a decoding step, less at hundreds.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            and weight.numel() >= ONEDNN_FROM and not trained and HAS_BOTH):
        return _FrozenLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """y = x Wᵀ + b through oneDNN, and dx = dy W; W and b get no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        # Not among PyTorch's documented names; requirements.txt pins the version.
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.T), None, None  # dx = dy W


class Linear(nn.Linear):
    """`nn.Linear` by way of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        return linear(x, self.weight, self.bias)
