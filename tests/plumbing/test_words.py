"""Results before words: claims about plumbing/words.py.

* What a stream cannot encode is escaped; nothing else of it changes.
* A stream whose end is closed, full or gone ends nothing; a full one gets one note, and
  Python's own exit status stays that of the program.
* A slow reader, and words in the midst of others, cost these words alone.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.words import Lasting, lasting_output

ROOT = Path(__file__).parent.parent.parent
TALK = """
import sys
sys.path.insert(0, {root!r})
from plumbing.files import one_line_errors, require
with one_line_errors():
    for number in range(20000):
        print("hello \\u2192 \\xd7 \\udcff", number)
        print("\\u2192", file=sys.stderr)
    open("done", "w").write("x")
    require({good}, "a reason \\u2192")
"""


def run(tmp_path, shell: str, good: bool = True, **environment: str):
    """A talkative program by a shell's line; its result, and whether it got through."""
    (tmp_path / "talk.py").write_text(TALK.format(root=str(ROOT), good=good))
    end = subprocess.run(
        ["bash", "-c", shell.replace("TALK", f"{sys.executable} talk.py")
         + "; exit ${PIPESTATUS[0]}"],
        cwd=tmp_path, capture_output=True, env=os.environ | environment, check=False)
    return end, (tmp_path / "done").exists()


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252:strict", "utf-8"])
def test_letters_that_a_terminal_has_not_are_escaped(tmp_path, encoding):
    end, done = run(tmp_path, "TALK 2>/dev/null", PYTHONIOENCODING=encoding)
    assert (end.returncode, done) == (0, True)
    assert end.stdout.splitlines()[3].decode(encoding.split(":")[0]) == (
        ("hello → × " if encoding == "utf-8" else "hello \\u2192 × "
         if encoding != "ascii" else "hello \\u2192 \\xd7 ") + "\\udcff 3")


@pytest.mark.slow
@pytest.mark.parametrize("shell", [
    "TALK | head -1", "TALK 2>&1 | head -1", "TALK | true", "TALK > /dev/full",
    "TALK 2> /dev/full", "TALK &> /dev/full", "TALK >&-", "TALK 2>&-",
    "TALK <&- >&- 2>&-"])
@pytest.mark.parametrize("good", [True, False])
def test_a_stream_that_is_closed_or_full_ends_nothing(tmp_path, shell, good):
    for unbuffered in ("", "1"):
        end, done = run(tmp_path, shell, good, PYTHONUNBUFFERED=unbuffered)
        assert (end.returncode, done) == (0 if good else 2, True), end.stderr
        assert b"Traceback" not in end.stderr
        assert b"Exception ignored" not in end.stderr
        (tmp_path / "done").unlink()
    if shell == "TALK > /dev/full":
        assert end.stderr.count(b"note: the output cannot be written") == 1


def test_a_slow_reader_and_words_amid_others_cost_these_words_alone():
    class Busy(io.StringIO):
        refuse: Exception | None = None

        def write(self, text):
            if self.refuse:
                raise self.refuse
            return super().write(text)

    stream = Busy()
    words = Lasting(stream)
    for fault in (BlockingIOError(11, "busy"), RuntimeError("reentrant call")):
        stream.refuse = fault
        assert words.write("lost") == 4
        stream.refuse = None
        words.write("shown")
    assert stream.getvalue() == "shownshown"
    stream.refuse = BrokenPipeError()
    words.write("lost")
    stream.refuse = None
    words.write("lost too")  # nobody is there any more
    assert stream.getvalue() == "shownshown"


def test_the_streams_come_back(monkeypatch):
    before = sys.stdout, sys.stderr
    with pytest.raises(ZeroDivisionError), lasting_output():
        print(1 / (not isinstance(sys.stdout, Lasting)))
    assert (sys.stdout, sys.stderr) == before
