"""Claims about plumbing/options.py.

* A command line is what its dataclass says: types, defaults, choices, help; this holds
  for every program.
* Defaults are those of the tiny or of a real model; what was asked for stays.
* A number out of its bounds is refused by the name of its option, NaN too.
* A field that is no option has its value and cannot be changed.
* Settings come back from JSON as they were; other ones are refused by name.
* What starts must resume: for every option of every program, whatever value the command
  line takes comes back from config.json, or is refused at the start with one line.
"""

import dataclasses
import importlib
import json
import math
import os
import random
import string
from pathlib import Path

import pytest

from plumbing.files import UserError, read_json, write_json
from plumbing.options import (
    as_saved,
    flag,
    given_options,
    is_path,
    no_option,
    option,
    option_names,
    parse_settings,
    saved_settings,
    with_defaults,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every kind of option that the programs have."""

    prompt: str | None = option(None, "a question", positional=True, nargs="?")
    group_size: int = option(8, "responses a prompt; 50% of them %s %(prog)s")
    lr: float = option(1e-5, "learning rate")
    out: Path = option(Path("runs"), "folder")
    limit: int | None = option(None, "at most so many")
    kl: str = option("k3", "estimator", choices=["k1", "k2", "k3"])
    steps: int = option(70, "of the training", real=60, low=1)
    time: bool = option(False, "say how long it took")


# ------------------------------------------------------------------- the command line


def test_settings_are_filled_and_typed():
    assert parse_settings(Settings, "Text.", []) == Settings()
    settings = parse_settings(Settings, "Text.", [
        "why?", "--group-size", "4", "--lr", "3e-4", "--out", "a/b", "--limit", "7",
        "--kl", "k1", "--steps", "3", "--time"])
    assert settings == Settings("why?", 4, 3e-4, Path("a/b"), 7, "k1", 3, True)
    names = ("group_size", "lr", "limit", "steps", "time")
    assert [type(getattr(settings, name)) for name in names] == [
        int, float, int, int, bool]
    assert isinstance(settings.out, Path)


@pytest.mark.parametrize("argv", [
    ["--kl", "k4"], ["--limit", "x"], ["--group-size", "1.5"], ["--unknown"],
    ["--steps", "many"]])
def test_bad_options_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse_settings(Settings, "Text.", argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def help_of(cls: type, capsys) -> str:
    """What --help prints, in one line."""
    with pytest.raises(SystemExit) as end:
        parse_settings(cls, "What it does.", ["--help"])
    assert end.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_has_the_defaults_and_survives_percent_signs(capsys):
    text = help_of(Settings, capsys)
    assert "What it does." in text
    assert "responses a prompt; 50% of them %s %(prog)s (default: 8)" in text
    assert "learning rate (default: 1e-05)" in text
    assert "--kl {k1,k2,k3} estimator (default: k3)" in text
    assert "of the training (default: 70; 60 on a real model)" in text


PROGRAMS = [
    "sample", "reward_model", "grpo", "methods.ppo", "methods.dpo", "methods.sft",
    "methods.best_of_n", "methods.compare", "benchmarks.plan", "benchmarks.__main__",
    "data.make_tiny", "data.check_labels"]
ARGUMENTS = {"data.make_tiny": ["base"], "benchmarks.__main__": [""]}  # the default's


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_explains_all_of_its_options(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no word is cut at its hyphen
    cls = importlib.import_module(program).Settings
    text, options = help_of(cls, capsys), option_names(cls)
    for field in dataclasses.fields(cls):
        flag = f"--{field.name.replace('_', '-')} "
        if not field.metadata.get("positional"):
            assert (flag in text) == (field.name in options), field.name
        assert field.metadata.get("help", "") in text, field.name
        # A flag can only be set.
        assert field.type is not bool or field.default is False, field.name
    assert parse_settings(cls, "", ARGUMENTS.get(program, [])) == cls()


# ----------------------------------------------------------------- defaults and bounds


def test_defaults_depend_on_the_model_until_something_is_asked_for():
    @dataclasses.dataclass(frozen=True)
    class Own:
        steps: int = option(70, "", real=60, low=1)
        share: float = option(0.0, "", real=0.1, low=0)
        size: int = option(8, "")

    assert Own() == Own(None, None, 8)  # nobody knows the model yet
    assert with_defaults(Own(), real=False) == Own(70, 0.0, 8)
    assert with_defaults(Own(), real=True) == Own(60, 0.1, 8)
    asked = Own(steps=3, share=0.0, size=4)  # a 0 that was asked for is no None
    for real in (True, False):
        assert with_defaults(asked, real) == asked
    again = with_defaults(Own(), real=True)
    assert with_defaults(again, real=False) == again


BOUNDED = {  # bounds → what is good, what is not, and how the message ends
    ("low",): ([1, 1.5, 1e30], [0.99, -1], "it must be at least 1"),
    ("above",): ([1.0001, 1e30], [1, 0], "it must be above 1"),
    ("high",): ([2, -1e30], [2.01], "it must be at most 2"),
    ("below",): ([1.99, -1e30], [2, 3], "it must be below 2"),
    ("above", "below"): ([1.5], [1, 2], "it must be above 1 and below 2"),
    ("low", "high"): ([1, 2], [0.9, 2.1], "it must be at least 1 and at most 2"),
    ("above", "high"): ([1.1, 2], [1, 2.1], "it must be above 1 and at most 2"),
    ("low", "below"): ([1, 1.9], [0.9, 2], "it must be at least 1 and below 2"),
}


@pytest.mark.parametrize("bounds", BOUNDED, ids=" and ".join)
def test_a_number_out_of_its_bounds_is_refused_by_name(bounds):
    values = {"low": 1, "above": 1, "high": 2, "below": 2}
    limits = {name: values[name] for name in bounds}
    good, bad, words = BOUNDED[bounds]

    @dataclasses.dataclass(frozen=True)
    class Own:
        top_share: float | None = option(None, "", **limits)
        free: float = option(math.nan, "without bounds")

    assert with_defaults(Own(), real=False).top_share is None  # nothing to check
    for value in good:
        assert with_defaults(Own(value), real=True).top_share == value
    for value in [*bad, math.nan, math.inf, -math.inf]:
        with pytest.raises(UserError) as refusal:
            with_defaults(Own(value), real=True)
        assert str(refusal.value) == f"--top-share is {value}; {words}"


def test_bounds_hold_for_a_default_of_a_model_too():
    @dataclasses.dataclass(frozen=True)
    class Own:
        lr: float = option(0.5, "", real=-1.0, above=0)

    assert with_defaults(Own(), real=False).lr == 0.5
    with pytest.raises(UserError, match=r"--lr is -1\.0; it must be above 0"):
        with_defaults(Own(), real=True)


# --------------------------------------------------------------- fields without option


@dataclasses.dataclass(frozen=True)
class Untrained(Settings):
    """Nothing to learn: two options of the parent go, one changes, one comes."""

    steps: int = no_option(0)
    lr: float = no_option(0.0)
    kl: str = option("k1", "estimator", choices=["k1"])
    best_of: int = option(4, "answers to choose from")


def test_option_names_are_the_options_in_order_the_parents_first():
    assert option_names(Settings) == [
        "prompt", "group_size", "lr", "out", "limit", "kl", "steps", "time"]
    assert option_names(Untrained) == [
        "prompt", "group_size", "out", "limit", "kl", "time", "best_of"]


def test_a_field_that_is_no_option_has_its_value_and_keeps_it(capsys):
    settings = with_defaults(parse_settings(Untrained, "", ["--best-of", "2"]), True)
    assert (settings.steps, settings.lr, settings.kl, settings.best_of) == (
        0, 0.0, "k1", 2)  # the bounds of the parent's option are gone with it
    with pytest.raises(TypeError):
        Untrained(steps=3)
    for argv in (["--steps", "3"], ["--lr", "1"], ["--kl", "k3"]):
        with pytest.raises(SystemExit):
            parse_settings(Untrained, "", argv)
        assert argv[0] in capsys.readouterr().err
    text = help_of(Untrained, capsys)
    assert "--best-of" in text
    assert "--steps" not in text
    assert "steps" not in given_options(Untrained, [])


# ------------------------------------------------------------------------- and back


def test_only_what_was_typed_is_given_whatever_its_value():
    assert given_options(Settings, []) == {}
    typed = ["--group-size", "8", "--steps", "70", "--out", "runs", "--time"]
    assert given_options(Settings, typed) == {
        "group_size": 8, "steps": 70, "out": Path("runs"), "time": True}
    assert given_options(Settings, ["why?"]) == {"prompt": "why?"}


PATH = Path("run/config.json")


def as_json(settings: Settings) -> dict:
    """The options as a config.json holds them, and more that is none of theirs."""
    fields = {name: getattr(settings, name) for name in option_names(type(settings))}
    fields = {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
    return json.loads(json.dumps(fields | {"axes": ["a"], "inputs": {}}))


@pytest.mark.parametrize("settings", [
    Settings(steps=70), Settings("why?", 4, 3e-4, Path("a/b"), 7, "k1", 3, True),
    Untrained(best_of=2)])
def test_settings_come_back_from_json(settings):
    back = saved_settings(type(settings), as_json(settings), {}, PATH)
    assert back == settings
    assert isinstance(back.out, Path)
    assert isinstance(back.lr, float)


def test_a_whole_number_for_a_float_comes_back_as_a_float():
    saved = as_json(Settings(steps=1)) | {"lr": 1}
    lr = saved_settings(Settings, saved, {}, PATH).lr
    assert (lr, type(lr)) == (1.0, float)


def test_options_that_say_the_same_may_be_typed_again_and_others_are_named():
    settings = Settings(group_size=4, out=Path("a"), steps=3)
    saved = as_json(settings)
    same = given_options(Settings, ["--group-size", "4", "--out", "a", "--steps", "3"])
    assert saved_settings(Settings, saved, same, PATH) == settings
    other = given_options(Settings, ["--group-size", "5", "--steps", "3", "--kl", "k1"])
    with pytest.raises(UserError) as refusal:
        saved_settings(Settings, saved, other, PATH)
    assert str(refusal.value).startswith(
        f"{PATH} was made with --group-size 4 (not 5), --kl k3 (not k1); ")


@pytest.mark.parametrize(("field", "value"), [
    ("group_size", "4"), ("group_size", 4.0), ("group_size", True),
    ("group_size", None), ("group_size", 2 ** 63), ("lr", "1"), ("lr", True),
    ("lr", math.nan), ("lr", math.inf), ("lr", 10 ** 40), ("out", 5), ("out", "a\x00b"),
    ("out", "x" * 5000), ("kl", "k4"), ("kl", ["k1"]), ("kl", None), ("time", 1),
    ("time", "yes"), ("prompt", 7), ("prompt", "a\udcff"), ("limit", "7")])
def test_a_setting_that_was_changed_by_hand_is_refused_by_name(field, value):
    saved = as_json(Settings(steps=1)) | {field: value}
    with pytest.raises(UserError, match=f"{PATH}: {field} is "):
        saved_settings(Settings, saved, {}, PATH)


def test_settings_of_another_version_are_refused_with_what_they_lack():
    saved = as_json(Settings(steps=1))
    del saved["kl"], saved["lr"]
    with pytest.raises(UserError, match=r"config\.json lacks lr, kl; .* this version"):
        saved_settings(Settings, saved, {}, PATH)


# ------------------------------------------------------------- what starts must resume


ROOT = Path(__file__).parent.parent.parent
TEXTS = [
    "", " ", "\n", "You are kind.\nAnswer in one sentence.\r\n", "a\tb", "\xa0", "\x7f",
    "\x85\u2028\u2029", "\u202e", "\ufeff水", "😀" * 9, "x" * 100_000, '"\\', "NaN",
    "null", "~", "-1", "a\x00b", os.fsdecode(b"caf\xe9"), "{{ bos }}", "\ue000",
    "<|im_end|>", "\ud7ff\ue000\U0010ffff"]
PLACES = [
    ".", "..", "a/", "./a", "a b/c", "~", "~/x", "a//b/./c/../d", "/", "/nowhere/x",
    "é\n水", os.fsdecode(b"caf\xe9/\xff"), "x" * 200, "y" * 5000, "gold", "tiny",
    "a\x00", str(ROOT / "data/tiny"), "Qwen/Qwen2.5-0.5B-Instruct", "-", "con:", "\\",
    "loop/x"]
NUMBERS = [
    "0", "1", "-1", "2", "3", "1_000", " 7 ", "٣", str(2 ** 31), str(2 ** 53 + 1),
    str(2 ** 63 - 1), str(2 ** 63), str(2 ** 64), str(-2 ** 63), "9" * 400, "9" * 5000,
    "1e-320", "5e-324", "1e300", "1e309", "-0.0", "0.1", "nan", "inf", "-inf", "1e-05",
    "0.30000000000000004", "1.7976931348623157e308", "x", "1.5"]


def random_word(field: dataclasses.Field, chance: random.Random) -> str:
    """A word for this option: an odd one, or a random one."""
    if field.metadata.get("choices") and chance.random() < 0.9:
        return chance.choice(field.metadata["choices"])
    kind = getattr(field.type, "__args__", (field.type,))[0]
    if kind in (int, float):
        return chance.choice([
            chance.choice(NUMBERS), str(chance.getrandbits(chance.randint(1, 66))),
            repr(chance.random()),
            repr(chance.uniform(-1, 1) * 10 ** chance.randint(-320, 300))])
    if chance.random() < 0.5:
        if field.name == "device":
            return "cpu"
        return chance.choice(PLACES if is_path(field) else TEXTS)
    letters = string.printable + "é水😀\u2028\xa0\udc80\udcff"
    return "".join(chance.choices(letters, k=chance.randint(0, 40)))


def random_words(field: dataclasses.Field, chance: random.Random) -> list[str]:
    """How the option is typed with a `random_word`; one that is on or off, alone."""
    if field.type is bool:
        return chance.choice([[], [flag(field.name)]])
    word = random_word(field, chance)
    return [word] if field.metadata.get("positional") else [
        f"{flag(field.name)}={word}"]


def same(field: dataclasses.Field, value: object, back: object) -> bool:
    """The very same value; of a path, the same place in the end."""
    if is_path(field) and value is not None and value != back:
        return type(value) is type(back) and (
            os.path.realpath(value) == os.path.realpath(back))
    return (type(value), repr(value)) == (type(back), repr(back))


RUNS = ["grpo", *(f"methods.{name}" for name in ("ppo", "dpo", "sft", "best_of_n"))]


@pytest.mark.slow
@pytest.mark.parametrize("program", [*RUNS, "reward_model", "sample"])
def test_whatever_the_command_line_takes_comes_back(program, tmp_path, monkeypatch,
                                                    capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of files
    (tmp_path / "loop").symlink_to("loop")
    for folder in ("a/b", "~/x", "a b/c", "gold", "Qwen"):
        (tmp_path / folder).mkdir(parents=True)
    cls, chance = importlib.import_module(program).Settings, random.Random(program)
    options = [f for f in dataclasses.fields(cls) if f.name in option_names(cls)]
    taken = dict.fromkeys(option_names(cls), 0)
    for number in range(3000):
        field, run = options[number % len(options)], tmp_path / chance.choice(
            ["runs/x", "y", "a b/c"])
        argv = random_words(field, chance)
        try:
            settings = parse_settings(cls, "", argv)
            if hasattr(settings, "resolved"):
                settings = settings.resolved()
        except UserError as refusal:
            assert len(str(refusal)) < 1010  # noqa: PT017
            continue
        except SystemExit as end:
            assert end.code == 2  # noqa: PT017
            capsys.readouterr()
            continue
        value, path = getattr(settings, field.name), run / "config.json"
        taken[field.name] += 1
        write_json(path, as_saved(settings, run))
        given = given_options(cls, argv)
        back = saved_settings(cls, read_json(path), {}, path)
        again = saved_settings(cls, read_json(path), given, path)  # typed once more
        for other in (back, again):
            assert same(field, value, getattr(other, field.name)), (argv, value)
        for rest in options:
            assert same(rest, getattr(settings, rest.name), getattr(back, rest.name))
    assert all(taken.values()), taken


@pytest.mark.parametrize(("argv", "words"), [
    (["--seed", str(2 ** 63)], f"--seed is {2 ** 63}; it must be at most"),
    (["--save-every", str(2 ** 70)], f"it must be at most {2 ** 63 - 1}"),
    (["--system", "a\udcff"], "--system is 'a\\udcff'; it must be UTF-8"),
    (["--system", "a\0"], "--system is 'a\\x00'; it must not hold a null byte"),
    (["--out", "a\0"], "--out is a\0; it must not hold a null byte"),
    (["--model", "x" * 5000], "it cannot be a path: File name too long"),
    (["--judge", "x" * 300], "it cannot be a path: File name too long"),
    (["--out", os.fsdecode(b"caf\xe9")], "it must be UTF-8"),
    (["--model", ""], "--model is ''; it must not be empty"),
    (["--lr", "inf"], "--lr is inf; it must be above 0")])
def test_what_could_not_resume_is_refused_at_the_start(argv, words):
    with pytest.raises(UserError) as refusal:
        parse_settings(importlib.import_module("grpo").Settings, "", argv)
    assert words in str(refusal.value)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", ["out", "prompts", "resume", "judge"])
def test_an_empty_path_is_not_the_folder_one_stands_in(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse_settings(importlib.import_module("grpo").Settings, "", [f"--{name}", ""])
    assert end.value.code == 2
    assert f"argument --{name}: it must not be empty" in capsys.readouterr().err
