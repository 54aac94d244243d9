"""Rollouts: G responses for each of P prompts. And a chat for people.

The contract between the sampler and the trainer, which computes log π again:

* A response owns the tokens up to its end token, the end token included: `mask` (B, C)
  is True there. Masks come from lengths, never from token ids.
* `logp` (B, C) is the log-probability under the distribution that was really sampled:
  temperature and the limit of the vocabulary included. There is no top-p or top-k: a
  trainer that knows only π would disagree with a sampler that had cut its tail.
* Row b belongs to prompt p = b // G and is its response g = b % G.
* All randomness is drawn before decoding, one number a token (`draw_uniforms`), so that
  neither the rows that have ended nor the other prompts of a batch change a draw.

    python sample.py "How do I stop my kitchen tap from dripping?"
    python sample.py --adapter runs/tiny              # asks for prompt after prompt
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import lora
from model import TINY, Qwen, Tokenizer, linear, load, pick_device
from run import (
    one_line_errors,
    option,
    parse_settings,
    read_json,
    require,
    verify_checksums,
)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """B = P·G sampled responses of at most C tokens."""

    tokens: Tensor  # (B, C) ids; 0 where mask is False
    mask: Tensor  # (B, C) bool: the tokens that the response owns
    logp: Tensor  # (B, C) fp32: log π of the sampled tokens; 0 where mask is False
    ended: Tensor  # (B,) bool: False for a response that the length limit cut off

    def responses(self) -> list[list[int]]:
        """The ids of each row, the end token included."""
        lengths = self.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths, strict=True)]


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
    gap = -logits.shape[1] % BLOCK
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = F.pad(wide, (0, gap), value=-math.inf).div_(temperature)
    top = z.amax(-1, keepdim=True)  # (n, 1)
    mass = z.sub_(top).exp_().unflatten(-1, (-1, BLOCK))  # (n, V / BLOCK, BLOCK)
    sums = mass.sum(-1).cumsum(-1, dtype=torch.float64)  # (n, V / BLOCK)
    target = uniform[:, None] * sums[:, -1:]  # (n, 1)
    block = first_above(sums, target)
    start, end = F.pad(sums, (1, 0)).gather(-1, block), sums.gather(-1, block)
    way = (target - start) / (end - start)  # (n, 1): how far into the block, in [0, 1)
    rows = torch.arange(len(mass), device=mass.device)
    inside = mass[rows, block[:, 0]].cumsum(-1, dtype=torch.float64)  # (n, BLOCK)
    ids = block * BLOCK + first_above(inside, way * inside[:, -1:])
    ids.clamp_(max=logits.shape[1] - 1)  # NaN again: `rollout` refuses it at its end
    chosen = wide.gather(-1, ids) / temperature - top
    return ids[:, 0], (chosen - sums[:, -1:].log())[:, 0].float()


def first_above(sums: Tensor, target: Tensor) -> Tensor:
    """Where running sums (n, m) first exceed target (n, 1): (n, 1).

    What lies there has a probability above 0. A target that rounding has carried up to
    the last sum counts as just below it.
    """
    below = torch.nextafter(sums[:, -1:], torch.zeros_like(target))
    found = torch.searchsorted(sums, torch.minimum(target, below), right=True)
    return found.clamp(max=sums.shape[1] - 1)  # beyond the end only where sums are NaN


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
    length = torch.full((rows,), room, device=model.device)
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
        if stop.any():
            # The end token belongs to the response: its length is t + 1.
            length[active[stop]], ended[active[stop]] = t + 1, True
            going = (~stop).nonzero()[:, 0]
            if not len(going):
                break
            active, last = active[going], last[going]
            cache.keep(going)
    require(bool(logp.isfinite().all()), "the model's logits are not finite; lower "
            "--lr, or raise --temperature")
    mask = torch.arange(room, device=model.device) < length[:, None]  # (B, C)
    used = int(length.max())
    return Rollout(tokens[:, :used], mask[:, :used], logp[:, :used], ended)


# ------------------------------------------------------------------- a chat for people


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python sample.py`."""

    prompt: str | None = option(None, "a question; without it you are asked",
                                positional=True, nargs="?")
    adapter: Path | None = option(None, "run folder of grpo.py (or its adapter folder)")
    model: str | None = option(None, "checkpoint folder or Hub name (default: the "
                               "run's, or the bundled tiny model)")
    reward: Path | None = option(None, "reward model folder (default: the run's)")
    max_new_tokens: int = option(128, "longest answer, in tokens")
    temperature: float = option(0.7, "0 always takes the likeliest token")
    seed: int = option(0, "seed of the sampling")
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)")


def find_run(settings: Settings) -> tuple[Path | None, dict]:
    """The adapter folder and what the run's config.json says, if there is one."""
    if settings.adapter is None:
        return None, {}
    require(settings.adapter.is_dir(), f"no such run folder: {settings.adapter}")
    inner = settings.adapter / "adapter"
    folder = inner if inner.is_dir() else settings.adapter
    path = folder.parent / "config.json"
    if not path.is_file():
        return folder, {}
    verify_checksums(folder.parent)
    config = read_json(path)
    for name in ("model", "reward", "system"):
        require(config.get(name) is None or isinstance(config[name], str),
                f"{path}: {name} must be text")
    # A folder of somebody else's must not choose what is fetched from the Hub.
    model = config.get("model")
    require(settings.model or (model and Path(model).is_dir()),
            f"{folder} was trained on {model}, which is no folder here; name it with "
            "--model")
    return folder, config


def main(argv: list[str] | None = None) -> None:
    """Print the base's answer, then the aligned one, each with its scores."""
    import reward_model  # it imports nothing from here; only people need it

    settings = parse_settings(Settings, "Chat with the base and its adapter.", argv)
    require(settings.max_new_tokens > 0, "--max-new-tokens must be at least 1")
    require(settings.temperature >= 0, "--temperature must not be negative")
    require(settings.seed >= 0, "--seed must not be negative")
    require(settings.reward is None or settings.reward.is_dir(),
            f"no such reward model folder: {settings.reward}")
    folder, run = find_run(settings)
    source = settings.model or run.get("model") or str(TINY)
    model, tokenizer = load(source, pick_device(settings.device))
    speakers = [("base", None)]
    if folder:
        lora.load(model, "policy", folder)
        speakers.append(("aligned", "policy"))
    used = run.get("reward") or "gold"  # by the run; the gold rubric has no folder
    judge = settings.reward or (
        reward_model.default_folder(source) if used == "gold" else Path(used))
    scorer = reward_model.load(model, judge) if judge.is_dir() else None
    if scorer is None:
        print(f"there is no reward model at {judge}: answers get no scores",
              file=sys.stderr)
    turn = 0
    for prompt in [settings.prompt] if settings.prompt is not None else ask():
        ids = tokenizer.chat(prompt, run.get("system"))
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
        except EOFError:
            print()
            return
        if prompt.strip():
            yield prompt


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
