"""Qwen from its own files: config.json, *.safetensors, tokenizer.json → hidden states.

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
  cannot look, and prompts on the left, where a mask hides them.

Shapes: P prompts, G responses of C tokens each, B rows, T tokens, S tokens of the
prefix, D width, Hq query heads, Hkv key and value heads, Dh head size, V vocabulary.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
import jinja2.sandbox
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from run import UserError, available_memory, read_json, require, verify_checksums

TINY = Path(__file__).resolve().parent / "data" / "tiny"
SIZES = {"tiny": str(TINY)} | {
    size: f"Qwen/Qwen2.5-{size.upper()}-Instruct"
    for size in ("0.5b", "1.5b", "3b", "7b", "14b")
}
# The shapes of these, so that a run can be planned before anything is downloaded:
# D, the MLP's width, layers, Hq, Hkv, V, and whether the head is tied.
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
}


def is_tiny(source: str | Path) -> bool:
    """Is this the bundled checkpoint, whose world has data and a rubric of its own?"""
    return Path(source).resolve() == TINY


def short_name(source: str | Path) -> str:
    """What a run on this checkpoint is called: the last part of its name."""
    source = Path(source)
    return (source.resolve() if source.is_dir() else source).name


def pick_device(name: str | None) -> str:
    """The device that was asked for; by default a GPU if there is one."""
    known = {"cpu"} | ({"cuda"} if torch.cuda.is_available() else set())
    require(name is None or name in known, f"--device {name}: there is no such device; "
            f"this machine has {' and '.join(sorted(known))}")
    return name or ("cuda" if "cuda" in known else "cpu")


def base_name(source: str | Path) -> str:
    """What an adapter calls its base: nobody's home folder gets into the tiny one's."""
    return "data/tiny" if is_tiny(source) else str(source)


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


def read_config(path: Path) -> Config:
    """Read and check `config.json`.

    Raises:
        UserError: not a dense Qwen2, Qwen2.5 or Qwen3, or sizes that do not fit.
    """
    raw = read_json(path)
    kind = raw.get("model_type")
    require(kind in ("qwen2", "qwen3"), f"{path}: model_type is {kind!r}; only dense "
            "qwen2 (Qwen2, Qwen2.5) and qwen3 checkpoints can be read")
    # Newer files keep the rotary base inside `rope_parameters`.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    require(isinstance(rope, dict), f"{path}: rope_parameters must be an object")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    require(scaling == "default", f"{path}: rotary scaling {scaling!r} is not "
            "supported; remove rope_scaling to use the native context length")
    kinds = raw.get("layer_types") or []
    full = isinstance(kinds, list) and all(k == "full_attention" for k in kinds)
    require(full and not raw.get("use_sliding_window"),
            f"{path}: sliding-window attention is not supported")
    require(raw.get("hidden_act", "silu") == "silu",
            f"{path}: hidden_act is {raw.get('hidden_act')!r}, expected 'silu'")
    values = {"rope_theta": rope.get("rope_theta", 10000.0), "head_dim": None,
              "tie_word_embeddings": False, "rms_norm_eps": 1e-6} | raw
    if values["head_dim"] is None:
        values["head_dim"] = _quotient(raw, "hidden_size", "num_attention_heads", path)
    for field in dataclasses.fields(Config):
        value = values.get(field.name)
        # `type` and not `isinstance`: True is no number of layers.
        good = type(value) is field.type or (field.type is float and type(value) is int)
        positive = field.type not in (int, float) or (good and 0 < value < 1e300)
        require(good and positive, f"{path}: {field.name} is {value!r:.99}, expected "
                f"a {'positive ' if field.type is not bool else ''}"
                f"{field.type.__name__}")
    config = Config(**{f.name: f.type(values[f.name])
                       for f in dataclasses.fields(Config)})
    _quotient(raw, "num_attention_heads", "num_key_value_heads", path)
    require(config.head_dim % 2 == 0, f"{path}: head_dim must be even")
    return config


def known_config(source: str | Path) -> Config:
    """The sizes of a checkpoint, from its folder or `SHAPES`; no weight is read."""
    if Path(source).is_dir():
        return read_config(Path(source) / "config.json")
    size = next((s for s, name in SIZES.items() if name == str(source)), None)
    require(size is not None, f"no such checkpoint folder: {source}; known without one "
            f"are {', '.join(SHAPES)}")
    width, inner, layers, heads, shared, vocabulary, tied = SHAPES[size]
    return Config("qwen2", vocabulary, width, inner, layers, heads, shared,
                  width // heads, 32768, 1e-6, 1e6, tied)


def _quotient(raw: dict, over: str, under: str, path: Path) -> int:
    a, b = raw.get(over), raw.get(under)
    good = isinstance(a, int) and isinstance(b, int) and b > 0 and a % b == 0
    require(good, f"{path}: {over} ({a}) must be a multiple of {under} ({b})")
    return a // b


# ---------------------------------------------------------------------------- layers


# Smaller weights gain less, and lose where there is a single row.
LARGE = 3 << 18
HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + b: x (..., in), weight (out, in), bias (out,) → (..., out).

    On x86, PyTorch brings two libraries for products, and `F.linear` asks MKL in fp32.
    For large frozen weights oneDNN was faster where it was measured (two cores of an
    AMD EPYC): 2 to 3 times at the 1 to 32 rows of a decoding step, less at hundreds.
    """
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            and weight.numel() >= LARGE and not trained and HAS_BOTH):
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


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, all but the last product in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        # A bf16 square has 8 bits: too few for a mean over thousands of them.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


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
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=cache.mask, is_causal=cache.is_causal,
            enable_gqa=True,
        )  # (B, Hq, T, Dh)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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

    One class serves every use. `prefill` fills it with P prompts, padded on the left.
    In training and scoring P is 1, and any number of rows reads it (`extend` expands).
    For decoding, `for_decoding` repeats each prompt G times and adds room for C tokens,
    which `extend` then fills in place.

    Attributes:
        keys, values: one tensor a layer, (P, Hkv, S, Dh); (B, Hkv, S + C, Dh) when
            decoding.
        padding: (P,) or (B,) how many of the S places at the left are empty.
        length: S, places in use.
        mask: (B, 1, T, S + T) bool or None, set by `prepare` for one forward pass.
    """

    def __init__(self, layers: int, padding: Tensor | None = None) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.padding = padding
        self.length = 0
        self.store = False  # does `extend` keep what it is given?
        self.in_place = False  # into room that was set aside?
        self.mask: Tensor | None = None
        self.is_causal = False

    def prepare(self, tokens: Tensor) -> Tensor:
        """Set the mask for a pass over tokens (B, T); return their positions (B, T)."""
        rows, new = tokens.shape
        places = torch.arange(self.length, self.length + new, device=tokens.device)
        padding = self.padding
        padded = padding is not None and bool(padding.any())
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

    def for_decoding(self, group_size: int, room: int) -> "Cache":
        """A cache of B = P·G rows with `room` free places behind the prompts."""
        decoding = Cache(len(self.keys), self.padding.repeat_interleave(group_size))
        decoding.length, decoding.in_place = self.length, True

        def grown(part: Tensor) -> Tensor:  # (P, Hkv, S, Dh) → (B, Hkv, S + room, Dh)
            return F.pad(part.repeat_interleave(group_size, 0), (0, 0, 0, room))

        decoding.keys = [grown(k) for k in self.keys]
        decoding.values = [grown(v) for v in self.values]
        return decoding

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these; finished responses cost nothing."""
        for parts in (self.keys, self.values):
            for layer, part in enumerate(parts):  # one at a time: less memory at once
                parts[layer] = part[rows]
        self.padding = self.padding[rows]

    def detached(self) -> "Cache":
        """The same prefix as leaves: micro-batches add their gradients to `.grad`."""
        leaf = Cache(len(self.keys), self.padding)
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
        rows = [[0] * n + p for n, p in zip(padding, prompts, strict=True)]
        cache = Cache(depth or self.config.num_hidden_layers,
                      torch.tensor(padding, device=self.device))
        cache.store = True
        if longest:
            self(torch.tensor(rows, device=self.device), cache)
        cache.store = False
        return cache

    @contextlib.contextmanager
    def shared_prefix(self, prompt: list[int],
                      depth: int | None = None) -> Iterator[Cache]:
        """Compute prompt[:-1] once for every row and micro-batch of its group.

        Rows start with the prompt's last token, so that each response's first logit
        comes from its own row. When gradients flow, the caller runs `backward` on each
        micro-batch, which frees its graph; the prefix's graph must outlive them all. So
        the rows attend to a detached copy of its keys and values, where their gradients
        add up, and one backward pass through the prefix follows on leaving the block.
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
        if pairs:
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
    best: list[tuple[int, int]] = [(0, 0)]  # for the first n rows: cost, last cut
    for end, row in enumerate(order, 1):
        best.append(min(
            (best[cut][0] + (end - cut) * lengths[row] + PASS_COST, cut)
            for cut in range(end)
            if end - cut == 1 or (end - cut) * lengths[row] <= TOKENS_PER_PASS))
    parts, end = [], len(order)
    while end:
        cut = best[end][1]
        parts.append(order[cut:end])
        end = cut
    return parts[::-1]


def fingerprint(model: Qwen) -> str:
    """A SHA-256 that tells base models apart, whatever type they were loaded in.

    Names, shapes and up to 256 evenly spaced values of every base weight, rounded to
    bf16. Reading all of a 14B model would take longer than loading it, and any training
    of the base moves all of its tensors.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(base_parameters(model).items()):
        step = max(1, weight.numel() // 256)
        values = weight.detach().flatten()[::step][:256].to(torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def base_parameters(model: Qwen) -> dict[str, Tensor]:
    """The base weights under their Hub names, whether adapters are attached or not."""
    return {name.replace(".base.", "."): weight
            for name, weight in model.named_parameters() if ".lora_" not in name}


# ------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """Text ↔ ids, and ChatML by the checkpoint's own template.

    Attributes:
        stop_ids: every id that ends a response.
        control: control token → id.
        valid: V' ≤ V, how many ids the tokenizer has; Qwen pads its vocabulary, and
            sampler and loss both cut the rows beyond off the head.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            # With these the library panics, or encodes at random.
            odd = [key for key in ("continuing_subword_prefix", "dropout")
                   if raw["model"].get(key)]
            if odd:
                raise ValueError(f"{odd[0]} is set; a plain byte-level BPE has none")
            self.control = {t["content"]: t["id"] for t in raw["added_tokens"]}
            self._whole = tokenizers.Tokenizer.from_file(str(path))
            # Training scripts leave these behind; a prompt must not be cut in silence.
            self._whole.no_truncation()
            self._whole.no_padding()
            # A second tokenizer that has never heard of control tokens: whatever a
            # person types, it can only produce ordinary text.
            self._plain = tokenizers.Tokenizer(self._whole.model)
            self._plain.normalizer = self._whole.normalizer
            self._plain.pre_tokenizer = self._whole.pre_tokenizer
        except BaseException as error:
            # The library raises bare Exception, and panics with a class of its own.
            if not isinstance(error, Exception) and "Panic" not in type(error).__name__:
                raise
            raise UserError(f"cannot read {path}: {error}; it must be a complete "
                            "tokenizer.json of a Qwen checkpoint") from error
        ids = self._whole.get_vocab(with_added_tokens=True)
        self.valid = max(ids.values(), default=-1) + 1
        # The library gives control tokens behind a gap other ids than the file does.
        renumbered = any(ids.get(token) != i for token, i in self.control.items())
        require(len(set(ids.values())) == self.valid > 0 and not renumbered,
                f"{path}: ids are not 0 to {self.valid - 1} without gaps")
        pieces = sorted(map(re.escape, self.control), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(pieces) + ")") if pieces else None
        self.template = self._read_template(folder)
        self.stop_ids = self._read_stops(folder)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens mean nothing."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens left out."""
        return self._whole.decode(ids, skip_special_tokens=True)

    def chat(self, prompt: str, system: str | None = None) -> list[int]:
        """Ids of one user turn and the opening of the answer.

        The template is rendered with place-holders, cut at the control tokens that are
        the template's own, and only then filled with the person's text: `<|im_start|>`
        typed by a person stays ordinary text.

        Raises:
            UserError: the prompt is empty or not UTF-8, or the template is no chat's.
        """
        require(bool(prompt.strip()), "the prompt is empty; write a question")
        for text in (prompt, system or ""):
            require(not any("\ud800" <= c <= "\udfff" for c in text), "the text is not "
                    "UTF-8: it holds bytes that are no letters")
        texts = {"\ue000user\ue001": prompt}
        messages = [{"role": "user", "content": "\ue000user\ue001"}]
        if system is not None:
            texts["\ue000system\ue001"] = system
            messages.insert(0, {"role": "system", "content": "\ue000system\ue001"})
        try:
            # Qwen3 would think aloud first, and a short answer would be all thought.
            rendered = self.template.render(
                messages=messages, add_generation_prompt=True, tools=None,
                enable_thinking=False)
        except Exception as error:  # a stranger's program may raise anything
            raise UserError(f"the checkpoint's chat template fails: {error}") from error
        require(all(mark in rendered for mark in texts),
                "the checkpoint's chat template drops what the person said")
        ids, pattern = [], re.compile("|".join(texts))
        for piece in self._split.split(rendered) if self._split else [rendered]:
            if piece in self.control:
                ids.append(self.control[piece])
            elif piece:
                ids += self.encode(pattern.sub(lambda m: texts[m[0]], piece))
        require(len(ids) > 1, "the checkpoint's chat template adds nothing to the "
                "prompt; use an Instruct checkpoint")
        return ids

    def _read_template(self, folder: Path) -> jinja2.Template:
        source = read_json(folder / "tokenizer_config.json").get("chat_template")
        separate = folder / "chat_template.jinja"  # where newer tools put it
        if source is None and separate.is_file():
            source = separate.read_text(encoding="utf-8", errors="replace")
        require(isinstance(source, str), f"{folder}/tokenizer_config.json has no "
                "chat_template; use an Instruct checkpoint")
        # The template is a stranger's program: the sandbox keeps it from doing more
        # than rendering text.
        room = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True)
        room.policies["json.dumps_kwargs"] = {"ensure_ascii": False}
        try:
            return room.from_string(source)
        except Exception as error:  # RecursionError, when brackets nest deeply
            raise UserError(f"{folder}: broken chat template: {error}") from error

    def _read_stops(self, folder: Path) -> list[int]:
        stops: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            if (folder / name).is_file():
                found = read_json(folder / name).get("eos_token_id")
                found = found if isinstance(found, list) else [found]
                stops |= {stop for stop in found if type(stop) is int}
        # Instruct models end a turn with <|im_end|>, and a document with <|endoftext|>.
        stops |= {self.control.get("<|im_end|>"), self.control.get("<|endoftext|>")}
        stops = {s for s in stops if isinstance(s, int) and 0 <= s < self.valid}
        require(bool(stops), f"{folder} names no end token")
        return sorted(stops)


# --------------------------------------------------------------------------- loading


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Qwen, Tokenizer]:
    """Load a checkpoint: a folder as the Hub lays it out, or a name on the Hub.

    The model is built without memory (meta device) and filled tensor by tensor, so that
    loading never holds more than the weights in their final type plus one shard.

    Args:
        source: a folder, or a name such as "Qwen/Qwen2.5-0.5B-Instruct".
        device: where the weights go.
        dtype: their type; by default fp32 on a CPU and bf16 on a GPU.

    Returns:
        The model, frozen and in eval mode, and its tokenizer.

    Raises:
        UserError: anything missing, broken, altered, foreign or too large.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = find_folder(source)
    verify_checksums(folder)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer(folder)
    require(tokenizer.valid <= config.vocab_size, f"{folder}: the tokenizer has "
            f"{tokenizer.valid} ids, the model only {config.vocab_size}")
    shards = find_shards(folder)
    check_memory(config, device, dtype, folder)
    with torch.device("meta"):
        model = Qwen(config)
    fill(model, shards, device, dtype)
    return model.requires_grad_(False).eval(), tokenizer


def find_folder(source: str | Path) -> Path:
    """The folder of a checkpoint; a Hub name goes through the Hub's own cache."""
    if Path(source).is_dir():
        return Path(source)
    name = str(source)
    on_the_hub = name in SIZES.values() or not Path(name).parent.is_dir()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or not on_the_hub:
        raise UserError(f"no such checkpoint folder: {name}")
    import huggingface_hub  # only here: importing it takes longer than a tiny run loads

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # offline, unknown name, no permission, disk full …
        raise UserError(
            f"cannot get {name} from the Hugging Face Hub and it is not in the cache "
            f"({type(error).__name__}); download its *.json, *.jinja and *.safetensors "
            "files on a machine with access and pass their folder with --model DIR"
        ) from error


def find_shards(folder: Path) -> dict[str, Path]:
    """Tensor name → file that holds it."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        require(isinstance(names, dict) and all(
            isinstance(f, str) and Path(f).name == f and len(f) < 256
            and f.isprintable() for f in names.values()),
            f"{index}: weight_map must map tensor names to files of the same folder")
        missing = {f for f in names.values() if not (folder / f).is_file()}
        require(not missing, f"{index} names files that are not there: "
                f"{', '.join(sorted(missing))}")
        return {name: folder / file for name, file in names.items()}
    require(single.is_file(), f"{folder} has neither model.safetensors nor "
            "model.safetensors.index.json")
    with open_shard(single) as shard:
        return dict.fromkeys(shard.keys(), single)


def open_shard(path: Path):
    """`safetensors.safe_open` with one clear line for a broken file."""
    try:
        return safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); "
                        "download it again") from error


def check_memory(config: Config, device: torch.device, dtype: torch.dtype,
                 folder: Path) -> None:
    """Refuse, before anything is read or built, weights that cannot fit."""
    need = config.num_parameters * dtype.itemsize
    free = (torch.cuda.mem_get_info(device)[0] if device.type == "cuda"
            else available_memory())
    require(need < free, f"{folder} needs {need / 1e9:.1f} GB for its weights in "
            f"{str(dtype).removeprefix('torch.')}, but {device} has {free / 1e9:.1f} "
            "GB free; use a smaller size, bfloat16 or a larger machine")


def all_finite(weight: Tensor) -> bool:
    """No infinity and no NaN: `aminmax` lets both through."""
    return not weight.numel() or all(math.isfinite(end) for end in weight.aminmax())


def fill(model: Qwen, shards: dict[str, Path], device: torch.device,
         dtype: torch.dtype) -> None:
    """Put every tensor of the shards into its place; names and shapes must match."""
    expected = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        shards = {n: f for n, f in shards.items() if n != "lm_head.weight"}
    folder = next(iter(shards.values())).parent if shards else "the checkpoint"
    for word, names in (("lacks", expected.keys() - shards.keys()),
                        ("has unknown", shards.keys() - expected.keys())):
        require(not names, f"{folder} {word} {len(names)} tensor(s), such as "
                f"{min(names, default='')}")
    for path in sorted(set(shards.values())):
        with open_shard(path) as shard:
            held = set(shard.keys())
            for name in sorted(n for n, f in shards.items() if f == path):
                require(name in held, f"{path} lacks {name}, which the index lists")
                want, have = expected[name].shape, shard.get_slice(name).get_shape()
                require(list(want) == have, f"{path}: {name} has shape {have}, "
                        f"config.json asks for {list(want)}")
                weight = shard.get_tensor(name)
                # The copy unties the weight from the memory-mapped file.
                weight = weight.to(device, dtype, copy=True)
                require(all_finite(weight), f"{path}: {name} holds values that are "
                        f"not finite in {str(dtype).removeprefix('torch.')}")
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, False))
