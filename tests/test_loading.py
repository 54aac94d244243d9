"""Claims about loading.py.

* Every weight is loaded from the file, as it stands there, and frozen.
* A fingerprint tells base models apart, and nothing else.
* The sizes of the Hub's checkpoints are known without them; the bundled one has a name
  of its own; a device is there or refused.
* An odd checkpoint is the model that transformers makes of it, with a note where two of
  its statements contradict each other.
* Every bad checkpoint is refused with a UserError that names what is wrong.
"""

import json
import math
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import VARIANTS, every_variant
from torch import Tensor

import loading
import lora
from plumbing.files import UserError, write_checksums

# ------------------------------------------------------------------------ fingerprints


def test_a_fingerprint_does_not_depend_on_the_type_of_loading(checkpoint):
    folder = checkpoint("qwen2-tied", torch.bfloat16)
    prints = {loading.fingerprint(loading.load(folder, dtype=dtype)[0])
              for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    assert len(prints) == 1


def test_a_fingerprint_changes_with_every_weight(checkpoint):
    prints = {loading.fingerprint(loading.load(checkpoint(v))[0]) for v in VARIANTS}
    assert len(prints) == len(VARIANTS)
    model, _ = loading.load(checkpoint("qwen2-tied"))
    before = loading.fingerprint(model)
    for name, weight in model.named_parameters():
        old = weight.clone()
        weight.mul_(1.05)
        assert loading.fingerprint(model) != before, name
        weight.copy_(old)
    assert loading.fingerprint(model) == before


def test_a_fingerprint_ignores_adapters(checkpoint):
    model, _ = loading.load(checkpoint("qwen3-tied"))
    before, names = loading.fingerprint(model), set(loading.base_parameters(model))
    lora.attach(model, "policy", 2, 4)
    lora.attach(model, "reward", 3, 6)
    lora.parameters(model, "policy")[1].data.fill_(1)
    with lora.using(model, "policy"):
        assert loading.fingerprint(model) == before
    assert set(loading.base_parameters(model)) == names


# ---------------------------------------------------------------------------- loading


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_fills_every_weight_from_the_file_and_freezes_it(
        checkpoint, variant, dtype):
    folder, stored = checkpoint(variant), {}
    for file in folder.glob("*.safetensors"):
        stored |= safetensors.torch.load_file(file)
    model, _ = loading.load(folder, dtype=dtype)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[n], stored[n].to(dtype)) for n in stored)
    assert not model.training
    assert not any(p.requires_grad for p in loaded.values())


def test_loaded_weights_outlive_their_file(checkpoint, tmp_path):
    # A weight that still was a window on the mapped file would change with it.
    folder = shutil.copytree(checkpoint("qwen2-tied"), tmp_path / "copy")
    model, _ = loading.load(folder)
    before = model.unembed.clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes(file.seek(0, 2) - file.seek(0)))
    assert torch.equal(model.unembed, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", [None, 0, 500, 999])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_seen_wherever_it_stands(dtype, place, value):
    weight = torch.linspace(-3e4, 3e4, 1000).to(dtype)
    if place is not None:
        weight[place] = value
    assert loading.all_finite(weight) == (place is None)
    assert loading.all_finite(weight[:0])


# ------------------------------------------------- odd checkpoints that others load


def peer_logits(folder: Path, ids: Tensor) -> Tensor:
    transformers = pytest.importorskip("transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        return peer(ids).logits


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    ours, _ = loading.load(folder)
    with torch.no_grad():
        return ours.logits(ours(ids))


def other_head(tensors: dict[str, Tensor]) -> None:
    head = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"] = head.flip(0).contiguous()


def same_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_alone(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def buffers(tensors: dict[str, Tensor]) -> None:
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["model.rotary_emb.inv_freq"] = torch.ones(8)


def stale_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))


def other_index(folder: Path) -> None:
    """Whole shards of another model beside the whole file."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({n: t + 1 for n, t in tensors.items()}, folder / SHARD)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(tensors, SHARD)}))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(*keys: str, **changes: object):
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(
            {key: value for key, value in raw.items() if key not in keys}))
    return apply


def config(**changes: object):
    return lambda folder: edit_json(folder / "config.json", **changes)


def weights(change):
    """A breaker that applies `change` to the dict of tensors."""
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    return apply


# What is odd → who makes it so, and the note that it gets, if any.
DEFAULT = {"rope_type": "default"}
ODD = {
    "base inside": (without("rope_theta", rope_parameters=DEFAULT | {
        "rope_theta": 500.0}), None),
    "base in two places": (config(rope_theta=1e6, rope_parameters=DEFAULT | {
        "rope_theta": 500.0}), "is 1000000.0 at the top and 500.0 in rope_p"),
    "base in two places, older": (config(rope_theta=1e6, rope_scaling=DEFAULT | {
        "rope_theta": 500.0}), "at the top and 500.0 in rope_scaling"),
    "base in two places, the same": (config(rope_theta=500, rope_parameters=DEFAULT | {
        "rope_theta": 500.0}), None),
    "base at the top": (config(rope_theta=500.0, rope_parameters=DEFAULT), None),
    "base nowhere": (without("rope_theta"), None),
    "no scaling": (config(rope_scaling={"type": "default"}, rope_theta=500.0), None),
    "null scaling": (config(rope_scaling=None, rope_parameters=None), None),
    "other head": (weights(other_head), "lm_head.weight differs from it"),
    "same head": (weights(same_head), None),
    "head alone": (weights(head_alone), None),
    "buffers": (weights(buffers), None),
    "stale index": (stale_index, "index.json is not read: model.safetensors lies"),
    "other index": (other_index, "index.json is not read: model.safetensors lies"),
    "window of no layer": (config(use_sliding_window=True, sliding_window=4,
                                  max_window_layers=2), None),
    "window by default": (config(use_sliding_window=True, sliding_window=4), None),
    "window that is null": (config(use_sliding_window=True, sliding_window=None,
                                   max_window_layers=0), None),
    "window, all layers full": (config(
        use_sliding_window=True, sliding_window=4, max_window_layers=0,
        layer_types=["full_attention"] * 2), None),
}


@pytest.mark.peer
@pytest.mark.parametrize("case", ODD)
def test_an_odd_checkpoint_is_loaded_as_transformers_loads_it(
        checkpoint, tmp_path, capsys, case):
    change, note = ODD[case]
    folder = shutil.copytree(checkpoint("qwen2-tied"), tmp_path / "copy")
    weights(lambda tensors: None)(folder)  # transformers asks for the format's name
    change(folder)
    ids = torch.arange(5, 45)[None]
    ours = our_logits(folder, ids)
    said = capsys.readouterr().err
    assert (note in said and said.count("note:") == 1) if note else not said
    assert (ours - peer_logits(folder, ids)).abs().max() < 1e-4


def test_a_rotary_base_may_be_given_by_layer_type(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("qwen2-tied"), tmp_path / "copy")
    edit_json(folder / "config.json", rope_theta=1e6, rope_parameters={
        "full_attention": DEFAULT | {"rope_theta": 500.0},
        "sliding_attention": {"rope_type": "yarn", "rope_theta": 7.0}})
    assert loading.read_config(folder / "config.json").rope_theta == 500.0


@pytest.mark.peer
def test_qwen3_without_a_head_size_has_that_of_transformers(checkpoint, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(checkpoint("qwen3-tied"), tmp_path / "copy")
    without("head_dim")(folder)
    want = transformers.AutoConfig.from_pretrained(folder).head_dim
    assert loading.read_config(folder / "config.json").head_dim == want == 128


# --------------------------------------------------------------------------- refusals


def truncated(size: int):
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
    return apply


def broken_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"x" * 32  # the JSON behind the eight bytes of its length
    path.write_bytes(data)


def altered(name: str):
    def apply(folder: Path) -> None:
        write_checksums(folder, os.listdir(folder))
        path = folder / name
        path.write_bytes(path.read_bytes() + b" ")  # still valid JSON
    return apply


def lost(folder: Path) -> None:
    write_checksums(folder, os.listdir(folder))
    (folder / "generation_config.json").unlink()


def poisoned(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")


def stretched(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(65)


def vocabulary_without_ids(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"] |= {"vocab": {}, "merges": []}
    edit_json(folder / "tokenizer.json", model=raw["model"], added_tokens=[])


def renumbered(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"][-1]["id"] = 410
    edit_json(folder / "tokenizer.json", added_tokens=raw["added_tokens"])


def removed(name: str):
    return lambda folder: (folder / name).unlink()


def replaced(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def renamed(name: str):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def template(text: str | None):
    return lambda f: edit_json(f / "tokenizer_config.json", chat_template=text)


SHARD = "model-00002-of-00003.safetensors"
REFUSALS = {  # what is wrong → who breaks it so, and what the message must say
    "no config": (removed("config.json"), r"cannot read .*config\.json"),
    "no JSON": (replaced("config.json", "{"), r"config\.json is not valid JSON"),
    "another family": (config(model_type="llama"), "model_type is 'llama'"),
    "a mixture": (config(model_type="qwen2_moe"), "model_type is 'qwen2_moe'"),
    "yarn": (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
             "rotary scaling 'yarn'"),
    "old rope scaling": (config(rope_scaling={"type": "linear", "factor": 2.0}),
                         "rotary scaling 'linear'"),
    "new rope scaling": (config(rope_parameters={"rope_type": "dynamic"}),
                         "rotary scaling 'dynamic'"),
    "nested scaling": (config(rope_parameters={"full_attention": {
        "rope_type": "llama3"}}), "rotary scaling 'llama3'"),
    "bases of other layers": (config(rope_parameters={"sliding_attention": {
        "rope_theta": 1e4}}), "rope_parameters must hold full_attention"),
    "two rotary bases": (config(rope_parameters={"rope_theta": 1e4}, rope_scaling={
        "type": "default"}), "rope_parameters and rope_scaling differ .*remove one"),
    "sliding window": (config(use_sliding_window=True, max_window_layers=1),
                       "sliding-window"),
    "sliding by default": (config(use_sliding_window=True, num_hidden_layers=40),
                           "sliding-window"),
    "bitsandbytes": (config(quantization_config={"load_in_4bit": True}),
                     r"quantised with bitsandbytes \(bnb\)"),
    **{word: (config(quantization_config={"quant_method": word, "bits": 4}),
              f"quantised with {word}.* use the checkpoint in bf16")
       for word in ("bitsandbytes", "fp8", "gptq", "awq", "compressed-tensors", "hqq")},
    "older compressed-tensors": (config(compression_config={
        "quant_method": "compressed-tensors"}), "quantised with compressed-tensors"),
    "GPTQ's tensors": (weights(lambda t: t.update({
        "model.layers.0.mlp.up_proj.qweight": torch.ones(2)})), "are quantised"),
    "bytes for weights": (weights(lambda t: t.update({
        "model.norm.weight": torch.ones(64, dtype=torch.int8)})), "norm.* as I8"),
    "a pickle": (renamed("pytorch_model.bin"), r"pytorch_model\.bin is a pickle.*never "
                 r"opened.*save_pretrained"),
    "GGUF": (renamed("model-q4.gguf"), r"model-q4\.gguf is GGUF.*use the checkpoint"),
    "no index": (renamed(SHARD), "is one of several files, and the index"),
    "no head": (config(tie_word_embeddings=False), r"lacks 1 .*lm_head\.weight; if the "
                r'head .*"tie_word_embeddings": true'),
    "sliding layers": (config(layer_types=["full_attention", "sliding_attention"]),
                       "sliding-window"),
    "looking ahead": (config(is_causal=False), "is_causal is false"),
    "gelu": (config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "odd heads": (config(num_attention_heads=3), r"hidden_size \(64\) must be a mult"),
    "odd groups": (config(num_key_value_heads=3), r"heads \(4\) must be a multiple"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "text for a size": (config(vocab_size="448"), "vocab_size is '448'"),
    "no weights": (removed("model.safetensors"), r"has neither model\.safetensors"),
    "cut in the weights": (truncated(200_000), r"model\.safetensors is truncated"),
    "cut in the header": (truncated(50), r"model\.safetensors is truncated"),
    "empty weights": (truncated(0), r"model\.safetensors is truncated"),
    "broken header": (broken_header, r"model\.safetensors is truncated or not a saf"),
    "missing tensor": (weights(lambda t: t.pop("model.layers.1.self_attn.k_proj.bias")),
                       r"lacks 1 .*layers\.1\.self_attn\.k_proj\.bias"),
    "unknown tensor": (weights(lambda t: t.update({"model.extra": torch.ones(2)})),
                       r"has unknown 1 .*model\.extra"),
    "wrong shape": (weights(stretched), r"model\.norm\.weight has shape \[65\].*64"),
    "other sizes": (config(intermediate_size=100), r"has shape .*asks for .*100"),
    "NaN": (weights(poisoned), r"layers\.1\.mlp\.up_proj\.weight holds .* not finite"),
    "altered weights": (altered("model.safetensors"), r"model\.safetensors is not the"),
    "altered config": (altered("config.json"), r"config\.json is not the file"),
    "lost file": (lost, r"names a file that is not there: 'generation_config\.json'"),
    "too many ids": (config(vocab_size=402), "has 403 ids, the model only 402"),
    "no tokenizer": (removed("tokenizer.json"), r"cannot read .*tokenizer\.json"),
    "broken tokenizer": (replaced("tokenizer.json", "{}"), r"read .*tokenizer\.json"),
    "no ids": (vocabulary_without_ids, r"tokenizer\.json: ids are not"),
    "ids with a hole": (renumbered, r"tokenizer\.json: ids are not .* without gaps"),
    "no template": (template(None), "no chat_template; use an Instruct"),
    "broken template": (template("{% if %}"), "broken chat template"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_checkpoint_is_refused_by_name(checkpoint, tmp_path, case):
    breaker, message = REFUSALS[case]
    folder = shutil.copytree(checkpoint("qwen2-tied"), tmp_path / "copy")
    breaker(folder)
    with pytest.raises(UserError, match=message) as refusal:
        loading.load(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(("file", "message"), [
    ("model-00009-of-00003.safetensors", "not there: model-00009"),
    (f"../{SHARD}", "files of the same folder"), ("..", "not there"),
    ("/etc/passwd", "files of the same folder"), (7, "files of the same folder"),
    (SHARD, "lacks model.norm.weight, which the index lists")])
def test_an_index_that_points_elsewhere_is_refused(
        checkpoint, tmp_path, file, message):
    source = checkpoint("qwen2-untied-sharded")
    folder = shutil.copytree(source, tmp_path / "a" / "copy")
    shutil.copy(folder / SHARD, tmp_path / "a" / SHARD)  # so that ../ is there
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    assert names["model.norm.weight"] != SHARD
    edit_json(index, weight_map=names | {"model.norm.weight": file})
    with pytest.raises(UserError, match=message) as refusal:
        loading.load(folder)
    assert str(folder) in str(refusal.value)


def test_weights_that_cannot_fit_are_refused_before_anything_is_read(
        checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "fill", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(loading, "available_memory", lambda: 123_456)
    both = r"needs 0\.0 GB .*float32, but cpu has 0\.0 GB"
    with pytest.raises(UserError, match=both):
        loading.load(checkpoint("qwen2-tied"))
    monkeypatch.setattr(loading, "available_memory", lambda: 10**9)
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        loading.load(checkpoint("qwen2-tied"))  # with enough memory it goes on


@pytest.mark.parametrize(("sizes", "need"), [
    ({"hidden_size": 10**6, "vocab_size": 10**6}, "28002.3"),
    # These overflow the size of a tensor, and a 64-bit integer:
    ({"hidden_size": 10**12, "vocab_size": 10**12}, "28000000002340000.0"),
    ({"vocab_size": 10**20}, "25600000000000.0"),
    ({"num_hidden_layers": 10**9}, "123904.0"),  # hours, if the modules were built
])
def test_absurd_sizes_are_refused_with_both_sizes(
        checkpoint, tmp_path, monkeypatch, sizes, need):
    monkeypatch.setattr(loading, "available_memory", lambda: 5 * 10**9)
    folder = shutil.copytree(checkpoint("qwen2-tied"), tmp_path / "copy")
    edit_json(folder / "config.json", **sizes)
    with pytest.raises(UserError, match=rf"needs {need} GB .* cpu has 5\.0 GB"):
        loading.load(folder)


# --------------------------------------------------------------- names, sizes, devices


def test_a_size_is_looked_for_on_the_hub_whatever_folders_there_are(
        tmp_path, monkeypatch):
    (tmp_path / "Qwen").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: name)
    folder = loading.find_folder(loading.SIZES["0.5b"])
    assert folder == Path("Qwen/Qwen2.5-0.5B-Instruct")


def test_a_checkpoint_in_the_working_directory_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert loading.short_name(".") == tmp_path.name
    assert loading.short_name("Qwen/Qwen2.5-0.5B-Instruct") == "Qwen2.5-0.5B-Instruct"


@pytest.mark.parametrize(("size", "billions"), [
    ("0.5b", 0.494), ("1.5b", 1.54), ("3b", 3.09), ("7b", 7.62), ("14b", 14.77)])
def test_the_sizes_of_the_hub_are_known_without_it(size, billions):
    config = loading.known_config(loading.SIZES[size])
    assert config.num_parameters / 1e9 == pytest.approx(billions, abs=0.006)
    heads, width = config.num_attention_heads, config.hidden_size
    assert (config.head_dim * heads, heads % config.num_key_value_heads) == (width, 0)


def test_the_sizes_of_a_folder_are_those_of_its_config(checkpoint):
    folder = checkpoint("qwen3-untied")
    assert loading.known_config(folder) == loading.read_config(folder / "config.json")
    with pytest.raises(UserError, match=r"no such checkpoint folder: a/b; .* 0\.5b"):
        loading.known_config("a/b")


def test_the_bundled_checkpoint_is_called_the_same_on_every_machine(checkpoint,
                                                                    monkeypatch):
    monkeypatch.chdir(loading.TINY.parent)
    for source in (loading.TINY, "tiny", "../data/./tiny", loading.SIZES["tiny"]):
        assert loading.is_tiny(source)
        assert loading.base_name(source) == "data/tiny"
        assert loading.short_name(source) == "tiny"
    folder, name = checkpoint("qwen2-tied"), loading.SIZES["0.5b"]
    for source, called in ((folder, folder.name), (name, name)):
        assert not loading.is_tiny(source)
        assert loading.base_name(source) == called


def test_a_device_is_there_or_refused(monkeypatch):
    for gpu, default in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(loading.torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert loading.pick_device(None) == default
        assert loading.pick_device("cpu") == "cpu"
    assert loading.pick_device("cuda") == "cuda"
    with pytest.raises(UserError, match=r"--device tpu: .* cpu and cuda"):
        loading.pick_device("tpu")


@pytest.mark.parametrize("name", ["no/such/folder", "nowhere", "./nobody/nothing"])
def test_a_missing_folder_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"no such checkpoint folder: {name}"):
        loading.load(name)


def test_a_hub_name_without_network_and_cache_points_to_the_model_option(monkeypatch):
    def offline(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"Qwen/Qwen2\.5-0\.5B-Instruct .*--model DIR"):
        loading.load(loading.SIZES["0.5b"])
