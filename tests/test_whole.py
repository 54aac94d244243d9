"""Whole programs on the bundled tiny model: what a newcomer runs.

* `grpo.py` writes every file of a run folder; two runs of one seed agree to the byte.
* The saved adapter gives the aligned model's logits, through our loader and `peft`.
* Training needs what it says: two inner steps clip, beta 0 reports no KL, a missing
  reward model is trained first.
* Bad input ends in one line and exit status 2, without a traceback or a half-made run.
* slow: the default run aligns (`test_the_default_run_aligns_the_tiny_model`); the
  README's commands run.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracles import another_reader

import grpo
import lora
import reward_model
import sample
from loading import TINY, Tokenizer, load
from plumbing.files import (
    CHECKPOINT,
    UserError,
    one_line_errors,
    read_json,
    verify_checksums,
)

ROOT = Path(__file__).parent.parent
SHORT = ["--steps", "3", "--prompts-per-step", "2", "--group-size", "4",
         "--max-new-tokens", "24", "--eval-prompts", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "short"
    grpo.main([*SHORT, "--out", str(folder)])
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_leaves_every_file_of_its_folder(short_run):
    names = {str(p.relative_to(short_run)) for p in short_run.rglob("*") if p.is_file()}
    assert names == {
        "config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "SHA256SUMS",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "adapter/SHA256SUMS"}
    verify_checksums(short_run)


def test_metrics_have_a_line_a_step_with_the_figures_that_matter(short_run):
    metrics = lines(short_run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    for name in ("R", "R_std", "axes", "advantage_std", "dead_groups", "kl",
                 "clip_share", "entropy", "grad_norm", "length", "cut_off",
                 "distinct", "tokens",
                 "seconds", "seconds_sampling", "seconds_scoring", "seconds_reference",
                 "seconds_training"):
        assert all(name in m for m in metrics), name
    assert metrics[0]["kl"] < 1e-6 < metrics[2]["kl"]  # step 1 speaks as the base


def test_samples_hold_each_response_with_its_reward_and_advantage(short_run):
    rows = lines(short_run / "samples.jsonl")
    assert len(rows) == 3 * 2 * 4
    for row in rows:
        assert row["R"] == pytest.approx(sum(row["scores"].values()) / 4, abs=2e-4)
    for start in range(0, len(rows), 4):
        group = rows[start:start + 4]
        assert len({row["prompt"] for row in group}) == 1
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-3)


def test_the_summary_has_before_and_after_by_both_judges(short_run):
    summary = read_json(short_run / "summary.json")
    for when in ("before", "after"):
        for judge in ("reward_model", "gold"):
            scores = summary[when][judge]
            axes = [v for k, v in scores.items() if k != "R"]
            assert scores["R"] == pytest.approx(sum(axes) / 4, abs=1e-6)
    assert summary["before"]["kl"] == pytest.approx(0, abs=1e-6)
    assert summary["seconds"] > 0
    assert summary["peak_rss_gb"] > 0


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(short_run,
                                                                      tmp_path):
    def adapter(folder):
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    grpo.main([*SHORT, "--out", str(tmp_path / "again")])
    assert adapter(tmp_path / "again") == adapter(short_run)
    grpo.main([*SHORT, "--seed", "1", "--out", str(tmp_path / "other")])
    assert adapter(tmp_path / "other") != adapter(short_run)


def test_weights_change_only_the_reward_before_training(short_run, tmp_path):
    grpo.main([*SHORT, "--weights", "safety=3,politeness=0,meaningfulness=0",
               "--out", str(tmp_path / "run")])
    ours, theirs = (read_json(folder / "summary.json")["before"]["reward_model"]
                    for folder in (tmp_path / "run", short_run))
    assert {k: v for k, v in ours.items() if k != "R"} == {
        k: v for k, v in theirs.items() if k != "R"}
    assert ours["R"] == pytest.approx(
        (3 * ours["safety"] + ours["actionability"]) / 4, abs=1e-6)


def test_a_judge_gives_its_figures_and_changes_nothing(short_run, tmp_path):
    judge = another_reader(tmp_path / "judge")
    grpo.main([*SHORT, "--judge", str(judge), "--out", str(tmp_path / "run")])
    summary = read_json(tmp_path / "run" / "summary.json")
    for when in ("before", "after"):
        ours, theirs = (summary[when][who] for who in ("judge", "reward_model"))
        assert ours.keys() == theirs.keys()
        assert all(ours[axis] != theirs[axis] for axis in ours)
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (short_run / name).read_bytes()


def test_a_system_message_is_for_the_policy_alone(tmp_path, monkeypatch):
    asked, scored = [], []
    rollout, score = sample.rollout, reward_model.RewardModel.score

    def recorded(model, tokenizer, prompts, *rest):
        asked.extend(prompts)
        return rollout(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(sample, "rollout", recorded)
    monkeypatch.setattr(reward_model.RewardModel, "score", lambda self, prompt, rows: (
        scored.append(prompt) or score(self, prompt, rows)))
    grpo.main([*SHORT, "--system", "Be brief.", "--out", str(tmp_path / "run")])
    tokenizer = Tokenizer(TINY)
    system = tokenizer.encode("Be brief.")

    def holds_it(ids: list[int]) -> bool:
        return any(ids[i:i + len(system)] == system for i in range(len(ids)))

    assert asked
    assert scored
    assert all(map(holds_it, asked))
    assert not any(map(holds_it, scored))
    sample.main(["How do I mend it?", "--adapter", str(tmp_path / "run"),
                 "--max-new-tokens", "4"])


def test_a_folder_that_holds_a_run_is_not_overwritten(short_run):
    before = (short_run / "summary.json").read_bytes()
    with pytest.raises(UserError, match="holds a run already"):
        grpo.main([*SHORT, "--out", str(short_run)])
    assert (short_run / "summary.json").read_bytes() == before


@pytest.mark.parametrize("options", [
    ["--inner-steps", "2", "--lr", "0.02"], ["--beta", "0"], ["--advantage", "gdpo"],
    ["--advantage", "per-axis"],
    ["--loss", "dapo"], ["--loss", "dr_grpo"], ["--reward", "gold"], ["--kl", "k1"]],
    ids=" ".join)
def test_every_option_of_the_training_runs(options, tmp_path):
    grpo.main([*SHORT, *options, "--out", str(tmp_path / "run")])
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    if options[0] == "--inner-steps":
        assert metrics[0]["clip_share"] > 0  # the ratio has left 1
    if options[0] == "--beta":
        assert "kl" not in metrics[0]


def logits(model, tokenizer, name):
    ids = torch.tensor([tokenizer.chat("How do I change the bulb in my ceiling lamp?")])
    with torch.no_grad(), lora.using(model, name):
        return model.logits(model(ids))


def test_the_adapter_speaks_and_is_not_the_base(short_run):
    model, tokenizer = load(TINY)
    lora.load(model, "policy", short_run / "adapter")
    base, aligned = (logits(model, tokenizer, name) for name in (None, "policy"))
    assert (base - aligned).abs().max() > 1e-3


@pytest.mark.peer
def test_peft_loads_the_adapter_and_gives_our_logits(short_run):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, tokenizer = load(TINY)
    lora.load(model, "policy", short_run / "adapter")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        TINY, dtype=torch.float32)
    peer = peft.PeftModel.from_pretrained(peer, short_run / "adapter").eval()
    ids = torch.tensor([tokenizer.chat("How do I change the bulb in my ceiling lamp?")])
    with torch.no_grad():
        want = peer(ids).logits
    assert (logits(model, tokenizer, "policy") - want).abs().max() < 1e-4


def test_a_missing_reward_model_is_trained_first(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "reward"
    rows = (TINY / "labels.jsonl").read_text().splitlines()[:64]
    labels = tmp_path / "labels.jsonl"
    labels.write_text("\n".join(
        json.dumps(json.loads(row) | {"split": "test" if i < 16 else "train"})
        for i, row in enumerate(rows)))
    monkeypatch.setattr(reward_model, "default_folder", lambda source: folder)
    few = reward_model.Settings(data=labels, epochs=1)
    monkeypatch.setattr(reward_model, "Settings", lambda **_: few)
    grpo.main([*SHORT, "--out", str(tmp_path / "run")])
    assert "there is no reward model" in capsys.readouterr().out
    assert (folder / "reward.json").is_file()


@pytest.mark.slow
def test_two_bases_of_one_name_have_a_reward_model_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels = lines(TINY / "labels.jsonl")
    (tmp_path / "labels.jsonl").write_text("".join(
        json.dumps(row) + "\n" for row in labels[:24] + [
            row for row in labels if row["split"] == "test"][:24]))
    train = ["--data", "labels.jsonl", "--epochs", "0"]
    for one in ("a", "b", "c"):
        folder = tiny_copy(tmp_path / one / "checkpoint-2")
        (folder / "SHA256SUMS").unlink()
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights["model.norm.weight"] *= 1 + 0.5 * "abc".index(one)
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        if one < "c":
            reward_model.main(["--model", str(folder), *train])
    first, second, third = (tmp_path / "runs" / f"reward-checkpoint-2{n}"
                            for n in ("", "-2", "-3"))
    with pytest.raises(UserError, match="reward-checkpoint-2 holds a finished"):
        reward_model.main(["--model", "a/checkpoint-2", *train])
    grpo.main([*SHORT, "--model", "b/checkpoint-2", "--out", "b/run"])
    config = json.loads((tmp_path / "b" / "run" / "config.json").read_text())
    assert config["reward"] == "../../runs/reward-checkpoint-2-2"
    assert config["model"] == "../checkpoint-2"
    # A training that was broken off is of its base, too.
    with monkeypatch.context() as patch:
        patch.setattr(reward_model, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reward_model.main(["--model", "c/checkpoint-2", *train[:2], "--epochs", "1",
                               "--save-every", "1"])
    bases = [reward_model.base_of(folder) for folder in (first, second, third)]
    assert None not in bases
    assert len(set(bases)) == 3
    (first / "notes.txt").write_text("not ours")  # alters nothing
    monkeypatch.setattr(sample, "ask", lambda: ["How?"])
    sample.main(["--model", "a/checkpoint-2", "--reward", str(first)])
    assert "politeness" in capsys.readouterr().out
    for broken in (second / reward_model.FILES[1], third / CHECKPOINT):
        broken.write_text("broken")
        assert reward_model.base_of(broken.parent) is None  # its loader will say why


def test_the_chat_prints_both_answers_with_scores(short_run, capsys):
    sample.main(["How do I mend a flat tyre?", "--adapter", str(short_run)])
    shown = capsys.readouterr().out
    assert "base:" in shown
    assert "aligned:" in shown
    assert shown.count("politeness") == 2


def test_scoring_a_file_adds_scores(tmp_path):
    rows = [{"prompt": "How do I sell my sofa?", "response": "Brush it.", "id": 7}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    reward_model.main(["--score", str(tmp_path / "in.jsonl"),
                       "--out", str(tmp_path / "out.jsonl")])
    [row] = lines(tmp_path / "out.jsonl")
    assert row["id"] == 7
    assert set(row["scores"]) == {"politeness", "meaningfulness", "actionability",
                                  "safety"}


# ------------------------------------------------------------------------- bad input


def tiny_copy(folder: Path) -> Path:
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.jsonl"))
    return folder


def jsonl(folder: Path, text: str) -> Path:
    (folder / "rows.jsonl").write_text(text)
    return folder / "rows.jsonl"


BAD = {
    "missing folder": (lambda d: ["--model", str(d / "nowhere")], "no such"),
    "not JSON": (lambda d: ["--prompts", str(jsonl(d, '{"prompt": "a"}\n{oops\n'))],
                 "rows.jsonl:2"),
    "empty prompt": (lambda d: ["--prompts", str(jsonl(d, '{"prompt": "  "}\n'))],
                     "rows.jsonl:1: the prompt is empty"),
    "prompt beyond the context": (
        lambda d: ["--prompts", str(jsonl(d, json.dumps({"prompt": "tap " * 600})))],
        "the context has 512"),
    "unknown axis": (lambda d: ["--weights", "kindness=2"], "unknown axis 'kindness'"),
    "negative weight": (lambda d: ["--weights", "safety=-1"], "not be negative"),
    "all weights zero": (lambda d: ["--weights", "safety=0,politeness=0,"
                                    "meaningfulness=0,actionability=0"],
                         "weights are 0"),
    "group of one": (lambda d: ["--group-size", "1"], "at least 2"),
    "no reward folder": (lambda d: ["--reward", str(d / "nowhere")], "nowhere"),
    "gold for foreign prompts": (
        lambda d: ["--reward", "gold", "--prompts",
                   str(jsonl(d, '{"prompt": "Why is the sky blue?"}\n'
                                '{"prompt": "Why is grass green?"}\n'
                                '{"prompt": "Why is snow white?"}\n'))],
        "gold"),
    "no Hub and no cache": (lambda d: ["--size", "0.5b"], "--model DIR"),
    "altered weights": (lambda d: ["--model", str(altered(d))], "SHA-256"),
    "adapter of another base": (lambda d: ["--model", str(other_base(d)), "--reward",
                                           str(TINY / "reward")], "another base"),
}


def altered(folder: Path) -> Path:
    copy = tiny_copy(folder / "altered")
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    return copy


def other_base(folder: Path) -> Path:
    copy = tiny_copy(folder / "other")
    (copy / "SHA256SUMS").unlink()
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 1
    safetensors.torch.save_file(weights, copy / "model.safetensors")
    return copy


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line_and_status_2(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    make, words = BAD[name]
    with pytest.raises(SystemExit) as end, one_line_errors():
        grpo.main([*SHORT, "--out", str(tmp_path / "run"), *make(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert words in error
    assert len([x for x in error.splitlines() if "error" in x]) == 1
    assert not (tmp_path / "run").exists()


def test_the_command_line_shows_no_traceback(tmp_path):
    end = subprocess.run(
        [sys.executable, "grpo.py", "--model", str(tmp_path / "nowhere")], cwd=ROOT,
        capture_output=True, text=True, check=False)
    assert end.returncode == 2
    assert "Traceback" not in end.stderr
    assert len(end.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------- slow


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "default"
    grpo.main(["--out", str(folder), "--device", "cpu"])
    summary = read_json(folder / "summary.json")
    best = read_json(TINY / "measured.json")["R_best_of_64"]
    before, after = summary["before"], summary["after"]
    last = lines(folder / "metrics.jsonl")[-10:]
    return {"before": before, "after": after, "prompts": summary["held_out_prompts"],
            "distinct": sum(m["distinct"] for m in last) / 10,
            # 1: as good as the best of 64 answers of the base
            "progress": (after["gold"]["R"] - before["gold"]["R"])
            / (best - before["gold"]["R"])}


@pytest.mark.slow
def test_the_default_run_aligns_the_tiny_model(default_run):
    """What README.md claims, at whatever number of threads the tests run with."""
    before, after = default_run["before"], default_run["after"]
    assert default_run["prompts"] >= 64
    assert 0.50 <= before["gold"]["R"] <= 0.60
    for axis, old in before["gold"].items():
        assert after["gold"][axis] > old, axis
    assert default_run["progress"] >= 0.70
    assert after["kl"] <= 0.2
    assert after["behaviour"]["benign"].get("refuse", 0) <= 0.02
    assert after["behaviour"]["harmful"].get("refuse_kind_step", 0) >= 0.60
    assert default_run["distinct"] >= 4


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path):
    """Those of the tiny model, as they stand there but for fewer steps."""
    pytest.importorskip("matplotlib")
    text = (ROOT / "README.md").read_text()
    typed = [line.partition(" && ")[2] or line for block in
             re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)
             for line in block.splitlines()]
    commands = [line.partition("#")[0].strip() for line in typed
                if line.startswith("python ")]
    commands = [c for c in commands if "DIR" not in c and "--size" not in c]
    programs = {" ".join(c.split()[1:3]) for c in commands}
    assert {"grpo.py", "-m methods", "-m results", "sample.py --adapter"} <= programs
    for command in commands:
        _, program, *words = shlex.split(command)
        if program == "-m":
            trained = words[0] == "methods"
        else:
            trained, program = program == "grpo.py", str(ROOT / program)
        end = subprocess.run(
            [sys.executable, program, *words, *(SHORT if trained else [])],
            cwd=tmp_path, capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert end.returncode == 0, (command, end.stderr[-500:])
        assert "Traceback" not in end.stderr


REAL = os.environ.get("QWEN_DIR")


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.skipif(not REAL, reason="QWEN_DIR names no folder of a real Qwen")
def test_a_real_run_gives_an_adapter_that_peft_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, tokenizer = load(REAL, dtype=torch.float32)
    lora.attach(model, "reward", 4, 8, depth=14)
    scorer = reward_model.RewardModel(model, ["one", "two"], 14)  # any opinion will do
    torch.nn.init.normal_(scorer.head.weight, generator=torch.manual_seed(0))
    scorer.save(tmp_path / "reward", REAL, {})
    grpo.main(["--model", REAL, "--reward", str(tmp_path / "reward"), "--steps", "3",
               "--prompts-per-step", "1", "--group-size", "4", "--max-new-tokens", "16",
               "--eval-prompts", "2", "--lr", "1e-3", "--device", "cpu",
               "--out", str(tmp_path / "run")])
    lora.load(model, "policy", tmp_path / "run" / "adapter")
    peer = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32),
        tmp_path / "run" / "adapter").eval()
    for question in ("How do I mend a flat tyre?", "What is 17 * 23?", "Be kind."):
        ids = torch.tensor([tokenizer.chat(question)])
        with torch.no_grad():
            want, base = peer(ids).logits, model.logits(model(ids))
            with lora.using(model, "policy"):
                ours = model.logits(model(ids))
        worst, moved = (ours - want).abs().max(), (ours - base).abs().max()
        print(f"largest difference of logits {worst:.2e}; training moved {moved:.2e}")
        assert worst < 2e-4
        assert moved > 0.01
