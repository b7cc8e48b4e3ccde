"""The wire: the only package that knows gRPC and the messages of ``underpaint.v1``.

A call passes ``interceptors`` (log line, metrics, errors to statuses), a servicer (``edits``, ``inversions``,
``models``, ``directions``), ``replay`` (a repeated request id joins the first), ``convert`` (defaults and limits; what
one method alone has is in ``methods``), ``sources`` (pixels or stored latents), the engine, and ``answers`` back. What
outlives its call goes by ``learning`` (the request), ``manager`` and ``running`` (the work), and is read through
``operations``.
"""
