"""Best of n: it trains nothing, and its KL has a bound.

* The bound [B1] has its known values; in a toy world, the KL is not above it.
* A run keeps the best of n answers to every prompt, leaves no adapter, and says that
  its KL is a bound; it goes on after an interruption.
* It has none of a training's options.
"""

import itertools
import math

import pytest
import torch

import run
from methods import __main__ as methods
from methods import best_of_n
from plumbing.files import read_json, verify_checksums

SHORT = ["best_of_n", "--group-size", "3", "--max-new-tokens", "16", "--eval-prompts",
         "4", "--device", "cpu"]


def test_the_bound_of_best_of_n():
    assert best_of_n.kl_bound(1) == 0
    assert best_of_n.kl_bound(64) == pytest.approx(3.1745, abs=1e-4)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_kl_of_best_of_n_is_not_above_the_bound(n):
    """[B1], by enumeration of all draws from five answers, of different rewards."""
    base = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
    best = torch.zeros_like(base)
    for draws in itertools.product(range(len(base)), repeat=n):
        best[max(draws)] += base[list(draws)].prod()
    kl = float((best * (best / base).log()).sum())
    assert 0 < kl <= best_of_n.kl_bound(n)


def test_a_run_keeps_the_best_of_n_and_goes_on(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"

    def cut(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(best_of_n, "answer", cut)
        with pytest.raises(RuntimeError, match="power cut"):
            methods.main([*SHORT, "--out", str(folder)])
    methods.main(["best_of_n", "--resume", str(folder)])
    names = {str(p.relative_to(folder)) for p in folder.rglob("*")}
    assert names == {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json",
                     "SHA256SUMS"}
    verify_checksums(folder)
    assert "nothing was trained" in capsys.readouterr().out
    summary = read_json(folder / "summary.json")
    before, after = summary["before"], summary["after"]
    assert after["reward_model"]["R"] > before["reward_model"]["R"]
    assert after["kl_is_a_bound"]
    assert after["kl"] == pytest.approx((math.log(3) - 2 / 3) / after["length"])
    assert after["tokens_an_answer"] > 2 * after["length"]  # 3 answers, one is kept
    assert summary["trained_parameters"] == summary["sampled_tokens"] == 0
    config = read_json(folder / "config.json")
    assert config["method"] == "best_of_n"
    assert not config.keys() & {"steps", "lr", "rank", "save_every", "epochs"}


@pytest.mark.parametrize("option", ["--steps", "--lr", "--rank", "--save-every"])
def test_options_of_a_training_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        methods.main([*SHORT, option, "1", "--out", str(tmp_path / "run")])
    assert end.value.code == 2
    assert f"unrecognized arguments: {option} 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert option[2:].replace("-", "_") in run.Settings.__dataclass_fields__
