"""Command line of the server: ``underpaint-server``, or ``python -m underpaint_server``.

``underpaint-server check-model DIRECTORY`` tries a checkpoint instead, see :mod:`underpaint_server.check_model`.
"""

import asyncio
import os
import sys

from pydantic import ValidationError

from underpaint_server.engine.worker import spin_briefly
from underpaint_server.settings import CheckSettings, Settings


def main() -> None:
    """Read the settings and serve; exits with the server's exit status, or with 2 for invalid settings."""
    _keep_stderr_taken()
    try:
        if sys.argv[1:2] == ["check-model"]:
            sys.exit(_check(CheckSettings(_cli_parse_args=sys.argv[2:])))
        settings = Settings(_cli_parse_args=True)
    except ValidationError as error:
        sys.exit(_explain(error))
    # gRPC's core would write to stderr what callers send, such as the text of a GOAWAY frame, past our log lines.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Not at the top: the engine process is spawned, imports this module again, and must not load gRPC.
    from underpaint_server.server import serve

    sys.exit(asyncio.run(serve(settings)))


def _keep_stderr_taken() -> None:
    """Open the null device as stderr if the process has none: otherwise the next socket would get our log lines."""
    try:
        os.fstat(2)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != 2:
            os.dup2(null, 2)


def _check(settings: CheckSettings) -> int:
    spin_briefly()
    from underpaint_server.check_model import main as check  # not at the top: it loads torch and gRPC

    return check(settings)


def _explain(error: ValidationError) -> int:
    for problem in error.errors():
        setting = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        print(f"underpaint-server: {setting + ': ' if setting else ''}{message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
