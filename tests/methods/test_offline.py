"""What DPO and SFT on the best share.

* The answers that are learnt from are those that were sampled, with their prompts and
  rewards, also after a checkpoint; a group whose rewards agree teaches nothing.
* Every epoch passes each example once, in a new order.
* The rate decays over the passes, and the half that samples trains nothing.
* Where all rewards agree, one line says so.
"""

import json
from itertools import chain

import pytest
import torch
from oracles import PROMPTS, make_batch, make_run

import grpo
import lora
from methods import __main__ as methods
from methods import dpo, offline, sft
from plumbing.figures import Clock
from plumbing.files import UserError
from plumbing.resume import load_checkpoint, save_checkpoint


def test_groups_are_those_that_were_sampled_and_whose_rewards_differ(tmp_path):
    run, wanted = make_run(dpo.Settings, steps=2), []
    collected = offline.Collected(run)
    order = grpo.shuffled(PROMPTS, run.settings.seed)
    for step, dead in enumerate((1, None)):
        batch, _, _ = make_batch(run)
        batch.prompts = grpo.draw_prompts(order, 3)
        batch.reward = batch.reward + step  # to tell the steps apart
        if dead is not None:
            batch.reward.view(3, 4)[dead] = 0.5
        metrics = collected.update(batch, Clock())
        assert metrics["dead_groups"] == pytest.approx((dead is not None) / 3)
        assert metrics["trained_tokens"] == 0
        wanted += [(batch.prompts[p].ids, batch.group(p), batch.reward.view(3, 4)[p])
                   for p in range(3) if p != dead]
    optimizer = torch.optim.AdamW(lora.parameters(run.model, "policy"))
    save_checkpoint(tmp_path / "checkpoint", collected.state, optimizer, {})
    resumed = offline.Collected(run)
    load_checkpoint(tmp_path / "checkpoint", resumed.state, optimizer)
    groups = resumed.live_groups(run, PROMPTS)
    assert len(groups) == len(wanted) == 5
    for group, (prompt, responses, reward) in zip(groups, wanted, strict=True):
        assert (group.prompt, group.responses) == (prompt, responses)
        assert torch.equal(group.reward, reward)


def test_every_epoch_passes_each_example_once_in_a_new_order():
    run = make_run(dpo.Settings, epochs=3)
    batches = offline.shuffled_batches(list(range(8)), run)
    assert [len(batch) for batch in batches] == [3, 3, 2] * 3
    epochs = [[*chain(*batches[i:i + 3])] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert offline.shuffled_batches(list(range(8)), run) == batches


SHORT = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "4", "--device", "cpu"]


def test_the_rate_decays_over_the_passes_and_sampling_trains_nothing(tmp_path,
                                                                    monkeypatch):
    rates, step = [], grpo.optimizer_step

    def watched(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer)

    monkeypatch.setattr(grpo, "optimizer_step", watched)
    folder = tmp_path / "run"
    methods.main(["sft", *SHORT, "--epochs", "2", "--lr", "0.004", "--out",
                  str(folder)])
    lines = [json.loads(line)
             for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sampling, learning = lines[:2], lines[2:]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert all("R" in line and line["trained_tokens"] == 0 for line in sampling)
    assert all("loss" in line and line["tokens"] == 0 for line in learning)
    count = len(learning)
    assert rates == pytest.approx([0.004 * (1 - i / count) for i in range(count)])


def test_rewards_that_all_agree_end_in_one_line():
    run = make_run(sft.Settings, steps=1)

    def sampled_alike(run, prompts, method):
        batch, _, _ = make_batch(run)
        batch.reward = torch.full_like(batch.reward, 0.5)
        method.update(batch, Clock())
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "train", sampled_alike)
        with pytest.raises(UserError, match="of every group agree; there is nothing"):
            sft.train(run, PROMPTS)
