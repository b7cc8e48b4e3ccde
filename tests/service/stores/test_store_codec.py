"""The file format: everything survives, and no changed bit goes unseen."""

import json
import math
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save
from underpaint_server.errors import StoreCorrupt
from underpaint_server.jobs import DdimConvention, Inversion, InversionOptions
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.stores import codec
from underpaint_server.stores.codec import header_bytes
from underpaint_server.stores.directions import decode as decode_direction
from underpaint_server.stores.inversions.record import decode, decode_record, encode

METHODS = st.one_of(
    st.builds(EdictInversion, st.floats(0.5, 1)),
    st.builds(DdimInversion, st.sampled_from(DdimConvention), st.sampled_from([(), ("mid",), ("mid", "up_1")])),
)
OPTIONS = st.builds(
    InversionOptions, METHODS, st.integers(1, 1000), st.floats(0.01, 1), st.floats(0, 30), st.text(max_size=200)
)
ARRAYS = st.dictionaries(
    st.sampled_from(["source", "x", "y", "trajectory"]),
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=3, max_dims=4, max_side=4)),
    min_size=1,
)
FIGURES = st.none() | st.floats(0, allow_nan=False, allow_infinity=True)
INVERSIONS = st.builds(
    Inversion, st.text(), st.text(), OPTIONS, st.integers(8), st.integers(8), st.none() | st.integers(2), ARRAYS,
    st.text(), FIGURES, FIGURES,
)  # fmt: skip
FITTINGS = st.dictionaries(st.text(), st.integers())
NAME = "a" * 64
WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)


def facts(inversion: Inversion) -> tuple[Any, ...]:
    """Everything but the arrays, comparable."""
    return (
        inversion.model, inversion.model_digest, inversion.options, inversion.width, inversion.height,
        inversion.batch_class, inversion.fingerprint,
        inversion.reconstruction_psnr_db, inversion.reconstruction_max_abs_error,
    )  # fmt: skip


def same_arrays(one: Inversion, other: Inversion) -> bool:
    return one.arrays.keys() == other.arrays.keys() and all(
        one.arrays[name].dtype == other.arrays[name].dtype
        and one.arrays[name].shape == other.arrays[name].shape
        and one.arrays[name].tobytes() == other.arrays[name].tobytes()
        for name in one.arrays
    )


def small() -> Inversion:
    options = InversionOptions(EdictInversion(0.93), 50, 0.8, 3.0, "a dog")
    arrays = {name: np.arange(12.0).reshape(3, 2, 2) for name in ("source", "x", "y")}
    return Inversion("mini", "d" * 64, options, 64, 48, None, arrays, "f" * 64, math.inf, 1e-14)


@given(INVERSIONS, FITTINGS)
def test_everything_survives(inversion: Inversion, fitting: dict[str, int]) -> None:
    data = encode(NAME, inversion, fitting, WHEN)
    back, record = decode(NAME, data)
    assert facts(back) == facts(inversion)
    assert same_arrays(back, inversion)
    assert (record.fitting, record.create_time) == (fitting, WHEN)
    assert record.inversion.arrays == {}


@given(INVERSIONS, FITTINGS)
def test_the_same_inversion_is_the_same_bytes(inversion: Inversion, fitting: dict[str, int]) -> None:
    assert encode(NAME, inversion, fitting, WHEN) == encode(NAME, inversion, fitting, WHEN)


@given(st.data())
def test_no_changed_bit_goes_unseen(data: st.DataObject) -> None:
    file = bytearray(encode(NAME, small(), {"width": 64}, WHEN))
    bit = data.draw(st.integers(0, 8 * len(file) - 1))
    file[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StoreCorrupt):
        decode(NAME, bytes(file))


@given(st.data())
def test_a_file_cut_short_is_corrupt(data: st.DataObject) -> None:
    file = encode(NAME, small(), {}, WHEN)
    with pytest.raises(StoreCorrupt):
        decode(NAME, file[: data.draw(st.integers(0, len(file) - 1))])


@given(st.binary(max_size=200))
def test_anything_else_is_corrupt(data: bytes) -> None:
    with pytest.raises(StoreCorrupt):
        decode(NAME, data)


def test_the_record_is_read_from_the_header_alone() -> None:
    file = encode(NAME, small(), {"left": 3}, WHEN)
    head = file[: header_bytes(file[:8])]
    assert len(head) < len(file)
    record = decode_record(NAME, head)
    assert facts(record.inversion) == facts(small())
    assert record.fitting == {"left": 3}


def test_any_safetensors_reader_can_read_it() -> None:
    file = encode(NAME, small(), {}, WHEN)
    assert {name: array.dtype for name, array in load(file).items()} == dict.fromkeys(("source", "x", "y"), np.float64)
    header = json.loads(file[8 : header_bytes(file)])
    assert json.loads(header["__metadata__"]["underpaint"])["reconstruction_psnr_db"] == "inf"


def test_another_version_of_the_format_is_refused() -> None:
    text = json.dumps({"format": 2})
    with pytest.raises(StoreCorrupt, match="format 2 is not 1"):
        decode(NAME, save({"x": np.zeros(1)}, metadata={"underpaint": text}))


@pytest.mark.parametrize("method", ["edict", None, {}, {"kind": "unheard"}, {"kind": []}])
def test_a_record_whose_method_is_no_method_is_refused(method: object) -> None:
    file = codec.decode(encode(NAME, small(), {}, WHEN))
    with pytest.raises(StoreCorrupt, match="header cannot be read"):
        decode(NAME, codec.encode(file.record | {"method": method}, file.arrays))


@pytest.mark.parametrize("header", [b"\xff" * 5000, b"{" * 5000, b"[" * 100_000, b"1" * 5000, b'["underpaint"]'])
def test_a_header_that_is_none_is_refused_without_its_bytes(header: bytes) -> None:
    with pytest.raises(StoreCorrupt, match="header cannot be read") as caught:
        codec.read_record(len(header).to_bytes(8, "little") + header)
    assert len(caught.value.message) < 80


DIRECTION = (Path(__file__).parents[2] / "data" / "direction-format-1.safetensors").read_bytes()
LIES: dict[str, Any] = {
    "a huge shape": {"dtype": "F32", "shape": [0, 2**64 - 1]},
    "a shape beyond memory": {"dtype": "F32", "shape": [2**40]},
    "too many dimensions": {"dtype": "F32", "shape": [1] * 100},
    "no shape": {"dtype": "F32", "shape": None},
    **{f"the type {name}": {"dtype": name, "shape": [0]} for name in ("BF16", "F8_E4M3", "F4", "C64", "BOOL", "X")},
}


def sealed(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_about_its_arrays_is_corrupt(case: str) -> None:
    said = json.loads(DIRECTION[8 : header_bytes(DIRECTION)])["__metadata__"]
    with pytest.raises(StoreCorrupt):
        decode_direction("x", sealed({"__metadata__": said, "weights": LIES[case] | {"data_offsets": [0, 0]}}))


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "[1]", "{}", '"\\ud800"', "NaN", ""])
def test_a_record_that_is_none_is_corrupt(text: str) -> None:
    with pytest.raises(StoreCorrupt):
        decode_direction("x", sealed({"__metadata__": {"underpaint": text}}))


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_to_a_direction_s_file_it_is_corrupt(seed: int) -> None:
    random, unchanged = np.random.default_rng(seed), decode_direction("x", DIRECTION)
    values = [b"-1", b"9" * 30, b"null", b"[", b'"', b"1e999", b"\\ud800", b"\0", b"\xff"]
    for _ in range(300):
        data = bytearray(DIRECTION)
        for _ in range(int(random.integers(1, 4))):
            start = int(random.integers(0, len(data)))
            end = start + int(random.integers(0, 9))
            data[start:end] = [b"", bytes(data[end:][:9]), values[int(random.integers(0, len(values)))]][
                random.integers(3)
            ]
        if random.random() < 0.6:  # so that more than the length of the header is looked at
            data[:8] = struct.pack("<Q", max(0, data.rfind(b"}") - 7))
        try:
            assert decode_direction("x", bytes(data)) == unchanged
        except StoreCorrupt:
            continue


def test_arrays_need_not_be_contiguous() -> None:
    turned = np.arange(24.0).reshape(4, 3, 2).transpose(2, 0, 1)
    inversion = Inversion("mini", "d", small().options, 64, 64, 4, {"x": turned})
    assert np.array_equal(decode(NAME, encode(NAME, inversion, {}, WHEN))[0].arrays["x"], turned)


def test_a_file_is_its_own_inversion_s_only() -> None:
    file = encode(NAME, small(), {}, WHEN)
    for read in (decode, decode_record):
        with pytest.raises(StoreCorrupt, match="another inversion"):
            read("b" * 64, file)


def test_a_file_of_an_earlier_server_has_no_name() -> None:
    file = codec.decode(encode(NAME, small(), {}, WHEN))
    record = {key: value for key, value in file.record.items() if key != "name"}
    assert facts(decode(NAME, codec.encode(record, file.arrays))[0]) == facts(small())
