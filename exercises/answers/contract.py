"""Exercise 8, worked: break the contract in a copy, and name the tests that notice.

`python -m exercises.answers.contract 1` makes the first change of the page; 2, 3 alike.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
CHANGES = {
    "1": ("grpo.py", "hidden, head, targets, s.temperature, run",
          "hidden, head, targets, 1.0, run"),
    "2": ("sample.py", "unembed = model.unembed[:tokenizer.valid]",
          "unembed = model.unembed"),
    "3": ("sample.py", "ended[active[stop]] = t + 1, True",
          "ended[active[stop]] = t, True"),
}


def failing(file: str, old: str, new: str) -> list[str]:
    """The tests that fail when one line is changed."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(HOME, copy, ignore=shutil.ignore_patterns("runs", ".*"))
        text = (copy / file).read_text()
        if text.count(old) != 1:
            sys.exit(f"contract.py: error: {file} no longer has the line {old!r}")
        (copy / file).write_text(text.replace(old, new))
        end = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=no", "tests/test_sample.py",
             "tests/test_grpo.py"], cwd=copy, capture_output=True, text=True,
            check=False)
    names = re.findall(r"^FAILED \S+::(\w+)", end.stdout, re.M)
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    for number in sys.argv[1:] or CHANGES:
        print(f"change {number}: {CHANGES[number][0]}")
        for test in failing(*CHANGES[number]):
            print(f"  {test}")
