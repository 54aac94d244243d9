"""Qwen in one sitting: token ids → hidden states.

One class runs Qwen2 and Qwen2.5 (bias on q, k, v) and dense Qwen3 (no bias, a norm on
each query and key). The architecture is a pre-norm decoder: RMSNorm, grouped-query
attention with rotary positions, RMSNorm, SwiGLU.

What differs from the Hugging Face implementation, on purpose:

* `forward` returns hidden states, not logits. (tokens × vocabulary) is by far the
  largest tensor of training; `logprob.py` never builds it, and whoever wants it has to
  ask `Qwen.logits` by name.
* A prompt is computed once. `prefill` returns the keys and values of a prompt, and any
  number of rows attend to them, in sampling, scoring and training (`shared_prefix`).
* Nothing depends on padding: rows are padded on the right, where causal attention
  cannot look, and prompts on the left, where a mask hides them from later rows.

Shapes: P prompts, G responses of C tokens each, B rows, T tokens, S tokens of the
prefix, D width, Hq query heads, Hkv key and value heads, Dh head size, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frozen import Linear, linear

# ---------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a checkpoint, under their names in `config.json`."""

    model_type: str  # "qwen2" (also Qwen2.5) or "qwen3"
    vocab_size: int  # V, often padded beyond what the tokenizer knows
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # Hq
    num_key_value_heads: int  # Hkv
    head_dim: int  # Dh; Qwen3 states it, Qwen2 has D / Hq
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    @property
    def bias(self) -> bool:
        """Qwen2 adds a bias to q, k and v."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises every query and key head."""
        return self.model_type == "qwen3"

    @property
    def num_parameters(self) -> int:
        """How many numbers the checkpoint holds, known before any tensor is made."""
        width, size = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * size, self.num_key_value_heads * size
        attention = 2 * width * (q + kv) + self.bias * (q + 2 * kv)
        norms = 2 * width + self.qk_norm * 2 * size
        block = attention + 3 * width * self.intermediate_size + norms
        ends = (1 if self.tie_word_embeddings else 2) * self.vocab_size * width + width
        return self.num_hidden_layers * block + ends


# ---------------------------------------------------------------------------- layers


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, all but the last product in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        # A bf16 square has 8 bits: too few for a mean over thousands of them.
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """cos and sin of the rotary angles (B, 1, T, Dh) for positions (B, T).

    RoFormer (arXiv 2104.09864): pair i of a head turns by position · theta^(-2i/Dh).
    Qwen pairs element i with element i + Dh/2, not with its neighbour.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device)
    inv_freq = config.rope_theta ** (-pairs.float() / config.head_dim)  # (Dh/2,)
    angles = positions[:, None, :, None].float() * inv_freq  # (B, 1, T, Dh/2)
    angles = torch.cat([angles, angles], -1)  # (B, 1, T, Dh)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads x (B, H, T, Dh) by the angles of `rotary`."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    """Grouped-query attention: Hq / Hkv query heads share one key and value head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        size, width = config.head_dim, config.hidden_size
        self.head_dim = size
        self.q_proj = Linear(width, heads * size, bias=config.bias)
        self.k_proj = Linear(width, kv_heads * size, bias=config.bias)
        self.v_proj = Linear(width, kv_heads * size, bias=config.bias)
        self.o_proj = Linear(heads * size, width, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.rms_norm_eps)
            self.k_norm = RMSNorm(size, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x: Tensor, cos_sin: tuple, layer: int, cache: "Cache") -> Tensor:
        """x (B, T, D) → (B, T, D), attending to the cache and, causally, to itself.

        Args:
            cos_sin: from `rotary`, each (B, 1, T, Dh).
        """
        split = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (proj(x).view(split) for proj in
                   (self.q_proj, self.k_proj, self.v_proj))  # (B, T, H, Dh)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (h.transpose(1, 2) for h in (q, k, v))  # (B, H, T, Dh)
        q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        k, v = cache.extend(layer, k, v)  # (B, Hkv, S + T, Dh)
        # softmax(q kᵀ / sqrt(Dh) + mask) v; query head h reads key head h // (Hq / Hkv)
        if cache.mask is not None and q.is_cuda:
            out = masked_attention(q, k, v, cache.mask)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=cache.mask, is_causal=cache.is_causal,
                enable_gqa=True,
            )  # (B, Hq, T, Dh)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (B, Hq, T, Dh) by a CUDA kernel that knows masks, but no groups.

    The one that knows groups knows no masks, and without either all scores would be
    written out. So the heads of a group become further queries of their key head.

    Args:
        q: (B, Hq, T, Dh).
        k, v: (B, Hkv, S + T, Dh).
        mask: (B or 1, 1, T, S + T) bool, True where a query may look.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    folded = q.reshape(len(q), kv_heads, -1, q.shape[3])  # (B, Hkv, Hq / Hkv · T, Dh)
    mask = mask.repeat(1, 1, heads // kv_heads, 1)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(width, inner, bias=False)
        self.up_proj = Linear(width, inner, bias=False)
        self.down_proj = Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos_sin: tuple, layer: int, cache: "Cache") -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, layer, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ----------------------------------------------------------------------------- cache


class Cache:
    """Keys and values of a prefix, which later rows attend to and never change.

    One class serves every use. `prefill` fills it with P prompts, each computed among
    those of its own length, and padded on the left (`place`).
    In training and scoring P is 1, and any number of rows reads it (`extend` expands).
    For decoding, `for_decoding` repeats each prompt G times and adds room for C tokens,
    which `extend` then fills in place.

    Attributes:
        keys, values: one tensor a layer, (P, Hkv, S, Dh); (B, Hkv, S + C, Dh) when
            decoding.
        padding: (P,) or (B,) how many of the S places at the left are empty.
        padded: is any? Asking the device in every pass would make the host wait.
        length: S, places in use.
        mask: (B, 1, T, S + T) bool or None, set by `prepare` for one forward pass.
    """

    def __init__(self, layers: int, padding: Tensor | None = None,
                 padded: bool = False) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.padding, self.padded = padding, padded
        self.length = 0
        self.store = False  # does `extend` keep what it is given?
        self.in_place = False  # into room that was set aside?
        self.mask: Tensor | None = None
        self.is_causal = False

    def prepare(self, tokens: Tensor) -> Tensor:
        """Set the mask for a pass over tokens (B, T); return their positions (B, T)."""
        rows, new = tokens.shape
        places = torch.arange(self.length, self.length + new, device=tokens.device)
        padding, padded = self.padding, self.padded
        # Without a mask, attention may use its fastest kernel. A single new token sees
        # all places; with no prefix the usual triangle is enough.
        self.mask, self.is_causal = None, new > 1 and not self.length and not padded
        if padded or (new > 1 and self.length):
            seen = torch.arange(self.length + new, device=tokens.device)
            self.mask = (seen <= places[:, None])[None, None]  # (1, 1, T, S + T)
            if padded:
                real = (seen >= padding[:, None])[:, None, None]  # (P, 1, 1, S + T)
                # A padding place sees only itself; with nothing to see at all,
                # softmax would give NaN.
                self.mask = self.mask & real | (seen == places[:, None])
        if padding is None:
            return places.expand(rows, new)
        return (places - padding[:, None]).clamp(min=0).expand(rows, new)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Join the prefix with new keys and values (B, Hkv, T, Dh)."""
        if self.in_place:
            end = self.length + k.shape[2]
            self.keys[layer][:, :, self.length:end] = k
            self.values[layer][:, :, self.length:end] = v
            return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        if self.length:
            size = (k.shape[0], -1, -1, -1)
            k = torch.cat([self.keys[layer].expand(size), k], 2)
            v = torch.cat([self.values[layer].expand(size), v], 2)
        if self.store:
            self.keys[layer], self.values[layer] = k, v
        return k, v

    def place(self, rows: list[int], alike: "Cache") -> None:
        """Move keys and values of some prompts into their rows, flush right."""
        index = torch.tensor(rows, device=self.padding.device)
        for own, given in ((self.keys, alike.keys), (self.values, alike.values)):
            for layer, kv in enumerate(given):  # (rows, Hkv, their length, Dh)
                if own[layer] is None:
                    size = (len(self.padding), kv.shape[1], self.length, kv.shape[3])
                    own[layer] = kv.new_zeros(size)
                own[layer][index, :, self.length - kv.shape[2]:] = kv
                given[layer] = None  # one at a time: less memory

    def for_decoding(self, group_size: int, room: int) -> "Cache":
        """A cache of B = P·G rows with `room` free places behind the prompts."""
        decoding = Cache(len(self.keys), self.padding.repeat_interleave(group_size),
                         self.padded)
        decoding.length, decoding.in_place = self.length, True

        def grown(kv: Tensor) -> Tensor:  # (P, Hkv, S, Dh) → (B, Hkv, S + room, Dh)
            return F.pad(kv.repeat_interleave(group_size, 0), (0, 0, 0, room))

        decoding.keys = [grown(k) for k in self.keys]
        decoding.values = [grown(v) for v in self.values]
        return decoding

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these; finished responses cost nothing."""
        for tensors in (self.keys, self.values):
            for layer, tensor in enumerate(tensors):  # one at a time: less memory
                tensors[layer] = tensor[rows]
        self.padding = self.padding[rows]
        self.padded = self.padded and bool(self.padding.any())

    def detached(self) -> "Cache":
        """The same prefix as leaves: micro-batches add their gradients to `.grad`."""
        leaf = Cache(len(self.keys), self.padding, self.padded)
        leaf.length = self.length
        leaf.keys = [k.detach().requires_grad_() for k in self.keys]
        leaf.values = [v.detach().requires_grad_() for v in self.values]
        return leaf


# ----------------------------------------------------------------------------- model


class Qwen(nn.Module):
    """A decoder whose parameters have the names of the Hub's checkpoints."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()  # gives the names their prefix "model."
        # `nn.Embedding(V, D)` would draw random weights, for which, on the meta device,
        # PyTorch imports its compiler: a second at every start.
        self.model.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False)
        self.model.layers = nn.ModuleList(
            Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def unembed(self) -> Tensor:
        """The output matrix (V, D): the embedding itself where the head is tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.embed_tokens.weight.device

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states (B, T, D), after the last norm, of tokens (B, T).

        Args:
            tokens: padded on the right, if at all; what stands there is never seen.
            cache: a prefix of one prompt (shared by all rows), or of B prompts; if it
                has fewer layers than the model, the pass ends after these and the norm.
        """
        cache = cache or Cache(self.config.num_hidden_layers)
        positions = cache.prepare(tokens)  # (B, T)
        x = self.model.embed_tokens(tokens)  # (B, T, D)
        cos_sin = rotary(positions, self.config, x.dtype)
        for index, block in enumerate(self.model.layers[:len(cache.keys)]):
            x = block(x, cos_sin, index, cache)
        if cache.store or cache.in_place:
            cache.length += tokens.shape[1]
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, T, D) → (B, T, V). Mind the size: training uses `logprob.py`."""
        return linear(hidden, self.unembed)

    def prefill(self, prompts: list[list[int]], depth: int | None = None) -> Cache:
        """Keys and values of prompts of any length, padded on the left to S.

        Args:
            depth: only of so many layers, counted from below.
        """
        longest = max(map(len, prompts))
        padding = [longest - len(p) for p in prompts]
        cache = Cache(depth or self.config.num_hidden_layers,
                      torch.tensor(padding, device=self.device), any(padding))
        cache.length = longest
        # Prompts of one length need no mask; one for padding would hold S² places for
        # each prompt: gigabytes for two prompts of 12,000 tokens.
        alike: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if prompt:
                alike.setdefault(len(prompt), []).append(row)
        for rows in alike.values():
            same = Cache(len(cache.keys))
            same.store = True
            self(torch.tensor([prompts[row] for row in rows], device=self.device), same)
            if len(rows) == len(prompts):
                cache.keys, cache.values = same.keys, same.values
            else:
                cache.place(rows, same)
        return cache

    @contextlib.contextmanager
    def shared_prefix(self, prompt: list[int],
                      depth: int | None = None) -> Iterator[Cache]:
        """Compute prompt[:-1] once for every row and micro-batch of its group.

        Rows start with the prompt's last token, so that each response's first logit
        comes from its own row. When gradients flow, the caller runs `backward` on each
        micro-batch, which frees its graph; the prefix's graph must outlive them all. So
        the rows attend to a detached copy of its keys and values, where their gradients
        add up, and one backward pass through the prefix follows on leaving the block. A
        `backward` after the block would lose the prompt's gradient: it is refused.
        The sum is the gradient of the repeated prompt: d loss/dθ = ∂ loss/∂θ at fixed
        keys and values + (∂ loss/∂KV) (∂KV/∂θ).
        """
        prefix = self.prefill([prompt[:-1]], depth)
        if not torch.is_grad_enabled() or not prefix.length or not any(
                k.requires_grad for k in prefix.keys):
            yield prefix
            return
        leaf = prefix.detached()
        yield leaf
        pairs = [(out, point.grad)
                 for out, point in zip(prefix.keys + prefix.values,
                                       leaf.keys + leaf.values, strict=True)
                 if point.grad is not None and out.requires_grad]
        if not pairs:
            raise RuntimeError("no gradient has reached the shared prefix: run "
                               "backward inside the block, or use torch.no_grad()")
        torch.autograd.backward(*zip(*pairs, strict=True))


def pad_rows(rows: list[list[int]], device: torch.device) -> Tensor:
    """Token ids, padded on the right with 0 → (B, T). Masks come from lengths."""
    longest = max(map(len, rows))
    return torch.tensor([r + [0] * (longest - len(r)) for r in rows], device=device)


# Tokens that one forward and backward pass holds at most; more rows go into another.
TOKENS_PER_PASS = 8192
# A pass reads all weights once, however few its tokens: at 0.5B on two cores that takes
# as long as the products of about so many tokens.
PASS_COST = 32


def micro_batches(lengths: list[int]) -> list[list[int]]:
    """Row numbers, sorted by length and cut where that costs least.

    Every row costs as much as the longest of its batch: mixed lengths waste work on
    padding. More batches waste less, but each has the price of a pass. The cheapest
    cuts of the first n rows extend the cheapest of fewer (dynamic programming).
    """
    # cost(n) = min over cuts c < n of cost(c) + (n − c) · length_n + PASS_COST
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cost = np.zeros(len(order) + 1, dtype=np.int64)  # of the first n rows
    last_cut = np.zeros_like(cost)
    for end, row in enumerate(order, 1):
        most = max(1, TOKENS_PER_PASS // max(1, lengths[row]))  # rows of this length
        cuts = np.arange(max(0, end - most), end)
        costs = cost[cuts] + (end - cuts) * lengths[row] + PASS_COST
        cheapest = int(costs.argmin())
        cost[end], last_cut[end] = costs[cheapest], cuts[cheapest]
    batches, end = [], len(order)
    while end:
        batches.append(order[last_cut[end]:end])
        end = int(last_cut[end])
    return batches[::-1]
