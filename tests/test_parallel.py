"""Several processes give what one process gives.

* On fixed responses the gradient is that of one process (float64, 1e-6 of its norm),
  for 2 and 3 processes, with dead groups that leave a process with nothing to do, and
  for every normalisation of the loss.
* Draws are the same for any number of processes, and every process knows all of them.
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
from test_grpo import PROMPTS, Recorder, make_batch, make_run

import grpo
import lora
import parallel
import run

ROOT = Path(__file__).parent.parent


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


# Settings, and groups that are dead: with beta 0 these leave processes without work.
CASES = [({}, []), ({"beta": 0.0}, [0, 2]), ({"loss": "dapo", "beta": 0.0}, [1]),
         ({"loss": "dr_grpo"}, [])]


def gradients() -> list[tuple[torch.Tensor, dict]]:
    """Of all cases, one after the other: starting processes takes longest."""
    return [gradient(*case) for case in CASES]


def gradient(options: dict, dead: list[int]) -> tuple[torch.Tensor, dict]:
    run_ = make_run(**options)
    batch = make_batch(run_)
    for p in dead:
        batch.advantage.view(3, -1)[p] = 0
        batch.alive[p] = False
    recorder = Recorder(lora.parameters(run_.model, "policy"))
    metrics = grpo.train_batch(run_, batch, recorder, grpo.Clock())
    return recorder.gradients[0], metrics


@pytest.mark.parametrize("count", [2, 3])
def test_the_gradient_is_that_of_one_process(count, tmp_path):
    one = gradients()
    for process in in_processes(gradients, count, tmp_path):
        for (found, metrics), (wanted, figures) in zip(process, one, strict=True):
            assert wanted.norm() > 0
            assert (found - wanted).norm() <= 1e-6 * wanted.norm()
            assert metrics == pytest.approx(figures, rel=1e-9)


def draws() -> tuple:
    run_ = make_run(inner_steps=1)
    run_.score = lambda prompt, rows: torch.tensor(
        [[len(r) / 9, r[0] / 50] for r in rows])
    batch = grpo.sample_and_score(run_, PROMPTS, 5, grpo.Clock())
    return (batch.sampled.responses(), batch.scores, batch.advantage,
            batch.sampled.logp, batch.sampled.ended, batch.alive)


@pytest.mark.parametrize("count", [  # of 4 processes one has no prompt
    2, pytest.param(4, marks=pytest.mark.slow)])
def test_draws_are_the_same_and_known_to_all(count, tmp_path):
    responses, *tensors = draws()
    for found, *others in in_processes(draws, count, tmp_path):
        assert found == responses
        for a, b in zip(others, tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_items_are_dealt_out_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 3)
    dealt = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        dealt.append(parallel.shard(range(7)))
    assert dealt == [[0, 3, 6], [1, 4], [2, 5]]


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
    run.verify_checksums(tmp_path / "two")
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
    before = [run.read_json(tmp_path / side / "summary.json")["before"]
              for side in ("one", "two")]
    assert before[0]["gold"] == before[1]["gold"]
    assert before[0]["base_perplexity"] == pytest.approx(before[1]["base_perplexity"],
                                                         rel=1e-4)


@pytest.mark.slow
def test_a_process_that_dies_leaves_a_checkpoint_that_resumes(tmp_path):
    folder = tmp_path / "run"
    long = [*SHORT, "--steps", "40"]
    process = torchrun(*long, "--out", str(folder))
    while not (folder / run.CHECKPOINT).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], check=True,
                              capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "another process of this run has ended" in errors
    assert not (folder / run.CHECKSUMS).exists()
    process = torchrun("--resume", str(folder))
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 40
