"""What GRPO is compared with is what it is called.

* GAE [P2] equals its defining sum; λ = 1 and 0 are the full return and one step.
* PPO's gradient [P1] [P3], summed over all responses of a toy vocabulary, is that of
  the expected reward minus β KL; clipping silences what has moved too far, in policy
  and critic [P4].
* DPO's loss and gradient [D1] equal the closed form, and TRL's loss; SFT's [S1] the
  naive one; the bound of best-of-n [B1] has its known values.
* Shared prefixes, micro-batches and padding change no gradient.
* Every method moves the policy, and leaves the same files as grpo.py.
* A comparison's table holds mean ± standard deviation of its runs' own figures; an
  interrupted comparison goes on where it was; its settings are among those searched.
* Bad input costs one line; PPO needs no group; page and chat take runs of any method.
"""

import collections
import itertools
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from test_grpo import make_batch, make_run

import baselines
import grpo
import lora
import run
import sample
from model import SIZES

MASK = torch.arange(5) < torch.tensor([5, 1, 3])[:, None]


def doubles(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0),
                                            (0.9, 0.0)])
def test_gae_is_its_defining_sum(gamma, lam):
    rewards, values = doubles(3, 5) * MASK, doubles(3, 5, seed=1)
    advantage, returns = baselines.gae(rewards, values, MASK, gamma, lam)
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
    found = baselines.token_rewards(reward, logp, ref, MASK, 0.1)
    wanted = -0.1 * (logp - ref) * MASK
    for b, last in enumerate((4, 0, 2)):
        wanted[b, last] += reward[b]
    torch.testing.assert_close(found, wanted)


def test_whitened_advantages_have_mean_0_and_std_1_over_the_tokens():
    plain = doubles(3, 5)
    white, std = baselines.whiten(plain, MASK), plain[MASK].std(correction=0)
    assert float(white[MASK].mean()) == pytest.approx(0, abs=1e-12)
    assert float(white[MASK].std(correction=0)) == pytest.approx(
        float(std / (std + 1e-4)), abs=1e-12)
    assert not white[~MASK].any()
    # Where all rewards agree, rounding errors do not become advantages of 1.
    assert baselines.whiten(1 + 1e-9 * plain, MASK).abs().max() < 1e-4


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
    rewards = baselines.token_rewards(reward, old, ref, mask, beta)
    # Any critic: what it says before a token does not depend on it, and cancels.
    values = every_response(doubles(3, 4, 4, seed=3))[1][:, :1].mean() + 0 * old
    advantage, _ = baselines.gae(rewards, values, mask, 1.0, 1.0)
    losses = [baselines.ppo_loss(logp[i:i + 1], old[i:i + 1], advantage[i:i + 1],
                                 mask[i:i + 1], 0.2, 1) for i in range(len(rows))]
    loss = (chance.detach() * torch.stack(losses)).sum()
    [found] = torch.autograd.grad(loss, theta)
    assert (found + wanted).norm() < 1e-12 * wanted.norm()


def test_clipping_silences_what_has_moved_too_far():
    logp = torch.tensor([[0.5, -0.5, 0.5, -0.5]], dtype=torch.float64,
                        requires_grad=True)
    advantage = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    baselines.ppo_loss(logp, torch.zeros_like(logp), advantage, mask, 0.2, 4).backward()
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
    loss = baselines.value_loss(values, old, returns, mask, 0.2, 3)
    # 0.9 is clipped to 0.7, which is worse: no gradient. 0.1 is worse than 0.3, its
    # clipped value.
    assert loss.item() == pytest.approx(0.5 * (0.3 ** 2 + 0.9 ** 2 + 0.5 ** 2) / 3)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor(
        [[0.0, -0.9 / 3, 0.5 / 3, 0.0]], dtype=torch.float64))


def ppo_run():
    run_ = make_run(inner_steps=1)
    critic = baselines.Critic(run_.model, 2, 0)
    critic.head.double()
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(doubles(*p.shape, seed=p.numel()) / 5)
    return run_, critic


def naive_values(run_, critic, prompt: list[int], row: list[int]) -> torch.Tensor:
    """V before every token: repeated prompt, one row, no prefix."""
    with lora.using(run_.model, "value"):
        hidden = run_.model(torch.tensor([prompt + row]))[0, len(prompt) - 1:-1]
    return critic.head(torch.nn.functional.normalize(hidden, dim=-1))[:, 0]


def naive_logp(run_, prompt: list[int], row: list[int], name) -> torch.Tensor:
    with lora.using(run_.model, name):
        hidden = run_.model(torch.tensor([prompt + row]))[0, len(prompt) - 1:-1]
    logits = (hidden @ run_.model.unembed.T)[:, :run_.tokenizer.valid]
    logp = (logits / run_.settings.temperature).log_softmax(-1)
    return logp.gather(1, torch.tensor(row)[:, None])[:, 0]


def test_a_step_of_ppo_equals_the_naive_one(monkeypatch):
    run_, critic = ppo_run()
    batch = make_batch(run_)
    batch.reward = batch.reward.double()
    old, _ = baselines.make_experience(run_, critic, batch, 0.1, 1.0, 0.95)
    losses = baselines.ppo_update(run_, critic, batch, old, 0.2)
    parameters = lora.parameters(run_.model, "policy") + critic.parameters()
    found = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None

    rows, size = batch.sampled.responses(), run_.settings.group_size
    prompts = [batch.prompts[i // size].ids for i in range(len(rows))]
    pairs = list(zip(prompts, rows, strict=True))
    values = [naive_values(run_, critic, *pair) for pair in pairs]
    ref = [naive_logp(run_, *pair, None).detach() for pair in pairs]
    logp = [naive_logp(run_, *pair, "policy") for pair in pairs]
    tokens, wide = sum(map(len, rows)), max(map(len, rows))
    mask = torch.arange(wide) < torch.tensor([len(r) for r in rows])[:, None]
    pad = torch.nn.utils.rnn.pad_sequence
    before = batch.sampled.logp[:, :wide]
    values_old = pad([v.detach() for v in values], True)
    rewards = baselines.token_rewards(batch.reward, before, pad(ref, True), mask, 0.1)
    advantage, returns = baselines.gae(rewards, values_old, mask, 1.0, 0.95)
    advantage = baselines.whiten(advantage, mask)
    policy = baselines.ppo_loss(pad(logp, True), before, advantage, mask, 0.2, tokens)
    value = baselines.value_loss(pad(values, True), values_old, returns, mask, 0.2,
                                 tokens)
    assert losses["loss"] == pytest.approx(policy.item(), rel=1e-9)
    assert losses["value_loss"] == pytest.approx(value.item(), rel=1e-9)
    wanted = torch.autograd.grad(policy + value, parameters)
    wanted = torch.cat([g.flatten() for g in wanted])
    assert (found - wanted).norm() < 1e-9 * wanted.norm()


# ------------------------------------------------------------------------- DPO, SFT


def test_the_gradient_of_dpo_is_the_closed_form():
    beta = 0.3
    best, worst = (doubles(6, seed=i).requires_grad_() for i in range(2))
    ref = doubles(2, 6, seed=2)
    baselines.dpo_loss(best, worst, *ref, beta).sum().backward()
    margin = beta * ((best - ref[0]) - (worst - ref[1])).detach()
    wanted = -beta * torch.sigmoid(-margin)
    torch.testing.assert_close(best.grad, wanted)
    torch.testing.assert_close(worst.grad, -wanted)


@pytest.mark.peer
def test_the_loss_of_dpo_is_that_of_trl():
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    logp, ref = doubles(4, 7), doubles(4, seed=1)  # two best, then two worst

    class Anything:
        def __getattr__(self, name):
            return Anything()

        def __call__(self, *args, **kwargs):
            return args[0] if args else Anything()

    class Outputs:
        log_probs, entropy, is_top1 = logp, logp, logp > 0

        def __getattr__(self, name):  # what its metrics want
            return torch.ones(4, 7)

    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True), accelerator=Anything(),
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0],
        beta=0.3, label_smoothing=0.0, use_weighting=False, _total_train_tokens=0,
        _tp_size=1,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)))
    inputs = {"input_ids": torch.ones(4, 8, dtype=torch.long),
              "attention_mask": torch.ones(4, 8),
              "completion_mask": torch.ones(4, 8), "ref_chosen_logps": ref[:2],
              "ref_rejected_logps": ref[2:]}
    theirs = dpo.DPOTrainer._compute_loss(
        trainer, lambda **_: Outputs(), inputs, return_outputs=False)
    ours = baselines.dpo_loss(*logp.sum(1).chunk(2), *ref.chunk(2), 0.3).mean()
    assert float(theirs) == pytest.approx(float(ours), abs=1e-6)


def test_steps_on_pairs_equal_the_naive_ones():
    run_ = make_run(inner_steps=1)
    batch = make_batch(run_)
    policy = lora.parameters(run_.model, "policy")
    pairs = baselines.make_pairs(run_, [batch], "dpo")
    rows = batch.sampled.responses()
    reward = batch.reward.view(3, -1)
    for p, pair in enumerate(pairs):
        assert pair.best == rows[4 * p + int(reward[p].argmax())]
        assert pair.worst == rows[4 * p + int(reward[p].argmin())]

    def whole(pair, row, name):
        return naive_logp(run_, pair.prompt, row, name).sum()

    terms = [baselines.dpo_loss(*(whole(pair, row, name)[None] for name in
                                  ("policy", None) for row in (pair.best, pair.worst)),
                                0.3) for pair in pairs]
    dpo = torch.stack(terms).mean()
    tokens = sum(len(pair.best) for pair in pairs)
    sft = -sum(whole(pair, pair.best, "policy") for pair in pairs) / tokens
    for objective, step in ((dpo, lambda: baselines.dpo_step(run_, pairs, 0.3)),
                            (sft, lambda: baselines.sft_step(run_, pairs))):
        with lora.using(run_.model, "policy"):
            assert step() == pytest.approx(objective.item(), rel=1e-9)
        found = torch.cat([p.grad.flatten() for p in policy])
        wanted = torch.cat(
            [g.flatten() for g in torch.autograd.grad(objective, policy)])
        assert (found - wanted).norm() < 1e-9 * wanted.norm()
        for p in policy:
            p.grad = None


def test_the_bound_of_best_of_n():
    assert baselines.best_of_kl(1) == 0
    assert baselines.best_of_kl(64) == pytest.approx(3.1745, abs=1e-4)


# --------------------------------------------------------------------- whole programs


SHORT = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "4", "--device", "cpu"]


@pytest.mark.parametrize("method", ["ppo", "dpo", "sft"])
def test_every_method_runs_and_leaves_the_files_of_a_run(method, tmp_path):
    folder = tmp_path / "run"
    baselines.main(["--method", method, *SHORT, "--out", str(folder)])
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "SHA256SUMS",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/SHA256SUMS"}
    run.verify_checksums(folder)
    lines = [json.loads(line)
             for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(m["tokens"] for m in lines) > 0
    assert sum(m["trained_tokens"] for m in lines) > 0
    summary = run.read_json(folder / "summary.json")
    assert summary["after"]["kl"] > 1e-9  # it has moved
    # The folder names what the method uses, and no more.
    config = run.read_json(folder / "config.json")
    assert ("lam" in config, "beta" in config, "inner_steps" in config) == (
        method == "ppo", method != "sft", False)
    assert config["rank"] == grpo.DEFAULTS[True]["rank"]
    assert config["epochs"] == baselines.DEFAULTS[True][method]["epochs"]
    advantages = [json.loads(line)["advantage"] for line in
                  (folder / "samples.jsonl").read_text().splitlines()]
    if method == "ppo":  # of the critic, whitened over the step's tokens
        assert min(advantages[:8]) < 0 < max(advantages[:8])
        assert min(advantages[8:]) < 0 < max(advantages[8:])
    assert SIZES["tiny"] in summary["model"] or "tiny" in summary["model"]
    # What is made for runs of grpo.py takes these too: the page and the chat.
    assert subprocess.run([sys.executable, "results/report.py", str(folder)],
                          check=False).returncode == 0
    sample.main(["--adapter", str(folder), "--max-new-tokens", "4", "Hello!"])


def test_ppo_needs_no_group(tmp_path):
    baselines.main(["--method", "ppo", *SHORT, "--reward", "gold", "--group-size", "1",
                    "--prompts-per-step", "8", "--out", str(tmp_path / "run")])
    assert run.read_json(tmp_path / "run" / "summary.json")["after"]["kl"] > 1e-9


def test_the_tables_hold_mean_and_deviation_of_the_runs():
    def summary(r: float) -> dict:
        part = {"gold": {"safety": r, "R": 0.99},
                "reward_model": {"safety": r + 0.1, "R": 0.99},
                "kl": 0.25, "tokens_an_answer": 30,
                "behaviour": {"harmful": {"refuse_kind_step": 0.5}, "benign": {}}}
        return {"before": part, "after": part, "training_seconds": 9.0,
                "peak_rss_gb": 0.5, "sampled_tokens": 1000, "trained_tokens": 2000,
                "trained_parameters": 12345}

    lines = baselines.comparison({"GRPO": [summary(0.5), summary(0.7)]})
    # The mean of 0.5 and 0.7, and their deviation: 0.2 / √2. R has the run's weights,
    # which are not the same in every row: the mean of the axes is shown instead.
    assert "| GRPO | 0.600 ± 0.141 | 0.600 ± 0.141 | 0.700 ± 0.141 | 0.250 ± 0.000 | " \
        "50% ± 0% | 0% ± 0% |" in lines
    assert "| GRPO | 9 ± 0 | 9.00 ± 0.00 | 0.50 ± 0.00 | 1,000 | 2,000 | 12,345 | " \
        "30 |" in lines
    assert lines[2].startswith("| (the base) | 0.600")
    bound = summary(0.5)
    bound["after"] = bound["after"] | {"kl_is_a_bound": True}
    assert "| ≤ 0.250 |" in baselines.comparison({"best of 8": [bound]})[3]


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    commands = []

    def finish(words, **_):
        commands.append(words[2:])
        out = Path(words[-1])
        run.write_json(out / "summary.json", {"seconds": len(commands)})
        run.write_checksums(out, ["summary.json"])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(baselines.subprocess, "run", finish)
    programs = {"GRPO": ["grpo.py"], "PPO": ["baselines.py", "--method", "ppo"]}
    for name, words in programs.items():  # cut short: settings, and no checksums
        out, note = baselines.claim(name, words, 0, tmp_path)
        run.write_json(out / "config.json", {})
        run.write_json(tmp_path / f"{out.name}.json", note)
    found = baselines.run_all(programs, [0], tmp_path)
    assert sorted(commands) == [  # they run side by side
        ["--method", "ppo", "--device", "cpu", "--seed", "0", "--out",
         str(tmp_path / "ppo-0")],
        ["--resume", str(tmp_path / "grpo-0")]]
    assert not (tmp_path / "ppo-0" / "config.json").exists()  # begun again
    assert baselines.run_all(programs, [0], tmp_path) == found
    assert len(commands) == 2
    programs = {"GRPO": ["grpo.py", "--steps", "3"]}
    with pytest.raises(run.UserError, match="grpo-0 is of another command"):
        baselines.run_all(programs, [0], tmp_path)
    monkeypatch.setitem(baselines.DEFAULTS[True]["ppo"], "lr", 1e-3)
    with pytest.raises(run.UserError, match="of another command or of other set"):
        baselines.run_all({"PPO": ["baselines.py", "--method", "ppo"]}, [0], tmp_path)
    run.write_json(tmp_path / "dpo-0" / "config.json", {})  # somebody's own run
    with pytest.raises(run.UserError, match="dpo-0 is not from such a comparison"):
        baselines.run_all({"DPO": ["baselines.py", "--method", "dpo"]}, [0], tmp_path)
    assert (tmp_path / "dpo-0" / "config.json").is_file()


@pytest.mark.parametrize(("words", "why"), [
    (["--compare", "--steps", "3"], "--compare does not go with --steps"),
    (["--compare", "--ablate"], "--compare does not go with --ablate"),
    (["--search", "--seeds", "1"], "--search does not go with --seeds"),
    (["--compare", "--seeds", "0,x"], "--seeds 0,x: expected different numbers"),
    (["--compare", "--seeds", "0,0"], "--seeds 0,0: expected different numbers"),
    (["--compare", "--seeds", "0,00"], "--seeds 0,00: expected different numbers"),
    (["--ablate", "--seeds", "²"], "--seeds ²: expected different numbers"),
    (["--method", "dpo", "--beta", "0"], "--beta 0 leaves DPO without a gradient"),
    (["--method", "dpo", "--lam", "1", "--value-lr", "1"],
     "--method dpo does not use --lam, --value-lr"),
    (["--method", "sft", "--beta", "1"], "--method sft does not use --beta"),
    (["--method", "sft", "--group-size", "1"], "a group needs at least 2")])
def test_bad_input_is_refused_before_anything_runs(words, why, tmp_path, monkeypatch):
    monkeypatch.setattr(baselines.subprocess, "run", None)
    with pytest.raises(run.UserError, match=why):
        baselines.main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_settings_of_the_comparison_are_among_those_that_were_searched():
    sizes = {"group_size": grpo.Settings.group_size,
             "prompts_per_step": grpo.DEFAULTS[True]["prompts_per_step"]}
    for program, *words in baselines.COMPARED.values():
        given = {key.strip("-").replace("-", "_"): value
                 for key, value in zip(words[::2], words[1::2], strict=True)}
        method = given.pop("method", "grpo")
        if method == "best-of-n":
            continue
        used = sizes | ({"lr": grpo.DEFAULTS[True]["lr"], "beta": grpo.Settings.beta}
                        if program == "grpo.py" else baselines.DEFAULTS[True][method])
        used |= {key: float(value) for key, value in given.items()}
        grid = [sizes | options for options in baselines.SEARCH[method]]
        assert any(all(used.get(key, value) == value for key, value in options.items())
                   for options in grid), method


def test_a_run_that_is_still_being_written_is_left_alone(tmp_path):
    out, note = baselines.claim("PPO", ["baselines.py"], 0, tmp_path)
    run.write_json(out / "config.json", {})
    run.write_json(tmp_path / "ppo-0.json", note)
    with run.only_writer(out), pytest.raises(run.UserError, match="another process"):
        baselines.run_all({"PPO": ["baselines.py"]}, [0], tmp_path)
    assert (out / "config.json").is_file()


def test_after_a_failure_no_other_run_begins(tmp_path, monkeypatch):
    commands = []

    def fail(words, **_):
        commands.append(words)
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(baselines.subprocess, "run", fail)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with pytest.raises(run.UserError, match="ended with status 1"):
        baselines.run_all({"PPO": ["baselines.py"]}, [0, 1, 2], tmp_path)
    assert len(commands) == 1


def test_a_folder_that_is_not_ours_is_refused_before_anything_runs(tmp_path,
                                                                   monkeypatch):
    monkeypatch.setattr(baselines.subprocess, "run", None)
    run.write_json(tmp_path / "dpo-1" / "config.json", {})
    with pytest.raises(run.UserError, match="dpo-1 is not from such a comparison"):
        baselines.run_all({"PPO": ["baselines.py"], "DPO": [
            "baselines.py", "--method", "dpo"]}, [0, 1], tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["dpo-1"]


def test_a_run_that_fails_ends_the_comparison_in_one_line(tmp_path):
    programs = {"broken": ["grpo.py", "--weights", "safety=x"]}
    with pytest.raises(run.UserError, match=r"status 2; see .*broken-0\.txt"):
        baselines.run_all(programs, [0], tmp_path)
    assert "safety=x" in (tmp_path / "broken-0.txt").read_text()


@pytest.mark.slow
def test_a_search_tries_all_settings_and_sorts_them_by_the_rubric(tmp_path, monkeypatch,
                                                                  capsys):
    monkeypatch.setattr(baselines, "SEARCH", {
        "grpo": [{"steps": 1, "eval_prompts": 4, "max_new_tokens": 8, "lr": lr}
                 for lr in (1e-3, 2e-3)],
        "sft": [{"steps": 1, "eval_prompts": 4, "max_new_tokens": 8}]})
    baselines.main(["--search", "--out", str(tmp_path)])
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert len(re.findall(r"^\| \w+ \| steps=1 ", table, re.M)) == 3
    gold = [float(x) for x in re.findall(r"lr=\S+ \| (\S+)", table)]
    assert len(gold) == 2
    assert gold == sorted(gold, reverse=True)


@pytest.mark.slow
def test_an_ablation_runs_goes_on_and_draws_its_curves(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(baselines, "ABLATED", {
        "plain": ["grpo.py", *SHORT],
        "best of 4": ["baselines.py", "--method", "best-of-n", *SHORT]})
    monkeypatch.setattr(baselines, "LONG", {"a long run": ["grpo.py", *SHORT]})
    words = ["--ablate", "--seeds", "3", "--out", str(tmp_path)]
    baselines.main(words)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert "| plain | " in table
    assert "| best of 4 | " in table
    assert "a long run" not in table
    kept = run.read_json(tmp_path / "summaries.json")
    assert "\n".join(baselines.comparison(kept)) + "\n" == table
    for picture in ("plot.png", "a-long-run-3/curves.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
    # A second time nothing is run again.
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/summary.json")}
    baselines.main(words)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/summary.json")}
    assert len(times) == 3
