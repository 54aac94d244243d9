"""Adapters as files: what PEFT and others write, read into A and B of each layer.

An adapter is as much its adapter_config.json as its tensors: one word in it makes the
same tensors another model. So the words are listed (`READ`, `SILENT`, `REFUSED`), and
one that stands in no list is refused by name and value, unless it is switched off.
Which layers are adapted is said by the names of the tensors; the rest of PEFT's layout
is in `lora.save`, which writes it.
"""

import dataclasses
import functools
import json
import math
import re
import shlex
from pathlib import Path

from torch import Tensor

from loading import all_finite, base_parameters, fingerprint, open_shard
from model import Qwen
from plumbing import machine
from plumbing.files import read_json, require, verify_checksums

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj",
               "gate_proj", "up_proj", "down_proj")

# Every field of PEFT's LoraConfig (0.21) stands in one of three lists. First, what this
# file acts on.
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "init_lora_weights", "bias", "target_modules", "exclude_modules",
        "layers_to_transform")
# Then, what may say anything: the same tensors are the same model.
SILENT = {
    "task_type": "what it was trained for", "peft_version": "who wrote it",
    "base_model_name_or_path": "only shown: the fingerprint counts",
    "revision": "of that base", "auto_mapping": "classes of transformers",
    "inference_mode": "whether PEFT will train it", "runtime_config": "offloading",
    "lora_dropout": "in training only",
    "fan_in_fan_out": "PEFT ignores it for a linear layer, and all of ours are",
    "layers_pattern": "the name of the list of blocks, which tensors spell out",
    "eva_config": "how A started", "corda_config": "init_lora_weights decides",
    "loftq_config": "init_lora_weights decides",
    "lora_ga_config": "init_lora_weights decides",
    "qalora_group_size": "use_qalora decides", "megatron_core": "megatron_config does",
    "ensure_weight_tying": "of layers outside the seven, which are refused",
}
# Last, what makes another model of the same A and B, or needs tensors beside them.
REFUSED = {
    "use_dora": "columns have a magnitude of their own",
    "use_qalora": "inputs are pooled before A",
    "lora_bias": "B has a bias", "modules_to_save": "whole layers are replaced",
    "trainable_token_indices": "embeddings are replaced",
    "target_parameters": "tensors are adapted that are no layer's",
    "layer_replication": "blocks are stacked anew",
    "alora_invocation_tokens": "it acts from a token on",
    "arrow_config": "several adapters are mixed, token by token",
    "megatron_config": "layers are split among GPUs",
    "monteclora_config": "A is sampled", "kasa_config": "singular values of the base",
    "use_bdlora": "A or B is block-diagonal", "velora_config": "buffers beside A and B",
}
# How A and B started: PEFT's ways that leave the base's weights alone. The others
# (pissa, olora, corda, lora_ga, loftq) take B A out of them first.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# What a tensor's name holds when it is neither A nor B of a projection, and its sense.
STRANGERS = {
    "lora_magnitude_vector": "the magnitudes of DoRA",
    "lora_embedding_": "an adapter of the embedding",
    "modules_to_save": "a layer that was trained whole",
    "trainable_tokens": "embeddings of single tokens",
    "base_layer": "weights of the base: let PEFT's save_pretrained write the adapter",
    "bias": "a bias",
    "lora_": "an adapter of another layer, or a layer under another name",
    "": "a whole weight: a head, or a base with added tokens",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Rank and scale of an adapter, layer by layer.

    Attributes:
        rank, alpha: r and α, wherever no pattern says otherwise.
        use_rslora: the change is scaled by α / √r (rank-stabilised LoRA, arXiv
            2312.03732), not by α / r.
        rank_pattern, alpha_pattern: regex → r or α of the layers whose path, or the end
            of it after a dot, it matches. The first that does counts, as in PEFT.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def rank_of(self, path: str) -> int:
        """r of the layer at `path`."""
        return _first_match(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """α / r of the layer at `path`, or α / √r."""
        rank, alpha = self.rank_of(path), _first_match(self.alpha_pattern, path,
                                                       self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _first_match(pattern: dict, path: str, default):
    return next((value for key, value in pattern.items() if _matches(key, path)),
                default)


@functools.lru_cache(5000)  # re's own cache is smaller than a model has layers
def _regex(key: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({key})$")


@functools.lru_cache(50000)  # each is asked for several times
def _matches(key: str, path: str) -> bool:
    return _regex(key).match(path) is not None


def read(model: Qwen, folder: Path,
         any_base: bool) -> tuple[Size, dict[str, tuple[Tensor, Tensor]]]:
    """The adapter in `folder`: its `Size`, and A (r, in), B (out, r) of each layer.

    Raises:
        UserError: as `lora.load` says.
    """
    _check_folder(folder)
    verify_checksums(folder)
    config, path = read_json(folder / CONFIG), folder / TENSORS
    size = _read_config(config, folder / CONFIG)
    _check_tensors_file(path)
    made_for = _shown(config.get("base_model_name_or_path"))
    with open_shard(path) as shard:
        note = _check_base(model, (shard.metadata() or {}).get("base_fingerprint"),
                           folder, made_for, any_base)
        tensors = {key: shard.get_tensor(key) for key in shard.keys()}
    factors = _sort_tensors(model, tensors, path)
    base = base_parameters(model)
    for layer, pair in factors.items():
        require(_targets(config, layer), f"{path} adapts {layer}, but target_modules, "
                f"exclude_modules and layers_to_transform of {CONFIG} leave it out")
        rank, (out, width) = size.rank_of(layer), base[f"{layer}.weight"].shape
        for letter, weight, want in zip("AB", pair, ([rank, width], [out, rank]),
                                        strict=True):
            require(rank > 0 and list(weight.shape) == want, f"{path}: lora_{letter} "
                    f"of {layer} has shape {list(weight.shape)}, {CONFIG} says r = "
                    f"{rank}, and this base asks for {want}; the adapter was made for "
                    f"{made_for}: name that with --model")
            require(weight.is_floating_point() and weight.element_size() > 1,
                    f"{path}: lora_{letter} of {layer} is {weight.dtype}; save it in "
                    "fp32, fp16 or bf16")
            require(all_finite(weight.float()), f"{path}: lora_{letter} of {layer} "
                    "holds values that are not finite")
    if note:  # only now: a refusal is one line
        machine.note(note)
    return size, factors


def _shown(value: object) -> str:
    """A stranger's value on one line, without what a terminal would obey."""
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " …"


# ---------------------------------------------------------------------- what it is for


def _check_folder(folder: Path) -> None:
    """An adapter's folder, and no other that people take for one."""
    require(folder.is_dir(), f"no adapter folder {folder}")
    if (folder / CONFIG).is_file():
        return
    require(not (folder / "config.json").is_file(), f"{folder} holds a whole model, "
            "such as a merged one, and no adapter: pass it with --model")
    inner = sorted((f for f in folder.iterdir() if (f / CONFIG).is_file()),
                   key=_natural)
    require(not inner, f"{folder} holds no adapter itself, but {len(inner)} of its "
            f"folders do: pass one of them, such as {inner[-1] if inner else ''}")
    whole = sorted((f for f in folder.glob("checkpoint-*")
                    if (f / "config.json").is_file()), key=_natural)
    require(not whole, f"{folder} holds no adapter, but whole models: pass one of them "
            f"with --model, such as {whole[-1] if whole else ''}")


def _natural(folder: Path) -> tuple:
    """checkpoint-900 before checkpoint-1000."""
    return [int(n) for n in re.findall(r"\d{1,15}", folder.name)], folder.name


def _check_tensors_file(path: Path) -> None:
    pickle = path.with_name("adapter_model.bin")
    line = ("import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for "
            f"k, v in torch.load('{pickle.name}', weights_only=True).items()}}, "
            f"'{path.name}')")
    require(path.is_file() or not pickle.is_file(), f"{pickle} is a pickle, which can "
            "run anything and is never opened here; convert it: (cd "
            f'{shlex.quote(str(path.parent))} && python -c "{line}")')


def _check_base(model: Qwen, made_for: str | None, folder: Path, name: str,
                any_base: bool) -> str | None:
    """Refuse an adapter of another base, unless `any_base`; what there is to note."""
    if made_for is None:
        return (f"{folder} does not say which weights it was trained on; its config "
                f"names {name}, and whether that is this base is not checked")
    if made_for == fingerprint(model):
        return None
    require(any_base, f"{folder} was trained on another base model ({name}); load that "
            "one with --model. A copy of it in fp16 or with more rows of vocabulary "
            "counts as another, too: sample.py takes it with --any-base")
    return (f"--any-base: {folder} WAS TRAINED ON OTHER WEIGHTS ({name}) and is used "
            "on these; what it says is right only if these are a copy")


# ------------------------------------------------------------------------- its config


def _read_config(config: dict, path: Path) -> Size:
    """Rank and scale, if nothing in the file makes these tensors another model."""
    require(config.get("peft_type") == "LORA", f"{path.parent} is not a LoRA adapter: "
            f"{CONFIG} says peft_type = {_shown(config.get('peft_type'))}")
    for key, value in config.items():
        if key in READ or key in SILENT or not value:
            continue
        why = REFUSED.get(key, "this program does not know what that changes")
        require(False, f"{path} says {_shown({key: value})[1:-1]}: {why}; it is not a "
                "plain LoRA adapter")
    bias, start = config.get("bias"), config.get("init_lora_weights", True)
    require(bias in (None, "none"), f'{path} says "bias": {_shown(bias)}: biases of '
            "the base were trained, too; it is not a plain LoRA adapter")
    require((start.lower() if isinstance(start, str) else start) in STARTS,
            f'{path} says "init_lora_weights": {_shown(start)}, and only true, '
            "false, gaussian, eva, orthogonal and mica are known to leave the weights "
            "of the base alone (pissa, olora, corda, lora_ga and loftq change them); "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=…) makes "
            "a plain adapter of it")
    size = Size(config.get("r"), config.get("lora_alpha"),
                config.get("use_rslora") or False,
                *(_read_pattern(config.get(key) or {}, kinds, f"{path}: {key}")
                  for key, kinds in (("rank_pattern", (int,)),
                                     ("alpha_pattern", (int, float)))))
    require(type(size.rank) is int and _is_number(size.alpha, (int, float)),
            f"{path}: r and lora_alpha must be numbers")
    require(type(size.use_rslora) is bool, f"{path}: use_rslora is "
            f"{_shown(size.use_rslora)}; it must be true or false")
    return size


def _is_number(value: object, kinds: tuple) -> bool:
    return type(value) in kinds and abs(value) < 1e6  # false for NaN too


def _read_pattern(pattern: object, kinds: tuple, place: str) -> dict:
    """A rank_pattern or alpha_pattern whose regexes end in bounded time.

    A stranger's regex may take years: `(a*)*`, or forty times `(.|.)`. Plain names are
    free; a regex may have four groups or repetitions in all, and none of a group.
    """
    require(isinstance(pattern, dict) and len(pattern) <= 2000 and all(
        _is_number(value, kinds) for value in pattern.values()),
        f"{place} must map names of layers to numbers")
    regexes = [key for key in pattern if not re.fullmatch(r"\^?(\w|\\?\.)*\$?", key)]
    for key in regexes:
        costly = re.findall(r"[*+?{(]", key.replace("(?:", "("))
        simple = (len(costly) <= 4 and key.count("|") <= 40 and len(key) <= 500
                  and "(?" not in key.replace("(?:", "(")
                  and not re.search(r"\)[*+{]", key))
        try:
            _regex(key)
        except (re.error, OverflowError, RecursionError):
            simple = False
        require(simple and len(regexes) <= 8, f"{place}: {_shown(key)} is not a regex "
                "that is simple enough; name the layers one by one")
    return pattern


def _targets(config: dict, layer: str) -> bool:
    """Whether PEFT would adapt a layer, as far as lists say: a regex is not run."""
    targets, out = config.get("target_modules"), config.get("exclude_modules")
    blocks = config.get("layers_to_transform")

    def named(names: list) -> bool:
        return any(f".{layer}".endswith(f".{name}") for name in names)

    if isinstance(out, list) and named(out):
        return False
    if not isinstance(targets, list):
        return True
    blocks = [blocks] if type(blocks) is int else blocks or None
    inside = not isinstance(blocks, list) or int(layer.split(".")[2]) in blocks
    return layer in targets or (named(targets) and inside)


# ------------------------------------------------------------------------ its tensors


def _sort_tensors(model: Qwen, tensors: dict[str, Tensor],
                  path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Tensors by the layer that they adapt: path → (A, B).

    An adapter may leave layers out; but a B without its A would act on a random one.
    A state dict that was saved as it is carries the adapter's name (`.lora_A.default.`)
    and perhaps not PEFT's prefix: with one adapter in it, it can mean only one thing.
    """
    base, sorted_, names = base_parameters(model), {}, set()
    pattern = re.compile(r"(?:base_model\.model\.)?(model\.layers\.\d+\.\w+\.(\w+))"
                         r"\.lora_([AB])(?:\.(\w+))?\.weight")
    for key, weight in tensors.items():
        match = pattern.fullmatch(key)
        if not match or match[2] not in PROJECTIONS:
            sense = next(s for word, s in STRANGERS.items() if word in key)
            require(False, f"{path} has unknown tensor(s), such as {_shown(key)} "
                    f"({sense}); only A and B of {', '.join(PROJECTIONS)} are read")
        layer, _, letter, name = match.groups()
        require(f"{layer}.weight" in base, f"{path} has unknown tensor(s), such as "
                f"{key}: this base has no {layer}")
        names.add(name)
        require(len(names) == 1 and letter not in sorted_.setdefault(layer, {}),
                f"{path} holds several adapters ({', '.join(sorted(map(str, names)))}) "
                "or one twice; save one of them alone")
        sorted_[layer][letter] = weight
    require(bool(sorted_), f"{path} holds no tensors of an adapter")
    for layer, pair in sorted_.items():
        lost = {"A", "B"} - pair.keys()
        require(not lost, f"{path} lacks lora_{min(lost, default='')} of {layer}")
    # In the order of the model, whatever that of the file.
    return {layer: (sorted_[layer]["A"], sorted_[layer]["B"])
            for layer in (name.removesuffix(".weight") for name in base)
            if layer in sorted_}
