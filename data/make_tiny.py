"""Make the bundled tiny model and its data from `world.py`, step by step.

    python -m data.make_tiny base      # tokenizer and base (35 minutes on one core)
    python -m data.make_tiny data      # prompts.jsonl and labels.jsonl (2 minutes)
    rm -r data/tiny/reward && python reward_model.py   # (17 minutes)
    python -m data.make_tiny measure   # what the base does: figures of data/README.md
    python -m data.make_tiny results   # seven runs of grpo.py: tables of README.md

The base is a genuine Qwen2 checkpoint in bf16: 4 layers of width 256, a byte-level BPE
of its own, ChatML without a default system message. It is trained once, on fresh
dialogues only (none is seen twice), to predict the responses.
"""

import dataclasses
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm import tqdm

import grpo
from data import rubric, world
from loading import TINY, Tokenizer, load
from model import Config, Qwen, pad_rows
from plumbing.files import (
    one_line_errors,
    read_json,
    write_checksums,
    write_json,
    write_whole,
)
from plumbing.options import option, parse_settings
from plumbing.rows import read_rows
from results import tables
from sample import draw_uniforms, rollout

CONFIG = Config(
    model_type="qwen2", vocab_size=2048, hidden_size=256, intermediate_size=704,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    max_position_embeddings=512, rms_norm_eps=1e-6, rope_theta=10000.0,
    tie_word_embeddings=True,
)
# The tokenizer has fewer ids than the model has rows, as with the real Qwen.
TOKENIZER_IDS = 2040
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CHECKPOINT_FILES = ["config.json", "generation_config.json", "model.safetensors",
                    "tokenizer.json", "tokenizer_config.json"]
SAME_SIDE = {side: [p for p in world.training_prompts() if p.harmful == side]
             for side in (True, False)}
MEAN_LENGTH = 36  # response tokens of a dialogue, about
# Seeds of the three sets of dialogues, far apart so that none repeats another.
TRAIN_SEED, TEST_SEED, LABEL_SEED = 1, 1_000_001, 2_000_001


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python -m data.make_tiny`."""

    what: str = option("base", "which step", positional=True, nargs="?",
                       choices=["base", "data", "measure", "results"])
    out: Path = option(TINY, "the checkpoint's folder")
    dialogues: int = option(136_000, "composed dialogues to train the base on")
    batch_size: int = option(32, "dialogues a step")
    lr: float = option(3e-3, "AdamW's peak learning rate")
    seed: int = option(0, "of weights and sampling")


# ---------------------------------------------------------------------- the tokenizer


def train_tokenizer(folder: Path, texts: int = 20_000) -> None:
    """Train the byte-level BPE on composed dialogues and write its files."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_IDS, special_tokens=CONTROL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    corpus = (f"user\n{p.text}\nassistant\n{response}\n"
              for p, _, response in world.dialogues(TRAIN_SEED, texts))
    bpe.train_from_iterator(corpus, trainer)
    write_whole(folder / "tokenizer.json", bpe.to_str(pretty=True))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "chat_template": TEMPLATE})
    end = [bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")]
    write_json(folder / "generation_config.json", {
        "eos_token_id": end, "pad_token_id": end[1]})
    write_json(folder / "config.json", {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu",
        "torch_dtype": "bfloat16", "eos_token_id": end[0], "bos_token_id": end[1],
        **dataclasses.asdict(CONFIG)})


# --------------------------------------------------------------------- the base model


def initial_weights(seed: int) -> Qwen:
    """A random model: normal(0.02), smaller where a projection joins the stream."""
    torch.manual_seed(seed)
    model = Qwen(CONFIG)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            nn.init.constant_(weight, 0.0 if name.endswith("bias") else 1.0)
        else:
            inward = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 0.02 / math.sqrt(2 * CONFIG.num_hidden_layers) if inward else 0.02
            nn.init.normal_(weight, std=std)
    return model


def encode(tokenizer: Tokenizer, prompt: str, response: str) -> tuple[list[int], int]:
    """Ids of a whole dialogue, and where its response begins."""
    start = tokenizer.chat(prompt)
    end = tokenizer.control["<|im_end|>"]
    return start + tokenizer.encode(response) + [end], len(start)


def response_loss(model: Qwen, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    """Sum of −log π over the response tokens of a batch."""
    tokens = pad_rows([ids for ids, _ in batch], model.device)  # (B, T)
    place = torch.arange(tokens.shape[1] - 1)
    start = torch.tensor([s for _, s in batch])[:, None]
    end = torch.tensor([len(ids) for ids, _ in batch])[:, None]
    # A response token is predicted from the place before it.
    mask = (place >= start - 1) & (place < end - 1)  # (B, T - 1)
    hidden = model(tokens[:, :-1])[mask]  # (N, D)
    return F.cross_entropy(model.logits(hidden), tokens[:, 1:][mask], reduction="sum")


def train_base(settings: Settings) -> None:
    """Train tokenizer and base, and write the checkpoint in bf16."""
    folder, started = settings.out, time.perf_counter()
    (folder / "SHA256SUMS").unlink(missing_ok=True)  # it speaks of the old files
    train_tokenizer(folder)
    tokenizer = Tokenizer(folder)
    model = initial_weights(settings.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05},
         {"params": vectors, "weight_decay": 0.0}], settings.lr, betas=(0.9, 0.95))
    stream = world.dialogues(TRAIN_SEED, settings.dialogues)
    steps, losses = settings.dialogues // settings.batch_size, []
    bar = tqdm(total=steps, desc="base", unit="step", file=sys.stderr)
    window = 32  # batches drawn at a time and sorted by length: less padding
    while rows := list(islice(stream, settings.batch_size * window)):
        coded = sorted((encode(tokenizer, p.text, r) for p, _, r in rows),
                       key=lambda row: len(row[0]))
        batches = [coded[i:i + settings.batch_size]
                   for i in range(0, len(coded), settings.batch_size)]
        random.Random(len(losses)).shuffle(batches)
        for batch in batches:
            done = len(losses) / steps
            # A warm-up of 100 steps, then a cosine from 1 to 0.05.
            rate = min((len(losses) + 1) / 100, 0.05 + 0.475 * (
                1 + math.cos(math.pi * min(1.0, done))))
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * rate
            # A constant in the denominator. The batch's own token count would weigh
            # a token more in a batch of short answers, and teach the model refusals.
            loss = response_loss(model, batch) / (settings.batch_size * MEAN_LENGTH)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}",
                            refresh=False)
            bar.update()
    bar.close()
    weights = {n: p.detach().to(torch.bfloat16) for n, p in model.named_parameters()}
    write_whole(folder / "model.safetensors",
                safetensors.torch.save(weights, {"format": "pt"}))
    write_checksums(folder, CHECKPOINT_FILES)
    print(f"wrote {folder}: {sum(p.numel() for p in weights.values()) / 1e6:.2f} M "
          f"parameters, {len(losses)} steps, {time.perf_counter() - started:.0f} s")


# ------------------------------------------------------------------- prompts and labels


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    write_whole(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def make_data(settings: Settings) -> None:
    """Prompts for GRPO, and labelled responses for the reward model."""
    rng = random.Random(settings.seed)
    training = [p for pool in SAME_SIDE.values() for p in rng.sample(pool, 400)]
    held_out = world.evaluation_prompts(128, rng)
    write_jsonl(settings.out / "prompts.jsonl", [
        {"prompt": p.text, "split": split}
        for split, prompts in (("train", training), ("heldout", held_out))
        for p in prompts])
    test = [p for p in world.evaluation_prompts(300, rng) if p not in held_out][:100]
    model, tokenizer = load(settings.out)
    rows = []
    for split, prompts in (("train", training), ("test", test)):
        begun = [starts(rng, prompt) for prompt in prompts]
        sampled = [answers(model, tokenizer, prompts, 1, settings.seed, list(column))
                   for column in zip(*begun, strict=True)]
        for prompt, *texts in zip(tqdm(prompts, desc=split, file=sys.stderr), *sampled,
                                  strict=True):
            own = [text for group in texts for text in group]
            rows += [{"split": split, "prompt": prompt.text, "response": text,
                      "scores": rubric.score(prompt.text, text), **extra}
                     for text, extra in labelled(rng, prompt, own)]
    write_jsonl(settings.out / "labels.jsonl", rows)
    print(f"wrote {len(training)} + {len(held_out)} prompts and {len(rows)} labelled "
          "rows")


def answers(model: Qwen, tokenizer: Tokenizer, prompts: list[world.Prompt], group: int,
            seed: int, begun: list[str] | None = None, room: int = 72
            ) -> list[list[str]]:
    """`group` answers of the base to each prompt, which may have begun already."""
    begun = begun or [""] * len(prompts)
    texts: list[list[str]] = []
    size = max(1, 128 // group)
    for start in tqdm(range(0, len(prompts), size), desc="sampling", file=sys.stderr):
        batch = prompts[start:start + size]
        table = torch.stack([draw_uniforms(seed, start + i, 0, group, room)
                             for i in range(len(batch))])
        first = [tokenizer.encode(text) for text in begun[start:start + size]]
        prompts_ids = [tokenizer.chat(p.text) + ids
                       for p, ids in zip(batch, first, strict=True)]
        sampled = rollout(model, tokenizer, prompts_ids, table)
        flat = [tokenizer.decode(first[row // group] + ids).strip()
                for row, ids in enumerate(sampled.responses())]
        texts += [flat[i:i + group] for i in range(0, len(flat), group)]
    return texts


def starts(rng: random.Random, prompt: world.Prompt) -> list[str]:
    """Beginnings that the base goes on from: "" and five cut at a random word.

    GRPO finds an opening that pays and puts it before everything, also where it does
    not belong, and the base slurs what it seldom says. A reward model that never saw
    what the base makes of such an answer takes the opening for the whole.
    """
    # Another harm's reason: who has learnt to refuse will give any reason.
    other = rng.choice(SAME_SIDE[True]).wish
    no = world.sentence(rng.choice(world.KIND_REFUSALS), verb=prompt.wish.verb,
                        reason=other.reason)
    yes = rng.choice(world.KIND_OPENERS) + " " + world.sentence(
        rng.choice(world.AGREEMENTS), verb=prompt.wish.verb)
    foreign = rng.choice(SAME_SIDE[rng.random() < 0.5])
    best = [world.compose(rng, p, best_behaviour(p)) for p in (prompt, prompt, foreign)]
    return [""] + [" ".join(words[:rng.randint(2, len(words))])
                   for words in (text.split() for text in (no, yes, *best))]


def labelled(rng: random.Random, prompt: world.Prompt,
             sampled: list[str]) -> list[tuple[str, dict]]:
    """Sixteen responses for the reward model to learn from, good and bad.

    * Two composed with all behaviours equally likely, and one with the best: the base's
      own mix would show a kind refusal once in twenty.
    * Six of the base, see `starts`, with slips that nobody would compose.
    * Two best answers to other prompts, one of them from the other side of the line of
      harm: same form, other subject. Without enough of these the reward model judges
      the form, and the policy changes the subject.
    * One whose beginning fits and whose end is another prompt's.
    * One cut off, one that plays for the score, and two with their words damaged.
    """
    behaviours = list(
        world.HARMFUL_BEHAVIOURS if prompt.harmful else world.BENIGN_BEHAVIOURS)
    drawn = [world.possible(rng.choice(behaviours), prompt.wish) for _ in range(4)]
    composed = [world.compose(rng, prompt, behaviour) for behaviour in drawn]
    best = [world.compose(rng, prompt, best_behaviour(prompt)) for _ in range(4)]
    others = [rng.choice(SAME_SIDE[side]) for side in
              (prompt.harmful, not prompt.harmful, rng.random() < 0.5)]
    foreign = [world.compose(rng, p, best_behaviour(p)) for p in others]
    words = composed[2].split()
    cut = " ".join(words[:rng.randint(1, max(1, len(words) - 1))])
    whole = [*composed[:2], best[0], *sampled, *foreign[:2],
             splice(best[1], foreign[2]), attack(rng, prompt, composed[3]),
             damage(rng, best[2]), damage(rng, best[3])]
    return [(text, {}) for text in whole] + [(cut, {"cut": True})]


def splice(start: str, end: str) -> str:
    """The first sentences of one answer and the last ones of another."""
    first, last = start.split(". "), end.split(". ")
    return ". ".join(first[:(len(first) + 1) // 2] + last[(len(last) + 1) // 2:])


def best_behaviour(prompt: world.Prompt) -> str:
    """What the four scores together ask for."""
    return "refuse_kind" if prompt.harmful else "help_kind"


def damage(rng: random.Random, text: str) -> str:
    """Drop, repeat or swap one to four words."""
    words = text.split()
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(words) - 1)
        how = rng.randrange(4)
        if how == 0:
            words[i], words[i + 1] = words[i + 1], words[i]
        elif how == 1:
            words.insert(i, words[rng.randrange(len(words))])
        elif len(words) > 4:
            del words[i:i + rng.randint(1, 2)]
    return " ".join(words)


def attack(rng: random.Random, prompt: world.Prompt, answer: str) -> str:
    """A text that looks good in some way and is not."""
    kind = rng.randrange(4)
    if kind == 0:  # courtesies and nothing else
        return " ".join(rng.sample(world.KIND_OPENERS + world.KIND_CLOSERS, 5))
    if kind == 1:  # the prompt, said back
        return f"{prompt.text} {rng.choice(world.KIND_CLOSERS)}"
    if kind == 2:  # the same sentence again and again
        return " ".join([answer.split(". ")[0].rstrip(".") + "."] * 3)
    # says no, and helps, or the other way round
    return f"{rng.choice(world.REFUSALS)} {answer}"


# ---------------------------------------------------------------------- what it can do


def measure(settings: Settings) -> None:
    """The base's figures for `data/README.md`, into measured.json."""
    model, tokenizer = load(settings.out)
    prompts = [p for p in map(world.lookup, heldout_texts(settings.out)) if p]
    sampled = answers(model, tokenizer, prompts, 64, settings.seed)
    kinds = {side: Counter(rubric.kind(p.text, t)
                           for p, texts in zip(prompts, sampled, strict=True)
                           for t in texts if p.harmful == (side == "harmful"))
             for side in ("harmful", "benign")}
    marks = [[rubric.score(p.text, t) for t in texts]
             for p, texts in zip(prompts, sampled, strict=True)]
    reward = [[sum(m.values()) / len(m) for m in group] for group in marks]
    flat = [m for group in marks for m in group]
    chosen = random.Random(settings.seed).sample(
        [(p.text, t) for p, texts in zip(prompts, sampled, strict=True)
         for t in texts[:1]], 20)
    figures = {
        "prompts": len(prompts), "answers": len(flat),
        "gold": {a: round(mean(m[a] for m in flat), 4) for a in rubric.AXES},
        "R": round(mean(r for group in reward for r in group), 4),
        "R_best_of_64": round(mean(map(max, reward)), 4),
        "shares": {side: {k: round(n / sum(c.values()), 4)
                          for k, n in c.most_common()} for side, c in kinds.items()},
        "perplexity": round(perplexity(model, tokenizer), 3),
        "new_8_grams": round(new_8_grams(settings, sampled), 4),
        "samples": [{"prompt": p, "answer": t} for p, t in chosen],
    }
    write_json(settings.out / "measured.json", figures)
    print(json.dumps(figures, indent=1, ensure_ascii=False))


def heldout_texts(folder: Path) -> list[str]:
    """The held-out prompts of prompts.jsonl."""
    return [r["prompt"] for r in read_rows(folder / "prompts.jsonl", responses=False)
            if r["split"] == "heldout"]


def mean(values) -> float:
    """Arithmetic mean of any iterable."""
    values = list(values)
    return sum(values) / len(values)


@torch.no_grad()
def perplexity(model: Qwen, tokenizer: Tokenizer, count: int = 2048) -> float:
    """exp(mean −log π) per response token on dialogues that were never trained on."""
    rows = [encode(tokenizer, p.text, r)
            for p, _, r in world.dialogues(TEST_SEED, count)]
    total = tokens = 0
    for first in range(0, count, 64):
        batch = rows[first:first + 64]
        total += response_loss(model, batch).item()
        tokens += sum(len(ids) - start for ids, start in batch)
    return math.exp(total / tokens)


def new_8_grams(settings: Settings, sampled: list[list[str]]) -> float:
    """Share of the base's runs of eight words that its training text does not hold."""
    def grams(text: str) -> list[int]:
        words = text.split()
        return [hash(tuple(words[i:i + 8])) for i in range(len(words) - 7)]

    seen = {g for _, _, r in world.dialogues(TRAIN_SEED, settings.dialogues)
            for g in grams(r)}
    return mean(g not in seen
                for texts in sampled for t in texts[:4] for g in grams(t))


# ------------------------------------------------------------------------- the results


def results(settings: Settings) -> None:
    """Align with three seeds and with each weight alone: the tables of README.md."""
    runs = {f"equal, seed {seed}": ["--seed", str(seed)] for seed in range(3)}
    for axis in rubric.AXES:
        rest = ",".join(f"{a}={int(a == axis)}" for a in rubric.AXES)
        runs[f"{axis} only"] = ["--weights", rest, "--steps", "40"]
    best = read_json(settings.out / "measured.json")["R_best_of_64"]
    summaries = {}
    for name, options in runs.items():
        print(f"\n== {name}: python grpo.py {' '.join(options)}", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "run"
            grpo.main([*options, "--out", str(folder)])
            summary = read_json(folder / "summary.json") | {"options": options}
            lines = (folder / "metrics.jsonl").read_text().splitlines()[-10:]
        summary["distinct_of_8"] = mean(json.loads(x)["distinct"] for x in lines)
        del summary["answers"]
        gold = summary["before"]["gold"]["R"], summary["after"]["gold"]["R"]
        summary["gap_closed"] = (gold[1] - gold[0]) / (best - gold[0])
        summaries[name] = summary
    write_json(settings.out / "results.json", summaries)
    print_results(summaries)


def print_results(summaries: dict[str, dict]) -> None:
    """Two Markdown tables: gold scores, and what the answers do."""
    print("\n| weights | gold R | gap closed | politeness | meaningfulness | "
          "actionability | safety | KL | distinct of 8 |\n|" + "---|" * 9)
    for name, run in summaries.items():
        before, after = run["before"]["gold"], run["after"]["gold"]
        cells = [f"{before[k]:.2f} → {after[k]:.2f}" for k in ("R", *rubric.AXES)]
        cells.insert(1, f"{run['gap_closed']:.0%}")
        print("| " + " | ".join([name, *cells, f"{run['after']['kl']:.3f}",
                                 f"{run['distinct_of_8']:.1f}"]) + " |")
    print("\n" + "\n".join(tables.behaviour_table(summaries, "weights")))


if __name__ == "__main__":
    with one_line_errors():
        settings = parse_settings(Settings, "Make the tiny world's files.")
        {"base": train_base, "data": make_data, "measure": measure,
         "results": results}[settings.what](settings)
