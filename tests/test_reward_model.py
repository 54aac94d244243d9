"""Claims about reward_model.py.

* [E1] The loss is the mean cross-entropy over labelled axes alone; its gradient is that
  of a naive reference with repeated prompts, however the rows are grouped.
* A row's score is its own: neither its neighbours nor its padding enter, and the head
  reads the lower layers' output over the response, at its last token and on average.
* The head starts at the ridge regression on the base's features.
* What is saved loads with identical scores; altered, foreign and broken files do not.
* Error and calibration are what their definitions say.
* Test prompts never leak into training; only a cut-off row lacks its end token.
* Training fits a small separable task and leaves the base as it was.
* The command line trains, scores a file, and refuses a bad row by file and line, and a
  setting by name; defaults depend on the model.
"""

import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch

import loading
import lora
import reward_model
from model import Config, Qwen
from plumbing.files import UserError, file_sha256, write_checksums
from reward_model import Group, RewardModel

AXES = ["politeness", "safety", "actionability"]
CONFIG = Config(
    model_type="qwen2", vocab_size=24, hidden_size=16, intermediate_size=24,
    num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e4,
    tie_word_embeddings=True)
NAN = math.nan
DEPTH = 2  # of three layers


def tiny_base(seed: int = 0) -> Qwen:
    """Random float64 weights, wide enough that every path carries signal."""
    generator = torch.Generator().manual_seed(seed)
    base = Qwen(CONFIG).double()
    with torch.no_grad():
        for name, weight in sorted(base.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            norm = name.endswith("norm.weight")
            weight.copy_(1 + 0.2 * noise if norm else 0.4 * noise)
    return base.requires_grad_(False)


def untrained(axes: list[str], rank: int = 3) -> RewardModel:
    base = tiny_base()
    lora.attach(base, "reward", rank, 2 * rank, depth=DEPTH)
    return RewardModel(base, axes, DEPTH)


def tiny_scorer() -> RewardModel:
    """A reward model whose head, features' scale and B are random too."""
    scorer = untrained(AXES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in [*scorer.parameters(), scorer.center, scorer.spread]:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator,
                                           dtype=weight.dtype))
        scorer.spread.abs_().add_(0.5)
    return scorer


class StubTokenizer:
    """A word is a number; 2 is <|im_end|>."""

    stop_ids = (2, 3)
    control = {"<|im_end|>": 3}  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    encode_response = encode

    def chat(self, prompt: str) -> list[int]:
        return [1, *self.encode(prompt), 4]


PROMPT = [1, 7, 9, 11, 4]
RESPONSES = [[5, 6, 3], [8], [9, 9, 12, 13, 6, 10, 3], [14, 3]]
LABELS = torch.tensor([[0.9, NAN, 0.1], [NAN, 0.2, NAN], [0.3, 0.4, 0.5],
                       [1.0, 0.0, NAN]])
GROUPS = [Group(PROMPT, RESPONSES, LABELS),
          Group([1, 15, 4], [[6, 3], [7, 8, 9]],
                torch.tensor([[0.5, 0.6, NAN], [NAN, NAN, 0.7]]))]


def naive_features(scorer: RewardModel, prompt: list[int], response: list[int]):
    """Oracle: the whole conversation in one row, nothing shared, nothing padded."""
    seen, base = [], scorer.model
    hook = base.model.layers[DEPTH - 1].register_forward_hook(
        lambda block, given, out: seen.append(out[0]))
    with lora.using(base, scorer.name):
        base(torch.tensor([prompt + response]))
    hook.remove()
    hidden = base.model.norm(seen[0])[len(prompt):]  # (C, D)
    return torch.cat([hidden[-1], hidden.sum(0) / len(response)])


def naive_score(scorer: RewardModel, prompt: list[int], response: list[int]):
    z = (naive_features(scorer, prompt, response) - scorer.center) / scorer.spread
    logits = (scorer.head.weight * z).sum(-1) + scorer.head.bias
    return 1 / (1 + (-logits).exp())


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


# -------------------------------------------------------------------- [E1] the loss


def cross_entropy(score, label):
    return -(label * score.log() + (1 - label) * (1 - score).log())


def test_loss_is_the_cross_entropy_over_labelled_axes_only():
    scores = torch.tensor([[0.5, 0.25], [0.75, 0.9]])
    labels = torch.tensor([[1.0, NAN], [0.25, 0.4]])
    wanted = sum(cross_entropy(scores[i], labels[i])
                 for i in ((0, 0), (1, 0), (1, 1))).item()
    loss = reward_model.regression_loss
    assert loss(scores.logit(), labels).item() == pytest.approx(wanted)
    assert loss(scores, torch.full((2, 2), NAN)).item() == 0


def test_gradient_equals_the_naive_reference_however_rows_are_grouped():
    scorer = tiny_scorer()
    errors = []
    for group in GROUPS:
        for response, labels in zip(group.responses, group.labels, strict=True):
            score = naive_score(scorer, group.prompt, response)
            errors += [cross_entropy(score[k], labels[k].double())
                       for k in range(3) if not labels[k].isnan()]
    assert len(errors) == 11
    loss = sum(errors) / len(errors)
    wanted = flat(torch.autograd.grad(loss, scorer.parameters()))
    alone = [Group(g.prompt, [r], labels[None]) for g in GROUPS
             for r, labels in zip(g.responses, g.labels, strict=True)]
    for batch in (GROUPS, GROUPS[::-1], alone):
        with lora.using(scorer.model, "reward"):
            assert reward_model.train_step(scorer, batch) == pytest.approx(
                loss.item(), rel=1e-12)
        gradient = flat(p.grad for p in scorer.parameters())
        assert (gradient - wanted).norm() < 1e-12 * wanted.norm()
        for p in scorer.parameters():
            p.grad = None


def test_a_loss_that_is_not_finite_is_refused():
    scorer = tiny_scorer()
    with torch.no_grad():
        scorer.head.bias[0] = NAN
    with pytest.raises(UserError, match="not finite"), \
            lora.using(scorer.model, "reward"):
        reward_model.train_step(scorer, GROUPS)


# ------------------------------------------------------------------------ the scores


def test_scores_equal_the_naive_reference_alone_and_in_a_group():
    scorer = tiny_scorer()
    together = scorer.score(PROMPT, RESPONSES)
    assert together.shape == (4, 3)
    assert ((together > 0) & (together < 1)).all()
    assert together.std(0).min() > 0.01  # rows that agreed would prove nothing
    for row, response in enumerate(RESPONSES):
        with torch.no_grad():
            naive = naive_score(scorer, PROMPT, response)
        assert (together[row] - naive).abs().max() < 1e-12
        assert (scorer.score(PROMPT, [response])[0] - naive).abs().max() < 1e-12


def test_what_stands_behind_a_response_does_not_enter_its_score(monkeypatch):
    scorer = tiny_scorer()
    wanted = scorer.score(PROMPT, RESPONSES)

    def pad_with_garbage(rows, device):
        longest = 3 + max(map(len, rows))
        return torch.tensor([r + [20 - len(r)] * (longest - len(r)) for r in rows])

    monkeypatch.setattr(reward_model, "pad_rows", pad_with_garbage)
    assert (scorer.score(PROMPT, RESPONSES) - wanted).abs().max() < 1e-12


def test_every_token_of_prompt_and_response_enters_the_score():
    scorer = tiny_scorer()
    wanted = scorer.score(PROMPT, [[5, 6, 3]])
    others = [[8, 6, 3], [5, 8, 3], [5, 6, 2], [5, 6]]  # the last one was cut off
    for other in others:
        assert (scorer.score(PROMPT, [other]) - wanted).abs().max() > 1e-4
    for place in range(len(PROMPT)):
        prompt = PROMPT[:place] + [16] + PROMPT[place + 1:]
        assert (scorer.score(prompt, [[5, 6, 3]]) - wanted).abs().max() > 1e-4


def test_scoring_speaks_as_the_reward_model_and_steps_back():
    scorer = tiny_scorer()
    lora.attach(scorer.model, "policy", rank=2, alpha=4, seed=3)
    with torch.no_grad():
        for layer in lora.layers(scorer.model, "policy").values():
            layer.lora_B["policy"].fill_(0.1)
    wanted = scorer.score(PROMPT, RESPONSES)
    with lora.using(scorer.model, "policy"):
        assert torch.equal(scorer.score(PROMPT, RESPONSES), wanted)
        assert scorer.model.active.name == "policy"


def test_an_untrained_head_gives_one_answer_for_all():
    scores = untrained(AXES).score(PROMPT, RESPONSES)
    assert (scores == scores[0]).all()


def test_the_head_starts_at_the_ridge_regression_on_the_bases_features():
    scorer = untrained(AXES)
    reward_model.fit_head(scorer, GROUPS)
    with torch.no_grad():
        raw = torch.stack([naive_features(scorer, g.prompt, r)
                           for g in GROUPS for r in g.responses])
    z = ((raw - raw.mean(0)) / (raw.std(0, correction=0) + 1e-3)).numpy()  # (6, 2D)
    labels = torch.cat([g.labels for g in GROUPS]).double().numpy()
    width = z.shape[1]
    for k in range(3):
        known = ~np.isnan(labels[:, k])
        y = labels[known, k]
        # λ |w|² as further rows of ordinary least squares
        rows = np.vstack([z[known], math.sqrt(width) * np.eye(width)])
        w = np.linalg.lstsq(rows, np.r_[y - y.mean(), np.zeros(width)], rcond=None)[0]
        slope = y.mean() * (1 - y.mean())
        assert scorer.head.weight[k].tolist() == pytest.approx(w / slope, abs=1e-9)
        assert scorer.head.bias[k].sigmoid().item() == pytest.approx(y.mean())
    for group in GROUPS:
        for response, score in zip(group.responses, scorer.score(
                group.prompt, group.responses), strict=True):
            naive = naive_score(scorer, group.prompt, response)
            assert (score - naive).abs().max() < 1e-12


# ------------------------------------------------------------------------- the files


@pytest.fixture
def saved(tmp_path):
    """A saved reward model's folder, and the scores it must give again."""
    scorer = tiny_scorer()
    scorer.save(tmp_path / "reward", "the tiny base", {"note": 1})
    return tmp_path / "reward", scorer.score(PROMPT, RESPONSES)


def test_a_saved_reward_model_gives_identical_scores(saved):
    folder, wanted = saved
    scorer = reward_model.load(tiny_base(), folder)
    assert scorer.axes == AXES
    assert torch.equal(scorer.score(PROMPT, RESPONSES), wanted)
    assert not any(p.requires_grad for p in scorer.parameters())  # GRPO trains others
    assert json.loads((folder / "reward.json").read_text())["report"] == {"note": 1}


def rewrite_head(folder, **tensors: torch.Tensor) -> None:
    safetensors.torch.save_file(tensors, folder / "head.safetensors")
    write_checksums(folder, reward_model.FILES)


def test_an_altered_file_is_refused(saved):
    folder, _ = saved
    for name in ("head.safetensors", "reward.json", "adapter_model.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} is not the file.*SHA-256"):
            reward_model.load(tiny_base(), folder)
        (folder / name).write_bytes(whole)
    reward_model.load(tiny_base(), folder)  # mended


def test_a_missing_head_is_refused(saved):
    folder, _ = saved
    (folder / "head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head\.safetensors"):
        reward_model.load(tiny_base(), folder)


@pytest.mark.parametrize("axes", [AXES[:2], [*AXES, "wit"], [], "safety", [1, 2, 3]])
def test_axes_that_do_not_fit_the_head_are_refused(saved, axes):
    folder, _ = saved
    (folder / "reward.json").write_text(json.dumps({"axes": axes, "depth": DEPTH}))
    write_checksums(folder, reward_model.FILES)
    with pytest.raises(UserError, match=r"expected \{|must name the axes"):
        reward_model.load(tiny_base(), folder)


@pytest.mark.parametrize("depth", [0, 4, 1.5, None])
def test_a_depth_that_the_base_has_not_is_refused(saved, depth):
    folder, _ = saved
    (folder / "reward.json").write_text(json.dumps({"axes": AXES, "depth": depth}))
    write_checksums(folder, reward_model.FILES)
    with pytest.raises(UserError, match=r"depth is .* from 1 to 3"):
        reward_model.load(tiny_base(), folder)


HEAD = {"weight": torch.zeros(3, 32), "bias": torch.zeros(3),
        "center": torch.zeros(32), "spread": torch.ones(32)}


@pytest.mark.parametrize(("changes", "message"), [
    ({"bias": torch.tensor([0, NAN, 0])}, "not finite"),
    ({"spread": None}, "expected"), ({"center": torch.zeros(16)}, "expected"),
    ({"weight": torch.zeros(3, 16)}, "expected")])
def test_a_broken_head_is_refused(saved, changes, message):
    folder, _ = saved
    rewrite_head(folder, **{k: v for k, v in (HEAD | changes).items() if v is not None})
    with pytest.raises(UserError, match=f"head.safetensors.*{message}"):
        reward_model.load(tiny_base(), folder)


def test_another_base_is_refused(saved):
    with pytest.raises(UserError, match="another base"):
        reward_model.load(tiny_base(seed=7), saved[0])


# --------------------------------------------------------------------- the judgement


class Oracle:
    """A scorer that says what a test wrote down: one row of scores a response."""

    def __init__(self, axes: list[str], scores: list[list[float]]) -> None:
        self.axes, self.scores = axes, torch.tensor(scores)

    def score(self, prompt: list[int], responses: list[list[int]]) -> torch.Tensor:
        return self.scores[[r[0] for r in responses]]


def test_judgement_by_hand():
    scorer = Oracle(["wit", "care", "none"], [
        [0.05, 0.5, 0.5], [0.15, 0.5, 0.5], [0.45, 0.5, 0.5], [1.0, 0.5, 0.5]])
    labels = torch.tensor([[0.0, 0.2, NAN], [0.4, NAN, NAN], [0.2, 0.8, NAN],
                           [0.8, 0.4, NAN]])
    report = reward_model.evaluate(scorer, [Group([1], [[0], [1]], labels[:2]),
                                            Group([2], [[2], [3]], labels[2:])])
    assert list(report) == ["wit", "care"]  # nobody labelled "none"
    wit, care = report["wit"], report["care"]
    assert (wit["rows"], care["rows"]) == (4, 3)
    assert wit["mae"] == pytest.approx((0.05 + 0.25 + 0.25 + 0.2) / 4)
    assert wit["mae_of_mean"] == pytest.approx((0.35 + 0.05 + 0.15 + 0.45) / 4)
    assert care["mae_of_mean"] == pytest.approx(2 / 9)  # the mean is 1.4 / 3
    assert wit["spearman"] == pytest.approx(0.8)  # ranks 0 1 2 3 against 0 2 1 3
    assert care["spearman"] == care["pearson"] == 0
    assert [n for n, *_ in wit["calibration"]] == [2, 1, 1]  # 1.0 is in the last bin
    assert wit["calibration"][0] == [2, pytest.approx(0.1), pytest.approx(0.2)]
    assert wit["calibration"][2] == [1, pytest.approx(1.0), pytest.approx(0.8)]
    assert care["calibration"] == [[3, 0.5, pytest.approx(1.4 / 3)]]


def test_calibration_bins_hold_every_row_once():
    random = torch.Generator().manual_seed(0)
    scores = torch.rand(60, 1, generator=random)
    group = Group([1], [[i] for i in range(60)], torch.rand(60, 1, generator=random))
    report = reward_model.evaluate(Oracle(["wit"], scores.tolist()), [group])["wit"]
    bins = report["calibration"]
    assert sum(n for n, *_ in bins) == report["rows"] == 60
    assert len(bins) == 5
    for index, (_, predicted, _) in enumerate(bins):
        assert index / 5 <= predicted <= (index + 1) / 5
    for column, values in ((1, scores), (2, group.labels)):
        mean = sum(b[0] * b[column] for b in bins) / 60
        assert mean == pytest.approx(values.mean().item(), rel=1e-5)


# -------------------------------------------------------------------------- the data


@pytest.mark.parametrize("seed", [0, 1])
def test_no_prompt_is_in_training_and_test(seed):
    rows = [{"prompt": f"p{i % 10}", "number": i} for i in range(40)]
    known, held = reward_model.split_rows(rows, "train", seed)
    assert {r["prompt"] for r in known}.isdisjoint(r["prompt"] for r in held)
    assert sorted(r["number"] for r in known + held) == list(range(40))
    assert len({r["prompt"] for r in held}) == 2  # a fifth
    assert reward_model.split_rows(rows, "train", seed) == (known, held)
    assert reward_model.split_rows(rows, "train", seed + 2)[1] != held
    with pytest.raises(UserError, match=r'--split judge: no row .* has a "split"'):
        reward_model.split_rows(rows, "judge", seed)


def test_a_split_that_the_file_states_is_kept():
    rows = [{"prompt": "a", "split": "test"}, {"prompt": "b", "split": "train"},
            {"prompt": "c"}, {"prompt": "d", "split": "judge"}]
    assert reward_model.split_rows(rows, "train", 0) == (rows[1:3], rows[:1])
    # A judge's prompts are its own; the test prompts are everybody's.
    assert reward_model.split_rows(rows, "judge", 0) == (rows[3:], rows[:1])


def test_a_split_is_any_word_and_null_is_train(tmp_path):
    rows = [{"prompt": "a", "split": " Test"}, {"prompt": "b", "split": None},
            {"prompt": "c"}, {"prompt": "d", "split": "Dev"}]
    assert reward_model.split_rows(rows, "train", 0) == (rows[1:3], rows[:1])
    assert reward_model.split_rows(rows, "DEV", 0) == (rows[3:], rows[:1])


def test_a_prompt_in_two_splits_is_refused():
    for split in ("test", "judge"):
        rows = [{"prompt": "a", "split": "test"}, {"prompt": "b", "split": "train"},
                {"prompt": " B", "split": split}]
        with pytest.raises(UserError, match=f"is in {split} here, and in train at"):
            reward_model.split_rows(rows, "train", 0)


def test_twins_are_held_out_together():
    rows = [{"prompt": f"{word} {i}?"} for i in range(5) for word in ("How", " how")]
    known, held = reward_model.hold_out(rows, 0.2, 0)
    assert (len(known), len(held)) == (8, 2)
    assert len({r["prompt"].strip().lower() for r in held}) == 1


def test_training_on_the_test_rows_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(reward_model, "load_base", None)
    for word in ("test", " Test"):
        with pytest.raises(UserError, match="train on the rows that it is tested on"):
            reward_model.main(["--split", word])


LABEL = {"prompt": "How?", "response": "So.", "scores": {"good": 1}}
TESTED = LABEL | {"prompt": "Why?", "split": "test"}


def read(tmp_path, *rows: dict, **changes) -> tuple:
    write_jsonl(tmp_path / "in.jsonl", rows)
    settings = reward_model.Settings(validation=0.0, **changes)
    return reward_model.read_labels(tmp_path / "in.jsonl", settings,
                                    loading.Tokenizer(loading.TINY))


def test_rows_of_a_split_that_nobody_names_are_counted(tmp_path, capsys):
    other = [LABEL | {"prompt": f"{i}?", "split": ("dev", "judge")[i % 2]}
             for i in range(5)]
    assert read(tmp_path, LABEL, TESTED, *other) == ([LABEL], [], [TESTED])
    said = capsys.readouterr().err
    assert said.count("note: ") == said.count("\n") == 1
    assert "names their split: 3 of dev, 2 of judge" in said
    read(tmp_path, LABEL, TESTED)
    read(tmp_path, *(LABEL | {"prompt": f"{i}?"} for i in range(5)))
    assert capsys.readouterr().err == ""


def test_null_scores_are_left_out_and_an_axis_that_cannot_be_learnt_is_noted(
        tmp_path, capsys):
    null = LABEL | {"scores": {"good": 1, "odd": None}}
    assert read(tmp_path, null, TESTED)[0] == [LABEL]
    assert capsys.readouterr().err == ""
    read(tmp_path, null, TESTED | {"scores": {"odd": 0}})
    assert "no row to train on labels odd" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"in\.jsonl:2: axis 'Good' is 'good' in other"):
        read(tmp_path, LABEL, TESTED | {"scores": {"Good": 0}})


def test_system_messages_of_labels_are_noted(tmp_path, capsys):
    chat = {"messages": [{"role": role, "content": role} for role in (
        "system", "user", "assistant")], "scores": {"good": 1}}
    ((row,), _, _) = read(tmp_path, chat, TESTED)
    assert (row["prompt"], row["response"]) == ("user", "assistant")
    assert "rows that have one: 1" in capsys.readouterr().err


@pytest.mark.parametrize(("row", "message"), [
    (LABEL | {"prompt": "<|im_start|>user\nHow?"}, "in a chat template already"),
    (LABEL | {"response": "So.<|im_end|>"}, "in a chat template already"),
    (LABEL | {"cut": "false"}, '"cut" is "false"'),
    (LABEL | {"prompt": "why?"}, "is in train here, and in test at"),
    ({"prompt": "How?", "completion": "So."}, 'rename "completion"')])
def test_labels_that_are_not_what_they_seem_are_refused_by_line(row, message, tmp_path):
    with pytest.raises(UserError, match=rf"in\.jsonl:2: .*{message}"):
        read(tmp_path, TESTED, row)


def test_only_a_cut_off_response_lacks_its_end_token():
    stub, encode = StubTokenizer(), reward_model.encode_response
    assert encode(stub, "5 6", cut=False) == [5, 6, 3]  # <|im_end|>, not the other stop
    assert encode(stub, "5 6", cut=True) == [5, 6]
    assert encode(stub, "", cut=False) == [3]
    assert len(encode(stub, "", cut=True)) == 1  # there must be something to score
    stub.control = {}
    assert encode(stub, "5", cut=False) == [5, 2]  # a checkpoint with other stops
    # `<think>` is a word of an answer, with an id of its own, and none of a prompt.
    stub.encode_response = lambda text: [7]
    assert encode(stub, "5", cut=True) == [7]


def test_rows_are_gathered_by_prompt_and_unlabelled_axes_are_nan():
    rows = [{"prompt": "5", "response": "6", "scores": {"safety": 1}},
            {"prompt": "7", "response": "8", "scores": {"politeness": 0.5}},
            {"prompt": "5", "response": "9", "cut": True,
             "scores": {"safety": 0, "politeness": 0.25}}]
    first, second = reward_model.make_groups(rows, ["politeness", "safety"],
                                             StubTokenizer())
    assert (first.prompt, second.prompt) == ([1, 5, 4], [1, 7, 4])
    assert first.responses == [[6, 3], [9]]
    assert second.responses == [[8, 3]]
    wanted = torch.tensor([[NAN, 1], [0.25, 0]])
    torch.testing.assert_close(first.labels, wanted, equal_nan=True)
    torch.testing.assert_close(second.labels, torch.tensor([[0.5, NAN]]),
                               equal_nan=True)


# ---------------------------------------------------------------------- the training


def separable(count: int, seed: int) -> list[Group]:
    """Axis 0: does the response begin with 5? Axis 1: was it ended?"""
    random, groups = np.random.default_rng(seed), []
    for _ in range(count):
        responses = [[first, *random.integers(8, 12, size=2).tolist(), *end]
                     for first in (5, 6) for end in ([3], [])]
        labels = torch.tensor([[r[0] == 5, r[-1] == 3] for r in responses]).float()
        prompt = [1, *random.integers(8, 20, size=2).tolist()]
        groups.append(Group(prompt, responses, labels))
    return groups


def test_training_fits_a_separable_task_and_leaves_the_base_alone():
    scorer = untrained(["five", "ended"], rank=4)
    base = scorer.model
    torch.nn.init.zeros_(scorer.head.bias)
    before = {name: w.clone() for name, w in loading.base_parameters(base).items()}
    settings = reward_model.Settings(epochs=8, prompts_per_step=8, lr=3e-2)
    losses, tried = reward_model.train(
        scorer, separable(48, seed=0), separable(4, seed=2), settings)
    assert len(losses) == 8 * 6
    assert len(tried) == 1 + 8  # one judgement before, and one an epoch
    assert tried[0] == 0  # the head was at zero: one answer for all
    assert tried[-1] > 0.8
    assert np.mean(losses[:3]) > 0.6  # guessing 0.5 costs log 2
    assert np.mean(losses[-6:]) < 0.15
    # prompts it never saw
    report = reward_model.evaluate(scorer, separable(12, seed=1))
    assert min(r["pearson"] for r in report.values()) > 0.8
    for name, weight in loading.base_parameters(base).items():
        assert torch.equal(weight, before[name]), name
        assert weight.grad is None


def test_training_repeats_itself():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        scorer = untrained(["five", "ended"], rank=4)
        settings = reward_model.Settings(epochs=1, prompts_per_step=3, lr=1e-2)
        losses, _ = reward_model.train(scorer, separable(8, seed=0),
                                       separable(2, seed=1), settings)
        results.append((losses, flat(p.detach() for p in scorer.parameters())))
    assert len(results[0][0]) == 3  # eight prompts: two steps of three, one of two
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def trained(checkpoint, tmp_path_factory):
    """Folders of a base, and of the labels and reward model that came of it."""
    base, folder = checkpoint("qwen2-tied"), tmp_path_factory.mktemp("trained")
    rows = [{"prompt": f"Question {i}?", "response": word, "cut": bool(i % 2),
             "scores": {"good": float(word == "Yes"), **({"odd": i % 2} if i else {})}}
            for i in range(10) for word in ("Yes", "No")]
    write_jsonl(folder / "labels.jsonl", rows)
    reward_model.main(["--model", str(base), "--data", str(folder / "labels.jsonl"),
                       "--out", str(folder / "reward"), "--epochs", "2", "--rank", "4"])
    return base, folder


def write_jsonl(path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(trained, rows: list, tmp_path) -> list[dict]:
    write_jsonl(tmp_path / "in.jsonl", rows)
    reward_model.main([
        "--model", str(trained[0]), "--reward", str(trained[1] / "reward"),
        "--score", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")])
    return [json.loads(line) for line in (tmp_path / "out.jsonl").open()]


def test_the_program_trains_judges_and_saves(trained):
    _, folder = trained
    saved = json.loads((folder / "reward" / "reward.json").read_text())
    assert saved["axes"] == ["good", "odd"]  # whatever the labels name
    rows = {axis: r["rows"] for axis, r in saved["report"]["axes"].items()}
    assert rows["good"] == 4  # two of ten prompts were held out
    assert rows["odd"] in (2, 4)  # the first prompt does not label it
    assert saved["report"]["settings"]["epochs"] == 2
    assert reward_model.origin_of(folder / "reward") == (
        0, "train", file_sha256(folder / "labels.jsonl"), [14, 2, 4])


def test_no_epochs_leave_the_linear_probe(trained, tmp_path):
    base, folder = trained
    reward_model.main(["--model", str(base), "--data", str(folder / "labels.jsonl"),
                       "--out", str(tmp_path / "probe"), "--epochs", "0",
                       "--validation", "0.3"])
    report = json.loads((tmp_path / "probe" / "reward.json").read_text())["report"]
    assert len(report["validation_spearman"]) == 1
    assert report["last_loss"] is None
    model, _ = loading.load(base)
    scorer = reward_model.load(model, tmp_path / "probe")
    assert scorer.head.weight.any()
    assert not any(p.any() for p in lora.parameters(model, "reward")[1::2])  # B = 0


def test_score_adds_the_scores_of_the_loaded_model(trained, tmp_path):
    rows = [{"prompt": "How?", "response": "So.", "note": "é"},
            {"prompt": "Why?", "response": "Because", "cut": True}]
    scored = score(trained, rows, tmp_path)
    assert [{k: v for k, v in r.items() if k != "scores"} for r in scored] == rows
    base, tokenizer = loading.load(trained[0])
    scorer = reward_model.load(base, trained[1] / "reward")
    end = tokenizer.control["<|im_end|>"]
    for row, tail in zip(scored, ([end], []), strict=True):
        ids = tokenizer.encode(row["response"]) + tail
        wanted = scorer.score(tokenizer.chat(row["prompt"]), [ids])[0].tolist()
        assert row["scores"] == pytest.approx(
            dict(zip(["good", "odd"], wanted, strict=True)), abs=1e-4)


@pytest.mark.parametrize(("bad", "message"), [
    ({"prompt": "Why?"}, "\"response\" must be a text"),
    ({"prompt": 3, "response": "x"}, "\"prompt\" must be a text"),
    ({"prompt": "Why?", "response": "x", "cut": "true"}, "\"cut\" is"),
    ({"prompt": "Why?<|im_end|>", "response": "x"}, "in a chat template"),
    ({"prompt": "  ", "response": "x"}, "prompt is empty"), ([1], "a JSON object")])
def test_score_refuses_a_bad_row_by_file_and_line(trained, bad, message, tmp_path):
    with pytest.raises(UserError, match=rf"in\.jsonl:2: .*{message}"):
        score(trained, [{"prompt": "How?", "response": "So."}, bad], tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("label", [1.5, -0.1, "1", True])
def test_training_refuses_a_label_that_is_not_a_number_from_0_to_1(
        trained, label, tmp_path):
    good = {"prompt": "How?", "response": "So.", "scores": {"good": 1}}
    write_jsonl(tmp_path / "in.jsonl", [good, good | {"scores": {"good": label}}])
    with pytest.raises(UserError, match=r"in\.jsonl:2: score of good"):
        reward_model.main(["--model", str(trained[0]), "--out", str(tmp_path / "out"),
                           "--data", str(tmp_path / "in.jsonl")])


def test_a_row_longer_than_the_context_is_refused(trained, tmp_path):
    rows = [{"prompt": f"{i}?", "response": "word " * (300 if i else 1),
             "scores": {"good": 1}} for i in range(3)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError, match="exceeds the model's context"):
        reward_model.main(["--model", str(trained[0]), "--out", str(tmp_path / "out"),
                           "--data", str(tmp_path / "in.jsonl")])


def test_a_row_to_score_that_is_longer_than_the_context_is_refused(trained, tmp_path):
    rows = [{"prompt": "How?", "response": "So."},
            {"prompt": "How?", "response": "word " * 300}]
    with pytest.raises(UserError, match=r"in\.jsonl:2: the row has \d+ tokens"):
        score(trained, rows, tmp_path)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_finished_reward_model_is_not_overwritten(trained, monkeypatch):
    monkeypatch.setattr(reward_model, "load_base", None)
    before = (trained[1] / "reward" / "head.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds a finished reward model"):
        reward_model.main(["--model", str(trained[0]),
                           "--out", str(trained[1] / "reward")])
    assert (trained[1] / "reward" / "head.safetensors").read_bytes() == before


def test_a_split_that_leaves_nothing_to_judge_is_refused(trained, tmp_path):
    rows = [{"prompt": "How?", "response": "So.", "scores": {"good": 1}}]
    write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError, match="test needs rows too"):
        reward_model.main(["--model", str(trained[0]), "--out", str(tmp_path / "out"),
                           "--data", str(tmp_path / "in.jsonl")])


@pytest.mark.parametrize(("words", "message"), [
    ("--rank 0", "--rank is 0; it must be at least 1"),
    ("--prompts-per-step 0", "--prompts-per-step is 0; it must be at least 1"),
    ("--lr 0", "--lr is 0.0; it must be above 0"),
    ("--depth 16", "--depth is 16.0; it must be above 0 and at most 1"),
    ("--depth 0", "--depth is 0.0; it must be above 0 and at most 1"),
    ("--epochs -1", "--epochs is -1; it must be at least 0"),
    ("--validation 1", "--validation is 1.0; it must be at least 0 and below 1"),
    ("--save-every 0", "--save-every is 0; it must be at least 1"),
    ("--seed -1", "--seed is -1; it must be at least 0")])
def test_settings_that_make_no_sense_are_refused(words, message):
    with pytest.raises(UserError) as refusal:
        reward_model.main(words.split())
    assert str(refusal.value) == message


def test_defaults_depend_on_the_model_and_what_was_asked_for_stays():
    tiny, real = (reward_model.Settings(size=size, device="cpu").resolved()
                  for size in ("tiny", "7b"))
    assert (tiny.model, real.model) == (loading.SIZES["tiny"], loading.SIZES["7b"])
    for name in ("validation", "epochs", "lr", "depth"):
        assert getattr(tiny, name) != getattr(real, name)
    asked = reward_model.Settings(size="7b", device="cpu", validation=0.0, epochs=0)
    asked = asked.resolved()
    assert (asked.validation, asked.epochs, asked.lr) == (0.0, 0, real.lr)
