"""Exercise 9: an axis of your own, from labels to training."""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from loading import TINY
from plumbing.files import write_whole
from plumbing.rows import read_rows

PROMPTS = {"train": 150, "test": 40}  # with 16 labelled responses each


def brevity(response: str) -> float:
    """1 for at most 12 words, 0 from 40 words on, falling evenly in between."""
    raise NotImplementedError("write me")


def main(brevity: Callable) -> None:
    """Some of the tiny world's labels, with the new axis beside the others."""
    rows = read_rows(TINY / "labels.jsonl", responses=True)
    chosen = []
    for split, count in PROMPTS.items():
        groups = groupby((r for r in rows if r["split"] == split),
                         key=lambda row: row["prompt"])
        chosen += [row for (_, group), _ in zip(groups, range(count), strict=False)
                   for row in group]
    for row in chosen:
        row["scores"]["brevity"] = round(brevity(row["response"]), 3)
    path = Path("runs") / "brevity.jsonl"
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n"
                              for row in chosen))
    print(f"{len(chosen)} rows in {path}")


if __name__ == "__main__":
    main(brevity)
