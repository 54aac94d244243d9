"""log π(token) in Triton: on a GPU, the forward pass writes no logits to memory.

`logprob.py` writes a block of logits and reads it several times: for the softmax, the
entropy, the KL. Here a Triton program (one instance of the kernel, as CUDA has thread
blocks) holds a block of logits (rows × ids) in registers, takes from it what is wanted
and goes on to the next ids. As there, a softmax needs of the past only the largest
logit m and a sum s relative to it (the "online softmax", arXiv 1805.02867, algorithm
3); with the logits z = W h / T of the next block

    m' = max(m, max_v z_v)        s' = s exp(m − m') + Σ_v exp(z_v − m')

and at the end, writing lse for log Σ_v exp z_v = m + log s,

    log π(y) = z_y − lse     H(π) = lse − E_π[z]
    KL(π ‖ ref) = E_π[z − z_ref] − lse + lse_ref

where the expectations are sums weighted by exp(z − m), rescaled as s is.

`logprob.py` makes the gradient in the forward pass. That would not fit here: E_π[W] for
64 rows of D = 5120 is 1.3 MB of fp32, and a multiprocessor has a quarter of a megabyte
of registers and no more of shared memory. So the forward pass keeps lse (N,), and the
backward pass computes the logits again, block by block, each for itself:

    ∇_h log π(y) = Σ_v (1[v = y] − π(v)) W_v / T,     π(v) = exp(z_v − lse)

It takes the vocabulary in slabs: a kernel writes the bracket for the ids of a slab, and
an ordinary matrix product adds what they contribute. That makes three products with W
where a gradient is wanted (`logprob.py`: two), and one where none is; a reference adds
one.

`logprob.py` imports this file when it has chosen it, and nobody else does: triton is
optional. With TRITON_INTERPRET=1 the kernels run on the CPU, in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of the forward pass. A large GPU has 100 to 150 multiprocessors; when there
# are fewer blocks of rows than this, several programs share a block's vocabulary.
PROGRAMS = 512
# Entries of ∂ log π/∂z (N, ids) for one slab of ids: 32 MB of bf16, so that the product
# may find them in a GPU's L2 cache.
SLAB_NUMBERS = 16_000_000
# The interpreter's `tl.dot` takes bf16 for integers (it has no such type); products of
# two bf16 numbers are exact in fp32, so it may as well compute there.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def token_statistics(
    hidden: Tensor, unembed: Tensor, targets: Tensor, temperature: float,
    valid: int | None, reference: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`logprob.token_statistics` for bf16, fp16 or fp32 inputs.

    Returns:
        logp (N,) with its gradient; entropy; kl and logp_ref or None: (N,), all fp32.
    """
    states = [hidden] if reference is None else [hidden, reference]
    if any(t.dtype != unembed.dtype for t in states):
        raise ValueError("hidden states and head must be of one type")
    return _TokenStatistics.apply(hidden, unembed, targets, temperature, valid,
                                  reference)


class _TokenStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembed, targets, temperature, valid, reference):
        # The kernels expect rows of D numbers, one behind the other. No copy is made of
        # a head that lies so, as a model's does.
        hidden, unembed = hidden.contiguous(), unembed[:valid].contiguous()
        targets = targets.contiguous()
        reference = None if reference is None else reference.contiguous()
        parts = _vocabulary_parts(hidden, reference, unembed, targets, temperature)
        logp, lse, entropy, kl, logp_ref = _combine(parts)
        ctx.temperature = temperature
        ctx.save_for_backward(hidden, unembed, targets, lse, logp)
        figures = (entropy, kl, logp_ref)
        ctx.mark_non_differentiable(*(t for t in figures if t is not None))
        return logp, *figures

    @staticmethod
    def backward(ctx, grad_logp, _entropy, _kl, _logp_ref):
        hidden, unembed, targets, lse, logp = ctx.saved_tensors
        ids = max(128, SLAB_NUMBERS // max(1, len(hidden)) // 128 * 128)
        grad = torch.zeros_like(hidden, dtype=torch.float32)  # (N, D)
        for first in range(0, len(unembed), ids):
            slab = unembed[first:first + ids]
            dlogits = _dlogits(hidden, slab, targets - first, lse, logp,
                               ctx.temperature)
            grad += dlogits @ slab  # a slab's product is rounded, their sum is not
        grad *= (grad_logp / ctx.temperature)[:, None]
        return grad.to(hidden.dtype), None, None, None, None, None


# --------------------------------------------------------------------------- kernels


@triton.jit
def _logits(states, head, n, v, N, V, D, T, BLOCK_D: tl.constexpr):
    """W h / T in fp32 for rows n (BLOCK_N,) and ids v (BLOCK_V,); 0 from id V on."""
    z = tl.zeros((n.shape[0], v.shape[0]), tl.float32)
    # 64-bit offsets: V · D is 0.8e9 at 14B, too near the largest 32-bit number.
    h_row, w_row = n.to(tl.int64)[:, None] * D, v.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        h = tl.load(states + h_row + d, (n < N)[:, None] & (d < D), 0.0)
        w = tl.load(head + w_row + d, (v < V)[:, None] & (d < D), 0.0)
        if INTERPRETED:
            h, w = h.to(tl.float32), w.to(tl.float32)
        # "ieee": fp32 inputs would otherwise be cut to TF32, ten bits of fraction.
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    return z / T


@triton.jit
def _forward(hidden, reference, head, targets, out, N, V, D, T, ids_per_part,
             BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
             REFERENCE: tl.constexpr):
    """One block of rows, one part of the vocabulary: the sums of `_combine`.

    Programs of one part run side by side, so that they find its rows of W in the cache.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * ids_per_part
    y = tl.load(targets + n, n < N, 0)
    # peak is m, total s; moment Σ e^(z − m) z, diff Σ e^(z − m) (z − z_ref)
    peak = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment, diff, ref_total = total, total, total
    # a target that never comes keeps −∞: probability 0
    z_y, ref_peak, r_y = peak, peak, peak
    for start in range(first, min(first + ids_per_part, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        z = _logits(hidden, head, n, v, N, V, D, T, BLOCK_D)  # (BLOCK_N, BLOCK_V)
        inside = (v < V)[None, :]
        seen = tl.where(inside, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(seen, 1))
        rescale = tl.exp(peak - new_peak)
        weight = tl.exp(seen - new_peak[:, None])
        total = total * rescale + tl.sum(weight, 1)
        moment = moment * rescale + tl.sum(weight * z, 1)  # z, not seen: 0 · −∞ is NaN
        is_y = v[None, :] == y[:, None]
        z_y = tl.maximum(z_y, tl.max(tl.where(is_y, seen, float("-inf")), 1))
        if REFERENCE:
            r = _logits(reference, head, n, v, N, V, D, T, BLOCK_D)
            diff = diff * rescale + tl.sum(weight * (z - r), 1)
            seen = tl.where(inside, r, float("-inf"))
            r_y = tl.maximum(r_y, tl.max(tl.where(is_y, seen, float("-inf")), 1))
            new_ref = tl.maximum(ref_peak, tl.max(seen, 1))
            ref_total = (ref_total * tl.exp(ref_peak - new_ref)
                         + tl.sum(tl.exp(seen - new_ref[:, None]), 1))
            ref_peak = new_ref
        peak = new_peak
    # out is (figures, parts, N)
    place = out + tl.program_id(1) * N + n
    step = tl.num_programs(1) * N
    tl.store(place, peak, n < N)
    tl.store(place + step, total, n < N)
    tl.store(place + 2 * step, moment, n < N)
    tl.store(place + 3 * step, z_y, n < N)
    if REFERENCE:
        tl.store(place + 4 * step, diff, n < N)
        tl.store(place + 5 * step, ref_peak, n < N)
        tl.store(place + 6 * step, ref_total, n < N)
        tl.store(place + 7 * step, r_y, n < N)


@triton.jit
def _dlogits_block(hidden, head, targets, lse, one_minus_p, out, N, V, D, T,
                   BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """out (N, V) = 1[v = y] − π(v), one block of it."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    y = tl.load(targets + n, n < N, 0)
    z = _logits(hidden, head, n, v, N, V, D, T, BLOCK_D)
    prob = tl.exp(z - tl.load(lse + n, n < N, 0.0)[:, None])
    at_y = tl.load(one_minus_p + n, n < N, 0.0)[:, None]
    dlogits = tl.where(v[None, :] == y[:, None], at_y, -prob).to(out.dtype.element_ty)
    place = out + n.to(tl.int64)[:, None] * V + v[None, :]
    tl.store(place, dlogits, (n < N)[:, None] & (v < V)[None, :])


# -------------------------------------------------------------------------- launches


def _vocabulary_parts(hidden, reference, unembed, targets, temperature) -> Tensor:
    """(figures, parts, N): what each part of the vocabulary adds to a row's sums."""
    (rows, width), ids = hidden.shape, len(unembed)
    blocks = _blocks(hidden.dtype)
    row_blocks = triton.cdiv(rows, blocks["BLOCK_N"])
    id_blocks = triton.cdiv(ids, blocks["BLOCK_V"])
    # As many parts as give PROGRAMS programs, each of them with at least one block.
    each = triton.cdiv(id_blocks, max(1, PROGRAMS // max(1, row_blocks)))
    parts = triton.cdiv(id_blocks, each)
    figures = 4 if reference is None else 8
    out = hidden.new_empty(figures, parts, rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(hidden):  # Triton launches on the current GPU
            _forward[row_blocks, parts](
                hidden, reference, unembed, targets, out, rows, ids, width,
                float(temperature), each * blocks["BLOCK_V"],
                REFERENCE=reference is not None, **blocks)
    return out


def _combine(parts: Tensor) -> tuple[Tensor | None, ...]:
    """Sums (figures, parts, N) → logp, lse, entropy, KL, logp_ref (or None), all (N,).

    The online softmax once more, over parts instead of blocks.
    """
    peak, total, moment, z_y, *ref = parts
    top = peak.amax(0)  # (N,)
    rescale = (peak - top).exp()  # (parts, N)
    total = (total * rescale).sum(0)
    lse = top + total.log()
    # Not z_y − lse: the larger numbers go first, while their difference is exact.
    logp = z_y.amax(0) - top - total.log()
    entropy = lse - (moment * rescale).sum(0) / total
    if not ref:
        return logp, lse, entropy, None, None
    diff, ref_peak, ref_total, r_y = ref
    ref_top = ref_peak.amax(0)
    ref_total = (ref_total * (ref_peak - ref_top).exp()).sum(0)
    kl = ((diff * rescale).sum(0) / total  # E_π[z − z_ref] − lse + lse_ref
          - (top - ref_top) - (total / ref_total).log())
    logp_ref = r_y.amax(0) - ref_top - ref_total.log()
    return logp, lse, entropy, kl, logp_ref


def _dlogits(hidden, slab, targets, lse, logp, temperature) -> Tensor:
    """1[v = y] − π(v) for the ids of a slab (ids, D): (N, ids) in the head's type.

    At v = y it is 1 − π(y) from `expm1`: near π(y) = 1 nothing cancels, and it is
    rounded to bf16 after the subtraction, not before.
    """
    (rows, width), ids = hidden.shape, len(slab)
    dlogits = slab.new_empty(rows, ids)
    blocks = _blocks(hidden.dtype)
    grid = (triton.cdiv(rows, blocks["BLOCK_N"]), triton.cdiv(ids, blocks["BLOCK_V"]))
    if rows:
        with torch.cuda.device_of(hidden):
            _dlogits_block[grid](hidden, slab, targets, lse, -logp.expm1(), dlogits,
                                 rows, ids, width, float(temperature), **blocks)
    return dlogits


def _blocks(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes and the compiler's options for a type; D plays no part in them.

    With these the compiler keeps (nearly) everything in registers and wants 74 KB of
    shared memory at most, on compute capability 8.0, 8.6 and 9.0. They were chosen by
    that alone: nothing was timed.
    """
    if dtype == torch.float32:  # no tensor cores: a smaller block fits the registers
        sizes = {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_stages": 2}
    else:
        sizes = {"BLOCK_N": 64, "BLOCK_V": 128, "BLOCK_D": 64, "num_stages": 3}
    return sizes | {"num_warps": 8}
