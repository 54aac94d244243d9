"""Memory before a run: `python -m benchmarks.plan`.

* It counts what autograd keeps in earnest.
* The plan of a size loads no weights, and adds up.
* An unknown model ends in one line.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lora
from benchmarks import plan
from loading import TINY, load
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
