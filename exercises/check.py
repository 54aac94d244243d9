"""Run the answers' commands again, and compare what they print with the pages.

    python exercises/check.py            # every page of exercises/answers
    python exercises/check.py 03 10      # some

In a page, a block of commands (```sh) that is followed by a block of output (```text)
is run, in a fresh copy of the repository. Every line of the output must come out again:
the same words, and numbers that are near. Training rounds differently from machine to
machine, so near means within 0.1 and a tenth, or 15 points of a percentage; ```text
exact allows the last digit only. In a list of shares (comply 44%, evade 5%) the order
does not matter. A command that takes longer than two minutes fails.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parent.parent
LIMIT = 120  # seconds a command may take
BLOCK = re.compile(r"^```sh\n(.*?)^```\n+^```text( exact)?\n(.*?)^```$", re.M | re.S)
SHARE = re.compile(r"([a-z_]+) (\d+%)")
NUMBER = re.compile(r"(?<![\w.])[-+−]?\d[\d,]*(?:\.\d+)?%?")


def blocks(page: str) -> list[tuple[list[str], bool, list[str]]]:
    """Commands, whether their numbers are exact, and the lines that they print."""
    return [(commands.splitlines(), bool(exact), output.splitlines())
            for commands, exact, output in BLOCK.findall(page)]


def near(printed: str, wanted: str, exact: bool) -> bool:
    """Are two numbers, as they are printed, the same for our purposes?"""
    if printed.endswith("%") != wanted.endswith("%"):
        return False
    a, b = (float(n.rstrip("%").replace(",", "").replace("−", "-"))
            for n in (printed, wanted))
    decimals = len(wanted.rstrip("%").partition(".")[2])
    if exact:
        return abs(a - b) < 1.5 * 10 ** -decimals
    return abs(a - b) <= (15 if wanted.endswith("%") else 0.1 + 0.1 * abs(b))


def same(printed: str, wanted: str, exact: bool) -> bool:
    """Does a printed line say what the page says?"""
    if SHARE.search(wanted):
        return same_shares(printed, wanted)
    words = [" ".join(NUMBER.sub("#", line).split()) for line in (printed, wanted)]
    numbers = [NUMBER.findall(line) for line in (printed, wanted)]
    return words[0] == words[1] and all(
        near(a, b, exact) for a, b in zip(*numbers, strict=True))


def same_shares(printed: str, wanted: str) -> bool:
    """Are the shares of each cell of a table near? One that is missing is 0%."""
    cells = [line.split("|") for line in (printed, wanted)]
    if len(cells[0]) != len(cells[1]):
        return False
    for a, b in zip(*cells, strict=True):
        left, right = dict(SHARE.findall(a)), dict(SHARE.findall(b))
        if not right and a.split() != b.split():
            return False
        if any(not near(left.get(kind, "0%"), right.get(kind, "0%"), False)
               for kind in left.keys() | right.keys()):
            return False
    return True


def run(command: str, folder: Path) -> tuple[list[str], str | None]:
    """The lines that a command prints, and what is wrong with it, if anything."""
    words = command.replace("python ", f"{sys.executable} ", 1)
    words = words.replace("pytest ", f"{sys.executable} -m pytest ", 1)
    started = time.perf_counter()
    end = subprocess.run(words, shell=True, cwd=folder, text=True, check=False,
                         capture_output=True)
    seconds = time.perf_counter() - started
    print(f"  {seconds:5.0f} s  {command}", flush=True)
    problem = None
    if end.returncode:
        problem = f"status {end.returncode}: {end.stderr.strip()[-300:]}"
    elif seconds > LIMIT:
        problem = f"took {seconds:.0f} s, more than {LIMIT}"
    return end.stdout.splitlines(), problem


def check(page: Path) -> list[str]:
    """Run a page's commands in a copy of the repository; what does not match."""
    problems = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        shutil.copytree(HOME, folder, ignore=shutil.ignore_patterns(
            "runs", ".*", "__pycache__"))
        for commands, exact, wanted in blocks(page.read_text()):
            output: list[str] = []
            for command in commands:
                lines, problem = run(command, folder)
                output += lines
                problems += [f"{command}: {problem}"] if problem else []
            problems += [f"not printed: {line}" for line in wanted if line.strip()
                         and not any(same(printed, line, exact) for printed in output)]
    return problems


def main(words: list[str]) -> int:
    """Check the pages whose names begin with one of the words, or all."""
    pages = [p for p in sorted((HOME / "exercises" / "answers").glob("*.md"))
             if not words or p.name.startswith(tuple(words))]
    if not pages:
        print(f"check.py: error: no page begins with {' or '.join(words)}",
              file=sys.stderr)
        return 2
    failed = 0
    for page in pages:
        print(page.name, flush=True)
        problems = check(page)
        print("".join(f"  {p}\n" for p in problems) or "  as the page says\n", end="")
        failed += bool(problems)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
