"""One frozen dataclass of settings → a command line, a config.json, and back.

A field says everything about its option once: the default, the default on a real model
where that differs, the bounds, the help.
"""

import argparse
import dataclasses
import math
from pathlib import Path

from plumbing.files import require

BOUNDS = {"low": "at least", "above": "above", "high": "at most", "below": "below"}


def option(default: object, help: str, real: object = None,
           **extra: object) -> dataclasses.Field:
    """A field of a settings dataclass that is also a command-line option.

    Args:
        real: the default on a real model, where `default` is that of the tiny one. The
            field is None until `with_defaults` knows which model it is.
        extra: bounds of a number (low, above, high, below), and what `argparse` takes
            (choices, nargs); `positional=True` makes it no option but an argument.
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
        limits = {name: about[name] for name in BOUNDS if name in about}
        if value is None or not limits:
            continue
        good = (math.isfinite(value)  # false for NaN too
                and limits.get("low", value) <= value <= limits.get("high", value)
                and limits.get("above", -math.inf) < value
                < limits.get("below", math.inf))
        words = " and ".join(f"{BOUNDS[name]} {x}" for name, x in limits.items())
        require(good, f"{flag(field.name)} is {value}; it must be {words}")
    return settings


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
    """
    return cls(**vars(_parser(cls, description).parse_args(argv)))


def given_options(cls: type, argv: list[str] | None = None) -> dict[str, object]:
    """Only the options that stand on the command line, whatever their value."""
    parser = _parser(cls, "")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _parser(cls: type, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for field in _options(cls):
        about = field.metadata
        words = about["help"].replace("%", "%%")  # argparse formats it
        if "real" in about:
            words += f" (default: {about['tiny']}; {about['real']} on a real model)"
        elif field.default not in (None, "", False):
            words += " (default: %(default)s)"
        extra = {name: about[name] for name in ("choices", "nargs") if name in about}
        # `from __future__ import annotations` is not used, so a type is a type; for
        # `int | None` the type that reads the text is the first of the union.
        kind = getattr(field.type, "__args__", (field.type,))[0]
        name = field.name if about.get("positional") else flag(field.name)
        if kind is bool:
            parser.add_argument(name, action="store_true", help=words)
        else:
            parser.add_argument(name, type=kind, default=field.default, help=words,
                                **extra)
    return parser


def saved_settings(cls: type, saved: dict, given: dict, path: Path):
    """Settings of an earlier run, to go on with.

    Args:
        saved: fields by name, as JSON holds them.
        given: options that were typed now; they must say the same.
        path: the file that `saved` comes from, for the messages.

    Raises:
        UserError: other settings, which are named; or a file that is not ours.
    """
    fields = {f.name: f for f in _options(cls)}
    missing = [name for name in fields if name not in saved]
    require(not missing, f"{path} lacks {', '.join(missing)}; it is not from this "
            "version of the program")
    other = [f"{flag(name)} {saved[name]} (not {value})"
             for name, value in given.items() if str(value) != str(saved[name])]
    require(not other, f"{path} was made with {', '.join(other)}; leave these out, or "
            "start another run")
    return cls(**{name: _saved_value(field, saved[name], path)
                  for name, field in fields.items()})


def _saved_value(field: dataclasses.Field, value: object, path: Path) -> object:
    """A setting from a file, with the type and the choices of the command line."""
    kinds = getattr(field.type, "__args__", (field.type,))
    if value is None and type(None) in kinds:
        return None
    kind = kinds[0]
    good = {bool: type(value) is bool, int: type(value) is int and abs(value) < 2 ** 31,
            float: type(value) in (int, float) and abs(value) < 1e30,
            str: isinstance(value, str), Path: isinstance(value, str)}[kind]
    if isinstance(value, str):
        good = good and len(value) < 4096 and value.isprintable()
    require(good and value in field.metadata.get("choices", [value]),
            f"{path}: {field.name} is {value!r}; it was changed by hand?")
    return kind(value)
