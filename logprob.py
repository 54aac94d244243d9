"""log π(token) without a (tokens × vocabulary) tensor.

A head of V = 151,936 tokens turns 4,096 hidden states into 2.5 GB of fp32 logits, and
autograd would keep several copies. Only one number a token is wanted:

    z = W h / T                 logits over the valid vocabulary, T the temperature
    log π(y) = z_y − log Σ_v exp z_v

    ∇_h log π(y) = (W_y − Σ_v π(v) W_v) / T = (W_y − E_π[W]) / T

The gradient needs nothing but E_π[W] (D numbers), which the forward pass has at hand
while a chunk of logits exists. So: two products with W in the forward pass (one more
for a reference), none in the backward pass, nothing recomputed, and no gradient for the
frozen head. The same chunk
also gives the entropy and the exact KL divergence to a second distribution.

`naive` is the reference that everything is tested against. On a GPU where Triton is
installed, `logprob_triton.py` computes the same without a chunk of logits in memory.
"""

import importlib.util
import os

import torch
from torch import Tensor

from model import linear

# Logits of a chunk: 8 million are 32 MB of fp32. Twice as many were slower on a CPU.
CHUNK_LOGITS = 8_000_000


def naive(hidden: Tensor, unembed: Tensor, targets: Tensor, temperature: float = 1.0,
          valid: int | None = None) -> Tensor:
    """The definition, with the full (N, V) logits: the reference for tests."""
    logits = hidden @ unembed[:valid].T  # (N, V)
    logits = logits.to(_wide(hidden)) / temperature
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def token_logprobs(hidden: Tensor, unembed: Tensor, targets: Tensor,
                   temperature: float = 1.0, valid: int | None = None,
                   backend: str | None = None) -> Tensor:
    """log π(target) for each hidden state, one chunk of logits at a time.

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
    """Chunk by chunk; the forward pass saves the slope (W_y − E_π[W]) / T, (N, D)."""

    @staticmethod
    def forward(ctx, hidden, unembed, targets, temperature, valid, entropy, reference):
        need_grad = ctx.needs_input_grad[0]
        rows = max(1, CHUNK_LOGITS // unembed.shape[0])
        parts = []
        for start in range(0, max(1, len(hidden)), rows):  # N = 0: one empty chunk
            here = slice(start, start + rows)
            ref = None if reference is None else reference[here]
            parts.append(_statistics(hidden[here], unembed[:valid], targets[here],
                                     temperature, need_grad, entropy, ref))
        logp, h, kl, logp_ref, slope = (
            torch.cat(column) if column[0] is not None else None
            for column in zip(*parts, strict=True))
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(*(t for t in (h, kl, logp_ref) if t is not None))
        return logp, h, kl, logp_ref

    @staticmethod
    def backward(ctx, grad_logp, _entropy, _kl, _logp_ref):
        # d loss/d h = (d loss/d log π) · (W_y − E_π[W]) / T
        (slope,) = ctx.saved_tensors  # (N, D)
        grad = (grad_logp[:, None] * slope).to(slope.dtype)
        return grad, None, None, None, None, None, None


def _statistics(hidden, unembed, targets, temperature, need_grad, entropy, reference):
    """One chunk: logp, entropy, KL, logp_ref (n,) and the slope of logp (n, D)."""
    logp_all = _log_softmax(hidden, unembed, temperature)  # (n, V)
    logp = logp_all.gather(-1, targets[:, None]).squeeze(-1)  # (n,)
    h = kl = logp_ref = slope = None
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
        slope = linear(share.to(unembed.dtype), unembed.T) / -temperature  # (n, D)
    return logp, h, kl, logp_ref, slope


def _log_softmax(hidden: Tensor, unembed: Tensor, temperature: float) -> Tensor:
    # In place: fresh memory for another chunk costs more than the softmax itself.
    logits = linear(hidden, unembed).to(_wide(hidden)).div_(temperature)  # (n, V)
    return torch.log_softmax(logits, -1, out=logits)


def _wide(tensor: Tensor) -> torch.dtype:
    """fp32, or float64 where the input has it: never bf16, whose sums drift."""
    return torch.promote_types(tensor.dtype, torch.float32)
