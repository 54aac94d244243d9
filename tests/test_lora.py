"""Claims about lora.py and adapters.py.

* [L1]: a layer is W x + (α / r) B A x, in value and in gradient, and B = 0 is the base.
* One base, several adapters: adapters never leak into one another, `using` always gives
  the word back, and training moves nothing but the adapter that is trained.
* An adapter that we saved is the same in PEFT, and PEFT's is the same here.
* Whatever PEFT's config can say is either done, or without effect, or refused by name
  and value; what an adapter says of rank and scale survives another saving.
* A bad, altered or foreign adapter is refused by name, and leaves nothing behind; a
  folder that is no adapter gets a line that says what to pass.
* An adapter that does not say its base gets a note; a copy of the base that has another
  fingerprint gets it by `--any-base`.
* Merging gives the adapter's answers and leaves the model alone.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import every_variant
from torch import Tensor

import adapters
import loading
import lora
import reward_model
import sample
from model import Qwen
from plumbing.files import UserError, write_checksums

TOKENS = torch.randint(448, (2, 20), generator=torch.Generator().manual_seed(0))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Qwen:
    return loading.load(folder, dtype=dtype)[0]


def loud(model: Qwen, name: str, rank: int = 3, alpha: float = 7, seed: int = 1):
    """Attach an adapter that says something: B ≠ 0, and α / r no round number."""
    lora.attach(model, name, rank, alpha, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.layers(model).values():
        layer.lora_B[name].data.normal_(0, 0.05, generator=generator)
    return model


@torch.no_grad()
def logits(model: Qwen, name: str | None = None) -> Tensor:
    with lora.using(model, name):
        return model.logits(model(TOKENS))


def tensors_of(model: Qwen, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in lora.parameters(model, name)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# ------------------------------------------------------------------------------- [L1]


@every_variant
def test_an_untrained_adapter_is_the_base_bit_for_bit(checkpoint, variant):
    model = load(checkpoint(variant))
    before = logits(model)
    lora.attach(model, "policy", rank=4, alpha=8)
    adapter = lora.parameters(model, "policy")
    assert len(adapter) == 2 * 7 * 2  # A and B, seven places, two blocks
    assert all(a.any() for a in adapter[0::2])
    assert not any(b.any() for b in adapter[1::2])
    assert torch.equal(logits(model, "policy"), before)


@every_variant
def test_value_and_gradients_are_those_of_the_dense_sum(checkpoint, variant):
    # [L1] against W + α/r·BA written out as one matrix, with autograd through it.
    model = loud(load(checkpoint(variant), torch.float64), "policy")
    generator = torch.Generator().manual_seed(3)
    for name, layer in lora.layers(model).items():
        out, width = layer.base.weight.shape
        x = torch.randn(5, width, generator=generator).double()
        weigh = torch.randn(5, out, generator=generator).double()
        a, b = (part["policy"].detach().clone().requires_grad_()
                for part in (layer.lora_A, layer.lora_B))
        dense = layer.base.weight + 7 / 3 * (b @ a)
        want = torch.nn.functional.linear(x, dense, layer.base.bias)
        (want * weigh).sum().backward()
        with lora.using(model, "policy"):
            have = layer(x)
        (have * weigh).sum().backward()
        for mine, its in ((have, want), (layer.lora_A["policy"].grad, a.grad),
                          (layer.lora_B["policy"].grad, b.grad)):
            assert (mine - its).norm() < 1e-12 * its.norm(), name


def test_a_starts_from_the_seed_alone_within_pefts_bounds(checkpoint):
    first, second = (load(checkpoint("qwen2-tied")) for _ in range(2))
    lora.attach(first, "policy", 4, 8, seed=5)
    lora.attach(second, "another", 2, 4, seed=9)
    torch.rand(7)  # neither adapters that came before nor global draws count
    lora.attach(second, "policy", 4, 8, seed=5)
    lora.attach(second, "third", 4, 8, seed=6)
    assert same(tensors_of(first, "policy"), tensors_of(second, "policy"))
    assert not same(tensors_of(first, "policy"), tensors_of(second, "third"))
    for layer in lora.layers(first).values():
        bound, a = 1 / math.sqrt(layer.base.in_features), layer.lora_A["policy"]
        assert 0.9 * bound < a.abs().max() <= bound
        assert a.mean().abs() < 0.2 * bound


def test_a_shallow_adapter_changes_the_lower_blocks_alone(checkpoint, tmp_path):
    model = load(checkpoint("qwen2-tied"))
    lora.attach(model, "policy", 2, 4, seed=1)  # another one, in all blocks
    lora.attach(model, "reward", 2, 4, seed=1, depth=1)
    assert len(lora.parameters(model, "reward")) == 2 * 7
    for layer in lora.layers(model, "reward").values():
        layer.lora_B["reward"].data.fill_(0.1)
    lora.save(model, "reward", tmp_path / "out", "base")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0]
    with safetensors.safe_open(tmp_path / "out" / "adapter_model.safetensors",
                               "pt") as file:
        assert len(file.keys()) == 2 * 7
        assert all(".layers.0." in key for key in file.keys())
    again = load(checkpoint("qwen2-tied"))
    lora.load(again, "reward", tmp_path / "out")
    assert torch.equal(logits(again, "reward"), logits(model, "reward"))
    assert not torch.equal(logits(model, "reward"), logits(model))
    lora.detach(model, "reward")
    assert len(lora.parameters(model, "policy")) == 2 * 7 * 2


@pytest.mark.parametrize(("name", "rank", "message"), [
    ("policy", 2, "there is an adapter 'policy' already"), ("new", 0, "rank is 0")])
def test_a_bad_attachment_is_refused(checkpoint, name, rank, message):
    model = loud(load(checkpoint("qwen2-tied")), "policy")
    before = tensors_of(model, "policy")
    with pytest.raises(UserError, match=message):
        lora.attach(model, name, rank, 4)
    assert list(model.adapters) == ["policy"]
    assert same(tensors_of(model, "policy"), before)


# ---------------------------------------------------------------------- one at a time


def test_using_nests_and_gives_the_word_back_even_after_an_error(checkpoint):
    model = loud(loud(load(checkpoint("qwen2-tied")), "policy"), "reward", seed=2)
    assert model.active.name is None
    with lora.using(model, "policy"):
        with lora.using(model, "reward"):
            assert model.active.name == "reward"
            with lora.using(model, None):
                assert model.active.name is None
        assert model.active.name == "policy"
        with pytest.raises(ZeroDivisionError), lora.using(model, "reward"):
            _ = 1 / 0
        assert model.active.name == "policy"
        known = r"no adapter 'judge'.*\['policy', 'reward'\]"
        with pytest.raises(UserError, match=known):
            with lora.using(model, "judge"):
                pytest.fail("an unknown adapter spoke")
        assert model.active.name == "policy"
    assert model.active.name is None


def test_a_bare_model_speaks_for_itself_and_knows_no_adapter(checkpoint):
    model = load(checkpoint("qwen2-tied"))
    with lora.using(model, None):
        pass
    with pytest.raises(UserError, match="no adapter 'policy'; there are none"):
        with lora.using(model, "policy"):
            pytest.fail("an unknown adapter spoke")


def test_adapters_do_not_leak_into_one_another(checkpoint):
    model = load(checkpoint("qwen3-untied"))
    base = logits(model)
    alone = logits(loud(model, "policy"), "policy")
    loud(model, "reward", rank=5, alpha=3, seed=2)
    assert torch.equal(logits(model), base)
    assert torch.equal(logits(model, "policy"), alone)
    other = logits(model, "reward")
    assert (alone - base).abs().max() > 0.1
    assert (other - base).abs().max() > 0.1
    assert (other - alone).abs().max() > 0.1
    with lora.using(model, "policy"):
        model(TOKENS).sum().backward()
    assert all(p.grad is not None for p in lora.parameters(model, "policy"))
    assert all(p.grad is None for p in lora.parameters(model, "reward"))
    lora.detach(model, "policy")
    assert torch.equal(logits(model, "reward"), other)
    assert torch.equal(logits(model), base)


def test_training_moves_the_trained_adapter_and_nothing_else(checkpoint):
    model = loud(loud(load(checkpoint("qwen2-untied-sharded")), "policy"), "reward")
    asked = {id(p) for p in model.parameters() if p.requires_grad}
    assert asked == {id(p) for name in ("policy", "reward")
                     for p in lora.parameters(model, name)}
    base = {n: p.clone() for n, p in loading.base_parameters(model).items()}
    policy, reward = tensors_of(model, "policy"), tensors_of(model, "reward")
    # The optimiser is given everything: who does not ask for a gradient stays put.
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0)
    for _ in range(3):
        optimiser.zero_grad()
        with lora.using(model, "policy"):
            model.logits(model(TOKENS)).square().mean().backward()
        optimiser.step()
    after = loading.base_parameters(model)
    assert after.keys() == base.keys()
    assert all(torch.equal(after[n], base[n]) for n in base)
    assert same(tensors_of(model, "reward"), reward)
    moved = zip(tensors_of(model, "policy"), policy, strict=True)
    assert not any(torch.equal(new, old) for new, old in moved)


def test_a_bf16_base_keeps_fp32_adapters(checkpoint):
    model = loud(load(checkpoint("qwen2-tied"), torch.bfloat16), "policy")
    with lora.using(model, "policy"):
        hidden = model(TOKENS)
        hidden.float().sum().backward()
    assert hidden.dtype == torch.bfloat16
    for p in lora.parameters(model, "policy"):
        assert p.dtype == p.grad.dtype == torch.float32
    # An update far below bf16's last digit survives.
    weight = lora.parameters(model, "policy")[0]
    before = weight.detach().clone()
    weight.data.mul_(1 + 1e-5)
    assert not torch.equal(weight, before)


# ------------------------------------------------------------------------------ files


@pytest.fixture
def saved(checkpoint, tmp_path):
    """(folder of an adapter for qwen2-tied, its tensors, its logits)."""
    model = loud(load(checkpoint("qwen2-tied")), "policy")
    lora.save(model, "policy", tmp_path / "adapter", str(checkpoint("qwen2-tied")))
    return tmp_path / "adapter", tensors_of(model, "policy"), logits(model, "policy")


def test_saving_and_loading_keep_every_bit(checkpoint, saved):
    folder, tensors, want = saved
    model = load(checkpoint("qwen2-tied"))
    lora.load(model, "again", folder)
    assert same(tensors_of(model, "again"), tensors)
    assert torch.equal(logits(model, "again"), want)
    lora.save(model, "again", folder.parent / "twice", str(checkpoint("qwen2-tied")))
    # Not the bytes of the file: safetensors writes its metadata in any order.
    first, second = (safetensors.torch.load_file(f / "adapter_model.safetensors")
                     for f in (folder, folder.parent / "twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.peer
@every_variant
def test_peft_reads_our_adapter_with_equal_logits(checkpoint, tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = loud(load(checkpoint(variant)), "policy")
    lora.save(model, "policy", tmp_path, str(checkpoint(variant)))
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint(variant), dtype=torch.float32), tmp_path)
    with torch.no_grad():
        want = theirs(TOKENS).logits
    assert (want - logits(model)).abs().max() > 0.1  # PEFT did not read it as nothing
    assert (want - logits(model, "policy")).abs().max() < 1e-5


@pytest.mark.peer
@every_variant
@pytest.mark.parametrize("places", [lora.PROJECTIONS, ("q_proj", "v_proj")])
def test_we_read_pefts_adapter_with_equal_logits(checkpoint, tmp_path, variant, places):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint(variant), dtype=torch.float32),
        peft.LoraConfig(r=3, lora_alpha=7, target_modules=list(places),
                        task_type="CAUSAL_LM", lora_dropout=0.1)).eval()
    generator = torch.Generator().manual_seed(4)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.05, generator=generator)
    theirs.save_pretrained(tmp_path)
    model = load(checkpoint(variant))
    lora.load(model, "policy", tmp_path)
    with torch.no_grad():
        want = theirs(TOKENS).logits
    assert (want - logits(model)).abs().max() > 0.1
    assert (want - logits(model, "policy")).abs().max() < 1e-5


# PEFT's own matching: `q_proj` is the end of a path after a dot, `^` is its start, the
# first key counts (in the order of the file, which PEFT sorts, as these are), and a key
# that matches nothing does nothing.
RANKS = {r"^model\.layers\.0\.mlp\..*": 6, "layers.0.self_attn.q_proj": 3,
         r"layers\.1\..*\.(k|v)_proj": 2, "q_proj": 5}
ALPHAS = {r".*\.mlp\.\w+": 2.5, "model.layers.0.self_attn.q_proj": 11, "proj": 99,
          "q_proj": 20, "up_proj": 50}
CONFIGS = {  # what PEFT's LoraConfig is given besides r = 4, alpha = 7 and seven places
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": RANKS},
    "alphas": {"alpha_pattern": ALPHAS},
    "rslora, ranks, alphas": {"use_rslora": True, "rank_pattern": RANKS,
                              "alpha_pattern": ALPHAS},
    "one block": {"layers_to_transform": 1},
    "one block of a list": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "a regex": {"target_modules": r".*\.(0\.self_attn|1\.mlp)\.(q|up)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "paths": {"target_modules": ["layers.0.self_attn.q_proj", "model.layers.1.mlp."
                                 "up_proj"], "rank_pattern": {"up_proj": 9}},
    "exclusion": {"exclude_modules": ["layers.0.mlp.up_proj", "v_proj"]},
    "exclusion by regex": {"exclude_modules": r".*\.0\..*"},
    "another layout": {"fan_in_fan_out": True},  # PEFT ignores it, with a warning
    "a rank above the width": {"r": 100, "target_modules": ["q_proj"]},
    **{f"a {start} start": {"init_lora_weights": start} for start in (
        False, "gaussian", "eva", "orthogonal", "mica")},
}


def peft_model(folder: Path, adapter: Path | None = None, **changes: object):
    """A PEFT model over a checkpoint: from an adapter's folder, or new and loud."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder,
                                                             dtype=torch.float32)
    if adapter:
        return peft.PeftModel.from_pretrained(base, adapter)
    chosen = {"r": 4, "lora_alpha": 7, "target_modules": list(lora.PROJECTIONS),
              "task_type": "CAUSAL_LM"} | changes
    theirs = peft.get_peft_model(base, peft.LoraConfig(**chosen)).eval()
    generator = torch.Generator().manual_seed(4)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.normal_(0, 0.1, generator=generator)
    return theirs


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
def test_what_pefts_config_says_gives_its_logits_here_and_saved_again(
        checkpoint, tmp_path, case):
    base = checkpoint("qwen2-untied-sharded")
    theirs = peft_model(base, **CONFIGS[case])
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = theirs(TOKENS).logits
    model = load(base)
    lora.load(model, "policy", tmp_path / "theirs")
    have = logits(model, "policy")
    assert (want - logits(model)).abs().max() > 0.05
    assert (want - have).abs().max() < 1e-5
    # Once more by our own hand: the same in both again.
    lora.save(model, "policy", tmp_path / "ours", str(base))
    lora.load(model, "again", tmp_path / "ours")
    assert torch.equal(logits(model, "again"), have)
    with torch.no_grad():
        again = peft_model(base, tmp_path / "ours")(TOKENS).logits
    assert (want - again).abs().max() < 1e-5


def test_rank_and_scale_follow_the_first_key_that_matches():
    size = adapters.Size(4, 8, True, RANKS, ALPHAS)
    layer = "model.layers.{}.{}".format
    for path, rank, alpha in ((layer(0, "mlp.up_proj"), 6, 2.5),
                              (layer(1, "mlp.up_proj"), 4, 2.5),
                              (layer(0, "self_attn.q_proj"), 3, 11),
                              (layer(1, "self_attn.q_proj"), 5, 20),
                              (layer(1, "self_attn.v_proj"), 2, 8),
                              (layer(0, "self_attn.v_proj"), 4, 8)):
        assert size.rank_of(path) == rank
        assert size.scale_of(path) == alpha / math.sqrt(rank)
        plain = adapters.dataclasses.replace(size, use_rslora=False)
        assert plain.scale_of(path) == alpha / rank


def test_merging_heeds_what_the_config_says_of_the_scale(checkpoint, saved):
    settings(use_rslora=True, alpha_pattern={"up_proj": 2})(saved[0])
    model, plain = load(checkpoint("qwen2-tied")), load(checkpoint("qwen2-tied"))
    lora.load(model, "policy", saved[0])
    want = logits(model, "policy")
    assert (want - saved[2]).abs().max() > 0.1
    plain.load_state_dict(lora.merged(model, "policy"))
    assert (logits(plain) - want).abs().max() < 1e-5


@pytest.mark.peer
def test_every_field_of_pefts_config_is_decided_once():
    peft = pytest.importorskip("peft")
    known = [*adapters.READ, *adapters.SILENT, *adapters.REFUSED]
    assert len(known) == len(set(known))
    fields = {f.name for f in adapters.dataclasses.fields(peft.LoraConfig)}
    assert fields <= set(known)


@pytest.mark.parametrize(("kept", "targets", "blocks"), [
    ("q_proj|up_proj", ["q_proj", "up_proj"], None),
    (r"1.*(q_proj|up_proj)", ["q_proj", "up_proj"], [1]),
    (r"0.*q_proj|1.*up_proj", ["model.layers.0.self_attn.q_proj",
                               "model.layers.1.mlp.up_proj"], None)])
def test_layers_that_an_adapter_leaves_out_are_not_written(checkpoint, saved, kept,
                                                           targets, blocks):
    tensors(lambda content: [content.pop(key) for key in list(content)
                             if not re.search(kept, key)])(saved[0])
    model = load(checkpoint("qwen2-tied"))
    lora.load(model, "policy", saved[0])
    lora.save(model, "policy", saved[0].parent / "again", "base")
    config = json.loads((saved[0].parent / "again/adapter_config.json").read_text())
    assert config["target_modules"] == targets
    assert config.get("layers_to_transform") == blocks
    lora.load(model, "again", saved[0].parent / "again")
    assert same(tensors_of(model, "again"), tensors_of(model, "policy"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_float_type_load_into_fp32(checkpoint, saved, dtype):
    def cast(content: dict[str, Tensor]) -> None:
        content.update({key: value.to(dtype) for key, value in content.items()})

    tensors(cast)(saved[0])
    model = load(checkpoint("qwen2-tied"))
    lora.load(model, "policy", saved[0])
    assert {p.dtype for p in lora.parameters(model, "policy")} == {torch.float32}
    assert same(tensors_of(model, "policy"), [t.to(dtype).float() for t in saved[1]])


@pytest.mark.parametrize("rename", [
    lambda key: key.replace(".weight", ".default.weight"),
    lambda key: key.removeprefix("base_model.model."),
    lambda key: key.removeprefix("base_model.model.").replace(".weight", ".x.weight")])
def test_names_of_a_state_dict_saved_as_it_is_are_read(checkpoint, saved, rename):
    def change(content: dict[str, Tensor]) -> None:
        renamed = {rename(key): value for key, value in content.items()}
        content.clear()
        content.update(renamed)

    tensors(change)(saved[0])
    model = load(checkpoint("qwen2-tied"))
    lora.load(model, "policy", saved[0])
    assert torch.equal(logits(model, "policy"), saved[2])


SAID = {  # what a config says that makes no other model of A and B
    "task_type": "SEQ_CLS", "peft_version": "9.1", "base_model_name_or_path": None,
    "revision": "main", "auto_mapping": {"base_model_class": "X"},
    "inference_mode": False, "runtime_config": {"ephemeral_gpu_offload": True},
    "lora_dropout": 0.3, "fan_in_fan_out": True, "layers_pattern": "layers",
    "eva_config": {"rho": 2.0}, "corda_config": {"x": 1}, "loftq_config": {"x": 1},
    "lora_ga_config": {"x": 1}, "qalora_group_size": 16, "megatron_core": "megatron",
    "ensure_weight_tying": True, "target_modules": "all-linear", "bias": "none",
    "exclude_modules": "no.*", "layers_to_transform": [0, 1], "use_rslora": False,
    "rank_pattern": None, "alpha_pattern": {}, "init_lora_weights": "Gaussian",
    "a_key_of_next_year": None, "another": False, "a_third": [], "a_fourth": {},
    "use_dora": False, "layer_replication": None, "modules_to_save": [],
}


@pytest.mark.parametrize("key", SAID)
def test_what_changes_nothing_may_say_anything(checkpoint, saved, key):
    settings(**{key: SAID[key]})(saved[0])
    model = load(checkpoint("qwen2-tied"))
    lora.load(model, "policy", saved[0])
    assert torch.equal(logits(model, "policy"), saved[2])


def test_what_changes_nothing_is_tried_key_by_key():
    assert set(adapters.SILENT) <= set(SAID)


# --------------------------------------------------------------------------- refusals


def settings(**changes: object):
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        write_checksums(folder, lora.FILES)  # as if somebody had made it so
    return apply


def tensors(change, fingerprint: bool = True):
    """A breaker that applies `change` to the dict of tensors."""
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata()
        content = safetensors.torch.load_file(path)
        change(content)
        safetensors.torch.save_file(content, path, metadata if fingerprint else None)
        write_checksums(folder, lora.FILES)
    return apply


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"


def poisoned(content: dict[str, Tensor]) -> None:
    content[KEY.format("B")][3, 1] = float("inf")


def wider(content: dict[str, Tensor]) -> None:
    content[KEY.format("B")] = torch.ones(33, 3)


def lost(part: str):
    return tensors(lambda content: content.pop(KEY.format(part)))


def extended(content: dict[str, Tensor]) -> None:
    content["base_model.model.score.weight"] = torch.ones(2)


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    write_checksums(folder, lora.FILES)


def bit_flipped(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def removed(name: str):
    def apply(folder: Path) -> None:
        (folder / name).unlink()
        (folder / "SHA256SUMS").unlink()
    return apply


def thin(folder: Path) -> None:
    settings(r=1000)(folder)
    tensors(lambda t: t.update({key: torch.ones(1000, 1) if "lora_A" in key
                                else torch.ones(1) for key in t}))(folder)


def as_type(dtype: torch.dtype, value: float | None = None):
    def change(content: dict[str, Tensor]) -> None:
        weight = content[KEY.format("B")]
        content[KEY.format("B")] = (
            weight if value is None else torch.full_like(weight, value)).to(dtype)
    return change


def said(key: str, value: object) -> str:
    """A refusal names key and value as they stand in the file."""
    return re.escape(f"{json.dumps({key: value})[1:-1]}: ") + ".* no.? a? ?plain LoRA"


WORDS = [  # what makes another model of the same A and B, and what nobody knows yet
    ("use_dora", True), ("use_dora", "false"), ("use_qalora", True),
    ("lora_bias", True), ("bias", "all"), ("bias", "lora_only"), ("bias", True),
    ("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1, 2]),
    ("target_parameters", ["mlp.up_proj.weight"]),
    ("layer_replication", [[0, 2], [0, 2]]), ("alora_invocation_tokens", [5]),
    ("arrow_config", {"top_k": 2}), ("megatron_config", {"x": 1}),
    ("monteclora_config", {"num_samples": 8}), ("kasa_config", {"beta": 1}),
    ("use_bdlora", {"nblocks": 2}), ("velora_config", {"num_groups": 2}),
    ("a_key_of_next_year", 16), ("use_xlora", True), ("sch\u00f6n\n", "\u001b[2J"),
]
STRANGERS = {  # tensor → what the refusal says it is
    "model.layers.0.self_attn.q_proj.lora_magnitude_vector": "the magnitudes of DoRA",
    "model.embed_tokens.lora_embedding_A": "an adapter of the embedding",
    "lm_head.lora_A.weight": "an adapter of another layer",
    "model.layers.0.self_attn.q_norm.lora_A.weight": "an adapter of another layer",
    "model.layers.0.self_attn.q_proj.lora_B.bias": "a bias",
    "model.layers.0.self_attn.q_proj.bias": "a bias",
    "model.layers.0.self_attn.q_proj.base_layer.weight": "weights of the base",
    "lm_head.modules_to_save.default.weight": "a layer that was trained whole",
    "model.embed_tokens.token_adapter.trainable_tokens_delta": "embeddings of single",
    "model.embed_tokens.weight": "a whole weight: a head, or a base with added tokens",
}


REFUSALS = {  # what is wrong → who breaks it so, and what the message must say
    "a flipped bit": (bit_flipped, r"adapter_model\.safetensors is not the file"),
    "no config": (removed("adapter_config.json"), r"cannot read .*adapter_config"),
    "no file": (removed("adapter_model.safetensors"), r"adapter_model\.safetensors"),
    "truncated": (truncated, r"adapter_model\.safetensors is truncated"),
    "not LoRA": (settings(peft_type="LOHA"), r'not a LoRA adapter: .* = "LOHA"'),
    "no type": (settings(peft_type=None), r"not a LoRA adapter: .* = null"),
    **{f"{key} = {value!r}": (settings(**{key: value}), said(key, value))
       for key, value in WORDS},
    **{f"a {start} start": (settings(init_lora_weights=start),
                            f'"init_lora_weights": {json.dumps(start)}, and only true')
       for start in ("pissa", "pissa_niter_4", "PiSSA", "olora", "corda", "loftq",
                     "lora_ga", "next_years", 3)},
    "rsLoRA by word": (settings(use_rslora="false"), 'use_rslora is "false"; it must'),
    "another rank by pattern": (settings(rank_pattern={"q_proj": 8}),
                                r"q_proj has shape \[3, \d+\], .*json says r = 8"),
    **{f"{key} is {value!r}": (settings(**{key: value}), rf"{key} must map names")
       for key, value in [("rank_pattern", ["q_proj"]), ("rank_pattern", {"q": 2.5}),
                          ("rank_pattern", {"q": True}), ("alpha_pattern", {"q": "2"}),
                          ("alpha_pattern", {"q": math.nan}), ("alpha_pattern", "q"),
                          ("rank_pattern", {f"q{i}": 1 for i in range(3000)})]},
    "rank 0 by pattern": (settings(rank_pattern={"k_proj": 0}), "k_proj.* r = 0"),
    "outside the targets": (settings(target_modules=["q_proj", "up_proj"]),
                            r"adapts model\.layers\.0\.self_attn\.k_proj, but target"),
    "outside the blocks": (settings(layers_to_transform=[0]),
                           r"adapts model\.layers\.1\..* leave it out"),
    "an excluded layer": (settings(exclude_modules=["0.mlp.up_proj"]),
                          r"adapts model\.layers\.0\.mlp\.up_proj, but"),
    "8-bit tensors": (tensors(as_type(torch.int8)), r"is torch\.int8; save it in fp32"),
    "fp8 tensors": (tensors(as_type(torch.float8_e4m3fn)), r"is torch\.float8_e4m3fn"),
    "an infinity in fp16": (tensors(as_type(torch.float16, math.inf)), "not finite"),
    "two adapters": (tensors(lambda t: t.update(
        {key.replace(".weight", ".other.weight"): t[key].clone()
         for key in list(t)[:4]})),
        r"several adapters \(None, other\)"),
    "two adapters that share the blocks": (tensors(lambda t: [t.update(
        {key.replace(".weight", ".other.weight"): t.pop(key)})
        for key in list(t) if ".1." in key]), r"several adapters \(None, other\)"),
    **{f"a tensor called {name}": (
        tensors(lambda t, name=name: t.update({f"base_model.model.{name}":
                                               torch.ones(2)})),
        rf"unknown tensor.*{name.replace('.', '[.]')}.*\({sense}")
       for name, sense in STRANGERS.items()},
    "another block": (tensors(lambda t: t.update(
        {KEY.format("A").replace(".1.", ".7."): torch.ones(3, 64)})),
        r"this base has no model\.layers\.7\.self_attn\.v_proj"),
    "another rank": (settings(r=4), r"has shape \[3, \d+\], .*json says r = 4"),
    "an absurd rank": (settings(r=10**12), "json says r = 1000000000000"),
    "a large rank in a small file": (thin, r"has shape \[1000, 1\].*r = 1000"),
    "rank 0": (settings(r=0), r"json says r = 0"),
    "rank of text": (settings(r="3"), "r and lora_alpha must be numbers"),
    "no alpha": (settings(lora_alpha=None), "r and lora_alpha must be numbers"),
    "alpha is NaN": (settings(lora_alpha=math.nan), "r and lora_alpha must be"),
    "wrong shape": (tensors(wider), r"v_proj.* has shape \[33, 3\], .* \[32, 3\]"),
    "not finite": (tensors(poisoned), r"lora_B of .*v_proj holds .* not finite"),
    "unknown tensor": (tensors(extended), r"unknown tensor.*model\.score\.weight"),
    "B without A": (lost("A"), r"lacks lora_A of .*v_proj"),
    "A without B": (lost("B"), r"lacks lora_B of .*v_proj"),
    "nothing": (tensors(dict.clear), "holds no tensors"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_adapter_is_refused_by_name_and_leaves_nothing(checkpoint, saved, case):
    folder, good, want = saved
    breaker, message = REFUSALS[case]
    bad = shutil.copytree(folder, folder.parent / "bad")
    breaker(bad)
    model = load(checkpoint("qwen2-tied"))
    base = logits(model)
    with pytest.raises(UserError, match=message):
        lora.load(model, "policy", bad)
    assert_bare(model, base)
    lora.load(model, "policy", folder)  # the name is free, and the good one fits
    assert torch.equal(logits(model, "policy"), want)
    assert same(tensors_of(model, "policy"), good)


def assert_bare(model: Qwen, base: Tensor) -> None:
    assert not getattr(model, "adapters", {})
    assert not [n for n, _ in model.named_parameters() if ".lora_" in n]
    assert torch.equal(logits(model), base)


def test_every_refused_word_is_tried():
    assert set(adapters.REFUSED) <= {key for key, _ in WORDS}


@pytest.mark.parametrize("key", [
    "(a*)*b", "(.|.)" * 40, ".*.*.*.*.*x", "(?=(a+))", "[",
    "a{9999999999}", "\\", "(" * 5000, "x" * 600 + "*", "(a?){30}",
    "(" + "|".join("." * 50) + ")x"])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_regex_that_may_run_for_years_is_refused(checkpoint, saved, field, key):
    settings(**{field: {key: 3}})(saved[0])
    begin = time.monotonic()
    with pytest.raises(UserError, match=f"{field}: .* not a regex that is simple"):
        lora.load(load(checkpoint("qwen2-tied")), "policy", saved[0])
    assert time.monotonic() - begin < 5


def test_many_regexes_are_refused_and_many_names_are_not(checkpoint, saved):
    settings(rank_pattern={f"q_{i}.*": 3 for i in range(9)})(saved[0])
    with pytest.raises(UserError, match="name the layers one by one"):
        lora.load(load(checkpoint("qwen2-tied")), "policy", saved[0])
    settings(rank_pattern={f"layers.{i}.q_proj": 3 for i in range(999)})(saved[0])
    lora.load(load(checkpoint("qwen2-tied")), "policy", saved[0])


def test_an_adapter_of_another_base_is_refused(checkpoint, saved):
    model = load(checkpoint("qwen2-tied"))
    model.model.layers[0].mlp.up_proj.weight.mul_(1.05)  # same sizes, other weights
    base = logits(model)
    with pytest.raises(UserError, match=r"trained on another base model .*qwen2-tied"):
        lora.load(model, "policy", saved[0])
    assert_bare(model, base)


def test_an_adapter_without_fingerprint_must_still_fit_the_base(checkpoint, saved):
    tensors(lambda _: None, fingerprint=False)(saved[0])
    model = load(checkpoint("qwen3-untied"))
    base = logits(model)
    with pytest.raises(UserError, match=r"has shape .* this base asks for"):
        lora.load(model, "policy", saved[0])
    assert_bare(model, base)


def test_an_adapter_that_does_not_say_its_base_gets_a_note(checkpoint, saved, capsys):
    model = load(checkpoint("qwen2-tied"))
    lora.load(model, "ours", saved[0])
    assert capsys.readouterr().err == ""  # ours says it
    tensors(lambda _: None, fingerprint=False)(saved[0])
    for name, shown in (("some/base", '"some/base"'), ("\x1b[2J\n", r'"\u001b[2J\n"'),
                        (None, "null"), ("x" * 5000, "xxx …")):
        settings(base_model_name_or_path=name)(saved[0])
        lora.load(model, "policy", saved[0])
        printed = capsys.readouterr().err
        assert printed.startswith("note: ")
        assert shown in printed
        assert printed.count("\n") == 1
        assert len(printed) < 1000
        lora.detach(model, "policy")
    settings(r=4)(saved[0])
    with pytest.raises(UserError, match=r'made for "xxx.* with --model'):
        lora.load(model, "policy", saved[0])
    assert capsys.readouterr().err == ""  # a refusal is one line


def copy_of(base: Path, folder: Path, change, **config: object) -> Path:
    """A checkpoint whose tensors went through `change`."""
    shutil.copytree(base, folder)
    content = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file({key: change(key, value) for key, value
                                 in content.items()}, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def padded(key: str, weight: Tensor) -> Tensor:
    more = torch.zeros(64, weight.shape[-1])
    return torch.cat([weight, more]) if "embed_tokens" in key else weight


def test_a_bf16_copy_is_the_same_base(checkpoint, saved, tmp_path, capsys):
    copy = copy_of(checkpoint("qwen2-tied"), tmp_path / "copy",
                   lambda _, weight: weight.bfloat16())
    for dtype in (torch.float32, torch.bfloat16):
        lora.load(load(copy, dtype), "policy", saved[0])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("change", "config"), [
    (lambda _, weight: weight.half(), {}), (padded, {"vocab_size": 512})])
def test_any_base_lets_a_copy_in_that_has_another_fingerprint(
        checkpoint, saved, tmp_path, capsys, change, config):
    copy = copy_of(checkpoint("qwen2-tied"), tmp_path / "copy", change, **config)
    model = load(copy)
    with pytest.raises(UserError, match=r"another base model .* with --any-base"):
        lora.load(model, "policy", saved[0])
    assert_bare(model, logits(model))
    lora.load(model, "policy", saved[0], any_base=True)
    printed = capsys.readouterr().err
    assert printed.startswith(f"note: --any-base: {saved[0]} WAS TRAINED ON OTHER")
    assert printed.count("\n") == 1
    assert (logits(model, "policy")[..., :448] - saved[2]).abs().max() < 0.02


def test_the_chat_takes_any_base_and_its_reward_model(checkpoint, saved, tmp_path,
                                                      capsys):
    base = load(checkpoint("qwen2-tied"))
    lora.attach(base, "reward", 2, 4, depth=1)
    reward_model.RewardModel(base, ["good"], 1).save(tmp_path / "reward", "base", {})
    copy = copy_of(checkpoint("qwen2-tied"), tmp_path / "copy", padded, vocab_size=512)
    argv = ["Hello", "--model", str(copy), "--adapter", str(saved[0]), "--device",
            "cpu", "--reward", str(tmp_path / "reward"), "--max-new-tokens", "2"]
    with pytest.raises(UserError, match="--any-base"):
        sample.main(argv)
    sample.main([*argv, "--any-base"])
    printed = capsys.readouterr()
    assert printed.err.count("note: --any-base: ") == 2  # adapter and reward model
    assert printed.out.count("good 0.") == 2
    sample.main([*argv, "--any-base", "--model", str(checkpoint("qwen2-tied"))])
    assert "--any-base" not in capsys.readouterr().err  # where it is not needed


def test_a_pickle_is_never_opened_and_the_line_converts_it(checkpoint, saved):
    folder = saved[0].rename(saved[0].parent / "it's an adapter")
    content = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    torch.save(content, folder / "adapter_model.bin")
    removed("adapter_model.safetensors")(folder)
    model = load(checkpoint("qwen2-tied"))
    with pytest.raises(UserError, match=r"is a pickle, .* never opened") as caught:
        lora.load(model, "policy", folder)
    line = str(caught.value).partition("convert it: ")[2]
    line = line.replace("python -c", f"{sys.executable} -c")
    subprocess.run(["bash", "-c", line], check=True)
    lora.load(model, "policy", folder)
    assert torch.equal(logits(model, "policy"), saved[2])


@pytest.mark.parametrize(("places", "message"), [
    (["checkpoint-900", "checkpoint-1000"],
     r"2 of its folders do.*out/checkpoint-1000"),
    (["policy"], r"1 of its folders do: pass one of them, such as .*out/policy")])
def test_a_folder_of_adapters_says_which_to_pass(checkpoint, saved, places, message):
    for place in places:
        shutil.copytree(saved[0], saved[0].parent / "out" / place)
    with pytest.raises(UserError, match=message):
        lora.load(load(checkpoint("qwen2-tied")), "policy", saved[0].parent / "out")


@pytest.mark.parametrize(("place", "message"), [
    ("out", "out holds a whole model, such as a merged one, .* with --model"),
    ("out/checkpoint-7", "whole models: .* with --model, such as .*out/checkpoint-7")])
def test_a_whole_model_is_no_adapter(checkpoint, tmp_path, place, message):
    shutil.copytree(checkpoint("qwen2-tied"), tmp_path / place)
    with pytest.raises(UserError, match=message):
        lora.load(load(checkpoint("qwen2-tied")), "policy", tmp_path / "out")


def test_a_missing_folder_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no adapter folder"):
        lora.load(load(checkpoint("qwen2-tied")), "policy", tmp_path / "nowhere")


# ----------------------------------------------------------------------------- merging


@every_variant
def test_merged_weights_give_the_adapters_answers_and_change_nothing(
        checkpoint, variant):
    folder = checkpoint(variant)
    plain = load(folder)
    model = loud(loud(load(folder), "policy"), "reward", seed=2)
    want, base = logits(model, "policy"), logits(model)
    weights = lora.merged(model, "policy")
    assert torch.equal(logits(model, "policy"), want)
    assert torch.equal(logits(model), base)
    assert loading.fingerprint(model) == loading.fingerprint(plain)
    assert plain.load_state_dict(weights)
    assert (logits(plain) - want).abs().max() < 1e-5
    assert (want - base).abs().max() > 0.1


def test_merging_into_bf16_rounds_once(checkpoint):
    model = loud(load(checkpoint("qwen2-tied"), torch.bfloat16), "policy")
    weights = lora.merged(model, "policy")
    for name, layer in lora.layers(model).items():
        change = 7 / 3 * (layer.lora_B["policy"] @ layer.lora_A["policy"])
        want = (layer.base.weight.float() + change).bfloat16()
        have = weights[f"{name}.weight"]
        assert have.dtype == torch.bfloat16
        # One order of fp32 operations against another may flip a rounding, rarely.
        assert (have == want).float().mean() > 0.999
