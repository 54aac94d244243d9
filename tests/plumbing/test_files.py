"""Claims about plumbing/files.py.

* A file is written whole or not at all; a failure leaves the old one and no rubbish.
* Every bad row of a JSONL file is refused with its file and line.
* A line is added whole, or the disk that has no room is named.
* Checksums are those of `sha256sum`; an altered or misnamed file is refused.
* One process at a time writes a folder.
* A UserError becomes one line and exit status 2; other errors are not hidden.
"""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plumbing import files
from plumbing.files import UserError

GOOD = '{"prompt": "p", "response": "r", "scores": {"safety": 0.5}}'

# ----------------------------------------------------------------------------- files


@pytest.mark.parametrize(("step", "fault", "raised"), [
    ("replace", OSError(errno.ENOSPC, "No space left on device"), UserError),
    ("fsync", OSError(errno.EIO, "Input/output error"), UserError),
    ("replace", KeyboardInterrupt(), KeyboardInterrupt),
])
def test_failed_write_leaves_the_old_file_alone(
        tmp_path, monkeypatch, step, fault, raised):
    path = tmp_path / "file.json"
    path.write_text("old")

    def fail(*_):
        raise fault

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(raised) as refusal:
        files.write_whole(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.json"]
    if raised is UserError:
        assert str(path) in str(refusal.value)
        assert fault.strerror in str(refusal.value)


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path, seen, replace = tmp_path / "file.bin", [], os.replace
    files.write_whole(path, b"old")

    def watched(source, target):
        seen.append((path.read_bytes(), Path(source).read_bytes()))
        assert Path(source).parent == path.parent  # else the rename is not atomic
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    files.write_whole(path, b"new\x00\xff")
    assert seen == [(b"old", b"new\x00\xff")]
    assert path.read_bytes() == b"new\x00\xff"


def test_written_file_is_utf8_with_its_folders_and_readable_by_all(tmp_path):
    path = tmp_path / "a" / "b" / "file.json"
    files.write_json(path, {"é": [1, "水"]})
    assert json.loads(path.read_bytes().decode("utf-8")) == {"é": [1, "水"]}
    assert path.stat().st_mode & 0o777 == 0o644  # mkstemp alone gives 0o600
    assert files.read_json(path) == {"é": [1, "水"]}


def test_writing_below_a_file_or_over_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            files.write_whole(path, "new")


@pytest.mark.parametrize(("content", "why"), [
    (b"{", "not valid JSON"), (b"\xff{}", "not valid JSON"), (b"", "not valid JSON"),
    (b"[1]", "object, not list"), (b"null", "object, not NoneType"),
    (b"[" * 100_000, "not valid JSON"),  # too deep for the parser
])
def test_bad_json_file_is_refused(tmp_path, content, why):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=why) as refusal:
        files.read_json(path)
    assert str(path) in str(refusal.value)


def test_missing_files_are_refused(tmp_path):
    for reader in (files.read_json, lambda path: files.read_rows(path, False)):
        with pytest.raises(UserError, match=r"cannot read .*gone.*No such file"):
            reader(tmp_path / "gone")


# ------------------------------------------------------------------------------ rows


def scored(score: str) -> str:
    """A row with this score; JSON itself has no NaN, but Python's parser takes it."""
    return GOOD.replace("0.5", score)


@pytest.mark.parametrize(("line", "why"), [
    ("not json", "not valid JSON"),
    ('{"prompt": "p"', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('["prompt"]', "found list"),
    ("3", "found int"),
    ('{"response": "r"}', '"prompt" must be a text'),
    ('{"prompt": 3, "response": "r"}', '"prompt" must be a text'),
    ('{"prompt": "p"}', '"response" must be a text'),
    ('{"prompt": "", "response": "r"}', "prompt is empty"),
    ('{"prompt": " \\n\\t", "response": "r"}', "prompt is empty"),
    ('{"prompt": "p", "response": "\\ud83d"}', "half a surrogate pair"),
    ('{"prompt": "p", "response": "r", "id": ["\\udc00"]}', "half a surrogate pair"),
    ('{"prompt": "p", "response": "r"}', '"scores" must name'),
    ('{"prompt": "p", "response": "r", "scores": {}}', '"scores" must name'),
    ('{"prompt": "p", "response": "r", "scores": [1]}', '"scores" must name'),
    *((scored(bad), "score of safety is .* 0 to 1") for bad in (
        "1.01", "-0.01", "NaN", "Infinity", "-Infinity", "true", "false", '"0.5"',
        "null", "[0.5]", "1" + "0" * 400)),  # an int beyond any float
])
def test_bad_row_is_refused_with_file_and_line(tmp_path, line, why):
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")  # an empty line counts, too
    with pytest.raises(UserError, match=why) as refusal:
        files.read_rows(path, responses=True, labels=True)
    assert f"{path}:3: " in str(refusal.value)


@pytest.mark.parametrize(("content", "why"), [
    (b"", "has no rows"), (b"\n  \n", "has no rows"),
    (GOOD.encode() + b"\n\xff\n", "not UTF-8 text"),
    (GOOD.encode("utf-16"), "not UTF-8 text"),
    (b"\xef\xbb\xbf" + GOOD.encode(), "BOM"),
])
def test_bad_file_of_rows_is_refused(tmp_path, content, why):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=why) as refusal:
        files.read_rows(path, responses=True, labels=True)
    assert str(path) in str(refusal.value)


def test_good_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        {"prompt": "a", "response": "", "scores": {"x": 0, "y": 1.0}, "id": 7},
        # JSON allows these inside a string; str.splitlines() would cut there.
        {"prompt": "1\u20282\u20293\x854\x7f", "response": "😀\r\n", "scores": {"x": 1}}
    ]
    path = tmp_path / "rows.jsonl"
    for ascii_only, end in ((True, "\n"), (False, "\n"), (False, "\r\n")):
        text = end.join(json.dumps(r, ensure_ascii=ascii_only) for r in rows)
        path.write_bytes(text.encode())
        assert files.read_rows(path, responses=True, labels=True) == rows


def test_only_what_is_asked_for_is_required(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "p", "scores": "anything"}')
    assert files.read_rows(path, responses=False)[0]["prompt"] == "p"


# ------------------------------------------------------------------------- checksums


@pytest.fixture
def folder(tmp_path):
    """A folder with two files, a subfolder and its checksums."""
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    files.write_checksums(tmp_path)
    return tmp_path


def test_checksums_are_those_of_hashlib(folder):
    assert (folder / "SHA256SUMS").read_text() == "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("a.txt", "b.bin"))
    files.verify_checksums(folder)
    before = (folder / "SHA256SUMS").read_bytes()
    files.write_checksums(folder)  # the list does not list itself
    assert (folder / "SHA256SUMS").read_bytes() == before


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_sha256sum_accepts_our_list(folder):
    check = ["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0


def test_altered_or_missing_file_is_refused(folder):
    (folder / "b.bin").write_bytes(bytes(range(255)) + b"\x00")  # one byte, same size
    with pytest.raises(UserError, match=r"b\.bin is not the file that was written"):
        files.verify_checksums(folder)
    (folder / "b.bin").unlink()
    with pytest.raises(UserError, match=r"not there: 'b\.bin'"):
        files.verify_checksums(folder)


def test_list_may_not_point_outside_its_folder(folder):
    outside = folder.parent / f"{folder.name}-outside"
    outside.write_text("a")  # it exists, and its digest is right
    inside = folder / "sub" / "a.txt"
    inside.write_text("a")
    digest = hashlib.sha256(b"a").hexdigest()
    for name in (f"../{outside.name}", str(outside), "sub/a.txt", "./a.txt", "sub",
                 "..", ".", "", "a\x00.txt"):
        (folder / "SHA256SUMS").write_text(f"{digest}  {name}\n")
        with pytest.raises(UserError, match="names a file that is not there"):
            files.verify_checksums(folder)


def test_damaged_list_is_refused_and_a_folder_without_one_is_not_ours(folder):
    for damage in (b"\xff\xfe\x00", b"abc\n", b"\n"):
        (folder / "SHA256SUMS").write_bytes(damage)
        with pytest.raises(UserError):
            files.verify_checksums(folder)
    (folder / "SHA256SUMS").unlink()
    files.verify_checksums(folder)


# ---------------------------------------------------------------------------- a writer


def test_lines_are_added_one_by_one_and_whole(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    records = [{"é": 1}, {"b": [2, "\u2028"]}]
    with files.append(path) as file:
        for count, record in enumerate(records, 1):
            files.append_line(file, record)  # there at once: nothing waits in a buffer
            lines = path.read_bytes().decode().split("\n")
            assert [json.loads(line) for line in lines[:-1]] == records[:count]
            assert lines[-1] == ""
    with files.append(path) as file:
        files.append_line(file, {})
    assert path.read_bytes().count(b"\n") == 3


class NearlyFull:
    """A disk that takes three bytes at a time, and after so many none."""

    name = "a disk"

    def __init__(self, room: int) -> None:
        self.room, self.content = room, b""

    def write(self, data: bytes) -> int:
        if len(self.content) >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.content += data[:3]
        return len(data[:3])


def test_a_line_that_is_taken_in_pieces_is_whole_and_a_full_disk_is_named():
    disk = NearlyFull(1000)
    files.append_line(disk, {"text": "0123456789"})
    assert disk.content == b'{"text": "0123456789"}\n'
    with pytest.raises(UserError, match=r"a disk: No space left on device;.*--resume"):
        files.append_line(NearlyFull(6), {"text": "0123456789"})


def test_two_processes_do_not_write_one_folder(tmp_path):
    folder = tmp_path / "a" / "run"
    with files.only_writer(folder):
        with pytest.raises(UserError, match="another process is writing"):
            with files.only_writer(folder):
                pytest.fail("two wrote at once")
        assert folder.is_dir()  # the one that was refused left it alone
    assert not folder.exists()  # and an empty one is not left behind
    with files.only_writer(folder):
        (folder / "x").touch()
    assert (folder / "x").exists()
    with files.only_writer(folder):
        pass  # the lock is gone with its process
    with pytest.raises(UserError, match="cannot write into"):
        with files.only_writer(folder / "x"):
            pytest.fail("a file is no folder")


# ---------------------------------------------------------------------------- errors


def test_user_error_is_one_line_and_exit_status_2(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/grpo.py", "--x"])
    with pytest.raises(SystemExit) as end, files.one_line_errors():
        files.require(False, "a.json:3: bad\n   thing;\tmend it")
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "grpo.py: error: a.json:3: bad thing; mend it\n"
    assert printed.out == ""


def test_keyboard_stops_without_traceback(capsys):
    with pytest.raises(SystemExit) as end, files.one_line_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130  # as shells report SIGINT
    assert "stopped by the keyboard" in capsys.readouterr().err


def test_too_little_memory_costs_one_line(capsys):
    with pytest.raises(SystemExit) as end, files.one_line_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    assert end.value.code == 2
    assert "lower --group-size" in capsys.readouterr().err


def test_our_own_mistakes_are_not_hidden():
    with pytest.raises(ZeroDivisionError), files.one_line_errors():
        1 / 0  # noqa: B018
    with files.one_line_errors():
        files.require(True, "never said")
