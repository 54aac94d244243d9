"""Claims about plumbing/rows.py, plumbing/turns.py and plumbing/formats.py.

* Every bad row is refused with its file and line; a good one comes back as it was.
* null is absent, wherever it stands; what only looks like a field of ours is refused.
* true, false and numbers are JSON's own; no key stands twice, no NaN anywhere.
* One question (and one answer) of a chat is read; other chats are refused.
* A mark in front and both line ends are read; other formats are refused with a line
  that converts them, and the lines do.
* A prompt on two sides is refused, however it is spaced; so is one in a chat template.
* What is odd but allowed is counted in one note.
"""

import csv
import gzip
import json
import shlex
import subprocess
import sys

import pytest

from plumbing import rows as rows_
from plumbing.files import UserError
from plumbing.rows import read_rows

GOOD = '{"prompt": "p", "response": "r", "scores": {"safety": 0.5}}'
ROW = json.loads(GOOD)


def written(folder, *rows: dict):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labels(path) -> list[dict]:
    return read_rows(path, responses=True, labels=True)


# ------------------------------------------------------------------------------ a row


def scored(score: str) -> str:
    """A row with this score; JSON itself has no NaN, but Python's parser takes it."""
    return GOOD.replace("0.5", score)


@pytest.mark.parametrize(("line", "why"), [
    ("not json", "not valid JSON"),
    ('{"prompt": "p"', "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('["prompt"]', "found list"),
    ("3", "found int"),
    ('{"response": "r"}', '"prompt" must be a text'),
    ('{"prompt": 3, "response": "r"}', '"prompt" must be a text'),
    ('{"prompt": "p"}', '"response" must be a text'),
    ('{"prompt": "", "response": "r"}', "prompt is empty"),
    ('{"prompt": " \\n\\t", "response": "r"}', "prompt is empty"),
    ('{"prompt": "p", "response": "\\ud83d"}', "half a surrogate pair"),
    ('{"prompt": "p", "response": "r", "id": ["\\udc00"]}', "half a surrogate pair"),
    ('{"prompt": "p", "response": "r"}', '"scores" must name'),
    ('{"prompt": "p", "response": "r", "scores": {}}', '"scores" must name'),
    ('{"prompt": "p", "response": "r", "scores": [1]}', '"scores" must name'),
    *((scored(bad), "score of safety is .* 0 to 1") for bad in (
        "1.01", "-0.01", "true", "false", '"0.5"', '""', "[0.5]",
        "1" + "0" * 400)),  # an int beyond any float
    *((scored(bad), "not valid JSON") for bad in (
        "NaN", "Infinity", "-Infinity", "1e999")),
])
def test_bad_row_is_refused_with_file_and_line(tmp_path, line, why):
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n")  # an empty line counts, too
    with pytest.raises(UserError, match=why) as refusal:
        read_rows(path, responses=True, labels=True)
    assert f"{path}:3: " in str(refusal.value)


@pytest.mark.parametrize(("content", "why"), [
    (b"", "has no rows"), (b"\n  \n", "has no rows"), (b"\xef\xbb\xbf", "has no rows"),
    (GOOD.encode() + b"\n\xff\n", r"not UTF-8 text \(line 2\)"),
])
def test_bad_file_of_rows_is_refused(tmp_path, content, why):
    path = tmp_path / "labels.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=why) as refusal:
        read_rows(path, responses=True, labels=True)
    assert str(path) in str(refusal.value)


def test_good_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        {"prompt": "a", "response": "", "scores": {"x": 0, "y": 1.0}, "id": 7},
        # JSON allows these inside a string; str.splitlines() would cut there.
        {"prompt": "1\u20282\u20293\x854\x7f", "response": "😀\r\n", "scores": {"x": 1}}
    ]
    path = tmp_path / "rows.jsonl"
    for ascii_only, end in ((True, "\n"), (False, "\n"), (False, "\r\n")):
        text = end.join(json.dumps(r, ensure_ascii=ascii_only) for r in rows)
        path.write_bytes(text.encode())
        assert read_rows(path, responses=True, labels=True) == rows


def test_only_what_is_asked_for_is_required(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "p", "scores": "anything"}')
    assert read_rows(path, responses=False)[0]["prompt"] == "p"


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "gone", tmp_path):
        with pytest.raises(UserError, match="cannot read"):
            read_rows(path, responses=False)


def test_null_is_absent(tmp_path):
    filled = ROW | {"scores": {"safety": 0.5, "other": None}} | dict.fromkeys(
        ("split", "cut", "system", "messages"))
    assert labels(written(tmp_path, filled, ROW)) == [ROW, ROW]
    asked = {"prompt": None, "messages": [{"role": "user", "content": "p"}]}
    assert read_rows(written(tmp_path, asked), False) == [{"prompt": "p"}]


@pytest.mark.parametrize(("change", "why"), [
    ({"scores": {"safety": None}}, "at least one axis; take a row without any"),
    ({"scores": None}, '"scores" must name'), ({"prompt": None}, "is not there"),
    ({"response": None}, "is not there"),
    ({"scores": {"safety": "0.5"}}, "without quotes"),
    ({"scores": {"safety": True}}, "1 for true"),
    ({"scores": {"safety": 5}}, "divide by the scale's top"),
    ({"scores": {" safety": 1}}, "cannot name an axis"),
    ({"scores": {"R": 1}}, "no axis can be called R"),
    ({"scores": {"a,b": 1}}, "cannot name an axis"),
    *(({"cut": bad}, '"cut" is .*true or false') for bad in (
        "false", "true", "", 0, 1, 0.0, [], {})),
    *(({"split": bad}, '"split" must be a text') for bad in (0, True, ["test"], {})),
    ({"split": " "}, '"split" is empty'), ({"system": 3}, '"system" must be a text'),
    ({"Split": "test"}, 'rename it to "split"'), ({" cut": True}, 'to "cut"'),
    ({"PROMPT": "p"}, 'to "prompt"'), ({"tools": [{}]}, "tools cannot be read")])
def test_what_is_not_what_it_seems_is_refused_by_line(change, why, tmp_path):
    path = written(tmp_path, ROW, ROW | change)
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{why}"):
        labels(path)


@pytest.mark.parametrize(("line", "why"), [
    (GOOD.replace("{", '{"prompt": "q", ', 1), "'prompt' stands twice"),
    (GOOD.replace("0.5", '0.5, "safety": 1'), "'safety' stands twice"),
    (GOOD.replace("{", '{"id": [{"a": 1, "a": 1}], ', 1), "'a' stands twice"),
    *((GOOD.replace("{", '{"id": ' + bad + ", ", 1), "is no JSON")
      for bad in ("NaN", "-Infinity", "[1e999]"))])
def test_what_json_has_not_is_refused(line, why, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: not valid JSON.*{why}"):
        labels(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(("row", "why"), [
    *(({key: "p"}, f'rename "{key}" to "prompt"') for key in (
        "question", "instruction", "input", "text", "Query")),
    *(({"prompt": "p", key: "r"}, f'rename "{key}" to "response"') for key in (
        "completion", "answer", "output", "text", "chosen")),
    ({"instruction": "p", "input": "i"}, 'rename "instruction" .* with input in it'),
    ({"prompt": "p", "response": "r", "score": {"a": 1}}, 'rename "score" to "scores"'),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "is a pair"),
    ({"conversations": [{"from": "human", "value": "p"}]}, "from → role"),
    ({"prompt": ["p"], "response": "r"}, "each turn must have"),
    ({"data": [1]}, "the row has data")])
def test_fields_of_other_names_are_refused_with_the_right_name(row, why, tmp_path):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{why}"):
        labels(written(tmp_path, row))


# ------------------------------------------------------------------------------ chats


def turns(*pairs: tuple) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


SYSTEM, USER, ANSWER = ("system", "s"), ("user", "p"), ("assistant", "r")


@pytest.mark.parametrize(("row", "wanted"), [
    ({"messages": turns(USER)}, {"prompt": "p"}),
    ({"prompt": turns(USER)}, {"prompt": "p"}),
    ({"messages": turns(SYSTEM, USER)}, {"prompt": "p", "system": "s"}),
    ({"prompt": turns(SYSTEM, USER), "split": "test"},
     {"prompt": "p", "system": "s", "split": "test"}),
    ({"messages": turns(("user", [{"type": "text", "text": "a"},
                                  {"type": "text", "text": "b", "image": None}]))},
     {"prompt": "ab"}),
    ({"prompt": "p", "system": "s"}, {"prompt": "p", "system": "s"})])
def test_one_question_of_a_chat_is_read(row, wanted, tmp_path):
    assert read_rows(written(tmp_path, row), responses=False) == [wanted]
    answered = row | {"response": "r"}
    assert read_rows(written(tmp_path, answered), True) == [wanted | {"response": "r"}]
    answered["response"] = turns(ANSWER)
    assert read_rows(written(tmp_path, answered), True) == [wanted | {"response": "r"}]


def test_the_last_turn_is_the_response_and_of_prompts_is_left_out(tmp_path, capsys):
    path = written(tmp_path, {"messages": turns(USER, ANSWER)},
                   {"messages": turns(SYSTEM, USER, ("assistant", ""))})
    assert read_rows(path, responses=True) == [
        {"prompt": "p", "response": "r"},
        {"prompt": "p", "system": "s", "response": ""}]
    assert capsys.readouterr().err == ""
    assert read_rows(path, False) == [{"prompt": "p"}, {"prompt": "p", "system": "s"}]
    assert capsys.readouterr().err.count("note: ") == 1


@pytest.mark.parametrize(("row", "why"), [
    ({"messages": turns(USER, ANSWER, USER)}, "turns are user, assistant, user"),
    ({"messages": turns(USER, USER)}, "one user turn"),
    ({"messages": turns(USER, SYSTEM)}, "one user turn"),
    ({"messages": turns(SYSTEM)}, "one user turn"), ({"messages": []}, "are none"),
    ({"messages": turns(("tool", "x"))}, "role 'tool'"),
    ({"messages": turns(("User", "x"))}, "role 'User'"),
    ({"messages": "[]"}, "must be a list"), ({"messages": ["p"]}, "each turn must"),
    ({"messages": [{"from": "human", "value": "p"}]}, "rename from → role"),
    ({"messages": turns(("user", None))}, '"content" of a turn must be a text'),
    ({"messages": turns(("user", [{"type": "image"}]))}, "something else than text"),
    ({"messages": turns(("user", ["p"]))}, "something else than text"),
    ({"messages": [turns(USER)[0] | {"tool_calls": [{}]}]}, "tool calls"),
    ({"messages": turns(USER), "prompt": "p"}, "both"),
    ({"messages": turns(SYSTEM, USER), "system": "t"}, "keep one of them"),
    ({"messages": turns(USER, ANSWER), "response": "r"}, "keep one of them"),
    ({"prompt": "p", "response": turns(USER)}, "one assistant turn"),
    ({"messages": turns(USER)}, '"response" must be a text'),
    ({"messages": turns(("user", " ")), "response": "r"}, "prompt is empty")])
def test_other_chats_are_refused_by_line(row, why, tmp_path):
    with pytest.raises(UserError, match=rf"rows\.jsonl:1: .*{why}"):
        read_rows(written(tmp_path, row), responses=True)


# ------------------------------------------------------------------------ the format


def test_a_mark_in_front_and_both_line_ends_are_read(tmp_path):
    path, mark = tmp_path / "rows.jsonl", b"\xef\xbb\xbf"
    for end in (b"\n", b"\r\n"):
        # Two files of one mark each, put together.
        path.write_bytes((mark + GOOD.encode() + end) * 2)
        assert labels(path) == [ROW, ROW]


OTHERS = {
    "utf-16": ("rows.jsonl", GOOD.encode("utf-16"), "UTF-16"),
    "utf-16 without a mark": ("rows.jsonl", GOOD.encode("utf-16-le"), "UTF-16"),
    "utf-16, big end first": ("rows.jsonl", GOOD.encode("utf-16-be"), "UTF-16"),
    "utf-32": ("rows.jsonl", GOOD.encode("utf-32"), "UTF-32"),
    "array": ("rows.json", f"\n [{GOOD},\n{GOOD}]".encode(), "a JSON array"),
    "array in a line": ("rows.jsonl", f"[{GOOD}]".encode(), "a JSON array"),
    "array with a mark": ("rows.jsonl", f"\ufeff[{GOOD}]".encode(), "a JSON array"),
    "csv": ("rows.csv", b"prompt,response,safety\r\np,r,0.5\r\n", "comma-separated"),
    "csv with a mark": ("my rows.csv", b'\xef\xbb\xbf"response","prompt","safety"\n'
                        b'"r","p",0.5\n', "comma-separated"),
    "csv by another name": ("rows.jsonl", b"prompt;response;safety\np;r;0.5\n",
                            "comma-separated"),
    "tsv": ("rows.tsv", b"prompt\tresponse\tsafety\np\tr\t0.5\n", "tab-separated"),
    "gzip": ("rows.jsonl.gz", gzip.compress(GOOD.encode()), "gzip"),
    "gzip by another name": ("rows.jsonl", gzip.compress(GOOD.encode()), "gzip"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_format_is_refused_with_the_line_that_converts_it(name, tmp_path):
    file, content, why = OTHERS[name]
    path = tmp_path / file
    path.write_bytes(content)
    with pytest.raises(UserError, match=why) as refusal:
        labels(path)
    command = str(refusal.value).partition("convert it: ")[2]
    assert len(str(refusal.value)) < 1000  # else the line would be cut
    command = command.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    subprocess.run(["bash", "-c", command], check=True)
    (made,) = set(tmp_path.iterdir()) - {path}
    assert path.read_bytes() == content
    assert labels(made) in ([ROW], [ROW, ROW])


def test_a_table_of_prompts_is_converted_without_its_blanks(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "split"], ["p, q", ""], ["é", "test"]])
    with pytest.raises(UserError) as refusal:
        read_rows(path, responses=False)
    command = str(refusal.value).partition("convert it: ")[2]
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)],
                   check=True)
    assert read_rows(tmp_path / "rows.jsonl", responses=False) == [
        {"prompt": "p, q"}, {"prompt": "é", "split": "test"}]


@pytest.mark.parametrize(("file", "content", "why"), [
    ("rows.parquet", b"x", "Parquet.*from_parquet"), ("x.jsonl", b"PAR1x", "Parquet"),
    ("rows.arrow", b"x", "Arrow.*from_file"), ("rows.xlsx", b"PK\x03\x04", "zip"),
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd", "zstd -dc"), ("x", b"BZh9", "bzip2 -dc"),
    ("x.xz", b"\xfd7zXZ\x00", "xz -dc"), ("x.csv", b"question,answer\na,b", "comma"),
    ("x.jsonl", b"{\n \"prompt\": \"p\"\n}", "jq -c")])
def test_formats_that_need_a_tool_are_named(file, content, why, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=why):
        read_rows(tmp_path / file, responses=False)


@pytest.mark.peer
def test_parquet_is_converted_as_the_line_says(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.parquet"
    other = ROW | {"prompt": "q", "scores": {"brevity": 1.0}}
    datasets.Dataset.from_list([ROW, other]).to_parquet(path)
    with pytest.raises(UserError) as refusal:
        labels(path)
    command = str(refusal.value).partition("convert it: ")[2]
    subprocess.run(["bash", "-c", command.replace("python", sys.executable, 1)],
                   check=True)
    assert labels(tmp_path / "rows.jsonl") == [ROW, other]  # without null scores


# ---------------------------------------------------------------- sides and templates


@pytest.mark.parametrize("twin", ["How?", " How?\n", "HOW?", "how?"])
def test_a_prompt_on_two_sides_is_refused_however_it_is_spaced(twin, tmp_path):
    rows = read_rows(written(
        tmp_path, {"prompt": "How?"}, {"prompt": "Why?", "split": "test"},
        {"prompt": "How?", "split": "Train"}, {"prompt": twin, "split": "test"}), False)
    rows_.require_apart(rows[:3], rows_.split_of,
                        lambda row: rows_.same_text(row["prompt"]))
    with pytest.raises(UserError, match=r"rows\.jsonl:4: .*test here, and in train at "
                       r".*rows\.jsonl:1"):
        rows_.require_apart(rows, rows_.split_of,
                            lambda row: rows_.same_text(row["prompt"]))


def test_texts_that_look_alike_are_the_same():
    assert rows_.same_text(" Caf\u00e9\n now ") == rows_.same_text("cafe\u0301  Now")
    assert rows_.same_text("a b") != rows_.same_text("ab")


@pytest.mark.parametrize("text", [
    "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhy?", "Why?<|im_end|>",
    "Why?<|im_end|>\n<|im_start|>assistant\n", "Why?<|endoftext|>",
    "<s>[INST] Why? [/INST]", "<bos><start_of_turn>user\nWhy?<end_of_turn>\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>",
    "<|user|>\nWhy?\n<|assistant|>\n", "[{'role': 'user', 'content': 'Why?'}]",
    '[{"from": "human", "value": "Why?"}]'])
@pytest.mark.parametrize("key", ["prompt", "response", "system"])
def test_a_text_in_a_chat_template_is_refused(key, text):
    row = {"prompt": "p", "response": "r"}
    rows_.require_untemplated([row], ["<|im_end|>"])
    with pytest.raises(UserError, match=f"the {key} is in a chat template already"):
        rows_.require_untemplated([row | {key: text}], [])


def test_tokens_in_the_middle_of_a_text_are_counted_in_one_note(tmp_path, monkeypatch,
                                                               capsys):
    texts = ["Why?", "What does <|im_start|>user mean?", "Is <tool> a tag?",
             "### Instruction:\nSing.\n\n### Response:", "Human: Why?\n\nAssistant:"]
    rows = read_rows(written(tmp_path, *({"prompt": t} for t in texts)), False)
    rows_.require_untemplated(rows[:1], ["<tool>"])
    assert capsys.readouterr().err == ""
    with monkeypatch.context() as patch:  # of several processes the first tells it
        patch.setattr(rows_.parallel, "rank", lambda: 1)
        rows_.require_untemplated(rows, ["<tool>"])
    assert capsys.readouterr().err == ""
    rows_.require_untemplated(rows, ["<tool>"])
    said = capsys.readouterr().err
    assert said.count("note: ") == said.count("\n") == 1
    assert said.endswith("such rows: 4\n")
    assert "rows.jsonl:2" in said
