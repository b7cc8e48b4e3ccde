"""Find the directory of a checkpoint, check and read its files, and compute its digest."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from underpaint_server.errors import ModelNotReady

_READ = ("*.json", "*.txt", "*.safetensors")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SINGLE_FILE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_INDEX = ".safetensors.index"
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""Beginning of the names of the weight files that either library writes."""

EMBEDDED = {"": "model", "underpaint-mini": "model", "underpaint-mini-ddpm": "ddpm"}
"""Location of an embedded model -> its directory in the package underpaint_mini."""


def resolve(location: str, allow_network: bool) -> Path:
    """The pipeline directory of a checkpoint.

    ``location`` is a directory, a key of :data:`EMBEDDED` or, with ``allow_network``, the id of a model on the Hugging
    Face hub, which is downloaded. Raises :class:`ModelNotReady` if the location is none of these, or if the directory
    is not a diffusers pipeline.
    """
    directory = embedded(location) if location in EMBEDDED else Path(location)
    if directory.is_file():
        raise ModelNotReady(f"'{location}' is a single file, not a directory: {_conversion(directory)}")
    if not directory.is_dir():
        if not allow_network:
            raise ModelNotReady(
                f"'{location}' is not a directory: correct the path or, if it is a Hugging Face hub id, add "
                "--allow-network to download it"
            )
        directory = _fetch(location)
    if not (directory / "model_index.json").is_file():
        raise ModelNotReady(f"'{directory}' has no model_index.json: {_without_index(directory)}")
    return directory


def _conversion(file: Path) -> str:
    """What to do with a single file."""
    if file.suffix.lower() not in _SINGLE_FILE:
        return "give a diffusers pipeline directory"
    if is_lora(file):
        return f"it is a LoRA, which changes another model: give that model's directory, with the LoRA fused: {_FUSE}"
    return (
        "convert it to a directory with diffusers: "
        f"StableDiffusionPipeline.from_single_file('{file.name}').save_pretrained(DIRECTORY)"
    )


def _without_index(directory: Path) -> str:
    """What a directory is that is no pipeline, and what to do."""
    inner = sorted({*directory.glob("*/model_index.json"), *directory.glob("snapshots/*/model_index.json")})
    if inner:
        return f"give the directory of a pipeline inside it, such as '{inner[0].parent}'"
    if (directory / "config.json").is_file():
        kind = config(directory / "config.json").get("_class_name", "model")
        return f"it holds one {kind}, a part of a pipeline: give a diffusers pipeline directory"
    files = sorted(file for file in directory.iterdir() if file.suffix in _SINGLE_FILE)
    if files:
        return f"it holds the single file {files[0].name}: {_conversion(files[0])}"
    return "give a diffusers pipeline directory"


_FUSE = "pipeline.load_lora_weights(FILE); pipeline.fuse_lora(); pipeline.save_pretrained(DIRECTORY)"


class Checkpoint:
    """A pipeline directory. Its methods read parts of it, and it remembers which files they have read.

    All raise :class:`ModelNotReady`, with the file and the reason, for what is missing, cannot be read or is of a class
    that is not supported.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: set[Path] = set()
        self._unused: list[str] = []
        self.index = self.config("model_index.json")
        """The contents of model_index.json."""

    def config(self, name: str) -> dict[str, object]:
        """The contents of a configuration file, by its path in the directory; see :func:`config`."""
        file = self.directory / name
        _check_folder(file.parent)
        contents = config(file)
        self._read.add(file)
        return contents

    def scheduler(self) -> dict[str, object]:
        """The contents of scheduler_config.json. The oldest checkpoints of DDPM have it beside model_index.json."""
        name = "scheduler_config.json"
        return self.config(f"scheduler/{name}" if (self.directory / "scheduler").is_dir() else name)

    def named_class(self, part: str) -> object:
        """The class of a part, as model_index.json names it; None if it names none."""
        match self.index.get(part):
            case [_, str(name)]:
                return name
            case _:
                return None

    def check_class(self, part: str, supported: Sequence[str], found: object) -> None:
        """Refuse a part whose class, ``found``, is not one of ``supported``; None is accepted."""
        if found is not None and found not in supported:
            raise ModelNotReady(
                f"'{self.directory}': its {part} is of class {found}, which is not supported; save the pipeline with "
                f"one of class {' or '.join(supported)}"
            )

    def model(self, part: str, kind: Any, stem: str, dtype: torch.dtype) -> Any:
        """Load a network of class ``kind`` (of diffusers or transformers), whose weight files begin with ``stem``.

        The oldest checkpoints of DDPM keep all files in one directory.
        """
        self.check_class(part, [kind.__name__], self.named_class(part))
        folder = self.directory / part
        if not folder.is_dir() and (self.directory / "config.json").is_file():
            folder = self.directory
        weights = find_weights(folder, stem)
        _check_types(weights.files)
        contents = config(folder / "config.json")
        self.check_class(part, [kind.__name__], contents.get("_class_name"))
        variant = {"variant": weights.variant} if weights.variant else {}
        options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True} | variant
        try:
            module, loading_info = kind.from_pretrained(folder, dtype=dtype, **options)
        except Exception as error:  # what a library raises for a damaged file is of any class
            raise ModelNotReady(f"'{folder}' cannot be read; the server log has the cause") from error
        check_complete(folder, loading_info)
        self._read |= {folder / "config.json", *weights.files}
        unused = sorted(key for key in loading_info["unexpected_keys"] if not key.endswith("position_ids"))
        if unused:
            self._unused.append(f"{part}: {len(unused)} tensors are not used, such as {unused[0]}; see its config.json")
        return module

    def tokenizer(self, part: str, kind: Any) -> Any:
        """Load a tokenizer of class ``kind``, of transformers."""
        self.check_class(part, [kind.__name__, f"{kind.__name__}Fast"], self.named_class(part))
        folder = self.directory / part
        _check_folder(folder)
        try:
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ModelNotReady(f"'{folder}' cannot be read; the server log has the cause") from error
        self._read |= {*folder.glob("*.json"), *folder.glob("*.txt")}
        return tokenizer

    def digest(self, implied: Sequence[str] = ()) -> str:
        """sha256 (hex) of the files that were read, see :func:`digest`, and of what was read that they do not say."""
        return digest(self.directory, self._read, implied)

    def remarks(self) -> list[str]:
        """A sentence for each file with weights that nothing reads, such as a LoRA, and for each part with tensors that
        its network does not have."""
        parts = {name for name, value in self.index.items() if isinstance(value, list)} | {"clip"}
        folders = {file.parent for file in self._read}
        found = [*self._unused]
        patterns = ("*.safetensors", *_PICKLED)
        for file in sorted({file for pattern in patterns for file in self.directory.rglob(pattern)} - self._read):
            is_variant = any(
                file.name.startswith(f"{stem}.") or file.name.startswith(f"{stem}-")
                for stem in (DIFFUSERS, TRANSFORMERS)
            )
            inner = file.relative_to(self.directory)
            is_safe = file.suffix == ".safetensors"
            if is_safe and is_lora(file):
                found.append(f"{inner} is a LoRA and is not used; fuse it: {_FUSE}")
            elif inner.parts[0] not in parts or (is_safe and file.parent in folders and not is_variant):
                found.append(f"{inner} is not used")
        return found


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of one part."""

    files: tuple[Path, ...]
    """Safetensors, and their index where there are several."""
    variant: str
    """Of their names, such as "fp16"; empty for none."""


def find_weights(folder: Path, stem: str) -> Weights:
    """The weight files that diffusers or transformers wrote, in one file or in several with an index.

    Those without a variant are taken, or else those of the only variant. Raises :class:`ModelNotReady` if there are
    none, if several variants are there, or if files are missing.
    """
    _check_folder(folder)
    names = re.escape(stem)
    single = re.compile(rf"{names}(?:\.(?P<variant>(?!.*-\d+-of-\d+)[^.]+))?\.safetensors")
    several = re.compile(rf"{names}{re.escape(_INDEX)}(?:\.(?P<variant>[^.]+))?\.json")
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        match = single.fullmatch(file.name) or several.fullmatch(file.name)
        if match is not None:
            found.setdefault(match["variant"] or "", []).append(file)
    if not found:
        raise ModelNotReady(f"'{folder}' must hold safetensors: {_without_weights(folder, stem)}")
    if "" not in found and len(found) > 1:
        raise ModelNotReady(
            f"'{folder}' has the variants {', '.join(found)} and no {stem}.safetensors: keep one of the variants"
        )
    variant, files = ("", found[""]) if "" in found else next(iter(found.items()))
    if len(files) > 1:
        raise ModelNotReady(
            f"'{folder}' has the weights twice, in {files[0].name} and by {files[1].name}: delete one of them"
        )
    return Weights(tuple(files) + tuple(_shards(files[0])), variant)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelNotReady(f"'{folder}' is missing: give a complete pipeline directory, as diffusers saves it")


def _shards(file: Path) -> list[Path]:
    """The files that an index names; none if ``file`` is no index."""
    if _INDEX not in file.name:
        return []
    names = config(file).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelNotReady(f"'{file}' has no weight_map of file names: copy the directory again")
    shards = [file.parent / name for name in sorted(set(names.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelNotReady(f"'{file.parent}' lacks {', '.join(missing[:3])}, which {file.name} names: copy it again")
    return shards


def _without_weights(folder: Path, stem: str) -> str:
    others = sorted(folder.glob("*.safetensors"))
    if others:
        return f"it has {others[0].name}, but no {stem}.safetensors and no {stem}{_INDEX}.json"
    if any(file for pattern in _PICKLED for file in folder.glob(pattern)):
        return "its weights are pickled; convert them to safetensors, because pickles can run code"
    return "it has no *.safetensors file; copy the weights there"


def _check_types(files: Iterable[Path]) -> None:
    """Refuse weights that are stored as integers, which the libraries would take for floating-point numbers."""
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "pt") as tensors:
                names = [name for name in tensors.keys() if not name.endswith("position_ids")]  # noqa: SIM118
                types = {name: tensors.get_slice(name).get_dtype() for name in names}
        except (OSError, SafetensorError) as error:
            raise ModelNotReady(f"'{file}' cannot be read; the server log has the cause") from error
        whole = next((name for name, kind in types.items() if not kind.startswith(("F", "BF"))), None)
        if whole is not None:
            raise ModelNotReady(
                f"'{file}': {whole} has numbers of type {types[whole]}; quantised weights are not supported: give the "
                "floating-point ones"
            )


def is_lora(file: Path) -> bool:
    """Whether a safetensors file holds a LoRA, by the names of its tensors."""
    try:
        with safe_open(file, "pt") as tensors:
            return any("lora" in name.lower() for name in tensors.keys())  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError):
        return False


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


def digest(directory: Path, files: Iterable[Path] | None = None, implied: Sequence[str] = ()) -> str:
    """sha256 (hex) over the relative paths and contents of ``files``, by default all json, txt and safetensors files of
    a directory, and over the texts ``implied``."""
    if files is None:
        files = {file for pattern in _READ for file in directory.rglob(pattern)}
    total = sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            contents = file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.relative_to(directory).as_posix()}\0{contents}\n".encode())
    for text in implied:
        total.update(f"{text}\n".encode())
    return total.hexdigest()


def config(file: Path) -> dict[str, object]:
    """The JSON object of a diffusers configuration file, without keys that begin with ``_`` except ``_class_name``.

    Raises :class:`ModelNotReady` if the file cannot be read or holds something else.
    """
    try:
        loaded = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotReady(f"'{file}' cannot be read: {reason}") from error
    if not isinstance(loaded, dict):
        raise ModelNotReady(f"'{file}' is not a JSON object: copy the directory again")
    return {key: value for key, value in loaded.items() if not key.startswith("_") or key == "_class_name"}


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
            "the hub id, or try again; the server log has the cause"
        ) from error
