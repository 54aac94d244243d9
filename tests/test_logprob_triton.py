"""Claims about logprob_triton.py.

* It gives what `naive` gives, in values and gradients, for sizes that fill no block and
  for sizes that do, for any temperature, limit of the vocabulary and target.
* In bf16 the logits are not rounded: the values are as exact as in fp32, and confident
  tokens have a better gradient than `naive` gives them.
* Very peaked and very low logits neither overflow nor vanish.
* Entropy and KL are the definition's, and asking for them changes nothing else.
* Parts of the vocabulary and slabs change nothing; no (N, V) tensor exists.
* The kernels compile for GPUs, with no GPU at hand (slow).

With a GPU these tests run the compiled kernels, otherwise Triton's interpreter does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_logprob import Largest, error, with_gradient
from torch.distributions import Categorical, kl_divergence

from logprob import naive, token_logprobs, token_statistics

kernels = pytest.importorskip(  # imports triton first of all
    "logprob_triton", reason="triton is missing (requirements-gpu.txt)")

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D, V = 19, 21, 53  # two blocks of rows, two of D, four of ids, all ending in part
EXACT = 5e-6  # fp32: a few roundings of a logit near 20


@pytest.fixture(autouse=True)
def small_blocks(request, monkeypatch):
    """16 × 16 × 16, the smallest that `tl.dot` takes, unless `real_blocks` are wanted.

    The four blocks of ids make two parts of two: every sum is carried on and combined.
    """
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    if "real_blocks" not in request.fixturenames:
        monkeypatch.setattr(kernels, "_blocks", lambda dtype: {
            "BLOCK_N": 16, "BLOCK_V": 16, "BLOCK_D": 16, "num_warps": 4,
            "num_stages": 1})


@pytest.fixture
def real_blocks():
    """Asking for this leaves the block sizes as they are."""


def case(rows=N, width=D, ids=V, below=None, dtype=torch.float32, seed=0):
    """Hidden states (N, D), a head (V, D), targets (N,) and reference states (N, D)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    unembed = torch.randn(ids, width, generator=generator)
    targets = torch.randint(below or ids, (rows,), generator=generator)
    reference = hidden + 0.3 * torch.randn(rows, width, generator=generator)
    floats = [t.to(DEVICE, dtype) for t in (hidden, unembed, reference)]
    return floats[0], floats[1], targets.to(DEVICE), floats[2]


def ours(hidden, unembed, targets, temperature=1.0, valid=None):
    return token_logprobs(hidden, unembed, targets, temperature, valid, "triton")


def figures(hidden, unembed, targets, reference, temperature=1.0, valid=None):
    """(logp, entropy, KL, logp_ref) of the kernel."""
    return token_statistics(hidden, unembed, targets, temperature, valid, True,
                            reference, "triton")


def defined(hidden, unembed, targets, reference, temperature=1.0, valid=None):
    """(logp, entropy, KL, logp_ref) by torch.distributions, in float64."""
    policy, other = (Categorical(logits=x.double() @ unembed[:valid].double().T
                                 / temperature) for x in (hidden, reference))
    return (policy.log_prob(targets), policy.entropy(), kl_divergence(policy, other),
            other.log_prob(targets))


def exact(hidden, unembed, *rest):
    """`naive` in float64, with its gradient."""
    return with_gradient(naive, hidden.double(), unembed.double(), *rest)


def check(hidden, unembed, *rest):
    for found, wanted in zip(with_gradient(ours, hidden, unembed, *rest),
                             exact(hidden, unembed, *rest), strict=True):
        assert found.dtype == torch.float32
        assert found.shape == wanted.shape
        assert error(found, wanted) < EXACT


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("valid", [None, 15, 16, 17, 48, V - 1])
def test_equals_naive_in_values_and_gradients(temperature, valid):
    hidden, unembed, targets, _ = case(below=valid)
    unembed[V if valid is None else valid:] = float("nan")  # nobody may look there
    check(hidden, unembed, targets, temperature, valid)


@pytest.mark.parametrize("sizes", [
    (1, 1, 2), (1, 5, 17), (16, 16, 16), (17, 33, 31), (32, 16, 64), (33, 15, 65)])
def test_any_sizes(sizes):
    hidden, unembed, targets, reference = case(*sizes)
    check(hidden, unembed, targets, 0.7)
    found = figures(hidden, unembed, targets, reference, 0.7)
    for a, b in zip(found, defined(hidden, unembed, targets, reference, 0.7),
                    strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_real_block_sizes(real_blocks, dtype):
    hidden, unembed, targets, reference = case(65, 70, 300, 290, dtype)
    found, slope = with_gradient(ours, hidden, unembed, targets, 0.7, 290)
    wanted, exact_slope = exact(hidden, unembed, targets, 0.7, 290)
    assert error(found, wanted) < EXACT
    assert error(slope, exact_slope) < (EXACT if dtype == torch.float32 else 2 * 2**-8)
    both = figures(hidden, unembed, targets, reference, 0.7, 290)[1:]
    for a, b in zip(both, defined(hidden, unembed, targets, reference, 0.7, 290)[1:],
                    strict=True):
        assert error(a, b) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_at_all(dtype):
    hidden, unembed, targets, reference = case(0, dtype=dtype)
    for found in figures(hidden, unembed, targets, reference):
        assert (found.shape, found.dtype) == ((0,), torch.float32)
    assert with_gradient(ours, hidden, unembed, targets)[1].shape == (0, D)


def test_targets_at_the_edges_of_blocks():
    edges = torch.tensor([0, 1, 15, 16, 17, 31, 32, 33, 47, 48, 51, 52], device=DEVICE)
    hidden, unembed, _, _ = case(len(edges))
    check(hidden, unembed, edges)


def test_an_id_beyond_the_limit_has_probability_zero():
    hidden, unembed, targets, _ = case()
    targets[:2] = torch.tensor([20, 40])  # in the limit's block, and behind it
    logp = ours(hidden, unembed, targets, 1.0, 20)
    assert logp[:2].tolist() == [-float("inf")] * 2
    allowed = targets < 20
    assert torch.isfinite(logp[allowed]).all()


def test_probabilities_over_the_valid_ids_sum_to_one():
    hidden, unembed, _, _ = case()
    for valid in (17, 48, V):
        ids = torch.arange(valid, device=DEVICE)
        logp = ours(hidden[:1].expand(valid, D), unembed, ids, 1.0, valid)
        assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("place", [0, 20, 52])
@pytest.mark.parametrize("size", [50, 2000])
def test_peaked_rows(place, size):
    # One row's logits reach ±size; exp(size) has no fp32. The rows beside it are tame,
    # and its block of ids comes first, between others, last.
    hidden, unembed, targets, reference = case()
    hidden[7] = size * unembed[place] / unembed[place].square().sum()
    for y in (place, 33):
        targets[7] = y
        check(hidden, unembed, targets)
    for a, b in zip(figures(hidden, unembed, targets, reference),
                    defined(hidden, unembed, targets, reference), strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5 + 2e-7 * size)


@pytest.mark.filterwarnings("ignore:overflow")  # of filled-up ids; nothing keeps them
def test_logits_far_below_zero():
    # Blocks are filled up with zeros; beside logits of −500 a zero would take it all.
    hidden, unembed, targets, reference = case()
    unembed[:, 0] = 1
    hidden[:, 0] = reference[:, 0] = -500
    wanted = exact(hidden, unembed, targets)
    for a, b in zip(with_gradient(ours, hidden, unembed, targets), wanted, strict=True):
        assert error(a, b) < 1e-4  # the logits themselves are good to 500 · 2^-24
    for a, b in zip(figures(hidden, unembed, targets, reference),
                    defined(hidden, unembed, targets, reference), strict=True):
        assert torch.allclose(a.double(), b, atol=5e-4)


def test_bf16():
    hidden, unembed, targets, _ = case(dtype=torch.bfloat16)
    wanted, exact_slope = exact(hidden, unembed, targets, 0.7)
    found, slope = with_gradient(ours, hidden, unembed, targets, 0.7)
    assert (found.dtype, slope.dtype) == (torch.float32, torch.bfloat16)
    assert error(found, wanted) < EXACT  # the logits are never rounded to bf16
    # Rounded to bf16 (by up to 2^-8) are the factors 1[v = y] − π(v), a slab's product
    # and the gradient; the interpreter cuts the first off where a GPU rounds. Were they
    # all at their worst, the error would be 4 · 2^-8; but their signs differ.
    assert error(slope, exact_slope) < 2 * 2**-8


def test_bf16_gradient_of_confident_tokens_is_no_noise():
    # At π(y) near 1 the factor 1 − π(y) must be formed before it is rounded.
    hidden, unembed, targets, _ = case(65, dtype=torch.bfloat16)  # at 64 a weight is 0
    towards = unembed[targets].double()
    push = towards * (11 / towards.square().sum(1, keepdim=True))
    hidden = (hidden * 0.1 + push).bfloat16()
    logp, wanted = exact(hidden, unembed, targets)
    sure = (logp.exp() > 0.99) & (logp.exp() < 0.99999)
    assert sure.sum() > 20
    found, peer = (
        ((with_gradient(f, hidden, unembed, targets)[1].double() - wanted).norm(dim=1)
         / wanted.norm(dim=1))[sure] for f in (ours, naive))
    assert found.max() < 4 * 2**-8
    assert found.median() < peer.median()  # which has bf16 logits


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("valid", [None, 16, 40])
def test_entropy_and_kl_are_the_definition(temperature, valid):
    hidden, unembed, targets, reference = case(below=valid)
    unembed[V if valid is None else valid:] = float("nan")
    data = hidden, unembed, targets, reference, temperature, valid
    for found, wanted in zip(figures(*data), defined(*data), strict=True):
        assert error(found, wanted) < 2e-5


def test_kl_is_zero_for_equals_and_never_negative():
    hidden, unembed, targets, reference = case(100)
    assert not figures(hidden, unembed, targets, hidden)[2].any()
    near = hidden + 1e-2 * (reference - hidden)
    kl = figures(hidden, unembed, targets, near)[2]
    assert kl.min() > -2e-6  # fp32 rounding
    assert kl.max() > 2e-6


def test_figures_change_neither_values_nor_gradients_and_have_none_themselves():
    hidden, unembed, targets, reference = case()
    data = hidden, unembed, targets
    found = figures(hidden.clone().requires_grad_(), unembed, targets, reference)
    assert [t.requires_grad for t in found] == [True, False, False, False]
    plain = with_gradient(ours, *data)
    both = with_gradient(lambda *a: figures(*a, reference)[0], *data)
    assert all(map(torch.equal, plain, both))
    none = token_statistics(*data, backend="triton")
    assert none[1:] == (None, None, None)
    with torch.no_grad():
        assert torch.equal(ours(*data), plain[0])


@pytest.mark.parametrize("programs", [1, 6, 512])
def test_parts_of_the_vocabulary_change_nothing(programs, monkeypatch):
    # Two blocks of rows; the ids' five blocks in one part, in 2 + 2 + 1, one by one.
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    hidden, unembed, targets, reference = case(ids=70)
    check(hidden, unembed, targets)
    for a, b in zip(figures(hidden, unembed, targets, reference),
                    defined(hidden, unembed, targets, reference), strict=True):
        assert error(a, b) < 2e-5


def test_slabs_change_nothing(monkeypatch):
    hidden, unembed, targets, _ = case(ids=300, below=290)
    monkeypatch.setattr(kernels, "SLAB_NUMBERS", 1)  # 128 ids each: 128 + 128 + 44
    check(hidden, unembed, targets, 0.7, 290)


def test_many_slabs_are_added_in_fp32(real_blocks, monkeypatch):
    # Flat logits: every slab contributes its share, and bf16 would drop small ones.
    hidden, unembed, targets, _ = case(5, 8, 128 * 60, dtype=torch.bfloat16)
    hidden, unembed = hidden / 16, unembed + 1
    monkeypatch.setattr(kernels, "SLAB_NUMBERS", 1)
    slope = with_gradient(ours, hidden, unembed, targets)[1]
    assert error(slope, exact(hidden, unembed, targets)[1]) < 2 * 2**-8


def test_tensors_with_gaps():
    data = hidden, unembed, targets, reference = case()
    gappy = [torch.stack([t, t], -1)[..., 0] for t in data]
    columns = [hidden.T.contiguous().T, unembed.T.contiguous().T, targets,
               reference.T.contiguous().T]
    wanted = figures(*data)
    for found in (figures(*gappy), figures(*columns)):
        assert all(map(torch.equal, found, wanted))
    slope = with_gradient(ours, *data[:3])[1]
    for h, w, y, _ in (gappy, columns):
        leaf = h.detach().requires_grad_()
        (ours(leaf, w, y) * torch.linspace(-1, 2, N, device=DEVICE)).sum().backward()
        assert torch.equal(leaf.grad, slope)


def test_the_head_is_frozen_and_types_must_agree():
    hidden, unembed, targets, _ = case()
    with pytest.raises(ValueError, match="one type"):
        ours(hidden.bfloat16(), unembed, targets)
    with pytest.raises(ValueError, match="float64"):
        ours(hidden.double(), unembed.double(), targets)
    with pytest.raises(ValueError, match="frozen"):
        ours(hidden, unembed.requires_grad_(), targets)


def test_no_logits_are_made_or_kept(real_blocks, monkeypatch):
    rows, width, ids, slab = 70, 4, 1500, 128
    monkeypatch.setattr(kernels, "SLAB_NUMBERS", rows * slab)
    hidden, unembed, targets, reference = case(rows, width, ids)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t)
    with hooks, Largest() as forward:
        logp = figures(hidden.requires_grad_(), unembed, targets, reference)[0]
    with Largest() as backward:
        logp.sum().backward()
    # In bytes, as the interpreter copies its arguments: the head, and a slab.
    assert forward.numbers <= 4 * ids * width
    assert backward.numbers <= 4 * rows * slab < 4 * rows * ids / 10
    assert sorted(kept) == sorted([rows * width, ids * width, rows, rows, rows])


COMPILE = """
import sys, torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import logprob_triton as kernels

def compile(name, element, dtype):
    blocks = kernels._blocks(dtype)
    options = {k: blocks.pop(k) for k in ("num_warps", "num_stages")}
    kernel, constants = kernels._dlogits_block, dict(blocks)
    if name != "share":
        kernel = kernels._forward
        constants["REFERENCE"] = name == "reference"
    types = dict(targets="*i64", lse="*fp32", one_minus_p="*fp32", T="fp32",
                 N="i32", V="i32", D="i32", ids_per_part="i32",
                 out="*" + element if name == "share" else "*fp32")
    signature = {a: "constexpr" if a in constants else types.get(a, "*" + element)
                 for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names)
               if signature[a].startswith("*") or a in ("D", "ids_per_part")}
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned), options=options,
        target=GPUTarget("cuda", int(sys.argv[1]), 32))
    return made.metadata.shared, made.asm["ptx"]

for name in ("forward", "reference", "share"):
    for element, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        shared, code = compile(name, element, dtype)
        print(name, element, shared, "wgmma" in code or "mma.sync" in code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_compiles_for_gpus(capability, tmp_path):
    # The interpreter takes programs that the compiler refuses. A process of its own:
    # in this one, triton may be the interpreter.
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": ".",
                                "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability)],
                          env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 6
    for name, element, shared, tensor_cores in rows:
        assert int(shared) <= 99 * 1024, name  # 8.6 gives a program no more
        assert tensor_cores == str(element == "bf16"), name
