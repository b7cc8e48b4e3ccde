"""The synchronous client, generated from ``aio.py`` by ``client/make_sync.py``: edit ``aio.py``."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, Unpack, overload

import grpc

from underpaint import _calls, _requests, resources
from underpaint._channel import (
    END,
    Connection,
    Failure,
    Opened,
    apart,
    deliver,
    headers_of,
    receive,
)
from underpaint._many import in_order
from underpaint._progress import listening
from underpaint._retry import Attempts, Deadline, FirstContact
from underpaint._target import Target
from underpaint.choices import Fit, Priority, Sampler
from underpaint.errors import ServerError
from underpaint.images import ImageLike
from underpaint.methods import (
    DEFAULT_EDIT,
    DEFAULT_INVERSION,
    Ddim,
    DiffEdit,
    EditMethod,
    Generated,
    InversionMethod,
    LearnMethod,
)
from underpaint.resources import Direction, InversionHandle
from underpaint.results import (
    Edited,
    Inversion,
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
_ANSWER_S = 10.0
"""Seconds for the state of an operation to arrive after the time for which it was waited for."""
ProgressLike = bool | Callable[[Progress], Any] | None
_DDIM, _DIFFEDIT = Ddim(), DiffEdit()


class Client:
    """Inverts and edits images on an Underpaint server.

    Connects at the first call and disconnects with ``with`` or ``close``. Threads or tasks may share one client.
    A call that fails with UNAVAILABLE (a full queue, a server that restarts, a broken connection) is sent again until
    its timeout passes, under the same request id, so that the server does the work once. Each retry is logged, with the
    reason, by the logger ``underpaint``.

    Arguments that several methods have:

    * ``timeout``: seconds for the whole call, retries included; None takes the client's, infinity is no limit.
    * ``model``: "models/{id}" or the id alone; empty takes the server's default.
    * ``fit``: how a photo of another size is brought to the model's size, a :class:`Fit` or its name. Default: crop.
    * ``priority``: order in the queue, a :class:`Priority` or its name. Default: normal.
    * ``progress``: True draws a bar on a terminal; a function is called with each :class:`Progress`. An exception that
      it raises ends the call. Some progress is skipped when it is slow.
    * ``request_id``: a UUID4; None takes a random one. A repeat of the id within ten minutes gets the first answer.

    All methods raise :class:`UnderpaintError` or one of its subclasses when a call fails, ValueError or TypeError for
    arguments that are wrong or contradict each other, OSError for files that cannot be read.
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
        max_retries: int | None = None,
    ) -> None:
        """Create a client; it connects at the first call. Raises WrongTarget for a target that is not an address.

        ``target`` is host:port (50051 without a port), ``unix:/path`` of a socket, or any other gRPC target. Calls are
        spread over all addresses of a name. ``timeout`` is the default time limit of a call in seconds.
        ``connect_timeout`` is how many seconds the first call waits for a server. ``credentials`` turn on TLS.
        ``metadata`` is sent with every call, such as ``{"authorization": "Bearer ..."}``. ``options`` are gRPC channel
        arguments; they override the client's own. ``max_retries`` is how often a call is sent again at most; 0: never,
        None: until its timeout passes.
        """
        if max_retries is not None and max_retries < 0:
            raise ValueError(f"max_retries is {max_retries}: it must be 0 or more, or None for no limit")
        self._connection = Connection(Target(target, credentials, tuple(options), connect_timeout))
        self._timeout = timeout
        self._max_retries = max_retries
        self._metadata = headers_of(metadata or {})
        self._limits: dict[str, Limits] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running calls are cancelled. A later call opens a new connection."""
        self._connection.close()

    def invert(
        self,
        image: ImageLike,
        *,
        method: InversionMethod = DEFAULT_INVERSION,
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
        """Invert a photo; the inversion can be the source of many edits.

        ``source_prompt`` describes the photo. ``steps`` is the number of steps of the whole schedule (the model's by
        default), ``strength``, (0, 1], the share of it that is inverted (0.8). ``guidance_scale`` is the
        classifier-free guidance weight while inverting; 1 is off. ``verify`` also reconstructs the photo and reports
        the error. The same photo, model and settings give the same name, and the server computes them only once.
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
        method: EditMethod = DEFAULT_EDIT,
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
        """Edit an image so that it shows what ``target_prompt`` describes.

        ``source`` is a photo (a path, encoded bytes or a ``PIL.Image``), an inversion (a handle, or its name), or
        :class:`Generated`. ``target_prompt`` may be empty for content injection, for a learned direction and for models
        without text. ``source_prompt`` describes the photo, ``negative_prompt`` what the result should not show.
        ``seed``, 0 to 2**64 - 1, is random when None; ``resolved`` has it. ``guidance_scale`` is the classifier-free
        guidance weight; 1 is off. ``on_preview`` is called with a :class:`Preview` every ``preview_every`` steps (5).
        ``output_media_type`` is image/png (the default), image/jpeg or image/webp.

        If the server has deleted an inversion that this client made, the edit is sent again with the photo.
        """
        work = _requests.edit(
            source, target_prompt, method, source_prompt=source_prompt, negative_prompt=negative_prompt, seed=seed,
            guidance_scale=guidance_scale, fit=fit, model=model, output_media_type=output_media_type,
            priority=priority, request_id=request_id,
        )  # fmt: skip
        return self._edit(work, progress, on_preview, preview_every, timeout)

    @overload
    def edit_many(
        self,
        sources: Iterable[_requests.Source],
        target_prompt: str = "",
        method: EditMethod = DEFAULT_EDIT,
        *,
        concurrency: int = 8,
        on_error: Literal["raise"] = "raise",
        **settings: Unpack[_requests.EditSettings],
    ) -> Iterator[Edited]: ...

    @overload
    def edit_many(
        self,
        sources: Iterable[_requests.Source],
        target_prompt: str = "",
        method: EditMethod = DEFAULT_EDIT,
        *,
        concurrency: int = 8,
        on_error: Literal["return"],
        **settings: Unpack[_requests.EditSettings],
    ) -> Iterator[Edited | Exception]: ...

    def edit_many(
        self,
        sources: Iterable[_requests.Source],
        target_prompt: str = "",
        method: EditMethod = DEFAULT_EDIT,
        *,
        concurrency: int = 8,
        on_error: Literal["raise", "return"] = "raise",
        **settings: Unpack[_requests.EditSettings],
    ) -> Iterator[Edited | Exception]:
        """Edit many images alike; yields one result for each source, in the order of ``sources``.

        At most ``concurrency`` edits run at once. ``sources`` is read at most four times ``concurrency`` ahead of the
        results, so it may be a generator over more photos than memory holds. ``target_prompt``, ``method`` and
        ``settings`` are those of :meth:`edit`; ``timeout`` is for each edit.

        ``on_error="raise"`` raises the error of an edit when its turn comes and begins no further ones.
        ``on_error="return"`` yields the exception in the place of the result, such as an :class:`UnderpaintError`, or
        an OSError for a file that cannot be read. An error that ``sources`` itself raises comes
        after the results of the images before it. Leaving the loop early begins no further edits: the asynchronous
        client cancels those that run, the synchronous one lets them end.
        """
        if isinstance(sources, str | bytes):
            raise TypeError("sources is a single image: pass several, as a list or any other iterable")
        if concurrency < 1:
            raise ValueError(f"concurrency is {concurrency}: it must be a number of edits, 1 or more")
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error is {on_error!r}: choose one of raise, return")

        def one(source: _requests.Source) -> Edited | Exception:
            try:
                return self.edit(source, target_prompt, method, **settings)
            except Exception as error:
                if on_error == "raise":
                    raise
                return error

        yield from in_order(one, sources, concurrency)

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
        """Generate an image from noise. ``width`` and ``height`` are in pixels; None takes the model's size.

        ``Generated(prompt, seed)`` is the same image as the source of an edit.
        """
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
        """Send a resolved request unchanged under a new request id; the result has the same bytes.

        If the server no longer has an inversion that it names, the image is inverted again, if this client has it: a
        Resolved of :meth:`edit` has it, one that was read from JSON has not (InversionExpired).
        """
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
        """Compute DiffEdit's mask without the edit; the mask, or a changed one, can go into ``DiffEdit(mask=...)``."""
        work = _requests.edit(
            source, target_prompt, method, source_prompt=source_prompt, negative_prompt=negative_prompt, seed=seed,
            guidance_scale=guidance_scale, fit=fit, model=model, output_media_type="", priority=priority,
            request_id=request_id,
        )  # fmt: skip
        _requests.refuse_too_large(work.request.image.content, work.request.model, self._limits)
        return self._run(_calls.compute_mask(work), timeout)

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """All models of the server. Afterwards the client refuses an image above their limits without sending it."""
        models = self._run(_calls.list_models(), timeout)
        self._limits |= {model.name: model.limits for model in models}
        return models

    def model(self, name: str, *, timeout: float | None = None) -> Model:
        """One model, by "models/{id}" or the id alone. Afterwards the client knows its limits, as with ``models``."""
        model = self._run(_calls.get_model(_requests.model_name(name)), timeout)
        self._limits[model.name] = model.limits
        return model

    def get_inversion(self, name: InversionHandle | str, *, timeout: float | None = None) -> Inversion:
        """Fetch one inversion; this does not postpone its expiry."""
        return self._run(_calls.get_inversion(resources.inversion_name(name)), timeout)

    def list_inversions(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Inversion]:
        """All inversions, newest first, fetched in pages of ``page_size`` (0: 50); ``timeout`` is for each page."""
        token = ""
        while True:
            page, token = self._run(_calls.list_inversions(page_size, token), timeout)
            yield from page
            if not token:
                return

    def delete_inversion(
        self, name: InversionHandle | str, *, allow_missing: bool = False, timeout: float | None = None
    ) -> None:
        """Delete one inversion; InversionExpired if it does not exist, unless ``allow_missing``."""
        self._run(_calls.delete_inversion(resources.inversion_name(name), allow_missing), timeout)

    def export_inversion(
        self,
        name: InversionHandle | str,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
    ) -> bytes:
        """The latents as the bytes of a safetensors file, also written to ``path`` if given.

        Raises ExportCorrupt when size or checksum of the received file is wrong; nothing is written then.
        """
        content = self._run(_calls.export_inversion(resources.inversion_name(name)), timeout)
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
        """Start to learn a direction, the edit from ``source_prompt`` to ``target_prompt``; it takes minutes.

        ``examples`` are 1 to 16 photos (paths, encoded bytes or ``PIL.Image``), or seeds of images that the model
        generates from the source prompt; the photos must fit into one message, 24 MiB in all unless the server says
        otherwise. ``name`` is the id of the direction, 1 to 63 characters of a-z, 0-9 and "-";
        random when empty. ``display_name`` is a name to show to people. ``steps`` and ``sampler`` are those of the
        schedule; edits with the direction use the same. ``guidance_scale`` is the classifier-free guidance weight (5).
        ``method`` is :class:`GradientLearning` or :class:`SearchLearning`; None takes gradients where the model has
        them. ``content_weight``, [0, 100], is the weight of the content-preserving loss (0.05). ``seed`` is that of the
        noise that photos are combined with.

        The operation runs on the server, even if this program ends: ``attach`` returns its handle by its name.
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
        """The handle of an operation that exists, by "operations/{id}" or the id alone; any program may have it."""
        operation = self._run(_calls.get_operation(_requests.operation_name(name)), timeout)
        return Learning(self, operation.name)

    def list_operations(
        self, *, done: bool | None = None, page_size: int = 0, timeout: float | None = None
    ) -> Iterator[Operation]:
        """All operations, or those that are ``done`` or not done, newest first; ``timeout`` is for each page."""
        token = ""
        while True:
            page, token = self._run(_calls.list_operations(done, page_size, token), timeout)
            yield from page
            if not token:
                return

    def get_direction(self, name: Direction | str, *, timeout: float | None = None) -> Direction:
        """Fetch one direction, by "directions/{id}" or the id alone."""
        return self._run(_calls.get_direction(resources.direction_name(name)), timeout)

    def list_directions(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[Direction]:
        """All directions, newest first, fetched in pages of ``page_size`` (0: 50); ``timeout`` is for each page."""
        token = ""
        while True:
            page, token = self._run(_calls.list_directions(page_size, token), timeout)
            yield from page
            if not token:
                return

    def delete_direction(self, name: Direction | str, *, etag: str = "", timeout: float | None = None) -> None:
        """Delete one direction; with ``etag`` only if its etag is that one, else EtagMismatch."""
        self._run(_calls.delete_direction(resources.direction_name(name), etag), timeout)

    def export_direction(
        self,
        name: Direction | str,
        path: str | os.PathLike[str] | None = None,
        *,
        timeout: float | None = None,
    ) -> bytes:
        """The direction as the bytes of a safetensors file, also written to ``path`` if given.

        Raises ExportCorrupt when size or checksum of the received file is wrong; nothing is written then.
        """
        content = self._run(_calls.export_direction(resources.direction_name(name)), timeout)
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
        """Store an exported direction, given as bytes or as the path of its file.

        ``name`` is its id; random when empty. An empty ``display_name`` keeps that of the file.
        """
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
        opened = self._opened(deadline)
        try:
            call = next(flow)
            while True:
                attempts = Attempts(call, self._connection.target, deadline, self._max_retries)
                try:
                    answer = self._answer(call, opened, attempts)
                except Failure as failure:
                    call = flow.throw(failure.error)
                else:
                    call = flow.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _opened(self, deadline: Deadline) -> Opened:
        opened = self._connection.opened()
        contact = FirstContact(self._connection.target, deadline)
        while not opened.reached:
            try:
                self._send(_calls.PROBE, opened, contact.left())
            except Failure as failure:
                pause_s = apart(contact.failed, failure.error)
                if pause_s is not None:
                    opened.pause(pause_s)
                    continue
            opened.reached = True
        return opened

    def _answer(self, call: _calls.Call, opened: Opened, attempts: Attempts) -> Any:
        while True:
            try:
                return self._send(call, opened, attempts.left())
            except Failure as failure:
                pause_s = attempts.failed(failure.error)
            opened.pause(pause_s)

    def _send(self, call: _calls.Call, opened: Opened, timeout_s: float) -> Any:
        if call.more:
            rpc: Any = opened.channel.stream_unary
        else:
            rpc = opened.channel.unary_unary if call.reader is None else opened.channel.unary_stream
        start = rpc(
            call.method.path,
            request_serializer=type(call.request).SerializeToString,
            response_deserializer=call.method.response.FromString,
        )
        request = iter((call.request, *call.more)) if call.more else call.request
        if call.reader is None:
            try:
                return start(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                raise Failure(error) from error
        running = start(request, timeout=timeout_s, metadata=self._metadata)
        call.reader.begin()
        try:
            while (message := receive(running)) is not END:
                for callback, value in call.reader.feed(message):
                    deliver(callback, value)
        finally:
            running.cancel()  # ends the RPC when a callback has raised; no effect after its end
        return call.reader.end()


class Learning:
    """The handle of an operation that learns a direction. The operation runs on the server, even without a handle."""

    def __init__(self, client: Client, name: str) -> None:
        """``client.learn`` and ``client.attach`` create handles."""
        self._client = client
        self.name = name
        """"operations/{id}"."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def status(self, *, timeout: float | None = None) -> Operation:
        """Its current state."""
        return self._client._run(_calls.get_operation(self.name), timeout)

    def wait(self, *, progress: ProgressLike = None, timeout: float | None = None) -> Operation:
        """Its state once it is done, or after ``timeout`` seconds; None waits without a limit.

        While the server is unavailable (a restart), calls are retried for as long as the client's own timeout.
        """
        end = float("inf") if timeout is None else time.monotonic() + timeout
        with listening(progress) as on_progress:
            while True:
                left_s = max(0.0, end - time.monotonic())
                poll_s = min(_POLL_S if on_progress is not None else _LONG_POLL_S, left_s)
                limit_s = min(self._client._timeout, left_s + _ANSWER_S)
                operation = self._client._run(_calls.wait_operation(self.name, poll_s), limit_s)
                if on_progress is not None and operation.progress is not None:
                    deliver(on_progress, operation.progress)
                if operation.done or time.monotonic() >= end:
                    return operation

    def result(self, *, progress: ProgressLike = None) -> Direction:
        """Wait for its end and return the direction; raises the error that ended it, such as Cancelled."""
        operation = self.wait(progress=progress)
        if operation.error is not None:
            raise operation.error
        if operation.direction is None:
            raise ServerError(f"{self.name} ended without a direction and without an error: start it again")
        return operation.direction

    def cancel(self, *, timeout: float | None = None) -> None:
        """Cancel it, within a step; what it has learned so far is lost. No effect on one that is done."""
        self._client._run(_calls.cancel_operation(self.name), timeout)

    def forget(self, *, timeout: float | None = None) -> None:
        """Delete it from the server's list once it is done, else OperationRunning; its direction is kept."""
        self._client._run(_calls.delete_operation(self.name), timeout)
