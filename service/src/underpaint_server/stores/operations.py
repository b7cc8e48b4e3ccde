"""The operation store: long-running work as small objects that are created and removed, but never replaced.

The folder ``operations/{id}/`` of one operation has these objects:

``request``
    the :class:`Task` with all options resolved. An operation exists from when this object is created until it is
    removed.
``examples``
    the images to learn from, written before ``request``.
``claim-{n}``
    the :class:`Claim` number n = 1, 2, ...: the lease of the server that runs the operation. The claim with the highest
    number is valid; it is renewed, released and taken over by creating the next one.
``state-{k}``
    the optimiser's state after k steps.
``done``
    the outcome. When it exists, examples, claims and states are removed.

Creating an object is atomic and fails if the object exists. So two servers cannot hold the same claim, a server that
was suspended and resumes cannot overwrite a newer state with an older one, and an operation has one outcome.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
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
"""The form of an operation's id."""

_FOLDER: Final = "operations"
_OBJECT: Final = re.compile(rf"{_FOLDER}/({NAME.pattern})/(request|examples|done|(claim|state)-(\d+))")
_KNOWN: Final = 256
"""Number of tasks kept in memory. They never change, so they need no refresh."""


@dataclass(frozen=True, slots=True)
class Task:
    """What an operation does: learn a direction."""

    model: str
    model_digest: str
    direction: str
    """Id of the direction to create."""
    display_name: str
    options: LearnOptions
    examples: tuple[Generated | None, ...]
    """Generated sources; None stands for the next image in the object ``examples``."""
    request_id: str
    """As the caller sent it; empty if it sent none."""
    fingerprint: str
    """Digest of the request message, hexadecimal: another request with the same id has another one."""
    rows: int = 0
    """Network rows that it takes; 0 where an earlier version stored the task."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The lease of the server that runs an operation."""

    owner: str
    """Random id that each server draws when it starts."""
    ttl_s: float
    """Lease time in seconds. Another server may take over when it has seen no newer claim for this long."""
    attempts: int
    """Number of earlier owners that were lost before they saved a state. Work that crashes its server is given up."""
    iteration: int
    """Optimiser steps done when this owner took over."""
    released: bool = False
    """Whether the owner gave the lease up; any server may take over at once."""


@dataclass(frozen=True, slots=True)
class OperationSummary:
    """What a listing of the object store says of one operation."""

    name: str
    """The id, without ``operations/``."""
    created_at: float
    """Unix time in seconds, by the object store's clock."""
    claim: int = 0
    """Number of the newest claim, 0 for none."""
    iteration: int = 0
    """Optimiser steps of the newest state, 0 for none."""
    done_at: float | None = None
    """Unix time of the outcome; None if the operation has not ended."""
    leftovers: tuple[str, ...] = ()
    """Names of the objects other than ``request`` and ``done``."""

    @property
    def create_time(self) -> datetime:
        """``created_at`` as a UTC time."""
        return datetime.fromtimestamp(self.created_at, UTC)


_TASK: Final = TypeAdapter(Task)
_CLAIM: Final = TypeAdapter(Claim)
_STATE: Final = TypeAdapter(LearnState)


class OperationStore:
    """Operations by id.

    Any method raises StoreUnavailable if the object store cannot be reached, and StoreCorrupt for a damaged object.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._tasks: OrderedDict[str, Task] = OrderedDict()

    # --- reading --------------------------------------------------------------------------------------------------

    async def scan(self) -> dict[str, OperationSummary]:
        """All operations by id."""
        return {summary.name: summary for summary in _summaries(await self._blobs.below(_FOLDER))}

    async def summary(self, name: str) -> OperationSummary:
        """One operation. Raises OperationNotFound."""
        for summary in _summaries(await self._blobs.below(f"{_FOLDER}/{name}") if NAME.fullmatch(name) else ()):
            return summary
        raise OperationNotFound(
            f"operations/{name} does not exist: it was deleted, expired or never created",
            metadata={"resource_type": "google.longrunning.Operation", "resource_name": f"operations/{name}"},
        )

    async def task(self, name: str) -> Task | None:
        """The task of an operation; None if the operation does not exist."""
        if name not in self._tasks:
            data = await self._read(name, "request")
            if data is None:
                return None
            self._tasks[name] = _parsed(_TASK, data)
            if len(self._tasks) > _KNOWN:
                self._tasks.popitem(last=False)
        return self._tasks[name]

    async def rows(self, summaries: Iterable[OperationSummary]) -> int:
        """Network rows that these operations take altogether. Damaged and removed ones are left out."""
        total = 0
        for summary in summaries:
            with suppress(StoreCorrupt):
                task = await self.task(summary.name)
                total += 0 if task is None else task.rows
        return total

    async def examples(self, name: str, task: Task) -> tuple[Photo | Generated, ...]:
        """The images and generated sources to learn from. Raises StoreCorrupt if stored images are missing."""
        if None not in task.examples:
            return tuple(example for example in task.examples if example is not None)
        data = await self._read(name, "examples")
        if data is None:
            raise StoreCorrupt("the stored images of the operation are missing")
        return await asyncio.to_thread(_with_photos, task.examples, data)

    async def claim_of(self, summary: OperationSummary) -> Claim | None:
        """The newest claim; None if there is none, or if it was removed after the listing."""
        data = await self._read(summary.name, f"claim-{summary.claim:06d}") if summary.claim else None
        return None if data is None else _parsed(_CLAIM, data)

    async def state_of(self, summary: OperationSummary) -> LearnState | None:
        """The newest state; None if there is none, or if it was removed after the listing."""
        data = await self._read(summary.name, f"state-{summary.iteration:06d}") if summary.iteration else None
        return None if data is None else _parsed(_STATE, data)

    async def outcome(self, name: str) -> bytes | None:
        """The outcome as given to :meth:`finish`; None if the operation has not ended."""
        return await self._read(name, "done")

    async def is_done(self, name: str) -> bool:
        """Whether the operation has ended."""
        return await self._blobs.exists(_path(name, "done"))

    # --- creating -------------------------------------------------------------------------------------------------

    async def create(self, name: str, task: Task, photos: Iterable[Picture]) -> bool:
        """Create an operation with its images, each (height, width, 3) uint8; False if the id exists."""
        pixels = {f"{index:02d}": np.ascontiguousarray(photo) for index, photo in enumerate(photos)}
        if pixels:
            await self._create(name, "examples", await asyncio.to_thread(codec.encode, {}, pixels))
        return await self._create(name, "request", _TASK.dump_json(task))

    async def claim(self, name: str, number: int, claim: Claim) -> bool:
        """Take, renew or release an operation by creating claim ``number``; False if another server created it."""
        return await self._create(name, f"claim-{number:06d}", _CLAIM.dump_json(claim))

    async def save_state(self, name: str, state: LearnState) -> bool:
        """Store a state; False if another server has stored a state of as many steps."""
        return await self._create(name, f"state-{state.iteration:06d}", _STATE.dump_json(state))

    async def finish(self, name: str, outcome: bytes) -> bool:
        """Store the outcome; False if the operation has another one already."""
        return await self._create(name, "done", outcome)

    # --- removing -------------------------------------------------------------------------------------------------

    async def clear(self, summary: OperationSummary) -> None:
        """Remove the examples, claims and states of a finished operation."""
        await asyncio.gather(*(self._blobs.remove(_path(summary.name, part)) for part in summary.leftovers))

    async def forget(self, summary: OperationSummary) -> None:
        """Remove a finished operation."""
        self._tasks.pop(summary.name, None)
        # The request goes first: without it the operation no longer exists, whatever fails afterwards.
        await self._blobs.remove(_path(summary.name, "request"))
        await self.clear(replace(summary, leftovers=(*summary.leftovers, "done")))

    async def _create(self, name: str, part: str, data: bytes) -> bool:
        # The store may have written the object although the call failed: an equal object counts as created.
        path = _path(name, part)
        return await self._blobs.create(path, sealed(path, data)) or await self._read(name, part) == data

    async def _read(self, name: str, part: str) -> bytes | None:
        path = _path(name, part)
        data = await self._blobs.read(path)
        return None if data is None else unsealed(path, data)


def _summaries(blobs: Iterable[Blob]) -> list[OperationSummary]:
    operations: dict[str, list[tuple[str, str, int, float]]] = {}
    for blob in blobs:
        match = _OBJECT.fullmatch(blob.path)
        if match is not None:
            operations.setdefault(match[1], []).append((match[2], match[3] or "", int(match[4] or 0), blob.written_at))
    return [_summary(name, parts) for name, parts in operations.items() if any(part[0] == "request" for part in parts)]


def _summary(name: str, parts: list[tuple[str, str, int, float]]) -> OperationSummary:
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
        pixels = codec.read_arrays(data)  # the object has a checksum of its own
        photos = iter([Photo(pixels[name]) for name in sorted(pixels)])
        return tuple(next(photos) if example is None else example for example in examples)
    except RuntimeError as error:
        raise StoreCorrupt("fewer images are stored than the operation has examples") from error


def _parsed(adapter: TypeAdapter[T], data: bytes) -> T:
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        raise StoreCorrupt("a stored object is not in the form that this server writes") from error


def _path(name: str, part: str) -> str:
    return f"{_FOLDER}/{name}/{part}"
