"""Before and after: answers to held-out prompts, scored by everyone who judges.

Before and after use the same random numbers (those of step 0, which no training step
uses), so that the difference is the training's. The KL to the base is exact over the
vocabulary at every token, and a mean over the tokens that were sampled. `describe` says
what the responses of a training step were like.
"""

import hashlib
import json
import math

import torch
from torch import Tensor
from tqdm import tqdm

import lora
from data import rubric
from logprob import row_statistics
from plumbing import parallel
from plumbing.files import finite, read_json, write_json
from reward_model import combine
from run import BEFORE, Prompt, Run
from sample import (
    Batch,
    group_micro_batches,
    reference_hidden,
    sample_batch,
    score_batch,
    score_groups,
)


@torch.no_grad()
def evaluate(run: Run, prompts: list[Prompt], title: str,
             best_of: int = 1) -> tuple[dict, list[str]]:
    """Answer held-out prompts with the policy; mean scores, and the answers.

    Before training the adapter is zero, and the policy is the base. KL and perplexity
    are at the sampling temperature.

    Args:
        title: of the progress bar.
        best_of: how often to answer; the response that the reward likes best is kept.
    """
    # As many rows at a time as a training step has, which the planner has counted.
    rows = run.settings.prompts_per_step * run.settings.group_size
    size, batches, sums, drawn = max(1, rows // best_of), [], [], 0
    with tqdm(total=len(prompts), desc=title, unit="prompt",
              **parallel.progress()) as bar:
        for start in range(0, len(prompts), size):
            chosen = prompts[start:start + size]
            sampled = sample_batch(run, chosen, 0, best_of)
            drawn += int(sampled.mask.sum())
            batches.append(best_rows(score_batch(run, chosen, sampled)))
            sums.append(kl_and_surprise(run, batches[-1]))
            bar.update(len(chosen))
    answers = [run.tokenizer.decode(row).strip()
               for batch in batches for row in batch.sampled.responses()]
    tokens = sum(int(batch.sampled.mask.sum()) for batch in batches)
    kl, surprise = map(sum, zip(*sums, strict=True))
    ended = [end for batch in batches for end in batch.sampled.ended.tolist()]
    figures = {who: means(run, torch.cat(scores))
               for who, scores in scores_by_judge(run, batches).items()}
    figures |= {"kl": kl / tokens, "base_perplexity": perplexity(surprise / tokens),
                "distinct_3_grams": distinct_3_grams(answers),
                "length": tokens / len(prompts), "cut_off": 1 - sum(ended) / len(ended),
                "tokens_an_answer": drawn / len(prompts)}  # best of n draws n answers
    if "gold" in run.judges:
        figures["behaviour"] = rubric.behaviours([p.text for p in prompts], answers)
    return figures, answers


def best_rows(batch: Batch) -> Batch:
    """The response of each group that the reward likes best; with G = 1, all."""
    best = batch.reward.view(-1, batch.group_size).argmax(1)  # (P,)
    return batch.rows(best + batch.group_size * torch.arange(len(best)))


def scores_by_judge(run: Run, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Scores (n, K) of each batch, by the name of who gives them."""
    scores = {}
    if run.settings.reward != "gold":
        scores["reward_model"] = [batch.scores for batch in batches]
    return scores | {who: [score_groups(run, judge, batch.prompts, batch.sampled)
                           for batch in batches] for who, judge in run.judges.items()}


def means(run: Run, scores: Tensor) -> dict[str, float]:
    """Mean of each axis, and mean R, of scores (n, K)."""
    by_axis = dict(zip(run.axes, scores.mean(0).tolist(), strict=True))
    return by_axis | {"R": combine(scores, run.weights).mean().item()}


def perplexity(surprise: float) -> float | None:
    """exp of nats a token; None where that is beyond a float, as it can be if cold."""
    return math.exp(surprise) if surprise < 709 else None


def distinct_3_grams(texts: list[str]) -> float:
    """Different runs of three words, as a share of all runs.

    It falls when a policy has one good sentence and says it to everybody.
    """
    grams = [tuple(words[i:i + 3]) for words in map(str.split, texts)
             for i in range(len(words) - 2)]
    return len(set(grams)) / max(1, len(grams))


@torch.no_grad()
def kl_and_surprise(run: Run, batch: Batch) -> tuple[float, float]:
    """Sums over response tokens, in nats: the exact KL(π ‖ ref), and −log ref.

    Both at the sampling temperature, as everywhere.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=run.model.device)
    for p in parallel.shard(range(len(batch.prompts))):
        reference = reference_hidden(run, batch, p)
        with lora.using(run.model, "policy"):
            for (index, hidden, mask), ref in zip(group_micro_batches(run, batch, p),
                                                  reference, strict=True):
                stats = row_statistics(
                    hidden, run.model.unembed, batch.sampled.tokens[index], mask,
                    run.settings.temperature, run.tokenizer.valid, ref)
                sums[0] += stats.kl.sum().item()
                sums[1] -= stats.logp_ref.sum().item()
    parallel.all_reduce(sums)
    return tuple(sums.tolist())


def answers_before(run: Run, held_out: list[Prompt]) -> tuple[dict, list[str]]:
    """Evaluate the base, once: a run that is resumed reads what it wrote then."""
    path = run.folder / BEFORE

    def sha256_of(content: list) -> str:
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    saved = read_json(path) if path.is_file() else {}
    before = [saved.get("figures"), saved.get("answers")]
    if saved.get("sha256") != sha256_of(before):  # there is none, or it is damaged
        # The checkpoint is not loaded yet: the adapter is zero, the policy the base.
        before = finite(list(evaluate(run, held_out, "before")))
        if parallel.rank() == 0:
            write_json(path, {"figures": before[0], "answers": before[1],
                              "sha256": sha256_of(before), "cost": run.cost.so_far()})
    return tuple(before)


def describe(run: Run, batch: Batch) -> dict:
    """What the responses of a step were like, for metrics.jsonl."""
    groups = [batch.group(p) for p in range(len(batch.prompts))]
    distinct = [len({tuple(row) for row in group}) for group in groups]
    axes = {axis: {"mean": column.mean().item(), "std": column.std(correction=0).item()}
            for axis, column in zip(run.axes, batch.scores.unbind(1), strict=True)}
    gold = {}
    if "gold" in run.judges:  # R by the rubric, which the policy is not paid by
        scores = score_groups(run, run.judges["gold"], batch.prompts, batch.sampled)
        gold["R_gold"] = combine(scores, run.weights).mean().item()
    return {
        "R": batch.reward.mean().item(), **gold,
        "R_std": batch.reward.std(correction=0).item(), "axes": axes,
        "length": batch.sampled.mask.sum(1).float().mean().item(),
        "cut_off": 1 - batch.sampled.ended.float().mean().item(),
        "distinct": sum(distinct) / len(distinct),
        "tokens": int(batch.sampled.mask.sum()),
    }
