"""A folder of the Hub → `Qwen` and `Tokenizer`: names, config, template, shards.

Everything here comes from strangers, and is checked before it is used: a checkpoint is
loaded as it was meant or refused in one line.
"""

import dataclasses
import hashlib
import math
import re
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from model import Config, Qwen
from plumbing import machine
from plumbing.figures import available_memory
from plumbing.files import UserError, read_json, require, verify_checksums
from plumbing.machine import note
from tokenizer import Tokenizer

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

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that older tools saved: they are computed from the config.
COMPUTED = re.compile(
    r"rotary_emb\.(original_inv_freq|inv_freq|cos_cached|sin_cached)$")
# What only quantised weights have: GPTQ, AWQ, bitsandbytes, fp8, compressed-tensors.
PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_(scale|scale_inv|packed|zero_point|"
    r"shape|format)|weight\.(absmax|quant_map|quant_state|nested_absmax).*)$")
FLOATS = ("F64", "F32", "F16", "BF16")


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
    """What an adapter calls its base: its Hub name, or a folder's; nobody's home."""
    if is_tiny(source):
        return "data/tiny"
    return short_name(source) if Path(source).is_dir() else str(source)


# ---------------------------------------------------------------------------- config


def read_config(path: Path) -> Config:
    """Read and check `config.json`.

    Raises:
        UserError: not a dense Qwen2, Qwen2.5 or Qwen3, or sizes that do not fit.
    """
    raw = read_json(path)
    kind = raw.get("model_type")
    require(kind in ("qwen2", "qwen3"), f"{path}: model_type is {kind!r}; only dense "
            "qwen2 (Qwen2, Qwen2.5) and qwen3 checkpoints can be read")
    _refuse_quantised(raw, path)
    _refuse_sliding(raw, path)
    require(raw.get("hidden_act", "silu") == "silu",
            f"{path}: hidden_act is {raw.get('hidden_act')!r}, expected 'silu'")
    # What transformers takes where the file says nothing.
    values = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6,
              "head_dim": 128 if kind == "qwen3" else None
              } | raw | {"rope_theta": _rotary_base(raw, path)}
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


def _rotary_base(raw: dict, path: Path) -> object:
    """The rotary base, from whichever of its three places transformers reads.

    Newer files keep it inside `rope_parameters`, which may name layer types, or inside
    `rope_scaling`; there it wins over a `rope_theta` at the top.
    """
    bases: dict[str, object] = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        require(isinstance(rope, dict), f"{path}: {key} must be an object")
        rope = rope.get("full_attention", rope)
        flat = isinstance(rope, dict) and not any(
            isinstance(value, dict) for value in rope.values())
        require(flat, f"{path}: {key} must hold full_attention, or no layer types")
        scaling = rope.get("rope_type") or rope.get("type") or "default"
        require(scaling == "default", f"{path}: rotary scaling {scaling!r} is not "
                f"supported; remove {key} to use the native context length")
        if rope:
            bases[key] = rope.get("rope_theta")
    require(len(set(map(repr, bases.values()))) < 2, f"{path}: rope_parameters and "
            "rope_scaling differ in their rope_theta; remove one of them")
    key, base = next(iter(bases.items()), ("", None))
    top = raw.get("rope_theta", 10000.0)
    if base is not None and "rope_theta" in raw and top != base:
        note(f"{path}: rope_theta is {top!r:.40} at the top and {base!r:.40} in {key}; "
             "the latter is used, as in transformers")
    return top if base is None else base


def _refuse_sliding(raw: dict, path: Path) -> None:
    """Layers with a window are refused; a window that no layer uses is none.

    So are layers that look ahead, as those of embedding models may.
    """
    require(raw.get("is_causal", True) is not False, f"{path}: is_causal is false; "
            "only models that read from left to right are supported")
    kinds = raw.get("layer_types")
    if kinds is None and raw.get("use_sliding_window"):
        first, layers = raw.get("max_window_layers", 28), raw.get("num_hidden_layers")
        slides = raw.get("sliding_window", 4096) is not None
        slides = slides and not (type(first) is type(layers) is int and first >= layers)
        kinds = ["sliding_attention"] if slides else []
    full = kinds is None or (
        isinstance(kinds, list) and all(k == "full_attention" for k in kinds))
    require(full, f"{path}: sliding-window attention is not supported; only layers of "
            "full attention can be read")


def _refuse_quantised(raw: dict, path: Path) -> None:
    """Rounded weights cannot be read: what was rounded off is gone."""
    plan = raw.get("quantization_config") or raw.get("compression_config")
    if not plan:
        return
    word = plan.get("quant_method") if isinstance(plan, dict) else None
    bits = isinstance(plan, dict) and (plan.get("load_in_4bit")
                                       or plan.get("load_in_8bit"))
    if word == "bitsandbytes" or (word is None and bits):
        word = "bitsandbytes (bnb)"
    require(False, f"{path}: the weights are quantised with {word or 'something'!s:.40}"
            "; use the checkpoint in bf16, fp16 or fp32 that they were made from")


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


# --------------------------------------------------------------------------- loading


def load(
    source: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[Qwen, Tokenizer]:
    """Load a checkpoint: a folder as the Hub lays it out, or a name on the Hub.

    The model is built without memory (meta device) and filled tensor by tensor, so that
    loading never holds more than the weights in their final type plus one shard. The
    tiny one computes with one thread from here on (`machine.one_thread`).

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
    if is_tiny(folder):
        machine.one_thread()
    verify_checksums(folder)
    config = read_config(folder / "config.json")
    tokenizer = Tokenizer(folder)
    require(tokenizer.valid <= config.vocab_size, f"{folder}: the tokenizer has "
            f"{tokenizer.valid} ids, the model only {config.vocab_size}")
    shards = {name: file for name, file in find_shards(folder).items()
              if not COMPUTED.search(name)}
    config, shards = settle_head(config, shards, dtype)
    check_memory(config, device, dtype, folder)
    with torch.device("meta"):
        model = Qwen(config)
    fill(model, shards, device, dtype)
    return model.requires_grad_(False).eval(), tokenizer


def settle_head(config: Config, shards: dict[str, Path],
                dtype: torch.dtype) -> tuple[Config, dict[str, Path]]:
    """Is the head the embedding? The files have the last word, as in transformers.

    A config may say so (`tie_word_embeddings`) of files that hold both. A head that is
    a copy is left out; one that differs is a head of its own, with a note. A head alone
    is the embedding.
    """
    if HEAD not in shards or not config.tie_word_embeddings:
        return config, shards
    if EMBEDDING not in shards:  # stored once, under the other name: `fill` knows
        shards = shards | {EMBEDDING: shards[HEAD]}
    elif not _equal(shards, HEAD, EMBEDDING, dtype):
        note(f"{shards[HEAD].parent}: config.json says that the head is the embedding, "
             f"but {HEAD} differs from it; the head is used as it is stored")
        return dataclasses.replace(config, tie_word_embeddings=False), shards
    return config, {name: file for name, file in shards.items() if name != HEAD}


def _equal(shards: dict[str, Path], one: str, other: str, dtype: torch.dtype) -> bool:
    """Whether two tensors are the same in `dtype`; they are read piece by piece."""
    with open_shard(shards[one]) as first, open_shard(shards[other]) as second:
        for name, shard in ((one, first), (other, second)):
            require(name in set(shard.keys()), f"{shards[name]} lacks {name}, which "
                    "the index lists")
        a, b = first.get_slice(one), second.get_slice(other)
        shape, floats = a.get_shape(), {a.get_dtype(), b.get_dtype()} <= set(FLOATS)
        return floats and shape == b.get_shape() and len(shape) == 2 and all(
            torch.equal(a[row:row + 4096].to(dtype), b[row:row + 4096].to(dtype))
            for row in range(0, shape[0], 4096))


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
    """Tensor name → file that holds it; a whole file wins, as in transformers."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        if index.is_file():
            note(f"{index} is not read: model.safetensors lies beside it")
        with open_shard(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    require(index.is_file(), f"{folder} has neither model.safetensors nor "
            f"model.safetensors.index.json{_other_weights(folder)}")
    names = read_json(index).get("weight_map")
    require(isinstance(names, dict) and all(
        isinstance(f, str) and Path(f).name == f and len(f) < 256
        and f.isprintable() for f in names.values()),
        f"{index}: weight_map must map tensor names to files of the same folder")
    missing = {f for f in names.values() if not (folder / f).is_file()}
    require(not missing, f"{index} names files that are not there: "
            f"{', '.join(sorted(missing))}")
    return {name: folder / file for name, file in names.items()}


def _other_weights(folder: Path) -> str:
    """What to do with weights in a format that is not read, if there are any."""
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for path in sorted(folder.glob(pattern)):
            return (f"; {path.name} is a pickle, which can run any program and is "
                    "never opened: convert it where you trust it, with "
                    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW) "
                    "of transformers")
    for path in sorted(folder.glob("*.gguf")):
        return (f"; {path.name} is GGUF, made for inference: use the checkpoint in "
                "safetensors that it was made from")
    for path in sorted(folder.glob("*.safetensors")):
        return (f"; {path.name} is one of several files, and the index says which "
                "tensor is where: download it, too")
    return ""


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
    folder = next(iter(shards.values())).parent if shards else "the checkpoint"
    packed = min(filter(PACKED.search, shards), default=None)
    require(packed is None, f"{folder} holds {packed}: its weights are quantised; use "
            "the checkpoint in bf16, fp16 or fp32 that they were made from")
    for word, names in (("lacks", expected.keys() - shards.keys()),
                        ("has unknown", shards.keys() - expected.keys())):
        hint = ('; if the head is the embedding, say "tie_word_embeddings": true in '
                "config.json" if word == "lacks" and names == {HEAD} else "")
        require(not names, f"{folder} {word} {len(names)} tensor(s), such as "
                f"{min(names, default='')}{hint}")
    for path in sorted(set(shards.values())):
        with open_shard(path) as shard:
            held = set(shard.keys())
            for name in sorted(n for n, f in shards.items() if f == path):
                tied = name == EMBEDDING and model.config.tie_word_embeddings
                source = HEAD if tied and name not in held else name
                require(source in held, f"{path} lacks {name}, which the index lists")
                stored = shard.get_slice(source)
                want, have = expected[name].shape, stored.get_shape()
                require(list(want) == have, f"{path}: {name} has shape {have}, "
                        f"config.json asks for {list(want)}")
                require(stored.get_dtype() in FLOATS, f"{path}: {name} is stored as "
                        f"{stored.get_dtype()}, as quantised weights are; use the "
                        "checkpoint in bf16, fp16 or fp32 that they were made from")
                weight = shard.get_tensor(source)
                # The copy unties the weight from the memory-mapped file.
                weight = weight.to(device, dtype, copy=True)
                require(all_finite(weight), f"{path}: {name} holds values that are "
                        f"not finite in {str(dtype).removeprefix('torch.')}")
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(weight, False))
