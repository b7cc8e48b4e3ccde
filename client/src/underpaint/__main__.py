"""The ``underpaint`` command: the client from a shell.

Exit status: 0 done, 1 the server or the way to it failed (stderr says what to do next), 2 wrong usage, 130 interrupted.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from underpaint import __version__, _report, images
from underpaint.client import Client
from underpaint.errors import UnderpaintError
from underpaint.methods import (
    ContentInjection,
    Convention,
    Ddim,
    DdimInversion,
    DiffEdit,
    Disentangled,
    Edict,
    EdictInversion,
    EditMethod,
    Fit,
    GradientLearning,
    Interpolation,
    InversionMethod,
    LearnMethod,
    Priority,
    Sampler,
    SdEdit,
    SearchLearning,
)

_METHODS: dict[str, type[EditMethod]] = {
    "edict": Edict,
    "ddim": Ddim,
    "sdedit": SdEdit,
    "diffedit": DiffEdit,
    "disentangled": Disentangled,
    "content_injection": ContentInjection,
}
_LEARNING: dict[str, type[LearnMethod]] = {"gradient": GradientLearning, "search": SearchLearning}
_INVERSIONS: dict[str, type[InversionMethod]] = {"edict": EdictInversion, "ddim": DdimInversion}


class UsageError(Exception):
    """The arguments make no sense together."""


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
    work = _work(options) | {"output_media_type": images.media_type_of(output)}
    if options.mask_out:
        images.media_type_of(options.mask_out)  # a name that cannot be written is found before the work
    method = _method(options)
    learned = isinstance(method, Disentangled) and method.direction is not None  # which knows its own
    if options.target_prompt is None and not (learned or isinstance(method, ContentInjection)):
        raise UsageError(f"target_prompt: what --method {options.method} is to draw")
    result = client.edit(options.source, options.target_prompt or "", method, progress=_bar(options), **work)
    files = {"image": result.save(output)}
    if options.mask_out and result.mask_bytes is not None:
        files["mask"] = images.save(result.mask_bytes, "image/png", options.mask_out)
    return _report.of_edit(result, files)


def _mask(client: Client, options: argparse.Namespace) -> _report.Report:
    options.method = "diffedit"
    images.media_type_of(options.output)
    method = _method(options)
    assert isinstance(method, DiffEdit)
    result = client.compute_mask(options.source, options.target_prompt, method, **_work(options))
    return _report.of_mask(result, {"mask": result.save(options.output)})


def _generate(client: Client, options: argparse.Namespace) -> _report.Report:
    output = Path(options.output)
    names = ("seed", "width", "height", "steps", "negative_prompt", "guidance_scale", "model", "priority")
    given = {name: getattr(options, name) for name in names}
    media_type = images.media_type_of(output)
    result = client.generate(options.prompt, output_media_type=media_type, progress=_bar(options), **given)
    return _report.of_edit(result, {"image": result.save(output)})


def _invert(client: Client, options: argparse.Namespace) -> _report.Report:
    names = ("source_prompt", "steps", "strength", "guidance_scale", "fit", "verify", "model", "priority")
    given = {name: getattr(options, name) for name in names}
    method = _chosen(_INVERSIONS[options.method], options, {"mixing_coefficient", "convention", "features"})
    inversion = client.invert(options.image, method=method, progress=_bar(options), **given)
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
    given = {name: getattr(options, name) for name in names}
    every = {field.name for kind in _LEARNING.values() for field in dataclasses.fields(kind)}
    if options.method is None and any(getattr(options, name) is not None for name in every):
        raise UsageError("name the --method that these are settings of, gradient or search")
    method = _chosen(_LEARNING[options.method], options, every) if options.method else None
    examples = [int(each) if each.isdigit() else each for each in options.example]
    learning = client.learn(options.source_prompt, options.target_prompt, examples, method=method, **given)
    if options.detach:
        return _report.of_operation(learning.status())
    if not options.quiet:
        print(f"{learning.name} goes on without this program; Ctrl-C only stops waiting", file=sys.stderr)
    return _report.of_direction(learning.result(progress=_bar(options)), {})


def _directions(client: Client, options: argparse.Namespace) -> _report.Report:
    del options
    return _report.of_directions(list(client.list_directions()))


def _direction(client: Client, options: argparse.Namespace) -> _report.Report:
    direction = client.get_direction(options.name)
    if options.delete:
        client.delete_direction(direction, etag=direction.etag)
        return _report.of_nothing(f"deleted {direction.name}")
    files = {}
    if options.output:
        client.export_direction(direction, options.output)
        files["file"] = Path(options.output)
    return _report.of_direction(direction, files)


def _import(client: Client, options: argparse.Namespace) -> _report.Report:
    made = client.import_direction(options.file, name=options.name, display_name=options.display_name)
    return _report.of_direction(made, {})


def _operations(client: Client, options: argparse.Namespace) -> _report.Report:
    return _report.of_operations(list(client.list_operations(done=False if options.unfinished else None)))


def _operation(client: Client, options: argparse.Namespace) -> _report.Report:
    learning = client.attach(options.name)
    if options.cancel:
        learning.cancel()
    if options.forget:
        learning.forget()
        return _report.of_nothing(f"forgot {learning.name}")
    return _report.of_operation(learning.wait(progress=_bar(options)) if options.wait else learning.status())


def _work(options: argparse.Namespace) -> dict[str, Any]:
    names = ("source_prompt", "negative_prompt", "seed", "guidance_scale", "fit", "model", "priority")
    return {name: getattr(options, name) for name in names}


def _method(options: argparse.Namespace) -> Any:
    every = {field.name for kind in _METHODS.values() for field in dataclasses.fields(kind)}
    return _chosen(_METHODS[options.method], options, every)


def _chosen(kind: Any, options: argparse.Namespace, every: set[str]) -> Any:
    """A method with the flags given; flags of other methods are refused, not ignored."""
    known = {field.name for field in dataclasses.fields(kind)}
    given = {name: value for name in sorted(every) if (value := getattr(options, name, None)) not in (None, "")}
    foreign = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if foreign:
        raise UsageError(f"{', '.join(foreign)}: not a setting of --method {options.method}")
    if kind is ContentInjection and "content" not in given:
        raise UsageError("--content: a picture file, or inversions/..., whose content is injected")
    return kind(**given)


def _bar(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


# --- flags ------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="underpaint", description="Invert and edit pictures on an Underpaint server.")
    parser.add_argument("--version", action="version", version=f"underpaint {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = _shared()

    def command(name: str, run: Any, text: str, *more: argparse.ArgumentParser) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text, parents=[*more, shared])
        one.set_defaults(run=run)
        return one

    _edit_flags(
        command("edit", _edit, "Change a picture into what a prompt says.", _work_flags("?"), _diffedit_flags())
    )
    _mask_flags(command("mask", _mask, "Show where DiffEdit would change a picture.", _work_flags(), _diffedit_flags()))
    _generate_flags(command("generate", _generate, "Draw a picture from a prompt.", _model_flags()))
    _invert_flags(
        command("invert", _invert, "Turn a photo into an inversion to edit from.", _model_flags(), _photo_flags())
    )
    _learn_flags(command("learn", _learn, "Learn an edit that can be used on many pictures."))
    command("directions", _directions, "List what was learned.")
    _direction_flags(command("direction", _direction, "Show, export or delete something learned."))
    _import_flags(command("import", _import, "Store a direction that was exported."))
    _operations_flags(command("operations", _operations, "List what is being learned, and what was."))
    _operation_flags(command("operation", _operation, "Follow, cancel or forget something being learned."))
    command("models", _models, "List the server's models.")
    return parser


def _shared() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("connection and output")
    target = os.environ.get("UNDERPAINT_TARGET", "localhost:50051")
    group.add_argument("--target", default=target, help="server, host:port (UNDERPAINT_TARGET; now %(default)s)")
    group.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for the whole call (120)")
    group.add_argument("--connect-timeout", type=float, default=10.0, metavar="S", help="seconds to connect (10)")
    group.add_argument("--json", action="store_true", help="print the result as JSON")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    return flags


def _model_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--model", default="", help="model id; the server's default when left out")
    flags.add_argument("--priority", choices=[str(each) for each in Priority])
    flags.add_argument("--steps", type=int, metavar="N", help="steps of the whole schedule")
    flags.add_argument("--guidance-scale", type=float, metavar="W", help="weight of the prompt; 1 is off")
    return flags


def _work_flags(prompts: str | None = None) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False, parents=[_model_flags(), _photo_flags()])
    flags.add_argument("source", help="picture file, or inversions/... of an earlier run")
    flags.add_argument("target_prompt", nargs=prompts, help="text of the result")
    flags.add_argument("--negative-prompt", default="", help="text to steer away from")
    flags.add_argument("--seed", type=int, help="0 or more; drawn and reported when left out")
    flags.add_argument("--inversion-guidance-scale", type=float, metavar="W", help="guidance while inverting")
    return flags


def _photo_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    flags.add_argument("--source-prompt", default="", help="text that describes the photo")
    flags.add_argument("--strength", type=float, metavar="S", help="share of the schedule, above 0, at most 1")
    flags.add_argument("--fit", choices=[str(each) for each in Fit], help="how the photo is brought to size (crop)")
    flags.add_argument("--convention", choices=[str(each) for each in Convention], help="of DDIM inversion (target)")
    return flags


def _diffedit_flags() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(add_help=False)
    group = flags.add_argument_group("diffedit")
    group.add_argument("--threshold", type=float, help="cut of the difference, between 0 and 1 (0.5)")
    group.add_argument("--samples", type=int, help="noise samples (10)")
    group.add_argument("--mask-strength", type=float, help="where in the schedule the mask is taken (0.5)")
    group.add_argument("--reference-prompt", default="", help="prompt that the target prompt is compared with")
    return flags


def _edit_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=list(_METHODS), default="edict", help="how to edit (edict)")
    parser.add_argument("--mixing-coefficient", type=float, metavar="P", help="EDICT's p (0.93)")
    _mixing_flags(parser)
    parser.add_argument("--mask", metavar="FILE", help="diffedit: a mask of your own, white is changed")
    parser.add_argument("--mask-out", metavar="FILE", help="diffedit: write the mask that was used")
    parser.add_argument("-o", "--output", default="edited.png", metavar="FILE", help=".png, .jpg or .webp (edited.png)")
    group = parser.add_argument_group("content_injection")
    group.add_argument("--content", metavar="FILE", help="whose content: a picture file, or inversions/...")
    group.add_argument("--content-fit", choices=[str(each) for each in Fit], help="how it is brought to size (crop)")
    group.add_argument("--weight", type=float, metavar="W", help="share of the content, 0 to 1 (0.3)")
    group.add_argument("--calibration", type=float, metavar="W", help="of the skip connections, 0 to 1 (0, none)")
    group.add_argument("--region", metavar="FILE", help="white takes the content (everything)")
    group.add_argument("--injection-end", type=float, metavar="S", help="share of the schedule where it ends (0.4)")
    group.add_argument("--every", type=int, metavar="N", help="at every so many steps (1)")
    group.add_argument("--boosting-start", type=float, metavar="S", help="share from which noise is added (0, never)")
    group.add_argument("--interpolation", choices=[str(each) for each in Interpolation], help="(slerp)")
    group.add_argument("--sites", action="append", help="where in the network; may be repeated (mid)")


def _mixing_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("disentangled, one of the first three")
    group.add_argument("--direction", metavar="NAME", help="what was learned")
    group.add_argument("--switch-step", type=int, metavar="N", help="source prompt for N steps, target prompt after")
    group.add_argument("--weights", type=_numbers, metavar="W,W,...", help="one a step, 1 is the source prompt alone")
    group.add_argument("--scale", type=float, help="0 is no change, 1 as learned (1)")
    group.add_argument("--sampler", choices=[str(each) for each in Sampler], help="how to draw (ddim)")


def _learn_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source_prompt", help="text before")
    parser.add_argument("target_prompt", help="text after")
    parser.add_argument(
        "--example", action="append", required=True, metavar="FILE|SEED", help="learn on it; repeatable"
    )
    parser.add_argument("--name", default="", help="id of the direction: a-z, 0-9 and -; drawn when left out")
    parser.add_argument("--display-name", default="", help="a name for people")
    parser.add_argument("--model", default="", help="model id; the server's default when left out")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the schedule")
    parser.add_argument("--guidance-scale", type=float, metavar="W", help="weight of the prompt (5)")
    parser.add_argument("--sampler", choices=[str(each) for each in Sampler], help="how to draw (ddim)")
    parser.add_argument("--content-weight", type=float, metavar="W", help="of what keeps the content (0.05)")
    parser.add_argument("--seed", type=int, help="of the noise photos are brought along with")
    parser.add_argument("--fit", choices=[str(each) for each in Fit], help="how photos are brought to size (crop)")
    parser.add_argument("--method", choices=list(_LEARNING), help="gradient where the model has gradients, else search")
    parser.add_argument("--detach", action="store_true", help="do not wait")
    group = parser.add_argument_group("gradient")
    group.add_argument("--optimization-steps", type=int, metavar="N", help="(10)")
    group.add_argument("--learning-rate", type=float, metavar="R", help="(0.05)")
    group.add_argument("--switch-step", type=int, metavar="N", help="steps that begin with a weight of 1")
    group.add_argument("--late-weight", type=float, metavar="W", help="weight that the others begin with (0)")
    group = parser.add_argument_group("search")
    group.add_argument("--switch-steps", type=_whole_numbers, metavar="N,N,...", help="candidates")
    group.add_argument("--late-weights", type=_numbers, metavar="W,W,...", help="candidates")


def _direction_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="id, or directions/...")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write it as a safetensors file")
    parser.add_argument("--delete", action="store_true", help="delete it")


def _import_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="safetensors file that `underpaint direction -o` wrote")
    parser.add_argument("--name", default="", help="id that it gets; drawn when left out")
    parser.add_argument("--display-name", default="", help="the file's own when left out")


def _operations_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--unfinished", action="store_true", help="only those that are not done")


def _operation_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="id, or operations/...")
    parser.add_argument("--wait", action="store_true", help="until it is done")
    parser.add_argument("--cancel", action="store_true", help="end it; nothing is kept")
    parser.add_argument("--forget", action="store_true", help="remove it from the list, once it is done")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _mask_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="mask.png", metavar="FILE", help="where to write it (mask.png)")


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="text of the picture")
    parser.add_argument("--negative-prompt", default="", help="text to steer away from")
    parser.add_argument("--seed", type=int, help="0 or more; drawn and reported when left out")
    parser.add_argument("--width", type=int, help="pixels; the model's own when left out")
    parser.add_argument("--height", type=int, help="pixels; the model's own when left out")
    parser.add_argument("-o", "--output", default="generated.png", metavar="FILE", help=".png, .jpg or .webp")


def _invert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", help="picture file")
    parser.add_argument("--method", choices=list(_INVERSIONS), default="edict", help="how to invert (edict)")
    parser.add_argument("--mixing-coefficient", type=float, metavar="P", help="EDICT's p (0.93)")
    parser.add_argument(
        "--features",
        dest="features",
        action="append",
        metavar="SITE",
        help="ddim: keep the network's activations there, for content injection; may be repeated",
    )
    parser.add_argument("--verify", action="store_true", help="also run the way back and report its error")
    parser.add_argument("-o", "--output", metavar="FILE", help="also write the latents as a safetensors file")


if __name__ == "__main__":
    sys.exit(main())
