"""What GRPO is compared with: PPO, DPO and tuning on the best answers.

The paper's claims are comparisons: GRPO costs less than PPO-based RLHF, since it needs
no critic; and DPO sees one preference where GRPO sees several objectives (by default
GRPO too sees only their weighted sum; `--advantage gdpo` sees the axes). Here the
others stand, on the same path: the same frozen base and LoRA, sampling, reward model,
log-probs and evaluation as `grpo.py`. What differs is what this file shows, and what
came of it stands in results/methods.

PPO   (InstructGPT, arXiv 2203.02155; PPO, arXiv 1707.06347)
      A critic V, a fourth role of the frozen base beside policy, reward model and
      reference, says what each token may still earn. The KL to the base is part of the
      reward, token by token. Unlike InstructGPT's: a pass over a step is one update, no
      pretraining text is mixed in, and the critic starts from the mean R instead of the
      reward model; λ is 1, where 0.95 is usual.
[P1]  r_t = −β (log π_old − log ref)_t + R · 1[t is the last token]
[P2]  δ_t = r_t + γ V_{t+1} − V_t       A_t = Σ_l (γλ)^l δ_{t+l}     (arXiv 1506.02438)
      Ret_t = A_t + V_t: what V should have said; V_old: V before the first update
[P3]  J = mean_t min(ρ A, clip(ρ, 1 ± ε) A), A whitened over the step
[P4]  L_V = ½ mean_t max((V − Ret)², (V_old + clip(V − V_old, ± ε) − Ret)²)

DPO   (arXiv 2305.18290) No sampling while it learns: pairs of the base's own answers,
      the best (chosen) and the worst (rejected) of a group by R. All axes have become
      one preference.
[D1]  L = −log σ(β [(log π − log ref)(best) − (log π − log ref)(worst)]), log π summed
      over the response's tokens

SFT   Rejection sampling: imitate the best answer of each group. One round, on answers
      of the base itself (RAFT, arXiv 2304.06767, goes on with those of the policy).
[S1]  L = −mean_t log π(token of the best)

Best of n needs no training, and n times the sampling whenever it is used.
[B1]  KL(best of n ‖ base) ≤ log n − (n − 1)/n nats a response  (arXiv 2401.01879)

    python baselines.py --method ppo
    python baselines.py --compare --seeds 0,1,2      # everything, and the table

Shapes: as in `grpo.py`; (n, …) rows of one group, C response tokens.
"""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import grpo
import lora
from data import world
from data.rubric import AXES
from grpo import Batch, Clock, Prompt, Run, group_rows, response_hidden
from logprob import token_logprobs
from model import SIZES, TINY, Qwen, is_tiny
from run import (
    CHECKSUMS,
    append,
    append_line,
    given_options,
    one_line_errors,
    only_writer,
    option,
    parse_settings,
    read_json,
    read_rows,
    require,
    write_json,
    write_whole,
)

# ------------------------------------------------------------------------------- PPO


def token_rewards(reward: Tensor, logp_old: Tensor, logp_ref: Tensor, mask: Tensor,
                  beta: float) -> Tensor:
    """Rewards (B, C) of single tokens from R (B,) of whole responses."""
    # [P1] r_t = −β (log π_old − log ref)_t + R · 1[t is the last token]
    rewards = torch.where(mask, -beta * (logp_old - logp_ref), 0.0)  # (B, C)
    last = mask.sum(1) - 1  # (B,)
    return rewards.scatter_add(1, last[:, None], reward[:, None].to(rewards))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float,
        lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards, values, mask: (B, C); V_t is what the critic says before token t.
        gamma: γ, the discount of what is earned a token later.
        lam: λ; at 1, A_t is all that is still earned, less V_t; at 0, A_t = δ_t.

    Returns:
        advantage and return A_t + V_t, (B, C), 0 where mask is False.
    """
    # [P2] δ_t = r_t + γ V_{t+1} − V_t       A_t = Σ_l (γλ)^l δ_{t+l}
    values = torch.where(mask, values, 0.0)  # after the last token nothing is earned
    ahead = F.pad(values, (0, 1))[:, 1:]  # V_{t+1}
    delta = rewards + gamma * ahead - values
    advantage, later = torch.zeros_like(delta), torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):  # A_t = δ_t + γλ A_{t+1}
        later = torch.where(mask[:, t], delta[:, t] + gamma * lam * later, 0.0)
        advantage[:, t] = later
    return advantage, advantage + values


def whiten(advantage: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and std 1 over the step's tokens: (B, C) → (B, C).

    Every step then weighs alike in AdamW's moments, whatever the std of its rewards.
    1e-4 as in `grpo.group_advantage`: rounding must not become advantages.
    """
    chosen = advantage[mask]
    return torch.where(
        mask, (advantage - chosen.mean()) / (chosen.std(correction=0) + 1e-4), 0.0)


def ppo_loss(logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor,
             clip: float, tokens: int) -> Tensor:
    """The policy's loss of a part of a step; all tensors (n, C).

    Args:
        tokens: response tokens of the whole step, so that its parts add up.
    """
    ratio = torch.where(mask, logp - logp_old, 0.0).exp()
    # [P3] J = mean_t min(ρ A, clip(ρ, 1 ± ε) A)
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
    surrogate = torch.minimum(ratio * advantage, clipped)
    return -torch.where(mask, surrogate, 0.0).sum() / tokens


def value_loss(values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor,
               clip: float, tokens: int) -> Tensor:
    """The critic's loss of a part of a step; arguments as in `ppo_loss`."""
    # [P4] L_V = ½ mean_t max((V − Ret)², (V_old + clip(V − V_old, ± ε) − Ret)²)
    near = values_old + (values - values_old).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (near - returns).square())
    return 0.5 * torch.where(mask, worse, 0.0).sum() / tokens


class Critic:
    """V (n, C): what a response may still earn before each token.

    The fourth role of the frozen base: an adapter `value` and a head D → 1.
    """

    def __init__(self, model: Qwen, rank: int, seed: int) -> None:
        lora.attach(model, "value", rank, 2 * rank, seed + 1)
        dtype = torch.promote_types(torch.float32, model.unembed.dtype)
        self.model = model
        self.head = nn.Linear(model.config.hidden_size, 1, device=model.device,
                              dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def parameters(self) -> list[nn.Parameter]:
        """Adapter and head."""
        return lora.parameters(self.model, "value") + list(self.head.parameters())

    def values(self, hidden: Tensor) -> Tensor:
        """V (n, C) from hidden states (n, C, D) of adapter `value`."""
        # Of length 1: AdamW moves every weight by about lr, so that a head over hidden
        # states as long as Qwen's would leap from nothing to ten in its first step.
        hidden = F.normalize(hidden.to(self.head.weight.dtype), dim=-1)
        return self.head(hidden)[..., 0]


@dataclasses.dataclass
class Experience:
    """What PPO keeps of a step while it learns from it: all (B, C)."""

    logp_old: Tensor
    values_old: Tensor
    advantage: Tensor
    returns: Tensor


@torch.no_grad()
def make_experience(run: Run, critic: Critic, batch: Batch, beta: float, gamma: float,
                    lam: float) -> tuple[Experience, dict[str, float]]:
    """From old values and log ref: [P1], [P2], whitened advantages; and metrics."""
    mask, logp = batch.sampled.mask, batch.sampled.logp  # the sampler knows log π_old
    logp_ref, values = torch.zeros_like(logp), torch.zeros_like(logp)
    for where, hidden, own in parts_of(run, batch, None):
        targets = batch.sampled.tokens[where][own]
        logp_ref[where] = log_probs(run, hidden, own, targets).to(logp)
    for where, hidden, _ in parts_of(run, batch, "value"):
        values[where] = critic.values(hidden).to(values)
    rewards = token_rewards(batch.reward.to(logp), logp, logp_ref, mask, beta)
    advantage, returns = gae(rewards, values, mask, gamma, lam)
    left, whole = (x[mask].var(correction=0) for x in (returns - values, returns))
    # Stays at 0 while the critic has learnt nothing (λ = 1; below it Ret holds V, too).
    metrics = {"kl_k1": (logp - logp_ref)[mask].mean().item(),
               "explained_variance": 1 - (left / whole.clamp(min=1e-12)).item(),
               "advantage_std": advantage[mask].std(correction=0).item()}
    return Experience(logp, values, whiten(advantage, mask), returns), metrics


def parts_of(run: Run, batch: Batch, name: str | None) -> Iterator[tuple]:
    """`grpo.group_parts` of all groups with adapter `name`.

    Yields:
        where they stand in a table (B, C), hidden (n, C, D), mask (n, C).
    """
    with lora.using(run.model, name):
        for p in range(len(batch.prompts)):
            for rows, hidden, mask in grpo.group_parts(run, batch, p):
                yield (rows, slice(0, mask.shape[1])), hidden, mask


def log_probs(run: Run, hidden: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """log π (n, C) from hidden states (n, C, D) and the tokens (N,) they predict."""
    logp = token_logprobs(hidden[mask], run.model.unembed, targets,
                          run.settings.temperature, run.tokenizer.valid)
    return grpo.by_row(logp, mask)


def ppo_update(run: Run, critic: Critic, batch: Batch, old: Experience,
               clip: float) -> dict[str, float]:
    """Add the gradients of both losses over a whole step; return the losses."""
    tokens, sums = int(batch.sampled.mask.sum()), {"loss": 0.0, "value_loss": 0.0}
    for where, hidden, mask in parts_of(run, batch, "policy"):
        logp = log_probs(run, hidden, mask, batch.sampled.tokens[where][mask])
        loss = ppo_loss(logp, old.logp_old[where], old.advantage[where], mask, clip,
                        tokens)
        loss.backward()
        sums["loss"] += loss.item()
    for where, hidden, mask in parts_of(run, batch, "value"):
        loss = value_loss(critic.values(hidden), old.values_old[where],
                          old.returns[where], mask, clip, tokens)
        loss.backward()
        sums["value_loss"] += loss.item()
    return sums


# ------------------------------------------------------------------------- DPO and SFT


def dpo_loss(best: Tensor, worst: Tensor, best_ref: Tensor, worst_ref: Tensor,
             beta: float) -> Tensor:
    """Loss (n,) of pairs from the log-probs (n,) of whole responses."""
    # [D1] L = −log σ(β [(log π − log ref)(best) − (log π − log ref)(worst)])
    return -F.logsigmoid(beta * ((best - best_ref) - (worst - worst_ref)))


@dataclasses.dataclass
class Pair:
    """Two of the base's answers to a prompt, and their log-probs under the base."""

    prompt: list[int]
    best: list[int]
    worst: list[int]
    ref: Tensor | None  # (2,); SFT needs none


def response_logp(run: Run, prompt: list[int], rows: list[list[int]],
                  prefix) -> Tensor:
    """log π (n,) of whole responses, with the active adapter."""
    hidden, mask = response_hidden(run, prompt, rows, prefix)
    targets = torch.tensor([t for r in rows for t in r], device=hidden.device)
    return log_probs(run, hidden, mask, targets).sum(1)


@torch.no_grad()
def make_pairs(run: Run, batches: list[Batch], method: str) -> list[Pair]:
    """Best and worst of every group that is alive."""
    pairs = []
    for batch in batches:
        reward = batch.reward.view(-1, run.settings.group_size)  # (P, G)
        for p in range(len(batch.prompts)):
            if batch.alive[p]:
                rows, prompt = group_rows(run, batch, p), batch.prompts[p].ids
                two = [rows[int(reward[p].argmax())], rows[int(reward[p].argmin())]]
                ref = None
                if method == "dpo":
                    with lora.using(run.model, None), \
                            run.model.shared_prefix(prompt) as prefix:
                        ref = response_logp(run, prompt, two, prefix)
                pairs.append(Pair(prompt, *two, ref))
    return pairs


def dpo_step(run: Run, pairs: list[Pair], beta: float) -> float:
    """Add the gradient of [D1], mean over some pairs; return the loss.

    The caller has made the policy active.
    """
    total = 0.0
    for pair in pairs:
        with run.model.shared_prefix(pair.prompt) as prefix:
            logp = response_logp(run, pair.prompt, [pair.best, pair.worst], prefix)
            loss = dpo_loss(logp[:1], logp[1:], pair.ref[:1], pair.ref[1:], beta)
            loss = loss.sum() / len(pairs)
            loss.backward()
        total += loss.item()
    return total


def sft_step(run: Run, pairs: list[Pair]) -> float:
    """Add the gradient of [S1], mean over the tokens of some best answers.

    The caller has made the policy active.
    """
    total, tokens = 0.0, sum(len(pair.best) for pair in pairs)
    for pair in pairs:
        with run.model.shared_prefix(pair.prompt) as prefix:
            logp = response_logp(run, pair.prompt, [pair.best], prefix)
            # [S1] L = −mean_t log π(token of the best)
            loss = -logp.sum() / tokens
            loss.backward()
        total += loss.item()
    return total


# --------------------------------------------------------------------------- the loops


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python baselines.py`; `resolve` replaces a default of None."""

    method: str = option("ppo", "what to train by",
                         choices=["ppo", "dpo", "sft", "best-of-n"])
    compare: bool = option(False, "run all methods with all --seeds; print the table")
    ablate: bool = option(False, "the same for the parts of GRPO, one by one")
    search: bool = option(False, "try five settings of each method on other prompts")
    seeds: str = option("0,1,2", "of --compare and --ablate")
    size: str = option("tiny", "as grpo.py has it", choices=[*grpo.SIZES])
    model: str | None = option(None, "checkpoint folder or Hub name, instead of --size")
    weights: str = option("", "axis=weight,...; unnamed axes keep 1")
    prompts: Path | None = option(None, "JSONL of prompts")
    system: str | None = option(None, "system message of the policy's prompts")
    reward: str | None = option(None, "reward model folder, or gold (tiny world only)")
    judge: Path | None = option(None, "second reward model, which only judges")
    steps: int | None = option(None, "P · G responses are sampled in each")
    prompts_per_step: int | None = option(None, "P, prompts a step")
    group_size: int = option(8, "G, responses a prompt")
    max_new_tokens: int | None = option(None, "C, longest response")
    temperature: float | None = option(None, "of sampling and scoring alike")
    lr: float | None = option(None, "AdamW's learning rate")
    value_lr: float | None = option(None, "the critic's (PPO)")
    rank: int | None = option(None, "LoRA rank r, of policy and critic")
    epochs: int | None = option(None, "passes over the same responses or pairs")
    clip: float = option(0.2, "epsilon of policy and value (PPO)")
    beta: float | None = option(None, "weight of the KL (PPO), sharpness (DPO)")
    gamma: float = option(1.0, "discount (PPO)")
    lam: float | None = option(None, "lambda of the advantage estimate (PPO)")
    eval_prompts: int | None = option(None, "held-out prompts, before and after")
    seed: int = option(0, "of adapter, prompts and sampling")
    out: Path | None = option(None, "run folder (default: runs/METHOD-NAME)")
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)")
    dtype: str | None = option(None, "of the base weights (default: by the device)",
                               choices=["float32", "bfloat16"])


# By `model.is_tiny` and method. GRPO divides R by the group's std and has its KL beside
# it in the loss; PPO adds the KL to R and whitens the sum. So PPO's β is GRPO's 0.04
# times that std (0.1 to 0.2). The tiny rates, epochs, λ and DPO's β won `--search`
# (results/methods). The real rows are for measuring what a step costs; nothing was
# searched there.
DEFAULTS = {
    True: {"ppo": {"lr": 3e-3, "value_lr": 1e-2, "epochs": 2, "beta": 0.006,
                   "lam": 1.0},
           "dpo": {"lr": 2e-3, "epochs": 3, "beta": 0.5},
           "sft": {"lr": 3e-3, "epochs": 6}, "best-of-n": {}},
    False: {"ppo": {"lr": 1e-4, "value_lr": 1e-3, "epochs": 2, "beta": 0.004,
                    "lam": 1.0},
            "dpo": {"lr": 5e-5, "epochs": 1, "beta": 0.1},
            "sft": {"lr": 5e-5, "epochs": 1}, "best-of-n": {}},
}


# Options that only some methods know: a sweep over one that does nothing would mislead.
KNOWN = {"ppo": {"lr", "rank", "value_lr", "epochs", "clip", "beta", "gamma", "lam"},
         "dpo": {"lr", "rank", "epochs", "beta"}, "sft": {"lr", "rank", "epochs"},
         "best-of-n": set()}


def resolve(s: Settings) -> Settings:
    """Fill in the defaults of the method, and refuse what makes no sense."""
    table = DEFAULTS[is_tiny(s.model or SIZES[s.size])][s.method]
    s = dataclasses.replace(s, **{name: value for name, value in table.items()
                                  if getattr(s, name) is None})
    for name in ("lr", "value_lr", "epochs"):
        value = getattr(s, name)
        require(value is None or 0 < value < math.inf,
                f"--{name.replace('_', '-')} must be positive")
    for name in ("beta", "gamma", "lam"):
        value = getattr(s, name)
        require(value is None or 0 <= value < math.inf,
                f"--{name} must not be negative")
    require(s.gamma <= 1 and (s.lam is None or s.lam <= 1),
            "--gamma and --lam must be at most 1")
    require(s.method != "dpo" or s.beta > 0, "--beta 0 leaves DPO without a gradient")
    return s


def common(s: Settings) -> grpo.Settings:
    """What `grpo.py` has too, for the parts that are shared."""
    names = {f.name for f in dataclasses.fields(grpo.Settings)}
    shared = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)
              if f.name in names and f.name != "beta"}
    # With a critic, a response needs no others of its prompt to be compared with.
    return grpo.resolve(grpo.Settings(**shared), 1 if s.method == "ppo" else 2)


def update(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Clip each group's gradient to norm 1, take the step; return the norms."""
    norms = {}
    for group in optimizer.param_groups:
        norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
        require(bool(norm.isfinite()), "the gradient is not finite; lower --lr")
        norms[group["name"]] = norm.item()
    optimizer.step()
    optimizer.zero_grad()
    return norms


def decay(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """GRPO's linear decay, for every group of parameters from its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (1 - (step - 1) / steps)


def train_ppo(run: Run, prompts: list[Prompt], s: Settings) -> list[nn.Parameter]:
    """Sample, score, look back, and learn from the same responses several times."""
    critic, policy = (Critic(run.model, run.settings.rank, s.seed),
                      lora.parameters(run.model, "policy"))
    optimizer = torch.optim.AdamW([
        {"params": policy, "peak": s.lr, "name": "grad_norm"},
        {"params": critic.parameters(), "peak": s.value_lr, "name": "value_grad_norm"},
    ], weight_decay=0.0)
    order = grpo.shuffled(prompts, s.seed)
    with Progress(run, run.settings.steps) as progress:
        for step in range(1, run.settings.steps + 1):
            clock, started = Clock(), time.perf_counter()
            decay(optimizer, step, run.settings.steps)
            chosen = grpo.draw_prompts(order, run.settings.prompts_per_step)
            batch = grpo.sample_and_score(run, chosen, step, clock)
            if step == 1:  # else the critic would spend its first steps on the mean
                nn.init.constant_(critic.head.bias, batch.reward.mean().item())
            metrics = grpo.describe(run, batch)
            del metrics["dead_groups"]  # PPO compares with the critic, not the group
            with clock("values"):
                old, found = make_experience(run, critic, batch, s.beta, s.gamma, s.lam)
            metrics |= found
            # For samples.jsonl: the mean of a response's tokens, not the group's.
            batch.advantage = old.advantage.sum(1) / batch.sampled.mask.sum(1)  # (B,)
            with clock("training"):
                for _ in range(s.epochs):
                    metrics |= ppo_update(run, critic, batch, old, s.clip)
                    metrics |= update(optimizer)
            progress.write({
                "step": step, **metrics,
                "trained_tokens": 2 * s.epochs * metrics["tokens"],  # policy and critic
                "seconds": time.perf_counter() - started,
                **{f"seconds_{phase}": t for phase, t in clock.seconds.items()}})
            grpo.write_samples(run, batch, step, progress.samples)
    return policy + critic.parameters()


def train_on_pairs(run: Run, prompts: list[Prompt],
                   s: Settings) -> list[nn.Parameter]:
    """Sample from the base as GRPO would, then learn from the best (and worst)."""
    steps, size = run.settings.steps, run.settings.prompts_per_step
    order, batches = grpo.shuffled(prompts, s.seed), []
    with Progress(run, steps) as progress:
        for step in range(1, steps + 1):
            clock, started = Clock(), time.perf_counter()
            chosen = grpo.draw_prompts(order, size)
            # Its B is still zero: the policy's answers are the base's.
            batch = grpo.sample_and_score(run, chosen, step, clock)
            progress.write({"step": step, **grpo.describe(run, batch),
                            "trained_tokens": 0,
                            "seconds": time.perf_counter() - started})
            grpo.write_samples(run, batch, step, progress.samples)
            batches.append(batch)
    started = time.perf_counter()
    pairs = make_pairs(run, batches, s.method)
    require(bool(pairs), "the rewards of every group agree; there are no pairs to "
            "learn from")
    shuffle, parts = random.Random(s.seed), []
    for _ in range(s.epochs):
        shuffle.shuffle(pairs)
        parts += [pairs[i:i + size] for i in range(0, len(pairs), size)]
    policy = lora.parameters(run.model, "policy")
    optimizer = torch.optim.AdamW(
        [{"params": policy, "peak": s.lr, "name": "grad_norm"}], weight_decay=0.0)
    with Progress(run, len(parts)) as progress, lora.using(run.model, "policy"):
        for number, part in enumerate(parts, 1):
            decay(optimizer, number, len(parts))
            loss = (dpo_step(run, part, s.beta) if s.method == "dpo"
                    else sft_step(run, part))
            trained = sum(len(p.best) + (len(p.worst) if s.method == "dpo" else 0)
                          for p in part)
            progress.write({"step": steps + number, "loss": loss, "tokens": 0,
                            "trained_tokens": trained, **update(optimizer),
                            "seconds": time.perf_counter() - started})
            started = time.perf_counter()
    return policy


class Progress:
    """metrics.jsonl, samples.jsonl and the progress bar of one phase."""

    def __init__(self, run: Run, total: int) -> None:
        self.run, self.total = run, total

    def __enter__(self) -> "Progress":
        self.metrics = append(self.run.folder / "metrics.jsonl")
        self.samples = append(self.run.folder / "samples.jsonl")
        self.bar = tqdm(total=self.total, unit="step", file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        self.samples.close()
        self.bar.close()

    def write(self, metrics: dict) -> None:
        """One step's line."""
        append_line(self.metrics, metrics)
        if "R" in metrics:
            grpo.show(self.bar, self.run, metrics)
        else:
            self.bar.set_postfix({"loss": f"{metrics['loss']:.3f}"}, refresh=False)
            self.bar.update()


def best_of_kl(n: int) -> float:
    """Upper bound of the KL of best-of-n to its base, in nats a response."""
    # [B1] KL(best of n ‖ base) ≤ log n − (n − 1)/n
    return math.log(n) - (n - 1) / n


# ---------------------------------------------------------------------- the comparison

# What `--compare` runs, and what `--ablate` does: name → program and options. PPO is
# there twice: its best setting, 64 prompts with a response each, where no prompt is
# shared; and its best one in groups, whose costs compare with GRPO's.
COMPARED = {
    "GRPO": ["grpo.py"],
    "PPO": ["baselines.py", "--method", "ppo", "--value-lr", "3e-3",
            "--group-size", "1", "--prompts-per-step", "64"],
    "PPO in GRPO groups": ["baselines.py", "--method", "ppo"],
    "DPO": ["baselines.py", "--method", "dpo"],
    "SFT on the best": ["baselines.py", "--method", "sft"],
    "best of 8": ["baselines.py", "--method", "best-of-n"],
}
ABLATED = {
    "equal weights": ["grpo.py"],
    **{f"{axis} alone": ["grpo.py", "--weights", ",".join(
        f"{a}={int(a == axis)}" for a in AXES)] for axis in AXES},
    "GDPO": ["grpo.py", "--advantage", "gdpo"],
    "no division by the std": ["grpo.py", "--advantage", "mean-only"],
    "beta 0": ["grpo.py", "--beta", "0"],
    "two updates a batch": ["grpo.py", "--inner-steps", "2"],
    "PPO at GRPO's updates": ["baselines.py", "--method", "ppo", "--epochs", "1"],
}
# The over-optimisation curve: a policy that hardly pays for leaving its base, for long.
LONG = {"a long run": ["grpo.py", "--beta", "0.001", "--steps", "400"]}
# Five settings for every method; its default is the best by gold R, on prompts that are
# held out for this alone. GRPO had more care than that: temperature, rank and steps of
# the tiny world were chosen for it (results/tiny), and the others take them. GRPO and
# PPO may spend a step's 64 responses on more prompts; PPO needs no groups.
SEARCH = {
    "grpo": [{"lr": lr, "beta": beta} for lr in (3e-3, 4.5e-3)
             for beta in (0.02, 0.04)]
    + [{"lr": 4.5e-3, "beta": 0.04, "group_size": 4, "prompts_per_step": 16}],
    "ppo": [{"lr": lr, "lam": lam, "value_lr": value_lr} for lr, lam, value_lr in (
        (1.5e-3, 1.0, 3e-3), (3e-3, 1.0, 3e-3), (3e-3, 0.95, 3e-3), (3e-3, 1.0, 1e-2))]
    + [{"lr": 3e-3, "lam": 1.0, "value_lr": 3e-3, "group_size": 1,
        "prompts_per_step": 64}],
    "dpo": [{"lr": lr, "epochs": 3, "beta": beta} for lr in (1e-3, 2e-3)
            for beta in (0.1, 0.5)] + [{"lr": 2e-3, "epochs": 3, "beta": 1.0}],
    "sft": [{"lr": lr, "epochs": n} for lr in (3e-3, 6e-3) for n in (1, 3)]
    + [{"lr": 3e-3, "epochs": 6}],
}


def run_all(programs: dict[str, list[str]], seeds: list[int], folder: Path,
            once: dict[str, list[str]] | None = None) -> dict[str, list[dict]]:
    """Run every program with every seed, in processes of their own; summaries.

    As many run at a time as PyTorch would use threads, on the CPU with one thread each:
    on small models that is faster than more threads for one, and no score changes with
    the number of cores. Seconds may: the runs share memory and cache.

    Args:
        once: programs that run with the first seed only, and begin first.
    """
    jobs = [(name, program, seeds[0]) for name, program in (once or {}).items()]
    jobs += [(name, program, seed) for seed in seeds
             for name, program in programs.items()]
    claimed = [claim(name, program, seed, folder) for name, program, seed in jobs]
    found, stop = {}, threading.Event()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        started = {pool.submit(run_one, out, note, stop): (name, seed)
                   for (out, note), (name, _, seed) in zip(claimed, jobs, strict=True)}
        try:
            for end in tqdm(as_completed(started), total=len(started), unit="run",
                            file=sys.stderr):
                found[started[end]] = end.result()
        finally:  # after an error or Ctrl-C, what has not begun does not begin
            stop.set()
    return {name: [found[name, seed] for seed in seeds] for name in programs}


def claim(name: str, program: list[str], seed: int, folder: Path) -> tuple[Path, dict]:
    """The folder of a run, and the note beside it: its command and all settings.

    A folder with another note, or with none, is refused: its figures are of other
    settings, perhaps of defaults that have changed, or not of a comparison.
    """
    out = folder / f"{name.replace(' ', '-').lower()}-{seed}"
    words = [*program, "--device", "cpu", "--seed", str(seed), "--out", str(out)]
    cls, fill = ((grpo.Settings, grpo.resolve) if program[0] == "grpo.py"
                 else (Settings, resolve))
    used = dataclasses.asdict(fill(parse_settings(cls, "", words[1:])))
    # Paths stand in the command; the model's differs from machine to machine.
    note = {"command": words, "settings": {
        k: v for k, v in used.items() if k != "model" and not isinstance(v, Path)}}
    path = out.with_name(f"{out.name}.json")
    require(path.is_file() or not out.exists(), f"{out} is not from such a comparison; "
            "choose another --out")
    require(not path.is_file() or read_json(path) == note, f"{out} is of another "
            f"command or of other settings (see {path}); choose another --out")
    return out, note


def run_one(out: Path, note: dict, stop: threading.Event) -> dict:
    """One run's summary, and its settings; nothing, if another has set `stop`.

    A run that is finished already is not repeated, and one that was interrupted goes on
    (baselines: starts again).
    """
    if stop.is_set():
        return {}
    settings = {"settings": note["settings"]}
    if (out / CHECKSUMS).is_file():
        return read_json(out / "summary.json") | settings
    words, printed = note["command"], out.with_name(f"{out.name}.txt")
    try:
        write_json(out.with_name(f"{out.name}.json"), note)
        if (out / grpo.CONFIG).is_file() and words[0] == "grpo.py":
            words = ["grpo.py", "--resume", str(out)]
        else:
            with only_writer(out):  # whoever still writes there is left alone
                shutil.rmtree(out, ignore_errors=True)
        script = str(Path(__file__).parent / words[0])
        with open(printed, "w", encoding="utf-8") as file:
            end = subprocess.run([sys.executable, script, *words[1:]], check=False,
                                 stdout=file, stderr=file,
                                 env=os.environ | {"OMP_NUM_THREADS": "1"})
        require(end.returncode == 0, f"{' '.join(words)} ended with status "
                f"{end.returncode}; see {printed}")
    except BaseException:
        stop.set()  # before this worker takes the next run
        raise
    return read_json(out / "summary.json") | settings


def mean_of_axes(scores: dict[str, float]) -> float:
    """All axes alike. A run's own R has its weights, and compares with no other's."""
    return mean(score for axis, score in scores.items() if axis != "R")


def mean_and_deviation(values: list[float], form: str = ".3f") -> str:
    """Mean ± standard deviation over the seeds."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ± {stdev(values):{form}}"


def comparison(found: dict[str, list[dict]]) -> list[str]:
    """Two Markdown tables: what came of it, and what it cost."""
    base = [{"after": run["before"]} for run in next(iter(found.values()))]
    axes = [axis for axis in base[0]["after"]["gold"] if axis != "R"]
    lines = ["| method | gold: mean of axes | " + " | ".join(axes) + " | reward model: "
             "mean of axes | KL, nats a token | kind refusals with a step | refusals "
             "of benign |",
             "|" + "---|" * (len(axes) + 6)]
    for name, runs in {"(the base)": base, **found}.items():
        after = [run["after"] for run in runs]
        cells = [mean_and_deviation([mean_of_axes(a["gold"]) for a in after])]
        cells += [mean_and_deviation([a["gold"][k] for a in after]) for k in axes]
        cells += [mean_and_deviation([mean_of_axes(a["reward_model"]) for a in after]),
                  ("≤ " if "kl_is_a_bound" in after[0] else "")
                  + mean_and_deviation([a["kl"] for a in after])]
        cells += [mean_and_deviation(
            [a["behaviour"][side].get(kind, 0.0) for a in after], ".0%")
            for side, kind in (("harmful", "refuse_kind_step"), ("benign", "refuse"))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| method | training seconds, side by side | for 1,000 sampled "
              "tokens | peak GB | sampled tokens | trained tokens | trained "
              "parameters | sampled tokens an answer, in use |",
              "|" + "---|" * 8]
    for name, runs in found.items():
        cells = [mean_and_deviation([r["training_seconds"] for r in runs], ".0f"),
                 "–" if not runs[0]["sampled_tokens"] else mean_and_deviation(
                     [1e3 * r["training_seconds"] / r["sampled_tokens"]
                      for r in runs], ".2f"),
                 mean_and_deviation([r["peak_rss_gb"] for r in runs], ".2f")]
        cells += [f"{mean(r[k] for r in runs):,.0f}" for k in (
            "sampled_tokens", "trained_tokens", "trained_parameters")]
        cells.append(f"{mean(r['after']['tokens_an_answer'] for r in runs):,.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def plot(found: dict[str, list[dict]], path: Path) -> None:
    """Gold scores against seconds, and against KL; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    base = mean(mean_of_axes(r["before"]["gold"]) for r in next(iter(found.values())))
    for place in places:
        place.scatter([0], [base], marker="x", color="black", label="the base")
    for name, runs in found.items():
        gold = [mean_of_axes(r["after"]["gold"]) for r in runs]
        if "kl_is_a_bound" in runs[0]["after"]:
            name += " (KL: upper bound)"
        if runs[0]["trained_parameters"]:  # best of n is free only until it is used
            places[0].scatter([r["training_seconds"] for r in runs], gold, label=name)
        places[1].scatter([r["after"]["kl"] for r in runs], gold, label=name)
    places[0].set(xlabel="training seconds", ylabel="gold: mean of axes, held out")
    places[1].set(xlabel="KL to the base, nats a token")
    places[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def keep(found: dict[str, list[dict]], table: str, folder: Path) -> None:
    """Write the table and what it was made from; print it."""
    write_json(folder / "summaries.json", {
        name: [{key: value for key, value in run.items() if key != "answers"}
               for run in runs] for name, runs in found.items()})
    write_whole(folder / "table.md", table + "\n")
    print(table)


def compare(s: Settings) -> None:
    """All methods or all ablations, with every seed: a table and a plot."""
    kind = "ablate" if s.ablate else "compare"
    words = [seed.strip() for seed in s.seeds.split(",")]
    seeds = [int(word) for word in words if re.fullmatch("[0-9]{1,9}", word)]
    require(len(set(seeds)) == len(words),
            f"--seeds {s.seeds}: expected different numbers, such as 0,1,2")
    folder = s.out or Path("runs") / kind
    with only_writer(folder):
        found = (run_all(ABLATED, seeds, folder, once=LONG) if s.ablate
                 else run_all(COMPARED, seeds, folder))
        table = "\n".join(comparison(found))
        keep(found, table, folder)
        plot(found, folder / "plot.png")
        if s.ablate:
            drawn = Path(__file__).parent / "results" / "plot.py"
            run = folder / f"a-long-run-{seeds[0]}"
            end = subprocess.run([sys.executable, str(drawn), str(run)], check=False)
            if end.returncode == 0:
                print(f"learned and gold R over its steps: {run / 'curves.png'}")


def validation_prompts(path: Path, count: int = 64) -> None:
    """The tiny world's training prompts, and others of the same subjects held out.

    Settings are chosen on these, so that the held-out subjects stay unseen.
    """
    rows = read_rows(TINY / "prompts.jsonl", responses=False)
    chance, held = random.Random(7), []
    known = {row["prompt"] for row in rows}
    for harmful in (True, False):
        fresh = [p.text for p in world.training_prompts() if p.harmful == harmful
                 and p.text not in known]
        held += chance.sample(fresh, count)
    rows = [row for row in rows if row["split"] == "train"]
    rows += [{"prompt": text, "split": "heldout"} for text in held]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n"
                              for row in rows))


def searched(found: dict[str, list[dict]]) -> list[str]:
    """A Markdown table: settings of each method, the best by the gold rubric first."""
    rows = [(name.split(), summary["after"]) for name, [summary] in found.items()]
    rows.sort(key=lambda row: (row[0][0], -row[1]["gold"]["R"]))
    return ["| method | settings | gold R | reward model R | KL |", "|" + "---|" * 5,
            *(f"| {method} | {' '.join(words)} | {after['gold']['R']:.3f} | "
              f"{after['reward_model']['R']:.3f} | {after['kl']:.3f} |"
              for (method, *words), after in rows)]


def search(s: Settings) -> None:
    """Every setting of SEARCH, judged on the validation prompts."""
    home, programs = s.out or Path("runs") / "search", {}
    prompts = ["--prompts", str(home / "validation.jsonl")]
    for method, grid in SEARCH.items():
        program = (["grpo.py"] if method == "grpo"
                   else ["baselines.py", "--method", method])
        for options in grid:
            name = " ".join([method, *(f"{k}={v}" for k, v in options.items())])
            programs[name] = [*program, *prompts, *(
                word for k, v in options.items()
                for word in (f"--{k.replace('_', '-')}", str(v)))]
    with only_writer(home):
        validation_prompts(home / "validation.jsonl")
        found = run_all(programs, [s.seed], home)
        keep(found, "\n".join(searched(found)), home)


# ------------------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> None:
    """Train by one method, or run a comparison."""
    started = time.perf_counter()
    s = parse_settings(Settings, __doc__.split("\n")[0], argv)
    several = [name for name in ("compare", "ablate", "search") if getattr(s, name)]
    if several:
        other = given_options(Settings, argv).keys() - {*several[:1], "out"} - {
            "seed" if s.search else "seeds"}
        require(not other, f"--{several[0]} does not go with "
                + ", ".join(f"--{name.replace('_', '-')}" for name in sorted(other)))
        (search if s.search else compare)(s)
        return
    other = given_options(Settings, argv).keys() & KNOWN["ppo"] - KNOWN[s.method]
    require(not other, f"--method {s.method} does not use "
            + ", ".join(f"--{name.replace('_', '-')}" for name in sorted(other)))
    s = resolve(s)
    require(int(os.environ.get("WORLD_SIZE", "1")) == 1, "baselines.py runs in one "
            "process; start it without torchrun")
    shared = common(s)
    shared = dataclasses.replace(
        shared, out=shared.out or grpo.free_folder(shared, s.method))
    with only_writer(shared.out):
        run, prompts, held_out = grpo.prepare(shared)
        unused = {"inner_steps", "kl", "loss"} | KNOWN["ppo"] - KNOWN[s.method]
        own = {name: getattr(s, name) for name in (
            "method", "value_lr", "epochs", "beta", "gamma", "lam")}
        write_json(run.folder / grpo.CONFIG, {
            name: value for name, value in (grpo.config_of(run) | own).items()
            if name not in unused})
        before = grpo.evaluate(run, held_out, "before")
        if s.method == "best-of-n":
            with Progress(run, 0):  # nothing to learn: empty files
                trained = []
            after = grpo.evaluate(run, held_out, "best", best_of=s.group_size)
            # The policy is the base, but the choice is not: its bound, for a token.
            after[0]["kl"] = best_of_kl(s.group_size) / after[0]["length"]
            after[0]["kl_is_a_bound"] = True
        else:
            trained = (train_ppo if s.method == "ppo" else train_on_pairs)(
                run, prompts, s)
            grpo.save_policy(run)
            after = grpo.evaluate(run, held_out, "after")
        grpo.finish(run, held_out, before, after, started, trained)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
