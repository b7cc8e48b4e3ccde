"""The gRPC server: the only package that knows gRPC.

A call that computes passes, in this order: ``calls`` (log line, metrics, errors to statuses, repeated request ids),
``services`` (one file a gRPC service), ``handlers`` (the body of the call), ``requests`` (message to draft, with
defaults and limits; the fields of one method are read in its folder under ``methods``), the engine, and ``responses``
(result to message). LearnDirection stores an operation instead; ``underpaint_server.operations`` runs it, and
``services.operations`` reads it.
"""
