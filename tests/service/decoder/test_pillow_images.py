"""A Pillow image given to the client is the picture, and the mask, that its file is when it is sent by its path."""

import io
import struct
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from support.front import encoded, picture
from support.hostile import png, png_chunk
from underpaint import images
from underpaint_server.decoder.host import answer
from underpaint_server.wire.headers import ImageLimits, read_header

LIMITS = ImageLimits(1_000_000, 1_000_000, 100)
SIZE = (16, 12)


def at_the_server(content: bytes, mask_of: tuple[Any, ...] = ()) -> tuple[dict[str, Any], bytes]:
    """What the server makes of these bytes: a picture, or a mask of one of this fitting; or the reason against it."""
    kind = read_header(content, LIMITS, "the image").kind
    task = {"what": "the image", "kind": kind, "limits": astuple(LIMITS), "fit": 0}
    return answer(task | {"canvas": (*SIZE, 4), "mask_of": mask_of}, content)


def same(content: bytes, image: Image.Image) -> None:
    sent = images.encoded(image)
    by_path = at_the_server(content)
    assert at_the_server(sent) == by_path
    if image.mode != "CMYK":  # which no mask may be, and which no PNG is
        fitting = by_path[0]["fitting"]
        assert at_the_server(sent, fitting) == at_the_server(content, fitting)


def pixels_of(content: bytes) -> Any:
    head, data = at_the_server(content)
    return np.frombuffer(data, np.uint8).reshape(head["shape"])


# --- files --------------------------------------------------------------------------------------------------------


def cmyk_profile() -> bytes:
    """A printer whose inks are not the complements of red, green and blue: a table from CMYK to Lab."""
    lab = [(100, 0, 0), (30, 0, 0), (88, -5, 80), (20, 0, 10), (50, 70, -5), (15, 20, 0), (48, 65, 45), (10, 10, 5)]
    lab += [
        (58, -35, -45),
        (18, -10, -12),
        (50, -60, 25),
        (12, -15, 5),
        (25, 20, -45),
        (8, 5, -10),
        (25, 0, 0),
        (0, 0, 0),
    ]
    order = [lab[2 * n + black] for n in (0, 1, 2, 3, 4, 5, 6, 7) for black in (0, 1)]
    grid = b"".join(bytes((round(255 * L / 100), a + 128, b + 128)) for L, a, b in order)
    line = bytes(range(256))
    table = (
        b"mft1\0\0\0\0\4\3\2\0"
        + struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
        + line * 4
        + grid
        + line * 3
    )
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    text = b"text\0\0\0\0none\0\0\0\0"
    tags, data, offset = b"", b"", 128 + 4 + 12 * 4
    for name, value in ((b"A2B0", table), (b"wtpt", white), (b"cprt", text), (b"desc", text)):
        value += bytes(-len(value) % 4)
        tags, data = tags + struct.pack(">4sII", name, offset + len(data), len(value)), data + value
    header = struct.pack(
        ">I4sI4s4s4s12s4s", offset + len(data), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ", bytes(12), b"acsp"
    )
    header += bytes(128 - len(header) - 60) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return header + struct.pack(">I", 4) + tags + data


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XYZ = SRGB.replace(b"rTRC", b"xTRC", 1)
PICTURE = picture(SIZE)
RAMP = np.arange(0, 65536, 65536 // 192, dtype=np.uint16)[:192].reshape(12, 16)
EXIF = Image.Exif()
EXIF[0x0112] = 6


def xmp(orientation: int) -> PngInfo:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", f'<x xmlns:tiff="t" tiff:Orientation="{orientation}"/>')
    return info


def grey_png(depth: int, transparent: int | None) -> bytes:
    values = np.arange(192, dtype=np.int64).reshape(12, 16) % 2**depth
    if depth == 16:
        rows = [struct.pack(">16H", *(300 * row)) for row in values]
        transparent = None if transparent is None else 300 * transparent
    else:
        bits = ["".join(f"{value:0{depth}b}" for value in row) for row in values]
        rows = [int(row, 2).to_bytes(len(row) // 8) for row in bits]
    extra = [] if transparent is None else [png_chunk(b"tRNS", struct.pack(">H", transparent))]
    return png(*SIZE, *extra, depth=depth, rows=b"".join(b"\0" + row for row in rows))


def colour_png(depth: int) -> bytes:
    values = np.asarray(PICTURE).astype(int) * (256 if depth == 16 else 1)
    code = ">48H" if depth == 16 else ">48B"
    rows = b"".join(b"\0" + struct.pack(code, *row.ravel()) for row in values)
    return png(*SIZE, png_chunk(b"tRNS", struct.pack(">3H", *values[3, 4])), depth=depth, colour=2, rows=rows)


def with_alpha(mode: str) -> Image.Image:
    image = PICTURE.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(SIZE))
    return image


FILES = {
    **{f"grey of {depth} bits": grey_png(depth, None) for depth in (1, 2, 4, 8, 16)},
    **{f"grey of {depth} bits with a transparent one": grey_png(depth, 1) for depth in (1, 2, 4, 8, 16)},
    **{f"colour of {depth} bits with a transparent one": colour_png(depth) for depth in (8, 16)},
    **{mode: encoded(PICTURE.convert(mode)) for mode in ("1", "L", "P", "RGB")},
    **{mode: encoded(with_alpha(mode)) for mode in ("LA", "RGBA")},
    "16 bits with a profile": encoded(Image.fromarray(RAMP), icc_profile=SRGB),
    "16 bits turned": encoded(Image.fromarray(RAMP), exif=EXIF),
    "a palette with a transparent entry": encoded(PICTURE.quantize(5), transparency=3),
    "a palette with an alpha table": encoded(PICTURE.quantize(4), transparency=bytes([0, 90, 255, 128])),
    "a palette of two bits": encoded(PICTURE.quantize(4), bits=2),
    "a palette with a profile": encoded(PICTURE.quantize(9), icc_profile=XYZ),
    "turned by exif": encoded(PICTURE, exif=EXIF),
    "turned by exif and xmp": encoded(PICTURE, exif=EXIF, pnginfo=xmp(3)),
    "turned by xmp alone": encoded(PICTURE, pnginfo=xmp(6)),
    "with broken exif": encoded(PICTURE, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
    "with a broken profile": encoded(PICTURE, icc_profile=SRGB[:90]),
    "jpeg": encoded(PICTURE, "JPEG", quality=95),
    "jpeg turned": encoded(PICTURE, "JPEG", exif=EXIF, progressive=True),
    "grey jpeg": encoded(PICTURE.convert("L"), "JPEG"),
    "cmyk jpeg": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "cmyk jpeg with a profile": encoded(PICTURE.convert("CMYK"), "JPEG", icc_profile=cmyk_profile()),
    "cmyk jpeg with a profile, turned": encoded(PICTURE.convert("CMYK"), "JPEG", icc_profile=cmyk_profile(), exif=EXIF),
    "cmyk jpeg with a profile of colour": encoded(PICTURE.convert("CMYK"), "JPEG", icc_profile=SRGB),
    "cmyk jpeg with a broken profile": encoded(PICTURE.convert("CMYK"), "JPEG", icc_profile=cmyk_profile()[:300]),
    "a camera's file with views": encoded(PICTURE, "MPO", save_all=True, append_images=[picture(SIZE, 1)]),
    "webp": encoded(PICTURE, "WEBP"),
    "webp with transparency": encoded(with_alpha("RGBA"), "WEBP", lossless=True, exact=True),
    "webp turned": encoded(PICTURE, "WEBP", lossless=True, exif=EXIF, icc_profile=SRGB),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_an_opened_file_is_what_the_file_is(case: str) -> None:
    same(FILES[case], Image.open(io.BytesIO(FILES[case])))


LOADED = sorted(FILES.keys() - {f"grey of {depth} bits with a transparent one" for depth in (2, 4)})
"""Of a loaded grey PNG of two or four bits, Pillow no longer knows the depth that its transparent colour is of."""


@pytest.mark.parametrize("case", LOADED)
def test_a_loaded_file_is_what_the_file_is(case: str) -> None:
    with Image.open(io.BytesIO(FILES[case])) as image:
        image.load()
    before = dict(image.info)
    same(FILES[case], image)
    assert (image.info, image.size) == (before, Image.open(io.BytesIO(FILES[case])).size), "the caller's is unchanged"


def test_the_profile_of_inks_is_one_that_counts() -> None:
    plain, by_profile = (pixels_of(FILES[name]).astype(int) for name in ("cmyk jpeg", "cmyk jpeg with a profile"))
    assert np.abs(plain - by_profile).mean() > 10


MODES = {
    "RGBa": with_alpha("RGBA").convert("RGBa"),
    "La": with_alpha("LA").convert("La"),
    "PA": PICTURE.convert("PA"),
    "RGBX": PICTURE.convert("RGBX"),
    "HSV": PICTURE.convert("HSV"),
    "YCbCr": PICTURE.convert("YCbCr"),
    "LAB": ImageCms.applyTransform(
        PICTURE,
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_that_no_file_has_is_what_pillow_s_conversion_says(mode: str) -> None:
    image = MODES[mode]
    assert image is not None
    assert image.mode == mode
    converted = image.convert({"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}.get(mode, "RGB"))
    same(encoded(converted), image)
    if mode in ("HSV", "YCbCr", "LAB", "RGBX"):
        assert np.abs(pixels_of(images.encoded(image)).astype(int) - np.asarray(PICTURE)).mean() < 2


def test_a_palette_with_alpha_keeps_its_transparency() -> None:
    image = PICTURE.convert("PA")
    image.putalpha(0)
    assert (pixels_of(images.encoded(image)) == 255).all()


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(mode: str) -> None:
    if mode == "I":
        image = Image.fromarray(RAMP.astype(np.int32))
    else:
        order = ">u2" if mode == "I;16B" else "<u2"
        image = Image.frombytes(mode, SIZE, RAMP.astype(order).tobytes())
    assert image.mode == mode
    np.testing.assert_array_equal(pixels_of(images.encoded(image))[..., 0], RAMP >> 8)


@pytest.mark.parametrize("value", [-1, 65536, 2**31 - 1])
def test_grey_of_more_than_sixteen_bits_is_refused_with_its_values(value: int) -> None:
    with pytest.raises(ValueError, match=str(value)):
        images.encoded(Image.fromarray(np.full((12, 16), value, np.int32)))


@pytest.mark.parametrize("values", [RAMP / 65535, RAMP / 257, RAMP.astype(float), -RAMP / 257, RAMP * np.nan])
def test_numbers_without_a_range_are_refused_with_what_to_do(values: Any) -> None:
    with pytest.raises(ValueError, match="0 to 255"):
        images.encoded(Image.fromarray(values.astype(np.float32)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF"])
def test_an_animation_is_refused_and_one_of_its_frames_is_not(kind: str) -> None:
    frames = [picture(SIZE, seed) for seed in range(3)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    image = Image.open(io.BytesIO(content))
    with pytest.raises(ValueError, match="3 frames"):
        images.encoded(image)
    image.seek(2)
    np.testing.assert_array_equal(pixels_of(images.encoded(image.copy())), np.asarray(image.convert("RGB")))
