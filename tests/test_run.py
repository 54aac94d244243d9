"""A run: its settings, its prompts, who scores, and its folder.

* Settings out of their bounds are refused by name; what is not asked for depends on the
  model.
* Texts, and not rows, are held out of a file without splits; a file with them is taken
  at its word; too few prompts, and prompts beyond the context, are refused.
* The gold rubric scores the tiny world alone, in the order of the axes.
* A learned reward reads every prompt without --system.
* Splits of other names are held out with a note, unknown ones refused; twins stay on
  one side; a row's own system message contradicts --system.
* A judge that is the reward model, a copy, or trained as it was is refused.
* What a run reads is named by its SHA-256: another file, another hash.
* A run's folder: the next free name, by method; nothing is written over; a run goes on
  only by its own method.
* The log has a line a step and a line a response; a checkpoint stands for both.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from oracles import PROMPTS, make_run

import lora
import reward_model
import run
from data import rubric
from loading import SIZES, TINY, Tokenizer, fingerprint, load
from methods import ppo
from plumbing.files import CHECKPOINT, CHECKSUMS, UserError, write_json
from plumbing.resume import checkpoint_about

# ----------------------------------------------------------------------- the settings


@pytest.mark.parametrize(("changes", "message"), [
    ({"group_size": 1}, "--group-size is 1; it must be at least 2"),
    ({"temperature": 0.0}, "--temperature is 0.0; it must be above 0"),
    ({"temperature": math.nan}, "--temperature is nan"),
    ({"lr": math.inf}, "--lr is inf"), ({"lr": 0.0}, "--lr is 0.0; it must be above 0"),
    ({"steps": 0}, "--steps is 0; it must be at least 1"),
    ({"prompts_per_step": 0}, "--prompts-per-step is 0"),
    ({"max_new_tokens": -1}, "--max-new-tokens is -1; it must be at least 1"),
    ({"rank": 0}, "--rank is 0"), ({"eval_prompts": 0}, "--eval-prompts is 0"),
    ({"save_every": 0}, "--save-every is 0"),
    ({"seed": -1}, "--seed is -1; it must be at least 0")])
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        run.Settings(**changes).resolved()


def test_resolved_fills_in_what_depends_on_the_model_and_keeps_what_was_asked():
    tiny, large = (run.Settings(size=size).resolved() for size in ("tiny", "7b"))
    assert (tiny.model, large.model) == (SIZES["tiny"], SIZES["7b"])
    differing = [f for f in dataclasses.fields(run.Settings) if "real" in f.metadata]
    assert len(differing) == 7
    for field in differing:
        assert getattr(tiny, field.name) == field.metadata["tiny"], field.name
        assert getattr(large, field.name) == field.metadata["real"], field.name
    assert tiny.device == large.device is not None
    asked = run.Settings(lr=0.5, steps=3, size="7b").resolved()
    assert (asked.lr, asked.steps, asked.rank) == (0.5, 3, large.rank)
    assert run.Settings(model="some/model", size="tiny").resolved().model == \
        "some/model"


# ------------------------------------------------------------------------ the prompts


def prompts_file(folder, rows: list[dict]):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_for(path, **changes) -> run.Settings:
    return run.Settings(**{"prompts": path, "prompts_per_step": 1} | changes).resolved()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY)


def test_a_file_without_splits_holds_out_texts_and_not_rows(tmp_path, tokenizer):
    path = prompts_file(tmp_path, [{"prompt": f"Question {i % 10}?"}
                                   for i in range(20)])
    trained, held_out = run.read_prompts(settings_for(path), tokenizer, 1024)
    # Two texts, each of which stands twice.
    assert (len(trained), len(held_out)) == (16, 4)
    assert not {p.text for p in trained} & {p.text for p in held_out}


def test_a_file_with_splits_is_taken_at_its_word(tmp_path, tokenizer):
    rows = [{"prompt": f"Question {i}?", "split": "train" if i % 3 else "heldout"}
            for i in range(12)]
    path = prompts_file(tmp_path, rows)
    settings = settings_for(path, eval_prompts=3, system="Be brief.", seed=1)
    trained, held_out = run.read_prompts(settings, tokenizer, 1024)
    assert [p.index for p in trained] == [i for i in range(12) if i % 3]
    for prompt in trained + held_out:
        assert prompt.text == rows[prompt.index]["prompt"]
        assert prompt.ids == tokenizer.chat(prompt.text, "Be brief.")
    assert len({p.index for p in held_out}) == 3
    assert all(p.index % 3 == 0 for p in held_out)
    # Seeds differ in training, not in what they are judged on.
    other = run.read_prompts(settings_for(path, eval_prompts=3, system="Be brief."),
                             tokenizer, 1024)
    assert other == (trained, held_out)


@pytest.mark.parametrize("word", ["test", "validation", "val", "dev", " Test "])
def test_a_split_by_another_name_is_held_out_with_one_note(word, tmp_path, tokenizer,
                                                           capsys):
    rows = [{"prompt": f"Question {i}?", "split": ("train", "heldout", word)[i % 3]}
            for i in range(12)]
    path = prompts_file(tmp_path, [*rows, {"prompt": "Why?", "split": None}])
    trained, held_out = run.read_prompts(settings_for(path), tokenizer, 1024)
    assert [p.index for p in trained] == [0, 3, 6, 9, 12]  # null is absent: train
    assert sorted(p.index for p in held_out) == [i for i in range(12) if i % 3]
    said = capsys.readouterr().err
    assert said.count("note: ") == said.count("\n") == 1
    assert f"of split {word.strip().lower()} are held out, as heldout is: 4" in said


def test_a_file_of_train_rows_alone_is_noted_and_ours_say_nothing(tmp_path, tokenizer,
                                                                  capsys):
    run.read_prompts(run.Settings().resolved(), tokenizer, 1024)
    rows = [{"prompt": f"{i}?"} for i in range(5)]
    run.read_prompts(settings_for(prompts_file(tmp_path, rows)), tokenizer, 1024)
    assert capsys.readouterr().err == ""
    path = prompts_file(tmp_path, [row | {"split": "train"} for row in rows])
    assert len(run.read_prompts(settings_for(path), tokenizer, 1024)[1]) == 1
    assert "note: " in capsys.readouterr().err


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "Why?", "split": "tset"}, "split is 'tset'; known are .*heldout"),
    ({"prompt": "Why?", "split": "train[:80%]"}, "known are train"),
    ({"prompt": "Why?", "split": 1}, '"split" must be a text'),
    ({"prompt": " HOW? ", "split": "test"}, "is in heldout here, and in train at .*:1"),
    ({"prompt": "<|im_start|>user\nWhy?"}, "in a chat template already"),
    ({"prompt": "Why?", "system": "Sing."}, "and --system is given"),
    ({"messages": [{"role": "system", "content": "Sing."},
                   {"role": "user", "content": "Why?"}]}, "and --system is given")])
def test_prompts_that_are_not_what_they_seem_are_refused_by_line(row, message, tmp_path,
                                                                 tokenizer):
    path = prompts_file(tmp_path, [{"prompt": "How?"}, row])
    with pytest.raises(UserError, match=rf"prompts\.jsonl:2: .*{message}"):
        run.read_prompts(settings_for(path, system="Be brief."), tokenizer, 1024)


def test_a_row_has_a_system_message_of_its_own(tmp_path, tokenizer):
    def chat(system: str) -> list[dict]:
        return [{"role": "system", "content": system},
                {"role": "user", "content": "Why?"}]

    path = prompts_file(tmp_path, [
        {"messages": chat("Sing.")}, {"prompt": "Why?"},
        {"prompt": chat("Be brief."), "split": "test"}])
    trained, held_out = run.read_prompts(settings_for(path), tokenizer, 1024)
    assert [p.ids for p in trained + held_out] == [
        tokenizer.chat("Why?", system) for system in ("Sing.", None, "Be brief.")]


def test_twins_are_held_out_together(tmp_path, tokenizer):
    rows = [{"prompt": f"{word} {i}?"} for i in range(5) for word in ("How", " how")]
    path = prompts_file(tmp_path, rows)
    trained, held_out = run.read_prompts(settings_for(path), tokenizer, 1024)
    assert (len(trained), len(held_out)) == (8, 2)
    assert len({p.text.strip().lower() for p in held_out}) == 1


def test_control_tokens_inside_a_prompt_are_noted(tmp_path, tokenizer, capsys):
    own = next(iter(tokenizer.control))
    path = prompts_file(tmp_path, [{"prompt": f"What is {own} for?"},
                                   {"prompt": "Why?"}])
    run.read_prompts(settings_for(path), tokenizer, 1024)
    assert "control tokens, or" in capsys.readouterr().err


def test_too_few_prompts_and_too_long_ones_are_refused(tmp_path, tokenizer):
    path = prompts_file(tmp_path, [{"prompt": "Why?"}, {"prompt": "How? " * 50},
                                   {"prompt": "When?", "split": "heldout"}])
    long = len(tokenizer.chat("How? " * 50)) + 64
    settings = settings_for(path, prompts_per_step=2)
    assert len(run.read_prompts(settings, tokenizer, long)[0]) == 2
    with pytest.raises(UserError, match=rf"prompts\.jsonl:2: the prompt needs "
                       f"{long} tokens with its answer, the context has {long - 1}"):
        run.read_prompts(settings, tokenizer, long - 1)
    with pytest.raises(UserError, match="2 prompts to train on; --prompts-per-step "
                       "asks for 3"):
        run.read_prompts(settings_for(path, prompts_per_step=3), tokenizer, 1024)


# ------------------------------------------------------------------------ the scorers


def world_prompts(tokenizer) -> list[run.Prompt]:
    return run.read_prompts(run.Settings().resolved(), tokenizer, 512)[0]


def test_the_gold_rubric_follows_the_order_of_the_axes(tokenizer):
    prompts, axes = world_prompts(tokenizer), list(rubric.AXES)
    # One with marks that differ, whatever their order.
    answers = ["Of course! First brush it, then rinse it.", "No.", "I will not help."]
    rows = [tokenizer.encode(answer) for answer in answers]
    gold = run.gold_scorer(tokenizer, prompts, axes)
    reverse = run.gold_scorer(tokenizer, prompts, axes[::-1])
    for prompt in prompts[:8]:
        marks = gold(prompt, rows)
        assert marks.shape == (3, 4)
        wanted = [[rubric.score(prompt.text, a)[axis] for axis in axes]
                  for a in answers]
        torch.testing.assert_close(marks, torch.tensor(wanted))
        assert reverse(prompt, rows).tolist() == marks.flip(1).tolist()
        assert marks.flip(1).tolist() != marks.tolist()
    assert run.gold_scorer(tokenizer, prompts, [*axes, "brevity"]) is None
    assert run.gold_scorer(tokenizer, prompts, axes[:3]) is None


def test_the_gold_rubric_scores_no_other_prompts(tokenizer):
    prompts = world_prompts(tokenizer)[:3]
    foreign = run.Prompt("Why is the sky blue?", [1], 3)
    assert run.gold_scorer(tokenizer, prompts, list(rubric.AXES)) is not None
    assert run.gold_scorer(tokenizer, [*prompts, foreign], list(rubric.AXES)) is None


def test_a_learned_reward_reads_the_prompt_without_the_system_message(tokenizer):
    class Scorer:
        def score(self, prompt, responses):
            return prompt, responses

    score = run.learned_scorer(Scorer(), tokenizer)
    prompt = run.Prompt("Why?", tokenizer.chat("Why?", "Be brief."), 0)
    assert score(prompt, [[5]]) == (tokenizer.chat("Why?"), [[5]])
    assert prompt.ids != tokenizer.chat("Why?")


def other_judge(folder, **changes):
    """The bundled reward model with another head, which says `changes` of itself."""
    shutil.copytree(TINY / "reward", folder)
    path = folder / "head.safetensors"
    head = safetensors.torch.load_file(path)
    safetensors.torch.save_file(head | {"bias": head["bias"] + 1}, path)
    about = json.loads((folder / "reward.json").read_text())
    about["report"]["settings"] |= {k: v for k, v in changes.items() if k != "labels"}
    about["report"] |= {k: v for k, v in changes.items() if k == "labels"}
    (folder / "reward.json").write_text(json.dumps(about))
    return folder


def test_the_reward_model_is_not_its_own_judge(tmp_path, monkeypatch, capsys):
    reward = other_judge(tmp_path / "reward", labels="a")
    (tmp_path / "link").symlink_to(reward)
    shutil.copytree(reward, tmp_path / "copy")
    (tmp_path / "copy" / "reward.json").write_text("{}\n")  # it says nothing of itself
    monkeypatch.chdir(tmp_path)

    def judged_by(judge, reward=reward) -> str:
        run.require_another_judge(run.Settings(judge=judge), reward)
        return capsys.readouterr().err

    for own in (reward, tmp_path / "link", Path("reward"), tmp_path / "x/../reward"):
        with pytest.raises(UserError, match="is the reward model itself"):
            judged_by(own)
    with pytest.raises(UserError, match="is a copy of the reward model"):
        judged_by(tmp_path / "copy")
    shutil.copytree(reward, tmp_path / "wider")
    same = other_judge(tmp_path / "same", labels="a", rank=4)
    path = same / "head.safetensors"
    head = safetensors.torch.load_file(path)
    safetensors.torch.save_file(head | {"bias": head["bias"] + 1}, path)
    with pytest.raises(UserError, match="the same labels, split and seed"):
        judged_by(same)
    with pytest.raises(UserError, match="the same labels, split and seed"):
        judged_by(same, TINY / "reward")  # which tells the number of its rows alone
    assert "no independent judge" in judged_by(
        other_judge(tmp_path / "seed", labels="a", seed=1, rank=2), same)
    assert judged_by(other_judge(tmp_path / "b", labels="b"), same) == ""
    assert judged_by(other_judge(tmp_path / "j", labels="a", split="judge"), same) == ""
    assert judged_by(None) == ""


def test_a_judge_that_is_the_reward_model_starts_no_run(tmp_path):
    settings = run.Settings(judge=TINY / "reward", out=tmp_path / "run").resolved()
    with pytest.raises(UserError, match="--judge needs a reward model of its own"):
        run.prepare(settings, "grpo")


# ------------------------------------------------------------------------- the inputs


def test_a_folder_called_gold_is_not_the_rubric(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gold").mkdir()
    model, _ = load(TINY)
    inputs = run.identify(run.Settings(reward="gold").resolved(), model)
    assert "reward model" not in inputs


def test_another_input_has_another_hash(tmp_path):
    model, _ = load(TINY)
    reward, path = tmp_path / "reward", prompts_file(tmp_path, [{"prompt": "Why?"}])
    shutil.copytree(TINY / "reward", reward)

    def inputs() -> dict[str, str]:
        return run.identify(settings_for(path, reward=str(reward), judge=reward), model)

    first = inputs()
    assert first.keys() == {"base", "prompts", "reward model", "judge"}
    assert first["base"] == fingerprint(model)
    assert first["prompts"] == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_text(path.read_text() + "\n")
    second = inputs()
    assert {k for k in first if first[k] != second[k]} == {"prompts"}
    for name in reward_model.FILES:
        content = (reward / name).read_bytes()
        (reward / name).write_bytes(content + b" ")
        third = inputs()
        assert {k for k in second if second[k] != third[k]} == {"reward model", "judge"}
        (reward / name).write_bytes(content)
    assert inputs() == second


# ------------------------------------------------------------------------- the folder


def test_a_run_takes_the_next_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = run.Settings().resolved()
    for names in (("tiny", "tiny-2", "tiny-3"), ("ppo-tiny", "ppo-tiny-2")):
        for name in names:
            method = "ppo" if name.startswith("ppo") else "grpo"
            folder = run.free_folder(settings, method)
            assert str(folder) == f"runs/{name}"
            folder.mkdir(parents=True)
    large = run.Settings(size="7b").resolved()
    assert str(run.free_folder(large, "grpo")) == "runs/qwen2.5-7b-instruct"


@pytest.mark.parametrize("name", [run.CONFIG, *run.LINES, CHECKPOINT, run.BEFORE])
def test_nothing_of_a_run_is_written_over(name, tmp_path):
    settings = run.Settings(out=tmp_path).resolved()
    (tmp_path / "notes.txt").touch()  # somebody's own file is no run
    run.require_empty(settings, tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="holds a run already"):
        run.require_empty(settings, tmp_path)


def test_a_run_goes_on_by_its_own_method(tmp_path):
    made = dataclasses.replace(make_run(ppo.Settings), folder=tmp_path, method="ppo")
    write_json(tmp_path / run.CONFIG, run.config_of(made))
    resume = ["--resume", str(tmp_path)]
    settings = run.settings_of(ppo.Settings, tmp_path, resume, "ppo")
    assert settings == dataclasses.replace(made.settings, resume=tmp_path, out=tmp_path)
    with pytest.raises(UserError, match="is a run of 'ppo', not of grpo; go on with: "
                       "python -m methods ppo --resume"):
        run.settings_of(run.Settings, tmp_path, resume, "grpo")
    made.method = "grpo"
    write_json(tmp_path / run.CONFIG, run.config_of(made))
    with pytest.raises(UserError, match="is a run of 'grpo', not of ppo; go on with: "
                       r"python grpo\.py --resume"):
        run.settings_of(ppo.Settings, tmp_path, resume, "ppo")


def test_what_is_left_in_a_finished_folder_is_swept_up(tmp_path):
    run.require_unfinished(tmp_path)
    for name in (CHECKSUMS, CHECKPOINT, run.BEFORE, "summary.json"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="finished already"):
        run.require_unfinished(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CHECKSUMS, "summary.json"}


# ---------------------------------------------------------------------------- the log


def test_the_log_has_a_line_a_step_and_a_line_a_response(tmp_path):
    run_ = make_run(save_every=2)
    run_.folder = tmp_path
    write_json(tmp_path / run.CONFIG, {})
    policy = lora.parameters(run_.model, "policy")
    optimizer = torch.optim.AdamW([{"params": policy, "peak": 1e-3}])

    def metrics(step: int) -> dict:
        return {"step": step, "loss": step / 8}

    def samples(step: int) -> list[dict]:
        return [{"step": step, "prompt": p.text, "response": "é\u2028"}
                for p in PROMPTS]

    def written() -> list[list[dict]]:
        files = [(tmp_path / name).read_bytes() for name in run.LINES]
        return [[json.loads(line) for line in file.split(b"\n")[:-1]]
                for file in files]

    with run.Log(run_, 5, optimizer, policy) as log:
        assert log.done == 0
        for step in (1, 2, 3):
            assert log.write(metrics(step), samples(step))
    assert run_.trained == sum(p.numel() for p in policy)
    assert written() == [[metrics(s) for s in (1, 2, 3)],
                         [line for s in (1, 2, 3) for line in samples(s)]]
    about = checkpoint_about(tmp_path / CHECKPOINT)
    assert (about["step"], about["lines"]) == (2, [2, 6])
    # Step 3 came after the checkpoint: it is cut off, and done again.
    with run.Log(run_, 5, optimizer, policy) as log:
        assert log.done == 2
        assert written() == [[metrics(1), metrics(2)], samples(1) + samples(2)]
        for step in (3, 4, 5):
            assert log.write(metrics(step), samples(step))
    assert written() == [[metrics(s) for s in range(1, 6)],
                         [line for s in range(1, 6) for line in samples(s)]]
    assert checkpoint_about(tmp_path / CHECKPOINT)["step"] == 5  # the last one


def test_a_summary_says_where_its_figures_come_from(tmp_path, capsys):
    run_ = make_run()
    run_.folder = tmp_path
    lines = [{"seconds": 1.5, "tokens": 10, "trained_tokens": 7},
             {"seconds": 2.5, "tokens": 11, "trained_tokens": 8}]
    (tmp_path / run.LINES[0]).write_text("".join(json.dumps(m) + "\n" for m in lines))
    for name in (run.CONFIG, run.LINES[1], CHECKPOINT, run.BEFORE):
        (tmp_path / name).touch()
    figures = [{"reward_model": {"a": r, "b": 0.5, "R": r}, "kl": r, "length": 9,
                "base_perplexity": 2.0, "distinct_3_grams": 1.0} for r in (0.25, 0.75)]
    answers = [["no", "maybe", "so"], ["yes", "indeed", "thus"]]
    run.finish(run_, PROMPTS, (figures[0], answers[0]), (figures[1], answers[1]))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["before"], summary["after"]) == tuple(figures)
    assert summary["training_seconds"] == 4
    assert (summary["sampled_tokens"], summary["trained_tokens"]) == (21, 15)
    assert summary["answers"] == [
        {"prompt": p.text, "before": old, "after": new}
        for p, old, new in zip(PROMPTS, *answers, strict=True)]
    assert {p.name for p in tmp_path.iterdir()} == {
        run.CONFIG, *run.LINES, "summary.json", CHECKSUMS}
    printed = capsys.readouterr().out
    assert "reward_model a" in printed
    assert "+0.500" in printed
    assert all(prompt.text in printed for prompt in PROMPTS)
