"""Figures for people: seconds by phase, memory, aligned tables."""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch


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


def peak_rss_gb() -> float:
    """Largest resident memory of this process so far, in GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9  # Linux counts KiB


def available_memory() -> int:
    """Bytes of main memory that a new allocation could use."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all memory is the best guess
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
