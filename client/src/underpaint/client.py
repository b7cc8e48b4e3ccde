"""The synchronous client. Made from ``aio.py`` by ``client/make_sync.py``; change that one."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from underpaint import _calls, _requests
from underpaint._channel import Connection, Deadline, Target, deliver
from underpaint._progress import listening
from underpaint._status import translate
from underpaint.images import ImageLike
from underpaint.methods import (
    Ddim,
    DiffEdit,
    Edict,
    EdictInversion,
    EditMethod,
    Fit,
    Generated,
    InversionMethod,
    Priority,
)
from underpaint.results import Edited, Inversion, InversionHandle, Limits, Mask, Model, Preview, Progress, Resolved

T = TypeVar("T")
ProgressLike = bool | Callable[[Progress], Any] | None
_EDICT, _DDIM, _DIFFEDIT, _EDICT_INVERSION = Edict(), Ddim(), DiffEdit(), EdictInversion()


class Client:
    """Inverts and edits pictures on an Underpaint server.

    Opens its connection at the first call, may be shared by threads or tasks, and closes with ``with`` or
    ``close``. Refusals that a repeat can mend (a full queue, a server that restarts) are repeated by the channel, up to
    four attempts.

    Arguments that all methods share:

    * ``timeout``: seconds for the whole call, repeats included; None takes the client's.
    * ``model``: "models/{id}" or only the id; empty takes the server's default.
    * ``priority``: :class:`Priority` or its name.
    * ``progress``: True draws a bar on a terminal, a function is called with each :class:`Progress`; a function that
      raises ends the call. Snapshots may be skipped when it is slow.
    * ``request_id``: a UUID4; drawn when None. The same id within ten minutes gets the first answer again.

    All methods raise :class:`UnderpaintError` or one of its subclasses; ValueError and TypeError for arguments that
    contradict each other; OSError for files that cannot be read.
    """

    def __init__(
        self,
        target: str = "localhost:50051",
        *,
        timeout: float = 120.0,
        connect_timeout: float = 10.0,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Remember where the server is; nothing is sent yet.

        ``target`` is any gRPC target: host:port, or ``dns:///name:port``, which spreads calls over all addresses of
        the name. ``connect_timeout`` is how many seconds the first call waits for a server. ``credentials`` turn on
        TLS. ``metadata`` goes with every call, such as ``{"authorization": "Bearer ..."}``. ``options`` are channel
        arguments that win over ours.
        """
        self._connection = Connection(Target(target, credentials, options, connect_timeout))
        self._timeout = timeout
        self._metadata = tuple((metadata or {}).items())
        self._limits: dict[str, Limits] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls that run are cancelled. A later call opens another."""
        self._connection.close()

    def invert(
        self,
        image: ImageLike,
        *,
        method: InversionMethod = _EDICT_INVERSION,
        source_prompt: str = "",
        steps: int | None = None,
        strength: float | None = None,
        guidance_scale: float | None = None,
        fit: Fit | str | None = None,
        verify: bool = False,
        model: str = "",
        priority: Priority | str | None = None,
        progress: ProgressLike = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Inversion:
        """Turn a photo into an inversion that many edits can start from.

        ``source_prompt`` describes the photo. ``strength``, (0, 1], is the share of the schedule's ``steps`` that is
        inverted. ``verify`` also runs the way back and reports its error. The same photo, model and settings give the
        same name, and cost nothing the second time.
        """
        request = _requests.invert(
            image, method, source_prompt=source_prompt, steps=steps, strength=strength,
            guidance_scale=guidance_scale, fit=fit, verify=verify, model=model, priority=priority,
            request_id=request_id,
        )  # fmt: skip
        _requests.refuse_too_large(request.image.content, request.model, self._limits)
        with listening(progress) as on_progress:
            return self._run(_calls.invert(request, on_progress), timeout)

    def edit(
        self,
        source: _requests.Source,
        target_prompt: str = "",
        method: EditMethod = _EDICT,
        *,
        source_prompt: str = "",
        negative_prompt: str = "",
        seed: int | None = None,
        guidance_scale: float | None = None,
        fit: Fit | str | None = None,
        model: str = "",
        output_media_type: str = "",
        priority: Priority | str | None = None,
        progress: ProgressLike = None,
        on_preview: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Edited:
        """Change a picture into what ``target_prompt`` says; content injection, and models without text, need none.

        ``source`` is a photo (a path, encoded bytes or a ``PIL.Image``), an inversion (an object, or its name), or
        :class:`Generated`. ``source_prompt`` describes the photo. ``seed``, 0 .. 2**64 - 1, is drawn when None, and
        reported in ``resolved``. ``guidance_scale`` is the weight of the prompt; 1 is off. ``on_preview`` gets a rough
        look every ``preview_every`` steps (5). ``output_media_type`` is image/png, image/jpeg or image/webp.

        An inversion that the server has let go is made again from the photo, when this client made it.
        """
        work = _requests.edit(
            source, target_prompt, method, source_prompt=source_prompt, negative_prompt=negative_prompt, seed=seed,
            guidance_scale=guidance_scale, fit=fit, model=model, output_media_type=output_media_type,
            priority=priority, request_id=request_id,
        )  # fmt: skip
        return self._edit(work, progress, on_preview, preview_every, timeout)

    def generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        negative_prompt: str = "",
        guidance_scale: float | None = None,
        model: str = "",
        output_media_type: str = "",
        priority: Priority | str | None = None,
        progress: ProgressLike = None,
        on_preview: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Edited:
        """Draw a picture from noise. ``Generated(prompt, seed)`` is the same picture as the source of an edit."""
        return self.edit(
            Generated(prompt, seed, width, height, steps), prompt, _DDIM, negative_prompt=negative_prompt,
            guidance_scale=guidance_scale, model=model, output_media_type=output_media_type, priority=priority,
            progress=progress, on_preview=on_preview, preview_every=preview_every, timeout=timeout,
            request_id=request_id,
        )  # fmt: skip

    def repeat(
        self,
        resolved: Resolved,
        *,
        progress: ProgressLike = None,
        on_preview: Callable[[Preview], Any] | None = None,
        preview_every: int | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Edited:
        """Send a resolved request as it is, under a new id: the same bytes again."""
        work = _requests.repeat(resolved, request_id)
        return self._edit(work, progress, on_preview, preview_every, timeout)

    def compute_mask(
        self,
        source: _requests.Source,
        target_prompt: str,
        method: DiffEdit = _DIFFEDIT,
        *,
        source_prompt: str = "",
        negative_prompt: str = "",
        seed: int | None = None,
        guidance_scale: float | None = None,
        fit: Fit | str | None = None,
        model: str = "",
        priority: Priority | str | None = None,
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> Mask:
        """Only DiffEdit's mask, to look at and to change before ``edit(..., DiffEdit(mask=...))``."""
        work = _requests.edit(
            source, target_prompt, method, source_prompt=source_prompt, negative_prompt=negative_prompt, seed=seed,
            guidance_scale=guidance_scale, fit=fit, model=model, output_media_type="", priority=priority,
            request_id=request_id,
        )  # fmt: skip
        _requests.refuse_too_large(work.request.image.content, work.request.model, self._limits)
        return self._run(_calls.compute_mask(work), timeout)

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """All models of the server. Their limits are remembered: larger pictures are then refused before the upload."""
        found = self._run(_calls.list_models(), timeout)
        self._limits |= {model.name: model.limits for model in found}
        return found

    def model(self, name: str, *, timeout: float | None = None) -> Model:
        """One model, by "models/{id}" or only the id. Its limits are remembered."""
        found = self._run(_calls.get_model(_requests.model_name(name)), timeout)
        self._limits[found.name] = found.limits
        return found

    def get_inversion(self, name: InversionHandle | str, *, timeout: float | None = None) -> Inversion:
        """Look one inversion up; refreshes nothing."""
        return self._run(_calls.get_inversion(_requests.inversion_name(name)), timeout)

    def list_inversions(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Inversion]:
        """All inversions, newest first, fetched page by page; ``timeout`` is for each page."""
        token = ""
        while True:
            page, token = self._run(_calls.list_inversions(page_size, token), timeout)
            yield from page
            if not token:
                return

    def delete_inversion(
        self, name: InversionHandle | str, *, allow_missing: bool = False, timeout: float | None = None
    ) -> None:
        """Delete one inversion; with ``allow_missing`` it may be gone already."""
        self._run(_calls.delete_inversion(_requests.inversion_name(name), allow_missing), timeout)

    def export_inversion(
        self,
        name: InversionHandle | str,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
    ) -> bytes:
        """The latents as one safetensors file, size and checksum checked; also written to ``path`` when given."""
        content = self._run(_calls.export_inversion(_requests.inversion_name(name)), timeout)
        if path is not None:
            Path(path).write_bytes(content)
        return content

    def _edit(
        self,
        work: _requests.Edit,
        progress: ProgressLike,
        on_preview: Callable[[Preview], Any] | None,
        preview_every: int | None,
        timeout: float | None,
    ) -> Edited:
        _requests.refuse_too_large(work.request.image.content, work.request.model, self._limits)
        with listening(progress) as on_progress:
            listeners = _calls.Listeners(on_progress, on_preview, preview_every)
            return self._run(_calls.edit(work, listeners), timeout)

    def _run(self, flow: _calls.Flow[T], timeout: float | None) -> T:
        deadline = Deadline(self._timeout if timeout is None else timeout)
        try:
            call = next(flow)
            while True:
                try:
                    answer = self._perform(call, deadline)
                except grpc.RpcError as error:
                    call = flow.throw(translate(error, call.request_id))
                else:
                    call = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _perform(self, call: _calls.Call, deadline: Deadline) -> Any:
        channel = self._connection.channel(deadline)
        kind = channel.unary_unary if call.reader is None else channel.unary_stream
        ask: Any = kind(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        running = ask(call.request, timeout=deadline.left(), metadata=self._metadata)
        if call.reader is None:
            return running
        try:
            for message in running:
                for callback, value in call.reader.feed(message):
                    deliver(callback, value)
        finally:
            running.cancel()  # for the listener that raised; after the end it does nothing
        return call.reader.end()
