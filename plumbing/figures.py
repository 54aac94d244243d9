"""Figures for people: seconds by phase, memory, aligned tables."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from plumbing import machine


class Clock:
    """Seconds by phase: `with clock("sampling"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count for `phase` until the block ends."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_initialized():  # a GPU may not have begun yet
            torch.cuda.synchronize()
        spent = time.perf_counter() - started
        self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


class Cost:
    """Seconds and peak memory of a run, those of its earlier processes included."""

    def __init__(self, earlier: object = None) -> None:
        """Begin now; `earlier` is what `so_far` said in the process before."""
        self.started = time.perf_counter()
        earlier = earlier if isinstance(earlier, dict) else {}
        self.seconds, self.peak = (
            value if type(value) in (int, float) and 0 <= value < 1e12 else 0.0
            for value in map(earlier.get, ("seconds", "peak_rss_gb")))

    def so_far(self) -> dict[str, float]:
        """What was spent until now, to be kept with what it was spent on."""
        return {"seconds": self.seconds + time.perf_counter() - self.started,
                "peak_rss_gb": max(self.peak, peak_rss_gb())}


def peak_rss_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    return machine.peak_memory() / 1e9


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that a new allocation could use: the least of all limits.

    These are the kernel's own estimate, what a container may still have, and what
    `ulimit` leaves.

    Args:
        root: where /proc and /sys lie.
    """
    left = machine.limits_of_containers(root) + machine.limits_of_this_process(root)
    for line in machine.read_text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            left.append(int(line.split()[1]) * 1024)
            break
    else:  # not Linux: all memory is the best guess, if it is known
        left.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
                    if hasattr(os, "sysconf") else sys.maxsize)
    return max(0, min(left))


def format_table(header: list[str], rows: list[list[object]]) -> str:
    """Align columns: text to the left, numbers (three decimals) to the right."""
    cells = [header] + [
        [f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        lines.append("  ".join(
            [first] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        ))
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """`75.3` → `1 min 15 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
