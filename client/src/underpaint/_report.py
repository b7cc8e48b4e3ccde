"""What the command prints about a result: as text for a terminal, as plain values for JSON."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from underpaint import errors
from underpaint._files import Plan
from underpaint.results import Direction, Edited, Inversion, Mask, Model, Notice, Operation, Usage


@dataclass(frozen=True, slots=True)
class Report:
    """One result in both forms."""

    data: Any
    """Plain values, for ``--json``."""
    rows: Sequence[Sequence[str]]
    """Cells of a table, row by row, for a terminal."""
    status: int = 0
    """Exit status of the command."""

    def text(self) -> str:
        """The rows, with aligned columns."""
        widths = [max(len(cell) for cell in column) for column in zip(*self.rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in self.rows)
        return "\n".join(line.rstrip() for line in lines)


def of_edit(result: Edited, files: Mapping[str, Path]) -> Report:
    """Report of an edit."""
    data = {
        **_files(files),
        "media_type": result.media_type,
        "inversion": str(result.inversion) if result.inversion else None,
        "seed": result.resolved.seed,
        "usage": _usage(result.usage),
        "notices": _notices(result.notices),
        "resolved": result.resolved.to_dict(),
    }
    rows = [*_file_rows(files), ("seed", str(result.resolved.seed))]
    rows += [("inversion", str(result.inversion))] if result.inversion else []
    return Report(data, [*rows, *_usage_rows(result.usage), *_notice_rows(result.notices)])


class Folder:
    """Collects what became of the pictures of a folder."""

    def __init__(self, source: Path, output: Path, plan: Plan) -> None:
        self._source = source
        self._output = output
        self._plan = plan
        self._edited: list[dict[str, Any]] = []
        self._failed: list[dict[str, Any]] = []
        self._notices: dict[str, tuple[str, int]] = {}

    def edited(self, picture: Path, target: Path, result: Edited) -> None:
        """A picture is edited, and its result is written."""
        data: dict[str, Any] = {"source": str(picture), **of_edit(result, {"image": target}).data}
        del data["resolved"]  # it may have the pixels, and the seed is said
        self._edited.append(data)
        for notice in result.notices:
            message, number = self._notices.get(notice.reason, (notice.message, 0))
            self._notices[notice.reason] = (message, number + 1)

    def failed(self, picture: Path, error: Exception) -> None:
        """A picture has failed."""
        self._failed.append({"source": str(picture), "error": _error_data(error)})

    def report(self, interrupted: bool = False) -> Report:
        """The summary; its status is 1 where pictures failed or were not tried, 130 after an interrupt."""
        plan, finished = self._plan, {each["source"] for each in (*self._edited, *self._failed)}
        untried = [str(picture) for picture, _ in plan.todo if str(picture) not in finished]
        data = {
            "source": str(self._source),
            "folder": str(self._output),
            "edited": self._edited,
            "failed": self._failed,
            "not_tried": untried,
            "kept": [str(path) for path in plan.kept],
            "skipped": [str(path) for path in plan.others],
        }
        rows = [("edited", f"{len(self._edited)} of {len(plan.todo)}, in {self._output}")]
        rows += [("failed", str(len(self._failed)))] if self._failed else []
        rows += [("not tried", f"{len(untried)}; run the command again for them")] if untried else []
        rows += (
            [("kept", f"{len(plan.kept)}, which have a result already; --overwrite edits them again")]
            if plan.kept
            else []
        )
        rows += [("skipped", f"{len(plan.others)}, not .png, .jpg, .jpeg or .webp")] if plan.others else []
        rows += [
            ("note", f"{message} ({reason}, {number} of the pictures)")
            for reason, (message, number) in self._notices.items()
        ]
        return Report(data, rows, 130 if interrupted else 1 if self._failed or untried else 0)


def of_mask(result: Mask, files: Mapping[str, Path]) -> Report:
    """Report of a mask."""
    data = {
        **_files(files),
        "coverage": result.coverage,
        "seed": result.resolved.seed,
        "usage": _usage(result.usage),
        "notices": _notices(result.notices),
        "resolved": result.resolved.to_dict(),
    }
    rows = [*_file_rows(files), ("coverage", f"{result.coverage:.1%}"), ("seed", str(result.resolved.seed))]
    return Report(data, [*rows, *_usage_rows(result.usage), *_notice_rows(result.notices)])


def of_inversion(inversion: Inversion, files: Mapping[str, Path]) -> Report:
    """Report of an inversion."""
    psnr, error = inversion.reconstruction_psnr_db, inversion.reconstruction_max_abs_error
    data = {
        **_files(files),
        "inversion": inversion.name,
        "model": inversion.model,
        "steps": inversion.parameters.steps,
        "strength": inversion.parameters.strength,
        "size": [inversion.width, inversion.height],
        "size_bytes": inversion.size_bytes,
        "reconstruction_psnr_db": psnr,
        "reconstruction_max_abs_error": error,
        "expire_time": inversion.expire_time.isoformat() if inversion.expire_time else None,
        "usage": _usage(inversion.usage) if inversion.usage else None,
        "notices": _notices(inversion.notices),
    }
    rows = [*_file_rows(files), ("inversion", inversion.name), ("model", inversion.model)]
    rows += [("size", f"{inversion.width} x {inversion.height} px, {inversion.size_bytes} bytes of latents")]
    rows += [("reconstruction", f"{psnr:.1f} dB")] if psnr is not None else []
    rows += [("latent error", f"{error:.2g}")] if error is not None else []
    rows += [("expires", f"{inversion.expire_time:%Y-%m-%d %H:%M:%S} UTC")] if inversion.expire_time else []
    rows += _usage_rows(inversion.usage) if inversion.usage else []
    return Report(data, [*rows, *_notice_rows(inversion.notices)])


def of_models(models: Sequence[Model]) -> Report:
    """Report of all models."""
    data = [
        {
            "name": model.name,
            "state": model.state,
            "size": [model.width, model.height],
            "default_steps": model.default_steps,
            "methods": list(model.methods),
            "feature_sites": list(model.feature_sites),
            "prompt_tokens": model.prompt_tokens,
            "exact_batching": model.exact_batching,
            "batch_class": model.batch_class,
            "backend": model.backend,
            "digest": model.digest,
            "error": model.error,
        }
        for model in models
    ]
    rows = [("MODEL", "STATE", "SIZE", "STEPS", "METHODS")]
    for model in models:
        size = f"{model.width}x{model.height}" if model.width else "-"  # unknown until it is loaded
        methods = model.error or " ".join(model.methods) or "-"
        rows.append((model.name.removeprefix("models/"), model.state, size, str(model.default_steps or "-"), methods))
    return Report(data, rows)


def of_direction(direction: Direction, files: Mapping[str, Path]) -> Report:
    """Report of a direction."""
    rows = [*_file_rows(files), ("direction", direction.name), ("model", direction.model)]
    rows += [("before", direction.source_prompt), ("after", direction.target_prompt)]
    rows += [("steps", f"{direction.steps}, {direction.sampler}, guidance {direction.guidance_scale:g}")]
    if direction.losses:
        rows += [("loss", f"{direction.losses[0]:.4g} at first, {min(direction.losses):.4g} at best")]
    return Report(_files(files) | _direction(direction), rows)


def of_directions(directions: Sequence[Direction]) -> Report:
    """Report of all directions."""
    rows = [("DIRECTION", "MODEL", "STEPS", "BEFORE", "AFTER")]
    for direction in directions:
        name, model = direction.name.removeprefix("directions/"), direction.model.removeprefix("models/")
        rows.append((name, model, str(direction.steps), direction.source_prompt, direction.target_prompt))
    return Report([_direction(direction) for direction in directions], rows)


def of_operations(operations: Sequence[Operation]) -> Report:
    """Report of all operations."""
    rows = [("OPERATION", "STATE", "STEP", "DIRECTION")]
    for operation in operations:
        progress, direction = operation.progress, operation.direction
        step = f"{progress.step}/{progress.total_steps}" if progress else "-"
        name = direction.name.removeprefix("directions/") if direction else "-"
        rows.append((operation.name.removeprefix("operations/"), str(_operation(operation)["state"]), step, name))
    return Report([_operation(operation) for operation in operations], rows)


def of_operation(operation: Operation) -> Report:
    """Report of an operation."""
    rows = [("operation", operation.name), ("state", str(_operation(operation)["state"]))]
    if operation.progress is not None and not operation.done:
        rows += [("step", f"{operation.progress.step} of {operation.progress.total_steps}")]
    if operation.direction is not None:
        rows += [("direction", operation.direction.name)]
    if operation.error is not None:
        rows += [("error", f"{operation.error.message} ({operation.error.reason})")]
    return Report(_operation(operation), rows)


def of_done(text: str) -> Report:
    """Report of an action without a result."""
    return Report({"done": text}, [(text,)])


def _direction(direction: Direction) -> dict[str, Any]:
    created = direction.create_time.isoformat() if direction.create_time else None
    fields = {name: getattr(direction, name) for name in Direction.__dataclass_fields__}
    return fields | {"create_time": created, "weights": list(direction.weights), "losses": list(direction.losses)}


def _operation(operation: Operation) -> dict[str, Any]:
    progress, error = operation.progress, operation.error
    if not operation.done:
        state = str(progress.phase) if progress else "unknown"
    else:
        state = "done" if error is None else "cancelled" if isinstance(error, errors.Cancelled) else "failed"
    return {
        "operation": operation.name,
        "state": state,
        "step": progress.step if progress else None,
        "total_steps": progress.total_steps if progress else None,
        "loss": progress.loss if progress else None,
        "direction": _direction(operation.direction) if operation.direction else None,
        "error": _error_data(error) if error else None,
    }


_ADVICE: tuple[tuple[type[errors.UnderpaintError], str], ...] = (
    (errors.WrongTarget, "correct --target or UNDERPAINT_TARGET"),
    (
        errors.ConnectionFailed,
        "start a server with `underpaint-server`, or name a running one with --target or UNDERPAINT_TARGET",
    ),
    (errors.Unavailable, "try again in {retry_after}"),
    (errors.DeadlineExceeded, "allow more time with --timeout, or use fewer --steps"),
    (errors.ModelNotFound, "`underpaint models` lists the models of the server"),
    (errors.DirectionNotFound, "`underpaint directions` lists the directions on the server"),
    (errors.OperationNotFound, "`underpaint operations` lists the operations on the server"),
    (errors.InversionExpired, "invert the photo again with `underpaint invert`"),
    (errors.RpcUnknown, "use a client and a server of the same version: the server does not have this call"),
    (errors.PayloadTooLarge, "send a smaller image, or compress it more"),
    (errors.ImageTooLarge, "send a smaller image, or save it again with a common program"),
    (errors.ImageUndecodable, "send a PNG, JPEG or WebP file of one image"),
    (errors.OutOfMemory, "use a smaller image"),
    (errors.MethodDisabled, "the server does not offer this call; it may be older than this client"),
    (errors.ServerError, "report it to the operator of the server, with the request ID {request_id}"),
)


def of_error(error: Exception, flags: Sequence[str | None] = ()) -> Report:
    """Report of an error, with what to do about it; ``flags`` are those that set the fields with a wrong value."""
    if not isinstance(error, errors.UnderpaintError):
        return Report({"error": _error_data(error)}, [(of_local_error(error),)])
    retry_after = f"{error.retry_after_s:.3g} s" if error.retry_after_s else "a moment"
    advice = next((text for kind, text in _ADVICE if isinstance(error, kind)), "")
    advice = advice.format(retry_after=retry_after, request_id=error.request_id or "from the server log")
    if named := ", ".join(dict.fromkeys(flag for flag in flags if flag)):
        advice = f"correct {named}"
    rows = [(f"{error.message}{f' ({error.reason})' if error.reason else ''}",)]
    more = [violation for violation in error.violations if violation.path not in error.message]
    rows += [(f"  {violation.path}: {violation.description}",) for violation in more]
    return Report({"error": _error_data(error)}, [*rows, (f"  -> {advice}",)] if advice else rows)


def of_local_error(error: Exception) -> str:
    """An error of this machine: for a file its name and what is wrong, without the number of the system's error."""
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r} is no text in UTF-8: type it on a terminal with that encoding"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def _error_data(error: Exception) -> dict[str, Any]:
    if not isinstance(error, errors.UnderpaintError):
        return {"error": type(error).__name__, "message": of_local_error(error)}
    violations = [{"path": violation.path, "description": violation.description} for violation in error.violations]
    return {
        "error": type(error).__name__,
        "message": error.message,
        "reason": error.reason,
        "metadata": error.metadata,
        "violations": violations,
        "retry_after_s": error.retry_after_s,
        "request_id": error.request_id,
    }


def _files(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in files.items()}


def _file_rows(files: Mapping[str, Path]) -> list[tuple[str, str]]:
    return list(_files(files).items())


def _usage(usage: Usage) -> dict[str, Any]:
    return {name: getattr(usage, name) for name in Usage.__dataclass_fields__}


def _usage_rows(usage: Usage) -> list[tuple[str, str]]:
    cached = ", inversion from the store" if usage.inversion_cache_hit else ""
    time = f"{usage.compute_time_s:.2f} s on the device, {usage.queue_time_s:.2f} s in the queue"
    shared = f" ({usage.reused_evaluations} shared)" if usage.reused_evaluations else ""
    work = f"{usage.network_evaluations} network evaluations{shared}, mean batch {usage.mean_batch_size:.1f}{cached}"
    return [("time", time), ("work", work)]


def _notices(notices: Sequence[Notice]) -> list[dict[str, str]]:
    return [{"reason": notice.reason, "message": notice.message} for notice in notices]


def _notice_rows(notices: Sequence[Notice]) -> list[tuple[str, str]]:
    return [("note", f"{notice.message} ({notice.reason})") for notice in notices]
