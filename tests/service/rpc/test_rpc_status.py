"""The error tree on the wire: every class has a code, every detail is complete, stock clients do the right thing."""

import json
import pickle
from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from support.front import Wire, edit, refused
from underpaint_server import errors
from underpaint_server.errors import FieldInvalid, FieldViolation, UnderpaintError
from underpaint_server.rpc.responses.status import code_of, rich_status, trailers

CODES = {
    "FIELD_INVALID": "INVALID_ARGUMENT",
    "IMAGE_UNDECODABLE": "INVALID_ARGUMENT",
    "IMAGE_TOO_LARGE": "INVALID_ARGUMENT",
    "REQUEST_ID_REUSED": "INVALID_ARGUMENT",
    "MODEL_NOT_FOUND": "NOT_FOUND",
    "INVERSION_EXPIRED": "NOT_FOUND",
    "DIRECTION_NOT_FOUND": "NOT_FOUND",
    "OPERATION_NOT_FOUND": "NOT_FOUND",
    "DIRECTION_MODEL_MISMATCH": "FAILED_PRECONDITION",
    "DIRECTION_STEPS_MISMATCH": "FAILED_PRECONDITION",
    "LEARNING_UNSUPPORTED": "FAILED_PRECONDITION",
    "OPERATION_RUNNING": "FAILED_PRECONDITION",
    "ETAG_MISMATCH": "ABORTED",
    "DIRECTION_EXISTS": "ALREADY_EXISTS",
    "OPERATIONS_FULL": "RESOURCE_EXHAUSTED",
    "DIRECTIONS_FULL": "RESOURCE_EXHAUSTED",
    "INVERSION_MODEL_MISMATCH": "FAILED_PRECONDITION",
    "MODEL_NOT_READY": "FAILED_PRECONDITION",
    "QUEUE_FULL": "UNAVAILABLE",
    "DRAINING": "UNAVAILABLE",
    "MODEL_LOADING": "UNAVAILABLE",
    "WORKER_RESTARTED": "UNAVAILABLE",
    "STORE_UNAVAILABLE": "UNAVAILABLE",
    "DEADLINE_UNATTAINABLE": "DEADLINE_EXCEEDED",
    "DEADLINE_PASSED": "DEADLINE_EXCEEDED",
    "REQUEST_INCOMPLETE": "DEADLINE_EXCEEDED",
    "GPU_OUT_OF_MEMORY": "RESOURCE_EXHAUSTED",
    "CANCELLED": "CANCELLED",
    "METHOD_DISABLED": "UNIMPLEMENTED",
    "PAYLOAD_TOO_LARGE": "RESOURCE_EXHAUSTED",
    "REQUEST_UNDECODABLE": "INVALID_ARGUMENT",
    "RPC_UNKNOWN": "UNIMPLEMENTED",
    "STORE_CORRUPT": "DATA_LOSS",
    "MODEL_NON_FINITE": "INTERNAL",
    "NON_FINITE_LATENTS": "INVALID_ARGUMENT",
    "BUG": "INTERNAL",
}


def leaves(kind: type[UnderpaintError] = UnderpaintError) -> Iterator[type[UnderpaintError]]:
    for child in kind.__subclasses__():
        yield from leaves(child)
    if not kind.__subclasses__():
        yield kind


LEAVES = sorted(leaves(), key=lambda kind: kind.reason)


def an_error(kind: type[UnderpaintError], message: str = "why") -> UnderpaintError:
    return FieldInvalid(FieldViolation("a.b", message)) if kind is FieldInvalid else kind(message)


def test_the_table_covers_the_tree() -> None:
    assert {kind.reason: code_of(an_error(kind)).name for kind in LEAVES} == CODES


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.reason)
async def test_every_error_arrives_with_its_reason_and_the_requests_id(wire: Wire, kind: type[UnderpaintError]) -> None:
    wire.engine.refusals = [pickle.loads(pickle.dumps(an_error(kind)))]
    refusal = await refused(wire.edits.Edit(edit()))
    assert (refusal.code.name, refusal.reason) == (CODES[kind.reason], kind.reason)
    assert refusal.message == an_error(kind).message
    assert len(refusal.details["RequestInfo"].request_id) == 36


@pytest.mark.parametrize(
    ("error", "kind", "detail"),
    [
        (
            errors.InversionExpired("gone", metadata={"resource_type": "t", "resource_name": "n"}),
            "ResourceInfo",
            error_details_pb2.ResourceInfo(resource_type="t", resource_name="n", description="gone"),
        ),
        (
            errors.ModelNotReady("broken", metadata={"resource_name": "n"}),
            "PreconditionFailure",
            error_details_pb2.PreconditionFailure(
                violations=[{"type": "MODEL_NOT_READY", "subject": "n", "description": "broken"}]
            ),
        ),
        (
            FieldInvalid(FieldViolation("a", "x"), FieldViolation("b", "y")),
            "BadRequest",
            error_details_pb2.BadRequest(
                field_violations=[{"field": "a", "description": "x"}, {"field": "b", "description": "y"}]
            ),
        ),
        (
            errors.Draining("later"),
            "RetryInfo",
            error_details_pb2.RetryInfo(retry_delay={"seconds": 1}),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_details(wire: Wire, error: UnderpaintError, kind: str, detail: object) -> None:
    wire.engine.refusals = [error]
    assert (await refused(wire.edits.Edit(edit()))).details[kind] == detail


async def test_metadata_arrives(wire: Wire) -> None:
    wire.engine.refusals = [errors.DeadlineUnattainable("no", metadata={"estimate_s": "12.5"})]
    assert (await refused(wire.edits.Edit(edit()))).metadata == {"estimate_s": "12.5"}


@pytest.mark.parametrize("text", ["a" * 5000, "ä" * 5000, "\U0001f3a8" * 5000])
async def test_the_longest_error_fits_the_trailers_of_a_stock_client(wire: Wire, text: str) -> None:
    wire.engine.refusals = [
        FieldInvalid(*(FieldViolation(f"field_{number}", text) for number in range(40))),
        errors.InversionExpired(text, metadata={"resource_type": text, "resource_name": text}),
    ]
    field_invalid, expired = [await refused(wire.edits.Edit(edit())) for _ in range(2)]
    assert field_invalid.reason == "FIELD_INVALID"
    assert field_invalid.paths[0] == "field_0"
    assert expired.reason == "INVERSION_EXPIRED"


def test_only_unavailable_pushes_back() -> None:
    for kind in LEAVES:
        pushes = dict(trailers(an_error(kind), "id")).get("grpc-retry-pushback-ms")
        assert pushes == ("1000" if issubclass(kind, errors.Unavailable) else None)


def test_the_status_is_readable_without_this_package() -> None:
    status = status_pb2.Status.FromString(rich_status(errors.QueueFull("full"), "id").SerializeToString())
    assert [packed.type_url.rpartition(".")[2] for packed in status.details] == [
        "ErrorInfo",
        "RequestInfo",
        "RetryInfo",
    ]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stock_client_retries_what_is_unavailable_by_itself(wire: Wire, streamed: bool) -> None:
    from underpaint.v1 import edit_service_pb2, edit_service_pb2_grpc

    policy = {
        "methodConfig": [
            {
                "name": [{"service": "underpaint.v1.EditService"}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "60s",
                    "maxBackoff": "60s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
    # With a backoff of a minute, only the server's own hint lets this test end.
    wire.engine.refusals = [errors.QueueFull("full", retry_after_s=0.01) for _ in range(2)]
    options = [("grpc.service_config", json.dumps(policy)), ("grpc.enable_retries", 1)]
    async with grpc.aio.insecure_channel(wire.address, options=options) as channel:
        stub = edit_service_pb2_grpc.EditServiceStub(channel)
        if streamed:
            call = stub.StreamEdit(edit_service_pb2.StreamEditRequest(edit=edit()))
            kinds = [event.WhichOneof("event") async for event in call]
            assert (kinds[0], kinds[-1]) == ("accepted", "result")
        else:
            assert (await stub.Edit(edit())).image.content
    assert wire.engine.refusals == []
    assert len(wire.engine.jobs) == 1


def test_no_text_shows_an_address_of_the_process() -> None:
    text = "cannot identify image file <_io.BytesIO object at 0x7f0c2a7beb90>"
    for error in (errors.ImageUndecodable(text), errors.FieldInvalid(errors.FieldViolation("image", text))):
        status = rich_status(error, "")
        assert "object" in str(status)
        assert "0x7f0c" not in str(status)
        assert b"0x7f0c" not in trailers(error, "")[0][1]
