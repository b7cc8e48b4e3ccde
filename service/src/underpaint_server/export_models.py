"""``underpaint-server export``: make the files that compiled backends need, before a server starts.

They go to the cache directory, where servers find them; see :mod:`underpaint_server.backends.export`.
"""

import sys
import time
from importlib.util import find_spec

import torch

from underpaint_server import cache
from underpaint_server.backends.export import export
from underpaint_server.backends.runtime import Unavailable
from underpaint_server.errors import UnderpaintError, cause_of
from underpaint_server.models import checkpoint, families
from underpaint_server.settings import Settings

RUNTIMES = ("openvino", "onnxruntime")
"""Packages that compute exported networks."""


def main(settings: Settings) -> int:
    """Export every configured model; returns the exit status, 1 if one of them could not be exported."""
    if not any(find_spec(package) for package in RUNTIMES):
        _print("nothing to export: neither openvino nor onnxruntime is installed, and torch needs no files")
        return 0
    if cache.directory(settings) is None:
        _print("cache_dir: files cannot be written there; give another --cache-dir")
        return 1
    return max(_export(model_id, location, settings) for model_id, location in settings.model_locations)


def _export(model_id: str, location: str, settings: Settings) -> int:
    begin = time.monotonic()
    try:
        source = checkpoint.resolve(location, settings.allow_network)
        model = families.load(source, dtype=torch.float32, device=torch.device("cpu"))
        exported = export(model, settings, lambda note: _print(f"{model_id}: {note}"))
    except (UnderpaintError, Unavailable) as error:
        _print(f"{model_id}: {error}")
        if cause := cause_of(error):
            _print(f"cause: {cause}")
        return 1
    size = sum(file.stat().st_size for file in exported.folder.rglob("*") if file.is_file())
    _print(f"{model_id}: {size / 1e6:.0f} MB in {exported.folder}, {time.monotonic() - begin:.0f} s")
    return 0


def _print(line: str) -> None:
    print(f"underpaint-server: {line}", file=sys.stderr, flush=True)
