"""PPO: a critic says what each token may still earn; the KL is part of the reward.

After InstructGPT (arXiv 2203.02155) and PPO (arXiv 1707.06347).

Kept     The critic V, generalised advantages, both clipped losses, the KL to the base
         as a price on every token, several passes over the same responses.
Changed  The critic is a role of the one frozen base: adapter `value` and a head, which
         begins as the mean R of the first step, not as the reward model. A pass over a
         step is one update, without minibatches. λ is 1, where 0.95 is usual
         (results/methods).
Dropped  Pretraining text in the loss; an adaptive β.

[P1]  r_t = −β (log π_old − log ref)_t + R · 1[t is the last token]
[P2]  δ_t = r_t + γ V_{t+1} − V_t       A_t = Σ_l (γλ)^l δ_{t+l}     (arXiv 1506.02438)
      Ret_t = A_t + V_t: what V should have said; V_old: V before the first update
[P3]  J = mean_t min(ρ A, clip(ρ, 1 ± ε) A), A whitened over the step
[P4]  L_V = ½ mean_t max((V − Ret)², (V_old + clip(V − V_old, ± ε) − Ret)²)

GRPO divides R by its group's std, and its KL stands beside it in the loss. Here β times
the log-ratio is subtracted from R, and the advantage is whitened. GRPO's β of 0.04,
times a typical std of 0.15, is the default of 0.006.

    python -m methods ppo

Shapes: as in `grpo.py`.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from grpo import Method, bounded_exp, optimizer_step, sampler_weight
from model import Qwen
from plumbing import parallel
from plumbing.figures import Clock
from plumbing.options import option
from run import Run
from run import Settings as SharedSettings
from sample import (
    Batch,
    batch_logp,
    every_micro_batch,
    log_probs,
    sampler_is_trainer,
    trainer_logp,
)


@dataclasses.dataclass(frozen=True)
class Settings(SharedSettings):
    """Options of `python -m methods ppo`.

    The tiny rates, epochs, β and λ won a search (results/methods); those of a real
    model are for measuring what a step costs: nothing was searched there.
    """

    group_size: int = option(8, "G, responses a prompt; the critic needs no group",
                             low=1)
    lr: float = option(3e-3, "AdamW's learning rate", real=1e-4, above=0)
    value_lr: float = option(1e-2, "the critic's", real=1e-3, above=0)
    epochs: int = option(2, "passes over the same responses", low=1)
    clip: float = option(0.2, "epsilon of policy and value", above=0, below=1)
    beta: float = option(0.006, "price of the KL in the reward", real=0.004, low=0)
    gamma: float = option(1.0, "discount", low=0, high=1)
    lam: float = option(1.0, "lambda of the advantage estimate", low=0, high=1)


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
    1e-4 as in `group_advantage`: rounding must not become advantages.
    """
    own = advantage[mask]
    return torch.where(
        mask, (advantage - own.mean()) / (own.std(correction=0) + 1e-4), 0.0)


def ppo_loss(logp: Tensor, logp_old: Tensor, advantage: Tensor, mask: Tensor,
             clip: float, tokens: int, w: Tensor | None = None) -> Tensor:
    """The policy's loss of some rows of a step; all tensors (n, C).

    Args:
        w: from `grpo.sampler_weight`; None where sampler and trainer are one.
        tokens: response tokens of the whole step, so that micro-batches add up.
    """
    ratio = bounded_exp(torch.where(mask, logp - logp_old, 0.0))
    # [P3] J = mean_t min(ρ A, clip(ρ, 1 ± ε) A)
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantage
    surrogate = torch.minimum(ratio * advantage, clipped)
    if w is not None:
        surrogate = w * surrogate
    return -torch.where(mask, surrogate, 0.0).sum() / tokens


def value_loss(values: Tensor, values_old: Tensor, returns: Tensor, mask: Tensor,
               clip: float, tokens: int) -> Tensor:
    """The critic's loss of some rows of a step; arguments as in `ppo_loss`."""
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
    w: Tensor | None  # [E8]
    values_old: Tensor
    advantage: Tensor
    returns: Tensor


@torch.no_grad()
def make_experience(run: Run, critic: Critic,
                    batch: Batch) -> tuple[Experience, dict[str, float]]:
    """From old values and log ref: [P1], [P2], whitened advantages; and metrics."""
    s, sampled = run.settings, batch.sampled
    mask, logp = sampled.mask, trainer_logp(run, batch)
    w = None if sampler_is_trainer(run.model) else sampler_weight(
        logp, sampled.logp, mask)
    logp_ref, values = batch_logp(run, batch, None), torch.zeros_like(logp)
    for index, hidden, _ in every_micro_batch(run, batch, "value"):
        values[index] = critic.values(hidden).to(values)
    parallel.all_reduce(values)
    rewards = token_rewards(batch.reward.to(logp), logp, logp_ref, mask, s.beta)
    advantage, returns = gae(rewards, values, mask, s.gamma, s.lam)
    unexplained, whole = (x[mask].var(correction=0)
                          for x in (returns - values, returns))
    # The explained variance is near 0 until the critic has learnt something. (With
    # λ < 1 the returns hold V themselves, and it says less.)
    metrics = {"kl_k1": (logp - logp_ref)[mask].mean().item(),
               "explained_variance": 1 - (unexplained / whole.clamp(min=1e-12)).item(),
               "advantage_std": advantage[mask].std(correction=0).item(),
               "off_sampler_rms": (logp - sampled.logp)[mask].square().mean().sqrt(
                   ).item()}
    return Experience(logp, w, values, whiten(advantage, mask), returns), metrics


def add_gradients(run: Run, critic: Critic, batch: Batch,
                  old: Experience) -> dict[str, float]:
    """Add the gradients of both losses over a whole step; return the losses."""
    s, sampled = run.settings, batch.sampled
    tokens, sums = int(sampled.mask.sum()), torch.zeros(2, dtype=torch.float64)
    for index, hidden, mask in every_micro_batch(run, batch, "policy"):
        logp = log_probs(run, hidden, sampled.tokens[index], mask)
        loss = ppo_loss(logp, old.logp_old[index], old.advantage[index], mask, s.clip,
                        tokens, None if old.w is None else old.w[index])
        loss.backward()
        sums[0] += loss.item()
    for index, hidden, mask in every_micro_batch(run, batch, "value"):
        loss = value_loss(critic.values(hidden), old.values_old[index],
                          old.returns[index], mask, s.clip, tokens)
        loss.backward()
        sums[1] += loss.item()
    sums = sums.to(run.model.device)
    parallel.all_reduce(sums)
    return dict(zip(("loss", "value_loss"), sums.tolist(), strict=True))


def update(run: Run, critic: Critic, optimizer: torch.optim.Optimizer, batch: Batch,
           clock: Clock) -> dict:
    """PPO's update: look back once, then learn several times from the same step."""
    # The first batch: else the critic would spend its first steps on learning the mean.
    if not optimizer.state:
        nn.init.constant_(critic.head.bias, batch.reward.mean().item())
    with clock("values"):
        old, metrics = make_experience(run, critic, batch)
    # For samples.jsonl: the mean of a response's tokens.
    advantage = old.advantage.sum(1) / batch.sampled.mask.sum(1)  # (B,)
    with clock("training"):
        for _ in range(run.settings.epochs):
            metrics |= add_gradients(run, critic, batch, old)
            norms = optimizer_step(optimizer)
    # Twice: the policy and the critic.
    trained = 2 * run.settings.epochs * int(batch.sampled.mask.sum())
    return metrics | {"grad_norm": norms[0], "value_grad_norm": norms[1],
                      "trained_tokens": trained, "advantage": advantage}


def method(run: Run) -> Method:
    """PPO: policy and critic, each with a rate of its own."""
    s = run.settings
    critic, policy = (Critic(run.model, s.rank, s.seed),
                      lora.parameters(run.model, "policy"))
    optimizer = torch.optim.AdamW([
        {"params": policy, "peak": s.lr},
        {"params": critic.parameters(), "peak": s.value_lr}], weight_decay=0.0)
    return Method(optimizer,
                  lambda batch, clock: update(run, critic, optimizer, batch, clock),
                  policy + critic.parameters())
