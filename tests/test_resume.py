"""A run that was interrupted goes on as if nothing had happened, by every method.

* After an interruption at any step, adapter, metrics, samples and summary are those of
  the undisturbed run, to the byte (seconds and memory aside): for GRPO and PPO, and for
  DPO and SFT, both while they sample and while they learn.
* What the second half needs comes from the folder; no step is made twice.
* Ctrl-C and SIGTERM finish the step, save, and say how to go on; so does a terminal
  that closes.
* Other settings, another input or a broken checkpoint are refused by name.
* What starts must resume: odd values, a tree that has moved as a whole; what lies
  elsewhere now is asked for by its option, and taken if its SHA-256 is the same.
* Seconds and peak memory add up.
* Two processes never write one folder.
* The reward model's training goes on when its command is given again.
* slow: SIGKILL at random moments, 5 of them, of GRPO and of PPO; `KILLS=50 pytest -m
  slow -k killed` for more. And whole runs of random settings, `RUNS=20`, each killed.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles import another_reader

import grpo
import reward_model
import run
import sample
from loading import TINY
from methods.__main__ import run_method
from plumbing import figures
from plumbing.files import (
    CHECKPOINT,
    CHECKSUMS,
    UserError,
    only_writer,
    read_json,
    verify_checksums,
    write_json,
)
from plumbing.options import flag

ROOT = Path(__file__).parent.parent
SHORT = ["--steps", "4", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "16", "--eval-prompts", "4", "--device", "cpu",
         "--save-every", "2"]
# Of each method: its own options, and how many steps it then writes. The four learning
# steps of DPO and SFT follow upon four that only sample.
OPTIONS = {"grpo": [], "ppo": [], "dpo": ["--epochs", "1"], "sft": ["--epochs", "1"]}
STEPS = {"grpo": 4, "ppo": 4, "dpo": 8, "sft": 8}


def align(method: str, *words: str) -> None:
    """`python grpo.py` or `python -m methods METHOD`, in this process."""
    if method == "grpo":
        grpo.main([*words])
    else:
        run_method(method, [*words])


def start(method: str, folder: Path) -> None:
    align(method, *SHORT, *OPTIONS[method], "--out", str(folder))


def outcome(folder: Path) -> dict:
    """All that a run leaves, without seconds and memory."""
    metrics = [json.loads(line)
               for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = read_json(folder / "summary.json")
    return {
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*")),
        "adapter": [path.read_bytes() for path in folder.glob("adapter/*.safetensors")],
        "samples": (folder / "samples.jsonl").read_bytes(),
        "metrics": [{k: v for k, v in m.items() if not k.startswith("seconds")}
                    for m in metrics],
        "summary": {k: v for k, v in summary.items()
                    if k not in ("seconds", "training_seconds", "peak_rss_gb")}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """`undisturbed(method)`: the outcome of a run; ask before anything is patched."""
    root, outcomes = tmp_path_factory.mktemp("whole"), {}

    def outcome_of(method: str) -> dict:
        if method not in outcomes:
            start(method, root / method)
            outcomes[method] = outcome(root / method)
            assert len(outcomes[method]["metrics"]) == STEPS[method]
        return outcomes[method]

    return outcome_of


@contextlib.contextmanager
def in_the_middle_of(step: int, act):
    """Call `act` while that step of the training is being made."""
    calls, inner = [], grpo.set_rates

    def set_rates(*arguments):  # once a step, by every method
        calls.append(1)
        if len(calls) == step:
            act()
        inner(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "set_rates", set_rates)
        yield


def cut_the_power(*_: object) -> None:
    raise RuntimeError("power cut")


def broken_off(method: str, folder: Path, at: int) -> Path:
    """The folder of a run that broke off while step `at` was being made."""
    with in_the_middle_of(at, cut_the_power), \
            pytest.raises(RuntimeError, match="power cut"):
        start(method, folder)
    return folder


@pytest.fixture(scope="module")
def broken_runs(tmp_path_factory):
    """`broken_runs(method)`: a folder to copy."""
    root = tmp_path_factory.mktemp("broken")

    def folder_of(method: str) -> Path:
        folder = root / method
        return folder if folder.exists() else broken_off(method, folder, 4)

    return folder_of


@pytest.fixture
def interrupted(broken_runs, tmp_path):
    """A folder whose run broke off while step 4 was being made; 2 was saved."""
    return shutil.copytree(broken_runs("grpo"), tmp_path / "run")


# ------------------------------------------------------------------ to the same bytes


def only_reading(answers_before):
    def checked(run_, held_out):
        assert (run_.folder / run.BEFORE).is_file()
        return answers_before(run_, held_out)

    return checked


# A program runs twice for each of these; the other steps are slow tests.
OFTEN = {"grpo": (1, 2, 3, 4), "ppo": (3,), "dpo": (3,), "sft": ()}


@pytest.mark.parametrize(("method", "at"), [
    pytest.param(method, at, marks=[] if at in OFTEN[method] else pytest.mark.slow)
    for method, steps in STEPS.items() for at in range(1, steps + 1)])
def test_an_interrupted_run_ends_as_the_undisturbed_one(method, at, tmp_path,
                                                       monkeypatch, undisturbed):
    folder, wanted = tmp_path / "run", undisturbed(method)
    broken_off(method, folder, at)
    monkeypatch.setattr(  # what the second half needs must come from the folder
        grpo, "answers_before", only_reading(grpo.answers_before))
    align(method, "--resume", str(folder))
    assert outcome(folder) == wanted
    verify_checksums(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_whoever_learns_from_collected_answers_samples_nothing_twice(
        method, tmp_path, monkeypatch, undisturbed):
    folder, wanted = tmp_path / "run", undisturbed(method)
    broken_off(method, folder, 7)
    monkeypatch.setattr(grpo, "sample_batch", None)
    module, batches = importlib.import_module(f"methods.{method}"), []
    inner = module.learn
    monkeypatch.setattr(module, "learn", lambda run_, examples: (
        batches.append(1) or inner(run_, examples)))
    align(method, "--resume", str(folder))
    assert len(batches) == 2  # of four: the checkpoint is of step 6
    assert outcome(folder) == wanted


@pytest.mark.parametrize("method", [
    "grpo", "dpo", *(pytest.param(m, marks=pytest.mark.slow) for m in ("ppo", "sft"))])
def test_an_interruption_of_the_last_evaluation_costs_no_step(method, tmp_path,
                                                             monkeypatch, undisturbed):
    folder, wanted = tmp_path / "run", undisturbed(method)
    with monkeypatch.context() as patch:
        patch.setattr(grpo, "evaluate", cut_the_power)  # that of after
        with pytest.raises(RuntimeError, match="power cut"):
            start(method, folder)
    monkeypatch.setattr(grpo, "set_rates", None)
    align(method, "--resume", str(folder))
    assert outcome(folder) == wanted


@pytest.mark.parametrize(("method", "at", "number"), [
    ("grpo", 1, signal.SIGTERM), ("grpo", 4, signal.SIGINT), ("ppo", 1, signal.SIGTERM),
    ("dpo", 4, signal.SIGTERM), ("sft", 5, signal.SIGINT)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(
        method, at, number, tmp_path, capsys, undisturbed):
    folder, wanted = tmp_path / "run", undisturbed(method)
    with in_the_middle_of(at, lambda: signal.raise_signal(number)), \
            pytest.raises(SystemExit) as end:
        start(method, folder)
    assert end.value.code == 130
    program = "grpo.py" if method == "grpo" else f"-m methods {method}"
    assert f"python {program} --resume {folder}\n" in capsys.readouterr().err
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == at
    align(method, "--resume", str(folder))
    assert outcome(folder) == wanted


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a terminal of Linux")
def test_a_terminal_that_closes_leaves_a_run_that_resumes(tmp_path, undisturbed):
    folder, wanted = tmp_path / "run", undisturbed("grpo")
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, str(ROOT / "grpo.py"), *SHORT,
                                  "--save-every", "100", "--out", str(folder)])
    lines = folder / "metrics.jsonl"
    while not (lines.is_file() and lines.stat().st_size):
        time.sleep(0.01)
    os.close(terminal)
    os.waitpid(child, 0)
    assert (folder / CHECKPOINT).is_file()
    align("grpo", "--resume", str(folder))
    assert outcome(folder) == wanted


def test_the_same_settings_may_be_repeated(interrupted, undisturbed):
    wanted = undisturbed("grpo")
    grpo.main([*SHORT, "--resume", str(interrupted)])
    assert outcome(interrupted) == wanted


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("method", "options", "named"), [
    ("grpo", ["--lr", "0.5"], "--lr"),
    ("grpo", ["--seed", "0", "--group-size", "2"], "--group-size"),
    ("grpo", ["--weights", "safety=2"], "--weights"),
    ("ppo", ["--lam", "0.5"], "--lam"), ("dpo", ["--epochs", "2"], "--epochs")])
def test_other_settings_are_refused_by_name(method, options, named, broken_runs):
    with pytest.raises(UserError, match=f"was made with {named} "):
        align(method, "--resume", str(broken_runs(method)), *options)


def test_another_input_is_refused_by_name(interrupted, monkeypatch):
    inputs = read_json(interrupted / "config.json")["inputs"]
    assert inputs.keys() == {"base", "prompts", "reward model"}
    for name in inputs:
        monkeypatch.setattr(run, "identify",
                            lambda *_, name=name: inputs | {name: "0" * 64})
        with pytest.raises(UserError, match=f"made with another {name};"):
            grpo.main(["--resume", str(interrupted)])


def test_changed_settings_are_refused(interrupted):
    config = read_json(interrupted / "config.json")
    write_json(interrupted / "config.json", config | {"lr": 0.5})
    with pytest.raises(UserError, match="has changed since"):
        grpo.main(["--resume", str(interrupted)])


@pytest.mark.parametrize("name", run.LINES)
def test_changed_lines_are_refused(name, interrupted):
    text = (interrupted / name).read_text()
    (interrupted / name).write_text(text.replace("0.", "1.", 1))
    with pytest.raises(UserError, match=f"{name} has changed since"):
        grpo.main(["--resume", str(interrupted)])


def test_a_broken_checkpoint_is_refused(interrupted):
    path = interrupted / CHECKPOINT
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", b"x" * 1000):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="not a checkpoint of this run"):
            grpo.main(["--resume", str(interrupted)])


def test_a_folder_without_a_run_or_with_a_finished_one_is_refused(tmp_path,
                                                                 interrupted):
    with pytest.raises(UserError, match="holds no run to resume"):
        grpo.main(["--resume", str(tmp_path / "none")])
    grpo.main(["--resume", str(interrupted)])
    with pytest.raises(UserError, match="finished already"):
        grpo.main(["--resume", str(interrupted)])


def test_two_processes_do_not_write_one_folder(tmp_path, interrupted, monkeypatch):
    monkeypatch.setattr(run, "load", None)  # the second is refused before it loads
    for words in ([*SHORT, "--out", str(tmp_path / "new")],
                  ["--resume", str(interrupted)]):
        files = outcome_files(Path(words[-1]))
        with only_writer(Path(words[-1])), \
                pytest.raises(UserError, match="another process is writing"):
            grpo.main(words)
        assert outcome_files(Path(words[-1])) == files


def outcome_files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*") if p.is_file()}


# ---------------------------------------------------- odd values, and what has moved


@pytest.mark.slow
def test_odd_values_resume(tmp_path):
    folder, system = tmp_path / "é 'run' ~", "Be kind.\nAnd\xa0brief.\t水"
    words = [*SHORT, "--system", system, "--seed", str(2 ** 63 - 1), "--weights",
             "safety=2, politeness=1e-320", "--min-std", "-0.0"]
    outcomes = []
    for out, at in ((tmp_path / "whole", None), (folder, 3)):
        if at is None:
            grpo.main([*words, "--out", str(out)])
        else:
            with in_the_middle_of(at, cut_the_power), \
                    pytest.raises(RuntimeError, match="power cut"):
                grpo.main([*words, "--out", str(out)])
            grpo.main(["--resume", f"{out}/"])
        outcomes.append(outcome(out))
    assert outcomes[0] == outcomes[1]
    assert read_json(folder / "config.json")["system"] == system


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A base, reward model, judge and prompts of one's own, and a run on them."""
    root = tmp_path / "clone"
    shutil.copytree(TINY, root / "models" / "base")
    shutil.copytree(TINY / "reward", root / "models" / "reward")
    another_reader(root / "models" / "judge")
    rows = [{"prompt": json.loads(line)["prompt"]} for line in
            (TINY / "prompts.jsonl").read_text().splitlines()[:20]]
    (root / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(root)
    with in_the_middle_of(3, cut_the_power), pytest.raises(RuntimeError):
        grpo.main([*SHORT, "--model", "models/base", "--reward", "models/reward",
                   "--judge", "models/judge", "--prompts", "p.jsonl", "--out",
                   "runs/x"])
    monkeypatch.chdir(tmp_path)
    return root


def test_a_tree_that_has_moved_resumes_as_it_would_have_ended(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "moved")
    grpo.main(["--resume", str(tree / "runs" / "x")])
    wanted = outcome(tree / "runs" / "x")
    shutil.rmtree(tree)
    folder = tmp_path / "moved" / "runs" / "other"
    (tmp_path / "moved" / "runs" / "x").rename(folder)
    grpo.main(["--resume", str(folder)])
    assert outcome(folder) == wanted
    for file in folder.rglob("*"):  # nor does the adapter say where it was made
        assert file.is_dir() or str(tmp_path).encode() not in file.read_bytes()


def test_what_lies_elsewhere_is_asked_for_and_taken_by_its_hash(tree, tmp_path):
    folder, other = tree / "runs" / "x", tmp_path / "else"
    given, moves = [], {
        "--model": "models/base", "--reward": "models/reward",
        "--judge": "models/judge", "--prompts": "p.jsonl"}
    other.mkdir()
    for number, name in enumerate(moves.values()):
        (tree / name).rename(other / str(number))
    for name in ("--model", "--prompts", "--reward", "--judge"):
        with pytest.raises(UserError, match=f"was made with {name} .* is not there; "
                           f"say where it is now: {name} (DIR|FILE)"):
            grpo.main(["--resume", str(folder), *given])
        given += [name, str(other / str([*moves].index(name)))]
    altered = tmp_path / "altered.jsonl"
    altered.write_text((other / "3").read_text() + "\n")
    with pytest.raises(UserError, match=r"made with another prompts; .*--prompts FILE"):
        grpo.main(["--resume", str(folder), *given, "--prompts", str(altered)])
    with pytest.raises(UserError, match="was made with --lr"):
        grpo.main(["--resume", str(folder), *given, "--lr", "1"])
    with pytest.raises(UserError, match="leave --out out"):
        grpo.main(["--resume", str(folder), *given, "--out", str(tmp_path / "new")])
    grpo.main(["--resume", str(folder), *given, "--out", str(folder)])
    verify_checksums(folder)
    # The chat asks for the base, too.
    with pytest.raises(UserError, match="name it with --model"):
        sample.main(["How?", "--adapter", str(folder)])
    sample.main(["How?", "--adapter", str(folder), *given[:2], "--max-new-tokens", "2"])


def test_the_chat_finds_what_has_moved_with_the_run(tree, tmp_path, capsys):
    grpo.main(["--resume", str(tree / "runs" / "x")])
    tree.rename(tmp_path / "moved")
    capsys.readouterr()
    sample.main(["How?", "--adapter", str(tmp_path / "moved" / "runs" / "x"),
                 "--max-new-tokens", "2"])
    assert capsys.readouterr().out.count("politeness") == 2


def test_somebody_elses_files_stay(interrupted):
    for name in (".config.yaml.swp", ".a.b", "notes.txt"):
        (interrupted / name).write_text("mine")
    (interrupted / ".my.folder").mkdir()
    (interrupted / ".metrics.jsonl.abcd1234").touch()  # ours, of a process killed
    grpo.main(["--resume", str(interrupted)])
    assert {f.name for f in interrupted.glob(".*")} == {
        ".config.yaml.swp", ".a.b", ".my.folder"}
    (interrupted / "notes.txt").write_text("changed")
    verify_checksums(interrupted)


# --------------------------------------------------------------- what a run has spent


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_seconds_and_memory_add_up(method, tmp_path, monkeypatch):
    class Late(figures.Cost):  # a process that has run for a thousand seconds, at 99 GB
        def so_far(self):
            spent = super().so_far()
            return {"seconds": spent["seconds"] + 1000,
                    "peak_rss_gb": max(self.peak, 99.0)}

    for at in (2, 1):  # after a checkpoint; and with before.json alone
        folder = tmp_path / str(at)
        with monkeypatch.context() as patch:
            patch.setattr(grpo, "Cost", Late)
            broken_off(method, folder, at + 1)
            if at == 1:
                assert not (folder / CHECKPOINT).exists()
            with in_the_middle_of(1, cut_the_power), pytest.raises(RuntimeError):
                align(method, "--resume", str(folder))
        align(method, "--resume", str(folder))
        summary = read_json(folder / "summary.json")
        # The second process broke off before it had kept anything.
        assert 1000 < summary["seconds"] < 1500
        assert summary["peak_rss_gb"] == 99.0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert summary["training_seconds"] == pytest.approx(
            sum(json.loads(line)["seconds"] for line in lines), abs=0.06)


@pytest.mark.parametrize("kept", [None, [], {}, {"seconds": "x"}, {"seconds": -1},
                                  {"seconds": True, "peak_rss_gb": 1e300}])
def test_what_was_not_kept_counts_as_nothing(kept):
    cost = figures.Cost(kept)
    assert (cost.seconds, cost.peak) == (0, 0)
    assert cost.so_far()["peak_rss_gb"] == figures.peak_rss_gb()


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
    with pytest.raises(UserError, match="another lr"):
        reward_model.main([*options, "--lr", "1", "--out", str(tmp_path / "broken")])
    reward_model.main([*options, "--out", str(tmp_path / "broken")])
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert ((tmp_path / "broken" / name).read_bytes()
                == (tmp_path / "whole" / name).read_bytes())
    reports = [read_json(tmp_path / side / "reward.json")["report"]
               for side in ("whole", "broken")]
    for report in reports:
        del report["seconds"], report["peak_rss_gb"]
    assert reports[0] == reports[1]
    assert not (tmp_path / "broken" / CHECKPOINT).exists()


# ------------------------------------------------------------------------- SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("program", [["grpo.py"], ["-m", "methods", "ppo"]],
                         ids=["grpo", "ppo"])
def test_a_run_that_is_killed_at_random_moments_ends_the_same(program, tmp_path):
    def launch(*options: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *program, *options], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def begun(process: subprocess.Popen, folder: Path) -> float:
        while not (folder / "config.json").exists() and process.poll() is None:
            time.sleep(0.01)
        return time.monotonic()

    words = [*SHORT, "--steps", "12", "--save-every", "1"]
    process = launch(*words, "--out", str(tmp_path / "whole"))
    started = begun(process, tmp_path / "whole")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    length, wanted = time.monotonic() - started, outcome(tmp_path / "whole")
    moments, kinds = random.Random(0), {"config": 0, "checkpoint": 0, "finished": 0}
    for number in range(int(os.environ.get("KILLS", "5"))):
        folder = tmp_path / str(number)
        process = launch(*words, "--out", str(folder))
        begun(process, folder)
        time.sleep(moments.random() * length)
        process.kill()
        process.communicate()
        if (folder / CHECKSUMS).exists():
            kinds["finished"] += 1
            # This sweeps up, if need be.
            assert launch("--resume", str(folder)).wait() == 2
        elif (folder / "config.json").is_file():
            kinds["checkpoint" if (folder / CHECKPOINT).exists() else "config"] += 1
            process = launch("--resume", str(folder))
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        else:  # killed before it had begun
            process = launch(*words, "--out", str(folder))
            _, errors = process.communicate()
            assert process.returncode == 0, errors
        left = outcome(folder)
        left["files"] = [f for f in left["files"] if not Path(f).name.startswith(".")]
        assert left == wanted, number
        shutil.rmtree(folder)
    print(kinds)
    assert kinds["checkpoint"]  # the others would prove little


DRAWS = {  # a random word for each option that changes what a run does
    "weights": lambda c: c.choice(["", "safety=2", "politeness=0,safety=1e-3"]),
    "system": lambda c: c.choice(["Be kind.\nBe brief.", "\xa0\t水\u2028", "", " ",
                                  '"\\\'', "x " * 99]),
    "steps": lambda c: c.randint(2, 4), "prompts_per_step": lambda c: c.randint(1, 3),
    "group_size": lambda c: c.randint(2, 4), "rank": lambda c: c.randint(1, 8),
    "max_new_tokens": lambda c: c.randint(8, 16), "epochs": lambda c: c.randint(1, 2),
    "temperature": lambda c: c.uniform(0.7, 1.5), "clip": lambda c: c.random() + 1e-9,
    "lr": lambda c: 10 ** c.uniform(-4, -2), "value_lr": lambda c: 1e-3,
    "seed": lambda c: c.getrandbits(63), "save_every": lambda c: c.randint(1, 3),
    "eval_prompts": lambda c: c.randint(1, 4), "beta": lambda c: c.uniform(1e-3, 0.5),
    "inner_steps": lambda c: c.randint(1, 2), "min_std": lambda c: c.random() ** 9,
    "gamma": lambda c: c.random(), "lam": lambda c: c.random(),
    "reward": lambda c: c.choice(["gold", str(TINY / "reward")]),
    "judge": lambda c: TINY / "reward", "prompts": lambda c: TINY / "prompts.jsonl"}
ALWAYS = ("steps", "prompts_per_step", "group_size", "max_new_tokens", "eval_prompts")


def random_options(cls: type, chance: random.Random) -> list[str]:
    """Short words for a program, of any of its options."""
    words = ["--device=cpu"]
    for field in dataclasses.fields(cls):
        draw, choices = DRAWS.get(field.name), field.metadata.get("choices")
        if choices and field.name != "size":
            draw = functools.partial(random.Random.choice, seq=choices)
        if draw and field.init and (field.name in ALWAYS or chance.random() < 0.4):
            words.append(f"{flag(field.name)}={draw(chance)}")
    return words


@pytest.mark.slow
@pytest.mark.parametrize("number", range(int(os.environ.get("RUNS", "20"))))
def test_whatever_starts_resumes_when_it_is_killed(number, tmp_path):
    chance = random.Random(number)
    method = [*OPTIONS, "best_of_n"][number % 5]
    module = grpo if method == "grpo" else importlib.import_module(f"methods.{method}")
    whole, folder = tmp_path / "whole", tmp_path / chance.choice(["x", "é 'y'", "~"])
    for _ in range(20):  # until the settings are such as a run accepts
        words, started = random_options(module.Settings, chance), time.monotonic()
        with contextlib.suppress(UserError):
            align(method, *words, "--out", str(whole))
            break
        shutil.rmtree(whole, ignore_errors=True)
    length, wanted = time.monotonic() - started, outcome(whole)
    program = ["grpo.py"] if method == "grpo" else ["-m", "methods", method]
    process = subprocess.Popen(
        [sys.executable, *program, *words, "--out", str(folder)], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    while not (folder / "config.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(chance.random() * length)
    process.kill()
    process.wait()
    print(words, sorted(p.name for p in folder.iterdir()))
    if not (folder / CHECKSUMS).exists():
        align(method, "--resume", str(folder))
    left = outcome(folder)
    left["files"] = [f for f in left["files"] if not Path(f).name.startswith(".")]
    assert left == wanted, words
