"""Finding a checkpoint and naming its contents."""

import json
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
"""What the distribution underpaint-mini holds, by the name it is served by."""


def resolve(place: str, allow_network: bool) -> Path:
    """The directory of a checkpoint named by a directory, by a name of :data:`EMBEDDED` or, where the network is
    allowed, by a hub id.

    Raises :class:`ModelNotReady`, saying what to do, when there is no pipeline directory with safetensors.
    """
    directory = embedded(place) if place in EMBEDDED else Path(place)
    if not directory.is_dir():
        if not allow_network:
            raise ModelNotReady(f"'{place}' is no directory here; a hub id is fetched only with --allow-network")
        directory = _fetch(place)
    if not (directory / "model_index.json").is_file():
        raise ModelNotReady(f"'{directory}' has no model_index.json: give a diffusers pipeline directory")
    unet = part(directory, "unet")
    check_weights(unet if any(unet.glob("*.safetensors")) else directory / "unet")
    return directory


def part(directory: Path, name: str) -> Path:
    """Where a part of a pipeline lies: its own directory, or the pipeline's where that has none, as in the oldest."""
    own = directory / name
    return own if own.is_dir() else directory


def check_weights(folder: Path) -> None:
    """Raise :class:`ModelNotReady` where one part of a pipeline has no safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    if not folder.is_dir():
        raise ModelNotReady(f"'{folder}' is missing: give the whole directory, as diffusers saves a pipeline")
    pickled = any(found for pattern in _PICKLED for found in folder.glob(pattern))
    hint = "its weights are pickled; convert them, since pickles can run code" if pickled else "it has none"
    raise ModelNotReady(f"'{folder}' must hold safetensors: {hint}")


def embedded(name: str) -> Path:
    """The directory of an embedded model, from the distribution underpaint-mini."""
    spec = find_spec("underpaint_mini")
    if spec is None or spec.origin is None:
        raise ModelNotReady("the embedded model is not installed: pip install underpaint-mini, or name a model")
    return Path(spec.origin).parent / EMBEDDED[name]


def clip(directory: Path, place: str) -> Path | None:
    """The directory of a checkpoint's CLIP: ``place`` if it names one, else ``clip`` in or beside the checkpoint; None
    if there is none. Raises :class:`ModelNotReady` for a place that is no directory."""
    if place and not Path(place).is_dir():
        raise ModelNotReady(f"clips: '{place}' is no directory")
    found = [Path(place)] if place else [directory / "clip", directory.parent / "clip"]
    return next((folder for folder in found if (folder / "config.json").is_file()), None)


def digest(directory: Path) -> str:
    """sha256 (hex) over the names and contents of everything that is read from a checkpoint."""
    total = sha256()
    for file in sorted({file for pattern in _READ for file in directory.rglob(pattern)}):
        with file.open("rb") as stream:
            contents = file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(directory).as_posix()}\0{contents}\n".encode())
    return total.hexdigest()


def config(file: Path) -> dict[str, object]:
    """The scheduler's, or the whole pipeline's, configuration as JSON has it. Raises :class:`ModelNotReady`."""
    try:
        loaded = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelNotReady(f"'{file}' cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise ModelNotReady(f"'{file}' is no JSON object: copy the directory again")
    return {key: value for key, value in loaded.items() if not key.startswith("_") or key == "_class_name"}


def read(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    """A part's network, of a class of diffusers or transformers. Raises :class:`ModelNotReady`.

    Files of half precision are taken where there are no others.
    """
    halves = sorted(directory.glob("*.fp16.safetensors"))
    whole = [file for file in directory.glob("*.safetensors") if ".fp16." not in file.name]
    variant = {"variant": "fp16"} if halves and not whole else {}
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True} | variant
    try:
        module, found = kind.from_pretrained(directory, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelNotReady(f"'{directory}' cannot be read: {error}") from error
    if found["missing_keys"]:  # the libraries would fill these with random numbers
        raise ModelNotReady(f"'{directory}' lacks {', '.join(sorted(found['missing_keys'])[:3])}: copy it again, whole")
    return module


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_READ)))
    except Exception as error:
        raise ModelNotReady(f"'{hub_id}' is no directory here and could not be fetched: {error}") from error
