"""Paths that outlive a move: how a run's folder names what it was made from.

A path is written as one walks to it from the run's folder, so that a tree may move as a
whole; bundled data by the repository; what lies at home, without saying whose home.
What is there in the end, a SHA-256 decides.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def portable(path: str | Path, folder: Path) -> str:
    """A path as config.json keeps it: "data/…", "./…", "../…" or "~/…"."""
    real, start = os.path.realpath(path), os.path.realpath(folder)
    home = os.path.realpath(os.path.expanduser("~"))
    if _inside(real, str(ROOT / "data")):
        return os.path.relpath(real, ROOT)
    if _inside(real, home) and not _inside(start, home) and home != os.sep:
        return os.path.join("~", os.path.relpath(real, home))
    try:
        way = os.path.relpath(real, start)
    except ValueError:  # another drive
        return real
    return way if way.split(os.sep)[0] in (os.curdir, os.pardir) else os.path.join(
        os.curdir, way)


def located(text: str, folder: Path) -> str:
    """Where a path of config.json is now; one of a word alone stays as it is."""
    first = text.split(os.sep)[0]
    if first in (os.curdir, os.pardir):
        return os.path.normpath(os.path.join(os.path.realpath(folder), text))
    if first == "~":
        return os.path.expanduser(text)
    bundled = os.path.normpath(ROOT / text)
    own = _inside(bundled, str(ROOT / "data")) and os.path.exists(bundled)
    return bundled if own else text


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
