"""Multi-objective GRPO: the objective, then the training loop, then the command line.

After *Optimizing Safe and Aligned Language Generation: A Multi-Objective GRPO Approach*
(arXiv 2503.21819); GRPO itself is from DeepSeekMath (arXiv 2402.03300).

Kept     A reward model regresses several scores for a prompt and a response; a
         weighted sum makes one reward R of them; GRPO samples a group of responses per
         prompt and normalises R inside the group, so it needs no value critic; LoRA
         carries the change.
Changed  Policy, reference and reward model are roles of one frozen base. Each of them
         computes a prompt once for its whole group. log π comes without full logits.
         The KL that is reported is exact over the vocabulary; the estimator is only in
         the loss.
Dropped  Nothing of the objective that we know of. There is no mixed-precision
         machinery, no top-p in training, no second model in memory.

    python grpo.py                                  # the bundled tiny model
    python grpo.py --weights safety=2,politeness=0  # what do you want it to become?
    python grpo.py --model DIR                      # a real Qwen2, Qwen2.5 or Qwen3

We had the paper's abstract and summaries, not its full text: "kept" means what these
say, and the tags [E1] to [E7] and [L1] are ours.

Shapes: P prompts a step, G responses a prompt, B = P·G rows, C response tokens, K axes,
D width; row b = p·G + g. Of a micro-batch: n rows, N response tokens.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm import tqdm

import lora
import parallel
import reward_model
from logprob import BLOCK_LOGITS, token_statistics
from model import (
    SIZES,
    TINY,
    Cache,
    Config,
    Qwen,
    Tokenizer,
    base_name,
    fingerprint,
    is_tiny,
    known_config,
    load,
    micro_batches,
    pad_rows,
    pick_device,
    short_name,
)
from run import (
    CHECKPOINT,
    CHECKSUMS,
    Due,
    Stop,
    UserError,
    append,
    append_line,
    checkpoint_about,
    file_sha256,
    format_seconds,
    format_table,
    given_options,
    keep_lines,
    load_checkpoint,
    one_line_errors,
    only_writer,
    option,
    parse_settings,
    peak_rss_gb,
    read_json,
    read_rows,
    require,
    save_checkpoint,
    saved_settings,
    write_checksums,
    write_json,
)
from sample import Rollout, draw_uniforms, rollout

# ---------------------------------------------------------------------- the objective


def combine(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores (..., K) and weights (K,) to one reward R (...)."""
    # [E2] R = Σ_k w_k s_k / Σ_k w_k
    return scores @ (weights / weights.sum())


def group_advantage(reward: Tensor, min_std: float = 1e-3,
                    divide: bool = True) -> tuple[Tensor, Tensor]:
    """Compare each response with its own group; the group's mean replaces a critic.

    Args:
        reward: (P, G), one row a prompt.
        min_std: a group with a smaller std is dead: all its advantages are 0, and only
            the KL term, if there is one, still trains on it.
        divide: False keeps the numerator only (Dr. GRPO, arXiv 2503.20783).

    Returns:
        advantage (P, G) and which groups are alive (P,).
    """
    # [E3] A_g = (R_g − mean_g R) / (std_g R + 1e-4), population std over the group
    # (TRL has the sample std: its advantages are sqrt((G − 1) / G) of these.)
    # 1e-4 and not 1e-8: where all rewards agree, the numerator is rounding error, and
    # with min_std 0 a tiny denominator would turn it into advantages of ±1.
    mean = reward.mean(1, keepdim=True)  # (P, 1)
    std = reward.std(1, correction=0, keepdim=True)  # (P, 1)
    advantage = (reward - mean) / (std + 1e-4) if divide else reward - mean
    alive = std >= min_std  # (P, 1)
    return torch.where(alive, advantage, 0.0), alive[:, 0]


def make_advantage(scores: Tensor, weights: Tensor, kind: str = "group",
                   min_std: float = 1e-3) -> tuple[Tensor, Tensor]:
    """From scores (P, G, K) to advantage (P, G), and which groups are alive (P,).

    Args:
        kind: "group" normalises the weighted sum, as the paper does; "mean-only" does
            not divide by its std; "gdpo" normalises every axis before the sum.
    """
    if kind != "gdpo":
        return group_advantage(combine(scores, weights), min_std, kind == "group")
    # DEVIATES [E3]: A = Σ_k w_k A_k / Σ_k w_k with A_k from axis k alone (GDPO, arXiv
    # 2601.05242, without its second normalisation over the batch). In the weighted sum
    # the axis with the largest std decides the order of the group; here each axis
    # has the say that its weight gives it.
    parts = [group_advantage(axis, min_std) for axis in scores.unbind(-1)]  # (P, G)
    advantage = combine(torch.stack([a for a, _ in parts], -1), weights)  # (P, G)
    alive = torch.stack([live for _, live in parts], -1)[:, weights > 0].any(-1)  # (P,)
    return advantage, alive


def kl_estimate(logp: Tensor, logp_ref: Tensor, kind: str = "k3") -> Tensor:
    """Estimate KL(π ‖ ref) from sampled tokens: logp, logp_ref (B, C) → (B, C).

    k1 and k3 are right in expectation, k2 nearly; in a loss their *gradients* count,
    and these differ. On-policy, with the samples fixed, δ = log ref − log π, E over π:

        k1 = −δ            ∇ → E[∇ log π] = 0: no pull at all, only noise
        k2 = δ²/2          ∇ → E[−δ ∇ log π] = ∇ KL(π ‖ ref)
        k3 = e^δ − δ − 1   ∇ → E[(1 − e^δ) ∇ log π] = ∇ KL(ref ‖ π), the other direction

    Names from Schulman, "Approximating KL divergence" (2020); GRPO uses k3.
    """
    delta = logp_ref - logp
    if kind == "k1":
        return -delta
    if kind == "k2":
        return delta.square() / 2
    # [E6] k3 = e^δ − δ − 1
    # One token that the policy has all but abandoned must not overflow the sum: from
    # δ = 20 on, e^δ goes on as its tangent, whose slope still pulls the token back.
    near = delta.clamp(max=20.0)
    return near.exp() * (1 + (delta - near)) - delta - 1


def token_weights(mask: Tensor, loss: str = "grpo", rows: int | None = None,
                  tokens: int | None = None, length: int | None = None) -> Tensor:
    """What each token counts in the objective: mask (B, C) → (B, C).

    The denominators are those of the whole intended step, whatever part of it `mask`
    holds. So the gradient does not change with micro-batches, padding or row order, and
    a dropped dead group still counts as a group.

    Args:
        loss: "grpo": mean over a response's tokens, then over the P·G responses;
            "dapo": mean over all tokens of the step (arXiv 2503.14476), so that long
            responses count more; "dr_grpo": a response's sum, divided by the constant
            C, then the mean over the P·G responses.
        rows: P·G of the step (default: the rows here).
        tokens: response tokens of the step (default: those here).
        length: C, the most tokens a response may have (default: the width here).
    """
    rows = rows or mask.shape[0]
    if loss == "dapo":
        return mask / (tokens or mask.sum().clamp(min=1))
    if loss == "dr_grpo":
        return mask / (rows * (length or mask.shape[1]))
    return mask / (rows * mask.sum(1, keepdim=True).clamp(min=1))


def grpo_loss(
    logp: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor | None,
    advantage: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    beta: float = 0.04,
    kl: str = "k3",
    loss: str = "grpo",
    rows: int | None = None,
    tokens: int | None = None,
    length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective of a part of a step, with its sign turned: smaller is better.

    Args:
        logp: (B, C) log π of the sampled tokens, with gradient.
        logp_old: (B, C) the same when they were sampled.
        logp_ref: (B, C) under the reference; may be None when beta is 0.
        advantage: (B,), one number for all tokens of a response.
        mask: (B, C) True on the response's own tokens.
        clip: ε; beta: weight of the KL term; kl: its estimator.
        loss, rows, tokens, length: see `token_weights`.

    Returns:
        the loss (scalar) and which tokens the clipping silenced (B, C).
    """
    adv = advantage[:, None]  # (B, 1)
    # [E4] ρ = π(token) / π_old(token)
    # `where` comes before exp: padding may hold anything, and 0 · inf is NaN.
    ratio = torch.where(mask, logp - logp_old, 0.0).exp()  # (B, C)
    # [E5] min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)
    # Beyond ε, on the side that A pays for, the objective is flat. On the other side
    # the minimum keeps the slope: a token that went the wrong way is pulled back.
    clipped = ratio.clamp(1 - clip, 1 + clip) * adv  # (B, C)
    surrogate = torch.minimum(ratio * adv, clipped)  # (B, C)
    objective = surrogate  # (B, C)
    if beta > 0:
        objective = surrogate - beta * torch.where(
            mask, kl_estimate(logp, logp_ref, kl), 0.0)
    # [E7] J = Σ_b Σ_t weight_bt · (min(ρ A, clip(ρ) A) − β KL);  the loss is −J
    weight = token_weights(mask.to(logp.dtype), loss, rows, tokens, length)  # (B, C)
    return -(weight * objective).sum(), mask & (clipped < ratio * adv)


# ----------------------------------------------------------------------- the settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python grpo.py`; `resolve` replaces a default of None."""

    size: str = option("tiny", "tiny (bundled), or a Qwen2.5-Instruct on the Hub",
                       choices=[*SIZES])
    model: str | None = option(None, "checkpoint folder or Hub name, instead of --size")
    weights: str = option("", "axis=weight,...; unnamed axes keep 1 (TRL: "
                          "reward_weights)")
    prompts: Path | None = option(None, "JSONL of prompts; \"split\": \"heldout\" rows "
                                  "are only for the evaluation")
    system: str | None = option(None, "system message of the policy's prompts "
                                "(default: the model's own)")
    reward: str | None = option(None, "reward model folder, or gold (tiny world only)")
    judge: Path | None = option(None, "second reward model, trained on other prompts; "
                                "it judges before and after, the policy never sees it")
    steps: int | None = option(None, "optimisation steps (TRL: max_steps)")
    prompts_per_step: int | None = option(None, "P, prompts a step")
    group_size: int = option(8, "G, responses a prompt (TRL: num_generations)")
    inner_steps: int = option(1, "updates on the same responses (TRL: num_iterations)")
    max_new_tokens: int | None = option(None, "C, longest response (TRL: "
                                        "max_completion_length)")
    temperature: float | None = option(None, "of sampling and scoring alike (TRL: "
                                       "temperature)")
    lr: float | None = option(None, "AdamW's learning rate (TRL: learning_rate)")
    rank: int | None = option(None, "LoRA rank r; alpha is 2r (PEFT: r, lora_alpha)")
    clip: float = option(0.2, "epsilon of the clipped ratio (TRL: epsilon)")
    beta: float = option(0.04, "weight of the KL term; at 0 no reference (TRL: beta)")
    kl: str = option("k3", "KL estimator in the loss", choices=["k1", "k2", "k3"])
    loss: str = option("grpo", "normalisation (TRL: loss_type)",
                       choices=["grpo", "dapo", "dr_grpo"])
    advantage: str = option("group", "group; gdpo (TRL: multi_objective_aggregation "
                            "normalize_then_sum); mean-only (TRL: scale_rewards none)",
                            choices=["group", "gdpo", "mean-only"])
    min_std: float = option(1e-3, "a group (with gdpo: an axis of it) with a smaller "
                            "std is dead")
    eval_prompts: int | None = option(None, "held-out prompts, before and after")
    seed: int = option(0, "of adapter, prompts and sampling")
    out: Path | None = option(None, "run folder (default: the next free runs/NAME)")
    save_every: int | None = option(None, "steps from checkpoint to checkpoint "
                                    "(default: about every five minutes)")
    resume: Path | None = option(None, "run folder to go on with, by its own settings")
    plan: bool = option(False, "print the memory that the run will need; load nothing")
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)")
    dtype: str | None = option(None, "of the base weights (default: by the device)",
                               choices=["float32", "bfloat16"])


# By `model.is_tiny`. Tiny: a higher rank moves faster, and most of what it moves is
# noise (KL). Real, at 0.5B on a CPU: at temperature 1 the model speaks nonsense on most
# prompts, and learns little from it; at 1.5e-4 and at 6e-5 the text drifted further
# from the base's in 60 steps (results/0.5b).
DEFAULTS = {
    True: {"steps": 70, "prompts_per_step": 8, "max_new_tokens": 64, "lr": 4.5e-3,
           "temperature": 1.0, "rank": 8, "eval_prompts": 128},
    False: {"steps": 60, "prompts_per_step": 2, "max_new_tokens": 48, "lr": 4.5e-5,
            "temperature": 0.8, "rank": 16, "eval_prompts": 96},
}


def resolve(settings: Settings, smallest_group: int = 2) -> Settings:
    """Fill in the defaults that depend on the model, and refuse what makes no sense."""
    source = settings.model or SIZES[settings.size]
    values = DEFAULTS[is_tiny(source)]
    changes = {k: v for k, v in values.items() if getattr(settings, k) is None}
    if settings.loss == "dr_grpo":
        # Its authors' whole recipe: no std and a constant length.
        require(settings.advantage != "gdpo", "--loss dr_grpo divides by no std; "
                "it does not go with --advantage gdpo")
        changes["advantage"] = "mean-only"
    device = pick_device(settings.device)
    settings = dataclasses.replace(settings, model=source, device=device, **changes)
    require(settings.group_size >= smallest_group, f"--group-size is "
            f"{settings.group_size}; a group needs at least {smallest_group}, or there "
            "is nothing to compare with")
    for name in ("steps", "prompts_per_step", "inner_steps", "max_new_tokens", "lr",
                 "temperature", "rank", "eval_prompts", "save_every"):
        require(getattr(settings, name) is None
                or 0 < getattr(settings, name) < math.inf,
                f"--{name.replace('_', '-')} must be positive")
    for name in ("beta", "min_std", "seed"):
        require(0 <= getattr(settings, name) < math.inf,
                f"--{name.replace('_', '-')} must not be negative")
    require(0 < settings.clip < 1, "--clip must lie between 0 and 1")
    return settings


def parse_weights(text: str, axes: list[str]) -> Tensor:
    """`safety=2,politeness=0` → weights (K,); axes that are not named keep 1."""
    weights, named = dict.fromkeys(axes, 1.0), set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        require(axis not in named, f"--weights names {axis} twice")
        named.add(axis)
        require(axis in weights, f"--weights: unknown axis {axis!r}; the reward model "
                f"has {', '.join(axes)}")
        try:
            weights[axis] = float(number)
        except ValueError:
            raise UserError(f"--weights: {part!r} is not axis=number") from None
        require(0 <= weights[axis] < math.inf, f"--weights: {axis} is {number}; a "
                "weight must not be negative")
    result = torch.tensor(list(weights.values()))  # (K,)
    require(0 < result.sum().item() < math.inf, "--weights: all weights are 0, or one "
            "is too large")
    return result


# ----------------------------------------------------------------------------- the loop

# A step, in the order of its parts: `draw_prompts`, `sample_batch`, `score_batch`,
# `build_batch`, `reference_hidden`, `train_group` for each prompt, and AdamW
# (`train_batch`). `train_step` and `train`, at the end of this part, put them together.

# Files of a run folder. The first evaluation is kept until the run is finished.
CONFIG, BEFORE = "config.json", "before.json"
LINES = ("metrics.jsonl", "samples.jsonl")  # written step by step
DEAD_STEPS = 10  # after so many steps without a live group in a row, a note


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as text, as ids, and its number in its file (it seeds the sampling)."""

    text: str
    ids: list[int]
    index: int


@dataclasses.dataclass
class Run:
    """What every part of the loop needs."""

    settings: Settings
    model: Qwen
    tokenizer: Tokenizer
    axes: list[str]
    weights: Tensor  # (K,)
    # (prompt, responses) → scores (n, K): the reward model, or the gold rubric
    score: Callable[[Prompt, list[list[int]]], Tensor]
    # those that only judge, by name: "judge" (--judge), "gold" (the rubric)
    judges: dict[str, Callable[[Prompt, list[list[int]]], Tensor]]
    folder: Path
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)  # name → SHA-256


@dataclasses.dataclass
class Batch:
    """One step's responses: B = P·G rows, in the order of the rollout."""

    prompts: list[Prompt]
    sampled: Rollout
    scores: Tensor  # (B, K)
    reward: Tensor  # (B,)
    advantage: Tensor  # (B,)
    alive: Tensor  # (P,)


class Clock:
    """Seconds by phase: `with clock("sampling"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count for `phase` until the block ends."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():  # a GPU may not have begun yet
            torch.cuda.synchronize()
        spent = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


def shuffled(prompts: list[Prompt], seed: int):
    """Prompts for ever, in a new order each time round."""
    shuffle = random.Random(seed)
    while True:
        order = list(prompts)
        shuffle.shuffle(order)
        yield from order


def draw_prompts(order, count: int) -> list[Prompt]:
    """The next prompts, no two the same: a twin would draw the same responses."""
    chosen: list[Prompt] = []
    while len(chosen) < count:
        prompt = next(order)
        if prompt not in chosen:
            chosen.append(prompt)
    return chosen


def sample_batch(run: Run, prompts: list[Prompt], step: int) -> Rollout:
    """G responses to each prompt from the policy as it is now."""
    s = run.settings
    uniforms = torch.stack([
        draw_uniforms(s.seed, step, p.index, s.group_size, s.max_new_tokens)
        for p in prompts])  # (P, G, C)
    with lora.using(run.model, "policy"):
        return rollout(run.model, run.tokenizer, [p.ids for p in prompts], uniforms,
                       s.temperature)


def score_batch(run: Run, prompts: list[Prompt], sampled: Rollout) -> Batch:
    """Scores, R and advantages of a rollout."""
    s, responses = run.settings, sampled.responses()
    groups = [responses[i:i + s.group_size]
              for i in range(0, len(responses), s.group_size)]
    parts = [run.score(p, rows) for p, rows in zip(prompts, groups, strict=True)]
    scores = torch.stack(parts).float().cpu()  # (P, G, K)
    require(bool(scores.isfinite().all()), "the reward model gave a score that is not "
            "finite; retrain it")
    return build_batch(run, prompts, sampled, scores)


def build_batch(run: Run, prompts: list[Prompt], sampled: Rollout,
                scores: Tensor) -> Batch:
    """From scores (P, G, K) to a batch with its rewards and advantages."""
    s = run.settings
    advantage, alive = make_advantage(scores, run.weights, s.advantage, s.min_std)
    scores = scores.flatten(0, 1)  # (B, K)
    return Batch(prompts, sampled, scores, combine(scores, run.weights),
                 advantage.flatten(), alive)


def sample_and_score(run: Run, prompts: list[Prompt], step: int,
                     clock: Clock) -> Batch:
    """Responses and scores; with several processes, each makes those of its share."""
    own, batch = parallel.shard(prompts), None
    if own:
        with clock("sampling"):
            sampled = sample_batch(run, own, step)
        with clock("scoring"):
            batch = score_batch(run, own, sampled)
    return batch if parallel.size() == 1 else gather_batch(run, prompts, batch)


def gather_batch(run: Run, prompts: list[Prompt], own: Batch | None) -> Batch:
    """The batch of all prompts, from this process's share of it and the others'.

    Each process writes its rows into a table of zeros, and the tables are added up.
    float64 holds every id and every fp32 number exactly.
    """
    room, size = run.settings.max_new_tokens, run.settings.group_size
    parts = [room, room, 1, 1, len(run.axes)]
    table = torch.zeros(len(prompts), size, sum(parts), dtype=torch.float64,
                        device=run.model.device)
    if own is not None:
        rows, used = own.sampled, own.sampled.mask.shape[1]
        tokens, logp = (F.pad(t.double(), (0, room - used))
                        for t in (rows.tokens, rows.logp))
        columns = [tokens, logp, rows.mask.sum(1, keepdim=True), rows.ended[:, None],
                   own.scores]
        mine = parallel.shard(range(len(prompts)))
        table[mine] = torch.cat([c.to(table) for c in columns], 1).unflatten(
            0, (len(mine), size))
    parallel.all_reduce(table)
    tokens, logp, length, ended, scores = table.flatten(0, 1).split(parts, 1)
    used = int(length.max())
    sampled = Rollout(tokens[:, :used].long(),
                      torch.arange(used, device=table.device) < length,  # (B, C)
                      logp[:, :used].float(), ended[:, 0].bool())
    return build_batch(run, prompts, sampled,
                       scores.float().cpu().unflatten(0, (len(prompts), size)))


def response_hidden(run: Run, prompt: list[int], responses: list[list[int]],
                    prefix) -> tuple[Tensor, Tensor]:
    """Hidden states before every response token: (n, C, D), and mask (n, C).

    A row is the prompt's last token and the response without its last one: the state at
    the prompt's last token predicts the response's first, and the row's last state
    predicts the response's last: its end token, which is trained like any other.

    Args:
        prefix: keys and values of prompt[:-1], from `Qwen.shared_prefix`.
    """
    ids = [prompt[-1:] + r[:-1] for r in responses]
    ids = pad_rows(ids, run.model.device)  # (n, C)
    lengths = torch.tensor([len(r) for r in responses], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (n, C)
    return run.model(ids, prefix), mask


def group_rows(run: Run, batch: Batch, p: int) -> list[list[int]]:
    """The responses of prompt p."""
    size = run.settings.group_size
    return batch.sampled.responses()[p * size:(p + 1) * size]


def group_parts(run: Run, batch: Batch,
                p: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """The micro-batches of group p, computed with the active adapter.

    Between two of them the caller may run `backward`: see `Qwen.shared_prefix`.

    Yields:
        rows of the batch (n), `response_hidden` of these (n, C, D), mask (n, C).
    """
    prompt, responses = batch.prompts[p].ids, group_rows(run, batch, p)
    with run.model.shared_prefix(prompt) as prefix:
        for part in micro_batches([len(r) for r in responses]):
            found = response_hidden(run, prompt, [responses[i] for i in part], prefix)
            yield [p * run.settings.group_size + i for i in part], *found


@torch.no_grad()
def reference_hidden(run: Run, batch: Batch, p: int) -> list[Tensor]:
    """The bare base's hidden states (N, D), a micro-batch each: the KL's reference.

    States and not log-probs: the exact KL needs the whole distribution, for which D
    numbers a token stand instead of V.
    """
    with lora.using(run.model, None):
        return [hidden[mask] for _, hidden, mask in group_parts(run, batch, p)]


# What `train_group` adds up: its loss; and, over its tokens, their number, the entropy,
# the exact KL to the reference, and how many [E5] silenced.
SUMS = ("loss", "tokens", "entropy", "kl", "clipped")


def train_group(run: Run, batch: Batch, p: int,
                reference: list[Tensor] | None) -> Tensor:
    """Add the gradient of one group's share of [E7]; return SUMS over its tokens.

    Args:
        reference: from `reference_hidden`, or None when beta is 0.
    """
    s, sums = run.settings, dict.fromkeys(SUMS, 0.0)
    total_tokens = int(batch.sampled.mask.sum())
    for i, (rows, hidden, mask) in enumerate(group_parts(run, batch, p)):
        where = (rows, slice(0, mask.shape[1]))
        targets = batch.sampled.tokens[where][mask]  # (N,)
        stats = token_stats(run, hidden[mask], targets, reference and reference[i],
                            mask)
        # With one inner step the policy is the one that sampled: ρ is 1, and ∇ρ is
        # ∇ log π. Clipping acts from the second inner step on.
        old = (stats["logp"].detach() if s.inner_steps == 1
               else batch.sampled.logp[where])  # (n, C)
        advantage = batch.advantage[rows].to(hidden.device)  # (n,)
        # The advantages of a group add up to 0, so the loss's *value* says nothing
        # about progress: watch R.
        loss, clipped = grpo_loss(
            stats["logp"], old, stats["logp_ref"], advantage, mask, clip=s.clip,
            beta=s.beta, kl=s.kl, loss=s.loss, rows=len(batch.reward),
            tokens=total_tokens, length=s.max_new_tokens)
        require(bool(loss.isfinite()), "the loss is not finite; lower --lr")
        loss.backward()
        sums["loss"] += loss.item()
        sums["tokens"] += len(targets)
        sums["entropy"] += stats["entropy"].sum().item()
        sums["clipped"] += clipped.sum().item()
        if stats["kl"] is not None:
            sums["kl"] += stats["kl"].sum().item()
    return torch.tensor(list(sums.values()), dtype=torch.float64)


def token_stats(run: Run, hidden: Tensor, targets: Tensor, ref: Tensor | None,
                mask: Tensor) -> dict[str, Tensor | None]:
    """log π and its statistics of response tokens: hidden, ref (N, D), targets (N,).

    Returns:
        logp and logp_ref as (n, C), 0 in the padding, since the loss needs rows;
        entropy and kl as (N,), since they are only added up.
    """
    s, head = run.settings, run.model.unembed
    logp, entropy, kl, logp_ref = token_statistics(
        hidden, head, targets, s.temperature, run.tokenizer.valid, entropy=True,
        reference=ref)
    return {"logp": by_row(logp, mask), "entropy": entropy, "kl": kl,
            "logp_ref": None if logp_ref is None else by_row(logp_ref, mask)}


def by_row(values: Tensor, mask: Tensor) -> Tensor:
    """Values (N,) → (n, C): where mask is True, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device
                       ).masked_scatter(mask, values)


def train_batch(run: Run, batch: Batch, optimizer: torch.optim.Optimizer,
                clock: Clock) -> dict[str, float]:
    """All inner steps on one batch; the metrics are those of the last one."""
    s = run.settings
    # With beta 0 a dead group has no gradient: it is dropped before the forward pass.
    needed = [p for p in range(len(batch.prompts)) if s.beta > 0 or batch.alive[p]]
    if not needed:
        return {"grad_norm": 0.0, "trained_tokens": 0}
    groups = [p for p in parallel.shard(range(len(batch.prompts))) if p in needed]
    with clock("reference"):
        reference = {p: reference_hidden(run, batch, p) for p in groups if s.beta > 0}
    parameters = lora.parameters(run.model, "policy")
    with clock("training"), lora.using(run.model, "policy"):
        for _ in range(s.inner_steps):
            sums = torch.zeros(len(SUMS), dtype=torch.float64)
            for p in groups:
                sums += train_group(run, batch, p, reference.get(p))
            parallel.all_reduce_gradients(parameters)
            # To norm 1; the norm before clipping is what metrics.jsonl reports.
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            require(bool(norm.isfinite()), "the gradient is not finite; lower --lr")
            optimizer.step()
            optimizer.zero_grad()
    sums = sums.to(run.model.device)
    parallel.all_reduce(sums)
    loss, tokens, entropy, kl, clipped = sums.tolist()
    metrics = {"loss": loss, "grad_norm": norm.item(), "entropy": entropy / tokens,
               "clip_share": clipped / tokens,
               "trained_tokens": int(tokens) * s.inner_steps}
    return metrics | ({"kl": kl / tokens} if s.beta > 0 else {})


def describe(run: Run, batch: Batch) -> dict:
    """What the responses of a step were like, for metrics.jsonl."""
    size, sampled = run.settings.group_size, batch.sampled
    rows = sampled.responses()
    groups = [rows[i:i + size] for i in range(0, len(rows), size)]
    distinct = [len({tuple(r) for r in group}) for group in groups]
    axes = {axis: {"mean": column.mean().item(), "std": column.std(correction=0).item()}
            for axis, column in zip(run.axes, batch.scores.unbind(1), strict=True)}
    gold = {}
    if "gold" in run.judges:  # R by the rubric, which the policy is not paid by
        scores = torch.cat([run.judges["gold"](p, rows) for p, rows in
                            zip(batch.prompts, groups, strict=True)])
        gold["R_gold"] = combine(scores, run.weights).mean().item()
    return {
        "R": batch.reward.mean().item(), **gold,
        "R_std": batch.reward.std(correction=0).item(), "axes": axes,
        "advantage_std": batch.advantage.std(correction=0).item(),
        "dead_groups": 1 - batch.alive.float().mean().item(),
        "length": sampled.mask.sum(1).float().mean().item(),
        "cut_off": 1 - sampled.ended.float().mean().item(),
        "distinct": sum(distinct) / len(distinct),
        "tokens": int(sampled.mask.sum()),
    }


def require_movement(run: Run, step: int, metrics: dict) -> None:
    """After a step with a gradient, some B must have left zero."""
    if metrics["grad_norm"] > 0:
        moved = any(bool(layer.lora_B["policy"].any())
                    for layer in lora.layers(run.model).values())
        require(moved, f"the adapter is still zero after step {step}; nothing is being "
                "learnt (is --lr too small?)")


def show(bar: tqdm, run: Run, metrics: dict) -> None:
    """R, the axes, KL and speed, beside the bar's own time left."""
    figures = {"R": f"{metrics['R']:.3f}"}
    figures |= {a[:4]: f"{v['mean']:.2f}" for a, v in metrics["axes"].items()}
    if "kl" in metrics:
        figures["KL"] = f"{metrics['kl']:.3f}"
    bar.set_postfix(figures | {
        "tok/s": f"{metrics['tokens'] / metrics['seconds']:.0f}"}, refresh=False)
    bar.update()


def write_samples(run: Run, batch: Batch, step: int, file) -> None:
    """Every response of the step with its scores, R and advantage."""
    for row, ids in enumerate(batch.sampled.responses()):
        append_line(file, {
            "step": step, "prompt": batch.prompts[row // run.settings.group_size].text,
            "response": run.tokenizer.decode(ids),
            "scores": {a: round(x, 4) for a, x in
                       zip(run.axes, batch.scores[row].tolist(), strict=True)},
            "R": round(batch.reward[row].item(), 4),
            "advantage": round(batch.advantage[row].item(), 4)})


def restore(run: Run, parameters: list[Tensor],
            optimizer: torch.optim.Optimizer) -> int:
    """Load the folder's checkpoint, if it has one, and cut the files of lines to it."""
    s, checkpoint, about, done = run.settings, run.folder / CHECKPOINT, {}, 0
    if checkpoint.is_file():
        about = load_checkpoint(checkpoint, parameters, optimizer)
        done = about.get("step")
        require(type(done) is int and 0 <= done <= s.steps, f"{checkpoint} is of step "
                f"{done!r}, the run has {s.steps}")
    if parallel.rank() == 0:
        rows = s.prompts_per_step * s.group_size
        for name, count in zip(LINES, (done, done * rows), strict=True):
            keep_lines(run.folder / name, count, about.get(name))
    return done


def train_step(run: Run, prompts: list[Prompt], step: int,
               optimizer: torch.optim.Optimizer) -> tuple[Batch, dict]:
    """One optimisation step; returns its responses and its line of metrics."""
    clock, started = Clock(), time.perf_counter()
    batch = sample_and_score(run, prompts, step, clock)
    metrics = describe(run, batch) | train_batch(run, batch, optimizer, clock)
    seconds = {f"seconds_{phase}": t for phase, t in clock.seconds.items()}
    return batch, {"step": step, **metrics,
                   "seconds": time.perf_counter() - started, **seconds}


def train(run: Run, prompts: list[Prompt]) -> bool:
    """The loop: sample, score, compare, learn; a line of metrics a step.

    Goes on from the folder's checkpoint, if it has one, as if nothing had happened. All
    randomness comes from (seed, step, prompt): beside weights and moments, the number
    of the step is the whole state.

    Returns:
        False when it was asked to stop before the last step; a checkpoint is written.
    """
    s, parameters = run.settings, lora.parameters(run.model, "policy")
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    require(trainable > 0, "nothing to train: the adapter has no parameters")
    # No weight decay: the KL term alone holds the policy near the base.
    optimizer = torch.optim.AdamW(parameters, s.lr, weight_decay=0.0)
    done = restore(run, parameters, optimizer)
    order, due = shuffled(prompts, s.seed), Due(s.save_every)
    for _ in range(done):
        draw_prompts(order, s.prompts_per_step)
    asked, dead = False, 0
    metrics_path, samples_path = (run.folder / name for name in LINES)
    with tqdm(total=s.steps, initial=done, unit="step", **parallel.progress()) as bar, \
            Stop() as stop, append(metrics_path) as metrics_file, \
            append(samples_path) as samples_file:
        for step in range(done + 1, s.steps + 1):
            # A linear decay: the last steps settle instead of wandering.
            optimizer.param_groups[0]["lr"] = s.lr * (1 - (step - 1) / s.steps)
            batch, metrics = train_step(run, draw_prompts(order, s.prompts_per_step),
                                        step, optimizer)
            require_movement(run, step, metrics)
            # A signal may reach one process a step before the others.
            signals = torch.tensor(float(stop.asked), device=run.model.device)
            parallel.all_reduce(signals)
            asked = bool(signals)
            if parallel.rank() == 0:
                append_line(metrics_file, metrics)
                write_samples(run, batch, step, samples_file)
                if due(step) or asked or step == s.steps:
                    # The lines first: a checkpoint must not know more than they do.
                    for file in (metrics_file, samples_file):
                        os.fsync(file.fileno())
                    save_checkpoint(
                        run.folder / CHECKPOINT, parameters, optimizer,
                        {"step": step, **{name: file_sha256(run.folder / name)
                                          for name in (CONFIG, *LINES)}})
            show(bar, run, metrics)
            dead = dead + 1 if metrics["dead_groups"] == 1 else 0
            if dead == DEAD_STEPS and parallel.rank() == 0:
                bar.write(f"note: for {dead} steps every group was dead (its scores "
                          "agree within --min-std); nothing can be learnt from that: "
                          "raise --temperature or --group-size, or lower --min-std",
                          sys.stderr)
            if asked:
                break
    return not asked


# ------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(run: Run, prompts: list[Prompt], title: str,
             best_of: int = 1) -> tuple[dict, list[str]]:
    """Answer held-out prompts with the policy; mean scores, and the answers.

    Before and after use the same random numbers (those of step 0, which no training
    step uses), so that the difference is the training's. Before it the adapter is zero
    and the policy the base. KL and perplexity are at the sampling temperature.

    Args:
        best_of: answer so many times, and keep what the reward likes best.
    """
    s, size, answers, ended = run.settings, max(1, 32 // best_of), [], []
    by_judge = {who: [] for who in ("reward_model", *run.judges)}
    kl, surprise, tokens, drawn = 0.0, 0.0, 0, 0
    # The same run with G = 1 and with G = best_of.
    one, many = (dataclasses.replace(
        run, settings=dataclasses.replace(run.settings, group_size=count))
        for count in (1, best_of))
    with tqdm(total=len(prompts), desc=title, unit="prompt",
              **parallel.progress()) as bar:
        for start in range(0, len(prompts), size):
            part = prompts[start:start + size]
            batch = sample_and_score(many, part, 0, Clock())
            drawn += int(batch.sampled.mask.sum())
            batch = best_rows(one, batch, best_of)
            rows = batch.sampled.responses()
            answers += [run.tokenizer.decode(r).strip() for r in rows]
            ended += batch.sampled.ended.tolist()
            if s.reward != "gold":
                by_judge["reward_model"].append(batch.scores)
            for who, judge in run.judges.items():
                by_judge[who].append(judged(judge, batch))
            sums = against_base(one, batch)
            kl, surprise = kl + sums[0], surprise + sums[1]
            tokens += int(batch.sampled.mask.sum())
            bar.update(len(part))
    result = {}
    for who, parts in by_judge.items():
        if parts:
            scores = torch.cat(parts)
            result[who] = dict(zip(run.axes, scores.mean(0).tolist(), strict=True))
            result[who]["R"] = combine(scores, run.weights).mean().item()
    result |= {"kl": kl / tokens, "base_perplexity": math.exp(surprise / tokens),
               "distinct_3_grams": distinct_3_grams(answers),
               "length": tokens / len(prompts), "cut_off": 1 - sum(ended) / len(ended),
               "tokens_an_answer": drawn / len(prompts)}  # best of n draws n answers
    if "gold" in run.judges:
        result["behaviour"] = behaviours(prompts, answers)
    return result, answers


def best_rows(run: Run, batch: Batch, group_size: int) -> Batch:
    """The response of each group that the reward likes best."""
    best = batch.reward.view(-1, group_size).argmax(1)  # (P,)
    rows = best + group_size * torch.arange(len(best))
    sampled = Rollout(*(getattr(batch.sampled, f.name)[rows.to(run.model.device)]
                        for f in dataclasses.fields(Rollout)))
    return build_batch(run, batch.prompts, sampled, batch.scores[rows][:, None])


def judged(judge: Callable, batch: Batch) -> Tensor:
    """Scores (n, K) of one response a prompt; each process judges its share."""
    rows, scores = batch.sampled.responses(), torch.zeros_like(batch.scores)
    for p in parallel.shard(range(len(rows))):
        scores[p] = judge(batch.prompts[p], [rows[p]])[0].float().cpu()
    scores = scores.to(batch.sampled.tokens.device)
    parallel.all_reduce(scores)
    return scores.cpu()


def distinct_3_grams(texts: list[str]) -> float:
    """Different runs of three words, as a share of all runs.

    It falls when a policy has found one good sentence and says it to everybody.
    """
    runs = [tuple(words[i:i + 3]) for words in map(str.split, texts)
            for i in range(len(words) - 2)]
    return len(set(runs)) / max(1, len(runs))


def against_base(run: Run, batch: Batch) -> tuple[float, float]:
    """Sums over response tokens, in nats: the exact KL(π ‖ ref), and −log ref.

    Both at the sampling temperature, as everywhere.
    """
    groups = parallel.shard(range(len(batch.prompts)))
    sums = torch.zeros(2, dtype=torch.float64, device=run.model.device)
    for p in groups:
        reference = reference_hidden(run, batch, p)
        with lora.using(run.model, "policy"):
            for (rows, hidden, mask), ref in zip(group_parts(run, batch, p), reference,
                                                 strict=True):
                targets = batch.sampled.tokens[rows, :mask.shape[1]][mask]
                stats = token_stats(run, hidden[mask], targets, ref, mask)
                sums[0] += stats["kl"].sum().item()
                sums[1] -= stats["logp_ref"].sum().item()
    parallel.all_reduce(sums)
    return tuple(sums.tolist())


def behaviours(prompts: list[Prompt], answers: list[str]) -> dict[str, float]:
    """Shares that the gold rubric can name, on harmful and on benign prompts."""
    from data import rubric, world

    pairs = [(world.lookup(p.text), p.text, a)
             for p, a in zip(prompts, answers, strict=True)]
    kinds = {side: [rubric.kind(text, answer) for known, text, answer in pairs
                    if known.harmful == (side == "harmful")]
             for side in ("harmful", "benign")}
    return {side: {kind: round(names.count(kind) / len(names), 4)
                   for kind in sorted(set(names))} for side, names in kinds.items()}


# ------------------------------------------------------------------------ command line


def prompts_path(s: Settings) -> Path:
    """The file of prompts: the world's own, or whatever was asked for."""
    return s.prompts or (TINY if is_tiny(s.model) else TINY.parent) / "prompts.jsonl"


def read_prompts(s: Settings, tokenizer: Tokenizer,
                 context: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of the file, checked against the context."""
    path = prompts_path(s)
    train_prompts, held_out = [], []
    rows = read_rows(path, responses=False)
    for index, row in enumerate(rows):
        ids = tokenizer.chat(row["prompt"], s.system)
        prompt = Prompt(row["prompt"], ids, index)
        need = len(prompt.ids) + s.max_new_tokens
        require(need <= context, f"{path}: prompt {index + 1} needs {need} tokens with "
                f"its answer, the context has {context}; shorten it")
        held = row.get("split", "train") == "heldout"
        (held_out if held else train_prompts).append(prompt)
    if not held_out:  # a file without splits: hold out a fifth
        random.Random(0).shuffle(train_prompts)
        texts = list(dict.fromkeys(p.text for p in train_prompts))  # no twins
        cut = set(texts[:max(1, len(texts) // 5)])
        held_out = [p for p in train_prompts if p.text in cut]
        train_prompts = [p for p in train_prompts if p.text not in cut]
    require(len(train_prompts) >= s.prompts_per_step, f"{path} has "
            f"{len(train_prompts)} prompts to train on; --prompts-per-step asks for "
            f"{s.prompts_per_step}")
    # A fixed sample: seeds differ in training, not in what they are judged on.
    random.Random(0).shuffle(held_out)
    return train_prompts, held_out[:s.eval_prompts]


def gold_scorer(tokenizer: Tokenizer, prompts: list[Prompt]):
    """The tiny world's rubric, if it knows every prompt; else None."""
    from data import rubric, world

    if any(world.lookup(p.text) is None for p in prompts):
        return None

    def score(prompt: Prompt, responses: list[list[int]]) -> Tensor:
        marks = [rubric.score(prompt.text, tokenizer.decode(r)) for r in responses]
        return torch.tensor([[m[a] for a in rubric.AXES] for m in marks])  # (n, K)

    return score


def prepare(settings: Settings) -> tuple[Run, list[Prompt], list[Prompt]]:
    """Load or train everything that a run needs; `out` is settled already."""
    s = settings
    require_empty(s, s.out)
    model, tokenizer = load(s.model, s.device, s.dtype and getattr(torch, s.dtype))
    prompts, held_out = read_prompts(s, tokenizer, model.config.max_position_embeddings)
    gold = gold_scorer(tokenizer, prompts + held_out)
    if s.reward == "gold":
        require(gold is not None, "--reward gold: these prompts are not from the tiny "
                "world, for which alone there is a gold rubric")
        from data import rubric
        axes, score = list(rubric.AXES), gold
    else:
        scorer = find_reward_model(s, model, tokenizer)
        axes, score = scorer.axes, scoring(scorer, tokenizer)
        if gold:
            gold = with_axes(gold, axes)
    judges = {"gold": gold} if gold else {}
    if s.judge:
        judge = reward_model.load(model, s.judge, "judge")
        require(judge.axes == axes, f"{s.judge} judges {', '.join(judge.axes)}; the "
                f"reward has {', '.join(axes)}")
        judges = {"judge": scoring(judge, tokenizer)} | judges
    weights = parse_weights(s.weights, axes)
    lora.attach(model, "policy", s.rank, 2 * s.rank, s.seed)
    run = Run(s, model, tokenizer, axes, weights, score, judges, s.out,
              identify(s, model))
    return run, prompts, held_out


def with_axes(gold: Callable, axes: list[str]) -> Callable | None:
    """The gold rubric with its axes in another order; None if they are other axes."""
    from data import rubric

    if set(axes) != set(rubric.AXES):
        return None
    order = [rubric.AXES.index(axis) for axis in axes]
    return lambda prompt, responses: gold(prompt, responses)[:, order]


def require_empty(s: Settings, folder: Path) -> None:
    """A run starts in a folder without a run, whole or in parts."""
    names = (CONFIG, *LINES, CHECKPOINT, BEFORE)
    # The other processes of this run may look when the first has begun to write.
    require(bool(s.resume) or parallel.rank() > 0
            or not any((folder / name).exists() for name in names),
            f"{folder} holds a run already; choose another --out, or go on with it, if "
            f"it was interrupted: --resume {folder}")


def identify(s: Settings, model: Qwen) -> dict[str, str]:
    """SHA-256 of everything that a run reads: it resumes on the same or not at all."""
    found = {"base": fingerprint(model), "prompts": file_sha256(prompts_path(s))}
    reward = Path(s.reward or reward_model.default_folder(s.model))
    folders = {"reward model": None if s.reward == "gold" else reward, "judge": s.judge}
    for name, folder in folders.items():
        if folder is not None and folder.is_dir():
            shas = [file_sha256(folder / file) for file in reward_model.FILES]
            found[name] = hashlib.sha256("".join(shas).encode()).hexdigest()
    return found


def scoring(scorer: reward_model.RewardModel, tokenizer: Tokenizer):
    """The scorer as a function of a prompt and responses.

    It reads every prompt as it did in its training, whatever --system tells the policy.
    """
    return lambda prompt, responses: scorer.score(
        tokenizer.chat(prompt.text), responses)


def find_reward_model(s: Settings, model: Qwen,
                      tokenizer: Tokenizer) -> reward_model.RewardModel:
    """Load the reward model of this base; train it first where there is none."""
    folder = Path(s.reward) if s.reward else reward_model.default_folder(s.model)
    if s.reward or (folder / "reward.json").is_file():
        return reward_model.load(model, folder)
    require(s.resume is None, f"{folder}, the reward model of this run, is gone")
    require(parallel.size() == 1, f"there is no reward model for {s.model} yet; train "
            "it first, in one process: python reward_model.py")
    print(f"there is no reward model for {s.model} yet: training one into {folder}")
    options = reward_model.resolve(
        reward_model.Settings(model=s.model, device=s.device, dtype=s.dtype))
    with only_writer(folder):
        scorer = reward_model.train_reward_model(model, tokenizer, options, folder)
    for parameter in scorer.parameters():
        parameter.requires_grad_(False)
    return scorer


def free_folder(s: Settings, method: str = "") -> Path:
    """runs/NAME, or the first runs/NAME-2, -3 … that is free."""
    name, number = "-".join(filter(None, (method, short_name(s.model).lower()))), 1

    def folder() -> Path:
        return Path("runs") / (name if number == 1 else f"{name}-{number}")

    while folder().exists():
        number += 1
    # The first process decides: when another looks, the folder may be there already.
    chosen = torch.tensor(0 if parallel.rank() else number, device=s.device)
    parallel.all_reduce(chosen)
    number = int(chosen)
    return folder()


@torch.no_grad()
def estimate_seconds(run: Run, prompts: list[Prompt], held_out: list[Prompt]) -> float:
    """How long the run will take here, from a scoring pass and three decoding steps."""
    s, prompt = run.settings, prompts[0]
    rows = s.prompts_per_step * s.group_size
    length = s.max_new_tokens * 0.6  # most responses end before the limit
    block = torch.zeros(s.group_size, 32, dtype=torch.long, device=run.model.device)
    probe, clock = draw_uniforms(0, 0, 0, rows, 3)[None], Clock()
    run.model(block[:1, :1])  # the first call of a library loads it
    with clock("scoring"):
        run.model(block)
    with clock("sampling"):
        rollout(run.model, run.tokenizer, [prompt.ids], probe, s.temperature)
    per_token = clock.seconds["scoring"] / block.numel()
    per_decode = clock.seconds["sampling"] / 4  # the prompt counts as one more
    # Scoring, reference; and an update: forward, backward, and the head's products.
    passes = 1 + (s.beta > 0) + 3 * s.inner_steps
    tokens = rows * length + s.prompts_per_step * len(prompt.ids)
    step = per_decode * s.max_new_tokens + passes * tokens * per_token
    answers = 2 * len(held_out) * (length + len(prompt.ids)) * 3 * per_token
    return s.steps * step + answers + 2 * len(held_out) / 16 * per_decode * length


PLANNED_PROMPT = 64  # tokens; the bundled prompts have 51 (median) to 94


def plan(s: Settings) -> str:
    """A table of the memory that a run needs, in GB, computed without any weights."""
    config, size = known_config(s.model), PLANNED_PROMPT
    largest = max(map(len, micro_batches([s.max_new_tokens] * s.group_size)))
    rows, columns = s.prompts_per_step * s.group_size, []
    for dtype in (torch.float32, torch.bfloat16):
        with FakeTensorMode():  # tensors with a shape and no memory
            model = skeleton(config, dtype)
            lora.attach(model, "policy", s.rank, 2 * s.rank)
            activations = kept_for_backward(model, largest, s.max_new_tokens, size)
        adapter = sum(p.numel() for p in lora.parameters(model, "policy"))
        cache = (rows * (size + s.max_new_tokens) * 2 * config.num_hidden_layers
                 * config.num_key_value_heads * config.head_dim)
        columns.append([x / 1e9 for x in (
            config.num_parameters * dtype.itemsize,
            4 * 4 * adapter,  # fp32: itself, its gradient, AdamW's two moments
            max(cache * dtype.itemsize, activations),  # never held together
            # fp32 logits of policy and reference, and exp of both, of a block
            4 * 4 * min(BLOCK_LOGITS,
                        largest * s.max_new_tokens * config.vocab_size))])
    names = ["base (policy, reference and reward model)", "LoRA and AdamW",
             "sampling or a backward pass, the larger", "a block of the vocabulary"]
    table = [[name, *(f"{c:.2f}" for c in cells)]
             for name, *cells in zip(names, *columns, strict=True)]
    table.append(["together", *(f"{sum(column):.2f}" for column in columns)])
    return (f"{base_name(s.model)}: {config.num_parameters / 1e9:.2f} billion weights; "
            f"{s.prompts_per_step} prompts of {size} tokens × {s.group_size} responses "
            f"of {s.max_new_tokens}, rank {s.rank}\n"
            + format_table(["GB (10^9 bytes)", "float32", "bfloat16"], table))


def skeleton(config: Config, dtype: torch.dtype) -> Qwen:
    """A frozen model of that type; `Module.to` cannot change fake tensors."""
    model = Qwen(config).requires_grad_(False)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(weight.to(dtype), False))
    return model


def kept_for_backward(model: Qwen, rows: int, tokens: int, prompt: int) -> int:
    """Bytes that autograd keeps of one micro-batch (rows, tokens) and its prompt.

    With fake tensors nothing is computed, and what would be kept is counted.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata  # views of one tensor count once
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    def ids(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device=model.device)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            lora.using(model, "policy"):
        prefix = Cache(model.config.num_hidden_layers)
        prefix.store = True
        model(ids(1, prompt), prefix)
        prefix.store = False
        model(ids(rows, tokens), prefix.detached())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def report(run: Run, held_out: list[Prompt], before: tuple, after: tuple) -> None:
    """The table and three pairs of answers, drawn by the seed."""
    rows = []
    for who in ("reward_model", "judge", "gold"):
        if who in before[0]:
            rows += [[f"{who} {axis}", old, after[0][who][axis],
                      f"{after[0][who][axis] - old:+.3f}"]
                     for axis, old in before[0][who].items()]
    print(f"\n{len(held_out)} held-out prompts, mean score before and after")
    print(format_table(["scored by, axis", "before", "after", "change"], rows))
    how = "at most" if "kl_is_a_bound" in after[0] else "exactly"
    print(f"KL to the base: {how} {after[0]['kl']:.3f} nats a token; under the base, "
          f"perplexity {before[0]['base_perplexity']:.2f} → "
          f"{after[0]['base_perplexity']:.2f}; distinct 3-grams "
          f"{before[0]['distinct_3_grams']:.2f} → {after[0]['distinct_3_grams']:.2f}")
    for i in random.Random(run.settings.seed).sample(range(len(held_out)),
                                                     min(3, len(held_out))):
        print(f"\nprompt: {held_out[i].text}\nbefore: {before[1][i]}\n"
              f"after:  {after[1][i]}")


def main(argv: list[str] | None = None) -> None:
    """Align a model and say what became of it."""
    started = time.perf_counter()
    settings = parse_settings(Settings, __doc__.split("\n")[0], argv)
    if settings.resume:
        settings = settings_of(settings.resume, argv)
    settings = resolve(settings)
    if settings.plan:
        print(plan(settings))
        return
    with contextlib.ExitStack() as open_things:
        open_things.enter_context(parallel.together(settings.device))
        settings = dataclasses.replace(
            settings, out=settings.out or free_folder(settings))
        if parallel.rank() == 0:  # before anything that takes long
            open_things.enter_context(only_writer(settings.out))
        run, prompts, held_out = prepare(settings)
        announce(run, prompts, held_out)
        before = answers_before(run, held_out)
        if not train(run, prompts):
            print(f"stopped; go on with: python grpo.py --resume {run.folder}",
                  file=sys.stderr)
            sys.exit(130)
        save_policy(run)
        after = evaluate(run, held_out, "after")
        finish(run, held_out, before, after, started,
               lora.parameters(run.model, "policy"))


def settings_of(folder: Path, argv: list[str] | None) -> Settings:
    """The settings of a run that was interrupted; options typed now must agree."""
    path, checkpoint = folder / CONFIG, folder / CHECKPOINT
    require(path.is_file(), f"{folder} holds no run to resume (no {CONFIG}); start it "
            "without --resume")
    require_unfinished(folder)
    if checkpoint.is_file():
        require(checkpoint_about(checkpoint).get(CONFIG) == file_sha256(path),
                f"{path} has changed since {checkpoint} was written; put the old one "
                "back, or start another run")
    given = given_options(Settings, argv)
    del given["resume"]
    saved = read_json(path) | {"out": str(folder)}
    require("method" not in saved, f"{folder} is a run of baselines.py, which cannot "
            "resume")
    return dataclasses.replace(
        saved_settings(Settings, saved, given, path), resume=folder)


def require_unfinished(folder: Path) -> None:
    """The checksums are a run's last file; what is left beside them is swept up."""
    if (folder / CHECKSUMS).exists():
        for name in (CHECKPOINT, BEFORE):
            (folder / name).unlink(missing_ok=True)
        raise UserError(f"{folder} is finished already; nothing is left to resume")


def announce(run: Run, prompts: list[Prompt], held_out: list[Prompt]) -> None:
    """Say what will be done, and write it down as config.json."""
    s, shares = run.settings, (run.weights / run.weights.sum()).tolist()
    print("R = " + " + ".join(f"{w:.2f} {a}" for w, a in
                              zip(shares, run.axes, strict=True)))
    expected = format_seconds(estimate_seconds(run, prompts, held_out))
    print(f"{s.steps} steps of {s.prompts_per_step} prompts × {s.group_size} "
          f"responses; about {expected} on this machine; writing {run.folder}")
    path, config = run.folder / CONFIG, config_of(run)
    if parallel.rank():
        return
    if s.resume is None:
        write_json(path, config)
        return
    require_unfinished(run.folder)  # now that nobody else is writing here
    for file in run.folder.glob(".*.*"):  # of a process that was killed
        file.unlink()
    saved = read_json(path)
    inputs = saved.get("inputs")
    require(isinstance(inputs, dict), f"{path} lacks the SHA-256 of its inputs")
    changed = sorted(name for name in run.inputs.keys() | inputs.keys()
                     if inputs.get(name) != run.inputs.get(name))
    require(not changed, f"{run.folder} was made with another {', '.join(changed)}; "
            "put the old one back, or start another run")
    for name in ("torch", "threads", "processes"):
        if saved.get(name) != config[name]:
            print(f"note: {name} was {saved.get(name)} and is {config[name]} now; the "
                  "rest of the run will round differently", file=sys.stderr)


def config_of(run: Run) -> dict:
    """All settings of a run as they are used, its inputs, and where it runs."""
    s = run.settings
    config = {k: str(v) if isinstance(v, Path) else v
              for k, v in dataclasses.asdict(s).items()}
    return config | {
        "out": str(run.folder), "resume": None, "axes": run.axes,
        "weights_used": (run.weights / run.weights.sum()).tolist(),
        "inputs": run.inputs,
        "reward": s.reward or str(reward_model.default_folder(s.model)),
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "processes": parallel.size()}


def answers_before(run: Run, held_out: list[Prompt]) -> tuple[dict, list[str]]:
    """Evaluate the base, once: a run that is resumed reads what it found."""
    path = run.folder / BEFORE

    def seal(found: list) -> str:
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    saved = read_json(path) if path.is_file() else {}
    found = [saved.get("figures"), saved.get("answers")]
    if saved.get("sha256") != seal(found):  # none, or a damaged one: the base is here
        found = list(evaluate(run, held_out, "before"))
        if parallel.rank() == 0:
            write_json(path, {"figures": found[0], "answers": found[1],
                              "sha256": seal(found)})
    return tuple(found)


def save_policy(run: Run) -> None:
    """The adapter, in PEFT's layout."""
    if parallel.rank() == 0:
        lora.save(run.model, "policy", run.folder / "adapter",
                  base_name(run.settings.model))


def finish(run: Run, held_out: list[Prompt], before: tuple, after: tuple,
           started: float, trained: list[nn.Parameter]) -> None:
    """Write summary.json and print the table.

    Args:
        trained: all that was trained, for the account of what it cost.
    """
    if parallel.rank():
        return
    s = run.settings
    report(run, held_out, before, after)
    seconds = time.perf_counter() - started
    lines = (run.folder / LINES[0]).read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    write_json(run.folder / "summary.json", {
        "before": before[0], "after": after[0], "seconds": round(seconds, 1),
        "peak_rss_gb": round(peak_rss_gb(), 2), "seed": s.seed,
        "training_seconds": round(sum(m["seconds"] for m in metrics), 1),
        "sampled_tokens": sum(m["tokens"] for m in metrics),
        "trained_tokens": sum(m["trained_tokens"] for m in metrics),
        "trained_parameters": sum(p.numel() for p in trained),
        "held_out_prompts": len(held_out), "model": base_name(s.model),
        "answers": [{"prompt": p.text, "before": b, "after": a} for p, b, a in
                    zip(held_out, before[1], after[1], strict=True)]})
    # The checksums come last: a folder that has them is finished.
    write_checksums(run.folder, [CONFIG, *LINES, "summary.json"])
    for name in (CHECKPOINT, BEFORE):
        (run.folder / name).unlink(missing_ok=True)
    saved = f"adapter in {run.folder / 'adapter'} (PEFT format)" if trained else (
        "nothing was trained")
    print(f"\n{format_seconds(seconds)}, peak {peak_rss_gb():.2f} GB; {saved}")


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
