"""A folder of the Hub → `Qwen` and `Tokenizer`: names, config, template, shards.

Everything here comes from strangers, and is checked before it is used: a checkpoint is
loaded as it was meant or refused in one line.
"""

import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path

import jinja2
import jinja2.sandbox
import safetensors
import tokenizers
import torch
from torch import Tensor, nn

from model import Config, Qwen
from plumbing.figures import available_memory
from plumbing.files import UserError, read_json, require, verify_checksums

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
                named = read_json(folder / name).get("eos_token_id")
                named = named if isinstance(named, list) else [named]
                stops |= {stop for stop in named if type(stop) is int}
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
