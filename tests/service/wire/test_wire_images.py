"""Encoded pictures: fitted as told, mapped back exactly, harmless whatever their bytes are."""

import io
import struct
import subprocess
import sys
import zlib
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from support.front import MINI, encoded, picture
from support.hostile import png, png_chunk, png_header
from underpaint.v1 import types_pb2
from underpaint.v1.types_pb2 import Fit
from underpaint_server.decoder import pixels as decoder
from underpaint_server.decoder.host import answer
from underpaint_server.errors import FieldInvalid, ImageTooLarge, ImageUndecodable
from underpaint_server.settings import Settings
from underpaint_server.wire import fitting, images
from underpaint_server.wire.headers import JPEG, ImageLimits, read_header, sniff

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=1000 * 1000, max_aspect=100)
SIDES = st.integers(1, 3000)
FITS = st.sampled_from(list(Fit.values()))


def decode(content: bytes, media_type: str = "") -> Image.Image:
    header = images.examine(types_pb2.Image(content=content, media_type=media_type), LIMITS)
    with decoder.decoding("the image", header.kind):
        return decoder.rgb(decoder.load(content, header.kind, LIMITS, "the image"))


@given(fit=FITS, width=SIDES, height=SIDES)
@example(fit=Fit.FIT_RESIZE, width=3000, height=1)
@example(fit=Fit.FIT_CROP, width=1, height=3000)
def test_every_picture_is_fitted_to_a_size_of_the_model(fit: int, width: int, height: int) -> None:
    plan = fitting.plan(fit, (width, height), MINI)
    assert plan.source_size == (width, height)
    assert all(side > 0 and side % MINI.size_multiple == 0 for side in plan.size)
    if fit == Fit.FIT_RESIZE:
        assert 0.6 <= plan.width * plan.height / (MINI.width * MINI.height) <= 1.5
    else:
        assert plan.size == (MINI.width, MINI.height)
    assert (plan.fit == Fit.FIT_UNSPECIFIED) == (plan.size == (width, height))
    for start, length, whole in [
        (plan.source_left, plan.source_box_width, width),
        (plan.source_top, plan.source_box_height, height),
        (plan.left, plan.box_width, plan.width),
        (plan.top, plan.box_height, plan.height),
    ]:
        assert 0 <= start < start + length <= whole


@given(fit=FITS, width=SIDES, height=SIDES)
def test_fitting_a_fitted_picture_changes_nothing(fit: int, width: int, height: int) -> None:
    plan = fitting.plan(fit, (width, height), MINI)
    assert fitting.plan(Fit.FIT_RESIZE, plan.size, MINI) == fitting.untouched(plan.size)


@given(fit=FITS, width=st.integers(1, 300), height=st.integers(1, 300))
def test_the_pixels_have_the_planned_size(fit: int, width: int, height: int) -> None:
    plan = fitting.plan(fit, (width, height), MINI)
    assert fitting.fit_picture(Image.new("RGB", (width, height)), plan).shape == (plan.height, plan.width, 3)
    assert fitting.fit_mask(Image.new("L", (width, height)), plan).shape == (plan.height, plan.width)


@pytest.mark.parametrize("fit", [Fit.FIT_CROP, Fit.FIT_PAD, Fit.FIT_RESIZE])
def test_the_record_says_where_each_part_went(fit: int) -> None:
    image = Image.new("RGB", (400, 200), "black")
    plan = fitting.plan(fit, image.size, MINI)
    # A white square of the source, in the middle of the part that is used.
    across, down = plan.source_box_width / plan.box_width, plan.source_box_height / plan.box_height
    middle = (plan.source_left + plan.source_box_width // 2, plan.source_top + plan.source_box_height // 2)
    box = (middle[0] - 40, middle[1] - 40, middle[0] + 40, middle[1] + 40)
    image.paste("white", box)
    white = fitting.fit_picture(image, plan)[..., 0] > 127
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    back_x = plan.source_left + (np.array([columns[0], columns[-1] + 1]) - plan.left) * across
    back_y = plan.source_top + (np.array([rows[0], rows[-1] + 1]) - plan.top) * down
    np.testing.assert_allclose(back_x, (box[0], box[2]), atol=across)
    np.testing.assert_allclose(back_y, (box[1], box[3]), atol=down)


def test_padding_repeats_the_edges() -> None:
    image = Image.new("RGB", (100, 10), "red")
    image.paste("blue", (0, 9, 100, 10))
    pixels = fitting.fit_picture(image, fitting.plan(Fit.FIT_PAD, image.size, MINI))
    np.testing.assert_array_equal(pixels[:5], np.broadcast_to(pixels[20:21], (5, 64, 3)))
    np.testing.assert_array_equal(pixels[-5:], np.broadcast_to(pixels[-1:], (5, 64, 3)))
    assert pixels[-1, 0, 2] > pixels[0, 0, 2]


def test_transparency_is_put_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    pixels = np.asarray(decode(encoded(image)))
    assert tuple(pixels[0, 0]) == (0, 0, 255)
    assert (pixels[1:] == 255).all()


def test_sixteen_bits_of_grey_become_eight() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    pixels = np.asarray(decode(encoded(Image.fromarray(ramp))))
    np.testing.assert_array_equal(pixels[..., 0], ramp >> 8)


GREYS = {1: bytes([0b01000000]), 2: bytes([0b00011011]), 4: b"\x01\x23", 8: bytes([0, 1, 2, 3])}
"""Four pixels of each depth, of which the second alone has the value 1."""


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("upper", [0, 0xFF00], ids=["", "with bits that do not count"])
def test_a_transparent_grey_of_any_depth_is_put_on_white(depth: int, upper: int) -> None:
    row = struct.pack(">4H", 0, 1, 256, 513) if depth == 16 else GREYS[depth]
    transparent = png_chunk(b"tRNS", struct.pack(">H", 1 + (0 if depth == 16 else upper)))
    grey = png(4, 1, depth=depth, rows=b"\0" + row)
    pixels = np.asarray(decode(png(4, 1, transparent, depth=depth, rows=b"\0" + row)))
    assert tuple(pixels[0, 1]) == (255, 255, 255)
    np.testing.assert_array_equal(np.delete(pixels, 1, 1), np.delete(np.asarray(decode(grey)), 1, 1))


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_of_any_depth_is_put_on_white(depth: int) -> None:
    scale, code = (256, ">6H") if depth == 16 else (1, ">6B")
    row = struct.pack(code, *(scale * value for value in (10, 20, 30, 10, 20, 31)))
    transparent = png_chunk(b"tRNS", struct.pack(">3H", *(scale * value for value in (10, 20, 30))))
    pixels = np.asarray(decode(png(2, 1, transparent, depth=depth, colour=2, rows=b"\0" + row)))
    assert pixels.tolist() == [[[255, 255, 255], [10, 20, 31]]]


def test_a_palette_with_a_transparent_entry_is_put_on_white() -> None:
    palette, transparent = png_chunk(b"PLTE", bytes(range(9))), png_chunk(b"tRNS", b"\xff\0")
    pixels = np.asarray(decode(png(3, 1, palette, transparent, colour=3, rows=b"\0\0\1\2")))
    assert pixels.tolist() == [[[0, 1, 2], [255, 255, 255], [6, 7, 8]]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA"])
def test_other_modes_become_colour(mode: str) -> None:
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert decode(encoded(picture().convert(mode), kind)).mode == "RGB"


@pytest.mark.parametrize(("orientation", "size"), [(1, (64, 48)), (6, (48, 64)), (8, (48, 64)), (3, (64, 48))])
def test_pictures_are_turned_upright_first(orientation: int, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(encoded(picture(), "JPEG", exif=exif)).size == size


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_orientation_that_is_not_in_exif_turns_nothing(kind: str) -> None:
    options: dict[str, Any] = {"xmp": XMP}
    if kind == "PNG":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    content = encoded(picture(), kind, **options)
    assert Image.open(io.BytesIO(content)).getexif().get(0x0112) == 6, "which Pillow would apply"
    assert decode(content).size == (64, 48)


@pytest.mark.parametrize("exif", [b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b"rubbish", b""])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_picture_is_none_the_worse_for_its_broken_exif(kind: str, exif: bytes) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = np.asarray(decode(encoded(picture(), kind, exif=exif, **options)))
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


# --- colour profiles ----------------------------------------------------------------------------------------------

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
P3_COLUMNS = np.array([[0.51512, 0.24120, -0.00105], [0.29198, 0.69225, 0.04189], [0.15710, 0.06657, 0.78407]]).T
"""The primaries of Display P3 in XYZ, adapted to D50."""


def tags(profile: bytes) -> dict[bytes, slice]:
    """Where each tag's data lies."""
    count = int.from_bytes(profile[128:132])
    entries = (struct.unpack(">4sII", profile[start : start + 12]) for start in range(132, 132 + 12 * count, 12))
    return {name: slice(offset, offset + size) for name, offset, size in entries}


def columns(profile: bytes) -> Any:
    """The matrix to XYZ."""
    where = tags(profile)
    values = [struct.unpack(">3i", profile[where[name]][8:20]) for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
    return np.array(values).T / 65536


def display_p3() -> bytes:
    """The profile of most telephones: the curve of sRGB, other primaries."""
    profile = bytearray(SRGB)
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3_COLUMNS.T, strict=True):
        start = tags(SRGB)[name].start
        profile[start + 8 : start + 20] = struct.pack(">3i", *(round(65536 * value) for value in column))
    return bytes(profile)


def grey(profile: bytes) -> bytes:
    """The same curve for one channel."""
    return profile[:16] + b"GRAY" + profile[20:].replace(b"rTRC", b"kTRC", 1)


def as_srgb(colour: tuple[int, int, int]) -> Any:
    """A colour of Display P3 by the book."""
    encoded_ = np.array(colour) / 255
    linear = np.where(encoded_ <= 0.04045, encoded_ / 12.92, ((encoded_ + 0.055) / 1.055) ** 2.4)
    there = (np.linalg.inv(columns(SRGB)) @ P3_COLUMNS @ linear).clip(0, 1)
    return 255 * np.where(there <= 0.0031308, 12.92 * there, 1.055 * there ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("colour", [(200, 100, 60), (60, 180, 90), (128, 128, 128), (255, 0, 0)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colours_become_srgb(kind: str, colour: tuple[int, int, int]) -> None:
    image = Image.new("RGB", (32, 32), colour)
    options: dict[str, Any] = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    pixels = np.asarray(decode(encoded(image, kind, icc_profile=display_p3(), **options[kind])))
    np.testing.assert_allclose(pixels[16, 16], as_srgb(colour), atol=3 if kind == "JPEG" else 1.5)


def test_a_profile_of_srgb_changes_nothing() -> None:
    content = encoded(picture(), icc_profile=SRGB)
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(picture()))


def test_transparency_stays_where_it_is_when_colours_move() -> None:
    image = Image.new("RGBA", (8, 8), (200, 100, 60, 0))
    image.putpixel((0, 0), (200, 100, 60, 255))
    pixels = np.asarray(decode(encoded(image, icc_profile=display_p3())))
    np.testing.assert_allclose(pixels[0, 0], as_srgb((200, 100, 60)), atol=1.5)
    assert (pixels[1:] == 255).all()


def test_palettes_have_profiles_too() -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 60)).convert("P", palette=Image.Palette.ADAPTIVE)
    pixels = np.asarray(decode(encoded(image, icc_profile=display_p3())))
    np.testing.assert_allclose(pixels[0, 0], as_srgb((200, 100, 60)), atol=1.5)


@pytest.mark.parametrize(
    "profile", [b"rubbish", SRGB[:100], SRGB[:-400] + bytes(400), grey(SRGB)], ids=["none", "cut", "torn", "of grey"]
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_profile_that_says_nothing_leaves_the_pixels_alone(mode: str, profile: bytes) -> None:
    content = encoded(picture().convert(mode), icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
@pytest.mark.parametrize("profile", [grey(SRGB), SRGB], ids=["of grey", "of colour"])
def test_grey_stays_grey(mode: str, profile: bytes) -> None:
    image = picture().convert("L").convert(mode)
    pixels = np.asarray(decode(encoded(image, icc_profile=profile)))
    np.testing.assert_allclose(pixels, np.asarray(image.convert("RGB")), atol=1)


def test_a_large_picture_takes_no_more_than_twice_its_size() -> None:
    script = """
import io, resource, sys
from PIL import Image, ImageCms
from underpaint_server.decoder import pixels as decoder
from underpaint_server.decoder.host import answer
from underpaint_server.wire.headers import ImageLimits
content = sys.stdin.buffer.read()
limits = ImageLimits(len(content), 4096 * 4096, 1)
decode = lambda content: decoder.rgb(decoder.load(content, "image/png", limits, "the image"))
small = io.BytesIO()
Image.new("RGBA", (8, 8)).save(small, "PNG")
decode(small.getvalue())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert decode(content).mode == "RGB"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    content = encoded(Image.new("RGBA", (4096, 4096), (1, 2, 3, 4)))
    ended = subprocess.run((sys.executable, "-c", script), input=content, capture_output=True, check=True)
    assert int(ended.stdout) < 2 * 4096 * 4096 * 4 / 1024


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_type_is_read_from_the_bytes(kind: str) -> None:
    content = encoded(picture(), kind)
    assert decode(content, f"image/{kind.lower()}").size == (64, 48)
    for other in {"image/png", "image/jpeg", "image/webp", "image/gif"} - {f"image/{kind.lower()}"}:
        with pytest.raises(ImageUndecodable, match=other):
            decode(content, other)


@given(content=st.binary(max_size=200), magic=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF0000WEBP"]))
def test_rubbish_is_refused_and_nothing_worse(content: bytes, magic: bytes) -> None:
    with pytest.raises((ImageUndecodable, ImageTooLarge)):
        decode(magic + content)


WHOLE = {kind: encoded(picture(), kind) for kind in ("PNG", "JPEG", "WEBP")}


@given(kind=st.sampled_from(["PNG", "JPEG", "WEBP"]), data=st.data())
def test_a_damaged_picture_is_a_picture_or_refused(kind: str, data: Any) -> None:
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode(bytes(content))
    except (ImageUndecodable, ImageTooLarge):
        return
    assert image.mode == "RGB"


@given(length=st.integers(0, len(WHOLE["PNG"]) - 40))
def test_a_png_cut_short_is_refused(length: int) -> None:
    with pytest.raises(ImageUndecodable):
        decode(WHOLE["PNG"][:length])


@pytest.mark.parametrize("media_type", images.MEDIA_TYPES)
def test_equal_pixelsgive_equal_bytes(media_type: str) -> None:
    pixels = np.asarray(picture())
    image = images.encode(pixels, media_type)
    assert image == images.encode(pixels.copy(), media_type)
    assert sniff(image.content) == image.media_type == media_type
    if media_type != JPEG:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.content)).convert("RGB")), pixels)


def mask_of(image: Image.Image, plan: fitting.Fitting, kind: str = "PNG") -> Any:
    decoded = decoder.load(encoded(image, kind), f"image/{kind.lower()}", LIMITS, "the mask")
    return decoder.mask(decoded, plan, "mask")


@pytest.mark.parametrize("fit", [Fit.FIT_CROP, Fit.FIT_PAD, Fit.FIT_RESIZE])
def test_masks_go_the_way_of_their_picture(fit: int) -> None:
    plan = fitting.plan(fit, (320, 160), MINI)
    grey = Image.new("L", (320, 160), 0)
    grey.paste(255, (160, 0, 320, 160))
    mask = mask_of(grey, plan)
    shown = fitting.fit_picture(grey.convert("RGB"), plan)[..., 0]
    assert set(np.unique(mask)) == {0, 255}
    assert (mask != np.where(shown >= 128, 255, 0)).mean() < 0.02


def test_masks_are_cut_at_the_middle() -> None:
    grey = Image.fromarray(np.array([[127, 128] * 32] * 48, np.uint8))
    mask = mask_of(grey, fitting.untouched((64, 48)))
    assert mask.tolist() == [[0, 255] * 32] * 48


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_opaque_masks_of_any_mode_are_read(mode: str) -> None:
    white = Image.new("L", (64, 48), 255).convert(mode)
    assert (mask_of(white, fitting.untouched((64, 48))) == 255).all()


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_masks_with_transparency_are_ambiguous(mode: str) -> None:
    with pytest.raises(FieldInvalid, match="opaque"):
        mask_of(Image.new(mode, (64, 48)), fitting.untouched((64, 48)))


def test_the_decoder_s_values_of_fit_are_the_contract_s() -> None:
    assert {fit.name: fit.value for fit in fitting.Fit} == dict(Fit.items())


PHONES = {"24 megapixels": (5712, 4284), "a camera of 24 megapixels": (6000, 4000), "upright": (4284, 5712)}


@pytest.mark.parametrize("case", PHONES)
def test_what_phones_and_cameras_make_is_accepted_by_default(case: str) -> None:
    settings = Settings()
    limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels, settings.max_image_aspect)
    assert read_header(png_header(*PHONES[case]), limits, "the image").pixels >= 24_000_000


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "WEBP without loss", "WEBP with more"])
@pytest.mark.parametrize("size", [(64, 48), (1, 1), (1000, 90)])
def test_the_size_is_read_without_decoding(kind: str, size: tuple[int, int]) -> None:
    options: dict[str, dict[str, Any]] = {
        "WEBP without loss": {"lossless": True},
        "WEBP with more": {"icc_profile": SRGB},
        "JPEG": {"progressive": True, "icc_profile": SRGB},
    }
    content = encoded(picture(size), kind[:4].strip(), **options.get(kind, {}))
    header = read_header(content, LIMITS, "the image")
    assert (header.width, header.height) == size


@pytest.mark.parametrize(
    ("size", "unit"), [((1, 101), "aspect ratio"), ((101, 1), "aspect ratio"), ((2000, 501), "pixels")]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_size_beyond_a_limit_is_refused_with_it(kind: str, size: tuple[int, int], unit: str) -> None:
    with pytest.raises(ImageTooLarge) as refusal:
        decode(encoded(Image.new("RGB", size), kind))
    assert refusal.value.metadata["unit"] == unit
    assert refusal.value.metadata["limit"] in refusal.value.message


@pytest.mark.parametrize(
    "between", [b"\xff" * 60, b"\0" * 60, b"\xff\0" * 30, b"\xff\xfe\0\2"], ids=["fill", "junk", "stuffing", "comment"]
)
def test_a_jpeg_with_bytes_between_its_segments_is_read(between: bytes) -> None:
    content = encoded(picture(), "JPEG")
    first = 4 + int.from_bytes(content[4:6])
    np.testing.assert_array_equal(
        np.asarray(decode(content[:first] + between + content[first:])), np.asarray(decode(content))
    )


# --- damaged on purpose -------------------------------------------------------------------------------------------


def _originals() -> list[bytes]:
    """Small files of every type, mode and kind of metadata."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    meta: dict[str, Any] = {"exif": exif, "icc_profile": SRGB}
    small = picture((20, 14))
    modes = [small.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    files = [encoded(image, "PNG", **meta) for image in modes]
    files += [encoded(small.convert("P"), "PNG", bits=4, transparency=1), encoded(small.convert("L"), transparency=9)]
    files += [encoded(Image.fromarray(np.arange(280, dtype=np.uint16).reshape(14, 20)), transparency=77)]
    files += [encoded(small, "JPEG", **meta), encoded(small, "JPEG", progressive=True, **meta)]
    files += [encoded(small.convert("CMYK"), "JPEG"), encoded(small.convert("L"), "JPEG", restart_marker_blocks=1)]
    files += [encoded(small, "WEBP", **meta), encoded(modes[-1], "WEBP", lossless=True, **meta)]
    frames = {"save_all": True, "append_images": [small.rotate(90)]}
    files += [encoded(small, "PNG", **frames), encoded(small, "WEBP", **frames), encoded(small, "MPO", **frames)]
    return files


def _mutated(content: bytes, random: np.random.Generator) -> bytes:
    """Bytes changed, cut, repeated, exchanged; of a PNG, with its checksums right again."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        start, end = sorted(int(at) for at in random.integers(0, len(data), 2))
        end = min(end, start + 40)
        match int(random.integers(0, 6)):
            case 0:
                data[start] = int(random.integers(0, 256))
            case 1:
                data[start] ^= 1 << int(random.integers(0, 8))
            case 2:
                del data[start:end]
            case 3:
                data[end:end] = data[start:end]
            case 4:
                data[start : start + 4] = random.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"])
            case 5:
                del data[end:]
        if len(data) < 2:
            return content[:10]
    return _checksums(data) if content.startswith(b"\x89PNG") and random.random() < 0.8 else bytes(data)


def _checksums(data: bytearray) -> bytes:
    position = 8
    while position + 12 <= len(data):
        size = int.from_bytes(data[position : position + 4])
        end = position + 8 + size
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[position + 4 : end]).to_bytes(4)
        position = end + 4
    return bytes(data)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_done_to_a_file_it_is_a_picture_or_refused(seed: int) -> None:
    random, originals = np.random.default_rng(seed), _originals()
    plan = fitting.untouched((20, 14))
    reasons = set()
    for round_ in range(150):
        content = _mutated(originals[round_ % len(originals)], random)
        task: dict[str, Any] = {
            "what": "the image",
            "fit": 0,
            "canvas": (64, 48, 8),
            "mask_of": (),
        }
        if round_ % 3 == 0:
            task |= {"mask_of": astuple(plan)}
        try:
            task |= {"kind": read_header(content, LIMITS, "the image").kind, "limits": astuple(LIMITS)}
        except (ImageUndecodable, ImageTooLarge) as error:
            reasons.add(error.reason)
            continue
        head, data = answer(task, content)
        reasons.add(head.get("reason", ""))
        if "reason" in head:
            assert head["reason"] in ("IMAGE_UNDECODABLE", "IMAGE_TOO_LARGE", "FIELD_INVALID"), head
            assert " at 0x" not in head["message"]
        else:
            assert len(data) == np.prod(head["shape"])
    assert {"", "IMAGE_UNDECODABLE"} <= reasons
