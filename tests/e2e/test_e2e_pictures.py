"""Real pictures on the embedded model: the same bytes alone and in a crowd, and any size, aspect and encoding."""

import io
from typing import Any

import numpy as np
import pytest
from e2e.harness import batch_class_of, disc, stubs, together
from PIL import Image
from safetensors.numpy import load
from underpaint import (
    AsyncClient,
    Client,
    ContentInjection,
    Ddim,
    DdimInversion,
    DiffEdit,
    Edict,
    EdictInversion,
    Edited,
    Generated,
    SdEdit,
)
from underpaint.results import Box
from underpaint.v1 import edit_service_pb2
from underpaint_server.local_server import LocalServer

TARGET = "a simple blue circle on a white plain background"
DRAWN = Generated("a yellow star", seed=3, steps=6)
EDITS: dict[str, tuple[Any, Any]] = {
    "edict": (disc(), Edict(steps=8)),
    "edict of a drawing": (DRAWN, Edict()),
    "ddim": (disc(), Ddim(steps=8)),
    "ddim of a drawing": (DRAWN, Ddim()),
    "sdedit": (disc(), SdEdit(steps=8)),
    "diffedit": (disc(), DiffEdit(steps=8, samples=3)),
    "content injection": (disc(), ContentInjection(content=disc((30, 30, 200), (90, 60)), steps=8, calibration=0.3)),
    "content injection of a drawing": (DRAWN, ContentInjection(content=disc((30, 30, 200)), boosting_start=0.3)),
    "diffedit with a mask": (disc(), DiffEdit(steps=8, mask=disc((0, 0, 0)).convert("L"))),
}
INVERSIONS: dict[str, EdictInversion | DdimInversion] = {"edict": EdictInversion(), "ddim": DdimInversion()}


async def test_every_answer_is_the_same_alone_and_in_a_crowd(embedded: LocalServer, is_invariant: Any) -> None:
    is_invariant(*batch_class_of(embedded))
    async with AsyncClient(embedded.target) as client:
        alone = [await answer for answer in _everything(client)]
        assert [one.usage.mean_batch_size for one in alone] == [1.0] * len(alone)
        inversions = [one.inversion for one in alone if isinstance(one, Edited) and one.inversion]
        for inversion in {handle.name: handle for handle in [*inversions, *alone[-2:]]}.values():
            await client.delete_inversion(inversion)
        crowded = await together(embedded, [*_everything(client), *_strangers(client)], inside=16)
        crowded = crowded[: len(alone)]
        names = [*EDITS, "mask", "drawing", *(f"{name} inversion" for name in INVERSIONS)]
        for name, one, other in zip(names, alone, crowded, strict=True):
            assert _bits(one) == _bits(other), name
            assert not other.usage.inversion_cache_hit
            assert other.usage.mean_batch_size > 1.5, name


async def test_latents_are_the_same_alone_and_in_a_crowd(embedded: LocalServer, is_invariant: Any) -> None:
    photo = disc((120, 30, 160))
    is_invariant(*batch_class_of(embedded))
    async with AsyncClient(embedded.target) as client:
        for method in INVERSIONS.values():
            alone = await client.invert(photo, method=method, steps=8, source_prompt="a circle")
            before = load(await client.export_inversion(alone))
            await client.delete_inversion(alone)
            again = client.invert(photo, method=method, steps=8, source_prompt="a circle")
            crowded, *_ = await together(embedded, [again, *_strangers(client)], inside=7)
            assert crowded.usage.mean_batch_size > 1
            after = load(await client.export_inversion(crowded))
            assert before.keys() == after.keys()
            assert all(np.array_equal(before[part], after[part]) for part in before)
            assert crowded.name == alone.name


@pytest.mark.parametrize("case", EDITS)
def test_resolved_gives_the_same_bytes(embedded: LocalServer, case: str) -> None:
    source, method = EDITS[case]
    with Client(embedded.target) as client:
        made = client.edit(source, TARGET, method, negative_prompt="a square")
        again = client.repeat(made.resolved)
    assert (again.image_bytes, again.mask_bytes) == (made.image_bytes, made.mask_bytes)
    assert again.resolved == made.resolved


async def test_resolved_gives_the_same_mask(embedded: LocalServer) -> None:
    async with AsyncClient(embedded.target) as client:
        made = await client.compute_mask(disc(), TARGET, DiffEdit(samples=3))
    async with stubs(embedded) as wire:
        again = await wire.edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=made.resolved.message))
    assert again.mask.content == made.mask_bytes
    assert np.array_equal(np.frombuffer(again.difference.data, "<f4"), np.asarray(made.difference).ravel())


# --- sizes and encodings ------------------------------------------------------------------------------------------


def upright() -> Image.Image:
    """200 x 150, red at the top left and white elsewhere."""
    picture = Image.new("RGB", (200, 150), "white")
    picture.paste((205, 48, 48), (0, 0, 100, 75))
    return picture


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def sideways() -> bytes:
    """The same as a camera held sideways writes it: rotated pixels, and the way back in EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(upright().transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=100, subsampling=0)


LANDSCAPE = encoded(upright(), "PNG")
RIBBON = encoded(Image.new("RGB", (37, 500), "red"), "PNG")
PIXEL = encoded(Image.new("RGB", (1, 1), "red"), "PNG")
FITS: dict[str, tuple[bytes, str, tuple[int, int], tuple[int, int], Box, Box]] = {
    # photo, fit -> its size, the result's size, what of the photo, where in the result
    "landscape cropped": (LANDSCAPE, "crop", (200, 150), (64, 64), Box(25, 0, 150, 150), Box(0, 0, 64, 64)),
    "landscape padded": (LANDSCAPE, "pad", (200, 150), (64, 64), Box(0, 0, 200, 150), Box(0, 8, 64, 48)),
    "landscape resized": (LANDSCAPE, "resize", (200, 150), (80, 48), Box(0, 0, 200, 150), Box(0, 0, 80, 48)),
    "a ribbon cropped": (RIBBON, "crop", (37, 500), (64, 64), Box(0, 231, 37, 37), Box(0, 0, 64, 64)),
    "a ribbon padded": (RIBBON, "pad", (37, 500), (64, 64), Box(0, 0, 37, 500), Box(29, 0, 5, 64)),
    "a ribbon resized": (RIBBON, "resize", (37, 500), (16, 240), Box(0, 0, 37, 500), Box(0, 0, 16, 240)),
    "a camera held sideways": (sideways(), "crop", (200, 150), (64, 64), Box(25, 0, 150, 150), Box(0, 0, 64, 64)),
    "a single pixel": (PIXEL, "crop", (1, 1), (64, 64), Box(0, 0, 1, 1), Box(0, 0, 64, 64)),
}


@pytest.mark.parametrize("case", FITS)
def test_a_photo_of_any_size_is_fitted_as_told(embedded: LocalServer, case: str) -> None:
    photo, fit, source_size, size, source_box, box = FITS[case]
    with Client(embedded.target) as client:
        edited = client.edit(photo, TARGET, SdEdit(steps=2), fit=fit, seed=1)
        assert edited.fitting is not None
        assert edited.fitting.fit == fit
        assert (edited.fitting.source_size, edited.fitting.size) == (source_size, size)
        assert (edited.fitting.source_box, edited.fitting.box) == (source_box, box)
        assert edited.image.size == size
        assert client.repeat(edited.resolved).image_bytes == edited.image_bytes


def test_the_size_of_the_model_needs_no_fitting(embedded: LocalServer) -> None:
    with Client(embedded.target) as client:
        for fit in ("crop", "pad", "resize"):
            edited = client.edit(disc(), TARGET, SdEdit(steps=2), fit=fit, seed=1)
            assert edited.fitting is not None
            assert edited.fitting.fit is None
            assert edited.fitting.size == edited.image.size == (64, 64)


@pytest.mark.parametrize("size", [(200, 150), (37, 500)])
def test_edict_is_exact_at_sizes_that_are_no_square(embedded: LocalServer, size: tuple[int, int]) -> None:
    with Client(embedded.target) as client:
        made = client.invert(disc(size=size), steps=10, fit="resize", source_prompt="a red circle", verify=True)
        assert made.width != made.height
        assert made.reconstruction_max_abs_error is not None
        assert made.reconstruction_max_abs_error <= 1e-10
        assert client.edit(made, TARGET).image.size == (made.width, made.height)


def test_one_picture_in_any_encoding_is_one_picture(embedded: LocalServer) -> None:
    """Orientation, transparency, greys and palettes end in the same pixels, so in the same inversion."""
    on_white = upright()
    transparent = upright().convert("RGBA")
    holes = np.asarray(transparent).copy()
    holes[75:, 100:, :] = (0, 200, 0, 0)  # a green that nobody sees, where white is below
    grey = Image.new("L", (200, 150), 255)
    grey.paste(90, (0, 0, 100, 75))
    families = {
        "colour": [
            LANDSCAPE,
            encoded(Image.fromarray(holes), "PNG"),
            encoded(Image.fromarray(holes), "WEBP", lossless=True, exact=True),
            encoded(on_white.quantize(4), "PNG"),
        ],
        "grey": [encoded(grey, "PNG"), encoded(grey, "WEBP", lossless=True), encoded(grey.convert("RGB"), "PNG")],
    }
    with Client(embedded.target) as client:
        for photos in families.values():
            assert len({client.invert(photo, method=DdimInversion(), steps=2).name for photo in photos}) == 1
        method = SdEdit(steps=2, strength=0.5)
        turned, plain = (client.edit(photo, TARGET, method, seed=1) for photo in (sideways(), LANDSCAPE))
    assert np.abs(_rgb(turned) - _rgb(plain)).mean() < 6, "a JPEG of it, turned upright"
    assert np.abs(_rgb(turned)[::-1] - _rgb(plain)).mean() > 12


@pytest.mark.parametrize(("media_type", "kind"), [("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")])
def test_the_answer_has_the_wanted_encoding(embedded: LocalServer, media_type: str, kind: str) -> None:
    with Client(embedded.target) as client:
        edited = client.edit(disc(), TARGET, SdEdit(steps=2), output_media_type=media_type, seed=1)
    assert (edited.media_type, edited.image.format) == (media_type, kind)


def test_a_mask_may_have_the_photo_s_size_or_the_model_s(embedded: LocalServer) -> None:
    photo, large, small = upright(), Image.new("L", (200, 150)), Image.new("L", (64, 64))
    large.paste(255, (100, 0, 200, 150))
    with Client(embedded.target) as client:
        fitted = client.edit(photo, TARGET, DiffEdit(mask=large, steps=5), seed=1)
        assert fitted.mask is not None
        small.paste(255, (32, 0, 64, 64))
        assert np.array_equal(np.asarray(fitted.mask), np.asarray(small))
        assert client.edit(photo, TARGET, DiffEdit(mask=small, steps=5), seed=1).image_bytes == fitted.image_bytes


def test_what_the_text_encoder_cannot_read_is_told(embedded: LocalServer) -> None:
    with Client(embedded.target) as client:
        edited = client.edit(disc(), "a circle " * 100 + "and a pineapple", SdEdit(steps=5))
    assert [notice.reason for notice in edited.notices] == ["PROMPT_TRUNCATED"]
    assert "pineapple" in edited.notices[0].message


def _everything(client: AsyncClient) -> list[Any]:
    """One of each thing that can be asked for, inversions last."""
    edits = [client.edit(source, TARGET, method, seed=7) for source, method in EDITS.values()]
    mask = client.compute_mask(disc(), TARGET, DiffEdit(samples=3), seed=7)
    drawing = client.generate(TARGET, steps=6, seed=7)
    inversions = [client.invert(disc(), method=method, steps=10, verify=True) for method in INVERSIONS.values()]
    return [*edits, mask, drawing, *inversions]


def _strangers(client: AsyncClient) -> list[Any]:
    """Work of other people, of the same shape and of another, to share passes with."""
    return [
        *(client.edit(disc((20 * n, 90, 30)), "a leaf", SdEdit(steps=4 + n)) for n in range(4)),
        client.edit(disc((9, 9, 9)), "a leaf", Edict(steps=6)),
        client.generate("a leaf", steps=5, width=96, height=48),
    ]


def _bits(answer: Any) -> Any:
    if hasattr(answer, "mask_bytes"):
        return getattr(answer, "image_bytes", b""), answer.mask_bytes
    return answer.name, answer.reconstruction_max_abs_error, answer.reconstruction_psnr_db


def _rgb(answer: Edited) -> Any:
    return np.asarray(answer.image.convert("RGB")).astype(int)
