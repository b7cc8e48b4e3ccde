"""Between Python values and fields of messages: enumerations, optional fields, images, float32 numbers."""

from enum import StrEnum
from typing import Any, TypeVar

from underpaint import images
from underpaint.choices import Fit
from underpaint.images import ImageLike
from underpaint.v1 import types_pb2 as types_pb

E = TypeVar("E", bound=StrEnum)
INT32, SEEDS = range(-(2**31), 2**31), range(2**64)
"""Numbers that the contract's fields hold."""


def given(**values: Any) -> dict[str, Any]:
    """The values that are not None: fields left unset take the server's default.

    ValueError for a number that its field cannot hold: a seed has 64 bits and no sign, other whole numbers have 32.
    """
    for name, value in values.items():
        held = SEEDS if name == "seed" else INT32
        if isinstance(value, int) and value not in held:
            raise ValueError(f"{name} is {value}: it must be 0 to {held[-1]}")
    return {name: value for name, value in values.items() if value is not None}


def number(wire: Any, kind: type[StrEnum], argument: str, value: StrEnum | str | None) -> Any:
    """Number of an enumeration's value in the contract; 0, "unspecified", for None.

    ``wire`` is the enumeration of the contract. ValueError names the ``argument`` and the possible values.
    """
    if value is None:
        return 0
    if value not in tuple(kind):
        raise ValueError(f"{argument} is {value!r}: choose one of {', '.join(kind)}")
    return wire.Value(_prefix(wire) + value.upper())


def text(wire: Any, value: int) -> str:
    """The other way: the name in lower case without its prefix; empty for "unspecified" and for unknown numbers."""
    return wire.Name(value).removeprefix(_prefix(wire)).lower() if value and value in wire.values() else ""


def member(wire: Any, kind: type[E], value: int) -> E | None:
    """The member of ``kind`` for a number; None for "unspecified" and for numbers that this client does not know."""
    name = text(wire, value)
    return kind(name) if name in tuple(kind) else None


def image(content: ImageLike, fit: Fit | str | None = None, argument: str = "fit") -> types_pb.Image:
    """The message of an image; OSError when a file cannot be read."""
    return types_pb.Image(content=images.encoded(content), fit=number(types_pb.Fit, Fit, argument, fit))


def short(value: float) -> float:
    """A float32 number with its seven significant digits: 0.8, not 0.800000011920929."""
    return float(f"{value:.7g}")


def _prefix(wire: Any) -> str:
    return str(wire.Name(0)).removesuffix("UNSPECIFIED")
