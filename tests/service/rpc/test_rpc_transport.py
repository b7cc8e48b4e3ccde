"""Calls that the gRPC library could answer by itself: our reason, one line without a trace, and they are counted."""

import gzip
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import structlog
from support import http2
from support.front import SETTINGS, Refusal, Wire, edit, photo, refused, started
from support.waiting import until
from underpaint.v1 import direction_service_pb2, edit_service_pb2, types_pb2

EDIT = "/underpaint.v1.EditService/Edit"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNKNOWN_FIELD = b"\xf8\x3f\x01"
"""Number 1023, the varint 1."""


@pytest.fixture
def lines() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        yield captured


def counted(wire: Wire) -> dict[tuple[str, str, str], float]:
    """(rpc, code, reason) -> calls."""
    family = next(f for f in wire.metrics.registry.collect() if f.name == "underpaint_requests")
    return {
        (sample.labels["rpc"], sample.labels["code"], sample.labels["reason"]): sample.value
        for sample in family.samples
        if sample.name.endswith("_total")
    }


async def requests(*raw: bytes) -> AsyncIterator[bytes]:
    for one in raw:
        yield one


async def sent(wire: Wire, path: str, *raw: bytes) -> Refusal:
    """The refusal of a call with these bytes as its messages."""
    stub: Any = wire.channel.stream_stream(path)
    return await refused(stub(requests(*raw)))


PATHS = [
    EDIT, "/underpaint.v1.EditService/StreamEdit", "/underpaint.v1.InversionService/Invert",
    "/underpaint.v1.DirectionService/LearnDirection", "/underpaint.v1.DirectionService/ImportDirection",
    "/google.longrunning.Operations/GetOperation", "/grpc.health.v1.Health/Check",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("raw", [b"\xff\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
async def test_bytes_that_are_no_message_are_the_callers_fault(
    wire: Wire, lines: list[Any], path: str, raw: bytes
) -> None:
    refusal = await sent(wire, path, raw)
    assert (refusal.code, refusal.reason) == (INVALID, "REQUEST_UNDECODABLE")
    rpc = path.rpartition("/")[2]
    assert counted(wire) == {(rpc, "INVALID_ARGUMENT", "REQUEST_UNDECODABLE"): 1}
    (line,) = lines
    assert (line["rpc"], line["code"], line["reason"]) == (path[1:], "INVALID_ARGUMENT", "REQUEST_UNDECODABLE")
    assert "exc_info" not in line
    assert " at 0x" not in repr((refusal, line))


@pytest.mark.parametrize(("messages", "words"), [(0, "no request message"), (2, "more than one")])
async def test_a_unary_call_has_exactly_one_message(wire: Wire, lines: list[Any], messages: int, words: str) -> None:
    refusal = await sent(wire, EDIT, *[edit("ddim").SerializeToString()] * messages)
    assert (refusal.code, refusal.reason) == (INVALID, "REQUEST_UNDECODABLE")
    assert words in refusal.message
    assert wire.engine.jobs == []
    assert len(lines) == 1


@pytest.mark.parametrize("path", ["/underpaint.v1.EditService/Undo", "/none/None", "/x", "/a/" + "b" * 5000])
async def test_an_rpc_that_is_none_of_ours_is_counted_without_its_name(wire: Wire, lines: list[Any], path: str) -> None:
    refusal = await sent(wire, path, b"anything")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "RPC_UNKNOWN")
    assert counted(wire) == {("", "UNIMPLEMENTED", "RPC_UNKNOWN"): 1}
    (line,) = lines
    assert path[1:].startswith(line["rpc"])
    assert len(line["rpc"]) <= 120


async def test_a_message_larger_than_the_limit_is_refused_with_our_reason(lines: list[Any]) -> None:
    limit = 100_000
    async with started(SETTINGS.model_copy(update={"max_message_bytes": limit})) as wire:
        request = edit(image=types_pb2.Image(content=bytes(limit)))
        for call in (wire.edits.Edit(request), wire.edits.StreamEdit(edit_service_pb2.StreamEditRequest(edit=request))):
            refusal = await refused(call)
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")
            assert refusal.metadata["limit"] == str(limit)
            assert int(refusal.metadata["actual"]) > limit
        # The transport refuses what is far larger before it has received it; that has its own text, and is counted.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.edits.Edit(edit(image=types_pb2.Image(content=bytes(3 * limit))))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await until(lambda: counted(wire).get(("Edit", "CANCELLED", "CANCELLED")) == 1)
        assert wire.engine.jobs == []
        assert all("exc_info" not in line for line in lines)


async def test_an_answer_larger_than_the_limit_is_refused_with_our_reason(lines: list[Any]) -> None:
    async with started(SETTINGS.model_copy(update={"max_message_bytes": 8_000})) as wire:
        refusal = await refused(wire.edits.Edit(edit("sdedit", image=photo((32, 24)))))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "PAYLOAD_TOO_LARGE")
        assert "the answer" in refusal.message


async def test_compressed_messages_are_read(wire: Wire) -> None:
    answer = await wire.edits.Edit(edit("ddim"), compression=grpc.Compression.Gzip)
    assert answer.image.content


async def test_a_message_that_is_large_only_when_decompressed_is_refused(lines: list[Any]) -> None:
    async with started(SETTINGS.model_copy(update={"max_message_bytes": 100_000})) as wire:
        large = edit(image=types_pb2.Image(content=bytes(50_000_000)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await wire.edits.Edit(large, compression=grpc.Compression.Gzip)
        assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, INVALID)
        await until(lambda: sum(counted(wire).values()) == 1)
        assert wire.engine.jobs == []
        assert all("exc_info" not in line for line in lines)


ODD = {
    "an encoding that nobody has": ([http2.message(b"x", compressed=1)], [(b"grpc-encoding", b"none-such")]),
    "bytes that are not compressed": ([http2.message(b"x", compressed=1)], [(b"grpc-encoding", b"gzip")]),
    "compressed without a word of it": ([http2.message(gzip.compress(b"x"), compressed=1)], []),
    "a binary header that is none": ([http2.message(b"")], [(b"x-trace-bin", b"!!!")]),
    "a timeout that is none": ([http2.message(b"")], [(b"grpc-timeout", b"soon")]),
    "no time at all": ([http2.message(b"")], [(b"grpc-timeout", b"0n")]),
    "half a message": ([http2.message(bytes(100))[:20]], []),
    "no message": ([], []),
    "a header of other bytes": ([http2.message(b"")], [(b"x-name", b"\xff\xfe")]),
}


@pytest.mark.parametrize("case", ODD)
async def test_what_no_client_would_send_is_counted_and_leaves_no_trace(
    wire: Wire, lines: list[Any], case: str
) -> None:
    messages, headers = ODD[case]
    await http2.send(wire.address, http2.call(EDIT.encode(), *messages, headers=headers))
    await until(lambda: sum(counted(wire).values()) == 1)
    ((rpc, code, reason),) = counted(wire)
    assert (rpc, code) in {("Edit", "CANCELLED"), ("Edit", "INVALID_ARGUMENT"), ("Edit", "DEADLINE_EXCEEDED")}
    assert reason
    assert [line["event"] for line in lines] == ["rpc"]
    await wire.edits.Edit(edit("ddim"))


async def test_a_caller_that_leaves_before_its_message_is_counted(wire: Wire, lines: list[Any]) -> None:
    call: Any = wire.channel.stream_stream(EDIT)()
    await until(
        lambda: wire.metric(
            "grpc_server_started_total",
            grpc_service="underpaint.v1.EditService",
            grpc_method="Edit",
            grpc_type="unary",
        )
    )
    call.cancel()
    await until(lambda: counted(wire) == {("Edit", "CANCELLED", "CANCELLED"): 1})
    assert [line["event"] for line in lines] == ["rpc"]


# --- fields of another contract -----------------------------------------------------------------------------------


def spoiled(message: Any, *path: str) -> Any:
    """The message with one unknown field more, in the nested message at ``path``."""
    inner = message
    for name in path:
        inner = getattr(inner, name)
    inner.MergeFromString(UNKNOWN_FIELD)
    return message


UNKNOWN = {
    "1023": lambda: spoiled(edit()),
    "image.1023": lambda: spoiled(edit(), "image"),
    "sdedit.1023": lambda: spoiled(edit("sdedit"), "sdedit"),
    "inversion_parameters.edict.1023": lambda: spoiled(edit("edict"), "inversion_parameters", "edict"),
}


@pytest.mark.parametrize("path", UNKNOWN)
async def test_a_field_that_the_contract_does_not_have_is_named(wire: Wire, path: str) -> None:
    refusal = await refused(wire.edits.Edit(UNKNOWN[path]()))
    assert (refusal.code, refusal.reason, refusal.paths) == (INVALID, "FIELD_INVALID", [path])
    nested = edit_service_pb2.StreamEditRequest(edit=UNKNOWN[path]())
    assert (await refused(wire.edits.StreamEdit(nested))).paths == [f"edit.{path}"]
    assert wire.engine.jobs == []


async def test_an_unknown_field_of_a_repeated_message_is_named_with_its_place(wire: Wire) -> None:
    request = direction_service_pb2.LearnDirectionRequest()
    for _ in range(2):
        request.examples.add()
    spoiled(request.examples[1])
    assert (await refused(wire.directions.LearnDirection(request))).paths == ["examples[1].1023"]


async def test_several_unknown_fields_are_all_named_and_millions_are_not(wire: Wire) -> None:
    raw = edit().SerializeToString()
    both = await sent(wire, EDIT, raw + UNKNOWN_FIELD + b"\xf0\x3f\x01" + UNKNOWN_FIELD)
    assert both.paths == ["1023", "1022"]
    many = await sent(wire, EDIT, raw + UNKNOWN_FIELD * 1_000_000)
    assert (many.reason, many.paths) == ("FIELD_INVALID", ["*"])
    assert "3000000 bytes" in many.message


async def test_an_unusual_encoding_of_known_fields_is_read(wire: Wire) -> None:
    ddim = edit("ddim")
    raw = ddim.SerializeToString() + edit_service_pb2.EditRequest(target_prompt="another").SerializeToString()
    stub: Any = wire.channel.unary_unary(EDIT)
    answer = await stub(raw)  # a field that comes twice: the last value counts
    resolved = edit_service_pb2.EditResponse.FromString(answer).resolved
    assert resolved.target_prompt == "another"


async def test_a_stream_of_requests_is_checked_message_by_message(wire: Wire) -> None:
    path = "/underpaint.v1.DirectionService/ImportDirection"
    refusal = await sent(wire, path, b"\x0a\x00", UNKNOWN_FIELD)
    assert (refusal.reason, refusal.paths) == ("FIELD_INVALID", ["1023"])
