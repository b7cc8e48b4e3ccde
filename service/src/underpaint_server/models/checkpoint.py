"""Find the directory of a checkpoint, check and read its files, and compute its digest."""

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from underpaint_server.errors import ModelNotReady

_READ = ("*.json", "*.txt", "*.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


EMBEDDED = {"": "model", "underpaint-mini": "model", "underpaint-mini-ddpm": "ddpm"}
"""Location of an embedded model -> its directory in the package underpaint_mini."""


def resolve(location: str, allow_network: bool) -> Path:
    """The pipeline directory of a checkpoint.

    ``location`` is a directory, a key of :data:`EMBEDDED` or, with ``allow_network``, the id of a model on the Hugging
    Face hub, which is downloaded. Raises :class:`ModelNotReady` if the location is none of these, or if the directory
    is not a diffusers pipeline with safetensors.
    """
    directory = embedded(location) if location in EMBEDDED else Path(location)
    if not directory.is_dir():
        if not allow_network:
            raise ModelNotReady(
                f"'{location}' is not a directory: correct the path or, if it is a Hugging Face hub id, add "
                "--allow-network to download it"
            )
        directory = _fetch(location)
    if not (directory / "model_index.json").is_file():
        raise ModelNotReady(f"'{directory}' has no model_index.json: give a diffusers pipeline directory")
    unet = part(directory, "unet")
    check_weights(unet if any(unet.glob("*.safetensors")) else directory / "unet")
    return directory


def part(directory: Path, name: str) -> Path:
    """Directory of a part of a pipeline: the subdirectory ``name``, or ``directory`` itself if it has none.

    The oldest checkpoints of DDPM keep all files in one directory.
    """
    subdirectory = directory / name
    return subdirectory if subdirectory.is_dir() else directory


def check_weights(folder: Path) -> None:
    """Raise :class:`ModelNotReady` if the directory of one part of a pipeline has no safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    if not folder.is_dir():
        raise ModelNotReady(f"'{folder}' is missing: give a complete pipeline directory, as diffusers saves it")
    pickled = any(file for pattern in _PICKLED for file in folder.glob(pattern))
    hint = (
        "its weights are pickled; convert them to safetensors, because pickles can run code"
        if pickled
        else "it has no *.safetensors file; copy the weights there"
    )
    raise ModelNotReady(f"'{folder}' must hold safetensors: {hint}")


def embedded(name: str) -> Path:
    """The directory of an embedded model; ``name`` is a key of :data:`EMBEDDED`.

    Raises :class:`ModelNotReady` if the distribution underpaint-mini is not installed.
    """
    spec = find_spec("underpaint_mini")
    if spec is None or spec.origin is None:
        raise ModelNotReady("the embedded model is not installed: pip install underpaint-mini, or give a directory")
    return Path(spec.origin).parent / EMBEDDED[name]


def clip(directory: Path, location: str) -> Path | None:
    """The directory of a checkpoint's CLIP model; None if ``location`` is empty and there is none.

    It is ``location``; if that is empty, ``clip`` in the checkpoint's directory, else ``clip`` beside it, the first
    that has a config.json. Raises :class:`ModelNotReady` if ``location`` is not such a directory.
    """
    if location and not (Path(location) / "config.json").is_file():
        state = "has no config.json" if Path(location).is_dir() else "is not a directory"
        raise ModelNotReady(
            f"clips: '{location}' {state}: give ID=DIRECTORY of a transformers CLIPModel or VisionTextDualEncoderModel"
        )
    candidates = [Path(location)] if location else [directory / "clip", directory.parent / "clip"]
    return next((folder for folder in candidates if (folder / "config.json").is_file()), None)


def digest(directory: Path) -> str:
    """sha256 (hex) over the relative paths and contents of all json, txt and safetensors files of a checkpoint."""
    total = sha256()
    for file in sorted({file for pattern in _READ for file in directory.rglob(pattern)}):
        with file.open("rb") as stream:
            contents = file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(directory).as_posix()}\0{contents}\n".encode())
    return total.hexdigest()


def config(file: Path) -> dict[str, object]:
    """The JSON object of a diffusers configuration file, without keys that begin with ``_`` except ``_class_name``.

    Raises :class:`ModelNotReady` if the file cannot be read or holds something else.
    """
    try:
        loaded = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelNotReady(f"'{file}' cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ModelNotReady(f"'{file}' is not a JSON object: copy the directory again")
    return {key: value for key, value in loaded.items() if not key.startswith("_") or key == "_class_name"}


def read(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    """Load one part of a pipeline; ``kind`` is a model class of diffusers or transformers.

    The fp16 variant of the files is read if there is no other. Raises :class:`ModelNotReady` if the files cannot be
    read or tensors are missing.
    """
    fp16_files = list(directory.glob("*.fp16.safetensors"))
    other_files = [file for file in directory.glob("*.safetensors") if ".fp16." not in file.name]
    variant = {"variant": "fp16"} if fp16_files and not other_files else {}
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True} | variant
    try:
        module, loading_info = kind.from_pretrained(directory, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelNotReady(f"'{directory}' cannot be read: {error}") from error
    check_complete(directory, loading_info)
    return module


def check_complete(directory: Path, loading_info: Mapping[str, Any]) -> None:
    """Raise :class:`ModelNotReady` for missing tensors, which the libraries fill with random numbers."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelNotReady(f"'{directory}' lacks {', '.join(missing[:3])}{more}: copy the whole directory again")


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_READ)))
    except Exception as error:
        raise ModelNotReady(
            f"'{hub_id}' is not a directory, and downloading it from the Hugging Face hub failed; correct the path or "
            f"the hub id, or try again: {error}"
        ) from error
