"""The ``underpaint`` command: the client from a shell.

Exit status: 0 success; 1 the server reported an error or cannot be reached, a result could not be written, or pictures
of a folder failed (stderr says what and what to do); 2 wrong usage; 130 interrupted. The flags of the methods are
derived from their dataclasses, see ``_flags``.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO, TypeVar

from underpaint import __version__, _files, _flags, _progress, _report, errors, images, resources
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
    EditMethod,
)
from underpaint.results import Edited

T = TypeVar("T")
_MASK_METHODS = {DiffEdit.name: DiffEdit}  # the methods that compute a mask
_CONCURRENCY = 8
_CONCERN_ALL = (
    errors.ConnectionFailed, errors.Draining, errors.Unauthenticated, errors.PermissionDenied, errors.MethodDisabled,
    errors.RpcUnknown, errors.NotFound, errors.ModelNotReady, errors.InversionModelMismatch,
    errors.DirectionModelMismatch, errors.DirectionStepsMismatch, _files.NotWritten,
)  # fmt: skip
"""Errors that every other picture of a folder would end with too, beside those of fields that all have in common."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a prompt or a path that the terminal's encoding lacks
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    finally:  # argparse prints too, and then exits
        for stream in (sys.stdout, sys.stderr):
            _say("", stream)


def _run(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv, argparse.Namespace(argv=argv))
    try:
        with Client(options.target, timeout=options.timeout, connect_timeout=options.connect_timeout) as client:
            report = options.run(client, options)
    except UnderpaintError as error:
        return _fail(error, options)
    except (UsageError, ValueError, OSError) as error:
        _complain(f"underpaint: {_report.of_local_error(error)}")
        return 2
    except _files.NotWritten as error:
        _complain(f"underpaint: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return report.status if _print(report, options.json) else 1


def _fail(error: UnderpaintError, options: argparse.Namespace) -> int:
    report = _error_report(error, options.argv)
    if options.json:
        _print(report, as_json=True)
    _complain(f"underpaint: {report.text()}")
    return 1


def _error_report(error: Exception, argv: Sequence[str]) -> _report.Report:
    violations = error.violations if isinstance(error, UnderpaintError) else ()
    return _report.of_error(error, [_flags.of_path(violation.path, argv) for violation in violations])


def _print(report: _report.Report, as_json: bool) -> bool:
    return _say(f"{json.dumps(report.data, indent=2) if as_json else report.text()}\n", sys.stdout)


def _complain(text: str) -> None:
    _say(f"{text}\n", sys.stderr)


def _say(text: str, stream: TextIO | None) -> bool:
    """Write to stdout or stderr; False if that fails. A reader that has gone, as in ``| head -1``, is no failure."""
    if stream is None:  # closed by the caller
        return True
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        # What is left in the buffer would be written, and would fail, once more when the interpreter ends.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        if isinstance(error, BrokenPipeError):
            return True
        if stream is not sys.stderr:
            _complain(f"underpaint: the report cannot be written: {error.strerror}")
        return False
    return True


# --- commands ---------------------------------------------------------------------------------------------------


def _edit(client: Client, options: argparse.Namespace) -> _report.Report:
    method = _flags.chosen(EDIT_METHODS, options.method, options)
    if not options.source:
        raise UsageError("source: the name of the image is empty")
    is_folder = not resources.is_inversion_name(options.source) and Path(options.source).is_dir()
    if options.target_prompt is None and method._needs_target_prompt():
        example = f'underpaint edit {options.source} "a green apple"'
        raise UsageError(
            f"target_prompt: the text of the result is missing, which --method {options.method} needs; give it after"
            f" the {'folder' if is_folder else 'image'}, as in: {example}"
        )
    return (_edit_folder if is_folder else _edit_one)(client, options, method)


def _edit_one(client: Client, options: argparse.Namespace, method: EditMethod) -> _report.Report:
    for flag, value in (("--overwrite", options.overwrite or None), ("--concurrency", options.concurrency)):
        if value is not None:
            raise UsageError(f"{flag}: only for a folder of pictures, and {options.source} is none")
    output = Path("edited.png" if options.output is None else options.output)
    media_type = _files.check_picture(output, "-o")
    if options.mask_out:
        _files.check_picture(options.mask_out, "--mask-out")
        if options.method not in _MASK_METHODS:
            raise UsageError(f"--mask-out: --method {options.method} computes no mask; {', '.join(_MASK_METHODS)} does")
        if os.path.realpath(options.mask_out) == os.path.realpath(output):
            raise UsageError(f"--mask-out: {output} is the file of the result: name another one")
    result = client.edit(
        options.source, options.target_prompt or "", method, progress=_progress_wanted(options),
        output_media_type=media_type, **_work_arguments(options),
    )  # fmt: skip
    again = f"--seed {result.resolved.seed} computes the same again"
    files = {"image": _written(output, lambda: result.save(output), again)}
    if options.mask_out and result.mask_bytes is not None:
        mask = result.mask_bytes
        files["mask"] = _written(options.mask_out, lambda: images.save(mask, "image/png", options.mask_out), again)
    return _report.of_edit(result, files)


def _edit_folder(client: Client, options: argparse.Namespace, method: EditMethod) -> _report.Report:
    source = Path(options.source)
    if not options.output:
        raise UsageError(f"-o: name a folder for the results, because {source} is a folder")
    if options.mask_out:
        raise UsageError(f"--mask-out: one file, and {source} is a folder of pictures; leave it out")
    if options.concurrency is not None and options.concurrency < 1:
        raise UsageError(f"--concurrency: {options.concurrency} is no number of edits, 1 or more")
    plan = _files.plan(source, Path(options.output), options.overwrite)
    folder = _report.Folder(source, Path(options.output), plan)
    if plan.todo:
        client.models()  # a server that cannot be reached is said once; and too large a picture is then not even sent
        _files.prepare([target for _, target in plan.todo])
    with _progress.counting(len(plan.todo), _complain, _progress_wanted(options)) as counter:
        try:
            for picture, target, result in _results(client, options, method, plan.todo):
                error = result if isinstance(result, Exception) else _write(result, target)
                if error is None:
                    folder.edited(picture, target, result)
                    counter.done()
                    continue
                if _is_usage(error, picture):
                    raise error
                folder.failed(picture, error)
                counter.failed(f"underpaint: {picture}: {_error_report(error, options.argv).text()}")
                if _concerns_all(error):
                    break
        except KeyboardInterrupt:
            return folder.report(interrupted=True)
    return folder.report()


def _write(result: Edited, target: Path) -> _files.NotWritten | None:
    try:
        _files.replace(target, result.save)
    except OSError as error:
        return _files.NotWritten(f"{target} cannot be written: {error.strerror}")
    return None


def _is_usage(error: Exception, picture: Path) -> bool:
    """Whether arguments that all pictures have in common are at fault: a value, or a file other than the picture."""
    if isinstance(error, OSError):
        return error.filename is not None and Path(os.fsdecode(error.filename)) != picture
    return isinstance(error, ValueError)


def _concerns_all(error: Exception) -> bool:
    if isinstance(error, errors.FieldInvalid):
        return not any({"image", "mask", "region"} & set(violation.path.split(".")) for violation in error.violations)
    return isinstance(error, _CONCERN_ALL)


def _results(
    client: Client, options: argparse.Namespace, method: EditMethod, todo: Iterable[tuple[Path, Path]]
) -> Iterator[tuple[Path, Path, Any]]:
    """Pictures, the paths of their results, and the results or errors. Pictures of one format are edited together."""
    by_format = sorted(todo, key=lambda each: images.media_type_of(each[1]))
    for media_type, alike in groupby(by_format, key=lambda each: images.media_type_of(each[1])):
        pictures = list(alike)
        results = client.edit_many(
            [picture for picture, _ in pictures], options.target_prompt or "", method, on_error="return",
            concurrency=options.concurrency or _CONCURRENCY, output_media_type=media_type, **_work_arguments(options),
        )  # fmt: skip
        for (picture, target), result in zip(pictures, results, strict=True):
            yield picture, target, result


def _written(path: str | os.PathLike[str], save: Callable[[], T], again: str) -> T:
    """What ``save`` returns; NotWritten, with how to come to the result ``again``, if it cannot write the file."""
    try:
        return save()
    except OSError as error:
        raise _files.NotWritten(f"{path} cannot be written: {error.strerror}; the work is done, {again}") from error


def _mask(client: Client, options: argparse.Namespace) -> _report.Report:
    _files.check_picture(options.output, "-o")
    method = _flags.chosen(_MASK_METHODS, DiffEdit.name, options)
    result = client.compute_mask(options.source, options.target_prompt, method, **_work_arguments(options))
    again = f"--seed {result.resolved.seed} computes the same again"
    return _report.of_mask(result, {"mask": _written(options.output, lambda: result.save(options.output), again)})


def _generate(client: Client, options: argparse.Namespace) -> _report.Report:
    output = Path(options.output)
    names = ("seed", "width", "height", "steps", "negative_prompt", "guidance_scale", "model", "priority")
    arguments = {name: getattr(options, name) for name in names}
    media_type = _files.check_picture(output, "-o")
    result = client.generate(
        options.prompt, output_media_type=media_type, progress=_progress_wanted(options), **arguments
    )
    again = f"--seed {result.resolved.seed} computes the same again"
    return _report.of_edit(result, {"image": _written(output, lambda: result.save(output), again)})


def _invert(client: Client, options: argparse.Namespace) -> _report.Report:
    names = ("source_prompt", "steps", "strength", "guidance_scale", "fit", "verify", "model", "priority")
    arguments = {name: getattr(options, name) for name in names}
    method = _flags.chosen(INVERSION_METHODS, options.method, options)
    if options.output:
        _files.check_writable(options.output, "-o")
    inversion = client.invert(options.image, method=method, progress=_progress_wanted(options), **arguments)
    files = {}
    if path := options.output:
        _written(path, lambda: client.export_inversion(inversion, path), f"and {inversion.name} is on the server")
        files["latents"] = Path(path)
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
    learning = client.learn(options.source_prompt, options.target_prompt, options.example, method=method, **arguments)
    if options.detach:
        return _report.of_operation(learning.status())
    if not options.quiet:
        _complain(f"{learning.name} runs on the server; Ctrl-C stops waiting, not the operation")
    return _report.of_direction(learning.result(progress=_progress_wanted(options)), {})


def _directions(client: Client, options: argparse.Namespace) -> _report.Report:
    del options
    return _report.of_directions(list(client.list_directions()))


def _direction(client: Client, options: argparse.Namespace) -> _report.Report:
    if options.output:
        _files.check_writable(options.output, "-o")
    direction = client.get_direction(options.name)
    files = {}
    if path := options.output:
        _written(path, lambda: client.export_direction(direction, path), f"and {direction.name} is on the server")
        files["file"] = Path(path)
    if options.delete:  # after the export
        client.delete_direction(direction, etag=direction.etag)
        return _report.of_done(f"deleted {direction.name}")
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
    state = learning.wait(progress=_progress_wanted(options)) if options.wait else learning.status()
    if options.forget:
        learning.forget()
        return _report.of_done(f"deleted {learning.name}")
    return _report.of_operation(state)


def _work_arguments(options: argparse.Namespace) -> dict[str, Any]:
    names = ("source_prompt", "negative_prompt", "seed", "guidance_scale", "fit", "model", "priority")
    return {name: getattr(options, name) for name in names}


def _progress_wanted(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr is not None and sys.stderr.isatty()


# --- flags ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = _flags.Parser(prog="underpaint", description="Invert and edit images on an Underpaint server.")
    parser.add_argument("--version", action="version", version=f"underpaint {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=text, description=text)
        subparser.set_defaults(run=run)
        return subparser

    subparsers = (
        _edit_flags(command("edit", _edit, "Edit an image, or a folder of images, with a prompt.")),
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
    target = os.environ.get("UNDERPAINT_TARGET") or "localhost:50051"
    group.add_argument(
        "--target", default=target, help="server, host:port (default: UNDERPAINT_TARGET, now %(default)s)"
    )
    group.add_argument(
        "--timeout", type=_flags.seconds, default=120.0, metavar="S", help="seconds for the call (default: 120)"
    )
    group.add_argument(
        "--connect-timeout",
        type=_flags.seconds,
        default=10.0,
        metavar="S",
        help="seconds to wait for a server (default: 10)",
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
    parser.add_argument(
        "--steps", type=_flags.whole, metavar="N", help="steps of the whole schedule (default: the model's)"
    )


def _seed_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--negative-prompt", default="", metavar="TEXT", help="text of what the result should not show")
    parser.add_argument(
        "--seed",
        type=_flags.seed,
        metavar="N",
        help="seed of the noise, 0 to 2**64 - 1 (default: random, and reported)",
    )


def _work_flags(parser: argparse.ArgumentParser) -> None:
    _model_flags(parser)
    _photo_flags(parser)
    _seed_flags(parser)


def _edit_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument(
        "source", help="image file, folder of image files, or inversions/{sha256}, as an earlier command printed it"
    )
    parser.add_argument(
        "target_prompt", nargs="?",
        help='text of the result; "" for a model without text, and not needed where a content or a direction is given',
    )  # fmt: skip
    _work_flags(parser)
    default = DEFAULT_EDIT.name
    parser.add_argument(
        "--method", choices=list(EDIT_METHODS), default=default, help=f"how to edit (default: {default})"
    )
    parser.add_argument("--mask-out", metavar="FILE", help="write the mask that was used, for a method that has one")
    parser.add_argument(
        "-o", "--output", metavar="FILE|FOLDER",
        help=".png, .jpg or .webp (default: edited.png); for a folder, the folder of the results: its pictures and"
        " those of its subfolders keep their names there, and files that are no .png, .jpg or .webp are skipped",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="for a folder: edit again what has a result already (default: such results are kept, so a run that was"
        " stopped goes on)",
    )  # fmt: skip
    parser.add_argument(
        "--concurrency", type=_flags.whole, metavar="N",
        help=f"for a folder: how many are edited at once (default: {_CONCURRENCY})",
    )  # fmt: skip
    _flags.add(parser, EDIT_METHODS)
    return parser


def _mask_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("source", help="image file, or inversions/{sha256}, as an earlier command printed it")
    parser.add_argument("target_prompt", help="text of the result")
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
    parser.add_argument("--width", type=_flags.whole, metavar="N", help="width in pixels (default: the model's)")
    parser.add_argument("--height", type=_flags.whole, metavar="N", help="height in pixels (default: the model's)")
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
        "--example", action="append", type=_flags.photo_or_seed, required=True, metavar="FILE|SEED",
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
    parser.add_argument("--seed", type=_flags.seed, metavar="N", help="seed of the noise for photos (default: random)")
    _fit_flag(parser)
    parser.add_argument(
        "--method", choices=list(LEARN_METHODS), help="how to learn (default: by gradients where the model has them)"
    )
    parser.add_argument("--detach", action="store_true", help="print the operation's name and do not wait for its end")
    _flags.add(parser, LEARN_METHODS)
    return parser


def _direction_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("name", help="directions/{id}, or the id alone: 1 to 63 characters of a-z, 0-9 and -")
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
    parser.add_argument("name", help="operations/{id}, or the id alone: 32 hexadecimal digits")
    parser.add_argument("--wait", action="store_true", help="wait until it is done")
    parser.add_argument("--cancel", action="store_true", help="cancel it; what it has learned so far is lost")
    parser.add_argument("--forget", action="store_true", help="delete it from the server's list once it is done")
    return parser


if __name__ == "__main__":
    sys.exit(main())
