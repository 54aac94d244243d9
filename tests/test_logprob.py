"""Claims about logprob.py.

* `token_logprobs` is `naive`, in values and gradients, whatever the blocks, the
  temperature and the limit of the vocabulary; and `naive` is torch.distributions.
* In bf16 the gradient of a confident token is as exact as that of `naive`.
* Entropy and KL are exact, and asking for them changes nothing else.
* Statistics of padded rows are those of each row alone; padding is 0, gets no gradient
  and may hold anything.
* The head is frozen: it gets no gradient, and asking for one is refused.
* No more than a block of logits exists at a time, and none is kept for `backward`.
* Triton is taken on a GPU that it serves; everything works where it is not installed.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import logprob
from logprob import (
    by_row,
    naive,
    row_logprobs,
    row_statistics,
    token_logprobs,
    token_statistics,
)

N, D, V = 10, 6, 23
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}


def case(dtype=torch.float64, rows: int = N, below: int = V, seed: int = 0):
    """Hidden states (N, D), a head (V, D) and targets (N,) below `below`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=generator, dtype=torch.float64)
    unembed = torch.randn(V, D, generator=generator, dtype=torch.float64)
    targets = torch.randint(below, (rows,), generator=generator)
    return hidden.to(dtype), unembed.to(dtype), targets


def with_gradient(function, hidden: Tensor, *rest, **options) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of a weighted sum: equal weights would hide a mix-up."""
    hidden = hidden.clone().requires_grad_()
    values = function(hidden, *rest, **options)
    weights = torch.linspace(-1, 2, len(values), dtype=values.dtype)
    (values * weights).sum().backward()
    return values.detach(), hidden.grad


def error(values: Tensor, wanted: Tensor) -> float:
    """Distance relative to the norm of what is wanted."""
    values, wanted = values.detach().double(), wanted.detach().double()
    return float((values - wanted).norm() / wanted.norm())


@pytest.fixture(params=[(1, 1024), (3 * V, 10), (5 * V, 4), (7 * V, 1024),
                        (1000 * V, 1024)], autouse=True)
def block(request, monkeypatch):
    """Logits of a block and rows of a part: one id at a time, some, the whole head."""
    monkeypatch.setattr(logprob, "BLOCK_LOGITS", request.param[0])
    monkeypatch.setattr(logprob, "ROWS", request.param[1])
    return request.param


@pytest.mark.parametrize("valid", [None, V - 5])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_naive_in_values_and_gradients(dtype, temperature, valid):
    data = case(dtype, below=valid or V)
    wanted = with_gradient(naive, *data, temperature, valid)
    found = with_gradient(token_logprobs, *data, temperature, valid)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype == dtype
        assert error(a, b) < TOLERANCE[dtype]


def test_naive_is_the_definition():
    hidden, unembed, targets = case(below=V - 5)
    oracle = Categorical(logits=hidden @ unembed[:V - 5].T / 0.7)
    assert error(naive(hidden, unembed, targets, 0.7, V - 5),
                 oracle.log_prob(targets)) < 1e-12


def test_gradcheck():
    hidden, unembed, targets = case(below=V - 5)
    assert torch.autograd.gradcheck(
        lambda h: token_logprobs(h, unembed, targets, 0.7, V - 5),
        hidden.requires_grad_())


def test_bf16_values_are_fp32_and_equal_naive():
    data = case(torch.bfloat16)
    found, slope = with_gradient(token_logprobs, *data)
    wanted, naive_slope = with_gradient(naive, *data)
    # Matrices of other heights may be summed in another order: a bf16 step of a logit.
    assert (found.dtype, slope.dtype) == (torch.float32, torch.bfloat16)
    assert error(found, wanted) < 0.01
    assert error(slope, naive_slope) < 0.01


def test_bf16_gradient_of_confident_tokens_is_no_noise():
    # At π(y) = 0.999, W_y and E_π[W] agree to three digits and bf16 has not three:
    # subtracting one from the other would leave an error as large as the gradient.
    hidden, unembed, targets = case(torch.bfloat16, rows=200)
    towards = unembed[targets].double()
    push = towards * (14 / towards.norm(dim=1, keepdim=True) ** 2)
    hidden = (hidden * 0.3 + push).bfloat16()
    exact = case_gradients(naive, hidden.double(), unembed.double(), targets)
    probability = naive(hidden.double(), unembed.double(), targets).exp()
    sure = probability > 0.99
    assert sure.sum() > 50
    found, peer = (
        ((case_gradients(f, hidden, unembed, targets).double() - exact).norm(dim=1)
         / exact.norm(dim=1))[sure] for f in (token_logprobs, naive))
    assert found.max() < 1.5 * peer.max()
    assert found.median() < 1.5 * peer.median()


def case_gradients(function, hidden, unembed, targets):
    hidden = hidden.clone().requires_grad_()
    function(hidden, unembed, targets).sum().backward()
    return hidden.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens_at_all(dtype):
    hidden, unembed, targets = case(dtype, rows=0)
    hidden.requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    for asked in (True, False):
        logp, *figures = token_statistics(
            hidden, unembed, targets, entropy=asked,
            reference=hidden.detach() if asked else None)
        for figure in (logp, *figures) if asked else (logp,):
            assert (figure.shape, figure.dtype) == ((0,), wide)
        assert asked or figures == [None, None, None]
    logp.sum().backward()
    assert hidden.grad.shape == (0, D)


@pytest.mark.parametrize("valid", [None, V - 5])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_figures_are_those_of_torch(temperature, valid):
    hidden, unembed, targets = case(below=valid or V)
    other = case(seed=1)[0]
    policy, reference = (Categorical(logits=x @ unembed[:valid].T / temperature)
                         for x in (hidden, other))
    _, h, kl, logp_ref = token_statistics(hidden, unembed, targets, temperature, valid,
                                          entropy=True, reference=other)
    assert error(h, policy.entropy()) < 1e-12
    assert error(kl, kl_divergence(policy, reference)) < 1e-12
    assert error(logp_ref, reference.log_prob(targets)) < 1e-12


def test_kl_is_zero_for_equals_and_never_negative():
    hidden, unembed, targets = case(torch.float32, rows=200)
    assert not token_statistics(hidden, unembed, targets, reference=hidden)[2].any()
    near = hidden + 1e-2 * case(torch.float32, rows=200, seed=1)[0]
    kl = token_statistics(hidden, unembed, targets, reference=near)[2]
    assert kl.min() > -1e-6  # fp32 rounding
    assert kl.max() > 1e-6


def test_figures_change_neither_values_nor_gradients_and_have_none_themselves():
    hidden, unembed, targets = case()
    other = case(seed=1)[0]
    figures = token_statistics(hidden.requires_grad_(), unembed, targets, 0.7, V,
                               entropy=True, reference=other)
    assert [t.requires_grad for t in figures] == [True, False, False, False]
    plain = with_gradient(token_logprobs, hidden.detach(), unembed, targets, 0.7, V)
    both = with_gradient(
        lambda *a: token_statistics(*a, entropy=True, reference=other)[0],
        hidden.detach(), unembed, targets, 0.7, V)
    assert all(map(torch.equal, plain, both))
    assert torch.equal(other, case(seed=1)[0])  # nothing is overwritten in place


def test_without_gradients_the_values_are_the_same():
    hidden, unembed, targets = case()
    with torch.no_grad():
        quiet = token_logprobs(hidden.clone().requires_grad_(), unembed, targets)
    assert not quiet.requires_grad
    loud, _ = with_gradient(token_logprobs, hidden, unembed, targets)
    assert torch.equal(quiet, loud)


def test_the_head_is_frozen():
    hidden, unembed, targets = case()
    with_gradient(token_logprobs, hidden, unembed, targets)
    assert unembed.grad is None
    with pytest.raises(ValueError, match="frozen"):
        token_logprobs(hidden, unembed.requires_grad_(), targets)


def test_probabilities_over_the_valid_ids_sum_to_one():
    hidden, unembed, _ = case()
    unembed[V - 5:] *= 50  # were they counted, the padding ids would take it all
    for valid in (V - 5, None):
        ids = torch.arange(valid or V)
        logp = token_logprobs(hidden[:1].expand(len(ids), D), unembed, ids, 1.0, valid)
        assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert float(logp[:V - 5].exp().sum()) < 0.01  # the limit is what made the first 1


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation returns, but for (N, D)."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.shape[-1:] != (D,):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_no_more_than_a_block_of_logits_exists(block):
    rows = 400
    hidden, unembed, targets = case(rows=rows)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t)
    with hooks, Largest() as ours:
        logp = token_statistics(hidden.requires_grad_(), unembed, targets,
                                entropy=True, reference=hidden.detach())[0]
        kept = list(saved)  # before `sum` saves anything of its own
        logp.sum().backward()
    numbers, part = block[0], min(rows, block[1])
    in_block = part * min(V, max(1, numbers // part))
    assert ours.numbers == max(in_block, rows)
    assert kept == [(rows, D)]
    with Largest() as reference:
        naive(hidden, unembed, targets)
    assert reference.numbers == rows * V  # the counter does see logits


def padded_rows(dtype=torch.float64):
    """Hidden states and reference states (n, C, D), tokens and mask (n, C), a head.

    Where the mask is False stands what must not be looked at: NaN, and ids that no head
    has.
    """
    lengths = torch.tensor([3, 1, 5, 2])
    mask = torch.arange(5) < lengths[:, None]  # (n, C)
    generator = torch.Generator().manual_seed(2)
    hidden, other = torch.randn(2, 4, 5, D, generator=generator, dtype=torch.float64)
    hidden[~mask] = other[~mask] = float("nan")
    tokens = torch.randint(V - 5, (4, 5), generator=generator)
    tokens[~mask] = 10 ** 6
    unembed = torch.randn(V, D, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), other.to(dtype), tokens, mask, unembed.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_statistics_of_padded_rows_are_those_of_each_row_alone(dtype):
    hidden, other, tokens, mask, unembed = padded_rows(dtype)
    hidden.requires_grad_()
    weights = torch.linspace(-1, 2, mask.numel(), dtype=dtype).view(mask.shape)
    stats = row_statistics(hidden, unembed, tokens, mask, 0.7, V - 5, other[mask])
    (stats.logp * weights).sum().backward()
    assert [stats.entropy.requires_grad, stats.kl.requires_grad,
            stats.logp_ref.requires_grad] == [False] * 3
    lengths, columns = mask.sum(1).tolist(), []
    for row, n in enumerate(lengths):
        alone = hidden.detach()[row, :n].clone().requires_grad_()
        logp, *figures = token_statistics(alone, unembed, tokens[row, :n], 0.7, V - 5,
                                          entropy=True, reference=other[row, :n])
        (logp * weights[row, :n]).sum().backward()
        assert error(stats.logp[row, :n], logp) < TOLERANCE[dtype]
        assert error(stats.logp_ref[row, :n], figures[2]) < TOLERANCE[dtype]
        assert error(hidden.grad[row, :n], alone.grad) < TOLERANCE[dtype]
        columns.append(figures[:2])
    # Entropy and KL lie flat, row after row, as the tokens of the mask do.
    for flat, column in zip((stats.entropy, stats.kl), zip(*columns, strict=True),
                            strict=True):
        assert error(flat, torch.cat(column)) < TOLERANCE[dtype]
    for table in (stats.logp, stats.logp_ref, hidden.grad):
        assert not table[~mask].any()


def test_without_a_reference_rows_have_no_kl_and_the_same_log_probs():
    hidden, other, tokens, mask, unembed = padded_rows()
    data = hidden, unembed, tokens, mask, 0.7, V - 5
    stats = row_statistics(*data)
    assert (stats.kl, stats.logp_ref) == (None, None)
    assert torch.equal(stats.logp, row_statistics(*data, other[mask]).logp)
    assert torch.equal(stats.logp, row_logprobs(*data))


def test_log_probs_of_padded_rows_are_naive_with_its_gradient():
    hidden, _, tokens, mask, unembed = padded_rows()

    def row_by_row(h: Tensor, *_) -> Tensor:
        rows = [naive(h[i, :n], unembed, tokens[i, :n], 0.7, V - 5)
                for i, n in enumerate(mask.sum(1).tolist())]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).flatten()

    wanted = with_gradient(row_by_row, hidden)
    rows = with_gradient(lambda h: row_logprobs(
        h, unembed, tokens, mask, 0.7, V - 5).flatten(), hidden)
    assert error(rows[0], wanted[0]) < 1e-12
    assert error(rows[1][mask], wanted[1][mask]) < 1e-12
    assert not rows[1][~mask].any()


def test_values_stand_where_the_mask_is_true():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    table = by_row(torch.tensor([1.5, 2.5, 3.5]), mask)
    assert table.tolist() == [[1.5, 2.5, 0], [3.5, 0, 0]]
    assert by_row(torch.zeros(0), torch.zeros(2, 0, dtype=torch.bool)).shape == (2, 0)


def test_fp32_figures_over_a_wide_vocabulary():
    generator = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 8, 64, generator=generator)
    unembed = torch.randn(20_000, 64, generator=generator) / 4
    targets = torch.randint(20_000, (8,), generator=generator)
    policy, reference = (Categorical(logits=x.double() @ unembed.double().T)
                         for x in (hidden, other))
    logp, h, kl, logp_ref = token_statistics(hidden, unembed, targets, entropy=True,
                                             reference=other)
    assert error(logp, policy.log_prob(targets)) < 1e-6
    assert error(h, policy.entropy()) < 1e-6
    assert error(kl, kl_divergence(policy, reference)) < 1e-5
    assert error(logp_ref, reference.log_prob(targets)) < 1e-6


def on_gpu(dtype=torch.bfloat16):
    """What the choice of a backend looks at in a tensor."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")


@pytest.mark.parametrize(
    ("backend", "installed", "capability", "dtype", "taken"), [
        (None, True, (9, 0), torch.bfloat16, True),
        (None, True, (8, 0), torch.float32, True),
        (None, True, (7, 5), torch.bfloat16, False),
        (None, True, (9, 0), torch.float64, False),
        (None, False, (9, 0), torch.bfloat16, False),
        ("torch", True, (9, 0), torch.bfloat16, False),
        ("triton", True, (9, 0), torch.bfloat16, True),
        ("triton", True, (7, 5), torch.bfloat16, "compute capability"),
        ("triton", True, (9, 0), torch.float64, "float64"),
        ("triton", False, (9, 0), torch.bfloat16, "requirements-gpu.txt"),
        ("cuda", True, (9, 0), torch.bfloat16, "backend is"),
    ])
def test_which_backend(backend, installed, capability, dtype, taken, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability)
    if isinstance(taken, bool):
        assert logprob._use_triton(backend, on_gpu(dtype)) is taken
    else:
        with pytest.raises(ValueError, match=taken):
            logprob._use_triton(backend, on_gpu(dtype))


def test_on_the_cpu_triton_is_taken_only_when_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    hidden, unembed, targets = case(torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not logprob._use_triton(None, hidden)
    assert logprob._use_triton("triton", hidden)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not logprob._use_triton(None, hidden)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        token_logprobs(hidden, unembed, targets, backend="triton")


@pytest.mark.parametrize("block", [(1, 1)], indirect=True)  # once is enough
def test_works_where_triton_is_not_installed():
    code = """
import sys
sys.modules["triton"] = None  # what importing it finds
import torch, grpo, logprob
data = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2).long()
assert torch.allclose(logprob.token_logprobs(*data), logprob.naive(*data))
try:
    logprob.token_logprobs(*data, backend="triton")
except ValueError as error:
    assert "requirements-gpu.txt" in str(error)
else:
    sys.exit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
