"""The picture whose content an edit injects: fetched or decoded, and held against the source."""

from dataclasses import replace

from underpaint_server.errors import FieldInvalid, FieldViolation, StoreUnavailable
from underpaint_server.jobs import (
    ContentInjection,
    DdimConvention,
    DdimInversion,
    Inversion,
    InversionOptions,
    Photo,
    Stored,
)
from underpaint_server.rpc.drafts import EditDraft, Injected, Named, Start
from underpaint_server.rpc.fitting import Fitting
from underpaint_server.rpc.front import Front
from underpaint_server.rpc.methods.injection import check_injection
from underpaint_server.rpc.names import inversion_digest
from underpaint_server.rpc.sources import mismatch, read_picture, stored

_IMAGE = "content_injection.image"
_INVERSION = "content_injection.inversion"


async def with_content(front: Front, draft: EditDraft, start: Start) -> Start:
    """The same start with its content, where the method has one.

    Raises what decoding raises, and FieldInvalid where content and source do not go together; for a named inversion
    also InversionExpired, InversionModelMismatch, StoreCorrupt and StoreUnavailable.
    """
    if not isinstance(draft.method, ContentInjection) or draft.content is None:
        return start
    assert start.inversion is not None
    check_injection(draft.method, start.inversion)
    if isinstance(draft.content, Named):
        content = await _from_store(front, draft, draft.method, start, draft.content.inversion)
    else:
        content = await _from_image(front, draft, draft.method, start, start.inversion)
    return replace(start, content=content)


async def _from_image(
    front: Front, draft: EditDraft, method: ContentInjection, start: Start, inversion: InversionOptions
) -> Injected:
    assert draft.content is not None
    assert not isinstance(draft.content, Named)
    width, height = start.fitting.size
    sized = replace(draft.model, width=width, height=height)
    pixels, fitting = await read_picture(front, draft.content.image, sized)
    if fitting.size != start.fitting.size:
        raise FieldInvalid(
            FieldViolation(f"{_IMAGE}.fit", f"{_sizes(fitting.size, start)}: use FIT_CROP or FIT_PAD, which lead to it")
        )
    options = _along(inversion, method)
    name = await front.pool.run(inversion_digest, draft.model, pixels, options)
    try:
        found = await stored(front, name)
    except StoreUnavailable:
        found = None  # costs a repeated inversion, not the answer
    source = Photo(pixels) if found is None else _features(found[0], method)
    return Injected(source, options, fitting, name)


async def _from_store(front: Front, draft: EditDraft, method: ContentInjection, start: Start, name: str) -> Injected:
    inversion, entry = await front.store.get(name)
    if inversion.model_digest != draft.model.digest:
        raise mismatch(
            name, f"was made by other weights than models/{draft.model.id}: send the content's image instead"
        )
    way, size = inversion.options.method, (inversion.width, inversion.height)
    kept = way.features if isinstance(way, DdimInversion) else ()
    missing = [site for site in method.sites if site not in kept]
    if missing:
        raise FieldInvalid(
            FieldViolation(
                _INVERSION,
                f"keeps no features of {', '.join(missing)}: send the content's image instead, or invert it with "
                f"ddim.features {', '.join(method.sites)}",
            )
        )
    if size != start.fitting.size:
        raise FieldInvalid(FieldViolation(_INVERSION, f"{_sizes(size, start)}: send the content's image instead"))
    return Injected(_features(inversion, method), inversion.options, Fitting(**entry.fitting), name)


def _features(inversion: Inversion, method: ContentInjection) -> Stored:
    """What an injection needs of it; latents and other sites need not go to the engine."""
    return Stored(replace(inversion, arrays={f"h_{site}": inversion.arrays[f"h_{site}"] for site in method.sites}))


def _along(source: InversionOptions, method: ContentInjection) -> InversionOptions:
    """The content goes along the source's schedule, but without text: the source's would not describe it."""
    convention = source.method.convention if isinstance(source.method, DdimInversion) else DdimConvention.TARGET
    way = DdimInversion(convention, method.sites)
    return replace(source, method=way, guidance_scale=1.0, source_prompt="")


def _sizes(size: tuple[int, int], start: Start) -> str:
    width, height = start.fitting.size
    return f"the content would have {size[0]}x{size[1]} pixels, the source has {width}x{height}"
