"""The reward model: a prompt and a response → K scores.

The axes are whatever the labels name; the bundled data and the paper use

    AXES = politeness, meaningfulness, actionability, safety      each from 0 to 1

Why regression rather than ranking: a Bradley-Terry model, trained on "this answer is
better than that one", learns one number on no scale. Here every axis has a scale that
people agreed on (a rubric), the axes stay apart, and their weights can change after
training. `python grpo.py --weights safety=2` needs no new reward model.

The reward model is a role of the one frozen base: adapter `reward` and a head on the
hidden state of the response's last token.

[E1]   s_k = sigmoid(w_k · h_last + b_k)
       L   = mean over labelled (row, axis) of (s_k − label_k)²

It scores the ids that were sampled, never re-encoded text: the same text may have many
encodings, and the policy's own is what it is paid for. A response that the length limit
cut off has no end token, so the training data hold such rows too (`"cut": true`).

    python reward_model.py                                   # train on the tiny world
    python reward_model.py --model DIR                       # on a real Qwen
    python reward_model.py --score IN.jsonl --out OUT.jsonl  # rows: prompt, response
"""

import dataclasses
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora
from model import (
    SIZES,
    TINY,
    Cache,
    Qwen,
    Tokenizer,
    base_name,
    is_tiny,
    open_shard,
    pad_rows,
    pick_device,
)
from model import load as load_base
from run import (
    format_table,
    one_line_errors,
    option,
    parse_settings,
    peak_rss_gb,
    read_json,
    read_rows,
    require,
    verify_checksums,
    write_checksums,
    write_json,
    write_whole,
)

# ------------------------------------------------------------------------- the model


class RewardModel:
    """K scores in (0, 1) from the base, the adapter `name` and a linear head.

    Attributes:
        axes: K names, in the order of the columns of `scores` (B, K).
        head: D → K, in fp32.
    """

    def __init__(self, model: Qwen, axes: list[str], name: str = "reward") -> None:
        self.model, self.axes, self.name = model, axes, name
        dtype = torch.promote_types(torch.float32, model.unembed.dtype)
        self.head = nn.Linear(model.config.hidden_size, len(axes),
                              device=model.device, dtype=dtype)
        nn.init.zeros_(self.head.weight)  # starts at the bias: one answer for all

    def forward(self, prompt: list[int], responses: list[list[int]],
                prefix: Cache) -> Tensor:
        """Scores (n, K) of responses to one prompt whose prefix is computed already."""
        rows = pad_rows([prompt[-1:] + r for r in responses], self.model.device)
        hidden = self.model(rows, prefix)  # (n, 1 + C, D)
        last = torch.tensor([len(r) for r in responses], device=rows.device)
        pooled = hidden[torch.arange(len(rows), device=rows.device), last]  # (n, D)
        # s_k = sigmoid(w_k · h_last + b_k)
        return self.head(pooled.to(self.head.weight.dtype)).sigmoid()

    @torch.no_grad()
    def score(self, prompt: list[int], responses: list[list[int]]) -> Tensor:
        """Scores (n, K) of sampled ids; the prompt is computed once."""
        with lora.using(self.model, self.name):
            with self.model.shared_prefix(prompt) as prefix:
                return self.forward(prompt, responses, prefix)

    def parameters(self) -> list[nn.Parameter]:
        """All that training changes: adapter and head."""
        return lora.parameters(self.model, self.name) + list(self.head.parameters())

    def save(self, folder: Path, base: str, report: dict) -> None:
        """Write adapter, head, axes and the report of the training."""
        lora.save(self.model, self.name, folder, base)
        head = {k: v.detach().cpu() for k, v in self.head.state_dict().items()}
        write_whole(folder / "head.safetensors", safetensors.torch.save(head))
        write_json(folder / "reward.json", {"axes": self.axes, "report": report})
        write_checksums(folder)


def load(model: Qwen, folder: Path, name: str = "reward") -> RewardModel:
    """Attach the reward model in `folder` to the base it was trained on.

    Raises:
        UserError: missing, altered or foreign files.
    """
    require(folder.is_dir(), f"no reward model folder {folder}; train one with "
            "reward_model.py")
    verify_checksums(folder)
    axes = read_json(folder / "reward.json").get("axes")
    require(isinstance(axes, list) and axes and all(isinstance(a, str) for a in axes),
            f"{folder}/reward.json must name the axes")
    width = model.config.hidden_size
    with open_shard(folder / "head.safetensors") as shard:
        head = {key: shard.get_tensor(key) for key in shard.keys()}
    shapes = {key: list(value.shape) for key, value in head.items()}
    want = {"bias": [len(axes)], "weight": [len(axes), width]}
    require(shapes == want, f"{folder}/head.safetensors has {shapes}, expected {want}")
    require(all(bool(v.isfinite().all()) for v in head.values()),
            f"{folder}/head.safetensors holds values that are not finite")
    lora.load(model, name, folder)  # last: a refused folder leaves no half behind
    scorer = RewardModel(model, axes, name)
    scorer.head.load_state_dict(head)
    scorer.head.requires_grad_(False)
    for parameter in lora.parameters(model, name):
        parameter.requires_grad_(False)
    return scorer


# -------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python reward_model.py`; `resolve` replaces a default of None."""

    size: str = option("tiny", "tiny (bundled), or a Qwen2.5-Instruct on the Hub",
                       choices=[*SIZES])
    model: str | None = option(None, "checkpoint folder or Hub name, instead of --size")
    data: Path | None = option(None, "labelled rows (JSONL: prompt, response, scores)")
    out: Path | None = option(None, "where the reward model, or the scored file, goes")
    reward: Path | None = option(None, "reward model to score with")
    score: Path | None = option(None, "score this JSONL (prompt, response) and stop")
    split: str = option("train", "train on the rows of this split; an independent "
                        "judge has its own")
    validation: float | None = option(None, "share of its prompts that are kept from "
                                      "training, to judge each epoch on")
    epochs: int | None = option(None, "passes over the labels")
    prompts_per_step: int | None = option(None, "prompts, with all their responses")
    lr: float | None = option(None, "AdamW's peak learning rate")
    rank: int = option(16, "LoRA rank; alpha is twice that")
    seed: int = option(0, "of the adapter, the split and the order of the rows")
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)")
    dtype: str | None = option(None, "float32 or bfloat16 (default: by the device)",
                               choices=["float32", "bfloat16"])


# By `model.is_tiny`. The free-English labels are few: a gentler rate, fewer passes, and
# a tenth of them shows after each pass whether it still helps.
DEFAULTS = {
    True: {"validation": 0.0, "epochs": 6, "prompts_per_step": 2, "lr": 1.5e-3},
    False: {"validation": 0.1, "epochs": 2, "prompts_per_step": 2, "lr": 6e-4},
}


def resolve(settings: Settings) -> Settings:
    """Fill in the defaults that depend on the model, and refuse what makes no sense."""
    source = settings.model or SIZES[settings.size]
    changes = {name: value for name, value in DEFAULTS[is_tiny(source)].items()
               if getattr(settings, name) is None}
    settings = dataclasses.replace(settings, model=source,
                                   device=pick_device(settings.device), **changes)
    for name in ("epochs", "prompts_per_step", "lr", "rank"):
        require(0 < getattr(settings, name) < math.inf,
                f"--{name.replace('_', '-')} must be positive")
    require(settings.seed >= 0, "--seed must not be negative")
    require(0 <= settings.validation < 1, "--validation must be from 0 to below 1")
    return settings


@dataclasses.dataclass(frozen=True)
class Group:
    """All labelled responses to one prompt, as ids."""

    prompt: list[int]
    responses: list[list[int]]
    labels: Tensor  # (n, K), NaN where a row does not label an axis


def encode_response(tokenizer: Tokenizer, text: str, cut: bool) -> list[int]:
    """Ids of a written response; one that was not cut off ends with the end token."""
    end = tokenizer.control.get("<|im_end|>", tokenizer.stop_ids[0])
    ids = tokenizer.encode(text) + ([] if cut else [end])
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
    """Training and test rows, by prompt: by `"split"`, or a fifth at random."""
    if any("split" in row for row in rows):
        return ([r for r in rows if r.get("split", "train") == split],
                [r for r in rows if r.get("split") == "test"])
    return hold_out(rows, 0.2, seed)


def hold_out(rows: list[dict], share: float,
             seed: int) -> tuple[list[dict], list[dict]]:
    """Keep all rows of a share of the prompts aside: (rest, held out)."""
    if not share:
        return rows, []
    prompts = list(dict.fromkeys(r["prompt"] for r in rows))
    random.Random(seed).shuffle(prompts)
    held = set(prompts[:max(1, int(len(prompts) * share))])
    return ([r for r in rows if r["prompt"] not in held],
            [r for r in rows if r["prompt"] in held])


def regression_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Sum of squared errors over the labelled axes of scores, labels (n, K)."""
    # [E1] L = mean over labelled (row, axis) of (s_k − label_k)²
    # The caller divides by the step's count, so that the groups of a step count by
    # their labels and not by how they were cut.
    labelled = ~labels.isnan()
    return (scores[labelled] - labels[labelled]).square().sum()


def train(scorer: RewardModel, groups: list[Group], validation: list[Group],
          settings: Settings) -> tuple[list[float], list[float]]:
    """Fit adapter and head by AdamW, linear warm-up and cosine decay.

    Returns:
        the loss of every step, and after each epoch the mean Spearman over the axes
        on the validation prompts, if there are any.
    """
    parameters = scorer.parameters()
    optimizer = torch.optim.AdamW(parameters, settings.lr, weight_decay=0.0)
    size = settings.prompts_per_step
    total = math.ceil(len(groups) / size) * settings.epochs
    order, shuffle, losses, tried = list(groups), random.Random(settings.seed), [], []
    bar = tqdm(total=total, desc="reward model", unit="step", file=sys.stderr)
    for _ in range(settings.epochs):
        shuffle.shuffle(order)
        for start in range(0, len(order), size):
            step = len(losses)
            rate = min((step + 1) / max(1, 0.05 * total),
                       0.5 * (1 + math.cos(math.pi * step / total)))
            optimizer.param_groups[0]["lr"] = settings.lr * rate
            with lora.using(scorer.model, scorer.name):
                losses.append(train_step(scorer, order[start:start + size]))
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            figures = {"mse": f"{np.mean(losses[-20:]):.4f}"}
            if tried:
                figures["validation"] = f"{tried[-1]:.3f}"
            bar.set_postfix(figures, refresh=False)
            bar.update()
        if validation:
            found = judge(scorer, validation).values()
            tried.append(float(np.mean([axis["spearman"] for axis in found])))
    bar.close()
    return losses, tried


def train_step(scorer: RewardModel, batch: list[Group]) -> float:
    """Accumulate the gradient of [E1] over some groups; return the loss."""
    count = sum(int((~g.labels.isnan()).sum()) for g in batch)
    total = 0.0
    for group in batch:
        with scorer.model.shared_prefix(group.prompt) as prefix:
            for part in short_and_long([len(r) for r in group.responses]):
                scores = scorer.forward(
                    group.prompt, [group.responses[i] for i in part], prefix)
                labels = group.labels[part].to(scores)
                loss = regression_loss(scores, labels) / count
                loss.backward()
                total += loss.item()
    require(math.isfinite(total), "the reward model's loss is not finite; lower --lr")
    return total


def short_and_long(lengths: list[int]) -> list[list[int]]:
    """Numbers of the rows in two parts that need the least padding.

    All in one batch, every row costs as much as the longest. Answers of 1 to 94 words
    then are 45% padding; in two parts they are a fifth.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)

    def tokens(cut: int) -> int:
        """Size of both parts, padded."""
        return cut * lengths[order[cut - 1]] + (len(order) - cut) * lengths[order[-1]]

    best = min(range(1, len(order) + 1), key=tokens)
    return [part for part in (order[:best], order[best:]) if part]


# -------------------------------------------------------------------------- judgement


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation; equal values share the mean of their ranks."""
    return pearson(ranks(a), ranks(b))


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation; 0 where one side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 1e-12 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of every value, ties averaged."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return ((last - counts + last - 1) / 2)[inverse]


def bootstrap(predicted: np.ndarray, labels: np.ndarray, prompts: np.ndarray,
              draws: int = 500) -> list[float]:
    """95% interval of Spearman: (n,) predictions, labels and numbers of the prompts.

    Prompts are drawn with replacement, not rows: answers to one prompt are alike, and
    taking them for independent would make the interval too narrow.
    """
    random = np.random.default_rng(0)
    rows = [np.flatnonzero(prompts == p) for p in np.unique(prompts)]
    found = []
    for _ in range(draws):
        drawn = random.integers(len(rows), size=len(rows))
        here = np.concatenate([rows[i] for i in drawn])
        found.append(spearman(predicted[here], labels[here]))
    return np.quantile(found, [0.025, 0.975]).tolist()


def judge(scorer: RewardModel, groups: list[Group]) -> dict[str, dict]:
    """Figures on held-out prompts: per axis Spearman, Pearson, MAE, calibration.

    `low` and `high` are Spearman's 95% interval (`bootstrap`). `mae_of_mean` is the
    error of always predicting the mean: what any use starts from.
    `calibration`: five bins of predicted score: (rows, mean predicted, mean label).
    """
    predicted = torch.cat([scorer.score(g.prompt, g.responses) for g in groups])
    labels = torch.cat([g.labels for g in groups])
    prompts = np.repeat(np.arange(len(groups)), [len(g.responses) for g in groups])
    report = {}
    for k, axis in enumerate(scorer.axes):
        known = ~labels[:, k].isnan()
        if not known.any():
            continue
        p = predicted[known.to(predicted.device), k].double().cpu().numpy()
        y = labels[known, k].double().numpy()
        bins = np.clip((p * 5).astype(int), 0, 4)
        low, high = bootstrap(p, y, prompts[known.numpy()])
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


def print_report(report: dict[str, dict]) -> None:
    """The judgement as two tables."""
    columns = ["rows", "spearman", "low", "high", "pearson", "mae", "mae_of_mean"]
    print(format_table(["axis", *columns],
                       [[a, *(r[c] for c in columns)] for a, r in report.items()]))
    rows = [[a, n, p, y] for a, r in report.items() for n, p, y in r["calibration"]]
    print("\ncalibration: predictions in five bins against their labels")
    print(format_table(["axis", "rows", "predicted", "label"], rows))


# ----------------------------------------------------------------------- command line


def default_folder(source: str) -> Path:
    """Where the reward model of a base is kept, unless --out or --reward says else."""
    if is_tiny(source):
        return TINY / "reward"
    return Path("runs") / f"reward-{Path(source).name}"


def score_file(settings: Settings) -> None:
    """Add `scores` to every row of a JSONL file."""
    rows = read_rows(settings.score, responses=True)
    require(settings.out is not None, "--score needs --out OUT.jsonl")
    dtype = settings.dtype and getattr(torch, settings.dtype)
    model, tokenizer = load_base(settings.model, settings.device, dtype)
    folder = settings.reward or default_folder(settings.model)
    scorer = load(model, folder)
    for row in tqdm(rows, desc="scoring", unit="row", file=sys.stderr):
        response = encode_response(tokenizer, row["response"], bool(row.get("cut")))
        scores = scorer.score(tokenizer.chat(row["prompt"]), [response])[0].tolist()
        row["scores"] = {axis: round(score, 4) for axis, score in
                         zip(scorer.axes, scores, strict=True)}
    write_whole(settings.out, "".join(json.dumps(r, ensure_ascii=False) + "\n"
                                      for r in rows))
    print(f"wrote {settings.out}: {len(rows)} rows, axes {', '.join(scorer.axes)}")


def train_reward_model(model: Qwen, tokenizer: Tokenizer, settings: Settings,
                       folder: Path) -> RewardModel:
    """Train, judge and save a reward model on the base that is loaded already."""
    home = TINY if is_tiny(settings.model) else TINY.parent
    path = settings.data or home / "labels.jsonl"
    rows = read_rows(path, responses=True, labels=True)
    known, held = split_rows(rows, settings.split, settings.seed)
    known, tried = hold_out(known, settings.validation, settings.seed)
    require(bool(known) and bool(held), f"{path}: training (split "
            f"{settings.split!r}) needs rows of two prompts or more, and test needs "
            "rows too")
    # What no training row labels cannot be learnt.
    axes = list(dict.fromkeys(axis for row in known for axis in row["scores"]))
    groups = make_groups(known, axes, tokenizer)
    for group in groups:
        longest = len(group.prompt) + max(map(len, group.responses))
        require(longest <= model.config.max_position_embeddings,
                f"{path}: a row of {longest} tokens exceeds the model's context")
    lora.attach(model, "reward", settings.rank, 2 * settings.rank, settings.seed)
    scorer = RewardModel(model, axes)
    labels = torch.cat([g.labels for g in groups])
    mean = labels.nanmean(0).clamp(0.02, 0.98)
    with torch.no_grad():
        scorer.head.bias.copy_(mean.logit())
    print(f"training the reward model on {len(known)} rows of "
          f"{os.path.relpath(path)}, validating on {len(tried)}, judging it on "
          f"{len(held)}; axes {', '.join(axes)}")
    started = time.perf_counter()
    validation = make_groups(tried, axes, tokenizer)
    losses, spearmans = train(scorer, groups, validation, settings)
    report = {
        "axes": judge(scorer, make_groups(held, axes, tokenizer)),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_gb": round(peak_rss_gb(), 2),
        "last_mse": float(np.mean(losses[-20:])),
        "validation_spearman": spearmans,
        "settings": {name: getattr(settings, name) for name in (
            "split", "validation", "epochs", "prompts_per_step", "lr", "rank", "seed")},
        "rows": [len(known), len(tried), len(held)],
        "threads": torch.get_num_threads(),
    }
    scorer.save(folder, base_name(settings.model), report)
    print_report(report["axes"])
    print(f"\nwrote {folder} ({report['seconds']:.0f} s, "
          f"peak {report['peak_rss_gb']} GB)")
    return scorer


def main(argv: list[str] | None = None) -> None:
    """Train a reward model, or score a file with one."""
    settings = resolve(parse_settings(Settings, "Train or use the reward model.", argv))
    if settings.score is not None:
        score_file(settings)
        return
    dtype = settings.dtype and getattr(torch, settings.dtype)
    model, tokenizer = load_base(settings.model, settings.device, dtype)
    folder = settings.out or default_folder(settings.model)
    train_reward_model(model, tokenizer, settings, folder)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
