"""Several generators of rows as one."""

from collections.abc import Sequence
from typing import TypeVar

from underpaint_server.rows import Row, Steps

T = TypeVar("T")


def together(parts: Sequence[Steps[T]]) -> Steps[list[T]]:
    """Run all parts side by side, their rows in common groups, and return their results in order.

    A part that ends early is waited for; one that fails ends all of them.
    """
    results: dict[int, T] = {}
    groups: dict[int, Sequence[Row]] = {}
    for i, part in enumerate(parts):
        _resume(part, i, None, groups, results)
    while groups:
        answers = iter((yield [row for group in groups.values() for row in group]))
        for i, group in list(groups.items()):
            _resume(parts[i], i, [next(answers) for _ in group], groups, results)
    return [results[i] for i in range(len(parts))]


def _resume(
    part: Steps[T], i: int, answers: list[object] | None, groups: dict[int, Sequence[Row]], results: dict[int, T]
) -> None:
    try:
        groups[i] = next(part) if answers is None else part.send(answers)
    except StopIteration as end:
        groups.pop(i, None)
        results[i] = end.value
