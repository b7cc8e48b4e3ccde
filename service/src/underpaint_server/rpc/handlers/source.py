"""What a job starts from: decoded pixels or stored latents."""

from dataclasses import asdict

import structlog
from underpaint.v1 import types_pb2

from underpaint_server.errors import (
    FieldInvalid,
    FieldViolation,
    InversionExpired,
    InversionModelMismatch,
    StoreCorrupt,
    StoreUnavailable,
)
from underpaint_server.jobs import (
    Direction,
    Generated,
    Inversion,
    InversionOptions,
    ModelInfo,
    Photo,
    Picture,
    Stored,
)
from underpaint_server.methods import METHODS
from underpaint_server.rpc.context import ServerContext
from underpaint_server.rpc.requests.inversion import check_same
from underpaint_server.stores import Entry, inversion_digest
from underpaint_server.wire import fitting as fittings
from underpaint_server.wire import images
from underpaint_server.wire.drafts import EditDraft, EditSource, StoredSource, Upload
from underpaint_server.wire.fitting import Fitting
from underpaint_server.wire.headers import MASK
from underpaint_server.wire.names import inversion_name

_log = structlog.get_logger()


class Fetcher:
    """Implements :class:`underpaint_server.methods.message.Fetch`."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server

    async def picture(self, image: types_pb2.Image, model: ModelInfo) -> tuple[Picture, Fitting]:
        """The fitted pixels (height, width, 3) uint8 of an uploaded image, and how it was fitted.

        Raises ImageUndecodable, ImageTooLarge, QueueFull, WorkerRestarted.
        """
        server, limits = self._server, self._server.image_limits
        with server.threads.slot():
            header = images.examine(image, limits)
            server.metrics.on_image(pixels=header.pixels)
            return await server.decoder.picture(image.content, header, limits, image.fit, model)

    async def mask(self, image: types_pb2.Image, fitting: Fitting, path: str) -> Picture:
        """The fitted mask (height, width) uint8, 0 or 255, of an uploaded mask.

        Raises FieldInvalid at ``path`` for a wrong size or mode, and what :meth:`picture` raises.
        """
        server, limits = self._server, self._server.image_limits
        with server.threads.slot():
            header = images.examine(image, limits, MASK)
            return await server.decoder.mask(image.content, header, limits, fitting, path)

    async def inversion(self, name: str) -> tuple[Inversion, Fitting]:
        """A stored inversion, and how its image was fitted. Raises InversionExpired, StoreCorrupt, StoreUnavailable."""
        inversion, entry = await self._server.stores.inversions.get(name)
        return inversion, Fitting(**entry.fitting)

    async def inverted(
        self, model: ModelInfo, pixels: Picture, options: InversionOptions
    ) -> tuple[str, Photo | Stored]:
        """The name of the inversion of these pixels, and the inversion if it is stored, otherwise the pixels."""
        name = await self._server.threads.run(inversion_digest, model, pixels, options)
        try:
            stored = await find_inversion(self._server, name)
        except StoreUnavailable:
            stored = None  # the image is inverted again; the call need not fail
        return name, Photo(pixels) if stored is None else Stored(stored[0])

    async def direction(self, name: str) -> Direction:
        """A stored direction. Raises DirectionNotFound, StoreCorrupt, StoreUnavailable."""
        return (await self._server.stores.directions.get(name)).direction


async def fetch_source(server: ServerContext, draft: EditDraft, *, use_store: bool = True) -> EditSource:
    """Fetch or decode the source of an edit; with ``use_store`` False an image is never replaced by its inversion.

    Raises ImageUndecodable, ImageTooLarge and QueueFull for an image; FieldInvalid, InversionExpired,
    InversionModelMismatch, StoreCorrupt and StoreUnavailable for a stored inversion.
    """
    match draft.source:
        case Upload(image=image):
            return await _from_image(server, draft, image, use_store)
        case StoredSource() as stored:
            return await _from_store(server, draft, stored)
        case Generated() as generated:
            size = (generated.width, generated.height)
            return EditSource(generated, draft.inversion, fittings.untouched(size))


async def find_inversion(server: ServerContext, name: str) -> tuple[Inversion, Entry] | None:
    """The stored inversion of this name; None if it is missing or damaged. Raises StoreUnavailable."""
    try:
        return await server.stores.inversions.get(name)
    except (InversionExpired, StoreCorrupt):
        return None


async def keep_inversion(server: ServerContext, name: str, inversion: Inversion, fitting: Fitting) -> bool:
    """Store an inversion that an edit computed; logs a failure and returns False."""
    try:
        await server.stores.inversions.put(name, inversion, asdict(fitting))
    except Exception as error:  # the edit itself succeeded
        _log.warning("inversion of edit not stored", inversion=name, error=str(error))
        return False
    return True


async def _from_image(server: ServerContext, draft: EditDraft, image: types_pb2.Image, use_store: bool) -> EditSource:
    fetch = Fetcher(server)
    pixels, fitting = await fetch.picture(image, draft.model)
    if draft.inversion is None or not use_store:
        return EditSource(Photo(pixels), draft.inversion, fitting)
    name, source = await fetch.inverted(draft.model, pixels, draft.inversion)
    return EditSource(source, draft.inversion, fitting, name)


async def _from_store(server: ServerContext, draft: EditDraft, stored: StoredSource) -> EditSource:
    name = stored.inversion
    inversion, fitting = await Fetcher(server).inversion(name)
    if inversion.model_digest != draft.model.digest:
        raise _mismatch(
            name, f"was made with other weights than those of models/{draft.model.id}: invert the image again"
        )
    method, required = inversion.options.method, METHODS[draft.method.name].inversion
    if required is None:
        return EditSource(Stored(inversion), None, fitting, name)
    if not isinstance(method, required):
        description = f"was made by {method.label}; {draft.method.name} starts from an inversion by {required.label}"
        raise FieldInvalid(FieldViolation("inversion", description))
    check_same(stored.parameters, inversion.options, "inversion_parameters")
    if required.exact and inversion.fingerprint != draft.model.fingerprint:
        raise _mismatch(
            name,
            "is exact only on servers that compute the network bit for bit as the server that made it, which this one "
            "does not: invert the image again. Servers that share a store must have equal --dtype, --device and "
            "--threads, and equal library versions",
        )
    return EditSource(Stored(inversion), inversion.options, fitting, name)


def _mismatch(name: str, why: str) -> InversionModelMismatch:
    resource = inversion_name(name)
    return InversionModelMismatch(f"{resource} {why}", metadata={"resource_name": resource})
