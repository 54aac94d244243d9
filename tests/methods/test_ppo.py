"""PPO is what it is called.

* [P1] charges β (log π_old − log ref) at every token, and pays R at the last one.
* GAE [P2] equals its defining sum; λ = 1 and 0 are the full return and one step.
* PPO's gradient [P1] [P3], summed over all responses of a toy vocabulary, is that of
  the expected reward minus β KL.
* Clipping silences what has moved too far, in policy [P3] and critic [P4].
* A step with shared prefixes, micro-batches and padding is the naive one.
* It needs no group; the critic starts from the mean R, and both rates decay.
"""

import itertools
import json

import pytest
import torch
from oracles import make_batch, make_run, relative, row_logs

import lora
import sample
from methods import __main__ as methods
from methods import ppo
from plumbing.figures import Clock
from plumbing.files import read_json

MASK = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0),
                                            (0.9, 0.0)])
def test_gae_is_its_defining_sum(gamma, lam):
    rewards, values = doubles(3, 5) * MASK, doubles(3, 5, seed=1)
    advantage, returns = ppo.gae(rewards, values, MASK, gamma, lam)
    for b, length in enumerate(MASK.sum(1).tolist()):
        v = [*values[b, :length].tolist(), 0.0]
        delta = [float(rewards[b, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            wanted = sum((gamma * lam) ** i * delta[t + i] for i in range(length - t))
            assert float(advantage[b, t]) == pytest.approx(wanted, abs=1e-12)
            assert float(returns[b, t]) == pytest.approx(wanted + v[t], abs=1e-12)
        assert not advantage[b, length:].any()
        assert not returns[b, length:].any()


def test_token_rewards_charge_kl_and_pay_at_the_last_token():
    logp, ref = doubles(3, 5), doubles(3, 5, seed=1)
    reward = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    rewards = ppo.token_rewards(reward, logp, ref, MASK, 0.1)
    wanted = -0.1 * (logp - ref) * MASK
    for b, last in enumerate((4, 0, 2)):
        wanted[b, last] += reward[b]
    torch.testing.assert_close(rewards, wanted)


def test_whitened_advantages_have_mean_0_and_std_1_over_the_tokens():
    plain = doubles(3, 5)
    white, std = ppo.whiten(plain, MASK), plain[MASK].std(correction=0)
    assert float(white[MASK].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white[MASK].std(correction=0)) == pytest.approx(
        float(std / (std + 1e-4)), abs=1e-12)
    assert not white[~MASK].any()
    # Where all rewards agree, rounding errors do not become advantages of 1.
    assert ppo.whiten(1 + 1e-9 * plain, MASK).abs().max() < 1e-4


def every_response(theta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All V^C responses (n, C) of a toy policy, and their log-probs (n, C).

    The policy is a table: token t depends on the token before it, theta (C, V, V).
    """
    length, ids = theta.shape[0], theta.shape[2]
    rows = torch.tensor(list(itertools.product(range(ids), repeat=length)))
    before = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows[:, :-1]], 1)
    table = theta.log_softmax(-1)
    return rows, torch.stack(
        [table[t, before[:, t], rows[:, t]] for t in range(length)], 1)


def test_the_gradient_of_ppo_is_that_of_reward_minus_kl():
    beta, theta = 0.3, doubles(3, 4, 4).requires_grad_()
    ref = every_response(doubles(3, 4, 4, seed=1))[1]
    rows, logp = every_response(theta)
    reward = doubles(len(rows), seed=2)
    chance = logp.sum(1).exp()
    objective = (chance * (reward - beta * (logp - ref).sum(1))).sum()
    [wanted] = torch.autograd.grad(objective, theta, retain_graph=True)

    old, mask = logp.detach(), torch.ones_like(logp, dtype=torch.bool)
    rewards = ppo.token_rewards(reward, old, ref, mask, beta)
    # Any critic: what it says before a token does not depend on it, and cancels.
    values = every_response(doubles(3, 4, 4, seed=3))[1][:, :1].mean() + 0 * old
    advantage, _ = ppo.gae(rewards, values, mask, 1.0, 1.0)
    losses = [ppo.ppo_loss(logp[i:i + 1], old[i:i + 1], advantage[i:i + 1],
                           mask[i:i + 1], 0.2, 1) for i in range(len(rows))]
    loss = (chance.detach() * torch.stack(losses)).sum()
    [gradient] = torch.autograd.grad(loss, theta)
    assert relative(-gradient, wanted) < 1e-12


def test_clipping_silences_what_has_moved_too_far():
    logp = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64,
                        requires_grad=True)
    advantage = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    ppo.ppo_loss(logp, torch.zeros_like(logp), advantage, mask, 0.2, 4).backward()
    ratio = logp.detach().exp()[0]
    torch.testing.assert_close(  # up and good, down and bad: no further
        logp.grad[0], torch.stack([0 * ratio[0], -ratio[1] / 4, ratio[2] / 4,
                                   0 * ratio[3]]))


def test_the_critics_loss_and_gradient_equal_the_closed_form():
    values = torch.tensor([[0.9, 0.1, 0.5, 0.0]], dtype=torch.float64,
                          requires_grad=True)
    old = torch.tensor([[0.5, 0.5, 0.5, 0.9]], dtype=torch.float64)
    returns = torch.tensor([[1.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    loss = ppo.value_loss(values, old, returns, mask, 0.2, 3)
    # 0.9 is clipped to 0.7, which is worse: no gradient. 0.1 is worse than 0.3, its
    # clipped value.
    assert loss.item() == pytest.approx(0.5 * (0.3 ** 2 + 0.9 ** 2 + 0.5 ** 2) / 3)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor(
        [[0.0, -0.9 / 3, 0.5 / 3, 0.0]], dtype=torch.float64))


# -------------------------------------------------------------------------- whole steps


@pytest.fixture
def step():
    """A run of PPO, its critic with any weights, and a batch."""
    run = make_run(ppo.Settings, beta=0.1, gamma=1.0, lam=0.95, clip=0.2, epochs=2)
    critic = ppo.Critic(run.model, 2, 0)
    critic.head.double()
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(doubles(*p.shape, seed=p.numel()) / 5)
    batch, _, _ = make_batch(run)
    batch.reward = batch.reward.double()
    return run, critic, batch


def naive_values(run, critic, prompt: list[int], response: list[int]) -> torch.Tensor:
    """V before every token: repeated prompt, one row, no prefix."""
    with lora.using(run.model, "value"):
        hidden = run.model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
    return critic.head(torch.nn.functional.normalize(hidden, dim=-1))[:, 0]


def pad(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def test_a_step_of_ppo_equals_the_naive_one(step):
    run, critic, batch = step
    old, _ = ppo.make_experience(run, critic, batch)
    losses = ppo.add_gradients(run, critic, batch, old)
    parameters = lora.parameters(run.model, "policy") + critic.parameters()
    gradient = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None

    responses, size = batch.sampled.responses(), run.settings.group_size
    values = [naive_values(run, critic, batch.prompts[i // size].ids, response)
              for i, response in enumerate(responses)]
    logs = [row_logs(run, batch, i, response)[:2]
            for i, response in enumerate(responses)]
    logp, ref = pad([log for log, _ in logs]), pad([log.detach() for _, log in logs])
    tokens, length = sum(map(len, responses)), max(map(len, responses))
    mask = torch.arange(length) < torch.tensor([len(r) for r in responses])[:, None]
    before = batch.sampled.logp[:, :length]
    values_old = pad([v.detach() for v in values])
    rewards = ppo.token_rewards(batch.reward, before, ref, mask, 0.1)
    advantage, returns = ppo.gae(rewards, values_old, mask, 1.0, 0.95)
    advantage = ppo.whiten(advantage, mask)
    policy = ppo.ppo_loss(logp, before, advantage, mask, 0.2, tokens)
    value = ppo.value_loss(pad(values), values_old, returns, mask, 0.2, tokens)
    assert losses["loss"] == pytest.approx(policy.item(), rel=1e-9)
    assert losses["value_loss"] == pytest.approx(value.item(), rel=1e-9)
    wanted = torch.autograd.grad(policy + value, parameters)
    assert relative(gradient, torch.cat([g.flatten() for g in wanted])) < 1e-9


def test_the_old_policy_is_the_trainers_where_the_sampler_is_another(step,
                                                                     monkeypatch):
    run, critic, batch = step
    noted = batch.sampled.logp
    for module in (ppo, sample):
        monkeypatch.setattr(module, "sampler_is_trainer", lambda model: False)
    old, metrics = ppo.make_experience(run, critic, batch)
    logp = pad([row_logs(run, batch, i, response)[0].detach()
                for i, response in enumerate(batch.sampled.responses())])
    mask = batch.sampled.mask
    torch.testing.assert_close(old.logp_old[mask], logp[mask], rtol=0, atol=1e-9)
    torch.testing.assert_close(old.w[mask], (logp - noted).exp().clamp(max=2)[mask],
                               rtol=1e-9, atol=0)
    assert metrics["off_sampler_rms"] == pytest.approx(
        (logp - noted)[mask].square().mean().sqrt().item(), rel=1e-9)
    tokens = int(mask.sum())
    loss = ppo.add_gradients(run, critic, batch, old)["loss"]
    assert loss == pytest.approx(-(old.w * old.advantage)[mask].sum().item() / tokens)


def test_an_update_starts_the_critic_at_the_mean_reward_and_only_once(step):
    run, critic, batch = step
    with torch.no_grad():
        critic.head.weight.zero_()
    starts, make_experience = [], ppo.make_experience

    def noted(*arguments):
        starts.append(critic.head.bias.item())
        return make_experience(*arguments)

    optimizer = torch.optim.AdamW([
        {"params": lora.parameters(run.model, "policy"), "lr": 1e-3},
        {"params": critic.parameters(), "lr": 1e-2}], weight_decay=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_experience", noted)
        metrics = [ppo.update(run, critic, optimizer, batch, Clock()) for _ in range(2)]
    mean = batch.reward.mean().item()
    assert starts[0] == pytest.approx(mean, rel=1e-6)
    assert starts[1] != pytest.approx(mean, rel=1e-6)
    # Every one of two epochs passes policy and critic.
    assert metrics[0]["trained_tokens"] == 2 * 2 * int(batch.sampled.mask.sum())


# --------------------------------------------------------------------- whole programs


def test_ppo_needs_no_group_and_decays_the_rates_of_policy_and_critic(tmp_path,
                                                                     monkeypatch):
    rates, make_method = [], ppo.method

    def watched(run):
        method = make_method(run)

        def update(batch, clock):
            rates.append([group["lr"] for group in method.optimizer.param_groups])
            return method.update(batch, clock)

        return method._replace(update=update)

    monkeypatch.setattr(ppo, "method", watched)
    methods.main(["ppo", "--steps", "2", "--prompts-per-step", "8", "--group-size", "1",
                  "--max-new-tokens", "16", "--eval-prompts", "4", "--device", "cpu",
                  "--reward", "gold", "--lr", "0.002", "--value-lr", "0.01",
                  "--out", str(tmp_path / "run")])
    assert read_json(tmp_path / "run" / "summary.json")["after"]["kl"] > 1e-9
    assert rates == [[0.002, 0.01], [0.001, 0.005]]
    rows = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len({json.loads(row)["prompt"] for row in rows[:8]}) == 8
