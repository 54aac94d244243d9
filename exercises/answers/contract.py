"""Exercise 8, worked: break the contract in a copy, and name the tests that notice.

`python -m exercises.answers.contract 1` makes the first change of the page; 2, 3 and 4
alike. Both halves of the contract stand in one file.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
CONTRACT = "sample.py"
TESTS = ("tests/test_sample.py", "tests/test_batch.py", "tests/test_grpo.py")
# Number → the function, its words, and what replaces them.
CHANGES = {
    "1": ("sample_batch", "uniforms, s.temperature", "uniforms, 1.0"),
    "2": ("rollout", "unembed = model.unembed[:tokenizer.valid]",
          "unembed = model.unembed"),
    "3": ("rollout", "length[active], ended[active] = t + 1, stop",
          "length[active], ended[active] = t + 1 - stop.long(), stop"),
    "4": ("response_hidden", "prompt[-1:] + r[:-1] for r in", "r for r in"),
}


def failing(old: str, new: str) -> list[str]:
    """The tests that fail when a line of the contract is changed."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        shutil.copytree(HOME, copy, ignore=shutil.ignore_patterns("runs", ".*"))
        text = (copy / CONTRACT).read_text()
        if text.count(old) != 1:
            sys.exit(f"contract.py: error: {CONTRACT} no longer has the line {old!r}")
        (copy / CONTRACT).write_text(text.replace(old, new))
        end = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--tb=no", *TESTS], cwd=copy,
            capture_output=True, text=True, check=False)
    names = re.findall(r"^FAILED \S+::(\w+)", end.stdout, re.M)
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    for number in sys.argv[1:] or CHANGES:
        function, old, new = CHANGES[number]
        print(f"change {number}: {function}")
        for test in failing(old, new):
            print(f"  {test}")
