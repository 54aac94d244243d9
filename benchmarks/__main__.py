"""Ours against what people use: `python -m benchmarks MODEL_FOLDER`.

Every measurement runs in a process of its own (`cases.py`). The two sides of a row take
turns, so that a slow minute of the machine hits both; a figure is the median over all
rounds, with the smallest and the largest beside it. A ratio above 1 means that ours is
faster. Rows where we lose stay.

Needs `pip install -r requirements-peers.txt`. Everything on a real 0.5B takes about 100
minutes on two cores; `--only growth` and the like take parts of it, `--repeats 1` a
third of the time.
"""

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from loading import TINY
from plumbing.files import (
    UserError,
    file_sha256,
    one_line_errors,
    read_json,
    require,
    write_json,
    write_whole,
)
from plumbing.options import option, parse_settings

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "trl", "matplotlib")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of `python -m benchmarks`."""

    model: str = option("", "folder of a real Qwen checkpoint", positional=True)
    only: str = option("", "rows whose names match this regular expression; those that "
                       "the report has already stay")
    repeats: int = option(3, "processes of each side")
    out: Path = option(ROOT / "benchmarks" / "results.json", "the figures, as JSON; "
                       "the tables go beside it as Markdown")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: one case, and who takes part in it."""

    name: str
    sides: tuple[str, ...]  # the first is ours
    case: dict


def all_rows(model: str) -> list[Row]:
    """Everything that is measured, in the order of the tables."""
    def grpo(prompts: int, prompt_tokens: int, group: int, response: int, steps: int,
             who: str = model) -> dict:
        return {"case": "step", "model": who, "prompts": prompts, "steps": steps,
                "prompt_tokens": prompt_tokens, "group_size": group,
                "response_tokens": response}

    # TRL's long setting keeps gradient checkpointing, its default: memory is short.
    both, tuned = ("ours", "trl"), "trl, compact head"
    rows = [Row("step, short: 2 × 57 × 8 × 64", (*both, f"{tuned}, no checkpointing"),
                grpo(2, 57, 8, 64, 1)),
            Row("step, long: 1 × 517 × 8 × 32", (*both, tuned),
                grpo(1, 517, 8, 32, 1)),
            Row("step, tiny model: 8 × 24 × 8 × 48",
                (*both, f"{tuned}, no checkpointing"),
                grpo(8, 24, 8, 48, 10, str(TINY)))]
    rows += [Row(f"{n} responses to one prompt",
                 ("ours", "generate", "generate, shared prompt"),
                 {"case": "sampled", "model": model, "rows": n, "prompt_tokens": 57,
                  "response_tokens": 32, "steps": 1}) for n in (1, 8, 16, 32)]
    rows += [Row(f"log-probs, N = {n}",
                 ("ours", "naive", "trl selective", "trl chunked"),
                 {"case": "logprobs", "rows": n, "vocabulary": 151_936, "width": 896,
                  "steps": 3}) for n in (512, 2048)]
    rows += [Row("two LoRA blocks, 16 × 128 tokens", ("ours", "peft"),
                 {"case": "block", "rows": 16, "tokens": 128, "steps": 10}),
             Row("loading", ("ours", "from_pretrained"),
                 {"case": "loading", "model": model})]
    # What costs how much: one size grows, the others stay.
    base = {"prompts": 1, "prompt_tokens": 64, "response": 16}
    for title, key, values, group in (
            ("prompts", "prompts", (1, 2, 4), 4),
            ("prompt tokens", "prompt_tokens", (64, 256, 512), 4),
            ("prompt tokens, G = 16", "prompt_tokens", (64, 256, 512), 16),
            ("responses a prompt (G)", "group", (4, 8, 16), 4),
            ("response tokens", "response", (16, 32, 64), 4)):
        rows += [Row(f"growth, {title} = {value}", ("ours",),
                     grpo(**(base | {"group": group} | {key: value}), steps=1))
                 for value in values]
    return rows


def measure(row: Row, side: str) -> dict:
    """One process of one side, with this one's threads."""
    words = json.dumps(row.case | {"side": side})
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    end = subprocess.run([sys.executable, "-m", "benchmarks.cases", words], cwd=ROOT,
                         capture_output=True, text=True, check=False, env=env)
    if end.returncode:
        lines = end.stderr.strip().splitlines() or ["it printed nothing"]
        raise UserError(f"{row.name}, {side}: {lines[-1]} (needs "
                        "requirements-peers.txt)")
    return json.loads(end.stdout.splitlines()[-1])


def measure_rows(rows: list[Row], report: dict, repeats: int, out: Path) -> None:
    """Put the figures of all rows into the report, and write it after each."""
    known: dict[str, dict] = {}  # cases that several growth rows share are run once
    cases = {json.dumps([row.case, row.sides]): len(row.sides) for row in rows}
    with tqdm(total=repeats * sum(cases.values()), unit="process",
              file=sys.stderr) as bar:
        for row in rows:
            key = json.dumps([row.case, row.sides])
            if key not in known:
                runs: dict[str, list] = {side: [] for side in row.sides}
                for _ in range(repeats):
                    for side in row.sides:
                        bar.set_postfix_str(f"{row.name}: {side}")
                        runs[side].append(measure(row, side))
                        bar.update()
                known[key] = {side: summarise(own) for side, own in runs.items()}
            report["rows"][row.name] = known[key]
            write_json(out, report)  # two hours of rows must not hang on the last


def summarise(runs: list[dict]) -> dict:
    """Figures of all processes of a side → medians, with the smallest and largest."""
    rounds = [r for run in runs for r in run["rounds"]]
    whole = [r["all"] for r in rounds]
    figures = {"seconds": median(whole), "low": min(whole), "high": max(whole),
               "rounds": len(whole), "peak_gb": median(r["peak_gb"] for r in runs),
               "phases": {phase: median(r[phase] for r in rounds)
                          for phase in rounds[0] if phase != "all"}}
    first = runs[0]
    if "tokens" in first:
        figures["tokens_per_second"] = first["tokens"] / figures["seconds"]
    if "gemm" in first:
        # FLOPs / (seconds · FLOP/s of a large product, mean of just before and after)
        figures["share_of_gemm"] = {
            phase: median(flops / (median(r[phase] for r in run["rounds"])
                                   * sum(run["gemm"]) / 2) for run in runs)
            for phase, flops in first["flops"].items()}
    if "product_rate" in first:
        # bytes / (seconds · bytes/s of the head's product, likewise)
        figures["share_of_product"] = median(
            run["bytes"] / (median(r["all"] for r in run["rounds"])
                            * sum(run["product_rate"]) / 2) for run in runs)
    return figures


# ----------------------------------------------------------------------------- tables


def brief(results: dict[str, dict]) -> list[str]:
    """A line a row, for the main README."""
    def cell(r: dict) -> str:
        return f"{r['seconds']:.2f} s, {r['peak_gb']:.2f} GB"

    lines = ["| | ours | the others (seconds over ours) |", "|---|---|---|"]
    for name, sides in results.items():
        ours = sides["ours"]
        others = [f"{side} {cell(r)} ({r['seconds'] / ours['seconds']:.2f} ×)"
                  for side, r in sides.items() if side != "ours"]
        lines.append(f"| {name} | {cell(ours)} | {'; '.join(others)} |")
    return lines


def compared(results: dict[str, dict]) -> list[str]:
    """Ours beside the others: seconds, ratio, memory, share of the machine."""
    lines = ["| | who | seconds (low to high) | over ours | tokens/s | peak GB "
             "| share of the machine |", "|" + "---|" * 7]
    for name, sides in results.items():
        ours = sides["ours"]
        for side, r in sides.items():
            ratio = "" if side == "ours" else f"{r['seconds'] / ours['seconds']:.2f} ×"
            rate = r.get("tokens_per_second")
            cells = [name, side, f"{r['seconds']:.2f} ({r['low']:.2f} to "
                     f"{r['high']:.2f})", ratio, f"{rate:.1f}" if rate else "",
                     f"{r['peak_gb']:.2f}", share(r)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def share(result: dict) -> str:
    """How near a side comes to the machine's own products or bandwidth."""
    if "share_of_gemm" in result:
        return ", ".join(f"{phase} {ratio:.0%} of GEMM"
                         for phase, ratio in result["share_of_gemm"].items())
    if "share_of_product" in result:
        return f"{result['share_of_product']:.0%} of the head's product"
    return ""


def phases(results: dict[str, dict]) -> list[str]:
    """Where a step's seconds go; the reference's head is part of our training."""
    lines = ["| | who | sampling | reference | training |", "|---|---|---|---|---|"]
    for name, sides in results.items():
        for side, r in sides.items():
            cells = [f"{r['phases'][p]:.2f}" if p in r["phases"] else "–"
                     for p in ("sampling", "reference", "training")]
            lines.append(f"| {name} | {side} | " + " | ".join(cells) + " |")
    return lines


def growth(results: dict[str, dict]) -> list[str]:
    """Seconds and memory as one size grows."""
    lines = ["| | seconds (low to high) | peak GB |", "|---|---|---|"]
    for name, sides in results.items():
        r = sides["ours"]
        lines.append(f"| {name.removeprefix('growth, ')} | {r['seconds']:.2f} "
                     f"({r['low']:.2f} to {r['high']:.2f}) | {r['peak_gb']:.2f} |")
    return lines


def series(results: dict[str, dict]) -> dict[str, list[tuple[int, dict]]]:
    """Growth rows by what grows: its values, each with its figures."""
    points: dict[str, list] = {}
    for name, sides in results.items():
        title, _, value = name.removeprefix("growth, ").rpartition(" = ")
        points.setdefault(title, []).append((int(value), sides["ours"]))
    return points


def draw(results: dict[str, dict], path: Path) -> None:
    """Seconds against what grows, both relative to the smallest; and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (seconds, memory) = pyplot.subplots(1, 2, figsize=(10, 3.8))
    for title, points in series(results).items():
        first, start = points[0]
        times = [value / first for value, _ in points]
        seconds.plot(times, [r["seconds"] / start["seconds"] for _, r in points],
                     marker="o", label=title)
        memory.plot(times, [r["peak_gb"] for _, r in points], marker="o", label=title)
    seconds.plot([1, 8], [1, 8], color="grey", linestyle=":", label="linear")
    seconds.set_title("seconds of a step, relative to the smallest", fontsize=10)
    memory.set_title("peak memory with the weights, GB", fontsize=10)
    for place in (seconds, memory):
        place.set_xlabel("what grows, relative to the smallest")
    seconds.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


LEGEND = """\
`over ours`: their seconds divided by ours; above 1 ours is faster. Everything is in
fp32 (TRL's own default is bf16, which CPUs without bf16 units compute slower), with
LoRA of rank 16 on all seven projections, random rewards, and no response that ends
early. A step is `prompts × prompt tokens × G × response tokens`; its tokens/s are
sampled tokens by all its seconds. TRL runs with its own defaults, which are gradient
checkpointing and, on a CPU, the head's product on every token; "compact head" has it
on response tokens only, as TRL does on GPUs. Ours uses oneDNN for products with large
frozen weights, the others MKL, which is what `F.linear` asks. Peak GB is the process
(its weights too) for steps and responses, and what came on top of the start for the
other rows. "Of GEMM": the FLOPs of a pass by its seconds, beside the best large
product of either library just before and after; the fused attention's FLOPs are not
counted. "Of the head's product": weights read a second, beside those that the head's
product reads with as many rows."""


def tables(report: dict) -> str:
    """The report as Markdown."""
    rows = report["rows"]
    grown = {n: r for n, r in rows.items() if n.startswith("growth")}
    steps = {n: r for n, r in rows.items() if n.startswith("step")}
    rest = {n: r for n, r in rows.items() if n not in grown}
    versions = ", ".join(f"{name} {version}"
                         for name, version in report["versions"].items())
    about = (f"{report['date']}, {report['machine']}, {report['threads']} threads, "
             f"{versions}; {report['repeats']} processes of each side; model SHA-256 "
             f"{report['sha256']}.")
    sections = [[about], [LEGEND]]
    sections += [make(chosen) for make, chosen in
                 ((brief, rest), (compared, rest), (phases, steps), (growth, grown))
                 if chosen]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def processor() -> str:
    """Its name, as Linux tells it."""
    about = Path("/proc/cpuinfo")
    for line in about.read_text().splitlines() if about.is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    s = parse_settings(Settings, __doc__.split("\n")[0], argv)
    weights = Path(s.model) / "model.safetensors"
    require(weights.is_file(), f"{s.model} has no model.safetensors")
    require(s.repeats >= 1, "--repeats must be at least 1")
    try:
        rows = [r for r in all_rows(s.model) if re.search(s.only, r.name)]
        versions = {name: version(name) for name in PACKAGES}
    except re.error as error:
        raise UserError(f"--only {s.only}: no regular expression ({error})") from error
    except PackageNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install -r "
                        "requirements-peers.txt") from error
    require(bool(rows), f"--only {s.only}: no row has a name like that")
    report = {
        "date": date.today().isoformat(), "machine": processor(),
        "threads": torch.get_num_threads(), "repeats": s.repeats,
        "versions": versions, "sha256": file_sha256(weights), "rows": {}}
    if s.only and s.out.is_file():
        report["rows"] = earlier_rows(s.out, report)
    measure_rows(rows, report, s.repeats, s.out)
    order = [row.name for row in all_rows(s.model)]
    report["rows"] = {n: report["rows"][n] for n in order if n in report["rows"]}
    write_json(s.out, report)
    write_whole(s.out.with_suffix(".md"), tables(report))
    print(tables(report))
    grown = {n: r for n, r in report["rows"].items() if n.startswith("growth")}
    if grown:
        draw(grown, s.out.parent / "growth.png")


def earlier_rows(path: Path, report: dict) -> dict[str, dict]:
    """The rows of a report of the same machine, versions and model."""
    old = read_json(path)
    changed = [key for key in report
               if key not in ("date", "rows") and old.get(key) != report[key]]
    require(not changed, f"{path} is of another {', '.join(changed)}; choose another "
            "--out, or measure everything again")
    return old["rows"]


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
