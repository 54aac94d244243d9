"""Claims about plumbing/files.py.

* A file is written whole or not at all; a failure leaves the old one and no rubbish.
* A line is added whole, or the disk that has no room is named.
* JSON is read by every parser: null stands for what is no number.
* Checksums are those of `sha256sum`, of our own files alone; whatever it writes is
  read; an altered or misnamed file and a line that is no checksum are refused.
* One process at a time writes a folder.
* A UserError becomes one line and exit status 2; other errors are not hidden.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plumbing import files
from plumbing.files import UserError

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
    with pytest.raises(UserError, match=r"cannot read .*gone.*No such file"):
        files.read_json(tmp_path / "gone")


def test_what_json_has_no_word_for_is_null(tmp_path):
    path = tmp_path / "file.json"
    content = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": {"d": math.nan}}
    files.write_json(path, content)
    strict = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert strict == {"a": None, "b": [None, [None, 1.5]], "c": {"d": None}}
    with files.append(tmp_path / "lines") as file:
        files.append_line(file, content)
    assert json.loads((tmp_path / "lines").read_text(),
                      parse_constant=pytest.fail) == strict


def test_a_path_of_any_bytes_stands_in_json(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff\xfe")
    files.write_json(tmp_path / "file.json", {"out": name, "水": "\u2028"})
    assert files.read_json(tmp_path / "file.json") == {"out": name, "水": "\u2028"}


# ------------------------------------------------------------------------- checksums


@pytest.fixture
def folder(tmp_path):
    """A folder with two files, a subfolder and its checksums."""
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    files.write_checksums(tmp_path, ["b.bin", "a.txt"])
    return tmp_path


def test_checksums_are_those_of_hashlib(folder):
    assert (folder / "SHA256SUMS").read_text() == "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("a.txt", "b.bin"))
    files.verify_checksums(folder)


def test_the_list_knows_our_own_files_only(folder):
    for name in ("train.log", ".DS_Store", "notes.txt", ".a.txt.swp"):
        (folder / name).write_text("first")
    files.write_checksums(folder, ["b.bin", "a.txt"])
    for name in ("train.log", ".DS_Store", "notes.txt"):
        (folder / name).write_text("changed")
    files.verify_checksums(folder)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
@pytest.mark.parametrize("command", [
    "sha256sum *.*", "sha256sum ./*.*", "sha256sum -b *.*", "sha256sum --tag *.*",
    "sha256sum */x.txt", "sha256sum *.* | sed 's/$/\\r/'",
    "sha256sum *.* | tr a-f A-F | sed 's/  .*/\\L&/'", "sha256sum odd*"])
def test_whatever_sha256sum_writes_is_read(folder, command):
    for name in ("sub/x.txt", "odd\n\\name", "odd\\n", "odd  two *",
                 "odd\u2028\x85", os.fsdecode(b"odd\xff"), "odd (x) = y"):
        (folder / name).write_text(name.encode().hex() if name.isascii() else "x")
    listing = folder / "SHA256SUMS"
    listing.unlink()
    text = subprocess.run(command, cwd=folder, shell=True, check=True,
                          capture_output=True).stdout
    assert text
    listing.write_bytes(text)
    files.verify_checksums(folder)
    name = "sub/x.txt" if "x.txt" in command else "a.txt"
    (folder / ("odd\\n" if "odd" in command else name)).write_text("altered")
    with pytest.raises(UserError, match="is not the file that was written"):
        files.verify_checksums(folder)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum here")
def test_sha256sum_accepts_our_list(folder):
    check = ["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0


def test_altered_or_missing_file_is_refused(folder):
    (folder / "b.bin").write_bytes(bytes(range(255)) + b"\x00")  # one byte, same size
    with pytest.raises(UserError, match=r"b\.bin is not the file that was written"):
        files.verify_checksums(folder)
    (folder / "b.bin").unlink()
    with pytest.raises(UserError, match=r"SHA256SUMS:2 .*not there: 'b\.bin'"):
        files.verify_checksums(folder)


def test_list_may_not_point_outside_its_folder(folder):
    outside = folder.parent / f"{folder.name}-outside"
    outside.write_text("a")  # it exists, and its digest is right
    inside = folder / "sub" / "a.txt"
    inside.write_text("a")
    digest = hashlib.sha256(b"a").hexdigest()
    for name in (f"../{outside.name}", str(outside), f"sub/../../{outside.name}",
                 "sub", "..", ".", "a\x00.txt", "x" * 300):
        (folder / "SHA256SUMS").write_text(f"{digest}  {name}\n")
        with pytest.raises(UserError, match=":1 names a file that is not there"):
            files.verify_checksums(folder)


def test_damaged_list_is_refused_and_a_folder_without_one_is_not_ours(folder):
    first = (folder / "SHA256SUMS").read_bytes().split(b"\n")[0] + b"\n"
    for damage in (b"\xff\xfe\x00", b"abc\n", b"\n", b"", b"# a word\n",
                   first[:64] + b"\n", first[:64] + b"  \n", first[1:], b"0" + first,
                   first.replace(b"  ", b" ")):
        for before in (b"", first):
            (folder / "SHA256SUMS").write_bytes(before + damage)
            if before + damage == first:
                continue
            with pytest.raises(UserError, match=f":{2 if before else 1}: no checksum"):
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
