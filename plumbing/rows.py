"""Rows of prompts and labels: what goes in is what was meant, or the line is named.

A file is JSONL: one object a line, with `prompt` (a text, or a chat's turns), and for
labels `response` and `scores`. null is absent: tools that write tables fill in what a
row has not. What is odd but allowed is counted, and told in one line.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from plumbing import parallel
from plumbing.files import UserError, require
from plumbing.formats import refuse_binary, refuse_text
from plumbing.machine import note
from plumbing.turns import flatten
from plumbing.words import HALF_SURROGATE

# Words for the rows of a prompt file that are only evaluated on; ours comes first.
HELD_OUT = ("heldout", "test", "validation", "val", "dev")
KEYS = ("prompt", "messages", "system", "response", "scores", "split", "cut")
# What other people call our fields.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "text", "query", "user", "problem",
               "prompts", "content"),
    "response": ("completion", "answer", "output", "chosen", "reply", "text",
                 "responses", "rejected"),
    "scores": ("score", "labels", "label", "rewards", "reward", "rating", "ratings"),
}
# A text with a chat template around it has one of these in front, or one at the end. A
# list of turns may have become a text, too.
TEMPLATED = re.compile(
    r"\A\s*(<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|<\|begin_of_text\|>|<bos>"
    r"|<\|start_header_id\|>|<start_of_turn>|<s>\s*\[INST\]|\[INST\]"
    r"|<\|(user|system|assistant)\|>|\[\s*\{\s*['\"](role|content|from)['\"]\s*:)"
    r"|(<\|im_end\|>|<\|im_start\|>\s*assistant|<\|endoftext\|>|<\|end_header_id\|>"
    r"|<\|eot_id\|>|<end_of_turn>|<start_of_turn>model|\[/INST\]|<\|assistant\|>)\s*\Z")
# The same in the middle of a text, where a person may have typed them.
MARKUP = re.compile(r"<\|(im_(start|end)|endoftext|(start|end)_header_id|eot_id|user|"
                    r"system|assistant|begin_of_text)\|>|<(start|end)_of_turn>|"
                    r"\[/?INST\]|<<SYS>>")
# A last line with which other models are asked to go on.
HEADINGS = {"assistant:", "ai:", "### response:", "### assistant:", "### answer:"}


class Row(dict):
    """A row that knows its `place`: file and line."""

    place = "a row"


def place_of(row: dict) -> str:
    """File and line of a row; one that was never read from a file has none."""
    return getattr(row, "place", Row.place)


def notice(message: str) -> None:
    """A note; of several processes, the first tells it."""
    if parallel.rank() == 0:
        note(message)


# --------------------------------------------------------------------------- the file


def read_rows(path: Path, responses: bool, labels: bool = False) -> list[dict]:
    """Read a JSONL file of prompts, with responses and scores where they are asked for.

    Args:
        path: one JSON object a line: `prompt`, `response`, `scores` {axis: 0..1}.
        responses: every row needs a `response`.
        labels: every row needs `scores`.

    Returns:
        the rows, with texts for chats, and without what is null.

    Raises:
        UserError: naming file, line and what to mend.
    """
    # Not `splitlines`, which also cuts at U+2028 and others that JSON allows.
    lines, rows, dropped = _text(path, labels).split("\n"), [], 0
    for number, line in enumerate(lines, 1):
        line = line.lstrip("\ufeff")  # files that were put together keep their marks
        if line.strip():
            row = Row(_parsed(line, f"{path}:{number}"))
            row.place = f"{path}:{number}"
            dropped += _check_row(row, row.place, responses, labels)
            rows.append(row)
    require(bool(rows), f"{path} has no rows; each line is a JSON object")
    if dropped:
        notice(f"{path}: of chats that end with an answer only the prompt is read; "
               f"such rows: {dropped}")
    return rows


def _text(path: Path, labels: bool) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    refuse_binary(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"cannot read {path}: it is not UTF-8 text (line {number}); "
                        "save it as UTF-8") from error
    refuse_text(path, text, labels)
    return text


def _parsed(line: str, place: str) -> dict:
    """A line as JSON has it: no NaN, no number beyond a float, no key twice."""
    def constant(word: str) -> None:
        raise ValueError(f"{word} is no JSON; write null, or leave it out")

    def number(word: str) -> float:
        if not math.isfinite(float(word)):
            constant(word)
        return float(word)

    def pairs(items: list[tuple[str, object]]) -> dict:
        found = dict(items)
        if len(found) < len(items):
            twice, _ = Counter(key for key, _ in items).most_common(1)[0]
            raise ValueError(f"{twice!r:.99} stands twice; keep one of them")
        return found

    try:
        row = json.loads(line, parse_constant=constant, parse_float=number,
                         object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from error
    require(isinstance(row, dict), f"{place}: expected a JSON object, found "
            f"{type(row).__name__}")
    return row


# ---------------------------------------------------------------------------- the row


def _check_row(row: dict, place: str, responses: bool, labels: bool) -> bool:
    """Check a row and make texts of its chat; whether an answer was dropped."""
    require(not HALF_SURROGATE.search(json.dumps(row, ensure_ascii=False)),
            f"{place}: the row holds half a surrogate pair; save the file as proper "
            "UTF-8")
    for key in [key for key in KEYS if key in row and row[key] is None]:
        del row[key]
    for key in row:
        meant = key.strip().casefold()
        require(meant not in KEYS or key == meant, f"{place}: nobody reads {key!r:.99};"
                f" rename it to \"{meant}\"")
    require(not row.get("tools"), f"{place}: tools cannot be read; take the row out")
    dropped = flatten(row, place, responses)
    for key in ("prompt", "response") if responses else ("prompt",):
        _require_text(row, key, place)
    require(bool(row["prompt"].strip()), f"{place}: the prompt is empty")
    for key in ("system", "split"):
        require(isinstance(row.get(key, ""), str), f"{place}: \"{key}\" must be a text,"
                f" not {json.dumps(row.get(key))[:99]}")
    require(bool(row.get("split", "train").strip()), f"{place}: \"split\" is empty; "
            "name one, or leave it out for train")
    if responses:
        require(isinstance(row.get("cut", False), bool), f"{place}: \"cut\" is "
                f"{json.dumps(row.get('cut'))[:99]}; it must be true or false, without "
                "quotes")
    if labels:
        _check_scores(row, place)
    return dropped


def _require_text(row: dict, key: str, place: str) -> None:
    """Refuse a row without this field, and say which of its fields is likely meant."""
    if isinstance(row.get(key), str):
        return
    if key in row:
        raise UserError(f"{place}: \"{key}\" must be a text, not "
                        f"{json.dumps(row[key])[:99]}")
    hint = _rename(row, key)
    if {"chosen", "rejected"} <= row.keys():
        hint = ("; the row is a pair: its prompt, and for labels a row for each "
                "response with its \"scores\", are needed")
    elif "conversations" in row:
        hint = ("; rename \"conversations\" to \"messages\", and in its turns from → "
                "role (human → user, gpt → assistant), value → content")
    raise UserError(f"{place}: \"{key}\" must be a text, and is not there{hint}")


def _rename(row: dict, key: str) -> str:
    """How to get a field that a row lacks: by renaming another of its fields."""
    likely = [name for name in row if name.strip().casefold() in OTHER_NAMES[key]]
    if likely:
        more = f", with {', '.join(likely[1:])} in it" if likely[1:] else ""
        return f"; rename {json.dumps(likely[0])[:99]} to \"{key}\"{more[:200]}"
    return f"; the row has {', '.join(row)[:200]}" if row else ""


def _check_scores(row: dict, place: str) -> None:
    scores = row.get("scores")
    hint = "" if "scores" in row else _rename(row, "scores")
    require(isinstance(scores, dict), f"{place}: \"scores\" must name at least one "
            "axis, as {\"axis\": 0.5}" + hint)
    for axis in [axis for axis, score in scores.items() if score is None]:
        del scores[axis]
    require(bool(scores), f"{place}: \"scores\" must name at least one axis; take "
            "a row without any score out")
    for axis, score in scores.items():
        require(bool(axis) and axis == axis.strip() and not set(axis) & set(",="),
                f"{place}: {axis!r:.99} cannot name an axis: no comma, no =, no space "
                "at the ends")
        require(axis != "R", f"{place}: no axis can be called R, the weighted sum of "
                "all; rename it")
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        mend = ""
        if isinstance(score, str):
            mend = ", without quotes"
        elif isinstance(score, bool):
            mend = ": 1 for true, 0 for false"
        elif number:
            mend = "; divide by the scale's top"
        require(number and 0 <= score <= 1,
                f"{place}: score of {axis} is {json.dumps(score)[:99]}, expected a "
                f"number from 0 to 1{mend}")


# -------------------------------------------------------------------------- the sides


def split_of(row: dict) -> str:
    """The word of a row's split, in small letters; train where it has none."""
    return (row.get("split") or "train").strip().casefold()


def same_text(text: str) -> str:
    """Equal for texts that differ only in case, spacing or composed letters.

    A prompt that is trained on in small letters is known in capitals, too.
    """
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def require_apart(rows: Iterable[dict], side: Callable[[dict], str],
                  text: Callable[[dict], object]) -> None:
    """Refuse a prompt that stands on two sides: what is known tests nothing.

    Raises:
        UserError: naming both lines.
    """
    first: dict[object, dict] = {}
    for row in rows:
        other = first.setdefault(text(row), row)
        require(side(other) == side(row), f"{place_of(row)}: the prompt is in "
                f"{side(row)} here, and in {side(other)} at {place_of(other)}; keep it "
                "in one of them (case and spacing do not count)")


def require_untemplated(rows: list[dict], control: Iterable[str]) -> None:
    """Refuse texts with a chat template around them; note other control tokens.

    The checkpoint's template is put around every prompt here, and what a text holds is
    never a control token: a second template would be read as plain text.

    Args:
        control: the checkpoint's control tokens.

    Raises:
        UserError: naming file, line and field.
    """
    odd, own = [], re.compile("|".join(map(re.escape, control)) or r"(?!)")
    for row in rows:
        for key in ("prompt", "system", "response"):
            match = TEMPLATED.search(row.get(key, ""))
            require(match is None, f"{place_of(row)}: the {key} is in a chat template "
                    f"already ({match and match[0].strip()!r:.60}); write the bare "
                    "text, or the turns as {\"messages\": [{\"role\": \"user\", "
                    "\"content\": …}]}")
        texts = "\n".join([row.get("system", ""), row["prompt"]])
        last = row["prompt"].strip().rpartition("\n")[2].strip().casefold()
        if (MARKUP.search(texts + row.get("response", "")) or own.search(texts)
                or last in HEADINGS):
            odd.append(place_of(row))
    if odd:
        notice(f"{odd[0]}: control tokens, or a template's headings, are read as "
               f"plain text; such rows: {len(odd)}")
