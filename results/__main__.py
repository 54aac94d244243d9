"""Show what runs did: `python -m results RUN [RUN ...]`.

Prints the tables of all folders, of runs and of reward models (tables.py). Then, into
each run's folder that has its steps and responses, writes report.html, a page to
explore them (report.py), and curves.png (plot.py), which needs matplotlib:
`pip install matplotlib`. A run that has not ended yet gets these two alone.
"""

import os
import sys
from pathlib import Path

from results import plot, report, tables
from results.files import BadInput

USAGE = "usage: python -m results RUN [RUN ...], folders of runs or of reward models"


def tables_of(folders: list[str], drawable: list[str]) -> str:
    """The tables of all folders but those of runs that have not ended."""
    running = [folder for folder in drawable if not has_summary(folder)]
    ended = [folder for folder in folders if folder not in running]
    if running:
        print(f"in no table, since they have not ended: {', '.join(running)}",
              file=sys.stderr)
    return tables.tables(ended) + "\n" * (1 + bool(drawable)) if ended else ""


def write_pages(folders: list[str], drawable: list[str]) -> list[Path]:
    """Page and picture of every run that has what they show; which are written."""
    written = [report.write(Path(folder)) for folder in drawable]
    if drawable and plot.can_draw():
        written += [plot.write(Path(folder)) for folder in drawable]
    without = [folder for folder in folders
               if folder not in drawable and has_summary(folder)]
    if without:
        print("no page, since no steps with responses are kept (metrics.jsonl, "
              f"samples.jsonl): {', '.join(without)}", file=sys.stderr)
    return written


def has_summary(folder: str) -> bool:
    """Whether this is the folder of a run that has ended."""
    return (Path(folder) / tables.SUMMARY).is_file()


def main(words: list[str]) -> int:
    """Print and write everything; return the exit status."""
    if {"-h", "--help"} & set(words):
        print(f"{USAGE}\n\n{__doc__.strip()}")
        return 0
    if not words:
        print(USAGE, file=sys.stderr)
        return 2
    folders = list(dict.fromkeys(words))
    try:
        drawable = [folder for folder in folders if report.has_responses(Path(folder))]
        # First on disk, then in words: nobody may read these to their end.
        text = tables_of(folders, drawable)
        text += "".join(f"wrote {path}\n" for path in write_pages(folders, drawable))
        print(text, end="", flush=True)
    except BadInput as error:
        print("python -m results: error:", " ".join(str(error).split()),
              file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head`: the pages are written, and the rest unwanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    if sys.stdout:  # a terminal may know fewer letters than the answers have
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
