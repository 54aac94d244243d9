"""exercises/: every worked answer passes its tests, and no stub does.

* `exercises/check.py` finds what a page says and a command does not print.

Links of the pages and options of their commands: `test_readme.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from exercises import check

HOME = Path(__file__).parent.parent / "exercises"


def run_tests(**environment: str) -> str:
    end = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=no", "exercises"], text=True,
        cwd=HOME.parent, capture_output=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "ANSWERS"} | environment)
    return end.stdout.splitlines()[-1]


def test_every_answer_is_right_and_every_stub_is_not():
    right, wrong = run_tests(ANSWERS="1"), run_tests()
    count = re.match(r"(\d+) passed in", right)
    assert count, right
    assert re.match(rf"{count[1]} failed in", wrong), wrong


PAGE = """
```sh
python -c "print('| run | gold | 0.412 → 0.930 |')"
python -c "print('| run | harmful | comply 44%, evade 5% | comply 97% |')"
```

```text
| run | gold | 0.40 → 0.90 |
| run | harmful | comply 50% | comply 90%, other 3% |
```
"""


@pytest.mark.parametrize(("old", "new", "problem"), [
    ("", "", None), ("0.90", "0.40", "not printed: | run | gold"),
    ("| gold | 0.40", "| judge | 0.40", "not printed: | run | judge"),
    ("comply 90%", "comply 70%", "not printed: | run | harmful"),
    ("comply 90%", "evade 90%", "not printed: | run | harmful"),
    ("```text", "```text exact", "not printed: | run | gold"),
    ("print(", "exit(3); print(", "status 3")])
def test_check_finds_what_does_not_match(tmp_path, monkeypatch, old, new, problem):
    monkeypatch.setattr(check, "HOME", tmp_path / "home")
    (tmp_path / "home").mkdir()
    (tmp_path / "page.md").write_text(PAGE.replace(old, new))
    problems = check.check(tmp_path / "page.md")
    assert bool(problems) == (problem is not None)
    if problem:
        assert problem in " ".join(problems)


@pytest.mark.parametrize("page", [
    "03", pytest.param("08", marks=pytest.mark.slow)])
def test_a_page_says_what_its_commands_print(page):
    assert check.main([page]) == 0
