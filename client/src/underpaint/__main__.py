"""The ``underpaint`` command: the client from a shell.

Exit status: 0 success, 1 the server reported an error or cannot be reached (stderr has the error and what to do),
2 wrong usage, 130 interrupted. The flags of the methods are derived from their dataclasses, see ``_flags``.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from underpaint import __version__, _flags, _report, images
from underpaint._flags import UsageError
from underpaint.choices import Fit, Priority, Sampler
from underpaint.client import Client
from underpaint.errors import UnderpaintError
from underpaint.methods import (
    DEFAULT_EDIT,
    DEFAULT_INVERSION,
    EDIT_METHODS,
    INVERSION_METHODS,
    LEARN_METHODS,
    DiffEdit,
)

_MASK_METHODS = {DiffEdit.name: DiffEdit}  # the methods that compute a mask


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(argv)
    try:
        with Client(options.target, timeout=options.timeout, connect_timeout=options.connect_timeout) as client:
            report = options.run(client, options)
    except UnderpaintError as error:
        return _fail(error, options.json)
    except (UsageError, ValueError, OSError) as error:
        print(f"underpaint: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(report.data, indent=2) if options.json else report.text())
    return 0


def _fail(error: UnderpaintError, as_json: bool) -> int:
    if as_json:
        print(json.dumps(_report.of_error(error).data, indent=2))
    print(f"underpaint: {_report.of_error(error).text()}", file=sys.stderr)
    return 1


def _edit(client: Client, options: argparse.Namespace) -> _report.Report:
    output = Path(options.output)
    arguments = _work_arguments(options) | {"output_media_type": images.media_type_of(output)}
    if options.mask_out:
        images.media_type_of(options.mask_out)  # refuses a wrong suffix before the edit runs
    method = _flags.chosen(EDIT_METHODS, options.method, options)
    if options.target_prompt is None and method._needs_target_prompt():
        raise UsageError(f"target_prompt: --method {options.method} needs the text of the result")
    result = client.edit(options.source, options.target_prompt or "", method, progress=_progress(options), **arguments)
    files = {"image": result.save(output)}
    if options.mask_out and result.mask_bytes is not None:
        files["mask"] = images.save(result.mask_bytes, "image/png", options.mask_out)
    return _report.of_edit(result, files)


def _mask(client: Client, options: argparse.Namespace) -> _report.Report:
    images.media_type_of(options.output)  # refuses a wrong suffix before the mask is computed
    method = _flags.chosen(_MASK_METHODS, DiffEdit.name, options)
    result = client.compute_mask(options.source, options.target_prompt, method, **_work_arguments(options))
    return _report.of_mask(result, {"mask": result.save(options.output)})


def _generate(client: Client, options: argparse.Namespace) -> _report.Report:
    output = Path(options.output)
    names = ("seed", "width", "height", "steps", "negative_prompt", "guidance_scale", "model", "priority")
    arguments = {name: getattr(options, name) for name in names}
    media_type = images.media_type_of(output)
    result = client.generate(options.prompt, output_media_type=media_type, progress=_progress(options), **arguments)
    return _report.of_edit(result, {"image": result.save(output)})


def _invert(client: Client, options: argparse.Namespace) -> _report.Report:
    names = ("source_prompt", "steps", "strength", "guidance_scale", "fit", "verify", "model", "priority")
    arguments = {name: getattr(options, name) for name in names}
    method = _flags.chosen(INVERSION_METHODS, options.method, options)
    inversion = client.invert(options.image, method=method, progress=_progress(options), **arguments)
    files = {}
    if options.output:
        client.export_inversion(inversion, options.output)
        files["latents"] = Path(options.output)
    return _report.of_inversion(inversion, files)


def _models(client: Client, options: argparse.Namespace) -> _report.Report:
    del options
    return _report.of_models(client.models())


def _learn(client: Client, options: argparse.Namespace) -> _report.Report:
    names = ("steps", "sampler", "guidance_scale", "content_weight", "seed", "fit", "model", "name", "display_name")
    arguments = {name: getattr(options, name) for name in names}
    settings = _flags.given(LEARN_METHODS, options)
    if options.method is None and settings:
        flags = ", ".join(map(_flags.flag, settings))
        raise UsageError(f"{flags}: name the --method too, one of {', '.join(LEARN_METHODS)}")
    method = _flags.chosen(LEARN_METHODS, options.method, options) if options.method else None
    examples = [int(example) if example.isdigit() else example for example in options.example]
    learning = client.learn(options.source_prompt, options.target_prompt, examples, method=method, **arguments)
    if options.detach:
        return _report.of_operation(learning.status())
    if not options.quiet:
        print(f"{learning.name} runs on the server; Ctrl-C stops waiting, not the operation", file=sys.stderr)
    return _report.of_direction(learning.result(progress=_progress(options)), {})


def _directions(client: Client, options: argparse.Namespace) -> _report.Report:
    del options
    return _report.of_directions(list(client.list_directions()))


def _direction(client: Client, options: argparse.Namespace) -> _report.Report:
    direction = client.get_direction(options.name)
    if options.delete:
        client.delete_direction(direction, etag=direction.etag)
        return _report.of_done(f"deleted {direction.name}")
    files = {}
    if options.output:
        client.export_direction(direction, options.output)
        files["file"] = Path(options.output)
    return _report.of_direction(direction, files)


def _import(client: Client, options: argparse.Namespace) -> _report.Report:
    direction = client.import_direction(options.file, name=options.name, display_name=options.display_name)
    return _report.of_direction(direction, {})


def _operations(client: Client, options: argparse.Namespace) -> _report.Report:
    return _report.of_operations(list(client.list_operations(done=False if options.unfinished else None)))


def _operation(client: Client, options: argparse.Namespace) -> _report.Report:
    learning = client.attach(options.name)
    if options.cancel:
        learning.cancel()
    if options.forget:
        learning.forget()
        return _report.of_done(f"deleted {learning.name}")
    return _report.of_operation(learning.wait(progress=_progress(options)) if options.wait else learning.status())


def _work_arguments(options: argparse.Namespace) -> dict[str, Any]:
    names = ("source_prompt", "negative_prompt", "seed", "guidance_scale", "fit", "model", "priority")
    return {name: getattr(options, name) for name in names}


def _progress(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


# --- flags ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="underpaint", description="Invert and edit images on an Underpaint server.")
    parser.add_argument("--version", action="version", version=f"underpaint {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.set_defaults(run=run)
        return subparser

    subparsers = (
        _edit_flags(command("edit", _edit, "Edit an image with a prompt.")),
        _mask_flags(command("mask", _mask, "Compute the mask of the region that DiffEdit would edit.")),
        _generate_flags(command("generate", _generate, "Generate an image from a prompt.")),
        _invert_flags(command("invert", _invert, "Invert a photo, as the source of edits.")),
        _learn_flags(command("learn", _learn, "Learn a direction: an edit that can be applied to many images.")),
        command("directions", _directions, "List the learned directions."),
        _direction_flags(command("direction", _direction, "Show, export or delete a learned direction.")),
        _import_flags(command("import", _import, "Store an exported direction on the server.")),
        _operations_flags(command("operations", _operations, "List the operations that learn or have learned.")),
        _operation_flags(command("operation", _operation, "Show, wait for, cancel or delete an operation.")),
        command("models", _models, "List the server's models."),
    )
    for subparser in subparsers:
        _shared_flags(subparser)
    return parser


def _shared_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("connection and output")
    target = os.environ.get("UNDERPAINT_TARGET", "localhost:50051")
    group.add_argument(
        "--target", default=target, help="server, host:port (default: UNDERPAINT_TARGET, now %(default)s)"
    )
    group.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for the call (default: 120)")
    group.add_argument(
        "--connect-timeout", type=float, default=10.0, metavar="S", help="seconds to wait for a server (default: 10)"
    )
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("-q", "--quiet", action="store_true", help="show no progress bar")


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", help="model ID (default: the server's)")
    parser.add_argument("--priority", choices=[str(value) for value in Priority], help="queue order (default: normal)")
    parser.add_argument("--guidance-scale", type=float, metavar="X", help="classifier-free guidance weight; 1 is off")


def _photo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source-prompt", default="", metavar="TEXT", help="text that describes the photo")
    _fit_flag(parser)


def _fit_flag(parser: argparse.ArgumentParser) -> None:
    fits = [str(value) for value in Fit]
    parser.add_argument("--fit", choices=fits, help="how a photo is brought to the model's size (default: crop)")


def _steps_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the whole schedule (default: the model's)")


def _seed_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="text of what the result should not show")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="seed of the noise, 0 to 2**64 - 1 (default: random, and reported)"
    )


def _work_flags(parser: argparse.ArgumentParser, target_prompts: str | None = None) -> None:
    parser.add_argument("source", help="image file, or inversions/... of an earlier command")
    parser.add_argument("target_prompt", nargs=target_prompts, help="text of the result")
    _model_flags(parser)
    _photo_flags(parser)
    _seed_flags(parser)


def _edit_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    _work_flags(parser, "?")
    default = DEFAULT_EDIT.name
    parser.add_argument(
        "--method", choices=list(EDIT_METHODS), default=default, help=f"how to edit (default: {default})"
    )
    parser.add_argument("--mask-out", metavar="FILE", help="write the mask that was used, for a method that has one")
    parser.add_argument(
        "-o", "--output", default="edited.png", metavar="FILE", help=".png, .jpg or .webp (default: edited.png)"
    )
    _flags.add(parser, EDIT_METHODS)
    return parser


def _mask_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    _work_flags(parser)
    parser.add_argument(
        "-o", "--output", default="mask.png", metavar="FILE", help=".png, .jpg or .webp (default: mask.png)"
    )
    _flags.add(parser, _MASK_METHODS, omit=("mask",))
    return parser


def _generate_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("prompt", help="text of the image")
    _model_flags(parser)
    _steps_flag(parser)
    _seed_flags(parser)
    parser.add_argument("--width", type=int, metavar="N", help="width in pixels (default: the model's)")
    parser.add_argument("--height", type=int, metavar="N", help="height in pixels (default: the model's)")
    parser.add_argument(
        "-o", "--output", default="generated.png", metavar="FILE", help=".png, .jpg or .webp (default: generated.png)"
    )
    return parser


def _invert_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("image", help="image file")
    _model_flags(parser)
    _photo_flags(parser)
    _steps_flag(parser)
    parser.add_argument("--strength", type=float, metavar="X", help="share of the schedule that is inverted, (0, 1]")
    default, choices = DEFAULT_INVERSION.name, list(INVERSION_METHODS)
    parser.add_argument("--method", choices=choices, default=default, help=f"how to invert (default: {default})")
    parser.add_argument("--verify", action="store_true", help="also reconstruct the photo and report the error")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the latents as a safetensors file")
    _flags.add(parser, INVERSION_METHODS)
    return parser


def _learn_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("source_prompt", help="text before the edit")
    parser.add_argument("target_prompt", help="text after the edit")
    parser.add_argument(
        "--example", action="append", required=True, metavar="FILE|SEED",
        help="photo to learn on, or the seed of an image that the model generates; repeatable, at most 16",
    )  # fmt: skip
    parser.add_argument(
        "--name", default="", metavar="ID", help="ID of the direction: a-z, 0-9 and - (default: random)"
    )
    parser.add_argument("--display-name", default="", metavar="TEXT", help="name to show to people")
    parser.add_argument("--model", default="", help="model ID (default: the server's)")
    _steps_flag(parser)
    parser.add_argument(
        "--guidance-scale", type=float, metavar="X", help="classifier-free guidance weight; 1 is off (default: 5)"
    )
    samplers = [str(value) for value in Sampler]
    parser.add_argument("--sampler", choices=samplers, help="how a step is computed (default: ddim)")
    parser.add_argument(
        "--content-weight",
        type=float,
        metavar="X",
        help="weight of the content-preserving loss, [0, 100] (default: 0.05)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the noise for photos (default: random)")
    _fit_flag(parser)
    parser.add_argument(
        "--method", choices=list(LEARN_METHODS), help="how to learn (default: by gradients where the model has them)"
    )
    parser.add_argument("--detach", action="store_true", help="print the operation's name and do not wait for its end")
    _flags.add(parser, LEARN_METHODS)
    return parser


def _direction_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("name", help="ID, or directions/...")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write it as a safetensors file")
    parser.add_argument("--delete", action="store_true", help="delete it")
    return parser


def _import_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("file", help="safetensors file that `underpaint direction -o` wrote")
    parser.add_argument("--name", default="", metavar="ID", help="ID of the direction (default: random)")
    parser.add_argument(
        "--display-name", default="", metavar="TEXT", help="name to show to people (default: the file's)"
    )
    return parser


def _operations_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--unfinished", action="store_true", help="list only operations that are not done")
    return parser


def _operation_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("name", help="ID, or operations/...")
    parser.add_argument("--wait", action="store_true", help="wait until it is done")
    parser.add_argument("--cancel", action="store_true", help="cancel it; what it has learned so far is lost")
    parser.add_argument("--forget", action="store_true", help="delete it from the server's list once it is done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
