"""The reward model: a prompt and a response → K scores → one reward R.

The axes are whatever the labels name; the bundled data and the paper use

    AXES = politeness, meaningfulness, actionability, safety      each from 0 to 1

Why regression rather than ranking: a Bradley-Terry model, trained on "this answer is
better than that one", learns one number on no scale. Here every axis has a scale that a
rubric fixes (it says what 0, 0.5 and 1 are), the axes stay apart, and their weights can
change after training: `python grpo.py --weights safety=2` needs no new reward model.

The reward model is a role of the one frozen base: adapter `reward` in its lower layers,
and a head that reads their output over the response: at its last token, whose state has
seen all of it, and on average, which no single token dominates. (The upper layers turn
towards the next token; what a text is like is easier to read in the middle: on a real
Qwen compare `--epochs 0 --depth 0.6` with `--depth 1`.)

[E1]   s_k = sigmoid(u_k · z + b_k)      z = [h_last, h_mean] (2D,), standardised
       L   = − mean over labelled (row, axis) of y log s_k + (1 − y) log (1 − s_k)
[E2]   R   = Σ_k w_k s_k / Σ_k w_k

It scores the ids that were sampled, never re-encoded text: the same text may have many
encodings, and the policy's own is what it is paid for. A response that the length limit
cut off has no end token, so the training data hold such rows too (`"cut": true`).

    python reward_model.py --out runs/reward                 # train on the tiny world
    python reward_model.py --model DIR                       # on a real Qwen
    python reward_model.py --score IN.jsonl --out OUT.jsonl  # rows: prompt, response
"""

import contextlib
import dataclasses
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lora
from loading import (
    SIZES,
    TINY,
    Tokenizer,
    base_name,
    fingerprint,
    is_tiny,
    open_shard,
    pick_device,
    short_name,
)
from loading import load as load_base
from model import Cache, Qwen, micro_batches, pad_rows
from plumbing.figures import format_table, peak_rss_gb
from plumbing.files import (
    CHECKPOINT,
    CHECKSUMS,
    UserError,
    file_sha256,
    one_line_errors,
    only_writer,
    read_json,
    require,
    verify_checksums,
    write_checksums,
    write_json,
    write_whole,
)
from plumbing.options import option, parse_settings, with_defaults
from plumbing.resume import (
    CheckpointTimer,
    Stop,
    checkpoint_about,
    load_checkpoint,
    save_checkpoint,
)
from plumbing.rows import (
    notice,
    place_of,
    read_rows,
    require_apart,
    require_untemplated,
    same_text,
    split_of,
)
from plumbing.statistics import bootstrap, pearson, spearman

# What a reward model's folder holds, beside its checksums.
FILES = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors",
         "reward.json")

# ------------------------------------------------------------------------- the model


class RewardModel:
    """K scores in (0, 1) from the lower layers, their adapter and a linear head.

    Attributes:
        axes: K names, in the order of the columns of `scores` (B, K).
        depth: how many layers it runs.
        head: 2D → K, in fp32.
        center, spread: (2D,) of the features, as `fit_head` found them.
    """

    def __init__(self, model: Qwen, axes: list[str], depth: int,
                 name: str = "reward") -> None:
        self.model, self.axes, self.depth, self.name = model, axes, depth, name
        dtype = torch.promote_types(torch.float32, model.unembed.dtype)
        self.head = nn.Linear(2 * model.config.hidden_size, len(axes),
                              device=model.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)  # starts at the bias: one answer for all
        self.center = torch.zeros_like(self.head.weight[0])
        self.spread = torch.ones_like(self.center)

    def features(self, prompt: list[int], responses: list[list[int]],
                 prefix: Cache) -> Tensor:
        """[h_last, h_mean] (n, 2D) of responses to one prompt.

        Args:
            prefix: of this prompt, from `Qwen.shared_prefix` with this depth.
        """
        rows = pad_rows([prompt[-1:] + r for r in responses], self.model.device)
        hidden = self.model(rows, prefix).to(self.head.weight.dtype)  # (n, 1 + C, D)
        last = torch.tensor([len(r) for r in responses], device=rows.device)  # (n,)
        place = torch.arange(rows.shape[1], device=rows.device)
        own = (place > 0) & (place <= last[:, None])  # (n, 1 + C)
        h_mean = (hidden * own[..., None]).sum(1) / last[:, None]  # (n, D)
        h_last = hidden[torch.arange(len(rows), device=rows.device), last]
        return torch.cat([h_last, h_mean], 1)

    def forward(self, prompt: list[int], responses: list[list[int]],
                prefix: Cache) -> Tensor:
        """Logits (n, K) of the scores; arguments as of `features`."""
        z = (self.features(prompt, responses, prefix) - self.center) / self.spread
        # The norm has given every state one length, z puts all features on one scale.
        # s_k = sigmoid(u_k · z + b_k); here before the sigmoid
        return self.head(z)

    @torch.no_grad()
    def score(self, prompt: list[int], responses: list[list[int]]) -> Tensor:
        """Scores (n, K) of sampled ids; the prompt is computed once."""
        scores = self.head.weight.new_zeros(len(responses), len(self.axes))
        with lora.using(self.model, self.name), \
                self.model.shared_prefix(prompt, self.depth) as prefix:
            for chosen in micro_batches([len(r) for r in responses]):
                rows = [responses[i] for i in chosen]
                scores[chosen] = self.forward(prompt, rows, prefix).sigmoid()
        return scores

    def parameters(self) -> list[nn.Parameter]:
        """All that training changes: adapter and head."""
        return lora.parameters(self.model, self.name) + list(self.head.parameters())

    def save(self, folder: Path, base: str, report: dict) -> None:
        """Write adapter, head, axes and the report of the training."""
        # An older model's files must not be taken for this one's, should we be killed.
        for name in ("reward.json", CHECKSUMS):
            (folder / name).unlink(missing_ok=True)
        lora.save(self.model, self.name, folder, base)
        head = {"weight": self.head.weight, "bias": self.head.bias,
                "center": self.center, "spread": self.spread}
        head = {key: value.detach().cpu() for key, value in head.items()}
        write_whole(folder / "head.safetensors", safetensors.torch.save(head))
        write_json(folder / "reward.json",
                   {"axes": self.axes, "depth": self.depth, "report": report})
        write_checksums(folder, FILES)


def load(model: Qwen, folder: Path, name: str = "reward",
         any_base: bool = False) -> RewardModel:
    """Attach the reward model in `folder` to the base it was trained on.

    Args:
        any_base: or to another one, with a note; a run has no such option, for its
            scores should be those of the base that it names.

    Raises:
        UserError: missing, altered or foreign files.
    """
    require(folder.is_dir(), f"no reward model folder {folder}; train one with "
            "reward_model.py")
    verify_checksums(folder)
    about = read_json(folder / "reward.json")
    axes, depth = about.get("axes"), about.get("depth")
    require(isinstance(axes, list) and axes and all(isinstance(a, str) for a in axes),
            f"{folder}/reward.json must name the axes")
    require(isinstance(depth, int) and 1 <= depth <= model.config.num_hidden_layers,
            f"{folder}/reward.json: depth is {depth!r}; it must be a number of layers "
            f"from 1 to {model.config.num_hidden_layers}")
    width = 2 * model.config.hidden_size
    with open_shard(folder / "head.safetensors") as shard:
        head = {key: shard.get_tensor(key) for key in shard.keys()}
    shapes = {key: list(value.shape) for key, value in head.items()}
    want = {"bias": [len(axes)], "center": [width], "spread": [width],
            "weight": [len(axes), width]}
    require(shapes == want, f"{folder}/head.safetensors has {shapes}, expected {want}")
    require(all(bool(v.isfinite().all()) for v in head.values()),
            f"{folder}/head.safetensors holds values that are not finite")
    # Last: a refused folder leaves no half behind.
    lora.load(model, name, folder, any_base)
    scorer = RewardModel(model, axes, depth, name)
    for key in ("center", "spread"):
        setattr(scorer, key, head.pop(key).to(scorer.head.weight))
    scorer.head.load_state_dict(head)
    scorer.head.requires_grad_(False)
    for parameter in lora.parameters(model, name):
        parameter.requires_grad_(False)
    return scorer


# ------------------------------------------------------------------- scores → reward


def combine(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores (..., K) and weights (K,) to one reward R (...)."""
    # [E2] R = Σ_k w_k s_k / Σ_k w_k
    return scores @ (weights / weights.sum())


def parse_weights(text: str, axes: list[str]) -> Tensor:
    """`safety=2,politeness=0` → weights (K,); axes that are not named keep 1."""
    weights, named = dict.fromkeys(axes, 1.0), set()
    for term in filter(None, (t.strip() for t in text.split(","))):
        axis, _, number = (word.strip() for word in term.partition("="))
        require(axis not in named, f"--weights names {axis} twice")
        named.add(axis)
        require(axis in weights, f"--weights: unknown axis {axis!r}; the reward model "
                f"has {', '.join(axes)}")
        try:
            weights[axis] = float(number)
        except ValueError:
            raise UserError(f"--weights: {term!r} is not axis=number") from None
        require(0 <= weights[axis] < math.inf, f"--weights: {axis} is {number}; a "
                "weight must not be negative, infinite or NaN")
    result = torch.tensor(list(weights.values()))  # (K,)
    require(0 < result.sum().item() < math.inf, "--weights: all weights are 0, or one "
            "is too large")
    return result


# -------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python reward_model.py`.

    The free-English labels are few: a gentler rate and one pass, and a tenth of them
    shows whether it helped. The depths make 3 of the tiny base's 4 layers, and 14 of
    the 0.5B's 24.
    """

    size: str = option("tiny", "tiny (bundled), or a Qwen2.5-Instruct on the Hub",
                       choices=[*SIZES])
    model: str | None = option(None, "checkpoint folder or Hub name, instead of --size",
                               unless=())
    data: Path | None = option(None, "labelled rows (JSONL: prompt, response, scores)")
    out: Path | None = option(None, "where the reward model, or the scored file, goes")
    reward: Path | None = option(None, "reward model to score with")
    score: Path | None = option(None, "score this JSONL (prompt, response) and stop")
    split: str = option("train", "train on the rows of this split (any word but "
                        "test); an independent judge has its own")
    validation: float = option(0.0, "share of its prompts that are kept from training, "
                               "to judge each epoch on", real=0.1, low=0, below=1)
    epochs: int = option(6, "passes over the labels; 0: linear probe alone", real=1,
                         low=0)
    prompts_per_step: int = option(2, "prompts, with all their responses", low=1)
    lr: float = option(1.5e-3, "AdamW's peak learning rate", real=5e-4, above=0)
    rank: int = option(16, "LoRA rank; alpha is twice that", low=1)
    depth: float = option(0.75, "share of the layers, from below, that it runs",
                          real=0.6, above=0, high=1)
    seed: int = option(0, "of the adapter, the split and the order of the rows", low=0)
    save_every: int | None = option(None, "steps from checkpoint to checkpoint "
                                    "(default: about every five minutes)", low=1)
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)")
    dtype: str | None = option(None, "float32 or bfloat16 (default: by the device)",
                               choices=["float32", "bfloat16"])

    def resolved(self) -> "Settings":
        """With the defaults that depend on the model and the machine."""
        source = self.model or SIZES[self.size]
        require(self.split.strip().casefold() != "test", f"--split {self.split} would "
                "train on the rows that it is tested on; name another split")
        return with_defaults(
            dataclasses.replace(self, model=source, device=pick_device(self.device)),
            real=not is_tiny(source))


@dataclasses.dataclass(frozen=True)
class Group:
    """All labelled responses to one prompt, as ids."""

    prompt: list[int]
    responses: list[list[int]]
    labels: Tensor  # (n, K), NaN where a row does not label an axis


def encode_response(tokenizer: Tokenizer, text: str, cut: bool) -> list[int]:
    """Ids of a written response; one that was not cut off ends with the end token."""
    end = tokenizer.control.get("<|im_end|>", tokenizer.stop_ids[0])
    ids = tokenizer.encode_response(text) + ([] if cut else [end])
    return ids or [end]


def make_groups(rows: list[dict], axes: list[str], tokenizer: Tokenizer) -> list[Group]:
    """Collect rows by prompt."""
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    groups = []
    for prompt, members in by_prompt.items():
        responses = [encode_response(tokenizer, r["response"], bool(r.get("cut")))
                     for r in members]
        labels = torch.tensor([[r["scores"].get(a, math.nan) for a in axes]
                               for r in members])
        groups.append(Group(tokenizer.chat(prompt), responses, labels))
    return groups


def split_rows(rows: list[dict], split: str,
               seed: int) -> tuple[list[dict], list[dict]]:
    """Training and test rows, by prompt: by `"split"`, or a fifth at random.

    Raises:
        UserError: a prompt has two splits, or no row has the one that is asked for.
    """
    split = split.strip().casefold()
    if any("split" in row for row in rows):
        require_apart(rows, split_of, lambda row: same_text(row["prompt"]))
        return ([r for r in rows if split_of(r) == split],
                [r for r in rows if split_of(r) == "test"])
    require(split == "train", f"--split {split}: no row of the data has a \"split\"; "
            "add one to each, so that a judge has prompts of its own")
    return hold_out(rows, 0.2, seed)


def hold_out(rows: list[dict], share: float,
             seed: int) -> tuple[list[dict], list[dict]]:
    """Keep all rows of a share of the prompts aside: (rest, held out)."""
    if not share:
        return rows, []
    prompts = list(dict.fromkeys(same_text(r["prompt"]) for r in rows))
    random.Random(seed).shuffle(prompts)
    held = set(prompts[:max(1, int(len(prompts) * share))])
    return ([r for r in rows if same_text(r["prompt"]) not in held],
            [r for r in rows if same_text(r["prompt"]) in held])


def read_labels(path: Path, settings: Settings,
                tokenizer: Tokenizer) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows to train, validate and test on; what is not used is counted in a note.

    Raises:
        UserError: a row cannot be read, or a part has no rows.
    """
    rows = read_scorable(path, tokenizer, labels=True)
    known, test = split_rows(rows, settings.split, settings.seed)
    words = Counter(map(split_of, rows))
    chosen, validation = hold_out(known, settings.validation, settings.seed)
    require(bool(chosen) and bool(test), f"{path}: training (split "
            f"{settings.split!r}) needs rows of two prompts or more, and test needs "
            "rows too; the file has " + ", ".join(f"{n} of {w}" for w, n in
                                                  words.items()))
    unused = {word: n for word, n in words.items()
              if word not in (settings.split.strip().casefold(), "test")}
    if unused and "test" in words:
        notice(f"{path}: rows that are not read, as neither --split nor test names "
               "their split: " + ", ".join(f"{n} of {w}" for w, n in unused.items()))
    spelled: dict[str, str] = {}
    for row in rows:
        for axis in row["scores"]:
            other = spelled.setdefault(same_text(axis), axis)
            require(other == axis, f"{place_of(row)}: axis {axis!r} is {other!r} in "
                    "other rows; write it in one fashion")
    lost = {*spelled.values()} - {axis for row in chosen for axis in row["scores"]}
    if lost:
        notice(f"{path}: no row to train on labels {', '.join(sorted(lost))}; it "
               "cannot be learnt")
    return chosen, validation, test


def read_scorable(path: Path, tokenizer: Tokenizer, labels: bool) -> list[dict]:
    """Rows with prompt and response, as texts without a chat template."""
    rows = read_rows(path, responses=True, labels=labels)
    require_untemplated(rows, tokenizer.control)
    systems = sum("system" in row for row in rows)
    if systems:
        notice(f"{path}: the reward model reads prompts without a system message; "
               f"rows that have one: {systems}")
    return rows


def regression_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of cross-entropies over the labelled axes of logits, labels (n, K)."""
    # [E1] L = − mean over labelled (row, axis) of y log s_k + (1 − y) log (1 − s_k)
    # Its minimum is s_k = y, as a squared error's is. But the gradient by the logit is
    # s_k − y, where a squared error's fades as s_k nears 0 or 1, however wrong it is.
    # The caller divides by the step's count, so that the groups of a step count by
    # their labels and not by how they were cut.
    labelled = ~labels.isnan()
    return F.binary_cross_entropy_with_logits(logits[labelled], labels[labelled],
                                              reduction="sum")


@torch.no_grad()
def fit_head(scorer: RewardModel, groups: list[Group]) -> None:
    """Fit the head to the untrained features in closed form: a linear probe.

    Ridge regression on standardised features. The features' gradient is (s − y) times
    the head's weights: before the head fits the labels it means little, and spoils
    features that were good (Kumar et al., arXiv 2202.10054, for random heads). After
    this fit the adapter learns only what the base lacks.
    """
    features = torch.cat([
        features_of(scorer, group)
        for group in tqdm(groups, desc="linear probe", unit="prompt", file=sys.stderr)])
    labels = torch.cat([g.labels for g in groups]).to(features)  # (N, K)
    scorer.center = features.mean(0)
    scorer.spread = features.std(0, correction=0) + 1e-3
    z = ((features - scorer.center) / scorer.spread).double()  # (N, 2D)
    for k in range(len(scorer.axes)):
        known = ~labels[:, k].isnan()
        y, x = labels[known, k].double(), z[known]
        mean = y.mean().clamp(0.02, 0.98)
        # w = (Xᵀ X + λ I)⁻¹ Xᵀ (y − ȳ) with λ = 2D, the number of features
        ridge = x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        w = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean()))
        # The sigmoid has slope ȳ (1 − ȳ) where the head starts.
        scorer.head.weight[k] = w / (mean * (1 - mean))
        scorer.head.bias[k] = mean.logit()


def features_of(scorer: RewardModel, group: Group) -> Tensor:
    """Features (n, 2D) of a whole group, with the least padding."""
    features = [None] * len(group.responses)
    with lora.using(scorer.model, scorer.name), \
            scorer.model.shared_prefix(group.prompt, scorer.depth) as prefix:
        for chosen in micro_batches([len(r) for r in group.responses]):
            rows = scorer.features(group.prompt, [group.responses[i] for i in chosen],
                                   prefix)
            for i, row in zip(chosen, rows, strict=True):
                features[i] = row
    return torch.stack(features)


def train(scorer: RewardModel, groups: list[Group], validation: list[Group],
          settings: Settings, checkpoint: Path | None = None,
          origin: dict | None = None) -> tuple[list[float], list[float]]:
    """Fit adapter and head by AdamW, linear warm-up and cosine decay.

    Args:
        checkpoint: a file to go on from, if it exists, and to write now and then.
            Where there is none, `fit_head` comes before.
        origin: what the result depends on; a checkpoint of another origin is refused.

    Returns:
        the loss of every step; and the mean Spearman over the axes on the validation
        prompts, if there are any: before the first epoch and after each.

    Raises:
        SystemExit: it was asked to stop; the checkpoint is written.
    """
    # The head is fitted already: it learns at a fifth of the adapter's rate.
    peaks = (settings.lr, settings.lr / 5)
    optimizer = torch.optim.AdamW([
        {"params": lora.parameters(scorer.model, scorer.name)},
        {"params": list(scorer.head.parameters())}], weight_decay=0.0)
    state = [*scorer.parameters(), scorer.center, scorer.spread]
    batches = shuffled_batches(groups, settings)
    due = CheckpointTimer(settings.save_every)
    if checkpoint and checkpoint.is_file():
        about = load_checkpoint(checkpoint, state, optimizer)
        losses, spearmans = done_before(about, origin, len(batches), checkpoint)
        print(f"going on after step {len(losses)} of a training that was interrupted")
    else:
        losses = []
        spearmans = [mean_spearman(scorer, validation)] if validation else []
    asked = False
    with tqdm(total=len(batches), initial=len(losses), desc="reward model",
              unit="step", file=sys.stderr) as bar, Stop() as stop:
        while len(losses) < len(batches):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_factor(len(losses), len(batches))
            with lora.using(scorer.model, scorer.name):
                losses.append(train_step(scorer, batches[len(losses)]))
            nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if validation and len(losses) % (len(batches) // settings.epochs) == 0:
                spearmans.append(mean_spearman(scorer, validation))
            show(bar, losses, spearmans)
            asked = stop.asked
            if checkpoint and (due(len(losses)) or asked):
                save_checkpoint(
                    checkpoint, state, optimizer,
                    {"losses": losses, "validation": spearmans, "origin": origin})
            if asked:
                break
    if asked:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    return losses, spearmans


def done_before(about: dict, origin: dict, steps: int,
                checkpoint: Path) -> tuple[list[float], list[float]]:
    """Losses and validation figures of a checkpoint.

    Raises:
        UserError: it is of another origin, or damaged.
    """
    before = about.get("origin") or {}
    changed = [key for key in origin if before.get(key) != origin[key]]
    require(not changed, f"{checkpoint} is of a training with another "
            f"{', '.join(changed)}; delete it to start again, or choose another --out")
    losses, spearmans = about.get("losses"), about.get("validation")
    require(isinstance(losses, list) and isinstance(spearmans, list)
            and len(losses) <= steps, f"{checkpoint} is damaged; delete it")
    return losses, spearmans


def shuffled_batches(groups: list[Group], settings: Settings) -> list[list[Group]]:
    """The groups of every step of every epoch, each epoch in a new order."""
    order, shuffle, batches = list(groups), random.Random(settings.seed), []
    size = settings.prompts_per_step
    for _ in range(settings.epochs):
        shuffle.shuffle(order)
        batches += [order[i:i + size] for i in range(0, len(order), size)]
    return batches


def lr_factor(step: int, total: int) -> float:
    """Of the peak learning rate: min(linear warm-up, cosine to zero)."""
    return min((step + 1) / max(1, 0.05 * total),
               0.5 * (1 + math.cos(math.pi * step / total)))


def show(bar: tqdm, losses: list[float], spearmans: list[float]) -> None:
    """Loss and validation, beside the bar's own time left."""
    figures = {"loss": f"{np.mean(losses[-20:]):.4f}"}
    if spearmans:
        figures["validation"] = f"{spearmans[-1]:.3f}"
    bar.set_postfix(figures, refresh=False)
    bar.update()


def train_step(scorer: RewardModel, batch: list[Group]) -> float:
    """Accumulate the gradient of [E1] over some groups; return the loss."""
    count = sum(int((~g.labels.isnan()).sum()) for g in batch)
    total = 0.0
    for group in batch:
        with scorer.model.shared_prefix(group.prompt, scorer.depth) as prefix:
            for chosen in micro_batches([len(r) for r in group.responses]):
                logits = scorer.forward(
                    group.prompt, [group.responses[i] for i in chosen], prefix)
                labels = group.labels[chosen].to(logits)
                loss = regression_loss(logits, labels) / count
                loss.backward()
                total += loss.item()
    require(math.isfinite(total), "the reward model's loss is not finite; lower --lr")
    return total


# ------------------------------------------------------------------------- evaluation


def predictions(scorer: RewardModel, groups: list[Group]) -> Iterator[tuple]:
    """(axis, predicted, label, number of the prompt) of the rows that have the axis."""
    predicted = torch.cat([scorer.score(g.prompt, g.responses) for g in groups])
    predicted, labels = predicted.cpu(), torch.cat([g.labels for g in groups])  # (N, K)
    prompts = np.repeat(np.arange(len(groups)), [len(g.responses) for g in groups])
    for k, axis in enumerate(scorer.axes):
        known = ~labels[:, k].isnan()
        if known.any():
            yield (axis, predicted[known, k].double().numpy(),
                   labels[known, k].double().numpy(), prompts[known.numpy()])


def evaluate(scorer: RewardModel, groups: list[Group]) -> dict[str, dict]:
    """Figures on held-out prompts: per axis Spearman, Pearson, MAE, calibration.

    `low` and `high` are Spearman's 95% interval (`bootstrap`); `mae` is the mean
    absolute error, `mae_of_mean` that of always predicting the mean, the baseline.
    `calibration`: five bins of predicted score: (rows, mean predicted, mean label).
    """
    report = {}
    for axis, p, y, prompts in predictions(scorer, groups):
        bins = np.clip((p * 5).astype(int), 0, 4)
        low, high = bootstrap(p, y, prompts)
        report[axis] = {
            "rows": len(y), "spearman": spearman(p, y), "low": low, "high": high,
            "pearson": pearson(p, y),
            "mae": float(np.abs(p - y).mean()),
            "mae_of_mean": float(np.abs(y - y.mean()).mean()),
            "calibration": [
                [int((bins == i).sum()), float(p[bins == i].mean()),
                 float(y[bins == i].mean())] for i in range(5) if (bins == i).any()],
        }
    return report


def mean_spearman(scorer: RewardModel, groups: list[Group]) -> float:
    """Over the axes: one figure to choose settings by."""
    return float(np.mean([spearman(p, y)
                          for _, p, y, _ in predictions(scorer, groups)]))


def print_report(report: dict[str, dict]) -> None:
    """The evaluation as two tables."""
    columns = ["rows", "spearman", "low", "high", "pearson", "mae", "mae_of_mean"]
    print(format_table(["axis", *columns],
                       [[a, *(r[c] for c in columns)] for a, r in report.items()]))
    rows = [[a, n, p, y] for a, r in report.items() for n, p, y in r["calibration"]]
    print("\ncalibration: predictions in five bins against their labels")
    print(format_table(["axis", "rows", "predicted", "label"], rows))


# ----------------------------------------------------------------------- command line


def origin_of(folder: Path) -> tuple | None:
    """Seed, split, SHA-256 of the labels (older models lack it) and numbers of rows.

    None: it does not say.
    """
    report = read_json(folder / "reward.json").get("report")
    settings = report.get("settings") if isinstance(report, dict) else None
    if not isinstance(settings, dict):
        return None
    return (settings.get("seed"), settings.get("split"), report.get("labels"),
            report.get("rows"))


def default_folder(source: str) -> Path:
    """Where the reward model of a base is kept, unless --out or --reward says else."""
    if is_tiny(source):
        return TINY / "reward"
    return Path("runs") / f"reward-{short_name(source)}"


def own_folder(source: str, model: Qwen) -> Path:
    """`default_folder`, or -2, -3 … of it: the first that is free or of this base.

    Two bases may share a name (trainers call theirs checkpoint-500): the fingerprint
    tells them apart.
    """
    first, own, number = default_folder(source), fingerprint(model), 1
    folder = first
    while base_of(folder) not in (None, own):
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def base_of(folder: Path) -> object:
    """The fingerprint of a reward model's base, trained or half trained; or None.

    What cannot be read has none: whoever loads it will say why.
    """
    adapter, checkpoint = folder / FILES[1], folder / CHECKPOINT
    with contextlib.suppress(UserError):
        if (folder / "reward.json").is_file() and adapter.is_file():
            with open_shard(adapter) as shard:
                return (shard.metadata() or {}).get("base_fingerprint")
        if checkpoint.is_file():
            origin = checkpoint_about(checkpoint).get("origin")
            return origin.get("base") if isinstance(origin, dict) else None
    return None


def score_file(settings: Settings) -> None:
    """Add `scores` to every row of a JSONL file."""
    require(settings.out is not None, "--score needs --out OUT.jsonl")
    read_rows(settings.score, responses=True)  # before the base is loaded
    dtype = settings.dtype and getattr(torch, settings.dtype)
    model, tokenizer = load_base(settings.model, settings.device, dtype)
    folder = settings.reward or own_folder(settings.model, model)
    scorer = load(model, folder)
    rows = read_scorable(settings.score, tokenizer, labels=False)
    context = model.config.max_position_embeddings
    for row in tqdm(rows, desc="scoring", unit="row", file=sys.stderr):
        response = encode_response(tokenizer, row["response"], bool(row.get("cut")))
        prompt = tokenizer.chat(row["prompt"])
        require(len(prompt) + len(response) <= context, f"{place_of(row)}: the "
                f"row has {len(prompt) + len(response)} tokens, the context {context}; "
                "shorten it")
        scores = scorer.score(prompt, [response])[0].tolist()
        row["scores"] = {axis: round(score, 4) for axis, score in
                         zip(scorer.axes, scores, strict=True)}
    write_whole(settings.out, "".join(json.dumps(r, ensure_ascii=False) + "\n"
                                      for r in rows))
    print(f"wrote {settings.out}: {len(rows)} rows, axes {', '.join(scorer.axes)}")


def train_reward_model(model: Qwen, tokenizer: Tokenizer, settings: Settings,
                       folder: Path) -> RewardModel:
    """Train, test and save a reward model on the base that is loaded already."""
    home = TINY if is_tiny(settings.model) else TINY.parent
    path = settings.data or home / "labels.jsonl"
    train_rows, validation_rows, test_rows = read_labels(path, settings, tokenizer)
    # What no training row labels cannot be learnt.
    axes = list(dict.fromkeys(axis for row in train_rows for axis in row["scores"]))
    groups = make_groups(train_rows, axes, tokenizer)
    for group in groups:
        longest = len(group.prompt) + max(map(len, group.responses))
        require(longest <= model.config.max_position_embeddings,
                f"{path}: a row of {longest} tokens exceeds the model's context")
    depth = max(1, round(settings.depth * model.config.num_hidden_layers))
    lora.attach(model, "reward", settings.rank, 2 * settings.rank, settings.seed, depth)
    scorer = RewardModel(model, axes, depth)
    print(f"training the reward model on {len(train_rows)} rows of "
          f"{os.path.relpath(path)}, validating on {len(validation_rows)}, testing on "
          f"{len(test_rows)}; axes {', '.join(axes)}")
    started = time.perf_counter()
    validation = make_groups(validation_rows, axes, tokenizer)
    chosen = {name: getattr(settings, name) for name in (
        "split", "validation", "epochs", "prompts_per_step", "lr", "rank", "depth",
        "seed")}
    origin = chosen | {"base": fingerprint(model), "labels": file_sha256(path),
                       "dtype": str(model.unembed.dtype)}
    checkpoint = folder / CHECKPOINT
    if not checkpoint.is_file():
        fit_head(scorer, groups)
    losses, spearmans = train(scorer, groups, validation, settings, checkpoint, origin)
    report = {
        "axes": evaluate(scorer, make_groups(test_rows, axes, tokenizer)),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_gb": round(peak_rss_gb(), 2),
        "last_loss": float(np.mean(losses[-20:])) if losses else None,
        "validation_spearman": spearmans,
        "settings": chosen, "labels": origin["labels"],
        "rows": [len(train_rows), len(validation_rows), len(test_rows)],
        "threads": torch.get_num_threads(),
    }
    scorer.save(folder, base_name(settings.model), report)
    checkpoint.unlink(missing_ok=True)
    if spearmans:
        figures = ", ".join(f"{figure:.3f}" for figure in spearmans)
        print(f"mean Spearman on the validation prompts, before and after each epoch: "
              f"{figures}")
    print_report(report["axes"])
    print(f"\nwrote {folder} ({report['seconds']:.0f} s, "
          f"peak {report['peak_rss_gb']} GB)")
    return scorer


def require_free(folder: Path) -> None:
    """A finished reward model is not written over."""
    require(not (folder / "reward.json").is_file(), f"{folder} holds a finished reward "
            "model; choose another --out, or delete it")


def main(argv: list[str] | None = None) -> None:
    """Train a reward model, or score a file with one."""
    settings = parse_settings(Settings, "Train or use the reward model.", argv)
    settings = settings.resolved()
    if settings.score is not None:
        score_file(settings)
        return
    if settings.out:  # before anything that takes long
        require_free(settings.out)
    dtype = settings.dtype and getattr(torch, settings.dtype)
    model, tokenizer = load_base(settings.model, settings.device, dtype)
    folder = settings.out or own_folder(settings.model, model)
    require_free(folder)
    with only_writer(folder):
        train_reward_model(model, tokenizer, settings, folder)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
