"""Every (code, reason) the table knows, over a real socket, and those it does not know."""

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from underpaint import UnderpaintError, errors
from underpaint._status import TABLE

KNOWN = [(code, reason, kind) for (code, reason), kind in TABLE.items() if reason != "*"]


@pytest.mark.parametrize(("code", "reason", "kind"), KNOWN, ids=lambda value: getattr(value, "name", str(value)))
def test_every_code_and_reason_has_its_class(connect, server, refusal, code, reason, kind):
    client = connect(server.target, max_retries=0)
    server.script("GetModel", *[refusal(code, reason, "what happened")])
    with pytest.raises(UnderpaintError) as caught:
        client.model("m")
    assert type(caught.value) is kind
    assert caught.value.reason == reason
    assert caught.value.message == "what happened"
    assert isinstance(caught.value.__cause__, grpc.RpcError)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.ResourceExhausted),
        (grpc.StatusCode.INTERNAL, errors.ServerError),
    ],
)
def test_a_reason_of_a_newer_server_ends_in_the_class_of_its_code(connect, server, refusal, code, kind):
    client = connect(server.target, max_retries=0)
    server.script("GetModel", refusal(code, "NOT_HEARD_OF"))
    with pytest.raises(UnderpaintError) as caught:
        client.model("m")
    assert type(caught.value) is kind
    assert caught.value.reason == "NOT_HEARD_OF"


def test_details_become_attributes(client, server, refusal, photo):
    bad = error_details_pb2.BadRequest()
    bad.field_violations.add(field="inversion_parameters.strength", description="above 1")
    bad.field_violations.add(field="seed", description="unused")
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=2, nanos=500_000_000))
    info = error_details_pb2.RequestInfo(request_id="abc")
    server.script("Edit", refusal(grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID", "no", bad, retry, info, limit="1"))
    with pytest.raises(errors.FieldInvalid) as caught:
        client.edit(photo, "t")
    error = caught.value
    assert error.violations == (
        errors.FieldViolation("inversion_parameters.strength", "above 1"),
        errors.FieldViolation("seed", "unused"),
    )
    assert (error.retry_after_s, error.request_id, error.metadata) == (2.5, "abc", {"limit": "1"})
    assert [type(detail).__name__ for detail in error.details] == [
        "ErrorInfo",
        "BadRequest",
        "RetryInfo",
        "RequestInfo",
    ]


def test_the_request_id_is_there_even_if_the_server_does_not_say_it(client, server, refusal, photo):
    for rpc, call in (("Edit", client.edit), ("StreamEdit", client.edit), ("ComputeMask", client.compute_mask)):
        server.script(rpc, refusal(grpc.StatusCode.INTERNAL, "BUG"))
        options: dict[str, Any] = {"progress": [].append} if rpc == "StreamEdit" else {}
        with pytest.raises(errors.Bug) as caught:
            call(photo, "t", request_id=f"id-of-{rpc}", **options)
        assert caught.value.request_id == f"id-of-{rpc}"


@pytest.mark.parametrize("payload", [b"not a status", b"\xff\xff\xff", b""])
def test_a_trailer_that_is_no_status_does_not_hide_the_error(client, server, payload):
    def strange(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", payload),))
        context.abort(grpc.StatusCode.NOT_FOUND, "where?")

    server.script("GetModel", strange)
    with pytest.raises(errors.NotFound, match=r"where\?") as caught:
        client.model("m")
    assert caught.value.details == ()


def test_a_detail_of_an_unknown_kind_is_left_out(client, server, refusal):
    from google.protobuf.wrappers_pb2 import StringValue

    server.script("GetModel", refusal(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no", StringValue(value="x")))
    with pytest.raises(errors.ModelNotFound) as caught:
        client.model("m")
    assert len(caught.value.details) == 1


def test_a_bug_in_a_handler_is_a_server_error(client, server):
    def bug(request, context):
        raise RuntimeError("oops")

    server.script("GetModel", bug)
    with pytest.raises(errors.ServerError, match="oops"):
        client.model("m")


def _leaves(kind):
    return [kind] + [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]


def test_the_drawn_tree_is_the_tree():
    drawn = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        before, _, rest = line.partition("── ")
        if rest:
            depth = (len(before) - 5) // 4
            path[depth:] = [rest.split()[0]]
            drawn[path[depth]] = path[depth - 1] if depth else "UnderpaintError"
    actual = {kind.__name__: kind.__base__.__name__ for kind in _leaves(UnderpaintError)[1:]}
    assert drawn == actual


def test_every_class_can_be_met():
    made_here = {errors.PayloadTooLarge, errors.ExportCorrupt, errors.WrongTarget}
    parents = {kind for kind in _leaves(UnderpaintError) if kind.__subclasses__()}
    assert set(_leaves(UnderpaintError)) - set(TABLE.values()) - made_here <= parents


@pytest.mark.parametrize("kind", _leaves(UnderpaintError))
def test_errors_survive_pickling(kind):
    violation = errors.FieldViolation("a.b", "c")
    detail = error_details_pb2.RequestInfo(request_id="i")
    error = kind("m", reason="R", metadata={"k": "v"}, violations=(violation,), retry_after_s=1.5, details=(detail,))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "m"
    assert vars(copy) == vars(error)
