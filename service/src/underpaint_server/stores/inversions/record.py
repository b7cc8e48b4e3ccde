"""The safetensors file of an inversion: its record, and encoding and decoding."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from pydantic import TypeAdapter

from underpaint_server.errors import StoreCorrupt
from underpaint_server.jobs import Inversion, InversionMethod, InversionOptions, Notice
from underpaint_server.methods import INVERSIONS
from underpaint_server.stores import codec

FORMAT = 1
"""Version of the record. A file of another version is treated as corrupt, and the inversion is computed again."""


@dataclass(frozen=True, slots=True)
class Record:
    """The JSON record of a file, parsed."""

    inversion: Inversion
    """Without arrays: its ``arrays`` are empty."""
    fitting: Mapping[str, int]
    """The fields of ``wire.fitting.Fitting``, by name."""
    create_time: datetime


def encode(name: str, inversion: Inversion, fitting: Mapping[str, int], create_time: datetime) -> bytes:
    """The safetensors file of the inversion of this name. Equal arguments give equal bytes."""
    return codec.encode({"name": name, **_to_json(inversion, fitting, create_time)}, inversion.arrays)


def decode(name: str, data: bytes) -> tuple[Inversion, Record]:
    """The inversion of this name with its arrays, and the record.

    Raises StoreCorrupt if the file is malformed, damaged, or another inversion's.
    """
    record = decode_record(name, data)  # first, so that a file of another version is reported as such
    return replace(record.inversion, arrays=dict(codec.decode(data).arrays)), record


def decode_record(name: str, head: bytes) -> Record:
    """The record, from at least the first ``codec.header_bytes(head)`` bytes of a file; raises StoreCorrupt."""
    return _record(name, codec.read_record(head))


def _record(name: str, values: codec.Record) -> Record:
    # Earlier versions wrote no name.
    if values.get("name", name) != name:
        raise StoreCorrupt("the file is that of another inversion")
    try:
        return _from_json(values)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"the header cannot be read: {error!r}") from error


def _to_json(inversion: Inversion, fitting: Mapping[str, int], create_time: datetime) -> dict[str, Any]:
    options = inversion.options
    return {
        "format": FORMAT,
        "model": inversion.model,
        "model_digest": inversion.model_digest,
        "method": _method_to_json(options.method),
        "num_inference_steps": options.num_inference_steps,
        "strength": options.strength,
        "guidance_scale": options.guidance_scale,
        "source_prompt": options.source_prompt,
        "width": inversion.width,
        "height": inversion.height,
        "batch_class": inversion.batch_class,
        "fingerprint": inversion.fingerprint,
        "reconstruction_psnr_db": _number_to_json(inversion.reconstruction_psnr_db),
        "reconstruction_max_abs_error": _number_to_json(inversion.reconstruction_max_abs_error),
        "notices": [[notice.reason, notice.message] for notice in inversion.notices],
        "fitting": dict(fitting),
        "create_time": create_time.isoformat(),
    }


def _from_json(values: dict[str, Any]) -> Record:
    if values["format"] != FORMAT:
        raise ValueError(f"format {values['format']} is not {FORMAT}")
    options = InversionOptions(
        method=_method_from_json(values["method"]),
        num_inference_steps=values["num_inference_steps"],
        strength=values["strength"],
        guidance_scale=values["guidance_scale"],
        source_prompt=values["source_prompt"],
    )
    inversion = Inversion(
        model=values["model"],
        model_digest=values["model_digest"],
        options=options,
        width=values["width"],
        height=values["height"],
        batch_class=values["batch_class"],
        arrays={},
        fingerprint=values["fingerprint"],
        reconstruction_psnr_db=_number_from_json(values["reconstruction_psnr_db"]),
        reconstruction_max_abs_error=_number_from_json(values["reconstruction_max_abs_error"]),
        notices=tuple(Notice(*notice) for notice in values.get("notices", ())),  # earlier builds kept none
    )
    return Record(inversion, values["fitting"], datetime.fromisoformat(values["create_time"]))


@cache
def _adapter(name: str) -> TypeAdapter[InversionMethod]:
    return TypeAdapter(INVERSIONS[name])


def _method_to_json(method: InversionMethod) -> dict[str, Any]:
    return {"kind": method.name, **_adapter(method.name).dump_python(method, mode="json")}


def _method_from_json(values: dict[str, Any]) -> InversionMethod:
    adapter = _adapter(values["kind"])
    return adapter.validate_python({name: value for name, value in values.items() if name != "kind"})


def _number_to_json(number: float | None) -> float | str | None:
    # The PSNR of an exact round trip is infinite, which JSON cannot represent as a number.
    return number if number is None or math.isfinite(number) else str(number)


def _number_from_json(value: float | str | None) -> float | None:
    return None if value is None else float(value)
