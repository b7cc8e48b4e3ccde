"""Operations: work that outlives the call, the engine and the server, as small objects that are only ever created.

Of an operation ``operations/{id}/`` has

``request``
    what to do, all options resolved; what has none is no operation.
``examples``
    the pixels to learn on, written before the request.
``claim-{n}``
    who runs it from now on, n = 1, 2, ...: a claim is renewed, passed on and taken over by creating the next one.
``state-{k}``
    the state after k optimiser steps.
``done``
    how it ended; then examples, claims and states go.

Nothing is ever replaced, and each name is created by one writer alone, whoever else tries at the same moment. So two
replicas cannot hold the same claim, an owner that was frozen and wakes up cannot put an older state in the place of a
newer one, and an operation ends once.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from underpaint_server.errors import OperationNotFound, StoreCorrupt
from underpaint_server.jobs import Generated, LearnOptions, LearnState, Photo, Picture
from underpaint_server.stores import codec
from underpaint_server.stores.blobs import Blob, Blobs, sealed, unsealed

T = TypeVar("T")

NAME: Final = re.compile(r"[0-9a-f]{32}")
"""Ids of operations."""

_FOLDER: Final = "operations"
_OBJECT: Final = re.compile(rf"{_FOLDER}/({NAME.pattern})/(request|examples|done|(claim|state)-(\d+))")
_KNOWN: Final = 256
"""Requests that are remembered: they never change."""


@dataclass(frozen=True, slots=True)
class Task:
    """What an operation does: learn a direction."""

    model: str
    model_digest: str
    direction: str
    """Id that the direction gets."""
    display_name: str
    options: LearnOptions
    examples: tuple[Generated | None, ...]
    """None stands for the next of the pictures beside the request."""
    request_id: str
    fingerprint: str
    """Of the request, hexadecimal: tells a repeat of its id from its abuse."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Who runs an operation."""

    owner: str
    """Drawn by each server when it starts."""
    ttl_s: float
    """The claim is void when the next one has not come this long after it was first seen."""
    attempts: int
    """Owners before this one that were lost without a state of their own: work that kills whoever does it must end."""
    iteration: int
    """Optimiser steps done when this owner took over."""
    released: bool = False
    """The owner has given it up; anybody may go on at once."""


@dataclass(frozen=True, slots=True)
class OperationSummary:
    """What the place tells of an operation without opening anything."""

    name: str
    created_at: float
    """Unix time, by the clock of the place."""
    claim: int = 0
    """Number of the newest claim, 0 for none."""
    iteration: int = 0
    """Of the newest state, 0 for none."""
    done_at: float | None = None
    leftovers: tuple[str, ...] = ()
    """Objects beside request and done."""

    @property
    def create_time(self) -> datetime:
        """The same as a time."""
        return datetime.fromtimestamp(self.created_at, UTC)


_TASK: Final = TypeAdapter(Task)
_CLAIM: Final = TypeAdapter(Claim)
_STATE: Final = TypeAdapter(LearnState)


class OperationStore:
    """Operations by id. Any call raises StoreUnavailable if the place is silent, StoreCorrupt for a damaged object."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._tasks: OrderedDict[str, Task] = OrderedDict()

    # --- looking --------------------------------------------------------------------------------------------------

    async def scan(self) -> dict[str, OperationSummary]:
        """All operations by id."""
        return {summary.name: summary for summary in _summaries(await self._blobs.below(_FOLDER))}

    async def summary(self, name: str) -> OperationSummary:
        """One operation; raises OperationNotFound."""
        for summary in _summaries(await self._blobs.below(f"{_FOLDER}/{name}") if NAME.fullmatch(name) else ()):
            return summary
        raise OperationNotFound(
            f"no operations/{name} here, or no longer",
            metadata={"resource_type": "google.longrunning.Operation", "resource_name": f"operations/{name}"},
        )

    async def task(self, name: str) -> Task | None:
        """What an operation does; None if there is none."""
        if name not in self._tasks:
            data = await self._read(name, "request")
            if data is None:
                return None
            self._tasks[name] = _parsed(_TASK, data)
            if len(self._tasks) > _KNOWN:
                self._tasks.popitem(last=False)
        return self._tasks[name]

    async def examples(self, name: str, task: Task) -> tuple[Photo | Generated, ...]:
        """What to learn on."""
        if None not in task.examples:
            return tuple(example for example in task.examples if example is not None)
        data = await self._read(name, "examples")
        if data is None:
            raise StoreCorrupt("the images of the operation are missing")
        return await asyncio.to_thread(_with_photos, task.examples, data)

    async def claim_of(self, summary: OperationSummary) -> Claim | None:
        """The newest claim; None if nobody ever had it, or it has just gone."""
        data = await self._read(summary.name, f"claim-{summary.claim:06d}") if summary.claim else None
        return None if data is None else _parsed(_CLAIM, data)

    async def state_of(self, summary: OperationSummary) -> LearnState | None:
        """The newest state; None if there is none, or it has just gone."""
        data = await self._read(summary.name, f"state-{summary.iteration:06d}") if summary.iteration else None
        return None if data is None else _parsed(_STATE, data)

    async def outcome(self, name: str) -> bytes | None:
        """How it ended, as it was given to :meth:`finish`; None if it has not."""
        return await self._read(name, "done")

    async def is_done(self, name: str) -> bool:
        """Whether it has ended."""
        return await self._blobs.exists(_path(name, "done"))

    # --- creating -------------------------------------------------------------------------------------------------

    async def create(self, name: str, task: Task, photos: Iterable[Picture]) -> bool:
        """A new operation; False if there is one of that id."""
        pixels = {f"{index:02d}": np.ascontiguousarray(photo) for index, photo in enumerate(photos)}
        if pixels:
            await self._create(name, "examples", await asyncio.to_thread(codec.encode, {}, pixels))
        return await self._create(name, "request", _TASK.dump_json(task))

    async def claim(self, name: str, number: int, claim: Claim) -> bool:
        """Take, renew or release an operation; False if somebody else has that number."""
        return await self._create(name, f"claim-{number:06d}", _CLAIM.dump_json(claim))

    async def save_state(self, name: str, state: LearnState) -> bool:
        """Keep how far it has come; False if somebody else has come as far already."""
        return await self._create(name, f"state-{state.iteration:06d}", _STATE.dump_json(state))

    async def finish(self, name: str, outcome: bytes) -> bool:
        """End it; False if it has ended already."""
        return await self._create(name, "done", outcome)

    # --- removing -------------------------------------------------------------------------------------------------

    async def clear(self, summary: OperationSummary) -> None:
        """Remove what a finished operation does not need any more."""
        await asyncio.gather(*(self._blobs.remove(_path(summary.name, part)) for part in summary.leftovers))

    async def forget(self, summary: OperationSummary) -> None:
        """Remove a finished operation: the request first, for what has none is no operation."""
        self._tasks.pop(summary.name, None)
        await self._blobs.remove(_path(summary.name, "request"))
        await self.clear(replace(summary, leftovers=(*summary.leftovers, "done")))

    async def _create(self, name: str, part: str, data: bytes) -> bool:
        # The place may have written it and the answer been lost: what is there and equal counts as written.
        return await self._blobs.create(_path(name, part), sealed(data)) or await self._read(name, part) == data

    async def _read(self, name: str, part: str) -> bytes | None:
        data = await self._blobs.read(_path(name, part))
        return None if data is None else unsealed(data)


def _summaries(blobs: Iterable[Blob]) -> list[OperationSummary]:
    found: dict[str, list[tuple[str, str, int, float]]] = {}
    for blob in blobs:
        match = _OBJECT.fullmatch(blob.path)
        if match is not None:
            found.setdefault(match[1], []).append((match[2], match[3] or "", int(match[4] or 0), blob.written_at))
    return [_one(name, parts) for name, parts in found.items() if any(part[0] == "request" for part in parts)]


def _one(name: str, parts: list[tuple[str, str, int, float]]) -> OperationSummary:
    times = {part: at for part, _, _, at in parts}
    return OperationSummary(
        name=name,
        created_at=times["request"],
        claim=max((number for _, kind, number, _ in parts if kind == "claim"), default=0),
        iteration=max((number for _, kind, number, _ in parts if kind == "state"), default=0),
        done_at=times.get("done"),
        leftovers=tuple(sorted(times.keys() - {"request", "done"})),
    )


def _with_photos(examples: tuple[Generated | None, ...], data: bytes) -> tuple[Photo | Generated, ...]:
    try:
        pixels = codec.decode(data).arrays
        photos = iter([Photo(pixels[name]) for name in sorted(pixels)])
        return tuple(next(photos) if example is None else example for example in examples)
    except RuntimeError as error:
        raise StoreCorrupt("the operation has fewer images stored than examples") from error


def _parsed(adapter: TypeAdapter[T], data: bytes) -> T:
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        raise StoreCorrupt("a stored object is not what this server writes") from error


def _path(name: str, part: str) -> str:
    return f"{_FOLDER}/{name}/{part}"
