"""What the metrics page says, against what was asked for and answered."""

from collections import Counter
from typing import Any

from e2e.harness import Samples, eventually, idle, masking, queued, running, scrape, stubs, together
from support.front import edit, merged, photo, refused
from support.promtool import lint, promtool
from underpaint.v1 import edit_service_pb2, inversion_service_pb2
from underpaint_server.local_server import LocalServer

ROWS = "underpaint_network_rows_total"


def invert(kind: str, seed: int, **fields: Any) -> inversion_service_pb2.InvertRequest:
    request = inversion_service_pb2.InvertRequest(image=photo(seed=seed), **fields)
    request.MergeFrom(merged(inversion_service_pb2.InvertRequest(), parameters={kind: {}, "steps": 6}))
    return request


async def test_the_counters_say_what_was_asked_for() -> None:
    with LocalServer(models="toy=toy:,pinned=toy:pinned", max_running=4) as server:
        async with stubs(server) as wire:
            edits, inversions = wire.edits, wire.inversions
            asked = [
                *(("edict", edits.Edit(edit("edict", image=photo(seed=n)))) for n in range(5)),
                *(("ddim", edits.Edit(edit("ddim", image=photo(seed=n)))) for n in range(2)),
                *(("sdedit", edits.Edit(edit("sdedit", seed=n))) for n in range(3)),
                ("sdedit", edits.Edit(edit("sdedit", generated={"prompt": "a cat", "steps": 4}))),
                ("diffedit", edits.Edit(edit("diffedit", image=photo(seed=9)))),
                ("mask", edits.ComputeMask(edit_service_pb2.ComputeMaskRequest(edit=edit("diffedit")))),
                ("invert_edict", inversions.Invert(invert("edict", 10, verify=True))),
                ("invert_ddim", inversions.Invert(invert("ddim", 11))),
            ]
            answers = await together(server, (call for _, call in asked), inside=12)
            told = await refused(edits.Edit(edit("sdedit", guidance_scale=-1)))
        assert told.reason == "FIELD_INVALID"
        now = await idle(server)
    methods = Counter(method for method, _ in asked)
    spent: Counter[str] = Counter()
    for (method, _), answer in zip(asked, answers, strict=True):
        spent[method] += answer.usage.network_evaluations - answer.usage.reused_evaluations
    assert {method: rows for method, rows in now.by(ROWS, "method").items() if rows} == spent
    assert now.sum("underpaint_batch_rows_sum") == now.sum(ROWS) == sum(spent.values())
    steps = now.sum("underpaint_denoising_steps_total")
    assert now.sum("underpaint_batch_rows_count") == now.sum("underpaint_pass_seconds_count", kind="denoise") == steps
    assert now.sum(ROWS) / steps > 2.5, "jobs shared passes"
    for method, count in methods.items():
        assert now.sum("underpaint_requests_total", method=method, code="OK") == count
        assert now.sum("underpaint_request_queue_time_seconds_count", method=method) == count
    assert now.sum("underpaint_requests_total", code="INVALID_ARGUMENT", reason="FIELD_INVALID", method="sdedit") == 1
    assert now.sum("grpc_server_handled_total", grpc_method="Edit", grpc_code="OK") == sum(methods.values()) - 3
    assert now.sum("grpc_server_started_total", grpc_method="Edit") == sum(methods.values()) - 2
    assert now.sum("underpaint_image_pixels_count") == len(asked) - 1
    assert now.sum("underpaint_inversion_store_entries") == 5 + 2 + 1 + 2
    assert now.sum("underpaint_inversion_store_bytes") > 0
    _is_at_rest(now)


async def test_padding_is_what_a_pinned_pass_holds_beside_its_rows() -> None:
    with LocalServer(models="toy=toy:pinned", exact_batch_class=8) as server:
        async with stubs(server) as wire:
            for seed in range(3):
                described = {"source_prompt": "a cat"}  # so that inverting is guided too
                await wire.edits.Edit(edit("edict", image=photo(seed=seed), inversion_parameters=described))
        now = await idle(server)
    assert now.sum("underpaint_padding_rows_total") == 8 * now.sum("underpaint_denoising_steps_total") - now.sum(ROWS)
    assert now.sum("underpaint_padding_rows_total") == 3 * now.sum(ROWS), "two rows of eight are useful"


async def test_the_gauges_follow_the_queue(narrow: LocalServer) -> None:
    await idle(narrow)
    async with stubs(narrow) as wire:
        await wire.edits.Edit(edit("sdedit"))  # so that there is a pace
        async with running(wire, masking(priority=1)), running(wire, masking(priority=3)):
            calls = [await queued(wire, edit("sdedit", priority=p)) for p in (1, 3, 3)]
            busy = scrape(narrow)
            for call in calls:
                call.cancel()
    assert busy.sum("underpaint_num_requests_running") == 2
    assert busy.by("underpaint_num_requests_waiting", "priority") == {
        "learning": 0, "batch": 1, "normal": 0, "interactive": 2,
    }  # fmt: skip
    assert busy.sum("underpaint_estimated_backlog_seconds") > 0
    _is_at_rest(await idle(narrow))


async def page_of(server: LocalServer) -> str:
    """The metrics page after an edit."""
    async with stubs(server) as wire:
        await wire.edits.Edit(edit("edict"))
    return (await idle(server)).text


async def test_the_page_is_what_prometheus_wants(toy: LocalServer) -> None:
    page = await page_of(toy)
    assert lint(page) == []
    assert "underpaint_build_info" in page


async def test_the_page_passes_promtool(toy: LocalServer) -> None:
    assert promtool(await page_of(toy)) == []


async def test_every_call_is_one_line_in_the_log_with_its_request_id(toy: LocalServer) -> None:
    async with stubs(toy) as wire:
        request_id = "0b9f3a52-6a53-4c38-9d36-7f1b3ad1a001"
        await wire.edits.Edit(edit("ddim", request_id=request_id))
        told = await refused(wire.edits.Edit(edit("sdedit", guidance_scale=-1)))
    ids = {request_id, told.details["RequestInfo"].request_id}

    def logged() -> dict[str, Any] | None:
        found = {line["request_id"]: line for line in toy.events() if line["event"] == "rpc"}
        return found if ids <= found.keys() else None

    lines = await eventually(logged)  # lines are written soon after the answers
    line = lines[request_id]
    assert (line["rpc"], line["method"], line["model"], line["code"], line["reason"]) == (
        "underpaint.v1.EditService/Edit", "ddim", "toy", "OK", "",
    )  # fmt: skip
    assert lines[told.details["RequestInfo"].request_id]["reason"] == "FIELD_INVALID"


def _is_at_rest(now: Samples) -> None:
    for name in ("num_requests_running", "num_requests_waiting", "estimated_backlog_seconds"):
        assert now.sum(f"underpaint_{name}") == 0
