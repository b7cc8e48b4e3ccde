"""On a CUDA device, nothing in a step waits for the device: the host would stop queueing work, and the device idle."""

import queue
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.host_waits import HostWaits
from support.jobs import (
    every_kind_of_job,
    injection,
    injection_job,
)
from torch import Tensor
from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.backends.toy import ToyBackend
from underpaint_server.engine.loop import Engine
from underpaint_server.engine.messages import Ended, Order, Report, StartJob, Stop
from underpaint_server.errors import UnderpaintError
from underpaint_server.jobs import Job, LearnJob, Priority
from underpaint_server.models import tensors
from underpaint_server.rows import Batch, Denoise, Embed
from underpaint_server.settings import Settings

PX = 32


def waits_of(job: Job) -> Counter[str]:
    """Where the host would wait while the engine runs the job."""
    backend = ToyBackend("toy", Settings())
    inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
    outcomes: list[Any] = []

    def report(message: Report) -> None:
        if isinstance(message, Ended):
            outcomes.append(message.outcome)
            inbox.put(Stop())

    engine = Engine({"toy": backend}, inbox, report, 16, 0.25)
    inbox.put(StartJob(1, job, Priority.NORMAL, time.monotonic(), None, 0))
    with HostWaits() as waits:
        engine.run()
    assert not isinstance(outcomes[0], UnderpaintError), outcomes[0]
    return Counter(waits.places)


def jobs_of(steps: int) -> Sequence[Job]:
    calibrated = injection(calibration=0.3, boosting_start=0.5, sites=("mid", "up_0"), injection_end=0.0)
    return [
        *every_kind_of_job("toy", PX, steps),
        injection_job("toy", PX, calibrated, steps=steps, guidance_scale=2.0),
    ]


JOBS = list(zip(jobs_of(6), jobs_of(12), strict=True))


def _name(pair: tuple[Job, Job]) -> str:
    job = pair[0]
    source = "" if isinstance(job, LearnJob) else f" {type(job.source).__name__}"
    method = getattr(job, "method", None) or getattr(job, "options", None)
    return f"{type(job).__name__} {type(method).__name__}{source}"


@pytest.mark.parametrize("pair", JOBS, ids=_name)
def test_twice_the_steps_do_not_wait_more_often(pair: tuple[Job, Job]) -> None:
    few, many = (waits_of(job) for job in pair)
    assert many - few == Counter(), "so often in the steps added"


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample", "ddpm", "ddpm sample"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    family, _, prediction = request.param.rpartition(" ") if " " in request.param else (request.param, "", "")
    directory: Path = tmp_path_factory.mktemp("model") / "one"
    if family == "ddpm":
        checkpoints.build_ddpm(directory, prediction_type=prediction or "epsilon")
    else:
        checkpoints.build(directory, prediction_type=family)
    return load(str(directory), "users", Settings(backend="torch", exact_batching="pinned"))


def test_a_pass_of_the_network_does_not_wait(backend: Backend) -> None:
    """Plain rows, and rows whose activations are captured and mapped."""
    info = backend.facts.info
    shape = backend.facts.latent_shape(info.width, info.height)
    (text,) = backend.predict(Batch([Embed("a red apple")], 4))
    wants: tuple[dict[str, Any], ...] = ({}, {"capture": info.feature_sites}, {"maps": {"mid": torch.tanh}}, {})
    alpha_bars = (0.5, 0.1, 0.9, 1.0)
    rows = [
        Denoise(torch.ones(shape).double(), 7 * i, alpha_bars[i], text.prompt_embeds, **want)
        for i, want in enumerate(wants)
    ]
    with HostWaits() as waits:
        backend.predict(Batch(rows, 4))
    assert waits.places == []


def test_a_copy_to_another_device_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # needs a device that copies by itself
    with HostWaits() as waits:
        copied = tensors.to_device(torch.ones(2), torch.device("meta"))
    assert copied.device.type == "meta"
    assert waits.places == []
