"""A run that was interrupted goes on as if nothing had happened.

* After an interruption at any step, adapter, metrics, samples and summary are those of
  the undisturbed run, to the byte (seconds and memory aside).
* Ctrl-C and SIGTERM finish the step, save, and say how to go on; a second one insists.
* Other settings, another input or a broken checkpoint are refused by name.
* Two processes never write one folder.
* The reward model's training goes on when its command is given again.
* slow: SIGKILL at random moments, 5 of them; `KILLS=50 pytest -m slow -k killed` for
  more.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import grpo
import reward_model
import run
from model import TINY

ROOT = Path(__file__).parent.parent
SHORT = ["--steps", "4", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "4", "--device", "cpu",
         "--save-every", "2"]


def outcome(folder: Path) -> dict:
    """All that a run leaves, without seconds and memory."""
    metrics = [json.loads(line)
               for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = run.read_json(folder / "summary.json")
    return {
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*")),
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "samples": (folder / "samples.jsonl").read_bytes(),
        "metrics": [{k: v for k, v in m.items() if not k.startswith("seconds")}
                    for m in metrics],
        "summary": {k: v for k, v in summary.items()
                    if k not in ("seconds", "training_seconds", "peak_rss_gb")}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    grpo.main([*SHORT, "--out", str(folder)])
    return outcome(folder)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A folder whose run broke off while step 4 was being made; 2 was saved."""
    return broken_off(tmp_path / "run", monkeypatch, 4)


def broken_off(folder: Path, monkeypatch, at: int) -> Path:
    inner = grpo.sample_batch

    def sample(run_, prompts, step):
        if step == at:
            raise RuntimeError("power cut")
        return inner(run_, prompts, step)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "sample_batch", sample)
        with pytest.raises(RuntimeError, match="power cut"):
            grpo.main([*SHORT, "--out", str(folder)])
    return folder


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_interrupted_run_ends_as_the_undisturbed_one(at, tmp_path, monkeypatch,
                                                       undisturbed):
    folder = broken_off(tmp_path / "run", monkeypatch, at)
    monkeypatch.setattr(  # what the second half needs must come from the folder
        grpo, "answers_before", only_reading(grpo.answers_before))
    grpo.main(["--resume", str(folder)])
    assert outcome(folder) == undisturbed
    run.verify_checksums(folder)


def only_reading(answers_before):
    def checked(run_, held_out):
        assert (run_.folder / grpo.BEFORE).is_file()
        return answers_before(run_, held_out)

    return checked


def test_an_interruption_of_the_last_evaluation_costs_no_step(tmp_path, monkeypatch,
                                                             undisturbed):
    folder, inner = tmp_path / "run", grpo.evaluate

    def evaluate(run_, prompts, title):
        if title == "after":
            raise RuntimeError("power cut")
        return inner(run_, prompts, title)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "evaluate", evaluate)
        with pytest.raises(RuntimeError, match="power cut"):
            grpo.main([*SHORT, "--out", str(folder)])
    monkeypatch.setattr(grpo, "train_step", None)
    grpo.main(["--resume", str(folder)])
    assert outcome(folder) == undisturbed


def test_a_signal_finishes_the_step_and_says_how_to_go_on(tmp_path, monkeypatch, capsys,
                                                         undisturbed):
    folder, inner = tmp_path / "run", grpo.score_batch

    def score(run_, prompts, sampled):
        if run_.settings.group_size > 1 and not (folder / "seen").exists():
            (folder / "seen").touch()
            signal.raise_signal(signal.SIGTERM)
        return inner(run_, prompts, sampled)

    with monkeypatch.context() as patch:
        patch.setattr(grpo, "score_batch", score)
        with pytest.raises(SystemExit) as end:
            grpo.main([*SHORT, "--out", str(folder)])
    (folder / "seen").unlink()
    assert end.value.code == 130
    assert f"python grpo.py --resume {folder}" in capsys.readouterr().err
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    grpo.main(["--resume", str(folder)])
    assert outcome(folder) == undisturbed


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with run.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("options", "named"), [
    (["--lr", "0.5"], "--lr"), (["--seed", "0", "--group-size", "2"], "--group-size"),
    (["--weights", "safety=2"], "--weights")], ids=" ".join)
def test_other_settings_are_refused_by_name(options, named, interrupted):
    with pytest.raises(run.UserError, match=f"was made with {named} "):
        grpo.main(["--resume", str(interrupted), *options])


def test_the_same_settings_may_be_repeated(interrupted, undisturbed):
    grpo.main([*SHORT, "--resume", str(interrupted)])
    assert outcome(interrupted) == undisturbed


def test_another_input_is_refused_by_name(interrupted, monkeypatch):
    inputs = run.read_json(interrupted / "config.json")["inputs"]
    assert inputs.keys() == {"base", "prompts", "reward model"}
    for name in inputs:
        monkeypatch.setattr(grpo, "identify",
                            lambda *_, name=name: inputs | {name: "0" * 64})
        with pytest.raises(run.UserError, match=f"made with another {name};"):
            grpo.main(["--resume", str(interrupted)])


def test_changed_settings_are_refused(interrupted):
    config = run.read_json(interrupted / "config.json")
    run.write_json(interrupted / "config.json", config | {"lr": 0.5})
    with pytest.raises(run.UserError, match="has changed since"):
        grpo.main(["--resume", str(interrupted)])


@pytest.mark.parametrize("name", grpo.LINES)
def test_changed_lines_are_refused(name, interrupted):
    text = (interrupted / name).read_text()
    (interrupted / name).write_text(text.replace("0.", "1.", 1))
    with pytest.raises(run.UserError, match=f"{name} has changed since"):
        grpo.main(["--resume", str(interrupted)])


def test_a_broken_checkpoint_is_refused(interrupted):
    path = interrupted / run.CHECKPOINT
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"x" * 1000):
        path.write_bytes(broken)
        with pytest.raises(run.UserError, match="not a checkpoint of this run"):
            grpo.main(["--resume", str(interrupted)])


def test_a_folder_without_a_run_or_with_a_finished_one_is_refused(tmp_path,
                                                                 interrupted):
    with pytest.raises(run.UserError, match="holds no run to resume"):
        grpo.main(["--resume", str(tmp_path / "none")])
    grpo.main(["--resume", str(interrupted)])
    with pytest.raises(run.UserError, match="finished already"):
        grpo.main(["--resume", str(interrupted)])


def test_two_processes_do_not_write_one_folder(tmp_path):
    with run.only_writer(tmp_path / "run"):
        with pytest.raises(run.UserError, match="another process is writing"):
            with run.only_writer(tmp_path / "run"):
                pass
        assert (tmp_path / "run").is_dir()  # the one that was refused left it alone
    assert not (tmp_path / "run").exists()  # and an empty one is not left behind
    with run.only_writer(tmp_path / "run"):
        (tmp_path / "run" / "x").touch()
    assert (tmp_path / "run" / "x").exists()


def test_a_checkpoint_brings_back_parameters_and_moments(tmp_path):
    def training():
        torch.manual_seed(0)
        weights = [torch.randn(3, 2, requires_grad=True),
                   torch.randn(4, requires_grad=True)]
        return weights, torch.optim.AdamW(weights, lr=0.1)

    def steps(weights, optimizer, count, first):
        for i in range(first, first + count):
            optimizer.zero_grad()
            sum(((i + 1) * w).square().sum() for w in weights).backward()
            optimizer.step()

    whole, optimizer = training()
    steps(whole, optimizer, 5, 0)
    half, optimizer = training()
    steps(half, optimizer, 2, 0)
    run.save_checkpoint(tmp_path / "x", half, optimizer, {"step": 2})
    other, optimizer = training()
    assert run.load_checkpoint(tmp_path / "x", other, optimizer) == {"step": 2}
    steps(other, optimizer, 3, 2)
    for a, b in zip(whole, other, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- the reward model


LABELS = ["--epochs", "2", "--validation", "0.3", "--save-every", "1", "--device",
          "cpu"]


@pytest.fixture(scope="module")
def few_labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "labels.jsonl"
    rows = (TINY / "labels.jsonl").read_text().splitlines()
    parsed = [json.loads(row) for row in rows]
    chosen = []
    for split, count in (("train", 6), ("test", 2)):
        prompts = dict.fromkeys(r["prompt"] for r in parsed if r["split"] == split)
        chosen += [row for row, r in zip(rows, parsed, strict=True)
                   if r["prompt"] in list(prompts)[:count]]
    path.write_text("\n".join(chosen) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_reward_models_training_goes_on(at, few_labels, tmp_path, monkeypatch):
    options = [*LABELS, "--data", str(few_labels)]
    reward_model.main([*options, "--out", str(tmp_path / "whole")])
    inner, calls = reward_model.train_step, []

    def step(*arguments):
        calls.append(1)
        if len(calls) > at:
            raise RuntimeError("power cut")
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "train_step", step)
        with pytest.raises(RuntimeError, match="power cut"):
            reward_model.main([*options, "--out", str(tmp_path / "broken")])
    monkeypatch.setattr(reward_model, "fit_head", None)  # it was done already
    with pytest.raises(run.UserError, match="another lr"):
        reward_model.main([*options, "--lr", "1", "--out", str(tmp_path / "broken")])
    reward_model.main([*options, "--out", str(tmp_path / "broken")])
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert ((tmp_path / "broken" / name).read_bytes()
                == (tmp_path / "whole" / name).read_bytes())
    reports = [run.read_json(tmp_path / side / "reward.json")["report"]
               for side in ("whole", "broken")]
    for report in reports:
        del report["seconds"], report["peak_rss_gb"]
    assert reports[0] == reports[1]
    assert not (tmp_path / "broken" / run.CHECKPOINT).exists()


# ------------------------------------------------------------------------- SIGKILL


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_the_same(tmp_path):
    def start(*options: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "grpo.py"), *options], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def begun(process: subprocess.Popen, folder: Path) -> float:
        while not (folder / "config.json").exists() and process.poll() is None:
            time.sleep(0.01)
        return time.monotonic()

    words = [*SHORT, "--steps", "12", "--save-every", "1"]
    process = start(*words, "--out", str(tmp_path / "whole"))
    started = begun(process, tmp_path / "whole")
    assert process.wait() == 0
    length, wanted = time.monotonic() - started, outcome(tmp_path / "whole")
    moments, kinds = random.Random(0), {"config": 0, "checkpoint": 0, "finished": 0}
    for number in range(int(os.environ.get("KILLS", "5"))):
        folder = tmp_path / str(number)
        process = start(*words, "--out", str(folder))
        begun(process, folder)
        time.sleep(moments.random() * length)
        process.kill()
        process.wait()
        if (folder / run.CHECKSUMS).exists():
            kinds["finished"] += 1
            assert start("--resume", str(folder)).wait() == 2  # sweeps up, if need be
        elif (folder / "config.json").is_file():
            kinds["checkpoint" if (folder / run.CHECKPOINT).exists() else "config"] += 1
            process = start("--resume", str(folder))
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        else:  # killed before it had begun
            process = start(*words, "--out", str(folder))
            assert process.wait() == 0
        left = outcome(folder)
        left["files"] = [f for f in left["files"] if not Path(f).name.startswith(".")]
        assert left == wanted, number
        shutil.rmtree(folder)
    print(kinds)
    assert kinds["checkpoint"]  # the others would prove little
