"""``underpaint-server export``: fill the cache directory, so that later starts of the server are fast.

Loads the models once, as the server would, which exports their networks for the compiled backends and measures how
exact they are on this machine. Progress and errors go to stderr.
"""

import time

from underpaint_server import cache, offline
from underpaint_server.backends import load
from underpaint_server.backends.exactness import Survey
from underpaint_server.errors import UnderpaintError, cause_of
from underpaint_server.settings import ExportSettings


def main(settings: ExportSettings) -> int:
    """Load every configured model; returns the exit status, 1 if one cannot be served or nothing can be kept."""
    return offline.status(settings, lambda: _export(settings))


def _export(settings: ExportSettings) -> int:
    directory = cache.directory(settings)
    if directory is None:
        offline.print_note("cache_dir: files cannot be written there; give another --cache-dir")
        return 1
    failed = 0
    for model_id, location in settings.model_locations:
        begin = time.monotonic()
        try:
            info = load(location, model_id, settings, Survey(offline.progress)).facts.info
        except UnderpaintError as error:
            failed += 1
            offline.print_note(f"{model_id}: {error}")
            if cause := cause_of(error):
                offline.print_note(f"cause: {cause}")
            continue
        seconds = time.monotonic() - begin
        offline.print_note(f"{model_id}: loaded with {info.backend} in {info.dtype} after {seconds:.0f} s")
    offline.print_note(f"kept in {directory}")
    return 1 if failed else 0
