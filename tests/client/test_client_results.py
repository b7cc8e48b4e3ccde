"""What the caller gets for what the server sent."""

import io
import json
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from PIL import Image
from underpaint import (
    ContentInjection,
    DdimInversion,
    DiffEdit,
    Edict,
    EdictInversion,
    Fit,
    Phase,
    Resolved,
    SdEdit,
    errors,
)
from underpaint.v1 import edit_service_pb2, types_pb2


def test_an_edit_has_picture_cost_fitting_and_starting_point(client, server, photo):
    result = client.edit(photo, "t", seed=7)
    assert result.image.size == (8, 8)
    assert result.image_bytes.startswith(b"\x89PNG")
    assert result.mask is None
    assert result.inversion.name in server.inversions
    assert (result.usage.queue_time_s, result.usage.compute_time_s) == (0.25, 1.5)
    assert (result.usage.network_evaluations, result.usage.mean_batch_size) == (40, 1.5)
    assert result.usage.reused_evaluations == 16
    assert result.usage.inversion_cache_hit
    assert result.notices == ()
    assert result.resolved.seed == 7


def test_fitting_maps_points_back_to_the_photo(client, photo):
    fitting = client.edit(photo, "t").fitting
    assert (fitting.fit, fitting.source_size, fitting.size) == (Fit.CROP, (200, 100), (64, 64))
    assert fitting.to_source(0, 0) == (50, 0)
    assert fitting.to_source(64, 32) == (150, 50)


def test_masks_and_notices_are_there_when_the_method_has_them(client, photo):
    result = client.edit(photo, "t", DiffEdit())
    assert result.mask.getpixel((0, 0)) == (255, 255, 255)
    assert [notice.reason for notice in result.notices] == ["MASK_FULL"]


def test_an_inversion_says_how_and_how_well(client, photo):
    inversion = client.invert(photo, source_prompt="a", verify=True)
    assert inversion.parameters.method == EdictInversion(mixing_coefficient=0.93)
    assert (inversion.parameters.steps, inversion.parameters.strength) == (10, 0.8)
    assert (inversion.reconstruction_psnr_db, inversion.reconstruction_max_abs_error) == (41.5, 1.25e-14)
    assert inversion.create_time == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert inversion.usage.network_evaluations == 20
    looked_up = client.get_inversion(inversion)
    assert looked_up.usage is None
    assert looked_up.name == str(inversion)


def test_an_unverified_inversion_says_nothing_about_errors(client, photo):
    inversion = client.invert(photo, method=DdimInversion())
    assert inversion.reconstruction_psnr_db is None
    assert isinstance(inversion.parameters.method, DdimInversion)


def test_a_mask_brings_its_difference_without_numpy(client, photo):
    mask = client.compute_mask(photo, "t")
    assert mask.difference.shape == (2, 3)
    assert mask.difference.tolist() == [[0.5, 1.0, 0.5], [1.0, 0.5, 1.0]]
    assert mask.coverage == 0.25
    assert mask.image.size == (8, 8)


def test_models_and_limits(client, server):
    models = client.models()
    assert [model.name for model in models] == ["models/mini", "models/other"]
    assert len(server.named("ListModels")) == 2  # one a page
    assert client.model("other") == models[1]
    assert models[0].limits.max_image_bytes == 5000
    assert models[0].methods == ("edict", "diffedit")
    assert (models[0].exact_batching, models[0].batch_class, models[0].backend) == ("fixed_size", 4, "torch")
    with pytest.raises(errors.ModelNotFound):
        client.model("absent")


def test_listing_fetches_page_after_page(client, server, photo):
    made = [client.invert(photo, steps=steps).name for steps in (1, 2, 3, 4, 5)]
    assert [each.name for each in client.collect("list_inversions", page_size=2)] == made[::-1]
    assert [request.page_token for request in server.named("ListInversions")] == ["", "2", "4"]


def test_deleting(client, photo):
    inversion = client.invert(photo)
    client.delete_inversion(inversion)
    client.delete_inversion(inversion, allow_missing=True)
    with pytest.raises(errors.InversionExpired):
        client.delete_inversion(inversion)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_saving_in_the_format_of_the_name(client, photo, tmp_path, suffix):
    result = client.edit(photo, "t")
    written = result.save(tmp_path / f"out{suffix}")
    assert (written.read_bytes() == result.image_bytes) == (suffix == ".png")
    with Image.open(written) as picture:
        assert picture.size == (8, 8)


def test_saving_under_another_suffix_is_refused(client, photo, tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.jpg"):
        client.edit(photo, "t").save(tmp_path / "out.gif")


# --- the same again -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Edict(), SdEdit(strength=0.5), DiffEdit(mask=b"a mask"), DiffEdit()])
def test_repeating_gives_the_same_bytes_under_another_id(client, server, photo, method):
    first = client.edit(photo, "t", method)
    second = client.repeat(first.resolved)
    third = client.repeat(Resolved.from_json(second.resolved.to_json()))
    assert first.image_bytes == second.image_bytes == third.image_bytes
    assert first.resolved == second.resolved == third.resolved
    sent = server.named("Edit")
    assert len({request.request_id for request in sent}) == 3
    assert (sent[1].image.content == photo) is isinstance(method, SdEdit)


def test_a_resolved_request_survives_json(client, photo):
    resolved = client.edit(photo, "t", seed=2**64 - 1).resolved
    text = resolved.to_json()
    read = Resolved.from_json(text)
    assert read == resolved
    assert str(read) == text
    assert read.seed == 2**64 - 1
    assert json.loads(text)["target_prompt"] == "t"
    assert resolved.to_dict() == json.loads(text)


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("inverted", [False, True])
def test_repeating_survives_an_expired_inversion(client, server, photo, times, tells, inverted):
    server.tells_parameters = tells
    first = client.edit(client.invert(photo, steps=4), "t") if inverted else client.edit(photo, "t", Edict(steps=4))
    resolved = first.resolved
    for _ in range(times):
        server.inversions.clear()
        repeated = client.repeat(resolved)
        resolved = repeated.resolved
        assert repeated.image_bytes == first.image_bytes
    assert server.named("Edit")[-1].inversion_parameters.steps == 4


@pytest.mark.parametrize("times", [1, 2])
def test_repeating_survives_the_end_of_both_its_inversions(client, server, photo, times):
    first = client.edit(photo, method=ContentInjection(content=photo, content_fit="pad", steps=4))
    resolved = first.resolved
    for _ in range(times):
        server.inversions.clear()
        repeated = client.repeat(resolved)
        resolved = repeated.resolved
        assert repeated.image_bytes == first.image_bytes
        sent = server.named("Edit")[-1]
        assert sent.image.content == photo
        assert sent.content_injection.image == types_pb2.Image(content=photo, fit=types_pb2.FIT_PAD)
    assert client.repeat(resolved).image_bytes == first.image_bytes
    assert server.named("Edit")[-1].content_injection.inversion


def test_a_resolved_request_read_from_json_has_no_photo_to_invert_again(client, server, photo):
    read = Resolved.from_json(client.edit(photo, "t").resolved.to_json())
    server.inversions.clear()
    with pytest.raises(errors.InversionExpired):
        client.repeat(read)


def test_json_of_something_else_is_refused():
    with pytest.raises(ValueError, match="not a resolved request"):
        Resolved.from_json('{"colour": "red"}')


# --- an inversion that is gone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["edit", "compute_mask"])
def test_an_expired_inversion_is_made_again_once_and_silently(client, server, photo, call):
    inversion = client.invert(photo, source_prompt="before", steps=4, fit="pad")
    server.inversions.clear()
    result = getattr(client, call)(inversion, "t", DiffEdit())
    assert result.resolved.message.inversion == inversion.name
    requests = [
        getattr(request, "edit", request) for name, request in server.requests if name in ("Edit", "ComputeMask")
    ]
    lost, again = requests
    assert lost.inversion == inversion.name
    assert again.image == types_pb2.Image(content=photo, fit=types_pb2.FIT_PAD)
    assert (again.inversion_parameters.source_prompt, again.inversion_parameters.steps) == ("before", 4)
    assert again.model == "models/mini"
    assert again.request_id != lost.request_id


def test_the_starting_point_of_an_edit_can_be_made_again_too(client, server, photo):
    first = client.edit(photo, "t", Edict(steps=4))
    second = client.edit(first.inversion, "u")
    server.inversions.clear()
    third = client.edit(second.inversion, "v")
    assert server.named("Edit")[-1].image.content == photo
    assert third.inversion == first.inversion
    assert third.resolved.message.target_prompt == "v"


def test_a_corrupt_inversion_is_made_again_too(client, server, photo, refusal):
    inversion = client.invert(photo)
    server.script("Edit", refusal(grpc.StatusCode.DATA_LOSS, "STORE_CORRUPT"))
    client.edit(inversion, "t")
    assert len(server.named("Edit")) == 2


def test_it_is_made_again_only_once(client, server, photo, refusal):
    inversion = client.invert(photo)
    gone = refusal(grpc.StatusCode.NOT_FOUND, "INVERSION_EXPIRED")
    server.script("Edit", gone, gone)
    with pytest.raises(errors.InversionExpired):
        client.edit(inversion, "t")
    assert len(server.named("Edit")) == 2


def test_a_content_that_is_gone_is_not_cured_by_the_photo(client, server, photo, refusal):
    inversion = client.invert(photo)
    method = ContentInjection(content="inversions/00")
    server.script(
        "Edit", refusal(grpc.StatusCode.NOT_FOUND, "INVERSION_EXPIRED", "gone", resource_name="inversions/00")
    )
    with pytest.raises(errors.InversionExpired, match="gone"):
        client.edit(inversion, method=method)
    assert len(server.named("Edit")) == 1
    server.script("Edit", refusal(grpc.StatusCode.NOT_FOUND, "INVERSION_EXPIRED", "gone", resource_name=inversion.name))
    client.edit(inversion, method=method)
    assert server.named("Edit")[-1].WhichOneof("source") == "image"


def test_without_the_photo_the_caller_hears_of_it(client, server, photo):
    name = client.invert(photo).name
    server.inversions.clear()
    with pytest.raises(errors.InversionExpired):
        client.edit(name, "t")
    assert len(server.named("Edit")) == 1


# --- export -------------------------------------------------------------------------------------------------------


def test_an_export_comes_whole_and_checked(client, server, photo, tmp_path):
    inversion = client.invert(photo)
    content = client.export_inversion(inversion, tmp_path / "latents.safetensors")
    assert content == server.latents
    assert (tmp_path / "latents.safetensors").read_bytes() == server.latents


@pytest.mark.parametrize("damage", [{"crc32c": 1}, {"crc32c": 0x42ECEDF2, "total": 2561}, {"crc32c": 0}])
def test_a_damaged_export_is_refused_and_not_written(client, server, photo, tmp_path, exported, damage):
    inversion = client.invert(photo)
    server.script("ExportInversion", lambda request, context: exported(server.latents, **damage))
    with pytest.raises(errors.ExportCorrupt):
        client.export_inversion(inversion, tmp_path / "latents.safetensors")
    assert not (tmp_path / "latents.safetensors").exists()


def test_an_export_cut_short_is_refused(client, server, photo, exported):
    inversion = client.invert(photo)
    server.script("ExportInversion", lambda request, context: iter(list(exported(server.latents, 0x42ECEDF2))[:1]))
    with pytest.raises(errors.ExportCorrupt, match="1000 of 2560"):
        client.export_inversion(inversion)


def test_an_empty_export_is_refused(client, server, photo):
    inversion = client.invert(photo)
    server.script("ExportInversion", lambda request, context: iter(()))
    with pytest.raises(errors.ExportCorrupt):
        client.export_inversion(inversion)


def test_words_of_a_newer_server_are_no_error(client, server, photo):
    later: Any = 99

    def newer(request, context):
        event = edit_service_pb2.StreamEditResponse
        yield event(progress=types_pb2.Progress(phase=later, fraction=0.5))
        yield event.FromString(b"\xaa\x06\x00")  # field 101: an event of a later version
        yield event(result=server._edit(request.edit, context))

    seen: list[Any] = []
    server.script("StreamEdit", newer)
    assert client.edit(photo, "t", progress=seen.append).image.size == (8, 8)
    assert [progress.phase for progress in seen] == [Phase.UNKNOWN]
    assert Image.open(io.BytesIO(photo)).size == (8, 8)
