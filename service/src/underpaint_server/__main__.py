"""``underpaint-server``, or ``python -m underpaint_server``: flags, environment and defaults to a running server."""

import asyncio
import sys

from pydantic import ValidationError

from underpaint_server.settings import Settings


def main() -> None:
    """Read the settings, serve, and exit with the server's status; 2 for settings that make no sense."""
    try:
        settings = Settings(_cli_parse_args=True)
    except ValidationError as error:
        sys.exit(_explain(error))
    # Not above: the engine process, which is spawned and so imports this module again, has no use for sockets.
    from underpaint_server.server import serve

    sys.exit(asyncio.run(serve(settings)))


def _explain(error: ValidationError) -> int:
    for wrong in error.errors():
        place = ".".join(str(part) for part in wrong["loc"])
        message = wrong["msg"].removeprefix("Value error, ")
        print(f"underpaint-server: {place + ': ' if place else ''}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
