"""Checks of single fields; all that fail are reported together."""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from google.protobuf.descriptor import EnumDescriptor

from underpaint_server.errors import FieldInvalid, FieldViolation

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000


class Fields:
    """Collects violations; ``check`` raises them all as one :class:`FieldInvalid`."""

    def __init__(self) -> None:
        self._violations: list[FieldViolation] = []

    def wrong(self, path: str, description: str) -> None:
        """Report a field."""
        self._violations.append(FieldViolation(path, description))

    def wrong_as(self, error: FieldInvalid) -> None:
        """Report what another check raised."""
        self._violations.extend(error.violations)

    def check(self) -> None:
        """Raise FieldInvalid if anything was reported."""
        if self._violations:
            raise FieldInvalid(*self._violations)

    def share(self, path: str, value: float, *, below_one: bool = False) -> float:
        """A number in (0, 1], or in (0, 1) if ``below_one``."""
        number = float32(value)
        if not (0 < number < 1 or (number == 1 and not below_one)):
            self.wrong(path, f"{value:.7g} is outside (0, 1{')' if below_one else ']'}")
        return number

    def between(self, path: str, value: float, low: float, high: float) -> float:
        """A number in [low, high]."""
        number = float32(value)
        if not low <= number <= high:
            self.wrong(path, f"{value:.7g} is outside [{low:g}, {high:g}]")
        return number

    def count(self, path: str, value: int, default: int, limit: int) -> int:
        """A whole number in 1 .. limit; 0 takes the default, and so does a wrong one: others may be as many as it."""
        if not 0 <= value <= limit:
            self.wrong(path, f"{value} is outside 1 .. {limit} (0 takes {default})")
            return default
        return value or default

    def index(self, path: str, value: int, limit: int) -> int:
        """A whole number in 0 .. limit."""
        if not 0 <= value <= limit:
            self.wrong(path, f"{value} is outside 0 .. {limit}")
            return 0
        return value

    def text(self, path: str, value: str, limit: int, *, required: bool = False) -> str:
        """A text of at most ``limit`` characters."""
        if len(value) > limit:
            self.wrong(path, f"{len(value)} characters, more than {limit}")
        if required and not value.strip():
            self.wrong(path, "empty")
        return value

    def known(self, path: str, value: int, enum: EnumDescriptor) -> int:
        """A value that the enum defines here."""
        if value not in enum.values_by_number:
            self.wrong(path, f"{value} is no value of this enum")
        return value


def page_size(asked: int) -> int:
    """Entries of a page, 1 .. 1000; 0 takes 50. Raises FieldInvalid."""
    fields = Fields()
    size = fields.count("page_size", asked, DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    fields.check()
    return size


def float32(value: float) -> float:
    """What a caller wrote before it became a 32-bit float: 0.7, not 0.699999988. NaN and infinities stay."""
    return float(f"{value:.7g}") if math.isfinite(value) else value


def single(value: float) -> float:
    """The nearest number that a 32-bit float can hold."""
    nearest: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return nearest


@contextmanager
def at(prefix: str) -> Iterator[None]:
    """Report the fields of a nested message under the path they have in the request as sent."""
    try:
        yield
    except FieldInvalid as error:
        moved = (FieldViolation(f"{prefix}.{v.path}", v.description) for v in error.violations)
        raise FieldInvalid(*moved) from error
