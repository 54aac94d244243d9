"""Files that are no JSONL: each is refused with the line that makes JSONL of it.

Guessing would be worse: a table has no place for scores, and a compressed file may hold
anything. The lines run as they stand; those for Parquet and Arrow need `datasets`.
"""

import re
import shlex
from pathlib import Path

from plumbing.files import UserError, require

ROWS = "[print(json.dumps(r)) for r in {}]"
TABLE = "csv.DictReader(open(sys.argv[1], newline='', encoding='utf-8-sig'){})"
# A table has a column an axis; what a row leaves blank is absent.
SCORED = ("keep = ('prompt', 'response', 'split', 'category'); "
          "[print(json.dumps({{k: r[k] for k in keep if r.get(k)}} | {{'scores': "
          "{{k: float(v) for k, v in r.items() if k not in keep and v}}}})) "
          "for r in {}]")
FILLED = "[print(json.dumps({{k: v for k, v in r.items() if v}})) for r in {}]"
# First bytes → what it is, and the command that writes JSONL to stdout.
MAGIC = {
    b"\x1f\x8b": ("gzip", "gzip -dc"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "zstd -dc"),
    b"\xfd7zXZ\x00": ("xz", "xz -dc"),
    b"BZh": ("bzip2", "bzip2 -dc"),
    b"PK\x03\x04": ("a zip archive, or a spreadsheet", "unzip -p"),
    b"PAR1": ("Parquet", "Parquet"),
    b"ARROW1": ("Arrow", "Arrow"),
}
SUFFIXES = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\x00",
            ".bz2": b"BZh", ".zip": b"PK\x03\x04", ".xlsx": b"PK\x03\x04",
            ".parquet": b"PAR1", ".arrow": b"ARROW1", ".feather": b"ARROW1"}
SEPARATORS = {"\t": "tab-separated", ",": "comma-separated", ";": "comma-separated"}


def python(code: str, path: Path) -> str:
    """A command that runs `code` on a file and writes JSONL beside it."""
    return (f"python -c \"{code}\" {shlex.quote(str(path))} > "
            f"{shlex.quote(str(beside(path)))}")


def beside(path: Path) -> Path:
    """Where the converted file goes: never onto the file itself."""
    suffixes = "|".join(map(re.escape, (*SUFFIXES, ".csv", ".tsv", ".json", ".jsonl")))
    name = re.sub(f"({suffixes})+$", "", path.name, flags=re.I) or path.name
    new = path.with_name(f"{name}.jsonl")
    return new if new != path else path.with_name(f"{name}.converted.jsonl")


def refuse_binary(path: Path, data: bytes) -> None:
    """Refuse what is no text, by its first bytes or by its suffix.

    Raises:
        UserError: naming the format and the line that converts it.
    """
    magic = next((m for m in MAGIC if data.startswith(m)),
                 SUFFIXES.get(path.suffix.lower()) if data[:1] not in b"{[" else None)
    if magic is not None:
        kind, command = MAGIC[magic]
        target = f"{shlex.quote(str(path))} > {shlex.quote(str(beside(path)))}"
        if kind in ("Parquet", "Arrow"):
            reader = {"Parquet": "from_parquet", "Arrow": "from_file"}[kind]
            command = ("python -c \"import sys, datasets; datasets.Dataset."
                       f"{reader}(sys.argv[1]).to_json(sys.argv[2])\"")
            target = target.replace(" > ", " ")
        raise UserError(f"{path} is {kind}, not JSONL; convert it: {command} {target}")
    # ASCII in UTF-16 has a zero byte in every pair, and often no mark in front.
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\x00" in data[:4]:
        wide = data[:4] in (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff") or (
            data[:4].count(0) == 3)
        code = "utf-32" if wide else "utf-16"
        if data[:2] not in (b"\xff\xfe", b"\xfe\xff") and data[:4] != b"\0\0\xfe\xff":
            code += "-be" if data[:1] == b"\x00" else "-le"
        # By name: PowerShell's own `>` writes UTF-16 again.
        line = python(f"import sys; open(sys.argv[2], 'wb').write(open(sys.argv[1], "
                      f"encoding='{code}', newline='').read().encode())", path
                      ).replace(" > ", " ")
        raise UserError(f"cannot read {path}: it is {code[:6].upper()}, not UTF-8 text;"
                        f" convert it: {line}")


def refuse_text(path: Path, text: str, labels: bool) -> None:
    """Refuse JSON arrays and tables, by their first line or by the suffix.

    Args:
        labels: the rows should have scores, so a table's other columns are axes.

    Raises:
        UserError: naming the format and the line that converts it.
    """
    start = text.lstrip()
    head = start.split("\n", 1)[0].strip()
    if start[:1] == "[":
        line = python("import json, sys; " + ROWS.format(
            "json.load(open(sys.argv[1], encoding='utf-8-sig'))"), path)
        raise UserError(f"{path}:1: a JSON array, expected a JSON object a line; "
                        f"convert it: {line}")
    require(head != "{", f"{path}:1: not valid JSON by itself: every object stands on "
            "one line of its own; convert the file: jq -c . "
            f"{shlex.quote(str(path))} > {shlex.quote(str(beside(path)))}")
    names = {separator: [name.strip().strip('"').casefold()
                         for name in head.split(separator)] for separator in SEPARATORS}
    separator = next((s for s, own in names.items() if "prompt" in own
                      and start[:1] != "{"), None)
    if separator is None and path.suffix.lower() in (".csv", ".tsv") and (
            start[:1] not in ("{", "")):
        separator = max(SEPARATORS, key=lambda s: len(names[s]))
    if separator is not None:
        other = {",": "", ";": ", delimiter=';'", "\t": ", delimiter='\\t'"}[separator]
        line = python("import csv, json, sys; " + (SCORED if labels else FILLED).format(
            TABLE.format(other)), path)
        raise UserError(f"{path} is a {SEPARATORS[separator]} table, not JSONL; convert"
                        f" it: {line}")
