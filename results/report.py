"""RUN/report.html, a page to explore a run; `python -m results RUN` writes it.

One file that needs no network: curves, the table before and after, and the groups of
the run. There, choose a step and a prompt, see its G responses with their scores, R and
advantage, and move the weights: R [E2], the advantages [E3] and the order of the
responses change at once. So a class sees which response would be reinforced before
anything is trained.
"""

import html
import json
from pathlib import Path

from results.files import read_json, read_rows, scored_steps, write_whole

TEMPLATE = Path(__file__).with_name("report.html")
DATA_MARK = "/*DATA*/null"  # what the data replaces in the template


def has_responses(folder: Path) -> bool:
    """Whether this is a run's folder with steps and responses to show."""
    names = ("config.json", "metrics.jsonl", "samples.jsonl")
    return (all((folder / name).is_file() for name in names)
            and (folder / "samples.jsonl").stat().st_size > 0
            and bool(scored_steps(folder)))


def groups(samples: list[dict], size: int) -> list[dict]:
    """Rows of samples.jsonl → one entry for each group of G = size, in their order.

    Not by the prompt's text: a file of prompts may hold one twice.
    """
    return [{
        "step": samples[i]["step"], "prompt": samples[i]["prompt"],
        "responses": [{"text": row["response"], "scores": list(row["scores"].values())}
                      for row in samples[i:i + size]]}
        for i in range(0, len(samples), size)]


def page_data(folder: Path) -> dict:
    """All that the page shows."""
    config = read_json(folder / "config.json", "axes", "weights_used", "group_size")
    steps, path = scored_steps(folder), folder / "summary.json"
    summary = read_json(path) if path.is_file() else {}  # a run may not have ended
    samples = read_rows(folder / "samples.jsonl", "step", "prompt", "response",
                        "scores")
    return {
        "name": folder.absolute().name,
        "axes": config["axes"], "weights": config["weights_used"],
        # Other methods have no advantages inside a group: the page shows GRPO's own.
        "advantage": config.get("advantage", "group"),
        "min_std": config.get("min_std", 1e-3),
        "method": config.get("method", "grpo"),
        "steps": [m["step"] for m in steps],
        "curves": {
            "R": [m["R"] for m in steps],
            **({"R by the gold rubric": [m["R_gold"] for m in steps]}
               if all("R_gold" in m for m in steps) else {}),
            **{axis: [m["axes"][axis]["mean"] for m in steps]
               for axis in config["axes"]}},
        "others": {key: [m[key] for m in steps] for key in ("kl", "entropy", "length")
                   if all(m.get(key) is not None for m in steps)},
        "before": summary.get("before"), "after": summary.get("after"),
        "groups": groups(samples, config["group_size"])}


def page(data: dict) -> str:
    """The page as HTML."""
    # "</script>" inside a response would end the script: escape every "<".
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("<!--NAME-->", html.escape(data["name"])).replace(
        DATA_MARK, text)


def write(folder: Path) -> Path:
    """Write the page of a run that `has_responses`; return its path."""
    path = folder / "report.html"
    write_whole(path, page(page_data(folder)).encode())
    return path
