"""When a call that failed is sent again.

UNAVAILABLE says that the server or the way to it is not there now, and that the same request may succeed later. Such a
call is sent again until its timeout passes: requests that change something have a request id, which is the same in
every attempt, so that the server does the work once. The channel itself repeats nothing: it would give up after a few
attempts whatever the timeout, and it does not repeat a stream that has begun.
"""

import logging
import math
import random
import time
from typing import Any

import grpc

from underpaint._calls import Call
from underpaint._channel import Failure
from underpaint._status import translate
from underpaint._target import Target
from underpaint.errors import ConnectionFailed, DeadlinePassed, Unavailable, UnderpaintError

_log = logging.getLogger("underpaint")
_FIRST_S, _LONGEST_S = 0.2, 5.0
"""Seconds to wait before the second attempt, and at most."""
_ENDLESS_S = 365.0 * 24 * 3600
"""A timeout of more seconds, such as infinity, is this long: for gRPC one far beyond has passed already."""
_LASTED_S = 0.5
"""Seconds of an attempt that did not fail at once."""
_SPREAD = 0.25
"""Share that is added at random to the server's retry time, so that callers it refused together do not return so."""


class Deadline:
    """The time limit of a call, for all its RPCs together; ValueError for a timeout that is not a number."""

    def __init__(self, timeout: float) -> None:
        if math.isnan(timeout):
            raise ValueError("timeout is nan: it must be a number of seconds")
        self._end = time.monotonic() + min(timeout, _ENDLESS_S)

    @property
    def left_s(self) -> float:
        """Seconds left; 0 or less when none are."""
        return self._end - time.monotonic()

    def left(self) -> float:
        """Seconds left, above 0; raises DeadlinePassed when none are."""
        left_s = self.left_s
        if left_s <= 0:
            raise DeadlinePassed("the timeout passed before the call was complete: use a longer timeout")
        return left_s


class FirstContact:
    """The attempts to reach a server before the first call. They end after the connect timeout, or the call's."""

    def __init__(self, target: Target, deadline: Deadline) -> None:
        self._target = target
        self._window_s = min(target.connect_timeout, deadline.left())
        self._deadline = Deadline(self._window_s)
        self._backoff = _Backoff()
        self._reason = ""

    def left(self) -> float:
        """Seconds that the next attempt may take."""
        return max(0.001, self._deadline.left_s)

    def failed(self, error: Any) -> float | None:
        """Seconds to wait before the next attempt; None if a server has answered, with whatever error.

        Raises ConnectionFailed when the time is over, and WrongTarget. May block for two seconds.
        """
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            self._reason = error.details() or ""
            self._target.check(self._reason)
            pause_s = self._backoff.next()
            if pause_s < self._deadline.left_s:
                _log.warning("%s; next attempt in %.2g s", self._target.explained(self._reason), pause_s)
                return pause_s
        elif error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            return None
        raise self._target.refusal(self._window_s, self._reason) from error


class Attempts:
    """The attempts of one call."""

    def __init__(self, call: Call, target: Target, deadline: Deadline, max_retries: int | None) -> None:
        self._call = call
        self._target = target
        self._deadline = deadline
        self._max_retries = max_retries
        self._backoff = _Backoff()
        self._start = self._sent = time.monotonic()
        self._count = 1
        self._last: Unavailable | None = None
        self._answer_lost = False

    def left(self) -> float:
        """Seconds that the next attempt, which begins now, may take; raises DeadlinePassed when none are left."""
        self._sent = time.monotonic()
        try:
            return self._deadline.left()
        except DeadlinePassed as error:
            raise self._final(error) from self._last

    def failed(self, error: grpc.RpcError) -> float:
        """Seconds to wait before the next attempt; raises Failure with the error of the call if there is none."""
        failure = translate(error, self._call.request_id)
        if type(failure) is ConnectionFailed:
            _reword(failure, self._target.explained(failure.message))
        if not isinstance(failure, Unavailable):
            raise Failure(self._final(failure))
        pause_s = self._backoff.next(time.monotonic() - self._sent)
        if failure.retry_after_s is not None and failure.retry_after_s > 0:
            pause_s = failure.retry_after_s * random.uniform(1, 1 + _SPREAD)
        if self._max_retries is not None and self._count > self._max_retries:
            raise Failure(self._given_up(failure, f"max_retries is {self._max_retries}"))
        if pause_s >= self._deadline.left_s:
            raise Failure(self._given_up(failure, "the timeout leaves no time for another"))
        reason = f"{failure.reason}: " if failure.reason else ""
        _log.warning(
            "%s %s: %s%s; attempt %d in %.2g s", self._call.name, self._call.request_id or "(no request id)", reason,
            failure.message, self._count + 1, pause_s,
        )  # fmt: skip
        self._count += 1
        self._last = failure
        self._answer_lost |= isinstance(failure, ConnectionFailed)
        return pause_s

    def _given_up(self, error: Unavailable, why: str) -> Unavailable:
        if self._count > 1:
            seconds = time.monotonic() - self._start
            _reword(error, f"{error.message} ({self._count} attempts in {seconds:.3g} s; {why})")
        return error

    def _final(self, error: UnderpaintError) -> UnderpaintError:
        error._answer_lost = self._answer_lost
        if type(error) is DeadlinePassed and not error.reason and self._last is not None:
            _reword(error, f"{error.message} (attempt {self._count}; the one before failed: {self._last.message})")
        return error


class _Backoff:
    """Pauses that double from one to the next, each shortened at random so that callers do not move in step.

    They begin anew after an attempt that lasted: a connection that breaks now and then is no reason to stay away, and
    the server keeps the work of a caller who has left for a short time only.
    """

    def __init__(self) -> None:
        self._longest_s = _FIRST_S

    def next(self, lasted_s: float = 0.0) -> float:
        """Seconds to wait after an attempt that lasted so long."""
        longest_s = _FIRST_S if lasted_s >= _LASTED_S else self._longest_s
        self._longest_s = min(2 * longest_s, _LONGEST_S)
        return longest_s * random.uniform(0.5, 1)


def _reword(error: UnderpaintError, message: str) -> None:
    error.message, error.args = message, (message,)
