"""Several processes give what one process gives.

* On fixed responses the gradient is that of one process (float64, 1e-6 of its norm),
  for 2 and 3 processes: GRPO's, with dead groups that leave a process with nothing to
  do, and for every normalisation of the loss; PPO's, of policy and critic.
* Draws, scores and advantages are the same for any number of processes, and every
  process knows all of them.
* Items are dealt out, and gathered in their order, also where a process has none.
* A tiny run by `torchrun` writes the same samples as one process in its first step.
* slow: a process that dies ends the run with one line; the checkpoint resumes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles import PROMPTS, Recorder, make_batch, make_run

import grpo
import lora
from methods import ppo
from plumbing import parallel
from plumbing.figures import Clock
from plumbing.files import CHECKPOINT, CHECKSUMS, read_json, verify_checksums
from sample import sample_batch, score_batch

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def in_processes(function, count: int, folder: Path, *arguments) -> list:
    """What `function(*arguments)` returns in each of `count` processes."""
    port = free_port()
    context = torch.multiprocessing.get_context("spawn")
    workers = [context.Process(target=worker, daemon=True, args=(
        function, rank, count, port, folder / f"{rank}.pt", arguments))
        for rank in range(count)]
    try:
        for process in workers:
            process.start()
        for process in workers:
            process.join(120)
            assert process.exitcode == 0
    finally:
        for process in workers:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False)
            for rank in range(count)]


def worker(function, rank: int, count: int, port: int, out: Path, arguments) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with parallel.together("cpu"):
        torch.save(function(*arguments), out)


# ------------------------------------------------------- what each process returns

# Settings, and groups that are dead: with beta 0 these leave processes without work.
CASES = [({}, []), ({"beta": 0.0}, [0, 2]), ({"loss": "dapo", "beta": 0.0}, [1]),
         ({"loss": "dr_grpo"}, [])]


def gradient(options: dict, dead: list[int]) -> tuple[torch.Tensor, dict]:
    """GRPO's gradient and metrics."""
    run = make_run(**options)
    batch, advantage, alive = make_batch(run)
    advantage.view(3, -1)[dead], alive[dead] = 0, False
    recorder = Recorder(lora.parameters(run.model, "policy"))
    metrics = grpo.train_batch(run, batch, advantage, alive, recorder, Clock())
    return recorder.gradients[0], metrics


def ppo_case() -> tuple:
    """A run, its batch, and a critic whose head and adapter are random."""
    run = make_run(ppo.Settings, beta=0.1, lam=0.95)
    critic = ppo.Critic(run.model, 2, 0)
    critic.head.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return run, make_batch(run)[0], critic


def ppo_gradients() -> tuple[torch.Tensor, dict]:
    """What `ppo.add_gradients` adds to policy and critic, summed over the processes."""
    run, batch, critic = ppo_case()
    old, metrics = ppo.make_experience(run, critic, batch)
    metrics |= ppo.add_gradients(run, critic, batch, old)
    parameters = lora.parameters(run.model, "policy") + critic.parameters()
    parallel.all_reduce_gradients(parameters)
    return torch.cat([p.grad.flatten() for p in parameters]), metrics


def ppo_update() -> tuple[list[torch.Tensor], dict, torch.Tensor]:
    """The gradients of each step of a PPO update, its metrics and advantages."""
    run, batch, critic = ppo_case()
    policy = lora.parameters(run.model, "policy")
    recorder = Recorder(policy + critic.parameters())
    recorder.param_groups = [{"params": policy}, {"params": critic.parameters()}]
    metrics = ppo.update(run, critic, recorder, batch, Clock())
    return recorder.gradients, metrics, metrics.pop("advantage")


def draws() -> tuple[list[list[int]], list[torch.Tensor]]:
    """Responses, and all that belongs to them."""
    run = make_run(inner_steps=1)
    run.score = lambda prompt, rows: torch.tensor(
        [[len(r) / 9, r[0] / 50] for r in rows])
    sampled = sample_batch(run, PROMPTS, 5, 4)
    batch = score_batch(run, PROMPTS, sampled)
    advantage, alive = grpo.make_advantage(batch.scores.view(3, 4, 2), run.weights)
    return sampled.responses(), [batch.scores, batch.reward, advantage, alive,
                                 sampled.logp, sampled.ended]


def gathered() -> list[torch.Tensor]:
    """Tables of 0 to 5 rows, of which each process had its share."""
    tables = [torch.arange(2 * rows).view(rows, 2) + 1 for rows in range(6)]
    shares = [torch.stack(own) if (own := parallel.shard(table)) else table[:0]
              for table in tables]
    return [parallel.gather(own, len(table))
            for own, table in zip(shares, tables, strict=True)]


def everything() -> dict:
    """All of these, one after the other: starting processes takes longest."""
    return {"gradients": [gradient(*case) for case in CASES],
            "ppo_gradients": ppo_gradients(), "ppo_update": ppo_update(),
            "draws": draws(), "gathered": gathered()}


@pytest.fixture(scope="module")
def one():
    """What one process returns."""
    return everything()


@pytest.fixture(scope="module", params=[
    2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])  # of 4, one is idle
def processes(request, tmp_path_factory):
    """What each of some processes returns."""
    return in_processes(everything, request.param, tmp_path_factory.mktemp("answers"))


def test_the_gradient_is_that_of_one_process(processes, one):
    for process in processes:
        for (own, metrics), (wanted, figures) in zip(
                process["gradients"], one["gradients"], strict=True):
            assert wanted.norm() > 0
            assert (own - wanted).norm() <= 1e-6 * wanted.norm()
            assert metrics == pytest.approx(figures, rel=1e-9)


def test_the_gradients_of_ppo_are_those_of_one_process(processes, one):
    wanted, figures = one["ppo_gradients"]
    run, _, critic = ppo_case()
    size = sum(p.numel() for p in lora.parameters(run.model, "policy"))
    assert len(wanted) == size + sum(p.numel() for p in critic.parameters())
    for process in processes:
        own, metrics = process["ppo_gradients"]
        for who in (slice(size), slice(size, None)):  # policy, critic
            assert wanted[who].norm() > 0
            assert (own[who] - wanted[who]).norm() <= 1e-6 * wanted[who].norm()
        assert metrics == pytest.approx(figures, rel=1e-9)


def test_an_update_of_ppo_is_that_of_one_process(processes, one):
    steps, figures, advantage = one["ppo_update"]
    assert len(steps) == 2  # epochs
    assert figures.keys() >= {"loss", "value_loss", "grad_norm", "value_grad_norm",
                              "kl_k1", "explained_variance"}
    for process in processes:
        own, metrics, own_advantage = process["ppo_update"]
        for ours, wanted in zip(own, steps, strict=True):
            assert (ours - wanted).norm() <= 1e-6 * wanted.norm()
        assert metrics == pytest.approx(figures, rel=1e-9)
        torch.testing.assert_close(own_advantage, advantage, rtol=1e-9, atol=1e-9)


def test_draws_are_the_same_and_known_to_all(processes, one):
    responses, tensors = one["draws"]
    for process in processes:
        own, others = process["draws"]
        assert own == responses
        for a, b in zip(others, tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_what_was_dealt_out_is_gathered_in_its_order(processes):
    for process in processes:
        for rows, table in enumerate(process["gathered"]):
            assert table.tolist() == (torch.arange(2 * rows).view(rows, 2) + 1).tolist()


def test_items_are_dealt_out_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        dealt.append(parallel.shard(range(7)))
    assert dealt == [[0, 3, 6], [1, 4], [2, 5]]


# ----------------------------------------------------------------- whole programs

SHORT = ["--steps", "3", "--prompts-per-step", "3", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "5", "--device", "cpu",
         "--save-every", "1"]


def torchrun(*options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--master-port", str(free_port()), "grpo.py", *options], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_torchrun_makes_the_run_of_one_process(tmp_path):
    process = torchrun(*SHORT, "--out", str(tmp_path / "two"))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert printed.count("mean score before and after") == 1
    verify_checksums(tmp_path / "two")
    grpo.main([*SHORT, "--out", str(tmp_path / "one")])
    first = [[json.loads(line) for line in
              (tmp_path / side / "samples.jsonl").read_text().splitlines()[:12]]
             for side in ("one", "two")]
    for one, two in zip(*first, strict=True):
        assert one["response"] == two["response"]
        assert one["scores"] == pytest.approx(two["scores"], abs=2e-3)
    metrics = [[json.loads(line) for line in
                (tmp_path / side / "metrics.jsonl").read_text().splitlines()]
               for side in ("one", "two")]
    assert len(metrics[0]) == len(metrics[1]) == 3
    assert metrics[0][0]["grad_norm"] == pytest.approx(metrics[1][0]["grad_norm"],
                                                       rel=1e-3)
    before = [read_json(tmp_path / side / "summary.json")["before"]
              for side in ("one", "two")]
    assert before[0]["gold"] == before[1]["gold"]
    assert before[0]["base_perplexity"] == pytest.approx(before[1]["base_perplexity"],
                                                         rel=1e-4)


@pytest.mark.slow
def test_a_process_that_dies_leaves_a_checkpoint_that_resumes(tmp_path):
    folder = tmp_path / "run"
    long = [*SHORT, "--steps", "40"]
    process = torchrun(*long, "--out", str(folder))
    while not (folder / CHECKPOINT).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], check=True,
                              capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "another process of this run has ended" in errors
    assert not (folder / CHECKSUMS).exists()
    process = torchrun("--resume", str(folder))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 40
