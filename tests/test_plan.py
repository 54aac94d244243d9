"""Memory before a run: `python -m benchmarks.plan`.

* It counts what autograd keeps in earnest.
* The plan of a size loads no weights, and adds up.
* The longest prompt of the file counts; the estimate refuses no run that would start.
* An unknown model ends in one line.
"""

import dataclasses
import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lora
from benchmarks import plan
from loading import TINY, Tokenizer, known_config, load
from plumbing.files import UserError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 9, 7), (2, 20, 1)])
def test_the_plan_counts_what_a_backward_pass_keeps_in_earnest(dtype, sizes):
    model, _ = load(TINY, dtype=dtype)
    lora.attach(model, "policy", 4, 8)
    with FakeTensorMode():
        planned = plan.skeleton(model.config, dtype)
        lora.attach(planned, "policy", 4, 8)
        counted = plan.kept_for_backward(planned, *sizes)
    assert counted == plan.kept_for_backward(model, *sizes) > 0


@pytest.mark.parametrize(("size", "billions", "gb"), [
    pytest.param("0.5b", "0.49", "0.99", marks=pytest.mark.slow),
    pytest.param("7b", "7.62", "15.23", marks=pytest.mark.slow),
    pytest.param("14b", "14.77", "29.54", marks=pytest.mark.slow)])
def test_the_plan_of_a_size_loads_nothing(monkeypatch, capsys, size, billions, gb):
    monkeypatch.setattr(plan, "load", None)
    plan.main(["--size", size])
    printed = capsys.readouterr().out
    # As the Qwen team counts its weights; two bytes each in bf16.
    assert f"{billions} billion weights" in printed
    rows = [line.split() for line in printed.splitlines()[3:]]
    base, *others, together = (float(row[-1]) for row in rows)
    assert f"{base:.2f}" == gb
    assert together == pytest.approx(base + sum(others), abs=0.02)


def test_a_plan_for_an_unknown_model_ends_in_one_line():
    with pytest.raises(UserError, match="no such checkpoint folder: nobody/knows"):
        plan.main(["--model", "nobody/knows"])


def test_the_longest_prompt_counts_and_the_evaluation_with_it(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (
        "Why?", "How?", "How do I " + "mend " * 200 + "it?")))
    few = plan.Settings(prompts=path, prompts_per_step=1).resolved()
    longest = plan.longest_prompt(few)
    tokenizer = Tokenizer(TINY)
    assert longest == len(tokenizer.chat("How do I " + "mend " * 200 + "it?"))
    config = known_config(TINY)
    # fp32: keys and values of as many prompts as a step has rows, once as they are and
    # once with room for the answers.
    cache = 8 * (2 * longest + 64) * 2 * config.num_hidden_layers
    cache *= config.num_key_value_heads * config.head_dim * 4
    row = plan.plan(few).splitlines()[-3].split()
    assert float(row[-2]) > cache / 1e9 - 0.006
    # A size of the Hub has no tokenizer here; the tiny one's count is an upper bound.
    large = dataclasses.replace(few, model="Qwen/Qwen2.5-7B-Instruct")
    assert plan.longest_prompt(large) == longest
    assert plan.longest_prompt(dataclasses.replace(large, prompts=None)) == plan.PROMPT


def test_the_estimate_refuses_nothing_that_the_run_accepts(tmp_path):
    context = known_config(TINY).max_position_embeddings
    tokenizer, text = Tokenizer(TINY), "mend it"
    while len(tokenizer.chat(text + " it")) < context:
        text += " it"
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in (text, "Why?")))
    s = plan.Settings(prompts=path, prompts_per_step=1, max_new_tokens=1, group_size=2,
                      eval_prompts=1, steps=1, device="cpu").resolved()
    assert plan.longest_prompt(s) >= context - 2
    assert plan.estimate_seconds(s) > 0
