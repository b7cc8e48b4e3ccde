"""Command line of the server: ``underpaint-server``, or ``python -m underpaint_server``.

``underpaint-server check-model DIRECTORY`` tries a checkpoint instead, see :mod:`underpaint_server.check_model`, and
``underpaint-server self-test DIRECTORY`` measures its exactness, see :mod:`underpaint_server.self_test`.
``underpaint-server export`` fills the cache directory, see :mod:`underpaint_server.export`.
"""

import argparse
import asyncio
import os
import sys
from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import CliSettingsSource

from underpaint_server.engine.worker import spin_briefly
from underpaint_server.settings import (
    CHECK_SETTINGS,
    EXPORT_SETTINGS,
    SELF_TEST_SETTINGS,
    CheckSettings,
    ExportSettings,
    SelfTestSettings,
    Settings,
    unknown_variables,
)

S = TypeVar("S", bound=Settings)

_LISTS = ("models", "clips")


def main() -> None:
    """Read the settings and serve; exits with the server's exit status, or with 2 for invalid settings."""
    _keep_stderr_taken()
    try:
        if sys.argv[1:2] == ["check-model"]:
            sys.exit(_check(_read(CheckSettings, sys.argv[2:], CHECK_SETTINGS)))
        if sys.argv[1:2] == ["self-test"]:
            sys.exit(_self_test(_read(SelfTestSettings, sys.argv[2:], SELF_TEST_SETTINGS)))
        if sys.argv[1:2] == ["export"]:
            sys.exit(_export(_read(ExportSettings, sys.argv[2:], EXPORT_SETTINGS)))
        settings = _read(Settings, sys.argv[1:], tuple(Settings.model_fields))
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


def _read(kind: type[S], arguments: list[str], shown: tuple[str, ...]) -> S:
    """The settings of these command-line arguments and the environment; ``--help`` lists the settings ``shown``.

    Raises ValidationError. Exits with status 2 for unknown flags and for unknown variables with the server's prefix.
    """
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(kind)
    for action in source.root_parser._actions:  # argparse has no public way to the flags that another part has added
        if action.dest in _LISTS:
            action.metavar = "ID=DIRECTORY,..."
            action.help = (action.help or "").removesuffix(" (default: ())")
        if action.dest not in (*shown, "help"):
            action.help = argparse.SUPPRESS
    parsed = source(args=arguments)
    mistakes = list(unknown_variables(os.environ))
    if mistakes:
        sys.exit(_refuse(mistakes))
    return kind(_cli_settings_source=parsed)


def _check(settings: CheckSettings) -> int:
    spin_briefly()
    from underpaint_server.check_model import main as check  # not at the top: it loads torch and gRPC

    return check(settings)


def _self_test(settings: SelfTestSettings) -> int:
    spin_briefly()
    from underpaint_server.self_test import main as test  # not at the top: it loads torch

    return test(settings)


def _export(settings: ExportSettings) -> int:
    spin_briefly()
    from underpaint_server.export import main as export  # not at the top: it loads torch

    return export(settings)


def _explain(error: ValidationError) -> int:
    problems = []
    for problem in error.errors():
        setting = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{setting + ': ' if setting else ''}{message}")
    return _refuse(problems)


def _refuse(problems: list[str]) -> int:
    for problem in problems:
        print(f"underpaint-server: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
