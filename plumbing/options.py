"""One frozen dataclass of settings → a command line, a config.json, and back.

A field says everything about its option once: the default, the default on a real model
where that differs, the bounds, the help.
"""

import argparse
import dataclasses
import math
import os
from pathlib import Path

from plumbing.files import require
from plumbing.paths import located, portable
from plumbing.words import HALF_SURROGATE, program

BOUNDS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}


def option(default: object, help: str, real: object = None,
           **extra: object) -> dataclasses.Field:
    """A field of a settings dataclass that is also a command-line option.

    Args:
        real: the default on a real model, where `default` is that of the tiny one. The
            field is None until `with_defaults` knows which model it is.
        extra: bounds of a number (low, above, high, below), and what `argparse` takes
            (choices, nargs); `positional=True` makes it no option but an argument;
            `unless=("gold",)` says that a text names a folder, if there is one, but for
            these words.
    """
    about = {"help": help, **extra}
    if real is None:
        return dataclasses.field(default=default, metadata=about)
    about |= {"tiny": default, "real": real}
    return dataclasses.field(default=None, metadata=about)


def no_option(value: object) -> dataclasses.Field:
    """A field that a subclass has no use for: it has this value, and no option."""
    return dataclasses.field(default=value, init=False)


def with_defaults(settings, real: bool):
    """Fill in the defaults that depend on the model, and check every bound.

    Raises:
        UserError: a number out of its bounds, by the option's name.
    """
    for field in dataclasses.fields(settings):
        about, value = field.metadata, getattr(settings, field.name)
        if value is None and "real" in about:
            value = about["real" if real else "tiny"]
            settings = dataclasses.replace(settings, **{field.name: value})
        if value is not None and about.keys() & BOUNDS.keys():
            _refuse(field, value, _number_fault(field, value))
    return settings


# -------------------------------------------------------------- what a value may be


def _fault(field: dataclasses.Field, value: object) -> str:
    """What a value must be and is not; empty where it may stand in a config.json.

    One rule for the command line and for --resume: what starts can go on.
    """
    kind = _kinds(field)[0]
    if value not in field.metadata.get("choices", [value]):
        return f"it must be one of {', '.join(field.metadata['choices'])}"
    if kind is bool:
        return "" if type(value) is bool else "it must be true or false"
    if kind in (int, float):
        return _number_fault(field, value)
    return _text_fault(str(value), is_path(field)) if isinstance(
        value, (str, kind)) else "it must be text"


def _number_fault(field: dataclasses.Field, value: object) -> str:
    kind, about = _kinds(field)[0], field.metadata
    limits = {name: about[name] for name in BOUNDS if name in about}
    good = (type(value) in (int, kind)
            and (type(value) is int or math.isfinite(value))  # false for NaN too
            and limits.get("low", value) <= value <= limits.get("high", value)
            and limits.get("above", -math.inf) < value < limits.get("below", math.inf))
    if not good:
        words = " and ".join(f"{BOUNDS[name]} {x}" for name, x in limits.items())
        return f"it must be {words or 'a finite number'}"
    # PyTorch's generators take seeds of 64 bits, and PPO's critic has the next one.
    large = type(value) is int and abs(value) >= 2 ** 63
    return f"it must be at most {2 ** 63 - 1}" if large else ""


def _text_fault(text: str, path: bool) -> str:
    if "\0" in text:
        return "it must not hold a null byte"
    # Of a path, too: the safetensors library opens no others.
    whole = os.path.abspath(text) if path else text
    if HALF_SURROGATE.search(whole):
        return "it must be UTF-8: it holds bytes that are no letters"
    if not path:
        return ""
    if not text:
        return "it must not be empty"  # as "$MODEL" is, where nobody has set it
    try:
        os.stat(os.path.join(text, "x" * 60))  # room for the names of our files
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return f"it cannot be a path: {error.strerror}"
    return ""


def _path(text: str) -> Path:
    if not text:  # `Path("")` would be the folder one stands in
        raise argparse.ArgumentTypeError("it must not be empty")
    return Path(text)


def _refuse(field: dataclasses.Field, value: object, fault: str) -> None:
    name = field.name if field.metadata.get("positional") else flag(field.name)
    shown = f"{value!r:.99}" if isinstance(value, str) else f"{value!s:.99}"
    require(not fault, f"{name} is {shown}; {fault}")


def _kinds(field: dataclasses.Field) -> tuple[type, ...]:
    # `from __future__ import annotations` is not used, so a type is a type; for
    # `int | None` the type that reads the text is the first of the union.
    return getattr(field.type, "__args__", (field.type,))


def is_path(field: dataclasses.Field) -> bool:
    """Whether the option names a file or folder, or, by its `unless`, may do so."""
    return _kinds(field)[0] is Path or "unless" in field.metadata


def option_names(cls: type) -> list[str]:
    """The fields of a settings dataclass that are options."""
    return [field.name for field in _options(cls)]


def _options(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if field.init]


def flag(name: str) -> str:
    """`group_size` → `--group-size`."""
    return "--" + name.replace("_", "-")


def parse_settings(cls: type, description: str, argv: list[str] | None = None):
    """Build `argparse` from the fields of a settings dataclass, and fill it.

    A field `group_size: int = option(8, "...")` becomes `--group-size N`; its default
    and help come from the field, so the two cannot drift apart.

    Raises:
        UserError: a value that no config.json could give back.
    """
    settings = cls(**vars(_parser(cls, description).parse_args(argv)))
    for field in _options(cls):
        value = getattr(settings, field.name)
        if value is not None:
            _refuse(field, value, _fault(field, value))
    return settings


def given_options(cls: type, argv: list[str] | None = None) -> dict[str, object]:
    """Only the options that stand on the command line, whatever their value."""
    parser = _parser(cls, "")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _parser(cls: type, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program(), description=description,
                                     allow_abbrev=False)
    for field in _options(cls):
        about = field.metadata
        words = about["help"].replace("%", "%%")  # argparse formats it
        if "real" in about:
            words += f" (default: {about['tiny']}; {about['real']} on a real model)"
        elif field.default not in (None, "", False):
            words += " (default: %(default)s)"
        extra = {name: about[name] for name in ("choices", "nargs") if name in about}
        kind = _kinds(field)[0]
        name = field.name if about.get("positional") else flag(field.name)
        if kind is bool:
            parser.add_argument(name, action="store_true", help=words)
        else:
            parser.add_argument(name, type=_path if kind is Path else kind,
                                default=field.default, help=words,
                                **extra)
    return parser


def as_saved(settings, folder: Path) -> dict[str, object]:
    """All options as `folder`/config.json holds them; paths as seen from there."""
    saved = {}
    for field in _options(type(settings)):
        value, unless = getattr(settings, field.name), field.metadata.get("unless")
        if value is not None and is_path(field) and (unless is None or (
                value not in unless and os.path.isdir(value))):
            value = portable(value, folder)
        saved[field.name] = value
    return saved


def saved_settings(cls: type, saved: dict, given: dict, path: Path):
    """Settings of an earlier run, to go on with.

    Args:
        saved: fields by name, as `as_saved` made them.
        given: options that were typed now; they must say the same. Paths may have
            moved: what is typed counts, and a SHA-256 tells whether it is the same.
        path: the file that `saved` comes from.

    Raises:
        UserError: other settings, which are named; or a file that is not ours.
    """
    fields = {f.name: f for f in _options(cls)}
    missing = [name for name in fields if name not in saved]
    require(not missing, f"{path} lacks {', '.join(missing)}; it is not from this "
            "version of the program")
    values = {name: _saved_value(field, saved[name], path)
              for name, field in fields.items()}
    moved = {name: value for name, value in given.items() if is_path(fields[name])}
    other = [f"{flag(name)} {values[name] or repr(values[name])} (not {value})"
             for name, value in given.items()
             if name not in moved and value != values[name]]
    require(not other, f"{path} was made with {', '.join(other)}; leave these out, or "
            "start another run")
    return cls(**values | moved)


def _saved_value(field: dataclasses.Field, value: object, path: Path) -> object:
    """A setting from a file, by the rule of the command line."""
    kind = _kinds(field)[0]
    if value is None and type(None) in _kinds(field):
        return None
    if is_path(field) and isinstance(value, str) and "\0" not in value:
        value = located(value, path.parent)
    fault = _fault(field, value) if value is not None else "it must be given"
    require(not fault, f"{path}: {field.name} is {value!r:.99}; {fault} (was it "
            "changed by hand?)")
    return kind(value)
