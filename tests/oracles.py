"""What several test files compare with, or build runs and batches of.

A run here is a real but tiny Qwen in float64, with random weights and an adapter whose
B is not zero; `row_logs` is the reference for every log-prob: repeated prompt, full
logits, nothing shared, nothing padded.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

import grpo
import lora
import model as qwen
import run
from loading import TINY
from plumbing.figures import Clock
from plumbing.files import read_json
from reward_model import combine
from sample import Batch, Rollout


def relative(value, wanted) -> float:
    """|value − wanted| / |wanted|, over whole gradients."""
    return float((value - wanted).norm() / wanted.norm())


def numpy_advantage(reward: np.ndarray) -> np.ndarray:
    mean = reward.mean(1, keepdims=True)
    return (reward - mean) / (reward.std(1, keepdims=True) + 1e-4)  # population std


CONFIG = qwen.Config(
    model_type="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4,
    tie_word_embeddings=True)


class StubTokenizer:
    """Ids 20 to 23 exist in the model only, as in Qwen's padded vocabulary."""

    stop_ids = (2, 3)
    valid = 20

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Recorder:
    """An optimizer that keeps each step's gradient and moves nothing."""

    def __init__(self, parameters) -> None:
        self.parameters, self.gradients = list(parameters), []
        self.param_groups, self.state = [{"params": self.parameters}], {}

    def step(self) -> None:
        self.gradients.append(flat(p.grad for p in self.parameters))

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


def tiny_model() -> qwen.Qwen:
    """Random weights, wide enough that every path carries gradient; B is not zero."""
    generator = torch.Generator().manual_seed(0)
    tiny = qwen.Qwen(CONFIG).double()
    with torch.no_grad():
        for name, weight in sorted(tiny.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            norm = name.endswith("norm.weight")
            weight.copy_(1 + 0.2 * noise if norm else 0.4 * noise)
        tiny.requires_grad_(False)
        lora.attach(tiny, "policy", rank=3, alpha=6)
        for layer in lora.layers(tiny).values():
            b = layer.lora_B["policy"]
            b.copy_(0.2 * torch.randn(b.shape, generator=generator, dtype=b.dtype))
    return tiny


PROMPTS = [run.Prompt("first", [1, 7, 9, 4, 11], 0), run.Prompt("second", [1, 6], 1),
           run.Prompt("third", [1, 15, 4, 4, 8, 13, 10], 2)]


def make_run(cls: type = grpo.Settings, **changes) -> run.Run:
    """A run of three prompts × four responses, with the settings of any method."""
    own = {"inner_steps": 2, "beta": 0.3} if cls is grpo.Settings else {}
    settings = cls(**{
        "prompts_per_step": 3, "group_size": 4, "max_new_tokens": 9, "temperature": 0.7,
        "device": "cpu", "lr": 1e-3} | own | changes).resolved()
    return run.Run(settings, tiny_model(), StubTokenizer(), ["a", "b"],
                   torch.tensor([1.0, 3.0]), None, {}, Path("nowhere"))


def make_batch(run_: run.Run, dead: int | None = None
               ) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    """Responses of 1 to 9 tokens, with a logp_old that makes clipping act.

    Returns:
        the batch; any advantage (B,); which groups are alive (P,).
    """
    generator = torch.Generator().manual_seed(5)
    count, width = 3 * run_.settings.group_size, run_.settings.max_new_tokens
    lengths = torch.randint(1, width + 1, (count,), generator=generator)
    lengths[0], lengths[1] = width, 1
    mask = torch.arange(width) < lengths[:, None]
    tokens = torch.randint(StubTokenizer.valid, (count, width), generator=generator)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    advantage = torch.randn(count, generator=generator, dtype=torch.float64)
    alive = torch.ones(3, dtype=torch.bool)
    if dead is not None:
        advantage.view(3, -1)[dead], alive[dead] = 0, False
    scores = torch.rand(count, 2, generator=generator)
    batch = Batch(PROMPTS, None, scores, combine(scores, run_.weights))
    ended = lengths < width
    blank = Rollout(tokens, mask, torch.zeros(count, width), ended)
    logp = torch.zeros(count, width, dtype=torch.float64)
    with torch.no_grad():
        for row, response in enumerate(blank.responses()):
            logp[row, :len(response)] = row_logs(run_, batch, row, response)[0]
    batch.sampled = Rollout(tokens * mask, mask, (logp + 0.3 * noise) * mask, ended)
    return batch, advantage, alive


def row_logs(run_, batch, row: int, response: list[int]):
    """log π, log ref of one response, and both distributions."""
    prompt = batch.prompts[row // run_.settings.group_size].ids
    valid, temperature = run_.tokenizer.valid, run_.settings.temperature

    def every(name: str | None):
        with lora.using(run_.model, name):
            hidden = run_.model(torch.tensor([prompt + response]))[0]  # (T, D)
        hidden = hidden[len(prompt) - 1:-1]
        logits = (hidden @ run_.model.unembed.T)[:, :valid] / temperature
        return torch.log_softmax(logits, -1)  # (C, V)

    policy, ref = every("policy"), every(None)
    chosen = torch.tensor(response)[:, None]
    return (policy.gather(1, chosen)[:, 0], ref.gather(1, chosen)[:, 0], policy, ref)


def another_reader(folder: Path) -> Path:
    """A judge: the tiny reward model, a little further from the middle."""
    shutil.copytree(TINY / "reward", folder)
    (folder / "SHA256SUMS").unlink()
    head = safetensors.torch.load_file(folder / "head.safetensors")
    safetensors.torch.save_file(head | {"weight": 1.5 * head["weight"]},
                                folder / "head.safetensors")
    about = read_json(folder / "reward.json")
    about["report"]["settings"]["split"] = "judge"
    (folder / "reward.json").write_text(json.dumps(about))
    return folder


def train_batch(run_, batch, advantage, alive=None,
                on_policy=False) -> tuple[torch.Tensor | None, dict]:
    """The gradient that `grpo.train_batch` hands to its optimizer, and its metrics.

    Unless on_policy, π_old is what `make_batch` noted: not the policy as it is.
    """
    recorder = Recorder(lora.parameters(run_.model, "policy"))
    alive = torch.ones(len(batch.prompts), dtype=torch.bool) if alive is None else alive
    metrics = grpo.train_batch(run_, batch, advantage, alive, recorder, Clock(),
                               None if on_policy else batch.sampled.logp)
    return (recorder.gradients or [None])[0], metrics
