"""An inversion as one safetensors file, and back.

The arrays are the file's tensors. ``__metadata__`` has one string, ``underpaint``: a JSON object with everything else,
and in it ``sha256`` over all its other members and over every tensor's name, type, shape and bytes.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from underpaint_server.errors import StoreCorrupt
from underpaint_server.jobs import Array, DdimConvention, DdimInversion, EdictInversion, Inversion, InversionOptions

FORMAT = 1
"""Version of the JSON; a file of another version reads as corrupt and is made again."""

_KEY = "underpaint"
_PREFIX_BYTES = 8


@dataclass(frozen=True, slots=True)
class Record:
    """What a file says about itself besides the arrays."""

    inversion: Inversion
    """Its ``arrays`` are empty."""
    fitting: Mapping[str, int]
    create_time: datetime


def encode(inversion: Inversion, fitting: Mapping[str, int], create_time: datetime) -> bytes:
    """The safetensors file. The same arguments give the same bytes."""
    arrays = {name: np.ascontiguousarray(array) for name, array in inversion.arrays.items()}
    values = _to_json(inversion, fitting, create_time)
    values["sha256"] = _digest(values, arrays)
    return save(arrays, metadata={_KEY: _canonical(values)})


def decode(data: bytes) -> tuple[Inversion, Record]:
    """The inversion with its arrays; raises StoreCorrupt if a bit of what matters has changed."""
    values, record = _parse(data)
    try:
        arrays: dict[str, Array] = load(data)
    except SafetensorError as error:
        raise StoreCorrupt(f"the latents cannot be read: {error}") from error
    if values.pop("sha256", None) != _digest(values, arrays):
        raise StoreCorrupt("the latents fail their checksum")
    return replace(record.inversion, arrays=arrays), record


def decode_record(head: bytes) -> Record:
    """What the first bytes of a file say, ``header_bytes(head)`` of them at least; raises StoreCorrupt."""
    return _parse(head)[1]


def header_bytes(head: bytes) -> int:
    """How many bytes of a file must be read to know its record, from the first eight."""
    return _PREFIX_BYTES + int.from_bytes(head[:_PREFIX_BYTES], "little")


def _parse(head: bytes) -> tuple[dict[str, Any], Record]:
    try:
        header = json.loads(head[_PREFIX_BYTES : header_bytes(head)])
        text = header["__metadata__"][_KEY]
        values = json.loads(text)
        record, written = _from_json(values), _canonical(values)
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"the header cannot be read: {error!r}") from error
    if written != text:
        raise StoreCorrupt("the header is not as it was written")
    return values, record


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, allow_nan=False)


def _digest(values: dict[str, Any], arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256(_canonical(values).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())
        digest.update(array.data)
    return digest.hexdigest()


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
    )
    return Record(inversion, values["fitting"], datetime.fromisoformat(values["create_time"]))


def _method_to_json(method: EdictInversion | DdimInversion) -> dict[str, Any]:
    match method:
        case EdictInversion(mixing_coefficient=p):
            return {"kind": "edict", "mixing_coefficient": p}
        case DdimInversion(convention=convention, features=features):
            return {"kind": "ddim", "convention": convention.value, "features": list(features)}


def _method_from_json(values: dict[str, Any]) -> EdictInversion | DdimInversion:
    match values["kind"]:
        case "edict":
            return EdictInversion(values["mixing_coefficient"])
        case "ddim":
            # Files from before there were features have none.
            return DdimInversion(DdimConvention(values["convention"]), tuple(values.get("features", ())))
        case kind:
            raise ValueError(f"inversion method {kind!r}")


def _number_to_json(number: float | None) -> float | str | None:
    # The PSNR of a perfect round trip is infinite, which JSON has no number for.
    return number if number is None or math.isfinite(number) else str(number)


def _number_from_json(value: float | str | None) -> float | None:
    return None if value is None else float(value)
