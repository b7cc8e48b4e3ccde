"""Content injection on real networks, and a model of pixels served beside one of latents."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from e2e.harness import batch_class_of, disc, stubs
from PIL import Image
from support import checkpoints
from support.front import merged, refused
from underpaint import (
    Client,
    ContentInjection,
    Ddim,
    DdimInversion,
    DiffEdit,
    Edict,
    EdictInversion,
    Edited,
    Generated,
    InversionHandle,
    SdEdit,
    errors,
)
from underpaint.v1 import edit_service_pb2
from underpaint_server.local_server import LocalServer

BLUE = disc((30, 30, 200), (120, 90))


def stored(edited: Edited) -> InversionHandle:
    """The inversion that an edit of a photo kept."""
    assert edited.inversion is not None
    return edited.inversion


def pixels(edited: Edited) -> np.ndarray:
    return np.asarray(edited.image).astype(int)


def test_without_weight_the_embedded_model_draws_the_source_bit_for_bit(
    embedded: LocalServer, is_invariant: Any
) -> None:
    """Though an injection asks for more rows at a time."""
    is_invariant(*batch_class_of(embedded))
    with Client(embedded.target) as client:
        way: dict[str, Any] = {"target_prompt": "a red circle", "guidance_scale": 2.0}
        content = ContentInjection(content=BLUE, weight=0.0, steps=10)
        injected = client.edit(disc(), method=content, **way)
        plain = client.edit(stored(injected), method=Ddim(), **way)
        assert np.abs(pixels(injected) - pixels(plain)).mean() < 1
        assert injected.image_bytes == plain.image_bytes
        mixed = client.edit(stored(injected), method=ContentInjection(content=BLUE, weight=0.5), **way)
        assert np.abs(pixels(mixed) - pixels(plain)).mean() > 5
        itself = client.edit(stored(injected), method=ContentInjection(content=disc(), weight=1.0, calibration=0.5))
        assert itself.image.size == (64, 64)


def test_a_content_is_inverted_once_and_rows_of_both_inversions_share_passes(embedded: LocalServer) -> None:
    source = disc((80, 160, 40))
    with Client(embedded.target) as client:
        first = client.edit(source, method=ContentInjection(content=BLUE, weight=0.4, steps=12, sites=["mid", "up_1"]))
        assert first.usage.network_evaluations == 12 + 12 + 12 + 8
        again = client.edit(
            stored(first), method=ContentInjection(content=BLUE, weight=0.2, sites=["mid", "up_1"], every=2)
        )
        assert again.usage.network_evaluations == 12 + 4
        assert client.repeat(first.resolved).image_bytes == first.image_bytes
        named = first.resolved.message.content_injection.inversion
        found = client.get_inversion(named)
        assert found.parameters.method == DdimInversion(convention="target", features=("mid", "up_1"))


def test_what_does_not_go_together_says_what_to_do(embedded: LocalServer) -> None:
    with Client(embedded.target) as client:
        bare = client.invert(BLUE, method=DdimInversion(), steps=5)
        with pytest.raises(errors.InvalidRequest, match=r"ddim\.features mid"):
            client.edit(disc(), method=ContentInjection(content=bare, steps=5))
        with pytest.raises(errors.InvalidRequest, match="the source has 64x64"):
            client.edit(disc(), method=ContentInjection(content=BLUE, content_fit="resize", steps=5))


# --- a model of pixels --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """The embedded model, and one that reads no text."""
    faces = checkpoints.build_ddpm(tmp_path_factory.mktemp("models") / "faces")
    with LocalServer(models=f"mini=,faces={faces}") as server:
        yield server


def test_two_families_are_served_side_by_side(two: LocalServer) -> None:
    with Client(two.target) as client:
        mini, faces = client.models()
        assert (mini.name, faces.name) == ("models/mini", "models/faces")
        assert "diffedit" in mini.methods
        assert faces.methods == ("sdedit", "ddim", "edict", "content_injection")
        assert (faces.width, faces.prompt_tokens, faces.limits.size_multiple) == (16, 0, 2)
        assert "mid" in faces.feature_sites
        assert client.edit(disc(), "a blue circle", SdEdit(steps=2)).image.size == (64, 64)


def test_a_model_of_pixels_inverts_exactly_reconstructs_and_injects(two: LocalServer) -> None:
    with Client(two.target) as client:
        made = client.invert(disc(), method=EdictInversion(), steps=10, model="faces", verify=True)
        assert made.reconstruction_max_abs_error is not None
        assert made.reconstruction_max_abs_error <= 1e-10
        assert made.reconstruction_psnr_db == float("inf"), "no autoencoder stands between pixels and latents"
        again = client.edit(made, method=Edict(), model="faces")
        small = disc().resize((16, 16), Image.Resampling.LANCZOS)
        assert np.abs(pixels(again) - np.asarray(small).astype(int)).max() <= 1
        method = ContentInjection(content=BLUE, weight=0.8, steps=10, sites=["mid", "up_0"])
        mixed = client.edit(disc(), method=method, model="faces")
        plain = client.edit(stored(mixed), method=Ddim(), model="faces")
        assert mixed.image.size == (16, 16)
        assert not np.array_equal(pixels(mixed), pixels(plain))
        assert client.repeat(mixed.resolved).image_bytes == mixed.image_bytes
        assert client.edit(disc(), method=SdEdit(strength=0.5, steps=10), model="faces").image.size == (16, 16)
        drawn = client.generate("", seed=3, steps=10, model="faces")
        assert drawn.image_bytes == client.edit(Generated("", 3, steps=10), method=Ddim(), model="faces").image_bytes


def test_a_model_without_text_refuses_it(two: LocalServer) -> None:
    with Client(two.target) as client:
        for method in (Ddim(), SdEdit(), Edict(), ContentInjection(content=BLUE)):
            with pytest.raises(errors.InvalidRequest, match="models/faces reads no text") as caught:
                client.edit(disc(), "a cat", method, guidance_scale=3, model="faces")
            assert [each.path for each in caught.value.violations] == ["target_prompt", "guidance_scale"]
        with pytest.raises(errors.InvalidRequest, match="faces has only sdedit, ddim, edict, content_injection"):
            client.edit(disc(), method=DiffEdit(), model="faces")
        with pytest.raises(errors.InvalidRequest, match="target_prompt"):
            client.edit(disc(), method=Ddim())


async def test_an_inversion_of_the_other_family_is_a_mismatch(two: LocalServer) -> None:
    with Client(two.target) as client:
        made = client.invert(BLUE, method=DdimInversion(features=["mid"]), steps=5)
    request = merged(edit_service_pb2.EditRequest(model="models/faces"), content_injection={"inversion": made.name})
    request.generated.steps = 5
    async with stubs(two) as wire:
        refusal = await refused(wire.edits.Edit(request))
    assert refusal.reason == "INVERSION_MODEL_MISMATCH"
