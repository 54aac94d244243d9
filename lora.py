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
import re
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from loading import all_finite, base_parameters, fingerprint, open_shard
from model import Qwen
from plumbing.files import (
    UserError,
    read_json,
    require,
    verify_checksums,
    write_checksums,
    write_json,
    write_whole,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj",
               "gate_proj", "up_proj", "down_proj")


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

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) → (..., out)."""
        y = self.base(x)
        name = self.active.name
        if name not in self.scale:
            return y
        # [L1] y = W x + (α / r) · B A x
        # Adapters stay in fp32 whatever the base's type: an update of 1e-5 is lost in
        # the 8 bits of a bf16 weight.
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
    if not hasattr(model, "active"):
        model.active = ActiveAdapter()
        model.adapters = {}
        for block in model.model.layers:
            for owner in (block.self_attn, block.mlp):
                for projection, layer in list(owner.named_children()):
                    if projection in PROJECTIONS:
                        setattr(owner, projection, LoRALinear(layer, model.active))
    require(name not in model.adapters, f"there is an adapter {name!r} already")
    depth = depth or model.config.num_hidden_layers
    model.adapters[name] = {"rank": rank, "alpha": alpha, "depth": depth}
    generator = torch.Generator().manual_seed(seed)
    # float64 bases exist only in tests, whose tolerances fp32 adapters would spoil.
    dtype = torch.promote_types(torch.float32, model.unembed.dtype)
    for layer in layers(model.model.layers[:depth]).values():
        out, width = layer.base.weight.shape
        bound = 1 / math.sqrt(width)
        a = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        place = {"device": model.device, "dtype": dtype}
        layer.lora_A[name] = nn.Parameter(a.to(**place))
        layer.lora_B[name] = nn.Parameter(torch.zeros(out, rank, **place))
        layer.scale[name] = alpha / rank


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
    SHA256SUMS covers every file.
    """
    tensors = {}
    for path, layer in layers(model, name).items():
        for factor in ("lora_A", "lora_B"):
            weight = getattr(layer, factor)[name].detach().cpu().contiguous()
            tensors[f"base_model.model.{path}.{factor}.weight"] = weight
    settings = model.adapters[name]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": base, "r": settings["rank"],
        "lora_alpha": settings["alpha"], "target_modules": list(PROJECTIONS),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "use_rslora": False, "use_dora": False,
    }
    if settings["depth"] < model.config.num_hidden_layers:
        config["layers_to_transform"] = list(range(settings["depth"]))
    # One entry only: safetensors writes several in random order, and the same adapter
    # should be the same bytes.
    metadata = {"base_fingerprint": fingerprint(model)}
    write_whole(folder / "adapter_model.safetensors",
                safetensors.torch.save(tensors, metadata))
    write_json(folder / "adapter_config.json", config)
    write_checksums(folder)


def load(model: Qwen, name: str, folder: Path) -> None:
    """Attach the adapter in `folder` as `name`; PEFT's own LoRA adapters load too.

    Raises:
        UserError: missing or altered files, another base, other layers or shapes.
    """
    require(folder.is_dir(), f"no adapter folder {folder}")
    verify_checksums(folder)
    config = read_json(folder / "adapter_config.json")
    foreign = [k for k in ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern",
                           "alpha_pattern", "modules_to_save", "lora_bias",
                           "alora_invocation_tokens") if config.get(k)]
    require(config.get("peft_type") == "LORA" and not foreign, f"{folder} is not a "
            f"plain LoRA adapter ({', '.join(foreign) or config.get('peft_type')})")
    # PiSSA and its like change the base too, and say so only here.
    start = config.get("init_lora_weights", True)
    require(start in (True, False, "gaussian"), f"{folder}: init_lora_weights is "
            f"{start!r}; such an adapter does not go with the plain base")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    require(type(rank) is int and type(alpha) in (int, float) and abs(alpha) < 1e6,
            f"{folder}/adapter_config.json: r and lora_alpha must be numbers")
    path = folder / "adapter_model.safetensors"
    with open_shard(path) as shard:
        made_for = (shard.metadata() or {}).get("base_fingerprint")
        require(made_for in (None, fingerprint(model)), f"{folder} was trained on "
                f"another base model ({config.get('base_model_name_or_path')}); load "
                "that one with --model")
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}
    _check_tensors(model, tensors, rank, path)
    attach(model, name, rank, alpha)
    try:
        _fill(model, name, tensors, path)
    except UserError:
        detach(model, name)
        raise


def _check_tensors(model: Qwen, tensors: dict[str, Tensor], rank: int,
                   path: Path) -> None:
    """Names and shapes, before `attach` sets aside room for `rank`.

    An adapter may leave layers out; but a B without its A would act on a random one.
    """
    base, twins = base_parameters(model), {"A": "B", "B": "A"}
    name = re.compile(r"base_model\.model\.(.+\.(\w+))\.lora_([AB])\.weight")
    require(any(".lora_A." in key for key in tensors), f"{path} holds no tensors of an "
            "adapter")
    for key, weight in tensors.items():
        match = name.fullmatch(key)
        known = match and match[2] in PROJECTIONS and f"{match[1]}.weight" in base
        require(bool(known), f"{path} has unknown tensor(s), such as {key}")
        out, width = base[f"{match[1]}.weight"].shape
        want = [rank, width] if match[3] == "A" else [out, rank]
        require(0 < rank <= model.config.hidden_size and list(weight.shape) == want,
                f"{path}: {key} has shape {list(weight.shape)}, adapter_config.json "
                f"says r = {rank}, and this base asks for {want}")
        twin = key.replace(f"lora_{match[3]}.", f"lora_{twins[match[3]]}.")
        require(twin in tensors, f"{path} lacks {twin}")


@torch.no_grad()
def _fill(model: Qwen, name: str, tensors: dict[str, Tensor], path: Path) -> None:
    for place, layer in layers(model, name).items():
        for factor in ("lora_A", "lora_B"):
            key = f"base_model.model.{place}.{factor}.weight"
            if key in tensors:  # a layer the file leaves out keeps B = 0: no change
                getattr(layer, factor)[name].copy_(tensors[key])
                require(all_finite(getattr(layer, factor)[name]),
                        f"{path}: {key} holds values that are not finite")


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
