"""LoRA, by hand: several named adapters over one frozen base.

[L1]   y = W x + (α / r) · B A x        W (out, in) frozen, A (r, in), B (out, r)

(Hu et al., arXiv 2106.09685.) A starts random and B at zero: at step 0 the product BA
vanishes, and the policy *is* the base model. Only A and B are trained.

One base, several roles: `with using(model, "policy"):` makes it the policy, `"reward"`
the reward model, and `None` the bare base, which is GRPO's reference (`--judge` and
PPO's critic add theirs). No second copy of the weights exists, and they are never
changed: merging (bf16 would drift) is an explicit call, `merged`, whose result goes
into a new checkpoint.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import adapters
from adapters import PROJECTIONS
from loading import base_parameters, fingerprint
from model import Qwen
from plumbing.files import require, write_checksums, write_json, write_whole

# What an adapter's folder holds, beside its checksums.
FILES = (adapters.CONFIG, adapters.TENSORS)


class ActiveAdapter:
    """Which adapter counts now; all layers of a model look at the same object."""

    def __init__(self) -> None:
        self.name: str | None = None


class LoRALinear(nn.Module):
    """A frozen linear layer and its adapters, of which at most one is active."""

    def __init__(self, base: nn.Linear, active: ActiveAdapter) -> None:
        super().__init__()
        self.base = base
        self.active = active
        self.lora_A = nn.ParameterDict()  # name → (r, in)
        self.lora_B = nn.ParameterDict()  # name → (out, r)
        self.scale: dict[str, float] = {}

    def add(self, name: str, a: Tensor, b: Tensor, scale: float) -> None:
        """Hold copies of A (r, in) and B (out, r), in fp32 whatever their type."""
        # Adapters stay in fp32 whatever the base's type, too: an update of 1e-5 is lost
        # in the 8 bits of a bf16 weight. float64 bases exist only in tests, whose
        # tolerances fp32 adapters would spoil.
        dtype = torch.promote_types(torch.float32, self.base.weight.dtype)
        for held, weight in ((self.lora_A, a), (self.lora_B, b)):
            held[name] = nn.Parameter(weight.to(self.base.weight.device, dtype,
                                                copy=True).contiguous())
        self.scale[name] = scale

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        y = self.base(x)
        name = self.active.name
        if name not in self.scale:
            return y
        # [L1] y = W x + (α / r) · B A x
        a, b = self.lora_A[name], self.lora_B[name]
        change = (x.to(a.dtype) @ a.T * self.scale[name]) @ b.T
        return y + change.to(y.dtype)


def attach(model: Qwen, name: str, rank: int, alpha: float, seed: int = 0,
           depth: int | None = None) -> None:
    """Add an adapter called `name` to all seven projections of every block.

    Args:
        rank: r, the width of the bottleneck.
        alpha: α; the change is scaled by α / r. `grpo.py` sets α = 2r, as is common.
        seed: of A, which starts uniform in ±1/sqrt(in) (PEFT's default).
        depth: only in so many blocks, counted from below.

    Raises:
        UserError: rank < 1, or an adapter of that name is there already.
    """
    widest = model.config.hidden_size  # a side of every projection: no higher rank
    require(1 <= rank <= widest, f"the LoRA rank is {rank}; it must be 1 to {widest}")
    _make_room(model, name)
    depth = depth or model.config.num_hidden_layers
    size = model.adapters[name] = adapters.Size(rank, alpha)
    generator = torch.Generator().manual_seed(seed)
    for path, layer in layers(model.model.layers[:depth]).items():
        out, width = layer.base.weight.shape
        bound = 1 / math.sqrt(width)
        a = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        layer.add(name, a, torch.zeros(out, rank), size.scale_of(path))


def _make_room(model: Qwen, name: str) -> None:
    """Wrap the seven projections of every block, once; `name` must be free."""
    if not hasattr(model, "active"):
        model.active = ActiveAdapter()
        model.adapters = {}
        for block in model.model.layers:
            for owner in (block.self_attn, block.mlp):
                for projection, layer in list(owner.named_children()):
                    if projection in PROJECTIONS:
                        setattr(owner, projection, LoRALinear(layer, model.active))
    require(name not in model.adapters, f"there is an adapter {name!r} already")


def detach(model: Qwen, name: str) -> None:
    """Remove an adapter."""
    del model.adapters[name]
    for layer in layers(model, name).values():
        del layer.lora_A[name], layer.lora_B[name], layer.scale[name]


@contextlib.contextmanager
def using(model: Qwen, name: str | None) -> Iterator[None]:
    """Make adapter `name` active (None: the bare base) until the block ends.

    Raises:
        UserError: there is no such adapter.
    """
    known = getattr(model, "adapters", {})
    require(name is None or name in known, f"no adapter {name!r}; there are "
            f"{sorted(known) or 'none'}")
    if not known:
        yield
        return
    before, model.active.name = model.active.name, name
    try:
        yield
    finally:
        model.active.name = before


def layers(model: nn.Module, name: str | None = None) -> dict[str, LoRALinear]:
    """Path in the model → its LoRA layer, in order; with a name, those that hold it."""
    return {path: layer for path, layer in model.named_modules()
            if isinstance(layer, LoRALinear) and (name is None or name in layer.scale)}


def parameters(model: Qwen, name: str) -> list[nn.Parameter]:
    """The trainable tensors of an adapter, A and B of each layer in turn."""
    return [p for layer in layers(model, name).values()
            for p in (layer.lora_A[name], layer.lora_B[name])]


# -------------------------------------------------------------------- files (PEFT's)


def save(model: Qwen, name: str, folder: Path, base: str) -> None:
    """Write an adapter as PEFT lays it out, so that the usual tools load it.

    Args:
        base: the base's folder or Hub name, for people and for PEFT.

    The base's fingerprint rides in the safetensors metadata, where PEFT does not look;
    SHA256SUMS covers both files.
    """
    tensors, held = {}, layers(model, name)
    for path, layer in held.items():
        for factor in ("lora_A", "lora_B"):
            weight = getattr(layer, factor)[name].detach().cpu().contiguous()
            tensors[f"base_model.model.{path}.{factor}.weight"] = weight
    size = model.adapters[name]
    targets, blocks = _name_targets(list(held))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": base, "r": size.rank,
        "lora_alpha": size.alpha, "target_modules": targets,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": size.use_rslora, "use_dora": False,
    }
    for key in ("rank_pattern", "alpha_pattern"):
        if getattr(size, key):
            config[key] = getattr(size, key)
    if blocks and len(blocks) < model.config.num_hidden_layers:
        config["layers_to_transform"] = blocks
    # One entry only: safetensors writes several in random order, and the same adapter
    # should be the same bytes.
    metadata = {"base_fingerprint": fingerprint(model)}
    write_whole(folder / adapters.TENSORS, safetensors.torch.save(tensors, metadata))
    write_json(folder / adapters.CONFIG, config)
    write_checksums(folder, FILES)


def _name_targets(paths: list[str]) -> tuple[list[str], list[int]]:
    """PEFT's words for these layers: names, and in which blocks; or whole paths."""
    places = [(int(path.split(".")[2]), path.rpartition(".")[2]) for path in paths]
    blocks = sorted({block for block, _ in places})
    names = [name for name in PROJECTIONS if name in {name for _, name in places}]
    if len(blocks) * len(names) == len(paths):
        return names, blocks
    return paths, []  # other layers in other blocks


@torch.no_grad()
def load(model: Qwen, name: str, folder: Path, any_base: bool = False) -> None:
    """Attach the adapter in `folder` as `name`; PEFT's own LoRA adapters load too.

    Layers that it leaves out stay the base's. One without our fingerprint loads with a
    note on stderr.

    Args:
        any_base: take an adapter whose fingerprint is another base's, and say so.

    Raises:
        UserError: missing or altered files, no plain LoRA (`adapters.REFUSED`), another
            base, other layers or shapes; the model is as before.
    """
    size, factors = adapters.read(model, folder, any_base)
    _make_room(model, name)
    model.adapters[name] = size
    for path, (a, b) in factors.items():
        model.get_submodule(path).add(name, a, b, size.scale_of(path))


@torch.no_grad()
def merged(model: Qwen, name: str) -> dict[str, Tensor]:
    """Base weights with W + (α / r) B A in place of W, for a new checkpoint.

    The sum is taken in fp32 and rounded once; the model itself stays as it is.
    """
    weights = {key: value.clone() for key, value in base_parameters(model).items()}
    for path, layer in layers(model, name).items():
        change = layer.lora_B[name] @ layer.lora_A[name] * layer.scale[name]
        old = layer.base.weight
        weights[f"{path}.weight"] = (old.to(change.dtype) + change).to(old.dtype)
    return weights
