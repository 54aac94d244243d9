"""A run: the settings that all methods share, its prompts, who scores, its folder.

A run begins with `prepare`, which loads or trains all that it needs, and with
`announce`, which writes down what it will do; `Log` keeps every step of the training;
`finish` writes what came of it. What a run reads is named by its SHA-256, so that it
resumes on the same or not at all.

A folder holds config.json, metrics.jsonl (a line a step), samples.jsonl (every response
with its scores, R and advantage), adapter/, summary.json and, last of all, SHA256SUMS.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import lora
import reward_model
from data import rubric
from loading import (
    SIZES,
    TINY,
    Tokenizer,
    base_name,
    fingerprint,
    is_tiny,
    load,
    pick_device,
    short_name,
)
from model import Qwen
from plumbing import machine, parallel
from plumbing.figures import Cost, format_seconds, format_table
from plumbing.files import (
    CHECKPOINT,
    CHECKSUMS,
    UserError,
    append,
    append_line,
    file_sha256,
    only_writer,
    read_json,
    require,
    write_checksums,
    write_json,
)
from plumbing.options import (
    as_saved,
    given_options,
    option,
    parse_settings,
    saved_settings,
    with_defaults,
)
from plumbing.resume import (
    CheckpointTimer,
    Stop,
    checkpoint_about,
    keep_lines,
    load_checkpoint,
    save_checkpoint,
)
from plumbing.rows import (
    HELD_OUT,
    notice,
    place_of,
    read_rows,
    require_apart,
    require_untemplated,
    same_text,
    split_of,
)

# Files of a run folder. The first evaluation is kept until the run is finished.
CONFIG, BEFORE = "config.json", "before.json"
LINES = ("metrics.jsonl", "samples.jsonl")  # written step by step
# What a run reads, and the option that says where it is.
INPUTS = {"base": "model", "prompts": "prompts", "reward model": "reward",
          "judge": "judge"}
DEAD_STEPS = 10  # after so many steps without a live group in a row, a note

# ----------------------------------------------------------------------- the settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of every method; a method's own settings extend and override them.

    The rates, temperatures and lengths of a real model are for a 0.5B on a CPU: why
    these stands in results/0.5b.
    """

    size: str = option("tiny", "tiny (bundled), or a Qwen2.5-Instruct on the Hub",
                       choices=[*SIZES])
    model: str | None = option(None, "checkpoint folder or Hub name, instead of --size",
                               unless=())
    weights: str = option("", "axis=weight,...; unnamed axes keep 1 (TRL: "
                          "reward_weights)")
    prompts: Path | None = option(None, "JSONL of prompts; \"split\": \"heldout\" rows "
                                  "(or test, validation, val, dev) are only for the "
                                  "evaluation")
    system: str | None = option(None, "system message of the policy's prompts "
                                "(default: the model's own)")
    reward: str | None = option(None, "reward model folder, or gold (tiny world only)",
                                unless=("gold",))
    judge: Path | None = option(None, "second reward model, trained on other prompts; "
                                "it judges before and after, the policy never sees it")
    steps: int = option(70, "optimisation steps (TRL: max_steps)", real=60, low=1)
    prompts_per_step: int = option(8, "P, prompts a step", real=2, low=1)
    group_size: int = option(8, "G, responses a prompt (TRL: num_generations)", low=2)
    max_new_tokens: int = option(64, "C, longest response (TRL: max_completion_length)",
                                 real=48, low=1)
    temperature: float = option(1.0, "of sampling and scoring alike (TRL: temperature)",
                                real=0.8, above=0)
    lr: float = option(4.5e-3, "AdamW's learning rate (TRL: learning_rate)",
                       real=4.5e-5, above=0)
    rank: int = option(8, "LoRA rank r; alpha is 2r (PEFT: r, lora_alpha)", real=16,
                       low=1)
    eval_prompts: int = option(128, "held-out prompts, before and after", real=96,
                               low=1)
    seed: int = option(0, "of adapter, prompts and sampling", low=0)
    out: Path | None = option(None, "run folder (default: the next free runs/NAME)")
    save_every: int | None = option(None, "steps from checkpoint to checkpoint "
                                    "(default: about every five minutes)", low=1)
    resume: Path | None = option(None, "run folder to go on with, by its own settings")
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)")
    dtype: str | None = option(None, "of the base weights (default: by the device)",
                               choices=["float32", "bfloat16"])

    def resolved(self) -> "Settings":
        """With the defaults that depend on the model and the machine.

        Raises:
            UserError: a number out of bounds, or a device that is not there.
        """
        source = self.model or SIZES[self.size]
        return with_defaults(
            dataclasses.replace(self, model=source, device=pick_device(self.device)),
            real=not is_tiny(source))


def read_settings(cls: type, description: str, argv: list[str] | None,
                  method: str) -> Settings:
    """Settings from the command line; with --resume, those of that run."""
    settings = parse_settings(cls, description, argv)
    if settings.resume:
        settings = settings_of(cls, settings.resume, argv, method)
    return settings.resolved()


def settings_of(cls: type, folder: Path, argv: list[str] | None,
                method: str) -> Settings:
    """The settings of a run that was interrupted; options typed now must agree.

    Files may have moved, with the folder or without: `announce` compares their SHA-256.
    """
    path, checkpoint = folder / CONFIG, folder / CHECKPOINT
    require(path.is_file(), f"{folder} holds no run to resume (no {CONFIG}); start it "
            "without --resume")
    require_unfinished(folder)
    if checkpoint.is_file():
        require(checkpoint_about(checkpoint).get(CONFIG) == file_sha256(path),
                f"{path} has changed since {checkpoint} was written; put the old one "
                "back, or start another run")
    saved = read_json(path)
    made_by = saved.get("method", "grpo")
    require(made_by == method, f"{folder} is a run of {made_by!r}, not of {method}; go "
            f"on with: {command_of(made_by)} --resume {folder}")
    given = given_options(cls, argv)
    del given["resume"]
    require(folder.resolve() == Path(given.pop("out", folder)).resolve(), f"{folder} "
            "is the run's folder; leave --out out, or start another run")
    s = saved_settings(cls, saved, given, path)
    for name in INPUTS.values():
        place = getattr(s, name)
        is_word = place is None or place == "gold" or (
            name == "model" and not os.path.isabs(place))  # a name on the Hub
        require(is_word or os.path.exists(place), f"{folder} was made with --{name} "
                f"{saved[name]}, which is not there; say where it is now: "
                f"{where_is(name)}")
    return dataclasses.replace(s, resume=folder, out=folder)


def where_is(name: str) -> str:
    """How to say where an input is: `--model DIR`."""
    return f"--{name} {'FILE' if name == 'prompts' else 'DIR'}"


def command_of(method: str) -> str:
    """The program that trains by this method."""
    return "python grpo.py" if method == "grpo" else f"python -m methods {method}"


# ------------------------------------------------------------------- prompts, scorers


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as text, as ids, and its number in its file (it seeds the sampling)."""

    text: str
    ids: list[int]
    index: int


@dataclasses.dataclass
class Run:
    """What every part of a run needs."""

    settings: Settings
    model: Qwen
    tokenizer: Tokenizer
    axes: list[str]
    weights: Tensor  # (K,)
    # (prompt, responses) → scores (n, K): the reward model, or the gold rubric
    score: Callable[[Prompt, list[list[int]]], Tensor]
    # those that only judge, by name: "judge" (--judge), "gold" (the rubric)
    judges: dict[str, Callable[[Prompt, list[list[int]]], Tensor]]
    folder: Path
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)  # name → SHA-256
    method: str = "grpo"
    trained: int = 0  # parameters that its optimiser moves
    cost: Cost = dataclasses.field(default_factory=Cost)


def prompts_path(s: Settings) -> Path:
    """The file of prompts: --prompts, or the bundled one that fits the base."""
    return s.prompts or (TINY if is_tiny(s.model) else TINY.parent) / "prompts.jsonl"


def read_prompt_rows(path: Path, tokenizer: Tokenizer) -> list[dict]:
    """Rows of prompts whose splits are known words, and whose sides share no prompt."""
    rows = read_rows(path, responses=False)
    require_untemplated(rows, tokenizer.control)
    for row in rows:
        require(split_of(row) in ("train", *HELD_OUT), f"{place_of(row)}: split is "
                f"{row.get('split')!r:.99}; known are train, and for the evaluation "
                f"{', '.join(HELD_OUT)}")
    require_apart(rows, lambda row: HELD_OUT[0] if split_of(row) in HELD_OUT else
                  "train", lambda row: (row.get("system"), same_text(row["prompt"])))
    others = [split_of(row) for row in rows if split_of(row) in HELD_OUT[1:]]
    if others:
        notice(f"{path}: rows of split {', '.join(sorted({*others}))} are held "
               f"out, as {HELD_OUT[0]} is: {len(others)}")
    if any("split" in row for row in rows) and {*map(split_of, rows)} == {"train"}:
        notice(f"{path}: no row is held out, so a fifth of the prompts is")
    return rows


def read_prompts(s: Settings, tokenizer: Tokenizer,
                 context: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of the file, as ids.

    A prompt keeps its number in the file, whatever the order it is drawn in: the number
    chooses its random numbers. Rows without a split are trained on; where no row is
    held out, a fifth of the texts is. A row's own system message comes before its
    prompt, as --system does.

    Raises:
        UserError: a prompt that leaves no room for an answer, or stands on both sides;
            an unknown split; two system messages; or too few prompts.
    """
    path = prompts_path(s)
    rows = read_prompt_rows(path, tokenizer)
    train_prompts, held_out = [], []
    for index, row in enumerate(rows):
        require(s.system is None or "system" not in row, f"{place_of(row)}: the row "
                "has a system message of its own, and --system is given; leave one out")
        ids = tokenizer.chat(row["prompt"], row.get("system", s.system))
        prompt = Prompt(row["prompt"], ids, index)
        need = len(prompt.ids) + s.max_new_tokens
        require(need <= context, f"{place_of(row)}: the prompt needs {need} tokens "
                f"with its answer, the context has {context}; shorten it")
        (held_out if split_of(row) in HELD_OUT else train_prompts).append(prompt)
    if not held_out:  # a file without splits: hold out a fifth
        random.Random(0).shuffle(train_prompts)
        texts = list(dict.fromkeys(same_text(p.text) for p in train_prompts))
        fifth = set(texts[:max(1, len(texts) // 5)])
        held_out = [p for p in train_prompts if same_text(p.text) in fifth]
        train_prompts = [p for p in train_prompts if same_text(p.text) not in fifth]
    require(len(train_prompts) >= s.prompts_per_step, f"{path} has "
            f"{len(train_prompts)} prompts to train on; --prompts-per-step asks for "
            f"{s.prompts_per_step}")
    # A fixed sample: seeds differ in training, not in what they are judged on.
    random.Random(0).shuffle(held_out)
    return train_prompts, held_out[:s.eval_prompts]


def gold_scorer(tokenizer: Tokenizer, prompts: list[Prompt],
                axes: list[str]) -> Callable | None:
    """The tiny world's rubric, if it knows every prompt and has these axes.

    Unlike a reward model it reads text: ids are decoded first, the end token left out.
    """
    if set(axes) != set(rubric.AXES) or not rubric.knows([p.text for p in prompts]):
        return None
    return lambda prompt, responses: torch.tensor(rubric.marks(
        prompt.text, [tokenizer.decode(r) for r in responses], axes))  # (n, K)


def learned_scorer(scorer: reward_model.RewardModel,
                   tokenizer: Tokenizer) -> Callable:
    """A reward model as a function of a prompt and responses.

    It reads every prompt as it did in its training, whatever --system tells the policy.
    """
    return lambda prompt, responses: scorer.score(
        tokenizer.chat(prompt.text), responses)


def find_reward_model(s: Settings, model: Qwen, tokenizer: Tokenizer
                      ) -> tuple[reward_model.RewardModel, Path]:
    """Load the reward model of this base, and its folder.

    Where none is named and there is none yet, it is trained first.
    """
    folder = Path(s.reward) if s.reward else reward_model.own_folder(s.model, model)
    require_another_judge(s, folder)
    if s.reward or (folder / "reward.json").is_file():
        return reward_model.load(model, folder), folder
    require(parallel.size() == 1, f"there is no reward model for {s.model} yet; train "
            "it first, in one process: python reward_model.py")
    print(f"there is no reward model for {s.model} yet: training one into {folder}")
    options = reward_model.Settings(model=s.model, device=s.device, dtype=s.dtype)
    with only_writer(folder):
        scorer = reward_model.train_reward_model(model, tokenizer, options.resolved(),
                                                 folder)
    require_another_judge(s, folder)  # now there is something to compare with
    for parameter in scorer.parameters():
        parameter.requires_grad_(False)
    return scorer, folder


def require_another_judge(s: Settings, reward: Path) -> None:
    """Refuse a --judge that is the reward model, or was trained as it was.

    Whoever is paid to please a reader cannot be judged by the same reader.
    """
    if s.judge is None:
        return
    need = "--judge needs a reward model of its own: python reward_model.py --split …"
    require(os.path.realpath(s.judge) != os.path.realpath(reward),
            f"{s.judge} is the reward model itself; {need}")
    if not all((folder / "reward.json").is_file() for folder in (s.judge, reward)):
        return
    weights = [[file_sha256(folder / name) for name in reward_model.FILES[1:3]]
               for folder in (s.judge, reward)]
    require(weights[0] != weights[1], f"{s.judge} is a copy of the reward model "
            f"{reward}; {need}")
    one, other = map(reward_model.origin_of, (s.judge, reward))
    if one is None or other is None:
        return
    known = 2 if one[2] and other[2] else 3  # the labels themselves, or their number
    if one[1] == other[1] and one[known] == other[known]:
        require(one[0] != other[0], f"{s.judge} was trained as {reward} was, on the "
                f"same labels, split and seed; {need}")
        notice(f"{s.judge} was trained on the same labels and split as {reward}, by "
               "another seed; it is no independent judge")


def prepare(s: Settings, method: str) -> tuple[Run, list[Prompt], list[Prompt]]:
    """Load or train all that a run needs: itself, its training and held-out prompts.

    The base is loaded once; reward model, judge and policy are adapters of it.
    """
    require_empty(s, s.out)
    model, tokenizer = load(s.model, s.device, s.dtype and getattr(torch, s.dtype))
    prompts, held_out = read_prompts(s, tokenizer, model.config.max_position_embeddings)
    if s.reward == "gold":
        axes = list(rubric.AXES)
        score = gold = gold_scorer(tokenizer, prompts + held_out, axes)
        require(gold is not None, "--reward gold: these prompts are not from the tiny "
                "world, for which alone there is a gold rubric")
    else:
        scorer, folder = find_reward_model(s, model, tokenizer)
        s = dataclasses.replace(s, reward=str(folder))
        axes, score = scorer.axes, learned_scorer(scorer, tokenizer)
        gold = gold_scorer(tokenizer, prompts + held_out, axes)
    judges = {"gold": gold} if gold else {}
    if s.judge:
        judge = reward_model.load(model, s.judge, "judge")
        require(judge.axes == axes, f"{s.judge} judges {', '.join(judge.axes)}; the "
                f"reward has {', '.join(axes)}")
        judges = {"judge": learned_scorer(judge, tokenizer)} | judges
    weights = reward_model.parse_weights(s.weights, axes)
    lora.attach(model, "policy", s.rank, 2 * s.rank, s.seed)
    s = dataclasses.replace(s, prompts=prompts_path(s))
    run = Run(s, model, tokenizer, axes, weights, score, judges, s.out,
              identify(s, model), method)
    return run, prompts, held_out


def identify(s: Settings, model: Qwen) -> dict[str, str]:
    """SHA-256 of everything that a run reads, by name.

    Of the base only a fingerprint: hashing 14B would take longer than loading it.
    """
    hashes = {"base": fingerprint(model), "prompts": file_sha256(prompts_path(s))}
    reward = None if s.reward in (None, "gold") else Path(s.reward)
    for name, folder in (("reward model", reward), ("judge", s.judge)):
        if folder is not None:
            shas = [file_sha256(folder / file) for file in reward_model.FILES]
            hashes[name] = hashlib.sha256("".join(shas).encode()).hexdigest()
    return hashes


# ----------------------------------------------------------------- a run's beginning


def free_folder(s: Settings, method: str) -> Path:
    """runs/NAME, or the first runs/NAME-2, -3 … that is free."""
    name, number = short_name(s.model).lower(), 1
    if method != "grpo":
        name = f"{method}-{name}"

    def folder() -> Path:
        return Path("runs") / (name if number == 1 else f"{name}-{number}")

    while folder().exists():
        number += 1
    # The first process decides: when another looks, the folder may be there already.
    chosen = torch.tensor(0 if parallel.rank() else number, device=s.device)
    parallel.all_reduce(chosen)
    number = int(chosen)
    return folder()


def require_empty(s: Settings, folder: Path) -> None:
    """A run starts in a folder without a run, whole or in parts."""
    names = (CONFIG, *LINES, CHECKPOINT, BEFORE)
    # The other processes of this run may look when the first has begun to write.
    require(bool(s.resume) or parallel.rank() > 0
            or not any((folder / name).exists() for name in names),
            f"{folder} holds a run already; choose another --out, or go on with it, if "
            f"it was interrupted: --resume {folder}")


def require_unfinished(folder: Path) -> None:
    """The checksums are a run's last file; what is left beside them is swept up."""
    if (folder / CHECKSUMS).exists():
        for name in (CHECKPOINT, BEFORE):
            (folder / name).unlink(missing_ok=True)
        raise UserError(f"{folder} is finished already; nothing is left to resume")


def earlier_cost(folder: Path | None) -> object:
    """What the processes before this one kept of the time of a run; None if nothing."""
    if folder is None:
        return None
    if (folder / CHECKPOINT).is_file():
        return checkpoint_about(folder / CHECKPOINT).get("cost")
    before = folder / BEFORE
    return read_json(before).get("cost") if before.is_file() else None


def announce(run: Run) -> None:
    """Say what will be done, and write it down as config.json.

    Raises:
        UserError: a run that is resumed was made with other inputs.
    """
    s, shares = run.settings, (run.weights / run.weights.sum()).tolist()
    print("R = " + " + ".join(f"{w:.2f} {a}" for w, a in
                              zip(shares, run.axes, strict=True)))
    training = (f"{s.steps} steps of {s.prompts_per_step} prompts × {s.group_size} "
                "responses") if s.steps else "no training"
    print(f"{training}; writing {run.folder}")
    path, config = run.folder / CONFIG, config_of(run)
    if parallel.rank():
        return
    if s.resume is None:
        write_json(path, config)
        return
    require_unfinished(run.folder)  # now that nobody else is writing here
    for name in (CONFIG, *LINES, CHECKPOINT, BEFORE, "summary.json"):
        for file in run.folder.glob(f".{name}.*"):  # of a process that was killed
            file.unlink()
    saved = read_json(path)
    inputs = saved.get("inputs")
    require(isinstance(inputs, dict), f"{path} lacks the SHA-256 of its inputs")
    changed = sorted(name for name in run.inputs.keys() | inputs.keys()
                     if inputs.get(name) != run.inputs.get(name))
    options = " ".join(where_is(INPUTS[name]) for name in changed if name in INPUTS)
    require(not changed, f"{run.folder} was made with another {', '.join(changed)}; "
            f"say where the old one is ({options}), or start another run")
    for name in ("torch", "threads", "processes"):
        if saved.get(name) != config[name]:
            machine.note(f"{name} was {saved.get(name)} and is {config[name]} now; the "
                         "rest of the run will round differently")


def config_of(run: Run) -> dict:
    """All settings of a run as they are used, its inputs, and where it runs.

    PyTorch's version and the numbers of threads and processes change how sums round,
    and with them, after some steps, what is sampled.
    """
    s = dataclasses.replace(run.settings, out=run.folder, resume=None)
    return as_saved(s, run.folder) | {
        "method": run.method, "axes": run.axes,
        "weights_used": (run.weights / run.weights.sum()).tolist(),
        "inputs": run.inputs,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
        "processes": parallel.size()}


# ---------------------------------------------------------------------- step by step


class Log:
    """What a training writes: lines, checkpoints, the progress bar.

    `with Log(run, total, optimizer, state) as log:` loads the folder's checkpoint, if
    there is one, and cuts the files of lines to it; `log.done` steps need not be done
    again. The training then calls `log.write` once a step.
    """

    def __init__(self, run: Run, total: int,
                 optimizer: torch.optim.Optimizer | None = None,
                 state: list[Tensor] = ()) -> None:
        """Take a training of `total` steps, which moves the optimiser's parameters.

        Args:
            state: what a checkpoint keeps, beside the optimiser's moments.
        """
        self.run, self.total, self.optimizer, self.state = run, total, optimizer, state
        self.path, self.done, self.dead = run.folder / CHECKPOINT, 0, 0
        # Lines of each of LINES. Not every step samples, so the steps do not tell.
        self.counts = [0, 0]
        self.timer = CheckpointTimer(run.settings.save_every)
        groups = optimizer.param_groups if optimizer else []
        run.trained = sum(p.numel() for group in groups for p in group["params"])

    def __enter__(self) -> "Log":
        self._restore()
        with contextlib.ExitStack() as stack:
            self.bar = stack.enter_context(tqdm(
                total=self.total, initial=min(self.done, self.total), unit="step",
                **parallel.progress(self.total)))
            self.stop = stack.enter_context(Stop())
            self.files = [stack.enter_context(append(self.run.folder / name))
                          for name in LINES]
            self._close = stack.pop_all().close
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, metrics: dict, samples: list[dict] = ()) -> bool:
        """Keep a step: its metrics, its responses; now and then a checkpoint.

        Returns:
            False when the run was asked to stop; a checkpoint is written.
        """
        # A signal may reach one process a step before the others.
        signals = torch.tensor(float(self.stop.asked), device=self.run.model.device)
        parallel.all_reduce(signals)
        asked, step = bool(signals), metrics["step"]
        if parallel.rank() == 0:
            for i, lines in enumerate(([metrics], samples)):
                for line in lines:
                    append_line(self.files[i], line)
                self.counts[i] += len(lines)
            if self.timer(step) or asked or step == self.total:
                self._save(step)
        self._show(metrics)
        return not asked

    def _save(self, step: int) -> None:
        # The lines first: a checkpoint must not know more than they do.
        for file in self.files:
            machine.sync(file.fileno())
        hashes = {name: file_sha256(self.run.folder / name)
                  for name in (CONFIG, *LINES)}
        save_checkpoint(self.path, self.state, self.optimizer,
                        {"step": step, "lines": self.counts, **hashes,
                         "cost": self.run.cost.so_far()})

    def _restore(self) -> None:
        # The first process may still be writing the checkpoint of a first half.
        parallel.all_reduce(torch.zeros(1, device=self.run.model.device))
        about = {}
        if self.optimizer and self.path.is_file():
            about = load_checkpoint(self.path, self.state, self.optimizer)
            self.done, self.counts = about.get("step"), about.get("lines")
            numbers = [self.done, *(self.counts if type(self.counts) is list else [])]
            require(len(numbers) == 3 and all(type(n) is int and n >= 0
                                              for n in numbers),
                    f"{self.path} is of step {self.done!r} with {self.counts!r} lines; "
                    "delete it to start the training again")
        if parallel.rank() == 0:
            for name, count in zip(LINES, self.counts, strict=True):
                keep_lines(self.run.folder / name, count, about.get(name))

    def _show(self, metrics: dict) -> None:
        """R, the axes, KL and speed (or the loss), beside the bar's own time left."""
        if "R" in metrics:
            figures = {"R": f"{metrics['R']:.3f}"}
            figures |= {a[:4]: f"{v['mean']:.2f}" for a, v in metrics["axes"].items()}
            if "kl" in metrics:
                figures["KL"] = f"{metrics['kl']:.3f}"
            figures["tok/s"] = f"{metrics['tokens'] / metrics['seconds']:.0f}"
        else:
            figures = {"loss": f"{metrics['loss']:.3f}"}
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update()
        self.dead = self.dead + 1 if metrics.get("dead_groups") == 1 else 0
        if self.dead == DEAD_STEPS and parallel.rank() == 0:
            self.bar.write(f"note: for {self.dead} steps every group was dead (its "
                           "scores agree within --min-std); nothing can be learnt from "
                           "that: raise --temperature or --group-size, or lower "
                           "--min-std", sys.stderr)


# ----------------------------------------------------------------------- a run's end


def save_policy(run: Run) -> None:
    """The adapter, in PEFT's layout."""
    if run.trained and parallel.rank() == 0:
        lora.save(run.model, "policy", run.folder / "adapter",
                  base_name(run.settings.model))


def finish(run: Run, held_out: list[Prompt], before: tuple, after: tuple) -> None:
    """Write summary.json and the checksums; then, when all is on disk, say so.

    Args:
        before, after: figures and answers, from `evaluate`.
    """
    if parallel.rank():
        return
    s = run.settings
    seconds, peak = run.cost.so_far().values()
    lines = (run.folder / LINES[0]).read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    write_json(run.folder / "summary.json", {
        "before": before[0], "after": after[0], "seconds": round(seconds, 1),
        "peak_rss_gb": round(peak, 2), "seed": s.seed,
        "training_seconds": round(sum(m["seconds"] for m in metrics), 1),
        "sampled_tokens": sum(m["tokens"] for m in metrics),
        "trained_tokens": sum(m["trained_tokens"] for m in metrics),
        "trained_parameters": run.trained,
        "held_out_prompts": len(held_out), "model": base_name(s.model),
        "answers": [{"prompt": p.text, "before": b, "after": a} for p, b, a in
                    zip(held_out, before[1], after[1], strict=True)]})
    # The checksums come last: a folder that has them is finished.
    write_checksums(run.folder, [CONFIG, *LINES, "summary.json"])
    for name in (CHECKPOINT, BEFORE):
        (run.folder / name).unlink(missing_ok=True)
    print_report(run, held_out, before, after)
    saved = f"adapter in {run.folder / 'adapter'} (PEFT format)" if run.trained else (
        "nothing was trained")
    print(f"\n{format_seconds(seconds)}, peak {peak:.2f} GB; {saved}")


def figure(value: float | None) -> str:
    """Two decimals; what is beyond a float has none."""
    return "beyond any number" if value is None else f"{value:.2f}"


def print_report(run: Run, held_out: list[Prompt], before: tuple,
                 after: tuple) -> None:
    """The table and three pairs of answers, drawn by the seed."""
    rows = []
    for who in ("reward_model", "judge", "gold"):
        if who in before[0]:
            rows += [[f"{who} {axis}", old, after[0][who][axis],
                      f"{after[0][who][axis] - old:+.3f}"]
                     for axis, old in before[0][who].items()]
    print(f"\n{len(held_out)} held-out prompts, mean score before and after")
    print(format_table(["scored by, axis", "before", "after", "change"], rows))
    how = "at most" if "kl_is_a_bound" in after[0] else "exactly"
    print(f"KL to the base: {how} {after[0]['kl']:.3f} nats a token; under the base, "
          f"perplexity {figure(before[0]['base_perplexity'])} → "
          f"{figure(after[0]['base_perplexity'])}; distinct 3-grams "
          f"{before[0]['distinct_3_grams']:.2f} → {after[0]['distinct_3_grams']:.2f}")
    for i in random.Random(run.settings.seed).sample(range(len(held_out)),
                                                     min(3, len(held_out))):
        print(f"\nprompt: {held_out[i].text}\nbefore: {before[1][i]}\n"
              f"after:  {after[1][i]}")
