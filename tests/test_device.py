"""Whole programs on a GPU that is none (`gpu.py`): what CUDA refuses, they never ask.

* Training by every method, the reward model's training and the chat run to their end.
* The stand-in refuses what CUDA refuses: else the above would show nothing.
* A decoding step makes the host wait for the device once.
* Masked attention for CUDA is the same attention; masks never meet heads in groups.
"""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
import torch
import torch.nn.functional as F

import sample
from loading import TINY, load
from model import masked_attention
from plumbing.files import verify_checksums

ROOT = Path(__file__).parent.parent
SHORT = ["--prompts-per-step", "2", "--group-size", "4", "--max-new-tokens", "8",
         "--eval-prompts", "2"]


def on_the_device(*words: str) -> str:
    """Run a program on the stand-in; what it printed."""
    end = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu.py"), *words], cwd=ROOT, text=True,
        check=False, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert end.returncode == 0, end.stderr
    return end.stdout


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    "grpo.py --steps 2", "grpo.py --steps 1 --inner-steps 2 --dtype float32",
    "methods ppo --steps 1", "methods dpo --steps 1 --epochs 1"])
def test_a_run_ends_on_a_device(words, tmp_path):
    on_the_device(*words.split(), *SHORT, "--out", str(tmp_path / "run"))
    verify_checksums(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["device"] == "cuda"  # chosen: there seems to be one
    if words.startswith("grpo.py --steps 2"):
        said = on_the_device("sample.py", "--adapter", str(tmp_path / "run"),
                             "--max-new-tokens", "4", "How do I sell a sofa?")
        assert "aligned: " in said


@pytest.mark.slow
def test_a_reward_model_learns_on_a_device(tmp_path):
    rows = [json.loads(line) for line in (TINY / "labels.jsonl").open()]
    few = [row for split in ("train", "validation", "test") for row in
           [row for row in rows if row.get("split") == split][:24]]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(r) + "\n" for r in few))
    on_the_device("reward_model.py", "--data", str(tmp_path / "few.jsonl"),
                  "--epochs", "1", "--out", str(tmp_path / "reward"))
    verify_checksums(tmp_path / "reward")


def test_what_cuda_refuses_is_refused():
    with gpu.gpu():
        away = torch.arange(6, device="cuda").float().view(2, 3)
        here, index = torch.ones(2, 3), torch.tensor([1, 0], device="cuda")
        assert (away.device.type, away.is_cuda) == ("cuda", True)
        for wrong in (lambda: away + here, lambda: here[index], lambda: here @ away.T,
                      lambda: torch.cat([away, here]), lambda: here.add_(away),
                      lambda: away.index_add(0, index.cpu(), away),
                      lambda: F.embedding(index, here)):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        with pytest.raises(TypeError, match="to numpy"):
            away.numpy()
        mask = torch.ones(2, 1, 1, 5, dtype=torch.bool, device="cuda")
        q, k = (torch.ones(2, heads, n, 4, device="cuda") for heads, n in
                ((4, 1), (2, 5)))
        with pytest.raises(RuntimeError, match="no fused kernel"):
            F.scaled_dot_product_attention(q, k, k, attn_mask=mask, enable_gqa=True)
        # and what it allows is allowed
        assert (away * torch.tensor(2.0)).sum().item() == 30
        assert away[torch.tensor([1])].tolist() == [[3, 4, 5]]
        assert torch.zeros(2, 3).copy_(away).sum() == 15
        assert away.cpu().numpy().sum() == here.to("cuda").add_(away).sum() - 6 == 15


def test_gradients_come_through_the_stand_in():
    x = torch.randn(4, 3, dtype=torch.float64)
    values = []
    for device in ("cpu", "cuda"):
        with gpu.gpu():
            w = x.clone().to(device).requires_grad_()
            loss = (w @ w.T).softmax(-1)[:, 0].log().sum()
            loss.backward()
            values.append((loss.item(), w.grad.cpu()))
    assert values[0][0] == values[1][0]
    assert torch.equal(values[0][1], values[1][1])


def test_a_decoding_step_waits_once(monkeypatch):
    monkeypatch.setattr(gpu, "counts", collections.Counter())
    with gpu.gpu():
        model, tokenizer = load(TINY, "cuda", torch.float32)
        prompts = [tokenizer.chat(text) for text in ("Hi", "How do I sell a sofa?")]
        draws = torch.stack([sample.draw_uniforms(0, 0, p, 4, 40) for p in range(2)])
        gpu.counts.clear()
        sampled = sample.rollout(model, tokenizer, prompts, draws)
        waits = collections.Counter()
        for (file, function, _), count in gpu.counts.items():
            waits[file, function] += count
        assert sampled.mask.shape[1] > 10
        steps = sampled.mask.shape[1]
        # at its end it looks at logp and the longest row, once
        assert waits.pop(("sample.py", "rollout")) == steps + 2
        # in a batch of unequal prompts also when rows end: are all padded ones gone?
        ends = len(set(sampled.mask.sum(1).tolist()))
        assert waits.pop(("model.py", "keep"), 0) <= ends
        assert not waits
        lone = sample.draw_uniforms(0, 0, 0, 4, 40)[None]
        gpu.counts.clear()
        sample.rollout(model, tokenizer, prompts[:1], lone)
        assert {function for _, function, _ in gpu.counts} == {"rollout"}


@pytest.mark.parametrize("shape", [
    (2, 4, 2, 1, 9), (3, 4, 1, 5, 9), (1, 14, 2, 3, 3), (2, 2, 2, 4, 7)])
@pytest.mark.parametrize("one_mask", [False, True])
def test_masked_attention_for_cuda_is_the_same_attention(shape, one_mask):
    batch, heads, kv_heads, new, seen = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, h, n, 8, generator=generator, dtype=torch.float64)
               for h, n in ((heads, new), (kv_heads, seen), (kv_heads, seen)))
    mask = torch.rand(1 if one_mask else batch, 1, new, seen, generator=generator) < 0.6
    mask[..., 0] = True
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(masked_attention(q, k, v, mask), wanted)
