"""Methods beside each other: `python -m methods compare`, `ablate` and `search`.

Every program runs with every seed in a process of its own; the tables are made from
their summaries (`results/tables.py`). What came out stands in results/methods.

    python -m methods compare --seeds 0,1,2     # the methods, each at its best setting
    python -m methods ablate --seeds 0,1        # GRPO taken apart, and a long run
    python -m methods search --seeds 0          # settings of each method
"""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import grpo
from data import rubric, world
from loading import TINY
from plumbing.files import (
    CHECKSUMS,
    only_writer,
    read_json,
    require,
    write_json,
    write_whole,
)
from plumbing.options import flag, option, option_names, parse_settings
from plumbing.rows import read_rows
from results import plot, tables
from run import CONFIG

ROOT = Path(__file__).resolve().parent.parent
GRPO = ["grpo.py"]


def program_of(method: str) -> list[str]:
    """What follows `python` to train by a method."""
    return GRPO if method == "grpo" else ["-m", "methods", method]


# Name → program and options. PPO is there twice: its best setting, 64 prompts with a
# response each, where no prompt is shared; and its best one in groups, whose costs
# compare with GRPO's.
COMPARED = {
    "GRPO": GRPO,
    "PPO": [*program_of("ppo"), "--value-lr", "3e-3", "--group-size", "1",
            "--prompts-per-step", "64"],
    "PPO in GRPO groups": program_of("ppo"),
    "DPO": program_of("dpo"),
    "SFT on the best": program_of("sft"),
    "best of 8": program_of("best_of_n"),
}
ABLATED = {
    "equal weights": GRPO,
    **{f"{axis} alone": [*GRPO, "--weights", ",".join(
        f"{a}={int(a == axis)}" for a in rubric.AXES)] for axis in rubric.AXES},
    "each axis normalised": [*GRPO, "--advantage", "per-axis"],
    "no division by the std": [*GRPO, "--advantage", "mean-only"],
    "beta 0": [*GRPO, "--beta", "0"],
    "two updates a batch": [*GRPO, "--inner-steps", "2"],
    "PPO at GRPO's updates": [*program_of("ppo"), "--epochs", "1"],
}
# The over-optimisation curve: a policy that hardly pays for leaving its base, for long.
LONG = {"a long run": [*GRPO, "--beta", "0.001", "--steps", "400"]}
# Five settings for every method; its default is the best by gold R, on prompts that are
# held out for this alone. GRPO had more care than that: temperature, rank and steps of
# the tiny world were chosen for it (results/tiny), and the others take them. GRPO and
# PPO may spend a step's 64 responses on more prompts; PPO needs no groups.
SEARCH = {
    "grpo": [{"lr": lr, "beta": beta} for lr in (3e-3, 4.5e-3)
             for beta in (0.02, 0.04)]
    + [{"lr": 4.5e-3, "beta": 0.04, "group_size": 4, "prompts_per_step": 16}],
    "ppo": [{"lr": lr, "lam": lam, "value_lr": value_lr} for lr, lam, value_lr in (
        (1.5e-3, 1.0, 3e-3), (3e-3, 1.0, 3e-3), (3e-3, 0.95, 3e-3), (3e-3, 1.0, 1e-2))]
    + [{"lr": 3e-3, "lam": 1.0, "value_lr": 3e-3, "group_size": 1,
        "prompts_per_step": 64}],
    "dpo": [{"lr": lr, "epochs": 3, "beta": beta} for lr in (1e-3, 2e-3)
            for beta in (0.1, 0.5)] + [{"lr": 2e-3, "epochs": 3, "beta": 1.0}],
    "sft": [{"lr": lr, "epochs": n} for lr in (3e-3, 6e-3) for n in (1, 3)]
    + [{"lr": 3e-3, "epochs": 6}],
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python -m methods compare|ablate|search`."""

    seeds: str = option("0", "seeds of the runs, such as 0,1,2")
    out: Path | None = option(None, "folder of all runs (default: runs/compare, …)")


# ----------------------------------------------------------------- many runs, one table


def run_all(programs: dict[str, list[str]], seeds: list[int], folder: Path,
            once: dict[str, list[str]] | None = None) -> dict[str, list[dict]]:
    """Run every program with every seed, in processes of their own; summaries.

    As many run at a time as PyTorch would use threads, on the CPU with one thread each:
    on small models that is faster than more threads for one, and no score changes with
    the number of cores. Seconds may: the runs share memory and cache.

    Args:
        once: programs that run with the first seed only, and begin first.
    """
    jobs = [(name, program, seeds[0]) for name, program in (once or {}).items()]
    jobs += [(name, program, seed) for seed in seeds
             for name, program in programs.items()]
    notes = [note_of(name, program, seed, folder) for name, program, seed in jobs]
    summaries, stop = {}, threading.Event()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        started = {pool.submit(run_one, out, note, stop): (name, seed)
                   for (out, note), (name, _, seed) in zip(notes, jobs, strict=True)}
        try:
            for end in tqdm(as_completed(started), total=len(started), unit="run",
                            file=sys.stderr):
                summaries[started[end]] = end.result()
        finally:  # after an error or Ctrl-C, what has not begun does not begin
            stop.set()
    return {name: [summaries[name, seed] for seed in seeds] for name in programs}


def settings_class(program: list[str]) -> type:
    """The settings of a program: GRPO's, or those of the method that it names."""
    if program[0] == GRPO[0]:
        return grpo.Settings
    return importlib.import_module(f"methods.{program[2]}").Settings


def note_of(name: str, program: list[str], seed: int,
            folder: Path) -> tuple[Path, dict]:
    """The folder of a run, and the note beside it: its command and all settings.

    A folder with another note, or with none, is refused: its figures are of other
    settings, perhaps of defaults that have changed, or not of a comparison.
    """
    out = folder / f"{name.replace(' ', '-').lower()}-{seed}"
    options = ["--device", "cpu", "--seed", str(seed), "--out", str(out)]
    cls, length = settings_class(program), 1 if program[0] == GRPO[0] else 3
    used = parse_settings(cls, "", [*program[length:], *options]).resolved()
    values = {name: getattr(used, name) for name in option_names(cls)}
    # Paths stand in the command; the model's differs from machine to machine.
    note = {"command": [*program, *options], "settings": {
        k: v for k, v in values.items() if k != "model" and not isinstance(v, Path)}}
    path = out.with_name(f"{out.name}.json")
    require(path.is_file() or not out.exists(), f"{out} is not from such a comparison; "
            "choose another --out")
    require(not path.is_file() or read_json(path) == note, f"{out} is of another "
            f"command or of other settings (see {path}); choose another --out")
    return out, note


def run_one(out: Path, note: dict, stop: threading.Event) -> dict:
    """One run's summary, and its settings; nothing, if another has set `stop`.

    A run that is finished already is not repeated, and one that was interrupted goes
    on.
    """
    if stop.is_set():
        return {}
    settings = {"settings": note["settings"]}
    if (out / CHECKSUMS).is_file():
        return read_json(out / "summary.json") | settings
    words, printed = note["command"], out.with_name(f"{out.name}.txt")
    try:
        write_json(out.with_name(f"{out.name}.json"), note)
        if (out / CONFIG).is_file():
            length = 1 if words[0] == GRPO[0] else 3
            words = [*words[:length], "--resume", str(out)]
        else:
            with only_writer(out):  # whoever still writes there is left alone
                shutil.rmtree(out, ignore_errors=True)
        if words[0] == GRPO[0]:
            words = [str(ROOT / GRPO[0]), *words[1:]]
        path = os.pathsep.join(filter(None, [str(ROOT),
                                             os.environ.get("PYTHONPATH")]))
        with open(printed, "w", encoding="utf-8") as file:
            end = subprocess.run([sys.executable, *words], check=False,
                                 stdout=file, stderr=file, env=os.environ | {
                                     "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
        require(end.returncode == 0, f"{' '.join(words)} ended with status "
                f"{end.returncode}; see {printed}")
    except BaseException:
        stop.set()  # before this worker takes the next run
        raise
    return read_json(out / "summary.json") | settings


def write_table(summaries: dict[str, list[dict]], lines: list[str],
                folder: Path) -> None:
    """Write the table and what it was made from; print it."""
    write_json(folder / "summaries.json", {
        name: [{key: value for key, value in run.items() if key != "answers"}
               for run in runs] for name, runs in summaries.items()})
    table = "\n".join(lines)
    write_whole(folder / "table.md", table + "\n")
    print(table)


def draw(summaries: dict[str, list[dict]], folder: Path) -> bool:
    """The picture, where matplotlib can be imported; else False, and a line on it."""
    if not plot.can_draw():
        return False
    plot.write_comparison(summaries, folder / "plot.png")
    return True


# ------------------------------------------------------------------------- three kinds


def compare(seeds: list[int], folder: Path) -> None:
    """All methods."""
    summaries = run_all(COMPARED, seeds, folder)
    write_table(summaries, tables.comparison_tables(summaries), folder)
    draw(summaries, folder)


def ablate(seeds: list[int], folder: Path) -> None:
    """GRPO taken apart, one piece at a time; and the curve of a long run."""
    summaries = run_all(ABLATED, seeds, folder, once=LONG)
    write_table(summaries, tables.comparison_tables(summaries), folder)
    long_run = folder / f"a-long-run-{seeds[0]}"
    if draw(summaries, folder):
        print(f"learned and gold R over its steps: {plot.write(long_run)}")


def search(seeds: list[int], folder: Path) -> None:
    """Every setting of SEARCH, judged on prompts held out for this alone."""
    require(len(seeds) == 1, "a search takes one seed: --seeds 0")
    programs, prompts = {}, folder / "validation.jsonl"
    for method, grid in SEARCH.items():
        for options in grid:
            name = " ".join([method, *(f"{k}={v}" for k, v in options.items())])
            programs[name] = [
                *program_of(method), "--prompts", str(prompts),
                *(word for k, v in options.items() for word in (flag(k), str(v)))]
    write_validation_prompts(prompts)
    summaries = run_all(programs, seeds, folder)
    write_table(summaries, tables.search_table(summaries), folder)


def write_validation_prompts(path: Path, count: int = 64) -> None:
    """The tiny world's training prompts, and others of the same subjects held out.

    Settings are chosen on these, so that the held-out subjects stay unseen.
    """
    rows = read_rows(TINY / "prompts.jsonl", responses=False)
    chance, held_out = random.Random(7), []
    known = {row["prompt"] for row in rows}
    for harmful in (True, False):
        fresh = [p.text for p in world.training_prompts() if p.harmful == harmful
                 and p.text not in known]
        held_out += chance.sample(fresh, count)
    rows = [row for row in rows if row["split"] == "train"]
    rows += [{"prompt": text, "split": "heldout"} for text in held_out]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n"
                              for row in rows))


KINDS: dict[str, Callable[[list[int], Path], None]] = {
    "compare": compare, "ablate": ablate, "search": search}


def main(kind: str, argv: list[str] | None = None) -> None:
    """Run one of KINDS."""
    s = parse_settings(Settings, __doc__.split("\n")[0], argv)
    words = [seed.strip() for seed in s.seeds.split(",")]
    seeds = [int(word) for word in words if re.fullmatch("[0-9]{1,9}", word)]
    require(len(set(seeds)) == len(words),
            f"--seeds {s.seeds}: expected different numbers, such as 0,1,2")
    folder = s.out or Path("runs") / kind
    with only_writer(folder):
        KINDS[kind](seeds, folder)
