"""Claims about lora.py.

* [L1]: a layer is W x + (α / r) B A x, in value and in gradient, and B = 0 is the base.
* One base, several adapters: adapters never leak into one another, `using` always gives
  the word back, and training moves nothing but the adapter that is trained.
* An adapter that we saved is the same in PEFT, and PEFT's is the same here.
* A bad, altered or foreign adapter is refused by name, and leaves nothing behind.
* Merging gives the adapter's answers and leaves the model alone.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import every_variant
from torch import Tensor

import loading
import lora
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


# --------------------------------------------------------------------------- refusals


def settings(**changes: object):
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        write_checksums(folder)  # as if somebody had made it so
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
        write_checksums(folder)
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
    write_checksums(folder)


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


REFUSALS = {  # what is wrong → who breaks it so, and what the message must say
    "a flipped bit": (bit_flipped, r"adapter_model\.safetensors is not the file"),
    "no config": (removed("adapter_config.json"), r"cannot read .*adapter_config"),
    "no file": (removed("adapter_model.safetensors"), r"adapter_model\.safetensors"),
    "truncated": (truncated, r"adapter_model\.safetensors is truncated"),
    "not LoRA": (settings(peft_type="LOHA"), r"not a plain LoRA adapter \(LOHA\)"),
    "DoRA": (settings(use_dora=True), r"not a plain LoRA adapter \(use_dora\)"),
    "rsLoRA": (settings(use_rslora=True), r"not a plain LoRA adapter \(use_rslora\)"),
    "ranks by layer": (settings(rank_pattern={"q_proj": 8}), r"\(rank_pattern\)"),
    "more modules": (settings(modules_to_save=["lm_head"]), r"\(modules_to_save\)"),
    "another rank": (settings(r=4), r"has shape \[3, \d+\], .*json says r = 4"),
    "an absurd rank": (settings(r=10**12), "json says r = 1000000000000"),
    "a large rank in a small file": (thin, r"has shape \[1000, 1\].*r = 1000"),
    "rank 0": (settings(r=0), r"json says r = 0"),
    "rank of text": (settings(r="3"), "r and lora_alpha must be numbers"),
    "no alpha": (settings(lora_alpha=None), "r and lora_alpha must be numbers"),
    "alpha is NaN": (settings(lora_alpha=math.nan), "r and lora_alpha must be"),
    "wrong shape": (tensors(wider), r"v_proj.* has shape \[33, 3\], .* \[32, 3\]"),
    "not finite": (tensors(poisoned), r"v_proj\.lora_B\.weight holds .* not finite"),
    "unknown tensor": (tensors(extended), r"unknown tensor.*model\.score\.weight"),
    "B without A": (lost("A"), r"lacks .*v_proj\.lora_A\.weight"),
    "A without B": (lost("B"), r"lacks .*v_proj\.lora_B\.weight"),
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
