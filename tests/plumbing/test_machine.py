"""Claims about plumbing/machine.py, and those who call it.

* Folders without locks, permissions or fsync get one note, and what is written is
  whole; a true fault is named, and another process only where there is one.
* Memory left is the least of what the kernel, the containers around this process and
  `ulimit` leave; "max" and huge numbers are no limit.
* Memory that runs out, in whatever words, costs one line; other errors stay tracebacks.
* The tiny model takes one thread, unless somebody has chosen how many.
* Without the modules that Windows lacks a run ends as with them.
"""

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import grpo
import run
from plumbing import figures, files, machine
from plumbing.files import UserError

ROOT = Path(__file__).parents[2]
SHORT = ["--steps", "1", "--prompts-per-step", "2", "--group-size", "2",
         "--max-new-tokens", "8", "--eval-prompts", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _notes_are_new(monkeypatch):
    monkeypatch.setattr(machine, "_said", set())


def failing(code: int, only=lambda *_: True, otherwise=None):
    """A system call that gives an error, where `only` says so."""
    def call(*words, **named):
        if only(*words):
            raise OSError(code, os.strerror(code))
        return otherwise(*words, **named)
    return call


# ------------------------------------------------------------------------------ locks


@pytest.mark.parametrize("code", [
    errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF,
    errno.EINVAL])
def test_a_folder_without_locks_is_noted_once_and_written(code, monkeypatch, tmp_path,
                                                         capsys):
    monkeypatch.setattr(fcntl, "flock", failing(code))
    for name in ("one", "two"):
        with files.only_writer(tmp_path / name):
            files.write_whole(tmp_path / name / "x", "x")
    said = capsys.readouterr().err
    assert said.count("note: ") == 1
    assert os.strerror(code) in said
    assert "second process" in said


@pytest.mark.parametrize("code", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_a_lock_that_is_held_means_another_process(code, monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with pytest.raises(UserError, match="another process is writing"), \
            files.only_writer(tmp_path / "run"):
        pytest.fail("two wrote at once")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EROFS])
def test_a_lock_that_fails_names_the_fault(code, monkeypatch, tmp_path):
    monkeypatch.setattr(fcntl, "flock", failing(code))
    with pytest.raises(UserError, match=os.strerror(code)) as refusal, \
            files.only_writer(tmp_path / "run"):
        pytest.fail("it is broken")
    assert "another process" not in str(refusal.value)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EDQUOT,
                                  errno.EACCES])
def test_a_folder_that_takes_no_file_is_noticed_before_anything_is_loaded(
        code, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load", None)
    monkeypatch.setattr(tempfile, "TemporaryFile", failing(code))
    (tmp_path / "run").mkdir()  # there already: making it cannot fail
    with pytest.raises(UserError, match=f"cannot write into.*{os.strerror(code)}"):
        grpo.main([*SHORT, "--out", str(tmp_path / "run")])


def test_a_folder_that_cannot_be_read_is_written_without_a_lock(monkeypatch, tmp_path,
                                                                capsys):
    monkeypatch.setattr(os, "open", failing(
        errno.EACCES, lambda path, *_: Path(path).is_dir(), os.open))
    with files.only_writer(tmp_path / "run"):
        files.write_whole(tmp_path / "run" / "x", "x")
    assert (tmp_path / "run" / "x").read_text() == "x"
    assert "cannot be locked" in capsys.readouterr().err


# ------------------------------------------------------------------------------ files


def is_folder(handle: int) -> bool:
    return os.path.isdir(f"/proc/self/fd/{handle}")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux only")
@pytest.mark.parametrize(("call", "code"), [
    *(("chmod", code) for code in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS,
                                   errno.EACCES)),
    *((call, code) for call in ("fsync", "fsync of a folder")
      for code in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF,
                   errno.EACCES))])
def test_what_a_file_system_lacks_is_noted_once(call, code, monkeypatch, tmp_path,
                                                capsys):
    only = is_folder if call == "fsync of a folder" else lambda *_: True
    name = call.partition(" ")[0]
    monkeypatch.setattr(os, name, failing(code, only, getattr(os, name)))
    for text in ("one", "two"):
        files.write_whole(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert os.listdir(tmp_path) == ["file"]
    said = capsys.readouterr().err
    assert said.count("note: ") == 1
    assert os.strerror(code) in said


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux only")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_is_lost_is_a_fault(code, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "fsync", failing(code, is_folder, os.fsync))
    with pytest.raises(UserError, match=os.strerror(code)):
        files.write_whole(tmp_path / "file", "x")


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--out", "--resume", "--prompts", "--model",
                                    "--reward", "--judge"])
def test_a_name_that_is_too_long_is_one_line(option, tmp_path):
    words = [*SHORT, *([] if option in ("--out", "--resume") else
                       ["--out", str(tmp_path / "run")])]
    end = program("grpo.py", *words, option, str(tmp_path / ("x" * 300)))
    assert end.returncode == 2, end.stderr
    assert "Traceback" not in end.stderr
    assert end.stderr.strip().splitlines()[-1].startswith("grpo.py: error: ")


@pytest.mark.parametrize(("error", "said"), [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
    (OSError(errno.EROFS, "Read-only file system", "a/b"), "a/b: Read-only"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission")])
def test_a_fault_of_the_machine_is_one_line(error, said, capsys):
    with pytest.raises(SystemExit) as end, files.one_line_errors():
        raise error
    assert end.value.code == 2
    assert said in capsys.readouterr().err


# ----------------------------------------------------------------------------- memory

GB = 10**9
MACHINE = 50 * GB
V1_NONE, V2_NONE = 9223372036854771712, "max"


def machine_at(folder: Path, cgroup: str, groups: dict[str, dict]) -> Path:
    """A /proc and a /sys with these control groups: {folder: {file: content}}."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(cgroup)
    (folder / "proc/meminfo").write_text(
        f"MemFree: 1 kB\nMemAvailable: {MACHINE // 1024} kB\n")
    for group, contents in groups.items():
        place = folder / "sys/fs/cgroup" / group
        place.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (place / name).write_text(f"{content}\n")
    return folder


def v1(limit, used, **stat) -> dict:
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used,
            "memory.use_hierarchy": stat.pop("hierarchy", 1),
            "memory.stat": "\n".join(f"{k} {v}" for k, v in stat.items())}


def v2(limit, used, high="max", **stat) -> dict:
    return {"memory.max": limit, "memory.current": used, "memory.high": high,
            "memory.stat": "\n".join(f"{k} {v}" for k, v in stat.items())}


V1 = "5:devices:/a\n4:cpu,memory:/docker/box\n0::/\n"
CONTAINERS = {
    "v2, from inside": ("0::/\n", {"": v2(4 * GB, 1 * GB)}, 3 * GB),
    "v2, files are given back": ("0::/\n", {"": v2(
        4 * GB, 3 * GB, inactive_file=GB, active_file=GB, anon=GB)}, 3 * GB),
    "v2, nested: the parent's": (
        "0::/a/b\n", {"a/b": v2(9 * GB, 0), "a": v2(4 * GB, 1 * GB)}, 3 * GB),
    "v2, nested: its own": (
        "0::/a/b\n", {"a/b": v2(2 * GB, 0), "a": v2(4 * GB, 1 * GB)}, 2 * GB),
    "v2, none": ("0::/a\n", {"a": v2(V2_NONE, 1 * GB)}, MACHINE),
    "v2, high": ("0::/a\n", {"a": v2(V2_NONE, 1 * GB, high=3 * GB)}, 2 * GB),
    "v2, another's limit": ("0::/a\n", {"b": v2(GB, 0)}, MACHINE),
    "v2, seen from elsewhere": ("0::/../x\n", {"": v2(4 * GB, 1 * GB)}, 3 * GB),
    "v2, beside v1": ("4:memory:/\n0::/a\n", {"unified/a": v2(4 * GB, GB)}, 3 * GB),
    "v2, more used than allowed": ("0::/\n", {"": v2(GB, 2 * GB)}, 0),
    "v1": (V1, {"memory/docker/box": v1(4 * GB, 1 * GB)}, 3 * GB),
    "v1, the path is the host's": (V1, {"memory": v1(4 * GB, 1 * GB)}, 3 * GB),
    "v1, files are given back": (V1, {"memory/docker/box": v1(
        4 * GB, 3 * GB, inactive_file=5, total_inactive_file=2 * GB)}, 3 * GB),
    "v1, none": (V1, {"memory/docker/box": v1(
        V1_NONE, 1 * GB, hierarchical_memory_limit=V1_NONE)}, MACHINE),
    "v1, nested": (V1, {"memory/docker/box": v1(V1_NONE, 0),
                        "memory/docker": v1(4 * GB, 1 * GB)}, 3 * GB),
    "v1, nested out of sight": (V1, {"memory/docker/box": v1(
        V1_NONE, 1 * GB, hierarchical_memory_limit=3 * GB)}, 2 * GB),
    "v1, a parent that does not pay": (V1, {"memory/docker": v1(
        GB, 0, hierarchy=0)}, MACHINE),
    "another controller": ("4:cpu:/a\n", {"memory/a": v1(GB, 0)}, MACHINE),
    "nothing to be read": ("", {}, MACHINE),
    "nonsense": ("0\n:::\n\n4:memory\n", {"": {"memory.max": "many"}}, MACHINE),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_memory_of_a_container(name, tmp_path):
    cgroup, groups, wanted = CONTAINERS[name]
    root = machine_at(tmp_path, cgroup, groups)
    assert figures.available_memory(root) == pytest.approx(wanted, abs=1024)


def test_without_proc_all_memory_is_the_best_guess(tmp_path, monkeypatch):
    assert figures.available_memory(tmp_path) > 1e6
    monkeypatch.delattr(os, "sysconf")
    assert figures.available_memory(tmp_path) > 1e6  # not known: nothing is refused


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux only")
@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_under_ulimit(kind):
    code = (f"import resource, torch\nlimit = 20 * 10**9\n"
            f"resource.setrlimit(resource.{kind}, (limit, limit))\n"
            "from plumbing.figures import available_memory\n"
            "print(limit - available_memory())")
    end = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True,
                         capture_output=True, text=True)
    assert 1e7 < int(end.stdout) or figures.available_memory() < 19e9


MEMORY_IS_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
                 "can't allocate memory: you tried to allocate 9 bytes. Error code 12"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("std::bad_alloc"), RuntimeError("CUDA error: out of memory"),
    RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    MemoryError(), np._core._exceptions._ArrayMemoryError((10**12,), np.dtype(float)),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", MEMORY_IS_OUT, ids=lambda error: str(error)[:30])
@pytest.mark.parametrize("wrapped", [False, True])
def test_too_little_memory_is_one_line(error, wrapped, capsys):
    if wrapped:
        cause, error = error, UserError("the file is broken; download it again")
        error.__cause__ = cause
    with pytest.raises(SystemExit) as end, files.one_line_errors():
        raise error
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "out of memory; lower --group-size" in said
    assert "python -m benchmarks.plan" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory"),
    RecursionError("maximum recursion depth exceeded"), FileNotFoundError(2, "gone")])
def test_other_errors_stay_tracebacks(error):
    with pytest.raises(type(error)), files.one_line_errors():
        raise error


def test_a_prompt_may_speak_of_memory(capsys):
    with pytest.raises(SystemExit), files.one_line_errors():
        raise UserError("a.jsonl:3: 'I am out of memory' is not a prompt")
    assert "a.jsonl:3" in capsys.readouterr().err


def program(*words: str, before=None, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, check=False, capture_output=True, text=True,
        preexec_fn=before, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux minds RLIMIT_AS")
def test_a_machine_without_memory_ends_a_run_with_one_line(tmp_path):
    def little() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1_600_000_000, 1_600_000_000))

    end = program("grpo.py", *SHORT, "--group-size", "2048", "--max-new-tokens", "64",
                  "--out", str(tmp_path / "run"), before=little)
    assert end.returncode == 2, end.stderr
    assert "Traceback" not in end.stderr
    assert end.stderr.splitlines()[-1].startswith(
        "grpo.py: error: out of memory; lower --group-size")
    assert not list((tmp_path / "run").glob(".*"))
    json.loads((tmp_path / "run" / "config.json").read_text())


# ---------------------------------------------------------------------------- threads


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "wanted"), [
    ("", 1), ("OMP_NUM_THREADS=2", 2), ("MKL_NUM_THREADS=2", 2), ("in Python", 3)])
@pytest.mark.parametrize("tiny", [True, False])
def test_the_tiny_model_takes_one_thread_unless_told(chosen, wanted, tiny, checkpoint):
    folder = "data/tiny" if tiny else str(checkpoint("qwen2-tied"))
    code = ("import torch, sys\nfrom loading import load\n"
            "from plumbing import machine\nown = torch.get_num_threads()\n"
            "if sys.argv[1] == 'in Python': torch.set_num_threads(3)\n"
            "load(sys.argv[2])\nprint(own, torch.get_num_threads())")
    name, _, value = chosen.partition("=")
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    end = subprocess.run([sys.executable, "-c", code, chosen, folder], cwd=ROOT,
                         capture_output=True, text=True, check=True,
                         env=env | ({name: value} if value else {}))
    own, used = map(int, end.stdout.split())
    # MKL's variable is not PyTorch's: only "it stays as it was" can be asked for
    assert used == (own if value or not (tiny or chosen) else wanted)


# ---------------------------------------------------------------------------- Windows

WINDOWS = """
import os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
import torch
for name in ("SIGHUP", "SIGKILL", "SIGALRM"):
    delattr(signal, name)
inner = os.open

def opened(path, *flags, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return inner(path, *flags, **named)

os.open = opened
for name in ("sysconf", "fork", "geteuid", "uname"):
    delattr(os, name)
sys.argv = ["grpo.py", *sys.argv[1:]]
import grpo
from plumbing.files import one_line_errors
with one_line_errors():
    grpo.main()
"""


@pytest.mark.slow
def test_without_the_modules_that_windows_lacks_a_run_ends(tmp_path):
    end = program("-c", WINDOWS, *SHORT, "--out", str(tmp_path / "run"))
    assert end.returncode == 0, end.stderr
    assert end.stderr.count("note: folders cannot be locked here") == 1
    files.verify_checksums(tmp_path / "run")
    assert (tmp_path / "run" / "SHA256SUMS").is_file()
