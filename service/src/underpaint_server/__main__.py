"""``underpaint-server``, or ``python -m underpaint_server``: flags, environment and defaults to a running server.

``underpaint-server check-model DIRECTORY`` tries a checkpoint instead, see ``check``.
"""

import asyncio
import sys

from pydantic import ValidationError

from underpaint_server.engine.worker import spin_briefly
from underpaint_server.settings import CheckSettings, Settings


def main() -> None:
    """Read the settings, serve, and exit with the server's status; 2 for settings that make no sense."""
    try:
        if sys.argv[1:2] == ["check-model"]:
            sys.exit(_check(CheckSettings(_cli_parse_args=sys.argv[2:])))
        settings = Settings(_cli_parse_args=True)
    except ValidationError as error:
        sys.exit(_explain(error))
    # Not above: the engine process, which is spawned and so imports this module again, has no use for sockets.
    from underpaint_server.server import serve

    sys.exit(asyncio.run(serve(settings)))


def _check(settings: CheckSettings) -> int:
    spin_briefly()
    from underpaint_server.check_model import main as check  # as below; and it loads torch

    return check(settings)


def _explain(error: ValidationError) -> int:
    for wrong in error.errors():
        place = ".".join(str(part) for part in wrong["loc"])
        message = wrong["msg"].removeprefix("Value error, ")
        print(f"underpaint-server: {place + ': ' if place else ''}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
