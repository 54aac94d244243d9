"""log π(token) without a (tokens × vocabulary) tensor.

A head of V = 151,936 tokens turns 4,096 hidden states into 2.5 GB of fp32 logits, and
autograd would keep several copies. Only one number a token is wanted:

    z = W h / T                 logits over the valid vocabulary, T the temperature
    log π(y) = z_y − log Σ_v exp z_v

    ∇_h log π(y) = (W_y − Σ_v π(v) W_v) / T = (W_y − E_π[W]) / T

The gradient needs nothing but E_π[W] (D numbers), which the forward pass sums up while
it has the logits. So: two products with W in the forward pass (one more for a
reference), none in the backward pass, nothing recomputed, and no gradient for the
frozen head. The same logits give the entropy and the exact KL divergence to a second
distribution.

Only a block of logits exists at a time: some ids, for up to 1,024 tokens. W is far
larger than their hidden states, and a product reads it once for all of them.

`naive` is the reference that everything is tested against. On a GPU where Triton is
installed, `logprob_triton.py` computes the same without any logits in memory.
"""

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from frozen import linear

# Logits of a block: 4 million are 16 MB of fp32. On a CPU twice as many were hardly
# faster and took three times the memory.
BLOCK_LOGITS = 4_000_000
ROWS = 1024  # tokens at a time; the block is as wide as BLOCK_LOGITS allows


def naive(hidden: Tensor, unembed: Tensor, targets: Tensor, temperature: float = 1.0,
          valid: int | None = None) -> Tensor:
    """The definition, with the full (N, V) logits: the reference for tests."""
    logits = hidden @ unembed[:valid].T  # (N, V)
    logits = logits.to(_wide(hidden)) / temperature
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def token_logprobs(hidden: Tensor, unembed: Tensor, targets: Tensor,
                   temperature: float = 1.0, valid: int | None = None,
                   backend: str | None = None) -> Tensor:
    """log π(target) for each hidden state, one block of logits at a time.

    Args:
        hidden: (N, D), after the model's last norm.
        unembed: (V, D), frozen: asking for its gradient is refused.
        targets: (N,) token ids below `valid`.
        temperature: T > 0, as the sampler used it.
        valid: ids from here on have probability 0 (the vocabulary's padding).
        backend: "torch" or "triton"; None takes Triton on a GPU where it can be had.

    Returns:
        (N,) in fp32 (float64 for float64 inputs), differentiable in `hidden`.
    """
    return token_statistics(hidden, unembed, targets, temperature, valid,
                            backend=backend)[0]


def token_statistics(
    hidden: Tensor,
    unembed: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    valid: int | None = None,
    entropy: bool = False,
    reference: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`token_logprobs`, with figures from the same pass over the vocabulary.

    Args:
        entropy: also return H(π) in nats.
        reference: (N, D) hidden states of a second model with the same head; also
            return the exact KL(π ‖ ref) in nats, and log ref(target).

    Returns:
        logp (N,) with its gradient; entropy, kl and logp_ref (N,) without, or None.
    """
    if unembed.requires_grad:
        raise ValueError("the head is frozen here; use `naive` to train it")
    if _use_triton(backend, hidden):
        import logprob_triton  # here, since `import logprob` must not need triton

        logp, h, kl, logp_ref = logprob_triton.token_statistics(
            hidden, unembed, targets, temperature, valid, reference)
        return logp, h if entropy else None, kl, logp_ref
    return _TokenStatistics.apply(
        hidden, unembed, targets, temperature, valid, entropy, reference)


class RowStatistics(NamedTuple):
    """What one pass over the vocabulary tells of the tokens of some responses."""

    logp: Tensor  # (n, C) with its gradient; 0 where mask is False, as is logp_ref
    entropy: Tensor  # (N,) in nats, of the tokens that mask marks
    kl: Tensor | None  # (N,) exact KL(π ‖ ref) in nats
    logp_ref: Tensor | None  # (n, C)


def row_statistics(hidden: Tensor, unembed: Tensor, tokens: Tensor, mask: Tensor,
                   temperature: float, valid: int,
                   reference: Tensor | None = None) -> RowStatistics:
    """`token_statistics` of padded rows.

    Args:
        hidden: (n, C, D), the state before each token; tokens, mask: (n, C).
        reference: (N, D), a second model's states at the N tokens of the mask.
    """
    logp, entropy, kl, logp_ref = token_statistics(
        hidden[mask], unembed, tokens[mask], temperature, valid, entropy=True,
        reference=reference)
    return RowStatistics(by_row(logp, mask), entropy, kl,
                         None if logp_ref is None else by_row(logp_ref, mask))


def row_logprobs(hidden: Tensor, unembed: Tensor, tokens: Tensor, mask: Tensor,
                 temperature: float, valid: int) -> Tensor:
    """`token_logprobs` of padded rows: arguments of `row_statistics` → (n, C)."""
    return by_row(token_logprobs(hidden[mask], unembed, tokens[mask], temperature,
                                 valid), mask)


def by_row(values: Tensor, mask: Tensor) -> Tensor:
    """Values (N,) → (n, C): where mask is True, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device
                       ).masked_scatter(mask, values)


def _use_triton(backend: str | None, hidden: Tensor) -> bool:
    """Which side computes; a side that was asked for by name and cannot is an error."""
    if backend not in (None, "torch", "triton"):
        raise ValueError(f'backend is "torch", "triton" or None, not {backend!r}')
    if backend == "torch" or (backend is None and not hidden.is_cuda):
        return False
    obstacle = None
    if importlib.util.find_spec("triton") is None:
        obstacle = "needs triton: pip install -r requirements-gpu.txt"
    elif hidden.dtype == torch.float64:
        obstacle = "has no float64; use bf16, fp16 or fp32"
    elif hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        obstacle = "needs a GPU of compute capability 8.0 or newer"
    elif not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        obstacle = "needs a GPU, or TRITON_INTERPRET=1 from the start of Python"
    if obstacle and backend == "triton":
        raise ValueError(f"the Triton version of the log-probs {obstacle}")
    return obstacle is None


class _TokenStatistics(torch.autograd.Function):
    """The forward pass saves the gradient (W_y − E_π[W]) / T of every row, (N, D)."""

    @staticmethod
    def forward(ctx, hidden, unembed, targets, temperature, valid, entropy, reference):
        need_grad, columns, head = ctx.needs_input_grad[0], [], unembed[:valid]
        compute = _at_once if len(hidden) * len(head) <= BLOCK_LOGITS else _in_blocks
        for start in range(0, max(1, len(hidden)), ROWS):  # N = 0: one empty chunk
            here = slice(start, start + ROWS)
            ref = None if reference is None else reference[here]
            columns.append(compute(hidden[here], head, targets[here], temperature,
                                   need_grad, entropy, ref))
        logp, h, kl, logp_ref, grad = (
            torch.cat(column) if column[0] is not None else None
            for column in zip(*columns, strict=True))
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*(t for t in (h, kl, logp_ref) if t is not None))
        return logp, h, kl, logp_ref

    @staticmethod
    def backward(ctx, grad_logp, _entropy, _kl, _logp_ref):
        # d loss/d h = (d loss/d log π) · (W_y − E_π[W]) / T
        (grad,) = ctx.saved_tensors  # (N, D)
        grad = (grad_logp[:, None] * grad).to(grad.dtype)
        return grad, None, None, None, None, None, None


def _at_once(hidden, unembed, targets, temperature, need_grad, entropy, reference):
    """Some rows: logp, entropy, KL, logp_ref (n,) and the gradient of logp (n, D)."""
    logp_all = _log_softmax(hidden, unembed, temperature)  # (n, V)
    logp = logp_all.gather(-1, targets[:, None]).squeeze(-1)  # (n,)
    h = kl = logp_ref = grad = None
    if entropy or need_grad or reference is not None:
        prob = logp_all.exp()  # (n, V)
    if reference is not None:
        # KL(π ‖ ref) = Σ π (log π − log ref), over the whole vocabulary
        ref_all = _log_softmax(reference, unembed, temperature)  # (n, V)
        logp_ref = ref_all.gather(-1, targets[:, None]).squeeze(-1)  # (n,)
        kl = -ref_all.sub_(logp_all).mul_(prob).sum(-1)
    if entropy:
        h = -logp_all.mul_(prob).sum(-1)  # H(π) = −Σ π log π; the last use of logp_all
    if need_grad:
        # ∇_h log π(y) = −(π − e_y) W / T. Not W_y − π W: where π(y) is near 1 the two
        # rows nearly cancel, and in bf16 their difference would be rounding noise.
        share = prob.scatter_(-1, targets[:, None], logp.expm1()[:, None])
        grad = linear(share.to(unembed.dtype), unembed.T) / -temperature  # (n, D)
    return logp, h, kl, logp_ref, grad


def _log_softmax(hidden: Tensor, unembed: Tensor, temperature: float) -> Tensor:
    # In place: fresh memory for another block costs more than the softmax itself.
    logits = _logits(hidden, unembed, temperature)  # (n, V)
    return torch.log_softmax(logits, -1, out=logits)


class _Softmax:
    """Σ_v exp z_v, from one block of logits (n, w) after the other.

    The largest logit so far is subtracted before exp, which would overflow. When a
    block brings a larger one, whatever was summed before shrinks by one factor: the
    online softmax (arXiv 1805.02867). Sums of a row are float64: they cost nothing.
    """

    def __init__(self, rows: int, like: Tensor) -> None:
        self.top = like.new_full((rows,), torch.finfo(like.dtype).min)
        self.total = like.new_zeros(rows, dtype=torch.float64)  # Σ exp(z − top)
        self.chosen = like.new_zeros(rows)  # z of the target

    def add(self, z: Tensor, place: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        """Take a block of logits; z − top is left in its place.

        Args:
            place: (n, 1) the target's column in this block.
            here: (n,) whether the target is in this block at all.

        Returns:
            exp(z − top) (n, w), and the factor (n,) by which earlier sums shrink.
        """
        self.chosen = torch.where(here, z.gather(-1, place)[:, 0], self.chosen)
        before, self.top = self.top, torch.maximum(self.top, z.amax(-1))
        shrink = (before - self.top).double().exp()
        mass = z.sub_(self.top[:, None]).exp()  # (n, w)
        self.total = self.total * shrink + mass.sum(-1)
        return mass, shrink

    def log_total(self) -> Tensor:
        """log Σ exp z (n,)."""
        return self.top + self.total.log()


def _in_blocks(hidden, unembed, targets, temperature, need_grad, entropy, reference):
    """As `_at_once`, for logits that fill more than a block."""
    like = hidden.new_zeros(0, dtype=_wide(hidden))
    w_y = unembed[targets]  # (n, D); an id at or above `valid` fails here
    policy, ref = (_Softmax(len(hidden), like) for _ in range(2))
    z_mean, z_diff = torch.zeros_like(policy.total), torch.zeros_like(policy.total)
    w_mean = like.new_zeros(hidden.shape)  # (n, D)
    width = max(1, BLOCK_LOGITS // max(1, len(hidden)))
    for start in range(0, len(unembed), width):
        block = unembed[start:start + width]  # (w, D)
        place = (targets - start).clamp(0, len(block) - 1)[:, None]  # (n, 1)
        here = (targets >= start) & (targets < start + len(block))  # (n,)
        z = _logits(hidden, block, temperature)  # (n, w)
        mass, shrink = policy.add(z, place, here)  # exp(z − top)
        weight = mass.sum(-1)
        if entropy:  # Σ exp(z − top) z
            z_mean = z_mean * shrink + vecdot(mass, z) + policy.top * weight
        if reference is not None:  # Σ exp(z − top) (z − z_ref)
            z_ref = _logits(reference, block, temperature)
            ref.add(z_ref, place, here)
            z_diff = (z_diff * shrink - vecdot(mass, z_ref.sub_(z))
                      + (policy.top - ref.top) * weight)
        if need_grad:  # Σ_{v ≠ y} exp(z − top) W
            mass.scatter_(-1, place, mass.gather(-1, place) * ~here[:, None])
            w_mean *= shrink[:, None].to(w_mean)
            w_mean += linear(mass.to(block.dtype), block.T)
    log_total, grad = policy.log_total(), None
    logp = policy.chosen - log_total
    h = log_total - z_mean / policy.total if entropy else None  # −Σ π log π
    kl = logp_ref = None
    if reference is not None:
        logp_ref = ref.chosen - ref.log_total()
        # KL(π ‖ ref) = Σ π (log π − log ref)
        kl = z_diff / policy.total - log_total + ref.log_total()
    if need_grad:
        # ∇_h log π(y) = ((1 − π(y)) W_y − Σ_{v ≠ y} π(v) W_v) / T, as exact near 1
        w_mean = w_mean / policy.total[:, None].to(w_mean)
        grad = -logp.expm1()[:, None].to(w_mean) * w_y - w_mean
        grad = (grad / temperature).to(hidden.dtype)
    logp, h, kl, logp_ref = (None if x is None else x.to(like)
                             for x in (logp, h, kl, logp_ref))
    return logp, h, kl, logp_ref, grad


def _logits(hidden: Tensor, block: Tensor, temperature: float) -> Tensor:
    return linear(hidden, block).to(_wide(hidden)).div_(temperature)  # (n, w)


def _wide(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 where the input has it: never bf16, whose sums drift."""
    return torch.promote_types(tensor.dtype, torch.float32)
