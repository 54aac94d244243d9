"""Claims about sample.py.

* `sample_token` inverts the cumulative distribution: against a plain oracle, at both
  ends of [0, 1), around tokens of probability 0, and in frequency.
* The sampler's log-probs are the trainer's, whatever the temperature, the limit of the
  vocabulary, the active adapter and the lengths of the prompts.
* Neither the other prompts of a batch nor rows that have left it change a row.
* A response owns its tokens up to its end token, by length and not by token id.
* Random numbers depend on (seed, step, prompt) and on nothing else.
* Greedy decoding is the argmax of full forward passes.
* The chat prints what the base and the adapter say; bad input costs one line.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import lora
import sample
from logprob import token_logprobs
from model import Config, Qwen, pad_rows
from plumbing.files import UserError, one_line_errors, write_checksums
from sample import BLOCK, draw_uniforms, rollout, sample_token

V, VALID = 40, 37
ALMOST_ONE = 1 - 2**-53  # the largest float64 below 1
PROMPTS = [[7, 1], [2, 9, 30, 4, 11], [5, 8, 8, 36, 21, 0, 17, 3, 12]]
TOKENIZER = SimpleNamespace(stop_ids=[3, 5], valid=VALID)


def tiny(dtype: torch.dtype = torch.float64) -> Qwen:
    """A random model with confident opinions, and with an adapter that disagrees."""
    model = Qwen(Config(
        model_type="qwen2", vocab_size=V, hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        max_position_embeddings=32, rms_norm_eps=1e-6, rope_theta=1e4,
        tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(0)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator) * 0.4
        weight.data = (1 + noise if name.endswith("norm.weight") else noise).to(dtype)
    # The padding of the vocabulary has large logits: whoever forgets it samples it.
    model.lm_head.weight.data[VALID:] *= 20
    model.requires_grad_(False)
    lora.attach(model, "policy", rank=4, alpha=8)
    for path, layer in lora.layers(model).items():
        generator.manual_seed(len(path))
        layer.lora_B["policy"].data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def model():
    return tiny()


def uniforms(group_size: int, length: int, prompts: int = 3, seed: int = 0) -> Tensor:
    """The table of a step, (P, G, C)."""
    return torch.stack([draw_uniforms(seed, 0, p, group_size, length)
                        for p in range(prompts)])


@torch.no_grad()
def next_logits(model: Qwen, ids: list[int]) -> Tensor:
    """The oracle of this file: a full forward pass, no cache, no padding → (VALID,)."""
    return model.logits(model(torch.tensor([ids])))[0, -1, :VALID]


# ---------------------------------------------------------------------- sample_token


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_pick_inverts_the_cdf(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3000, 19, generator=generator)
    u = torch.rand(3000, generator=generator, dtype=torch.float64)
    u[:100], u[100:200] = 0.0, ALMOST_ONE
    ids, logp = sample_token(logits, temperature, u)
    z = logits.double().numpy() / temperature
    prob = np.exp(z - z.max(1, keepdims=True))
    prob /= prob.sum(1, keepdims=True)
    before = prob.cumsum(1) - prob  # id i owns [before_i, before_i + prob_i)
    wanted = (before <= u[:, None].numpy()).sum(1) - 1
    assert ids.tolist() == wanted.tolist()
    assert (ids[:100] == 0).all()
    assert (ids[100:200] == 18).all()
    assert len(set(ids[200:].tolist())) == 19
    np.testing.assert_allclose(logp, np.log(prob[range(3000), wanted]), atol=1e-5)
    assert logp.dtype == torch.float32


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7])
def test_pick_inverts_the_cdf_over_blocks_of_ids(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, size, generator=generator, dtype=torch.float64)
    logits[:, BLOCK // 2:BLOCK] = -math.inf  # a block may end with impossible ids
    u = torch.rand(400, generator=generator, dtype=torch.float64)
    u[:50], u[50:100] = 0.0, ALMOST_ONE
    cdf = logits.softmax(-1).cumsum(-1)
    wanted = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    ids, logp = sample_token(logits, 1.0, u)
    assert (ids[100:] == wanted[100:]).all()
    assert (ids[:50] == 0).all()
    assert (ids[50:100] == logits.isfinite().nonzero()[-1, 1]).all()
    torch.testing.assert_close(
        logp, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].float())


def test_tokens_of_probability_zero_are_never_picked():
    never = -math.inf
    for zero in (never, -1e4):  # impossible, and too unlikely for a float64
        logits = torch.tensor([[zero, 0.0, zero, zero, 0.0, zero]])
        edges = torch.tensor([0.0, 2**-1074, 0.5 - 2**-53, 0.5, ALMOST_ONE],
                             dtype=torch.float64)
        u = torch.cat([edges, torch.linspace(0, ALMOST_ONE, 1001, dtype=torch.float64)])
        ids, logp = sample_token(logits.expand(len(u), 6), 1.0, u)
        assert set(ids.tolist()) == {1, 4}
        assert (ids[0], ids[2], ids[4]) == (1, 1, 4)
        assert logp == pytest.approx(math.log(0.5))
    # A long sum does not end at exactly 1: a draw next to 1 must not slip past it.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 5000, generator=generator)
    logits[:, -10:] = never
    u = torch.full((50,), ALMOST_ONE, dtype=torch.float64)
    ids, _ = sample_token(logits, 1.0, u)
    assert (ids == 4989).all()


# --------------------------------------------------------------------------- rollout


def test_logits_that_are_not_finite_cost_one_line(model, monkeypatch):
    monkeypatch.setattr(sample, "linear", lambda hidden, head: torch.full(
        (len(hidden), len(head)), math.nan))
    with pytest.raises(UserError, match="logits are not finite; lower --lr"):
        rollout(model, TOKENIZER, PROMPTS[:1], uniforms(3, 4, prompts=1))


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_frequencies_are_those_of_softmax(model, temperature):
    draws = 20_000
    first = rollout(model, TOKENIZER, PROMPTS[1:2], uniforms(draws, 1, prompts=1),
                    temperature).tokens[:, 0]
    wanted = draws * (next_logits(model, PROMPTS[1]) / temperature).softmax(-1)
    found = torch.bincount(first, minlength=VALID)
    common = wanted > 10  # chi-square needs cells that are not nearly empty
    chi2 = float(((found - wanted) ** 2 / wanted)[common].sum())
    freedom = int(common.sum())
    assert freedom > 10
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)  # four sigma; the seed is fixed


@pytest.mark.parametrize("speaker", [None, "policy"])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_sampled_logp_is_what_the_scorer_says(temperature, speaker):
    model, group_size = tiny(torch.float32), 3
    table = uniforms(group_size, 12)
    with torch.no_grad(), lora.using(model, speaker):
        sampled = rollout(model, TOKENIZER, PROMPTS, table, temperature)
        responses = sampled.responses()
        for p, prompt in enumerate(PROMPTS):
            group = responses[p * group_size:(p + 1) * group_size]
            with model.shared_prefix(prompt) as prefix:
                rows = pad_rows([prompt[-1:] + r[:-1] for r in group], model.device)
                hidden = model(rows, prefix)  # (G, T, D)
            for g, response in enumerate(group):
                scored = token_logprobs(
                    hidden[g, :len(response)], model.unembed, torch.tensor(response),
                    temperature, VALID)
                found = sampled.logp[p * group_size + g]
                assert (found[:len(response)] - scored).abs().max() < 1e-5
                assert not found[len(response):].any()
                # The scorer shares code with the sampler; a full pass does not.
                for t, token in enumerate(response):
                    logits = next_logits(model, prompt + response[:t]) / temperature
                    assert abs(found[t] - logits.log_softmax(-1)[token]) < 1e-5
    assert len(set(map(len, responses))) > 2  # else nothing was padded or removed
    assert sampled.logp.dtype == torch.float32


def test_whoever_speaks_is_sampled(model):
    with lora.using(model, "policy"):
        aligned = rollout(model, TOKENIZER, PROMPTS, uniforms(3, 12))
    base = rollout(model, TOKENIZER, PROMPTS, uniforms(3, 12))
    assert aligned.responses() != base.responses()


def test_padding_of_the_vocabulary_is_never_sampled(model):
    everything = SimpleNamespace(stop_ids=[3, 5], valid=V)
    table = uniforms(8, 12)
    assert (rollout(model, everything, PROMPTS, table).tokens >= VALID).any()
    assert (rollout(model, TOKENIZER, PROMPTS, table).tokens < VALID).all()
    greedy = rollout(model, TOKENIZER, PROMPTS, table, temperature=0)
    assert (greedy.tokens < VALID).all()


def test_no_row_depends_on_its_company(model):
    table = uniforms(4, 14)
    together = rollout(model, TOKENIZER, PROMPTS, table)
    everyone = together.responses()
    # Rows left at different steps, and some never: removal is put to the test.
    assert 0 < together.ended.sum() < len(everyone)
    assert len(set(map(len, everyone))) > 3
    for p, prompt in enumerate(PROMPTS):
        alone = rollout(model, TOKENIZER, [prompt], table[p:p + 1])
        assert alone.responses() == everyone[4 * p:4 * p + 4]
        for g in range(4):
            row, b = rollout(model, TOKENIZER, [prompt], table[p:p + 1, g:g + 1]), 4*p+g
            n = len(everyone[b])
            assert row.responses() == [everyone[b]]
            assert row.ended[0] == together.ended[b]
            assert (row.logp[0, :n] - together.logp[b, :n]).abs().max() < 1e-6
    backwards = rollout(model, TOKENIZER, PROMPTS[::-1], table.flip(0))
    assert [backwards.responses()[i] for i in (8, 9, 10, 11)] == everyone[:4]


def steered(model, table: list[list[float]], stop_ids: list[int]):
    """A group whose draws are chosen: 0 takes id 0, ALMOST_ONE the last valid id."""
    tokenizer = SimpleNamespace(stop_ids=stop_ids, valid=VALID)
    return rollout(model, tokenizer, PROMPTS[1:2],
                   torch.tensor([table], dtype=torch.float64))


def test_masks_come_from_lengths(model):
    o, x, last = 0.0, ALMOST_ONE, VALID - 1
    found = steered(model, [
        [o, o, o, o],  # id 0, which also fills what a row does not own, to the end
        [o, x, o, o],  # ends at its second token
        [x, o, o, o],  # ends at once
        [o, o, o, x],  # ends with the last token there is room for
    ], [last])
    assert found.mask.tolist() == [
        [True, True, True, True], [True, True, False, False],
        [True, False, False, False], [True, True, True, True]]
    assert found.ended.tolist() == [False, True, True, True]
    assert found.tokens.tolist() == [
        [0, 0, 0, 0], [0, last, 0, 0], [last, 0, 0, 0], [0, 0, 0, last]]
    assert found.responses() == [[0, 0, 0, 0], [0, last], [last], [0, 0, 0, last]]
    assert bool((found.logp[found.mask] < 0).all())
    assert not found.logp[~found.mask].any()


def test_every_end_token_ends_and_nobody_waits_for_the_limit(model):
    o, x, last = 0.0, ALMOST_ONE, VALID - 1
    both = steered(model, [[x, x, x, x], [o, o, o, o]], [0, last])
    assert both.responses() == [[last], [0]]
    assert both.ended.all()
    early = steered(model, [[o, x, o, o], [o, o, x, o]], [last])
    assert early.tokens.shape == early.mask.shape == early.logp.shape == (2, 3)
    assert early.responses() == [[0, last], [0, 0, last]]


@pytest.mark.parametrize("speaker", [None, "policy"])
def test_greedy_is_the_argmax_of_full_passes(model, speaker):
    with lora.using(model, speaker):
        found = rollout(model, TOKENIZER, PROMPTS, uniforms(2, 10), temperature=0)
        for b, response in enumerate(found.responses()):
            ids, wanted = list(PROMPTS[b // 2]), []
            while len(wanted) < 10 and not set(wanted) & set(TOKENIZER.stop_ids):
                wanted.append(int(next_logits(model, ids + wanted).argmax()))
            assert response == wanted
    assert not found.logp.any()  # the one choice has probability 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_any_type_of_weights_gives_fp32_logp(dtype, temperature):
    found = rollout(tiny(dtype), TOKENIZER, PROMPTS, uniforms(2, 4), temperature)
    assert found.logp.dtype == torch.float32
    assert found.logp.isfinite().all()
    assert (found.tokens.dtype, found.mask.dtype) == (torch.int64, torch.bool)


def test_context_is_a_hard_limit(model):
    room = 32 - len(PROMPTS[2])
    fits = rollout(model, SimpleNamespace(stop_ids=[VALID - 1], valid=VALID), PROMPTS,
                   torch.zeros(3, 1, room, dtype=torch.float64))
    assert fits.mask.all()  # up to the very last place
    with pytest.raises(UserError, match=r"prompt of 9 tokens.*context of 32"):
        rollout(model, TOKENIZER, PROMPTS, uniforms(1, room + 1))


# --------------------------------------------------------------------------- uniforms


def test_uniforms_depend_on_seed_step_and_prompt_only():
    table = draw_uniforms(1, 2, 3, 4, 5)
    assert (table.shape, table.dtype) == ((4, 5), torch.float64)
    torch.manual_seed(9)
    np.random.seed(9)  # the point is that it does not matter
    assert torch.equal(table, draw_uniforms(1, 2, 3, 4, 5))
    keys = [(s, t, p) for s in range(4) for t in range(4) for p in range(4)]
    heads = {float(draw_uniforms(*key, 1, 1)) for key in keys}
    assert len(heads) == len(keys)  # also for (0, 0, 1), (0, 1, 0), …
    # A larger group keeps the draws of the smaller one.
    assert torch.equal(draw_uniforms(1, 2, 3, 6, 5)[:4], table)


def test_uniforms_fill_the_unit_interval_and_never_change():
    table = draw_uniforms(0, 0, 0, 100, 1000)
    assert 0 <= table.min() < 1e-4
    assert 1 - 1e-4 < table.max() < 1
    counts = torch.histc(table, 20, 0, 1)
    chi2 = float(((counts - 5000) ** 2 / 5000).sum())
    assert chi2 < 19 + 4 * math.sqrt(38)
    # A run resumes with other versions of numpy: the stream itself is pinned.
    assert draw_uniforms(0, 0, 0, 1, 2).tolist() == [
        [0.014067035665647709, 0.2577672456246177]]


# ------------------------------------------------------------------------------- chat


@pytest.fixture
def chat(monkeypatch, tmp_path):
    """`sample.main` over a tiny model; ids stand for text. And a run's folder."""
    tokenizer = SimpleNamespace(
        stop_ids=[3, 5], valid=VALID, chat=lambda text, system=None: PROMPTS[int(text)],
        decode=lambda ids: f" {ids} ")
    trained = tiny(torch.float32)
    run = tmp_path / "run"
    lora.save(trained, "policy", run / "adapter", "some/base")
    monkeypatch.chdir(tmp_path)
    Path("some/base").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"model": "some/base"}))

    def load(source, device):
        assert (source, device) == ("some/base", "cpu")
        fresh = tiny(torch.float32)
        lora.detach(fresh, "policy")
        return fresh, tokenizer

    monkeypatch.setattr(sample, "load", load)
    return SimpleNamespace(run=run, model=trained)


@pytest.mark.parametrize("temperature", ["0", "0.7"])
@pytest.mark.parametrize("inner", ["", "adapter"])  # the run, or the adapter itself
def test_chat_prints_the_base_and_the_aligned_answer(chat, capsys, inner, temperature):
    sample.main(["1", "--adapter", str(chat.run / inner), "--seed", "4",
                 "--max-new-tokens", "9", "--temperature", temperature])
    printed = capsys.readouterr().out.split("\n")
    answers = []
    for name in (None, "policy"):
        with lora.using(chat.model, name):
            answers += rollout(chat.model, TOKENIZER, PROMPTS[1:2],
                               draw_uniforms(4, 0, 0, 1, 9)[None],
                               float(temperature)).responses()
    assert answers[0] != answers[1]
    assert [line for line in printed if line] == [
        f"base: {answers[0]}", f"aligned: {answers[1]}"]


def test_chat_asks_until_the_input_ends(chat, capsys, monkeypatch):
    lines = iter(["1", "", "  ", "2"])

    def typed(_):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    sample.main(["--model", "some/base", "--max-new-tokens", "3"])
    answers = [line for line in capsys.readouterr().out.split("\n") if line]
    assert [a.split(":")[0] for a in answers] == ["base", "base"]


@pytest.mark.parametrize(("argv", "why"), [
    (["--adapter", "gone/run"], "no such run folder: gone/run"),
    (["--reward", "gone/reward"], "no such reward model folder: gone/reward"),
    (["--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
    (["--temperature", "-1"], "--temperature is -1.0; it must be at least 0"),
    (["--temperature", "nan"], "--temperature is nan; it must be at least 0"),
    (["--seed", "-1"], "--seed is -1; it must be at least 0"),
    (["--device", "cuda"], "--device cuda: there is no such device"),
    (["--model", "gone/much/further"], "no such checkpoint folder"),
])
def test_bad_input_costs_one_line(argv, why, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught, one_line_errors():
        sample.main(["hello", *argv])
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert why in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(("config", "why"), [
    ({"model": "someone/model"}, "which is no folder here; name it with --model"),
    ({"model": None}, "which is no folder here; name it with --model"),
    ({"model": 5}, "model must be text"),
    ({"model": "some/base", "system": 5}, "system must be text"),
    ({"model": "some/base", "reward": ["x"]}, "reward must be text")])
def test_a_strangers_run_chooses_nothing(chat, config, why):
    (chat.run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=why):
        sample.main(["1", "--adapter", str(chat.run)])


def test_a_run_that_was_altered_is_refused(chat):
    write_checksums(chat.run, ["config.json"])
    (chat.run / "config.json").write_text(json.dumps({"model": "some/base", "x": 1}))
    with pytest.raises(UserError, match="is not the file that was written"):
        sample.main(["1", "--adapter", str(chat.run)])


def test_missing_adapter_from_the_shell(tmp_path):
    script = Path(sample.__file__)
    done = subprocess.run(
        [sys.executable, script, "hello", "--adapter", "gone"], cwd=tmp_path,
        capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "sample.py: error: no such run folder: gone\n"
    assert done.stdout == ""
