"""Command-line flags of the methods, derived from their dataclasses: one flag for each field.

A field ``mask_strength: float | None`` becomes ``--mask-strength X``. Its annotation decides what the flag takes. The
help text is the first sentence of its docstring, and the default where the docstring names one ("Default: 0.5.").
"""

import argparse
import ast
import dataclasses
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from underpaint import _wire

Methods = Mapping[str, type[Any]]
"""Dataclasses by the name of the method; several may have the same field."""
_SENTENCE = re.compile(r"(.+?)\.(?=\s|$)", re.DOTALL)
_DEFAULT = re.compile(r"Default: (.+?)\.(?=\s|$)", re.DOTALL)
_METAVARS: dict[Any, str] = {int: "N", float: "X"}


_NEGATIVE = re.compile(r"-(\.?\d|inf|nan)")
"""How an argument begins that is a number or a list of numbers, and no flag."""


class UsageError(Exception):
    """The arguments contradict each other, or one is missing."""


class Parser(argparse.ArgumentParser):
    """Takes every negative number as a value; argparse takes -1 alone, and not -1e-3 or -1,0.5."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._negative_number_matcher = _NEGATIVE


def whole(text: str) -> int:
    """A number that a field of 32 bits holds; which of them are allowed, the server says."""
    return _within(int(text), _wire.INT32)


def seed(text: str) -> int:
    """A seed of noise."""
    return _within(int(text), _wire.SEEDS)


def seconds(text: str) -> float:
    """A length of time."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def photo_or_seed(text: str) -> str | int:
    """A seed for a number, else the path of a photo."""
    return seed(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text


def of_path(path: str, arguments: Sequence[str]) -> str | None:
    """The flag among the arguments of a command line that set a field of the request, by the field's path."""
    given = {argument.partition("=")[0] for argument in arguments}
    names = re.findall(r"[a-z_]+", path)
    if "image" in names:  # the parts of an image have no flags
        del names[names.index("image") :]
    candidates = [f"inversion_{names[-1]}"] if names and names[0] == "inversion_parameters" else []
    for name in reversed(names):
        candidates += [name, name.removesuffix("s")]  # a flag that is given several times has the name of one
    return next((flag(name) for name in candidates if flag(name) in given), None)


def _within(value: int, held: range) -> int:
    if value not in held:
        raise argparse.ArgumentTypeError(f"{value} is outside 0 to {held[-1]}")
    return value


for _number in (whole, seed, photo_or_seed):
    _number.__name__ = "int"  # argparse names the type in its error message
seconds.__name__ = "float"


_NUMBERS: dict[Any, Callable[[str], Any]] = {int: whole, float: float}


def add(parser: argparse.ArgumentParser, methods: Methods, omit: Collection[str] = ()) -> None:
    """Add the flags of all methods: a group for the fields of several methods, then a group for each method."""
    owners: dict[str, list[str]] = {}
    for name, method in methods.items():
        for setting in dataclasses.fields(method):
            owners.setdefault(setting.name, []).append(name)
    shared = {field: names for field, names in owners.items() if len(names) > 1}
    if shared:
        group = parser.add_argument_group("settings of several methods")
        for field, names in shared.items():
            _add_flag(group, {name: methods[name] for name in names}, field)
    for name, method in methods.items():
        own = [field for field, names in owners.items() if names == [name] and field not in omit]
        if own:
            group = parser.add_argument_group(f"settings of {name}", _sentence(method.__doc__))
            for field in own:
                _add_flag(group, {name: method}, field)


def given(methods: Methods, options: argparse.Namespace) -> dict[str, Any]:
    """The settings of any of the methods that were given as flags."""
    names = {field.name for method in methods.values() for field in dataclasses.fields(method)}
    return {name: value for name in sorted(names) if (value := getattr(options, name, None)) not in (None, "")}


def chosen(methods: Methods, name: str, options: argparse.Namespace) -> Any:
    """The method ``name`` with its flags.

    Raises UsageError for flags of other methods, and where a flag that it needs is missing.
    """
    method, settings = methods[name], given(methods, options)
    fields = {field.name: field for field in dataclasses.fields(method)}
    foreign = [flag(setting) for setting in settings if setting not in fields]
    if foreign:
        raise UsageError(f"{', '.join(foreign)}: not a setting of --method {name}")
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in settings:
            raise UsageError(f"{flag(field.name)}: needed by --method {name}: {_help({name: method}, field.name)}")
    return method(**settings)


def flag(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _add_flag(group: Any, owners: Methods, field: str) -> None:
    method = next(iter(owners.values()))
    takes = _takes(typing.get_type_hints(method)[field])
    repeatable = "; repeatable" if takes.get("action") == "append" else ""
    group.add_argument(flag(field), help=_help(owners, field).replace("%", "%%") + repeatable, **takes)


def _takes(annotation: Any) -> dict[str, Any]:
    """What a flag takes, as arguments of ``add_argument``."""
    options = _alternatives(annotation)
    for option in options:
        if isinstance(option, type) and issubclass(option, StrEnum):
            return {"choices": [str(member) for member in option]}
        if typing.get_origin(option) is Sequence:
            (item,) = typing.get_args(option)
            if item is str:
                return {"action": "append", "metavar": "NAME"}
            return {"type": _list_of(item), "metavar": ",".join((_METAVARS[item], _METAVARS[item], "..."))}
        if option is bool:
            return {"action": argparse.BooleanOptionalAction}
        if option in (int, float):
            return {"type": _NUMBERS[option], "metavar": _METAVARS[option]}
    if bytes in options:  # an image: a file here
        resources = [option for option in options if dataclasses.is_dataclass(option)]
        return {"metavar": "FILE|NAME" if resources else "FILE"}
    return {"metavar": "TEXT" if options == [str] else "NAME"}


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without None."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return [option for option in typing.get_args(annotation) if option is not type(None)] if union else [annotation]


def _list_of(item: type[Any]) -> Any:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(_NUMBERS[item](part) for part in text.split(","))

    parse.__name__ = f"list of {item.__name__}"  # argparse names the type in its error message
    return parse


def _help(owners: Methods, field: str) -> str:
    """The first sentence about a field, the defaults, and the methods if they are several."""
    docs = {name: _documentation(method, field) for name, method in owners.items()}
    defaults: dict[str, list[str]] = {}
    for name, documentation in docs.items():
        if default := _DEFAULT.search(documentation):
            defaults.setdefault(_plain(default[1]), []).append(name)
    values = [
        default if len(names) == len(owners) else f"{default} for {', '.join(names)}"
        for default, names in defaults.items()
    ]
    sentence = _sentence(next(iter(docs.values())))
    parts = (
        sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() else sentence,
        f"(default: {'; '.join(values)})" if values else "",
        f"[{', '.join(owners)}]" if len(owners) > 1 else "",
    )
    return " ".join(part for part in parts if part)


def _sentence(text: str | None) -> str:
    first = _SENTENCE.match(text or "")
    return _plain(first[1] if first else text or "")


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "").split())


def _documentation(method: type[Any], field: str) -> str:
    """Docstring of a field, from the class that declares it; empty where the source code is not installed."""
    return next((docs[field] for owner in method.__mro__ if field in (docs := _field_docs(owner))), "")


def _field_docs(owner: type[Any]) -> dict[str, str]:
    module = sys.modules.get(owner.__module__)
    classes = _classes(getattr(module, "__file__", None) or "")
    return dict(_documented(classes[owner.__name__])) if owner.__name__ in classes else {}


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except OSError:
        return {}
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Each annotated name of a class body that a string follows, with the string."""
    for statement, following in zip(node.body, node.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                yield name, text
