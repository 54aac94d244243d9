"""Write RUN/report.html, a page to explore a run: `python results/report.py RUN`.

One file that needs no network: curves, the table before and after, and the groups of
the run. There, choose a step and a prompt, see its G responses with their scores, R and
advantage, and move the weights: R [E2], the advantages [E3] and the order of the
responses change at once. So a class sees which response would be reinforced before
anything is trained.
"""

import html
import json
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_name("report.html")
PLACE = "/*DATA*/null"


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    # Not `splitlines`, which also cuts at U+2028, which a response may hold.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def groups(samples: list[dict], size: int) -> list[dict]:
    """Rows of samples.jsonl → one entry for each group of G = size, in their order.

    Not by the prompt's text: a file of prompts may hold one twice.
    """
    return [{
        "step": samples[i]["step"], "prompt": samples[i]["prompt"],
        "responses": [{"text": row["response"], "scores": list(row["scores"].values())}
                      for row in samples[i:i + size]]}
        for i in range(0, len(samples), size)]


def data_of(folder: Path) -> dict:
    """All that the page shows."""
    config = json.loads((folder / "config.json").read_text())
    # DPO and SFT also have lines about training on pairs, without responses.
    metrics = [m for m in read_lines(folder / "metrics.jsonl") if "R" in m]
    summary = folder / "summary.json"
    told = json.loads(summary.read_text()) if summary.is_file() else {}
    return {
        "name": folder.name, "axes": config["axes"], "weights": config["weights_used"],
        "advantage": config["advantage"], "method": config.get("method", "grpo"),
        "min_std": config["min_std"],
        "steps": [m["step"] for m in metrics],
        "curves": {
            "R": [m["R"] for m in metrics],
            **({"R by the gold rubric": [m["R_gold"] for m in metrics]}
               if all("R_gold" in m for m in metrics) else {}),
            **{axis: [m["axes"][axis]["mean"] for m in metrics]
               for axis in config["axes"]}},
        "others": {key: [m[key] for m in metrics] for key in (
            "kl", "entropy", "length") if all(key in m for m in metrics)},
        "before": told.get("before"), "after": told.get("after"),
        "groups": groups(read_lines(folder / "samples.jsonl"), config["group_size"])}


def page(data: dict) -> str:
    """The page as HTML."""
    # "</script>" inside a response would end the script: escape every "<".
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = TEMPLATE.read_text()
    return template.replace("<!--NAME-->", html.escape(data["name"])).replace(
        PLACE, text)


def main(words: list[str]) -> str | None:
    """Write the page, or return what is wrong."""
    names = ("config.json", "metrics.jsonl", "samples.jsonl")
    if len(words) != 1 or not all((Path(words[0]) / n).is_file() for n in names):
        return f"usage: python results/report.py RUN, a folder with {', '.join(names)}"
    data, path = data_of(Path(words[0])), Path(words[0]) / "report.html"
    if not data["steps"]:
        return f"report.py: error: {words[0]} has no steps with responses to show"
    path.write_text(page(data), encoding="utf-8")
    print(f"wrote {path}")
    return None


if __name__ == "__main__":
    if problem := main(sys.argv[1:]):
        print(problem, file=sys.stderr)
        sys.exit(2)
