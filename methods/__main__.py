"""Train by another method, or compare methods: `python -m methods NAME`.

NAME is a file of this folder: ppo, dpo, sft, best_of_n; `--help` after it lists its
options. `compare`, `ablate` and `search` run several, and print tables.
"""

import importlib
import sys
from pathlib import Path

import grpo
from methods import compare
from plumbing.files import one_line_errors, require
from run import Prompt, Run, read_settings

# Files of this folder that are no methods.
SHARED = ("__init__", "__main__", "offline", "compare")
NAMES = sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - {*SHARED})


def run_method(name: str, argv: list[str]) -> None:
    """One run of a method: whatever its file hands in, the rest is `grpo.align`.

    A file has `Settings`, and either `method(run)`, for GRPO's loop, or a `train` of
    its own; it may `answer` held-out prompts in its own way.
    """
    module = importlib.import_module(f"methods.{name}")
    title = module.__doc__.split("\n")[0]
    settings = read_settings(module.Settings, title, argv, name)

    def train(run: Run, prompts: list[Prompt]) -> bool:
        if hasattr(module, "train"):
            return module.train(run, prompts)
        return grpo.train(run, prompts, module.method(run))

    grpo.align(settings, name, train, getattr(module, "answer", None))


def main(argv: list[str]) -> None:
    """Run what the first word names."""
    name, rest = (argv or [""])[0], argv[1:]
    if name in ("-h", "--help"):
        print(__doc__)
        for known in NAMES:
            print(importlib.import_module(f"methods.{known}").__doc__.split("\n")[0])
    elif name in compare.KINDS:
        compare.main(name, rest)
    else:
        require(name in NAMES, f"{name or 'no name'}: expected one of "
                f"{', '.join([*NAMES, *compare.KINDS])}; or python grpo.py")
        run_method(name, rest)


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
