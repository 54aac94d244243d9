"""Claims about model.py.

* Our logits and greedy decoding are those of transformers, for every kind of checkpoint
  that we read, whether we or transformers wrote it.
* Caching, padding, decoding and sharing a prompt change neither a value nor a gradient.
* RMSNorm and rotary positions are what their formulas say; the weights are counted from
  the sizes alone.
* Micro-batches hold every row once, cut where that costs least.
"""

import cmath
import itertools
from pathlib import Path

import pytest
import torch
from conftest import REAL, every_variant, needs_real_qwen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lora
import model as qwen
from loading import load, read_config


def ids(seed: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(448, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def hidden_of(model: qwen.Qwen, tokens: list[int]) -> Tensor:
    """The oracle of this file: one row, no cache, no padding → (T, D)."""
    return model(torch.tensor([tokens]))[0]


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of float64 sums."""
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-12)


@pytest.fixture
def exact(checkpoint, variant):
    """The variant in float64, where a wrong mask cannot hide behind rounding."""
    return load(checkpoint(variant), dtype=torch.float64)[0]


# ----------------------------------------------------------------- against transformers


@pytest.mark.peer
@every_variant
@pytest.mark.parametrize("writer", ["checkpoint", "peer_checkpoint"])
def test_logits_equal_those_of_transformers(request, writer, variant):
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(writer)(variant)
    auto = transformers.AutoModelForCausalLM
    peer = auto.from_pretrained(folder, dtype=torch.float32)
    ours, _ = load(folder)
    tokens = torch.tensor(ids(0, 60, 60))
    with torch.no_grad():
        want, have = peer(tokens).logits, ours.logits(ours(tokens))
    assert want.std() > 0.5  # a model that says nothing would agree with anybody
    assert (want - have).abs().max() < 1e-5


# ---------------------------------------------------------------- caching and padding


@every_variant
def test_rows_behind_a_cached_prompt_equal_whole_rows(exact, variant):
    prompt, first, second = ids(1, 9, 6, 4)
    with torch.no_grad():
        prefix = exact.prefill([prompt])
        before = [t.clone() for t in prefix.keys + prefix.values]
        rows = qwen.pad_rows([first, second], exact.device)
        hidden = exact(rows, prefix)  # (2, 6, D)
    assert close(hidden[0], hidden_of(exact, prompt + first)[9:])
    assert close(hidden[1, :4], hidden_of(exact, prompt + second)[9:])
    # The prefix is still the prompt's alone: the next micro-batch finds it unchanged.
    assert prefix.length == 9
    assert all(map(torch.equal, before, prefix.keys + prefix.values))


@every_variant
def test_a_prefix_of_fewer_layers_ends_the_pass_after_these(exact, variant):
    prompt, row = ids(1, 9, 6)
    seen = []
    hook = exact.model.layers[0].register_forward_hook(
        lambda block, given, out: seen.append(out[0]))
    with torch.no_grad():
        hidden_of(exact, prompt + row)
        hook.remove()
        with exact.shared_prefix(prompt, depth=1) as prefix:
            hidden = exact(torch.tensor([prompt[-1:] + row]), prefix)[0]
        assert len(prefix.keys) == 1
        assert close(hidden, exact.model.norm(seen[0])[len(prompt) - 1:])


@pytest.mark.parametrize("variant", ["qwen2-tied", "qwen3-untied"])
def test_right_padding_changes_nothing(exact, variant):
    prompt, row, junk = ids(2, 5, 6, 7)
    alone = hidden_of(exact, row)
    with torch.no_grad():
        prefix = exact.prefill([prompt])
        assert close(exact(torch.tensor([row + junk]))[0, :6], alone)
        behind = exact(torch.tensor([row]), prefix)[0]
        assert close(exact(torch.tensor([row + junk]), prefix)[0, :6], behind)


@every_variant
def test_left_padded_prompts_equal_single_ones(exact, variant):
    prompts, rows = ids(3, 7, 1, 0, 12), torch.tensor(ids(4, 3, 3, 3, 3))
    with torch.no_grad():
        together = exact.prefill(prompts)
        hidden = exact(rows, together)  # (P, 3, D)
        for p, prompt in enumerate(prompts):
            whole = hidden_of(exact, prompt + rows[p].tolist())
            assert close(hidden[p], whole[len(prompt):]), f"prompt of {len(prompt)}"
            if prompt:
                alone = exact.prefill([prompt])
                for mine, its in zip(together.keys, alone.keys, strict=True):
                    assert close(mine[p:p + 1, :, 12 - len(prompt):], its)


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor of any operation has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@torch.no_grad()
@pytest.mark.parametrize("variant", ["qwen2-tied"])
def test_prompts_of_several_lengths_take_memory_in_proportion_to_their_length(exact):
    largest = []
    for length in (500, 1000):
        with LargestTensor() as seen:
            exact.prefill(ids(8, length, length - 1, 3, length, 0))
        largest.append(seen.numbers)
    # Two rows of the MLP's 96, or five of a layer's keys: a mask would have S² places.
    assert largest == [500 * 192, 1000 * 192]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["qwen3-untied"])
def test_prompts_of_one_length_are_computed_at_once(exact):
    passes = []
    hook = exact.model.layers[0].register_forward_hook(
        lambda block, given, out: passes.append(tuple(out.shape[:2])))
    exact.prefill(ids(8, 4, 9, 4, 0, 9, 4))
    hook.remove()
    assert passes == [(3, 4), (2, 9)]


@every_variant
def test_decoding_step_by_step_equals_the_full_pass_and_keeps_the_right_rows(
        exact, variant):
    prompts, responses = ids(5, 6, 2), ids(6, 5, 5, 5, 5, 5, 5)  # P = 2, G = 3
    whole = [hidden_of(exact, prompts[b // 3] + r)[len(prompts[b // 3]):]
             for b, r in enumerate(responses)]  # B of (C, D)
    alive = torch.arange(6)
    with torch.no_grad():
        cache = exact.prefill(prompts).for_decoding(3, room=5)
        for t in range(5):
            tokens = torch.tensor([[responses[b][t]] for b in alive])
            hidden = exact(tokens, cache)[:, -1]  # (n, D)
            for b, h in zip(alive, hidden, strict=True):
                assert close(h, whole[b][t]), f"row {b}, step {t}"
            if t in (1, 3):  # rows leave twice, the second time out of order
                stay = torch.tensor([0, 2, 3, 5] if t == 1 else [3, 0])
                alive = alive[stay]
                cache.keep(stay)
    assert alive.tolist() == [5, 0]


# ------------------------------------------------------------- gradients of the prompt


def with_adapter(folder: Path, dtype: torch.dtype = torch.float64) -> qwen.Qwen:
    """A model whose adapter `policy` already says something (B ≠ 0)."""
    model, _ = load(folder, dtype=dtype)
    lora.attach(model, "policy", rank=3, alpha=6, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in lora.layers(model).values():
        layer.lora_B["policy"].data.normal_(0, 0.2, generator=generator)
    return model


@every_variant
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_shared_prefix_gradients_equal_those_of_repeated_prompts(
        checkpoint, variant, micro):
    model = with_adapter(checkpoint(variant))
    prompt, *responses = ids(7, 8, 6, 5, 5, 3, 1)
    rows = [prompt[-1:] + response[:-1] for response in responses]
    # Any loss will do; this one weighs each number of the real places by its own draw.
    weights = torch.randn(5, 6, 64, generator=torch.Generator().manual_seed(0)).double()
    for g, row in enumerate(rows):
        weights[g, len(row):] = 0
    trained = lora.parameters(model, "policy")

    def gradients(backward) -> list[Tensor]:
        for p in trained:
            p.grad = None
        with lora.using(model, "policy"):
            backward()
        return [p.grad for p in trained]

    def repeated() -> None:
        whole = qwen.pad_rows([prompt[:-1] + row for row in rows], model.device)
        (model(whole)[:, 7:] * weights).sum().backward()

    def shared() -> None:
        with model.shared_prefix(prompt) as prefix:
            for g in range(0, 5, micro):
                hidden = model(qwen.pad_rows(rows[g:g + micro], model.device), prefix)
                own = weights[g:g + micro, :hidden.shape[1]]
                (hidden * own).sum().backward()

    want, have = gradients(repeated), gradients(shared)
    for a, b in zip(want, have, strict=True):
        assert a.norm() > 1e-3
        assert (a - b).norm() < 1e-6 * a.norm()


def test_a_shared_prefix_holds_no_graph_where_nothing_is_trained(checkpoint):
    model = with_adapter(checkpoint("qwen2-tied"))
    with torch.no_grad(), lora.using(model, "policy"):
        with model.shared_prefix([1, 2]) as prefix:
            assert not any(t.requires_grad for t in prefix.keys + prefix.values)
    with model.shared_prefix([1, 2]) as prefix:  # the bare base: GRPO's reference
        assert not any(t.requires_grad for t in prefix.keys + prefix.values)


def test_a_prompt_of_one_token_has_an_empty_prefix(checkpoint):
    model = with_adapter(checkpoint("qwen2-tied"))
    with lora.using(model, "policy"):
        with model.shared_prefix([5]) as prefix:
            hidden = model(torch.tensor([[5, 6]]), prefix)[0]
            hidden.sum().backward()
        assert close(hidden.detach(), hidden_of(model, [5, 6]))


# --------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("variant", ["qwen2-tied", "qwen3-untied"])
def test_rotary_positions_are_complex_rotations(checkpoint, variant):
    config = read_config(checkpoint(variant) / "config.json")
    half = config.head_dim // 2
    positions = torch.tensor([[0, 1, 2, 50], [7, 8, 90, 91]])
    x = torch.randn(2, 3, 4, config.head_dim, dtype=torch.float64)  # (B, H, T, Dh)
    turned = qwen.rotate(x, *qwen.rotary(positions, config, torch.float64))
    for i in range(half):
        z = torch.complex(x[..., i], x[..., i + half])
        speed = config.rope_theta ** (-2 * i / config.head_dim)
        turn = torch.tensor([[cmath.exp(1j * int(p) * speed) for p in row]
                             for row in positions])
        z = z * turn[:, None]
        # Angles are fp32, as in every implementation: 91 rad · 2^-24 is 5e-6.
        assert (turned[..., i] - z.real).abs().max() < 3e-5
        assert (turned[..., i + half] - z.imag).abs().max() < 3e-5


def test_rms_norm_is_its_definition():
    norm = qwen.RMSNorm(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 6, dtype=torch.float64) * 0.05  # small, so that eps counts
    for row, y in zip(x.tolist(), norm(x), strict=True):
        root = (sum(v * v for v in row) / 6 + 1e-3) ** 0.5
        want = [v / root * w for v, w in zip(row, norm.weight.tolist(), strict=True)]
        assert close(y, torch.tensor(want, dtype=torch.float64))


def test_rms_norm_of_bf16_is_computed_in_fp32():
    norm = qwen.RMSNorm(4096, eps=1e-6).bfloat16()
    torch.nn.init.ones_(norm.weight)
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    want = x.double() * (x.double().square().mean(-1, True) + 1e-6).rsqrt()
    assert norm(x).dtype == torch.bfloat16
    # Rounded once: with a mean or a root in bf16 every third number would differ.
    assert (norm(x) == want.bfloat16()).float().mean() > 0.999


@every_variant
def test_weights_are_counted_from_the_sizes_alone(checkpoint, variant):
    config = read_config(checkpoint(variant) / "config.json")
    counted = sum(p.numel() for p in qwen.Qwen(config).parameters())
    assert config.num_parameters == counted


# ------------------------------------------------------------------------ micro-batches


@pytest.mark.parametrize("limit", [8192, 60, 1])
@pytest.mark.parametrize("lengths", [
    [7], [3, 3], [90, 4, 9], [5, 40, 1, 38, 12, 41], [9, 1, 4, 30, 4, 2, 10, 10, 7, 1]])
def test_micro_batches_hold_every_row_once_at_the_least_cost(lengths, limit,
                                                             monkeypatch):
    monkeypatch.setattr(qwen, "TOKENS_PER_PASS", limit)
    batches = qwen.micro_batches(lengths)
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert [lengths[row] for row in rows] == sorted(lengths)

    def cost(batches: list[list[int]]) -> float:
        """Of batches of lengths."""
        sizes = [len(batch) * max(batch) for batch in batches]
        fits = all(size <= limit or len(batch) == 1
                   for size, batch in zip(sizes, batches, strict=True))
        return sum(sizes) + qwen.PASS_COST * len(batches) if fits else float("inf")

    ordered, costs = sorted(lengths), []
    for count in range(len(lengths)):
        for cuts in itertools.combinations(range(1, len(lengths)), count):
            edges = [0, *cuts, len(lengths)]
            costs.append(cost([ordered[a:b] for a, b in itertools.pairwise(edges)]))
    assert cost([[lengths[row] for row in batch] for batch in batches]) == min(costs)


# ------------------------------------------------------------------- a real Qwen (slow)


QUESTIONS = [
    "How do I stop my kitchen tap from dripping?", "Hi",
    "def f(x):\n    return x + 1  # add\n\n\nif __name__ == '__main__':\n\tprint(f(1))",
    "你好，世界！请告诉我怎么做饭。", "Привет, как дела?",
    "Write a haiku about rain.", "What is 17 * 23?", "Name three uses of a brick."]


@pytest.fixture(scope="module")
def real():
    """Our model and tokenizer and transformers' model, all fp32."""
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32)
    return *load(REAL, dtype=torch.float32), peer.eval()


@needs_real_qwen
@torch.no_grad()
def test_real_logits_equal_those_of_transformers(real):
    ours, tokenizer, peer = real
    for question in QUESTIONS[:5]:
        tokens = torch.tensor([tokenizer.chat(question)])
        worst = (ours.logits(ours(tokens)) - peer(tokens).logits).abs().max().item()
        print(f"{question[:30]!r}: largest difference of logits {worst:.2e}")
        assert worst < 2e-4


@needs_real_qwen
@torch.no_grad()
def test_real_greedy_decoding_equals_that_of_transformers(real):
    ours, tokenizer, peer = real
    chats, steps = [tokenizer.chat(q) for q in QUESTIONS], 64
    # Ours decodes all prompts in one left-padded batch, theirs one after another.
    cache = ours.prefill([c[:-1] for c in chats]).for_decoding(1, steps)
    last, tokens, margins = torch.tensor([c[-1:] for c in chats]), [], []
    for _ in range(steps):
        logits = ours.logits(ours(last, cache))[:, 0]  # (P, V)
        best = logits.topk(2)
        last = best.indices[:, :1]
        tokens.append(last)
        margins.append(best.values[:, 0] - best.values[:, 1])
    tokens = torch.cat(tokens, 1).tolist()
    margins = torch.stack(margins, 1).tolist()
    for chat, mine, margin in zip(chats, tokens, margins, strict=True):
        theirs = peer.generate(torch.tensor([chat]), do_sample=False,
                               max_new_tokens=steps)[0, len(chat):].tolist()
        end = len(theirs)  # theirs ends at a stop token
        agreed = next((t for t in range(end) if mine[t] != theirs[t]), end)
        smallest = min(margin[:end])
        print(f"{agreed} of {end} tokens agree; smallest margin {smallest:.1e}")
        # Two tokens that are as good as equal may fall either way.
        assert agreed == end or margin[agreed] < 1e-3
