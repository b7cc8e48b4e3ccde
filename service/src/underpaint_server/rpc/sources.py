"""What a job starts from: pixels or stored latents, fetched or decoded."""

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
    EdictInversion,
    Generated,
    Inversion,
    ModelInfo,
    Photo,
    Picture,
    Stored,
)
from underpaint_server.rpc import fitting as fittings
from underpaint_server.rpc import images
from underpaint_server.rpc.drafts import EditDraft, Named, Start, Upload
from underpaint_server.rpc.fitting import Fitting
from underpaint_server.rpc.front import Front
from underpaint_server.rpc.methods import method_of
from underpaint_server.rpc.names import inversion_digest, inversion_name
from underpaint_server.rpc.parameters import WAYS
from underpaint_server.stores.inversions import Entry

_log = structlog.get_logger()


async def start_of(front: Front, draft: EditDraft, *, use_store: bool = True) -> Start:
    """Fetch or decode the source of an edit; ``use_store`` False always takes an image's own pixels.

    Raises what decoding raises, and FieldInvalid; for a named inversion also InversionExpired, InversionModelMismatch,
    StoreCorrupt and StoreUnavailable.
    """
    match draft.source:
        case Upload(image=image):
            return await _from_image(front, draft, image, use_store)
        case Named(inversion=name):
            return await _from_store(front, draft, name)
        case Generated() as generated:
            size = (generated.width, generated.height)
            return Start(generated, draft.inversion, fittings.untouched(size))


async def read_picture(front: Front, image: types_pb2.Image, model: ModelInfo) -> tuple[Picture, Fitting]:
    """The pixels of an uploaded image as the model sees them, and how they were fitted."""
    with front.pool.place():
        opened = await front.pool.run(images.examine, image, front.image_limits)
        pixels = opened.width * opened.height
        front.metrics.on_image(pixels=pixels)
        return await front.pool.decode(pixels, _decode_and_fit, opened, image.fit, model)


async def read_mask(front: Front, image: types_pb2.Image, fitting: Fitting, path: str) -> Picture:
    """A given mask as the model sees it; raises FieldInvalid at ``path`` where it does not go with the picture."""
    with front.pool.place():
        opened = await front.pool.run(images.examine, image, front.image_limits, images.MASK)
        return await front.pool.decode(opened.width * opened.height, images.decode_mask, opened, fitting, path)


async def stored(front: Front, name: str) -> tuple[Inversion, Entry] | None:
    """The inversion of that name, None if it must be made again: its image is at hand. Raises StoreUnavailable."""
    try:
        return await front.store.get(name)
    except (InversionExpired, StoreCorrupt):
        return None


async def keep(front: Front, name: str, inversion: Inversion, fitting: Fitting) -> bool:
    """Store what was made on the way to an edit; False, and a line in the log, where that fails."""
    try:
        await front.store.put(name, inversion, asdict(fitting))
    except Exception as error:  # the edit is good all the same
        _log.warning("an inversion could not be stored", inversion=name, error=str(error))
        return False
    return True


async def _from_image(front: Front, draft: EditDraft, image: types_pb2.Image, use_store: bool) -> Start:
    pixels, fitting = await read_picture(front, image, draft.model)
    if draft.inversion is None or not use_store:
        return Start(Photo(pixels), draft.inversion, fitting)
    name = await front.pool.run(inversion_digest, draft.model, pixels, draft.inversion)
    try:
        found = await stored(front, name)
    except StoreUnavailable:
        found = None  # costs a repeated inversion, not the answer
    return Start(Photo(pixels) if found is None else Stored(found[0]), draft.inversion, fitting, name)


async def _from_store(front: Front, draft: EditDraft, name: str) -> Start:
    inversion, entry = await front.store.get(name)
    if inversion.model_digest != draft.model.digest:
        raise mismatch(name, f"was made by other weights than those of models/{draft.model.id}: invert again")
    wanted = method_of(draft.method).inversion
    kind = None if wanted is None else WAYS[wanted].options
    if kind is not None and not isinstance(inversion.options.method, kind):
        made, needed = ("EDICT" if way is EdictInversion else "DDIM" for way in (type(inversion.options.method), kind))
        raise FieldInvalid(FieldViolation("inversion", f"was made by {made}; this method starts from one by {needed}"))
    if kind is EdictInversion and inversion.fingerprint != draft.model.fingerprint:
        raise mismatch(
            name,
            "is exact only where it was made, and this server computes otherwise: invert the image again; servers that "
            "share a store must have equal --dtype, --device and --threads, and equal libraries",
        )
    options = inversion.options if kind is not None else None
    return Start(Stored(inversion), options, Fitting(**entry.fitting), name)


def mismatch(name: str, why: str) -> InversionModelMismatch:
    """The refusal of a stored inversion, and why."""
    resource = inversion_name(name)
    return InversionModelMismatch(f"{resource} {why}", metadata={"resource_name": resource})


def _decode_and_fit(opened: Image.Image, fit: int, model: ModelInfo) -> tuple[Picture, Fitting]:
    decoded = images.rgb(images.load(opened))
    fitting = fittings.plan(fit, decoded.size, model)
    return fittings.fit_picture(decoded, fitting), fitting
