"""What a job starts from: pixels or stored latents, decoded or fetched."""

from dataclasses import asdict

import structlog
from PIL import Image
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
from underpaint_server.stores import Entry, inversion_digest
from underpaint_server.wire import fitting as fittings
from underpaint_server.wire import images
from underpaint_server.wire.drafts import EditDraft, EditSource, Named, Upload
from underpaint_server.wire.fitting import Fitting
from underpaint_server.wire.names import inversion_name

_log = structlog.get_logger()


class Fetcher:
    """Implements :class:`underpaint_server.methods.message.Fetch`."""

    def __init__(self, server: ServerContext) -> None:
        self._server = server

    async def picture(self, image: types_pb2.Image, model: ModelInfo) -> tuple[Picture, Fitting]:
        """The pixels of an uploaded image as the model sees them, and how they were fitted."""
        threads = self._server.threads
        with threads.slot():
            opened = await threads.run(images.examine, image, self._server.image_limits)
            pixels = opened.width * opened.height
            self._server.metrics.on_image(pixels=pixels)
            return await threads.decode(pixels, _decode_and_fit, opened, image.fit, model)

    async def mask(self, image: types_pb2.Image, fitting: Fitting, path: str) -> Picture:
        """An uploaded mask as the model sees it; raises FieldInvalid at ``path`` where its size does not fit."""
        threads = self._server.threads
        with threads.slot():
            opened = await threads.run(images.examine, image, self._server.image_limits, images.MASK)
            return await threads.decode(opened.width * opened.height, images.decode_mask, opened, fitting, path)

    async def inversion(self, name: str) -> tuple[Inversion, Fitting]:
        """A stored inversion, and how its image was fitted."""
        inversion, entry = await self._server.stores.inversions.get(name)
        return inversion, Fitting(**entry.fitting)

    async def inverted(
        self, model: ModelInfo, pixels: Picture, options: InversionOptions
    ) -> tuple[str, Photo | Stored]:
        """The name of these pixels' inversion, and the inversion if it is stored; else the pixels."""
        name = await self._server.threads.run(inversion_digest, model, pixels, options)
        try:
            found = await find_inversion(self._server, name)
        except StoreUnavailable:
            found = None  # costs a repeated inversion, not the answer
        return name, Photo(pixels) if found is None else Stored(found[0])

    async def direction(self, name: str) -> Direction:
        """A stored direction."""
        return (await self._server.stores.directions.get(name)).direction


async def fetch_source(server: ServerContext, draft: EditDraft, *, use_store: bool = True) -> EditSource:
    """Fetch or decode the source of an edit; ``use_store`` False always takes an image's own pixels.

    Raises what decoding raises, and FieldInvalid; for a named inversion also InversionExpired, InversionModelMismatch,
    StoreCorrupt and StoreUnavailable.
    """
    match draft.source:
        case Upload(image=image):
            return await _from_image(server, draft, image, use_store)
        case Named(inversion=name):
            return await _from_store(server, draft, name)
        case Generated() as generated:
            size = (generated.width, generated.height)
            return EditSource(generated, draft.inversion, fittings.untouched(size))


async def find_inversion(server: ServerContext, name: str) -> tuple[Inversion, Entry] | None:
    """The inversion of that name, None if it must be made again from its image. Raises StoreUnavailable."""
    try:
        return await server.stores.inversions.get(name)
    except (InversionExpired, StoreCorrupt):
        return None


async def keep_inversion(server: ServerContext, name: str, inversion: Inversion, fitting: Fitting) -> bool:
    """Store an inversion that an edit has made; False, and a line in the log, where that fails."""
    try:
        await server.stores.inversions.put(name, inversion, asdict(fitting))
    except Exception as error:  # the edit is good all the same
        _log.warning("the inversion of an edit could not be stored", inversion=name, error=str(error))
        return False
    return True


async def _from_image(server: ServerContext, draft: EditDraft, image: types_pb2.Image, use_store: bool) -> EditSource:
    fetch = Fetcher(server)
    pixels, fitting = await fetch.picture(image, draft.model)
    if draft.inversion is None or not use_store:
        return EditSource(Photo(pixels), draft.inversion, fitting)
    name, source = await fetch.inverted(draft.model, pixels, draft.inversion)
    return EditSource(source, draft.inversion, fitting, name)


async def _from_store(server: ServerContext, draft: EditDraft, name: str) -> EditSource:
    inversion, fitting = await Fetcher(server).inversion(name)
    if inversion.model_digest != draft.model.digest:
        raise _mismatch(
            name, f"was made by other weights than those of models/{draft.model.id}: invert the image again"
        )
    made, wanted = inversion.options.method, METHODS[draft.method.name].inversion
    if wanted is None:
        return EditSource(Stored(inversion), None, fitting, name)
    if not isinstance(made, wanted):
        description = f"was made by {made.label}; {draft.method.name} starts from an inversion by {wanted.label}"
        raise FieldInvalid(FieldViolation("inversion", description))
    if wanted.exact and inversion.fingerprint != draft.model.fingerprint:
        raise _mismatch(
            name,
            "is exact only on servers whose network gives the same bits as where it was made, and this one does not: "
            "invert the image again; servers that share a store must have equal --dtype, --device and --threads, and "
            "equal libraries",
        )
    return EditSource(Stored(inversion), inversion.options, fitting, name)


def _mismatch(name: str, why: str) -> InversionModelMismatch:
    resource = inversion_name(name)
    return InversionModelMismatch(f"{resource} {why}", metadata={"resource_name": resource})


def _decode_and_fit(opened: Image.Image, fit: int, model: ModelInfo) -> tuple[Picture, Fitting]:
    decoded = images.rgb(images.load(opened))
    fitting = fittings.plan(fit, decoded.size, model)
    return fittings.fit_picture(decoded, fitting), fitting
