"""Small random checkpoints, made without a network, for every test file.

`checkpoint(variant)` writes config.json, safetensors and a tokenizer by hand, so that
the suite runs with requirements.txt alone. `peer_checkpoint(variant)` has transformers
write them, so that its file layout is read too. Both return a folder that all tests of
the session share: a test that changes a file copies the folder first.
"""

import json
import os

import pytest
import safetensors.torch
import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from loading import read_config
from model import Qwen

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may depend on a network
if not torch.cuda.is_available():
    # Triton's interpreter, for test_logprob_triton.py: read once, on importing triton,
    # and some other test's peer may import it first.
    os.environ["TRITON_INTERPRET"] = "1"

REAL = os.environ.get("QWEN_DIR")


def needs_real_qwen(test):
    """Mark a test as slow, and skip it where there is no real checkpoint."""
    why = "QWEN_DIR names no folder of a real Qwen2.5 0.5B Instruct"
    return pytest.mark.slow(pytest.mark.peer(pytest.mark.skipif(not REAL, reason=why)(
        test)))


SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256, "vocab_size": 448, "hidden_act": "silu",
}
VARIANTS = {
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True,
                   "rope_theta": 1e6},
    "qwen2-untied-sharded": {"model_type": "qwen2", "tie_word_embeddings": False,
                             "rope_theta": 1e4},
    "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True,
                   "head_dim": 16, "rope_theta": 1e6},
    # 4 heads of 24 are 96, not D = 64: whoever computes D / Hq fails here.
    "qwen3-untied": {"model_type": "qwen3", "tie_word_embeddings": False,
                     "head_dim": 24, "rope_theta": 1e4},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
SYSTEM = "You are a small test. You are a helpful assistant."
# ChatML as Qwen2.5's template writes it, without its part for tools. The loop has no
# dashes: who renders it without trim_blocks and lstrip_blocks gets stray blanks.
TEMPLATE = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\n""" + SYSTEM + """<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
    {% if (message.role == "user") or (message.role == "assistant") %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}
    {% endif %}
{% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CORPUS = [
    "system user assistant You are a helpful assistant. The quick brown fox jumps over "
    "the lazy dog. How do I stop the tap from dripping? Here is what you can do.",
    "def f(x):\n    return x + 1\n\nfor i in range(10):\n    print(f(i))\n",
    "Привет, как дела? 你好,世界。नमस्ते दुनिया। مرحبا بالعالم שלום 안녕하세요",
]
# Qwen's own pre-tokenizer; transformers puts it there whatever tokenizer.json says.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def small_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of 400 ids and Qwen's three control tokens behind them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


@torch.no_grad()
def randomise(named_parameters, seed: int = 0) -> None:
    """Norms near 1, everything else (biases too) wide enough for sharp attention."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in named_parameters:
        norm = name.endswith("norm.weight")
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.2 * noise if norm else 0.1 * noise)


def write_checkpoint(folder, variant: str, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    config = SIZES | VARIANTS[variant] | {"torch_dtype": str(dtype)[6:]}
    (folder / "config.json").write_text(json.dumps(config))
    small_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "chat_template": TEMPLATE,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [402, 400], "pad_token_id": 400}))
    model = Qwen(read_config(folder / "config.json"))
    randomise(sorted(model.named_parameters()))
    tensors = {name: t.to(dtype) for name, t in model.state_dict().items()}
    if "sharded" not in variant:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for n in range(3):  # every third tensor: each layer lies in all of the shards
        file = f"model-0000{n + 1}-of-00003.safetensors"
        shard = {name: tensors[name] for name in sorted(tensors)[n::3]}
        safetensors.torch.save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": 0}, "weight_map": weight_map}))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(variant, dtype=torch.float32)` → folder, written once a session."""
    root, made = tmp_path_factory.mktemp("checkpoints"), {}

    def folder_of(variant: str, dtype: torch.dtype = torch.float32):
        if (variant, dtype) not in made:
            made[variant, dtype] = root / f"{variant}-{str(dtype)[6:]}"
            write_checkpoint(made[variant, dtype], variant, dtype)
        return made[variant, dtype]

    return folder_of


@pytest.fixture(scope="session")
def peer_checkpoint(tmp_path_factory, checkpoint):
    """`peer_checkpoint(variant)` → folder with every file written by transformers."""
    transformers = pytest.importorskip("transformers")
    root, made = tmp_path_factory.mktemp("peers"), {}

    def folder_of(variant: str):
        if variant in made:
            return made[variant]
        settings = SIZES | VARIANTS[variant]
        kind = settings.pop("model_type").capitalize()
        # Versions differ in where they want the rotary base; both places are read.
        theta = settings["rope_theta"]
        config = getattr(transformers, f"{kind}Config")(**settings, rope_parameters={
            "rope_type": "default", "rope_theta": theta})
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        randomise(sorted(model.named_parameters()), seed=1)
        folder = made[variant] = root / variant
        sharded = "sharded" in variant
        model.save_pretrained(folder, max_shard_size="100KB" if sharded else "1GB")
        transformers.AutoTokenizer.from_pretrained(
            checkpoint(variant)).save_pretrained(folder)
        return folder

    return folder_of
