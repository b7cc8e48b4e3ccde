"""What learning asks for, and what is made of the answers: no server needed."""

from typing import Any

import pytest
from google.longrunning import operations_pb2
from google.rpc import error_details_pb2, status_pb2
from PIL import Image
from underpaint import Disentangled, Generated, GradientLearning, Phase, Sampler, SearchLearning, _requests, _responses
from underpaint import errors as e
from underpaint.v1 import direction_service_pb2 as d
from underpaint.v1 import edit_service_pb2, types_pb2

PHOTO = Image.new("RGB", (8, 8), "red")
EDIT: dict[str, Any] = {
    "source_prompt": "", "negative_prompt": "", "seed": None, "guidance_scale": None, "fit": None, "model": "",
    "output_media_type": "", "priority": None, "request_id": None,
}  # fmt: skip
LEARN: dict[str, Any] = {
    "name": "", "display_name": "", "steps": None, "sampler": None, "guidance_scale": None, "method": None,
    "content_weight": None, "seed": None, "fit": None, "model": "", "request_id": None,
}  # fmt: skip

MIXES = [
    (Disentangled(direction="joy"), {"direction": "directions/joy"}),
    (Disentangled(direction="directions/joy", scale=0.0), {"direction": "directions/joy", "scale": 0}),
    (Disentangled(switch_step=0, steps=9, sampler="plms"), {"switch_step": 0, "steps": 9, "sampler": 2}),
    (Disentangled(weights=[1, 0.5], sampler=Sampler.DDIM), {"given": {"values": [1, 0.5]}, "sampler": 1}),
    (Disentangled(weights=()), {"given": {}}),
]


@pytest.mark.parametrize(("method", "expected"), MIXES)
def test_a_disentangled_edit_arrives_as_itself(method, expected):
    work = _requests.edit(PHOTO, "t", method, **EDIT | {"source_prompt": "s"})
    assert work.request.disentangled == edit_service_pb2.DisentangledEdit(source_prompt="s", **expected)
    assert work.request.disentangled.WhichOneof("weights") in expected
    assert not work.request.HasField("inversion_parameters")
    drawn = _requests.edit(Generated("s", 1), "t", method, **EDIT).request
    assert (drawn.WhichOneof("source"), drawn.disentangled.source_prompt) == ("generated", "")


@pytest.mark.parametrize("wrong", [{}, {"direction": "x", "switch_step": 1}, {"switch_step": 1, "weights": [1]}])
def test_a_disentangled_edit_has_its_weights_from_one_place(wrong):
    with pytest.raises(ValueError, match="one of direction, switch_step and weights"):
        _requests.edit(PHOTO, "t", Disentangled(**wrong), **EDIT)


def test_all_that_learning_can_say_arrives():
    more = {
        "name": "directions/joy", "display_name": "Joy", "steps": 9, "sampler": "plms", "guidance_scale": 0.0,
        "content_weight": 0.0, "seed": 0, "fit": "pad", "model": "mini",
    }  # fmt: skip
    method = GradientLearning(optimization_steps=3, learning_rate=0.5, switch_step=0, late_weight=0.0)
    request = _requests.learn("s", "t", [PHOTO, 0], **LEARN | more | {"method": method})
    assert len(request.request_id) == 36
    assert request.examples[0].image.content.startswith(b"\x89PNG")
    assert request.examples[0].image.fit == types_pb2.FIT_PAD
    request.examples[0].image.Clear()
    request.request_id = ""
    assert request == d.LearnDirectionRequest(
        direction_id="joy",
        direction=d.Direction(
            display_name="Joy", model="models/mini", source_prompt="s", target_prompt="t", steps=9,
            sampler=types_pb2.SAMPLER_PLMS, guidance_scale=0.0,
        ),
        examples=[d.DirectionExample(image=types_pb2.Image()), d.DirectionExample(seed=0)],
        content_weight=0.0, seed=0, method=d.LEARN_METHOD_GRADIENT,
        optimization_steps=3, learning_rate=0.5, switch_step=0, late_weight=0.0,
    )  # fmt: skip


def test_a_search_says_its_candidates_or_nothing():
    plain = _requests.learn("s", "t", [1], **LEARN | {"method": SearchLearning()})
    assert (plain.method, plain.HasField("candidates")) == (d.LEARN_METHOD_SEARCH, False)
    method = SearchLearning(switch_steps=[0, 2], late_weights=[0.0])
    request = _requests.learn("s", "t", [1], **LEARN | {"method": method})
    assert request.candidates == d.SearchCandidates(switch_steps=[0, 2], late_weights=[0.0])
    with pytest.raises(TypeError, match="GradientLearning"):
        _requests.learn("s", "t", [1], **LEARN | {"method": "search"})


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_an_import_is_cut_into_chunks_with_the_checksum_last(size):
    content = bytes(size)
    header, *chunks = _requests.import_direction(content, "joy", "Joy", 7)
    assert (header.header.name, header.header.display_name) == ("directions/joy", "Joy")
    assert b"".join(part.chunk for part in chunks) == content
    assert all(len(part.chunk) <= 1 << 20 for part in chunks)
    assert [part.HasField("crc32c") for part in (header, *chunks)][-1]


def test_an_operation_under_way():
    message = operations_pb2.Operation(name="operations/x")
    message.metadata.Pack(types_pb2.Progress(phase=types_pb2.PHASE_OPTIMIZING, step=3, total_steps=9, loss=0.1))
    now = _responses.operation(message)
    assert (now.name, now.done, now.direction, now.error) == ("operations/x", False, None, None)
    assert (now.progress.phase, now.progress.step, now.progress.loss) == (Phase.OPTIMIZING, 3, 0.1)


def test_an_operation_that_learned_something():
    message = operations_pb2.Operation(name="operations/x", done=True)
    message.response.Pack(
        d.Direction(
            name="directions/joy",
            weights=[1, 0.7],
            losses=[0.1],
            sampler=types_pb2.SAMPLER_PLMS,
            method=d.LEARN_METHOD_SEARCH,
        )
    )
    direction = _responses.operation(message).direction
    assert (str(direction), direction.weights, direction.losses) == ("directions/joy", (1.0, 0.7), (0.1,))
    assert (direction.sampler, direction.method, direction.create_time) == (Sampler.PLMS, "search", None)


def test_an_operation_that_failed_has_the_error_a_call_would_raise():
    status = status_pb2.Status(code=3, message="no")
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="NON_FINITE_LATENTS", domain="underpaint"))
    status.details.add().Pack(error_details_pb2.RequestInfo(request_id="r"))
    now = _responses.operation(operations_pb2.Operation(done=True, error=status))
    assert isinstance(now.error, e.NonFiniteLatents)
    assert (now.error.message, now.error.request_id) == ("no", "r")
    cancelled = _responses.operation(operations_pb2.Operation(done=True, error=status_pb2.Status(code=1)))
    assert type(cancelled.error) is e.Cancelled
