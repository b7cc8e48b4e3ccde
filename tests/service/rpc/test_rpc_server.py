"""The process: its flags, its ports, its signals, and what it must not load."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.front import edit, refused
from underpaint.v1 import edit_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc

SERVER = (sys.executable, "-m", "underpaint_server")


@asynccontextmanager
async def running(*flags: str) -> AsyncIterator[tuple[Process, dict[str, Any]]]:
    """A server on free ports, and its first log line."""
    free = ("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--threads", "1")
    process = await asyncio.create_subprocess_exec(*SERVER, *free, *flags, stderr=PIPE)
    try:
        yield process, await line(process, "listening")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line(process: Process, event: str) -> dict[str, Any]:
    assert process.stderr is not None
    async for raw in process.stderr:
        parsed: dict[str, Any] = json.loads(raw)
        if parsed["event"] == event:
            return parsed
    raise AssertionError(f"the server ended without '{event}'")


async def test_the_port_opens_while_the_model_loads_and_sigterm_ends_it_cleanly() -> None:
    async with running() as (process, listening), grpc.aio.insecure_channel(listening["address"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        startup = await health.Check(health_pb2.HealthCheckRequest(service="startup"), wait_for_ready=True)
        assert startup.status == health_pb2.HealthCheckResponse.NOT_SERVING
        refusal = await refused(edit_service_pb2_grpc.EditServiceStub(channel).Edit(edit()))
        assert refusal.reason == "MODEL_LOADING"
        models = model_service_pb2_grpc.ModelServiceStub(channel)
        listed = await models.ListModels(model_service_pb2.ListModelsRequest())
        assert [model.name for model in listed.models] == [f"models/{name}" for name in listening["models"]]
        url = f"http://{listening['metrics_address']}/metrics"
        scraped = (await asyncio.to_thread(urllib.request.urlopen, url)).read().decode()
        assert (
            'underpaint_requests_total{code="UNAVAILABLE",method="edict",reason="MODEL_LOADING",rpc="Edit"} 1'
            in scraped
        )
        assert "underpaint_queue_capacity 64.0" in scraped
        process.send_signal(signal.SIGTERM)
        assert (await line(process, "draining"))["signal"] == "SIGTERM"
        await line(process, "stopped")
        assert await process.wait() == 0


async def test_a_taken_port_is_an_error_and_not_a_second_server() -> None:
    async with running("--models", "toy=toy:") as (process, listening):
        second = await asyncio.create_subprocess_exec(
            *SERVER, "--listen", listening["address"], "--metrics-listen", "127.0.0.1:0", stderr=PIPE
        )
        _, stderr = await second.communicate()
        assert second.returncode == 1
        assert listening["address"] in stderr.decode()
        assert process.returncode is None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--max-steps", "0"), "max_steps"),
        (("--models", "nonsense"), "not ID=DIRECTORY"),
        (("--models", "mini=,=/dir"), "not ID=DIRECTORY"),
        (("--listen", "localhost"), "listen: 'localhost' is not HOST:PORT"),
        (("--metrics-listen", "localhost"), "metrics_listen: 'localhost' is not HOST:PORT"),
        (("--listen", "localhost:99999"), "'localhost:99999' is not HOST:PORT"),
        (("--exact-batch-class", "1"), "exact_batch_class: a pass has at least 2 rows"),
        (("--listen", "::1:50051"), "[::1]:50051"),
        (("--log-level", "loud"), "log_level"),
        (("--no-such-flag", "1"), "no-such-flag"),
    ],
)
def test_bad_flags_are_told_in_a_line_each(flags: tuple[str, ...], told: str) -> None:
    ended = subprocess.run((*SERVER, *flags), capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("underpaint-server: ")
    assert told in last


def test_a_host_nobody_knows_is_told() -> None:
    for flag in ("--listen", "--metrics-listen"):
        free = {"--listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0"} | {flag: "no-such-host.invalid:1"}
        flags = [word for pair in free.items() for word in pair]
        ended = subprocess.run((*SERVER, *flags), capture_output=True, text=True, check=False)
        assert ended.returncode == 1
        assert "no-such-host.invalid:1" in ended.stderr
        assert "Traceback" not in ended.stderr


def test_a_store_nobody_knows_is_told() -> None:
    ended = subprocess.run((*SERVER, "--store-url", "ftp://x"), capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ftp" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_help_names_every_flag_with_its_variable_s_prefix() -> None:
    help_ = subprocess.run((*SERVER, "--help"), capture_output=True, text=True, check=True).stdout
    assert "--metrics-listen" in help_
    assert "UNDERPAINT_" in help_


def test_the_front_never_loads_the_network_nor_the_entry_point_the_front() -> None:
    code = "import sys, {}; print(*({{'torch', 'diffusers', 'transformers', 'grpc'}} & sys.modules.keys()))"
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    for module, loaded in (("underpaint_server.server", "grpc"), ("underpaint_server.__main__", "")):
        ended = subprocess.run(
            (sys.executable, "-c", code.format(module)), capture_output=True, text=True, check=True, env=env
        )
        assert ended.stdout.strip() == loaded
