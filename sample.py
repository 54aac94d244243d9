"""Rollouts: G responses for each of P prompts, and their rows again for training.

Both halves of one contract stand here. The sampler draws the tokens; the trainer, which
computes log π again, needs the same rows:

* A response owns the tokens up to its end token, the end token included: `mask` (B, C)
  is True there. Masks come from lengths, never from token ids.
* `logp` (B, C) is the log-probability under the distribution that was really sampled:
  temperature and the limit of the vocabulary included. There is no top-p or top-k: a
  trainer that knows only π would disagree with a sampler that had cut its tail. What
  rounding leaves between the two is measured, and corrected ([E8]).
* Row b belongs to prompt p = b // G and is its response g = b % G.
* All randomness is drawn before decoding, one number a token (`draw_uniforms`), so that
  neither the rows that have ended nor the other prompts of a batch change a draw.

The order of the file: the sampler (`rollout`); a step's `Batch`, sampled and scored;
its rows for training (`group_micro_batches`); a chat for people.

    python sample.py "How do I stop my kitchen tap from dripping?"
    python sample.py --adapter runs/tiny              # asks for prompt after prompt

Shapes: P prompts, G responses a prompt, B = P·G rows, C response tokens, K axes, D
width; of a micro-batch: n rows, N response tokens.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import reward_model
from frozen import linear
from loading import TINY, Tokenizer, load, pick_device
from logprob import row_logprobs
from model import Cache, Qwen, micro_batches, pad_rows
from plumbing import parallel
from plumbing.files import one_line_errors, read_json, require, verify_checksums
from plumbing.options import option, parse_settings, with_defaults
from plumbing.paths import located
from reward_model import combine
from run import Prompt, Run

# ------------------------------------------------------------------------ the sampler


@dataclasses.dataclass(frozen=True)
class Rollout:
    """B = P·G sampled responses of at most C tokens."""

    tokens: Tensor  # (B, C) ids; 0 where mask is False
    mask: Tensor  # (B, C) bool: the tokens that the response owns
    logp: Tensor  # (B, C) fp32: log π of the sampled tokens; 0 where mask is False
    ended: Tensor  # (B,) bool: False for a response that the length limit cut off

    def responses(self, rows: slice = slice(None)) -> list[list[int]]:
        """The ids of each row (by default of all), the end token included."""
        lengths = self.mask[rows].sum(1).tolist()
        return [row[:n] for row, n in zip(self.tokens[rows].tolist(), lengths,
                                          strict=True)]


def draw_uniforms(seed: int, step: int, prompt: int, group_size: int,
                  length: int) -> Tensor:
    """All random numbers of a prompt's group at one step: (G, C) float64 in [0, 1)."""
    generator = np.random.Generator(np.random.Philox(
        np.random.SeedSequence([seed, step, prompt])))
    return torch.from_numpy(generator.random((group_size, length)))


BLOCK = 1024  # ids in a block of `sample_token`


def sample_token(logits: Tensor, temperature: float,
                 uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample by inverting the cumulative distribution, summed in float64.

    Args:
        logits: (n, V) over the valid vocabulary.
        temperature: 0 takes the likeliest token.
        uniform: (n,) in [0, 1).

    Returns:
        ids (n,) and their log-probabilities (n,).
    """
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    # id = the first i with Σ_{v ≤ i} exp z_v > u Σ_v exp z_v.
    # Running sums of 150,000 numbers need float64, and over the whole vocabulary would
    # take a sixth of a decoding step at 0.5B. So the draw falls into a block of ids
    # first, by the sums of blocks, and then onto an id of that block. The sum of one
    # block may be fp32: it is as exact as the exponentials are.
    padding = -logits.shape[1] % BLOCK
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = F.pad(logits, (0, padding), value=-math.inf).div_(temperature)
    top = z.amax(-1, keepdim=True)  # (n, 1)
    mass = z.sub_(top).exp_().unflatten(-1, (-1, BLOCK))  # (n, V / BLOCK, BLOCK)
    sums = mass.sum(-1).cumsum(-1, dtype=torch.float64)  # (n, V / BLOCK)
    target = uniform[:, None] * sums[:, -1:]  # (n, 1)
    block = first_above(sums, target)
    start, end = F.pad(sums, (1, 0)).gather(-1, block), sums.gather(-1, block)
    share = (target - start) / (end - start)  # (n, 1): of the block's mass, in [0, 1)
    rows = torch.arange(len(mass), device=mass.device)
    inside = mass[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)  # (n, BLOCK)
    ids = block * BLOCK + first_above(inside, share * inside[:, -1:])
    # NaN logits may choose an id of the padding; `rollout` refuses them at its end.
    ids.clamp_(max=logits.shape[1] - 1)
    chosen = logits.gather(-1, ids) / temperature - top
    return ids[:, 0], (chosen - sums[:, -1:].log())[:, 0].float()


def first_above(sums: Tensor, target: Tensor) -> Tensor:
    """The index at which running sums (n, m) first exceed target (n, 1): (n, 1).

    What lies there has a probability above 0. A target that rounding has carried up to
    the last sum counts as just below it.
    """
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    index = torch.searchsorted(sums, torch.minimum(target, below), right=True)
    return index.clamp(max=sums.shape[1] - 1)  # beyond the end only where sums are NaN


@torch.no_grad()
def rollout(
    model: Qwen,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    uniforms: Tensor,
    temperature: float = 1.0,
) -> Rollout:
    """Sample G responses for each prompt from the active adapter (`lora.using`).

    All prompts decode in one batch. Each is computed once and its keys and values are
    shared out to its G rows; rows that have ended leave the batch.

    Args:
        prompts: P lists of at least two ids, as `Tokenizer.chat` makes them.
        uniforms: (P, G, C), from `draw_uniforms`.

    Raises:
        UserError: a prompt and C tokens exceed the model's context, or the logits are
            not finite.
    """
    count, group_size, room = uniforms.shape
    longest, context = max(map(len, prompts)), model.config.max_position_embeddings
    require(longest + room <= context, f"a prompt of {longest} tokens and "
            f"{room} new ones exceed the context of {context}; shorten it")
    rows = count * group_size
    uniforms = uniforms.reshape(rows, room).to(model.device)
    tokens = torch.zeros(rows, room, dtype=torch.long, device=model.device)
    logp = torch.zeros(rows, room, device=model.device)
    length = torch.zeros(rows, dtype=torch.long, device=model.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=model.device)
    stops = torch.tensor(tokenizer.stop_ids, device=model.device)
    unembed = model.unembed[:tokenizer.valid]

    cache = model.prefill([p[:-1] for p in prompts]).for_decoding(group_size, room)
    # A prompt's last token comes in like a sampled one: what follows it is sampled.
    last = torch.tensor([p[-1] for p in prompts], device=model.device)
    last = last.repeat_interleave(group_size)
    active = torch.arange(rows, device=model.device)  # rows that have not ended
    for t in range(room):
        hidden = model(last[:, None], cache)[:, -1]  # (n, D)
        logits = linear(hidden, unembed)  # (n, V)
        last, chosen = sample_token(logits, temperature, uniforms[active, t])
        tokens[active, t], logp[active, t] = last, chosen
        stop = torch.isin(last, stops)
        # The end token belongs to the response. A row that goes on counts on.
        length[active], ended[active] = t + 1, stop
        # The one moment of a step at which the host waits for the device.
        going = [row for row, end in enumerate(stop.tolist()) if not end]
        if not going:
            break
        if len(going) < len(active):
            going = torch.tensor(going, device=model.device)
            active, last = active[going], last[going]
            cache.keep(going)
    require(bool(logp.isfinite().all()), "the model's logits are not finite; lower "
            "--lr, or raise --temperature")
    mask = torch.arange(room, device=model.device) < length[:, None]  # (B, C)
    used = int(length.max())
    return Rollout(tokens[:, :used], mask[:, :used], logp[:, :used], ended)


# ----------------------------------------------------------------- a step's responses


@dataclasses.dataclass
class Batch:
    """One step's responses: B = P·G rows, in the order of the rollout."""

    prompts: list[Prompt]
    sampled: Rollout
    scores: Tensor  # (B, K)
    reward: Tensor  # (B,)

    @property
    def group_size(self) -> int:
        """G of this batch: `rows` may have kept fewer than the run samples."""
        return len(self.reward) // len(self.prompts)

    def group(self, p: int) -> list[list[int]]:
        """The responses of prompt p."""
        return self.sampled.responses(
            slice(p * self.group_size, (p + 1) * self.group_size))

    def rows(self, chosen: Tensor) -> "Batch":
        """The batch of these rows only; the same number of each group, in order."""
        rollout = Rollout(*(getattr(self.sampled, field.name)[
            chosen.to(self.sampled.mask.device)]
            for field in dataclasses.fields(Rollout)))
        return Batch(self.prompts, rollout, self.scores[chosen], self.reward[chosen])


def sample_batch(run: Run, prompts: list[Prompt], step: int,
                 group_size: int) -> Rollout:
    """G responses to each prompt from the policy as it is now.

    With several processes each samples for its share of the prompts, and all know all.
    """
    s, own, sampled = run.settings, parallel.shard(prompts), None
    if own:
        uniforms = torch.stack([
            draw_uniforms(s.seed, step, prompt.index, group_size, s.max_new_tokens)
            for prompt in own])  # (P, G, C)
        with lora.using(run.model, "policy"):
            sampled = rollout(run.model, run.tokenizer, [prompt.ids for prompt in own],
                              uniforms, s.temperature)
    if parallel.size() == 1:
        return sampled
    return gather_rollout(sampled, len(prompts), group_size, s.max_new_tokens,
                          run.model.device)


def gather_rollout(own: Rollout | None, count: int, group_size: int, room: int,
                   device: torch.device) -> Rollout:
    """The rollout of `count` prompts, from each process's share (None: it has none)."""
    # A row is ids, log-probs, length, ended; float64 holds every one exactly.
    columns = [room, room, 1, 1]
    table = torch.zeros(0, group_size * sum(columns), dtype=torch.float64,
                        device=device)
    if own is not None:
        missing = (0, room - own.mask.shape[1])
        table = torch.cat([
            F.pad(own.tokens.double(), missing), F.pad(own.logp.double(), missing),
            own.mask.sum(1, keepdim=True).double(), own.ended[:, None].double(),
        ], 1).view(-1, table.shape[1])
    table = parallel.gather(table, count).view(-1, sum(columns))  # (B, 2 C + 2)
    tokens, logp, length, ended = table.split(columns, 1)
    used = int(length.max())
    mask = torch.arange(used, device=device) < length  # (B, C)
    return Rollout(tokens[:, :used].long(), mask, logp[:, :used].float(),
                   ended[:, 0].bool())


def score_batch(run: Run, prompts: list[Prompt], sampled: Rollout) -> Batch:
    """Scores and R of a rollout.

    Raises:
        UserError: a score is not finite.
    """
    scores = score_groups(run, run.score, prompts, sampled)  # (B, K)
    require(bool(scores.isfinite().all()), "the reward model gave a score that is not "
            "finite; retrain it")
    return Batch(prompts, sampled, scores, combine(scores, run.weights))


def score_groups(run: Run, score: Callable, prompts: list[Prompt],
                 sampled: Rollout) -> Tensor:
    """What a judge says of every response, (B, K); each process asks for its share."""
    rows, size = sampled.responses(), len(sampled.mask) // len(prompts)
    own = [score(prompts[p], rows[p * size:(p + 1) * size]).float()  # (G, K)
           for p in parallel.shard(range(len(prompts)))]
    scores = torch.stack(own) if own else torch.zeros(0, size, len(run.axes))
    scores = parallel.gather(scores.to(sampled.tokens.device), len(prompts))
    return scores.flatten(0, 1).cpu()


def sample_lines(run: Run, batch: Batch, advantage: Tensor, step: int) -> list[dict]:
    """Every response with its scores, R and advantage (B,), for samples.jsonl."""
    return [{
        "step": step, "prompt": batch.prompts[row // batch.group_size].text,
        "response": run.tokenizer.decode(ids),
        "scores": {axis: round(score, 4) for axis, score in
                   zip(run.axes, batch.scores[row].tolist(), strict=True)},
        "R": round(batch.reward[row].item(), 4),
        "advantage": round(advantage[row].item(), 4)}
        for row, ids in enumerate(batch.sampled.responses())]


# ------------------------------------------------------------ their rows for training


def response_hidden(model: Qwen, prompt: list[int], responses: list[list[int]],
                    prefix: Cache) -> tuple[Tensor, Tensor]:
    """Hidden states before every response token: (n, C, D), and mask (n, C).

    A row is the prompt's last token and the response without its last one: the state at
    the prompt's last token predicts the response's first, and the row's last state
    predicts the response's last: its end token, which is trained like any other.

    Args:
        prefix: keys and values of prompt[:-1], from `Qwen.shared_prefix`.
    """
    ids = [prompt[-1:] + r[:-1] for r in responses]
    ids = pad_rows(ids, model.device)  # (n, C)
    lengths = torch.tensor([len(r) for r in responses], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]  # (n, C)
    return model(ids, prefix), mask


def group_micro_batches(run: Run, batch: Batch,
                        p: int) -> Iterator[tuple[tuple, Tensor, Tensor]]:
    """The micro-batches of group p, computed with the active adapter.

    The prompt is computed once for all of them. Where gradients flow, the caller must
    run `backward` on each before it asks for the next: see `Qwen.shared_prefix`.

    Yields:
        index of these rows and their columns in a table (B, C): `table[index]` is
        (n, C); `response_hidden` of the rows (n, C, D); mask (n, C).
    """
    prompt, responses = batch.prompts[p].ids, batch.group(p)
    with run.model.shared_prefix(prompt) as prefix:
        for chosen in micro_batches([len(r) for r in responses]):
            hidden, mask = response_hidden(run.model, prompt,
                                           [responses[g] for g in chosen], prefix)
            rows = [p * batch.group_size + g for g in chosen]
            yield (rows, slice(0, mask.shape[1])), hidden, mask


def every_micro_batch(run: Run, batch: Batch, name: str | None) -> Iterator[tuple]:
    """`group_micro_batches` of all groups of this process, with adapter `name`."""
    with lora.using(run.model, name):
        for p in parallel.shard(range(len(batch.prompts))):
            yield from group_micro_batches(run, batch, p)


def log_probs(run: Run, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """log π (n, C) from hidden states (n, C, D) and the tokens (n, C) they predict."""
    return row_logprobs(hidden, run.model.unembed, tokens, mask,
                        run.settings.temperature, run.tokenizer.valid)


def sampler_is_trainer(model: Qwen) -> bool:
    """Whether decoding and a training pass give the same log π.

    In fp32 they differ by rounding alone, some 1e-6. In bf16 and fp16 they round
    differently, by some 1e-2, since they multiply in other shapes.
    """
    return model.unembed.dtype in (torch.float32, torch.float64)


@torch.no_grad()
def batch_logp(run: Run, batch: Batch, name: str | None) -> Tensor:
    """log π (B, C) of a batch's tokens with adapter `name`, by the trainer's pass."""
    logp = torch.zeros_like(batch.sampled.logp)
    for index, hidden, mask in every_micro_batch(run, batch, name):
        tokens = batch.sampled.tokens[index]
        logp[index] = log_probs(run, hidden, tokens, mask).to(logp)
    parallel.all_reduce(logp)
    return logp


def trainer_logp(run: Run, batch: Batch) -> Tensor:
    """log π_old (B, C) by the trainer's own pass, before the first update.

    Where sampler and trainer are one, the sampler has computed it already.
    """
    if sampler_is_trainer(run.model):
        return batch.sampled.logp
    return batch_logp(run, batch, "policy")


@torch.no_grad()
def reference_hidden(run: Run, batch: Batch, p: int) -> list[Tensor]:
    """The bare base's hidden states (N, D), a micro-batch each: the KL's reference.

    States and not log-probs: the exact KL needs the whole distribution, for which D
    numbers a token stand instead of V.
    """
    with lora.using(run.model, None):
        return [hidden[mask] for _, hidden, mask in group_micro_batches(run, batch, p)]


# ------------------------------------------------------------------- a chat for people


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python sample.py`."""

    prompt: str | None = option(None, "a question; without it you are asked",
                                positional=True, nargs="?")
    adapter: Path | None = option(None, "run folder of grpo.py (or its adapter folder)")
    model: str | None = option(None, "checkpoint folder or Hub name (default: the "
                               "run's, or the bundled tiny model)", unless=())
    reward: Path | None = option(None, "reward model folder (default: the run's)")
    any_base: bool = option(False, "take an adapter and a reward model that were "
                            "trained on other weights, such as a copy in fp16")
    max_new_tokens: int = option(128, "longest answer, in tokens", low=1)
    temperature: float = option(0.7, "0 always takes the likeliest token", low=0)
    seed: int = option(0, "seed of the sampling", low=0)
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)")


def run_of_adapter(settings: Settings) -> tuple[Path | None, dict]:
    """The adapter folder and what the run's config.json says, if there is one."""
    if settings.adapter is None:
        return None, {}
    require(settings.adapter.is_dir(), f"no such run folder: {settings.adapter}")
    inner = settings.adapter / "adapter"
    folder = inner if inner.is_dir() else settings.adapter
    path = folder.parent / "config.json"
    require(inner.is_dir() or not (folder / "config.json").is_file()
            or (folder / "adapter_config.json").is_file(), f"{folder} has no adapter: "
            "its run has not ended, or trains nothing (best_of_n)")
    if not path.is_file():
        return folder, {}
    verify_checksums(folder.parent)
    config = read_json(path)
    for name in ("model", "reward", "system"):
        require(config.get(name) is None or isinstance(config[name], str),
                f"{path}: {name} must be text")
    model, reward = (config.get(name) and located(config[name], folder.parent)
                     for name in ("model", "reward"))
    # A folder of somebody else's must not choose what is fetched from the Hub.
    require(settings.model or (model and os.path.isdir(model)),
            f"{folder} was trained on {config.get('model')}, which is no folder here; "
            "name it with --model")
    return folder, config | {"model": model, "reward": reward}


def main(argv: list[str] | None = None) -> None:
    """Print the base's answer, then the aligned one, each with its scores."""
    settings = with_defaults(
        parse_settings(Settings, "Chat with the base and its adapter.", argv), False)
    require(settings.reward is None or settings.reward.is_dir(),
            f"no such reward model folder: {settings.reward}")
    folder, config = run_of_adapter(settings)
    source = settings.model or config.get("model") or str(TINY)
    model, tokenizer = load(source, pick_device(settings.device))
    speakers = [("base", None)]
    if folder:
        lora.load(model, "policy", folder, settings.any_base)
        speakers.append(("aligned", "policy"))
    used = config.get("reward") or "gold"  # by the run; the gold rubric has no folder
    judge = settings.reward or (
        reward_model.own_folder(source, model) if used == "gold" else Path(used))
    scorer = (reward_model.load(model, judge, any_base=settings.any_base)
              if os.path.isdir(judge) else None)
    if scorer is None:
        print(f"there is no reward model at {judge}: answers get no scores; name it "
              "with --reward", file=sys.stderr)
    turn = 0
    for prompt in [settings.prompt] if settings.prompt is not None else ask():
        ids = tokenizer.chat(prompt, config.get("system"))
        table = draw_uniforms(settings.seed, turn, 0, 1, settings.max_new_tokens)[None]
        for title, name in speakers:
            with lora.using(model, name):
                sampled = rollout(model, tokenizer, [ids], table, settings.temperature)
            response = sampled.responses()[0]
            print(f"\n{title}: {tokenizer.decode(response).strip()}")
            if scorer:
                scores = scorer.score(tokenizer.chat(prompt), [response])[0].tolist()
                print("  " + "  ".join(f"{axis} {score:.2f}" for axis, score in
                                       zip(scorer.axes, scores, strict=True)))
        turn += 1


def ask():
    """Prompts from the keyboard until the end of input."""
    while True:
        try:
            prompt = input("\nyou: ")
        except (EOFError, RuntimeError):  # Python's word for a closed stdin
            print()
            return
        if prompt.strip():
            yield prompt


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
