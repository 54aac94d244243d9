"""Claims about frozen.py.

* A large frozen weight gives what PyTorch gives, in values and in the gradient of the
  input, whichever library multiplies.
* A layer whose weight or bias is trained gets its gradient.
* `Linear` is `nn.Linear` by way of `linear`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import frozen
from frozen import linear


@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (2, 40)])
@pytest.mark.parametrize(("out", "width"), [(1024, 1100), (1100, 1024)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_large_frozen_weights_give_what_pytorch_gives(rows, out, width, with_bias):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(out, width, generator=generator)
    bias = torch.randn(out, generator=generator) if with_bias else None
    y = linear(x, weight, bias)
    # Through oneDNN, where PyTorch has both libraries.
    assert ("_FrozenLinear" in type(y.grad_fn).__name__) == frozen.HAS_BOTH
    exact = F.linear(x.detach().double(), weight.double(),
                     None if bias is None else bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-4)
    towards = torch.randn(*rows, out, generator=generator)
    y.backward(towards)
    torch.testing.assert_close(x.grad.double(), towards.double() @ weight.double(),
                               rtol=0, atol=5e-4)


def test_a_large_layer_that_is_trained_gets_its_gradient():
    weight = torch.randn(1024, 1024, requires_grad=True)
    linear(torch.ones(2, 1024), weight).sum().backward()
    assert (weight.grad == 2).all()
    bias = torch.zeros(1024, requires_grad=True)
    linear(torch.ones(2, 1024), weight.detach(), bias).sum().backward()
    assert (bias.grad == 2).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_nn_linear_by_way_of_linear(bias):
    layer, peer = frozen.Linear(1024, 1100, bias), nn.Linear(1024, 1100, bias)
    assert list(layer.state_dict()) == list(peer.state_dict())
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 1024, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), peer(x))  # trained, it is PyTorch's own product
    y = layer.requires_grad_(False)(x.requires_grad_())
    assert ("_FrozenLinear" in type(y.grad_fn).__name__) == frozen.HAS_BOTH
    torch.testing.assert_close(y, peer(x), rtol=0, atol=1e-5)
