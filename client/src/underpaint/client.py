"""The synchronous client. Made from ``aio.py`` by ``client/make_sync.py``; change that one."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from underpaint import _calls, _requests
from underpaint._channel import Connection, Deadline, Target, deliver, pause
from underpaint._progress import listening
from underpaint._status import translate
from underpaint.errors import ServerError, Unavailable
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
    LearnMethod,
    Priority,
    Sampler,
)
from underpaint.results import (
    Direction,
    Edited,
    Inversion,
    InversionHandle,
    Limits,
    Mask,
    Model,
    Operation,
    Preview,
    Progress,
    Resolved,
)

T = TypeVar("T")
_POLL_S, _LONG_POLL_S = 0.5, 10.0
_RETRY_S = 1.0
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

    def learn(
        self,
        source_prompt: str,
        target_prompt: str,
        examples: Sequence[_requests.Example],
        *,
        name: str = "",
        display_name: str = "",
        steps: int | None = None,
        sampler: Sampler | str | None = None,
        guidance_scale: float | None = None,
        method: LearnMethod | None = None,
        content_weight: float | None = None,
        seed: int | None = None,
        fit: Fit | str | None = None,
        model: str = "",
        timeout: float | None = None,
        request_id: str | None = None,
    ) -> "Learning":
        """Start to learn what turns pictures of ``source_prompt`` into ones of ``target_prompt``; takes minutes.

        ``examples`` are 1 to 16 photos (paths, encoded bytes or ``PIL.Image``), or seeds of pictures that the model
        draws from the source prompt. ``name`` is the id that the direction gets, 1 to 63 characters of a-z, 0-9 and
        "-"; drawn when empty. ``method`` is :class:`GradientLearning` or :class:`SearchLearning`. ``content_weight``
        is that of what keeps the content, against what follows the text. ``seed`` is of the noise that photos are
        brought along with.

        The server goes on whatever happens to this program: ``attach`` finds the operation again by its name.
        """
        request = _requests.learn(
            source_prompt, target_prompt, examples, name=name, display_name=display_name, steps=steps, sampler=sampler,
            guidance_scale=guidance_scale, method=method, content_weight=content_weight, seed=seed, fit=fit,
            model=model, request_id=request_id,
        )  # fmt: skip
        for example in request.examples:
            _requests.refuse_too_large(example.image.content, request.direction.model, self._limits)
        return Learning(self, (self._run(_calls.learn(request), timeout)).name)

    def attach(self, name: Operation | str, *, timeout: float | None = None) -> "Learning":
        """The handle of an operation that was started before, perhaps elsewhere."""
        found = self._run(_calls.get_operation(_requests.operation_name(name)), timeout)
        return Learning(self, found.name)

    def list_operations(
        self, *, done: bool | None = None, page_size: int = 0, timeout: float | None = None
    ) -> Iterator[Operation]:
        """All operations, or only those that are ``done`` or are not, newest first; ``timeout`` is for each page."""
        token = ""
        while True:
            page, token = self._run(_calls.list_operations(done, page_size, token), timeout)
            yield from page
            if not token:
                return

    def get_direction(self, name: Direction | str, *, timeout: float | None = None) -> Direction:
        """Look one direction up, by "directions/{id}" or only the id."""
        return self._run(_calls.get_direction(_requests.direction_name(name)), timeout)

    def list_directions(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Direction]:
        """All directions, newest first, fetched page by page; ``timeout`` is for each page."""
        token = ""
        while True:
            page, token = self._run(_calls.list_directions(page_size, token), timeout)
            yield from page
            if not token:
                return

    def delete_direction(self, name: Direction | str, *, etag: str = "", timeout: float | None = None) -> None:
        """Delete one direction; with ``etag`` only if it is that very one."""
        self._run(_calls.delete_direction(_requests.direction_name(name), etag), timeout)

    def export_direction(
        self,
        name: Direction | str,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
    ) -> bytes:
        """The direction as one safetensors file, size and checksum checked; also written to ``path`` when given."""
        content = self._run(_calls.export_direction(_requests.direction_name(name)), timeout)
        if path is not None:
            Path(path).write_bytes(content)
        return content

    def import_direction(
        self,
        content: bytes | str | os.PathLike[str],
        *,
        name: str = "",
        display_name: str = "",
        timeout: float | None = None,
    ) -> Direction:
        """Store an exported file, given as bytes or by its path. Empty names: a drawn one, and the file's own."""
        data = content if isinstance(content, bytes) else Path(content).read_bytes()
        return self._run(_calls.import_direction(data, name, display_name), timeout)

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
        ask: Any = (channel.stream_unary if call.more else kind)(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        sent = iter((call.request, *call.more)) if call.more else call.request
        running = ask(sent, timeout=deadline.left(), metadata=self._metadata)
        if call.reader is None:
            return running
        try:
            for message in running:
                for callback, value in call.reader.feed(message):
                    deliver(callback, value)
        finally:
            running.cancel()  # for the listener that raised; after the end it does nothing
        return call.reader.end()


class Learning:
    """An operation on the server that learns a direction. It goes on whether or not anybody waits for it."""

    def __init__(self, client: Client, name: str) -> None:
        """Use ``client.learn`` or ``client.attach``."""
        self._client = client
        self.name = name
        """"operations/{id}"."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def status(self, *, timeout: float | None = None) -> Operation:
        """What it has come to."""
        return self._client._run(_calls.get_operation(self.name), timeout)

    def wait(self, *, progress: ProgressLike = None, timeout: float | None = None) -> Operation:
        """What it has come to once it is done, or after ``timeout`` seconds; None waits as long as it takes.

        A server that is away for a while (a restart) is waited for, as long as one call of the client may take.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        with listening(progress) as on_progress:
            while True:
                poll_s = _POLL_S if on_progress is not None else _LONG_POLL_S
                now = self._look(max(0.0, min(poll_s, end - time.monotonic())), end)
                if on_progress is not None and now.progress is not None:
                    deliver(on_progress, now.progress)
                if now.done or time.monotonic() >= end:
                    return now

    def result(self, *, progress: ProgressLike = None) -> Direction:
        """The direction, when it is learned; raises what ended the operation instead, such as Cancelled."""
        now = self.wait(progress=progress)
        if now.error is not None:
            raise now.error
        if now.direction is None:
            raise ServerError("the operation ended without a direction")
        return now.direction

    def cancel(self, *, timeout: float | None = None) -> None:
        """End it within a step; nothing of what it has learned is kept. One that is done stays as it is."""
        self._client._run(_calls.cancel_operation(self.name), timeout)

    def forget(self, *, timeout: float | None = None) -> None:
        """Remove it from the server's list, once it is done; what it learned stays."""
        self._client._run(_calls.delete_operation(self.name), timeout)

    def _look(self, seconds: float, end: float) -> Operation:
        patience = min(end, time.monotonic() + self._client._timeout)
        while True:
            try:
                return self._client._run(_calls.wait_operation(self.name, seconds), None)
            except Unavailable as error:
                retry_s = error.retry_after_s or _RETRY_S
                if time.monotonic() + retry_s > patience:
                    raise
                pause(retry_s)
