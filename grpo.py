"""Multi-objective GRPO: the objective, one update, the loop, the command line.

After *Optimizing Safe and Aligned Language Generation: A Multi-Objective GRPO Approach*
(arXiv 2503.21819); GRPO itself is from DeepSeekMath (arXiv 2402.03300).

Kept     A reward model regresses several scores for a prompt and a response; a
         weighted sum makes one reward R of them; GRPO samples a group of responses per
         prompt and normalises R inside the group, so it needs no value critic; LoRA
         carries the change.
Changed  Policy, reference and reward model are roles of one frozen base: no second
         model is in memory. Each of them computes a prompt once for its whole group.
         log π comes without full logits. A group of nearly equal rewards (--min-std)
         has no advantage. Where sampler and trainer round differently (bf16, fp16),
         tokens are weighted by [E8]. The KL that is reported is exact over the
         vocabulary, and is KL(π ‖ ref); the estimator is only in the loss.
Dropped  Nothing of the objective, as far as we know. There is no mixed-precision
         machinery and no top-p in training.

    python grpo.py                                  # the bundled tiny model
    python grpo.py --weights safety=2,politeness=0  # what do you want it to become?
    python grpo.py --model DIR                      # a real Qwen2, Qwen2.5 or Qwen3

Read downwards, to the line that says stop. The objective is as the abstract has it; the
update applies it to one batch of scored responses; the loop makes the batches, for any
method that learns from fresh samples (`methods/`). How scores become R, [E2], stands in
`reward_model.py`; how a response is sampled, and its rows computed again, in
`sample.py`; what a run reads and writes, in `run.py`.

We had the paper's abstract and summaries, not its full text: "kept" means what these
say, and the tags [E1] to [E8] and [L1] are ours.

Shapes: P prompts a step, G responses a prompt, B = P·G rows, C response tokens, K axes;
row b = p·G + g. The objective also takes a micro-batch: n of the B rows, with N tokens.
"""

import contextlib
import dataclasses
import math
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lora
from evaluate import answers_before, describe, evaluate
from logprob import row_statistics
from plumbing import parallel
from plumbing.figures import Clock, Cost
from plumbing.files import one_line_errors, only_writer, require
from plumbing.options import option
from reward_model import combine
from run import (
    Log,
    Prompt,
    Run,
    announce,
    command_of,
    earlier_cost,
    finish,
    free_folder,
    prepare,
    read_settings,
    save_policy,
)
from run import Settings as SharedSettings
from sample import (
    Batch,
    group_micro_batches,
    reference_hidden,
    sample_batch,
    sample_lines,
    sampler_is_trainer,
    score_batch,
)

# ---------------------------------------------------------------------- the objective


def group_advantage(reward: Tensor, min_std: float = 1e-3,
                    divide: bool = True) -> tuple[Tensor, Tensor]:
    """Compare each response with its own group; the group's mean replaces a critic.

    Args:
        reward: (P, G), one row a prompt.
        min_std: a group with a smaller std is dead: all its advantages are 0. If β > 0
            its tokens still have their KL term.
        divide: False keeps the numerator only (Dr. GRPO, arXiv 2503.20783).

    Returns:
        advantage (P, G) and which groups are alive (P,).
    """
    # [E3] A_g = (R_g − mean_g R) / (std_g R + 1e-4), population std over the group
    # TRL has the sample std, so its advantages are sqrt((G − 1) / G) of these. 1e-4 and
    # not 1e-8: with min_std 0 and equal rewards the numerator is rounding error, which
    # a tiny denominator would turn into advantages of ±1.
    mean = reward.mean(1, keepdim=True)  # (P, 1)
    std = reward.std(1, correction=0, keepdim=True)  # (P, 1)
    advantage = (reward - mean) / (std + 1e-4) if divide else reward - mean
    # DEVIATES [E3]: 0 below min_std. What is left there is the noise of the rewards.
    alive = std >= min_std  # (P, 1)
    return torch.where(alive, advantage, 0.0), alive[:, 0]


def make_advantage(scores: Tensor, weights: Tensor, kind: str = "group",
                   min_std: float = 1e-3) -> tuple[Tensor, Tensor]:
    """From scores (P, G, K) to advantage (P, G), and which groups are alive (P,).

    Args:
        kind: "group" normalises the weighted sum, the paper's way; "mean-only" does
            not divide by its std; "per-axis" normalises every axis before the sum
            (MO-GRPO, arXiv 2509.22047); "gdpo" does that, and normalises the sum once
            more, over all groups of the step (GDPO, arXiv 2601.05242, and as TRL has
            it, but for its sample std).
    """
    if kind in ("group", "mean-only"):
        return group_advantage(combine(scores, weights), min_std, kind == "group")
    # DEVIATES [E3]: A = Σ_k w_k A_k / Σ_k w_k with A_k from axis k alone. In the
    # weighted sum an axis counts by its weight times its std; here by its weight alone.
    axes = [group_advantage(axis, min_std) for axis in scores.unbind(-1)]
    advantage = combine(torch.stack([a for a, _ in axes], -1), weights)  # (P, G)
    alive = torch.stack([live for _, live in axes], -1)[:, weights > 0].any(-1)  # (P,)
    if kind == "gdpo":
        # Where axes disagree, their sum has a std below 1. Over the whole step
        # (A − mean A) / (std A + 1e-4) has the size that β and the rate are made for.
        centred = advantage - advantage.mean()
        scaled = centred / (advantage.std(correction=0) + 1e-4)
        advantage = torch.where(alive[:, None], scaled, 0.0)
    return advantage, alive


def kl_estimate(logp: Tensor, logp_ref: Tensor, kind: str = "k3") -> Tensor:
    """Estimate KL(π ‖ ref) from sampled tokens: logp, logp_ref (B, C) → (B, C).

    k1 and k3 are each unbiased; k2 is close where π is near ref. In a loss their
    *gradients* count, and these differ. On-policy, with the samples fixed,
    δ = log ref − log π, E over π:

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
    return bounded_exp(delta) - delta - 1


def bounded_exp(x: Tensor) -> Tensor:
    """e^x, which from x = 20 on goes on as its tangent.

    One token whose probability has changed beyond measure must not overflow the sum;
    the tangent's slope still pulls it back.
    """
    near = x.clamp(max=20.0)
    return near.exp() * (1 + (x - near))


def sampler_weight(logp_old: Tensor, logp_sampled: Tensor, mask: Tensor,
                   cap: float = 2.0) -> Tensor:
    """What corrects for a sampler that was not quite π_old: all tensors (B, C).

    Sampled tokens weighted by w stand for tokens of π_old: E[w f] over π_sampled is
    E[f] over π_old, but for the cap, which keeps a rare token from deciding a step.
    """
    # [E8] w = min(π_old(token) / π_sampled(token), 2)
    return bounded_exp(torch.where(mask, logp_old - logp_sampled, 0.0)).clamp(max=cap)


def token_weights(mask: Tensor, loss: str = "grpo", rows: int | None = None,
                  tokens: int | None = None, length: int | None = None) -> Tensor:
    """What each token counts in the objective: mask (B, C) → (B, C).

    The denominators are those of the whole step, however few of its rows `mask` holds:
    the gradient does not change with micro-batches, padding or row order, and a dropped
    dead group still counts as a group.

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


def grpo_loss(logp: Tensor, logp_old: Tensor, logp_ref: Tensor | None,
              advantage: Tensor, weight: Tensor, clip: float = 0.2, beta: float = 0.04,
              kl: str = "k3", w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Minus the objective, of all rows of a step or of a micro-batch.

    Args:
        logp: (B, C) log π of the sampled tokens, with gradient.
        logp_old: (B, C) the same before the first update on them.
        logp_ref: (B, C) under the reference; may be None when beta is 0.
        advantage: (B,), one number for all tokens of a response.
        weight: (B, C) what each token counts, from `token_weights`; 0 in the padding,
            and only there.
        clip: ε; beta: weight of the KL term; kl: its estimator.
        w: (B, C) from `sampler_weight`; None where sampler and trainer are one.

    Returns:
        the loss (scalar) and which tokens are clipped (B, C).
    """
    mask, adv = weight > 0, advantage[:, None]  # (B, C), (B, 1)
    # [E4] ρ = π(token) / π_old(token)
    # `where` comes before exp: padding may hold anything, and 0 · inf is NaN.
    ratio = bounded_exp(torch.where(mask, logp - logp_old, 0.0))  # (B, C)
    # [E5] min(ρ A, clip(ρ, 1 − ε, 1 + ε) A)
    # Flat where ρ has left 1 ± ε in the direction that A rewards. In the other
    # direction the minimum keeps the slope: such a token is pulled back.
    clipped = ratio.clamp(1 - clip, 1 + clip) * adv  # (B, C)
    surrogate = torch.minimum(ratio * adv, clipped)  # (B, C)
    # w stands apart from the clip, which is about how far π has moved from π_old. The
    # KL goes without it: it is a penalty on these tokens, not a gain to estimate.
    objective = surrogate if w is None else w * surrogate  # (B, C)
    if beta > 0:
        objective = objective - beta * torch.where(
            mask, kl_estimate(logp, logp_ref, kl), 0.0)
    # [E7] J = Σ_b Σ_t weight_bt · ([E5] − β [E6]), by default with weight 1 / (B |o_b|)
    # of a response of |o_b| tokens: the mean of means. The loss is −J.
    return -(weight * objective).sum(), mask & (clipped < ratio * adv)


# ---------------------------------------------------------------------- GRPO's options


@dataclasses.dataclass(frozen=True)
class Settings(SharedSettings):
    """Options of `python grpo.py`: those of every run, and GRPO's own."""

    inner_steps: int = option(1, "updates on the same responses (TRL: num_iterations)",
                              low=1)
    clip: float = option(0.2, "epsilon of the clipped ratio (TRL: epsilon)", above=0,
                         below=1)
    beta: float = option(0.04, "weight of the KL term; at 0 no reference (TRL: beta)",
                         low=0)
    kl: str = option("k3", "KL estimator in the loss", choices=["k1", "k2", "k3"])
    loss: str = option("grpo", "normalisation (TRL: loss_type)",
                       choices=["grpo", "dapo", "dr_grpo"])
    advantage: str = option("group", "group; per-axis; gdpo (TRL: "
                            "multi_objective_aggregation normalize_then_sum); "
                            "mean-only (TRL: scale_rewards none)",
                            choices=["group", "per-axis", "gdpo", "mean-only"])
    min_std: float = option(1e-3, "a group (per-axis, gdpo: an axis of it) with a "
                            "smaller std is dead", low=0)

    def resolved(self) -> "Settings":
        """With the model's defaults; `--loss dr_grpo` also sets `--advantage`."""
        if self.loss != "dr_grpo":
            return super().resolved()
        # Its authors' whole recipe: no std and a constant length.
        require(self.advantage in ("group", "mean-only"), "--loss dr_grpo divides by "
                f"no std; it does not go with --advantage {self.advantage}")
        return dataclasses.replace(super().resolved(), advantage="mean-only")


# ------------------------------------------------------------------------- one update


def update(run: Run, batch: Batch, optimizer: torch.optim.Optimizer,
           clock: Clock) -> dict:
    """GRPO's update: compare each response with its group, and learn from that."""
    s, shape = run.settings, (len(batch.prompts), batch.group_size)
    advantage, alive = make_advantage(batch.scores.unflatten(0, shape), run.weights,
                                      s.advantage, s.min_std)  # (P, G), (P,)
    advantage = advantage.flatten()  # (B,)
    return {"advantage": advantage,
            "advantage_std": advantage.std(correction=0).item(),
            "dead_groups": 1 - alive.float().mean().item(),
            **train_batch(run, batch, advantage, alive, optimizer, clock)}


# What is added up over groups: the loss; and, over their tokens, the number, the
# entropy, the exact KL to the reference, how many are clipped, and the squares of
# log π_old − log π_sampled.
SUMS = ("loss", "tokens", "entropy", "kl", "clipped", "off_sampler")


def train_batch(run: Run, batch: Batch, advantage: Tensor, alive: Tensor,
                optimizer: torch.optim.Optimizer, clock: Clock,
                logp_old: Tensor | None = None) -> dict[str, float]:
    """All inner steps on one batch; the metrics are those of the last one.

    Args:
        advantage: (B,); alive: (P,), from `make_advantage`.
        logp_old: (B, C) of an earlier policy; by default π_old is the policy as it is,
            whose log-probs the first inner step computes anyway.
    """
    s = run.settings
    # With beta 0 a dead group has no gradient: it is dropped before the forward pass.
    needed = [p for p in range(len(batch.prompts)) if s.beta > 0 or alive[p]]
    if not needed:
        return {"grad_norm": 0.0, "trained_tokens": 0}
    groups = [p for p in parallel.shard(range(len(batch.prompts))) if p in needed]
    with clock("reference"):
        reference = {p: reference_hidden(run, batch, p) for p in groups if s.beta > 0}
    on_policy = logp_old is None
    if on_policy:
        dtype = torch.promote_types(torch.float32, run.model.unembed.dtype)
        logp_old = torch.zeros_like(batch.sampled.logp, dtype=dtype)
    with clock("training"), lora.using(run.model, "policy"):
        for inner in range(s.inner_steps):
            sums = torch.zeros(len(SUMS), dtype=torch.float64)
            for p in groups:
                sums += train_group(run, batch, advantage, p, reference.get(p),
                                    logp_old, on_policy and inner == 0)
            [norm] = optimizer_step(optimizer)
    sums = sums.to(run.model.device)
    parallel.all_reduce(sums)
    loss, tokens, entropy, kl, clipped, off_sampler = sums.tolist()
    metrics = {"loss": loss, "grad_norm": norm, "entropy": entropy / tokens,
               "clip_share": clipped / tokens,
               "off_sampler_rms": math.sqrt(off_sampler / tokens),
               "trained_tokens": int(tokens) * s.inner_steps}
    return metrics | ({"kl": kl / tokens} if s.beta > 0 else {})


def train_group(run: Run, batch: Batch, advantage: Tensor, p: int,
                reference: list[Tensor] | None, logp_old: Tensor,
                on_policy: bool) -> Tensor:
    """Add the gradient of one group's share of [E7]; return SUMS over its tokens.

    Args:
        advantage: (B,), of the whole batch.
        reference: from `reference_hidden`, or None when beta is 0.
        logp_old: (B, C), log π_old of the whole batch.
        on_policy: the policy *is* π_old; its log-probs are written into `logp_old`.
    """
    s, sampled, sums = run.settings, batch.sampled, dict.fromkeys(SUMS, 0.0)
    step_tokens = int(sampled.mask.sum())
    for i, (index, hidden, mask) in enumerate(group_micro_batches(run, batch, p)):
        stats = row_statistics(
            hidden, run.model.unembed, sampled.tokens[index], mask, s.temperature,
            run.tokenizer.valid, reference and reference[i])
        # In the first inner step the policy is π_old: ρ is 1, and ∇ρ is ∇ log π.
        # Clipping acts from the second one on.
        if on_policy:
            logp_old[index] = stats.logp.detach()
        old, drawn = logp_old[index], sampled.logp[index]  # (n, C)
        w = None if sampler_is_trainer(run.model) else sampler_weight(old, drawn, mask)
        weight = token_weights(
            mask.to(stats.logp.dtype), s.loss, rows=len(advantage), tokens=step_tokens,
            length=s.max_new_tokens)  # (n, C)
        # With one inner step and the default loss the surrogate's *value* is the mean
        # advantage: 0 in every group. The loss says nothing of progress; watch R.
        rows, _ = index
        loss, clipped = grpo_loss(
            stats.logp, old, stats.logp_ref, advantage[rows].to(hidden.device), weight,
            clip=s.clip, beta=s.beta, kl=s.kl, w=w)
        require(bool(loss.isfinite()), "the loss is not finite; lower --lr")
        loss.backward()
        sums["loss"] += loss.item()
        sums["tokens"] += int(mask.sum())
        sums["entropy"] += stats.entropy.sum().item()
        sums["clipped"] += clipped.sum().item()
        sums["off_sampler"] += (old - drawn)[mask].double().square().sum().item()
        if stats.kl is not None:
            sums["kl"] += stats.kl.sum().item()
    return torch.tensor(list(sums.values()), dtype=torch.float64)


def optimizer_step(optimizer: torch.optim.Optimizer) -> list[float]:
    """Clip the gradient of each group of parameters to norm 1, and take the step.

    Returns:
        each group's norm before the clipping.
    """
    norms = []
    for group in optimizer.param_groups:
        parallel.all_reduce_gradients(group["params"])
        norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
        require(bool(norm.isfinite()), "the gradient is not finite; lower --lr")
        norms.append(norm.item())
    optimizer.step()
    optimizer.zero_grad()
    return norms


# ----------------------------------------------------------------------------- the loop


class Method(NamedTuple):
    """What the loop asks of a method that learns from fresh samples."""

    optimizer: torch.optim.Optimizer  # its groups carry their own "peak" rate
    # One scored batch → one or more optimiser steps. Returns metrics; `advantage` (B,)
    # among them goes to samples.jsonl.
    update: Callable[[Batch, Clock], dict]
    state: list[Tensor]  # what a checkpoint keeps: adapters, critic, running means


def method(run: Run) -> Method:
    """GRPO: the policy's adapter, and AdamW."""
    policy = lora.parameters(run.model, "policy")
    # No weight decay: the KL term alone holds the policy near the base.
    optimizer = torch.optim.AdamW([{"params": policy, "peak": run.settings.lr}],
                                  weight_decay=0.0)
    return Method(optimizer, lambda batch, clock: update(run, batch, optimizer, clock),
                  policy)


def shuffled(prompts: list[Prompt], seed: int) -> Iterator[Prompt]:
    """The prompts without end, each pass in a new order."""
    shuffle = random.Random(seed)
    while True:
        order = list(prompts)
        shuffle.shuffle(order)
        yield from order


def draw_prompts(order: Iterator[Prompt], count: int) -> list[Prompt]:
    """The next prompts, each once: twice, it would draw the same responses again."""
    chosen: list[Prompt] = []
    while len(chosen) < count:
        prompt = next(order)
        if prompt not in chosen:
            chosen.append(prompt)
    return chosen


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """A linear decay from each group's peak: the last steps settle, not wander."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (1 - (step - 1) / steps)


def require_movement(run: Run, metrics: dict) -> None:
    """After a step with a gradient, some LoRA factor B must have left zero."""
    if metrics.get("grad_norm", 0) > 0:
        moved = any(bool(layer.lora_B["policy"].any())
                    for layer in lora.layers(run.model).values())
        require(moved, f"the adapter is still zero after step {metrics['step']}; "
                "nothing is being learnt (is --lr too small?)")


def train(run: Run, prompts: list[Prompt], method: Method) -> bool:
    """The loop: draw, sample, score, update, write; a line of metrics a step.

    Goes on from the folder's checkpoint, if it has one, as if nothing had happened. All
    randomness comes from (seed, step, prompt): beside the method's state and its
    optimiser's moments, the number of the step is all there is to keep.

    Returns:
        False when it was asked to stop before the last step; a checkpoint is written.
    """
    s, order = run.settings, shuffled(prompts, run.settings.seed)
    with Log(run, s.steps, method.optimizer, method.state) as log:
        for step in range(1, s.steps + 1):
            # 1  Draw P prompts.
            chosen = draw_prompts(order, s.prompts_per_step)
            if step <= log.done:  # before the interruption; the order has moved on
                continue
            clock, started = Clock(), time.perf_counter()
            # 2  Sample G responses to each.
            with clock("sampling"):
                sampled = sample_batch(run, chosen, step, s.group_size)
            # 3  Score them: K axes, and R.
            with clock("scoring"):
                batch = score_batch(run, chosen, sampled)
            # 4  Update: here the method learns.
            set_rates(method.optimizer, step, s.steps)
            metrics = {"step": step, **describe(run, batch),
                       **method.update(batch, clock)}
            require_movement(run, metrics)
            # 5  Write down what happened; now and then, a checkpoint.
            advantage = metrics.pop("advantage", torch.zeros_like(batch.reward))
            metrics["seconds"] = time.perf_counter() - started
            metrics |= {f"seconds_{phase}": t for phase, t in clock.seconds.items()}
            if not log.write(metrics, sample_lines(run, batch, advantage, step)):
                return False
    return True


# ------------------------- stop here: below, the life of a run, and the command line


def align(settings: SharedSettings, name: str,
          train_by: Callable[[Run, list[Prompt]], bool],
          answer: Callable[[Run, list[Prompt]], tuple] | None = None) -> None:
    """The life of a run, whatever the method: answer, train, answer again.

    Args:
        name: of the method.
        train_by: trains the policy; False when it was asked to stop.
        answer: gives figures and answers after the training (default: `evaluate`).
    """
    cost = Cost(earlier_cost(settings.resume))
    with contextlib.ExitStack() as stack:
        stack.enter_context(parallel.together(settings.device))
        settings = dataclasses.replace(
            settings, out=settings.out or free_folder(settings, name))
        if parallel.rank() == 0:  # before anything that takes long
            stack.enter_context(only_writer(settings.out))
        run, prompts, held_out = prepare(settings, name)
        run.cost = cost
        announce(run)
        before = answers_before(run, held_out)
        if not train_by(run, prompts):
            print(f"stopped; go on with: {command_of(name)} --resume "
                  f"{shlex.quote(str(run.folder))}", file=sys.stderr)
            sys.exit(130)
        save_policy(run)
        after = answer(run, held_out) if answer else evaluate(run, held_out, "after")
        finish(run, held_out, before, after)


def main(argv: list[str] | None = None) -> None:
    """Align a model by GRPO and say what became of it."""
    settings = read_settings(Settings, __doc__.split("\n")[0], argv, "grpo")
    align(settings, "grpo", lambda run, prompts: train(run, prompts, method(run)))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
