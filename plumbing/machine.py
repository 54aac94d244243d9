"""What differs from machine to machine, and what to do without it.

Folders of a network or in user space may know no locks, no permissions, no fsync;
Windows lacks the modules for them; a container may allow less memory than it shows; its
cores may be busy. A service that is missing is said once, in a note, and the run goes
on without it.
"""

import contextlib
import errno
import os
import sys
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import resource
except ImportError:
    resource = None

# What a file system answers to a request that it does not know. EBADF: NFS locks only
# what is open for writing, which a folder never is. ENOLCK: its lock server is away.
NOT_OFFERED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK,
               errno.EINVAL, errno.ENOTTY, errno.EBADF}
NOT_ALLOWED = {errno.EPERM, errno.EACCES}
# What a machine may answer to any request for a file, through no fault of ours.
FAULTS = {getattr(errno, name, None) for name in (
    "EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "ENAMETOOLONG",
    "ELOOP", "ENOTDIR", "EISDIR", "EMFILE", "ENFILE", "ESTALE", "ENODEV", "ENXIO",
    "ENOTCONN", "EHOSTDOWN", "ETIMEDOUT")} - {None}
THREADS = torch.get_num_threads()  # PyTorch's own choice: one a core
_said: set[str] = set()


def note(message: str) -> None:
    """Say on stderr, in one line, what is odd but allowed."""
    say(f"note: {' '.join(message.split())[:1000]}")


def note_once(message: str) -> None:
    """A `note`, the first time only."""
    if message not in _said:
        _said.add(message)
        note(message)


def say(text: str) -> None:
    """Print on stderr, if anybody is still there: a closed terminal ends no run."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


# ------------------------------------------------------------------------------ files


def open_folder(folder: Path) -> int | None:
    """A descriptor to lock or sync a folder; None where it cannot be read (Windows)."""
    try:
        return os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in NOT_OFFERED | NOT_ALLOWED:
            raise
    return None


def lock(handle: int | None) -> bool:
    """Lock a folder of `open_folder`; False where another process holds the lock.

    Where there are no locks a note says so.

    Raises:
        OSError: the file system is at fault.
    """
    try:
        if fcntl is None or handle is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        if error.errno not in NOT_OFFERED:
            raise
        note_once(f"folders cannot be locked here ({error.strerror}): see to it that "
                  "no second process writes the same one")
    return True


def sync(handle: int) -> None:
    """Wait until a file or folder is on the disk, if its file system can wait.

    Raises:
        OSError: the disk is at fault.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NOT_OFFERED | NOT_ALLOWED:
            raise
        note_once(f"fsync does not work here ({error.strerror}): what was written last "
                  "may not outlive a power cut")


def sync_folder(folder: Path) -> None:
    """The names in a folder, too, outlive a power cut."""
    handle = open_folder(folder)
    if handle is not None:
        try:
            sync(handle)
        finally:
            os.close(handle)


def let_all_read(path: str) -> None:
    """Give a new file the usual permissions; some file systems have none."""
    try:
        os.chmod(path, 0o644)
    except OSError as error:
        note_once(f"permissions cannot be set here ({error.strerror}): files have "
                  "those of their file system")


# ---------------------------------------------------------------------------- threads


def one_thread() -> None:
    """Compute with one thread, unless somebody has chosen how many.

    Operations of a small model last microseconds, and threads that meet after each of
    them wait by spinning. Beside another job one of them is always late: a step then
    took a minute and more, not a second. Alone, one thread is a third slower than two.
    """
    chosen = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    if not chosen and torch.get_num_threads() == THREADS:
        torch.set_num_threads(1)


# ----------------------------------------------------------------------------- memory


def out_of_memory(error: BaseException) -> bool:
    """Did memory run out, the GPU's or the machine's? Causes count, too.

    PyTorch has a class for the GPU only; for the rest it raises RuntimeError.
    """
    words = ("out of memory", "allocate memory", "not enough memory", "bad_alloc",
             "bad allocation", "ALLOC_FAILED")
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, MemoryError) or (
                getattr(error, "errno", None) == errno.ENOMEM):
            return True
        # Not of our own errors, which may quote anything.
        library = isinstance(error, (RuntimeError, OSError)) or (
            type(error).__module__.partition(".")[0] == "safetensors_rust")
        if library and any(word in str(error) for word in words):
            return True
        seen.append(error)
        error = error.__cause__
    return False


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; 0: not known."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # Linux counts KiB


def limits_of_containers(root: Path) -> list[int]:
    """Bytes that control groups leave, this process's own and those above it.

    Args:
        root: where /proc and /sys lie.
    """
    # A line is number:controllers:path; without controllers it is that of version 2.
    # From inside a container a path may name nothing: then only what lies at the top
    # of the mount, which is the container's own group, is there to be read.
    left = []
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        mounts = ("memory",) if controllers else ("", "unified")
        parts = [p for p in path.split("/") if p]
        if ".." in parts:  # a group outside of what can be seen from here
            parts = []
        for mount in mounts:
            top = root / "sys/fs/cgroup" / mount
            for depth in range(len(parts), -1, -1):
                left += _left_of_group(top.joinpath(*parts[:depth]), bool(controllers))
    return left


def _left_of_group(folder: Path, first_version: bool) -> list[int]:
    """What each limit of a control group leaves; nothing where there is none."""
    stat = {}
    for line in read_text(folder / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        stat[key] = _number(value)
    if first_version:
        # Without hierarchy a group does not pay for those beneath it.
        if _number(read_text(folder / "memory.use_hierarchy")) == 0:
            return []
        limits = [_number(read_text(folder / "memory.limit_in_bytes")),
                  stat.get("hierarchical_memory_limit")]
        used, total = _number(read_text(folder / "memory.usage_in_bytes")), "total_"
    else:
        limits = [_number(read_text(folder / name)) for name in
                  ("memory.max", "memory.high")]
        used, total = _number(read_text(folder / "memory.current")), ""
    # The kernel gives up its copies of files before it runs out.
    files = sum(stat.get(f"{total}{kind}_file") or 0 for kind in ("inactive", "active"))
    return [limit - max(0, (used or 0) - files) for limit in limits
            if limit is not None]


def limits_of_this_process(root: Path) -> list[int]:
    """Bytes that `ulimit -v` and `ulimit -d` leave."""
    pages = read_text(root / "proc/self/statm").split()
    if resource is None or len(pages) < 6:
        return []
    left = []
    kinds = (resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])
    for kind, used in kinds:
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            left.append(limit - int(used) * os.sysconf("SC_PAGE_SIZE"))
    return left


def read_text(path: Path) -> str:
    """A file of /proc or /sys; nothing where it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(text: str) -> int | None:
    """A limit in bytes; "max" and what is not there are none."""
    return int(text) if text.strip().isdecimal() else None
