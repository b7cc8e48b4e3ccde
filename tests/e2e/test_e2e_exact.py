"""EDICT's promise, kept by the running server: what it inverts comes back exactly, whatever else it is doing."""

import asyncio
from collections.abc import Awaitable
from typing import Any

import numpy as np
import pytest
from e2e.harness import batch_class_of, disc, together
from PIL import Image
from safetensors.numpy import load
from underpaint import (
    AsyncClient,
    Client,
    ContentInjection,
    Ddim,
    DdimInversion,
    DiffEdit,
    Disentangled,
    Edict,
    Generated,
    Inversion,
    SdEdit,
)
from underpaint_server.local_server import LocalServer

EXACT = 1e-10
"""Of a latent, whose values are about 1. Stored and computed in float64, a round trip comes to about 1e-14."""
PROMPT = "a simple red circle on a white plain background"
ROUND_TRIP: dict[str, Any] = {"source_prompt": PROMPT, "steps": 50, "guidance_scale": 3.0, "verify": True}


async def test_a_round_trip_is_exact_in_float32_and_one_of_ddim_is_not(embedded: LocalServer) -> None:
    async with AsyncClient(embedded.target) as client:
        deep, shallow, ddim = await asyncio.gather(
            client.invert(disc(), strength=0.8, **ROUND_TRIP),
            client.invert(disc(), strength=0.7, **ROUND_TRIP),
            client.invert(disc(), method=DdimInversion(), strength=0.7, **ROUND_TRIP),
        )
        exported = load(await client.export_inversion(shallow))
    assert _error(deep) <= EXACT
    assert _error(shallow) <= EXACT
    assert _error(ddim) > 1e-3
    _agrees_with_the_paper(exported)


async def test_a_round_trip_is_exact_in_the_middle_of_other_work(embedded: LocalServer, is_invariant: Any) -> None:
    is_invariant(*batch_class_of(embedded))
    async with AsyncClient(embedded.target) as client:
        exact = client.invert(disc((30, 90, 200)), strength=0.7, **ROUND_TRIP)
        inversion, *others = await together(embedded, (exact, *_crowd(client)), inside=9)
    assert _error(inversion) <= EXACT
    assert inversion.usage is not None
    assert inversion.usage.mean_batch_size > 1
    assert len(others) == 8


async def test_a_round_trip_is_exact_with_the_default_backend_in_the_middle_of_other_work(
    as_installed: LocalServer, is_invariant: Any
) -> None:
    is_invariant(*batch_class_of(as_installed))
    async with AsyncClient(as_installed.target) as client:
        exact = (
            client.invert(disc(), strength=0.8, **ROUND_TRIP),
            client.invert(disc((30, 90, 200)), strength=0.7, **ROUND_TRIP),
        )
        deep, shallow, *_ = await together(as_installed, (*exact, *_crowd(client)), inside=10)
    assert _error(deep) <= EXACT
    assert _error(shallow) <= EXACT
    assert deep.usage is not None
    assert shallow.usage is not None
    assert min(deep.usage.mean_batch_size, shallow.usage.mean_batch_size) > 1


@pytest.mark.parametrize("name", ["embedded", "as_installed"])
def test_an_edit_to_the_photo_s_own_prompt_gives_the_photo_as_the_autoencoder_sees_it(
    name: str, request: pytest.FixtureRequest
) -> None:
    server: LocalServer = request.getfixturevalue(name)
    with Client(server.target) as client:
        seen = _autoencoded(client, disc())
        same = client.edit(disc(), PROMPT, Edict(steps=10), source_prompt=PROMPT)
        other = client.edit(disc(), PROMPT.replace("red", "blue"), Edict(steps=10), source_prompt=PROMPT)
    assert same.image_bytes == seen
    assert other.image_bytes != seen


def test_equal_prompts_leave_diffedit_nothing_to_change(embedded: LocalServer) -> None:
    method = DiffEdit(reference_prompt=PROMPT, steps=5, strength=0.6, samples=2)
    with Client(embedded.target) as client:
        edited = client.edit(disc(), PROMPT, method, seed=1)
        assert edited.mask is not None
        assert edited.mask.getextrema() == (0, 0)
        assert [notice.reason for notice in edited.notices] == ["MASK_EMPTY"]
        assert edited.image_bytes == _autoencoded(client, disc())


def test_diffedit_changes_what_is_white_and_keeps_what_is_black(embedded: LocalServer) -> None:
    right = Image.new("L", (64, 64))
    right.paste(255, (32, 0, 64, 64))
    with Client(embedded.target) as client:
        kept = _pixels(_autoencoded(client, disc()))
        edited = client.edit(disc(), "a green leaf", DiffEdit(mask=right, steps=10), guidance_scale=7, seed=1)
    assert edited.mask is not None
    assert np.array_equal(np.asarray(edited.mask), np.asarray(right))
    change = np.abs(_pixels(edited.image_bytes) - kept).max(2)
    # Latents outside the mask are the photo's own; the decoder's normalisation still sees the whole picture.
    assert change[:, 36:].max() > 60
    assert change[:, :24].max() < 25


def test_outside_its_mask_diffedit_keeps_every_bit(toy: LocalServer) -> None:
    """Each latent of the closed-form autoencoder is four pixels by four of the picture, and nothing else."""
    left, prompts = Image.new("L", (32, 32)), ("a corgi", "a castle")
    left.paste(255, (0, 0, 16, 32))
    photo = disc(size=(32, 32))
    with Client(toy.target) as client:
        kept = _pixels(_autoencoded(client, photo))
        one, other = (_pixels(client.edit(photo, p, DiffEdit(mask=left), seed=1).image_bytes) for p in prompts)
        mask = client.compute_mask(photo, "a corgi", DiffEdit(threshold=0.4), seed=1)
        found = client.edit(photo, "a corgi", DiffEdit(threshold=0.4), seed=1)
    known = np.asarray(photo).reshape(8, 4, 8, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    assert np.abs(kept - known).max() <= 0.5 + 1e-4, "rounded, and nothing else"
    assert np.array_equal(one[:, 16:], kept[:, 16:])
    assert np.array_equal(other[:, 16:], kept[:, 16:])
    assert (one != other).any(2)[:, :16].mean() > 0.9
    assert found.mask_bytes == mask.mask_bytes
    assert 0 < mask.coverage < 1
    black = np.asarray(mask.image) == 0
    assert np.array_equal(_pixels(found.image_bytes)[black], kept[black])
    assert not np.array_equal(_pixels(found.image_bytes)[~black], kept[~black])


@pytest.mark.parametrize("model", ["toy", "other"])
@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_no_change_changes_nothing_whether_the_size_of_a_pass_matters_or_not(
    toy: LocalServer, model: str, sampler: str
) -> None:
    """The other model's predictions depend on the size of the pass."""
    photo = disc((90, 60, 200), (32, 32))
    ways: list[dict[str, Any]] = [
        {"weights": [1.0] * 12},
        {"weights": [0.3] * 12, "scale": 0.0},
        {"switch_step": 12, "steps": 12},
        {"switch_step": 3, "steps": 12, "scale": 0.0},
    ]
    with Client(toy.target) as client:
        seen = _autoencoded(client, photo, model)
        for way in ways:
            method = Disentangled(sampler=sampler, **way)
            edited = client.edit(photo, "a corgi", method, source_prompt="a castle", model=model, seed=2)
            assert edited.image_bytes == seen, way
        for calibration in (0.0, 0.4):
            content = disc(size=(32, 32))
            injection = ContentInjection(content=content, weight=0.0, calibration=calibration, steps=12)
            injected = client.edit(photo, "a corgi", injection, guidance_scale=2, model=model, seed=2)
            assert injected.inversion is not None
            plain = client.edit(injected.inversion, "a corgi", Ddim(), guidance_scale=2, model=model)
            assert injected.image_bytes == plain.image_bytes, calibration


def _crowd(client: AsyncClient) -> list[Awaitable[Any]]:
    """Eight jobs of all kinds and lengths."""
    photos = [disc((20 * n, 200 - 20 * n, 90)) for n in range(8)]
    return [
        client.edit(photos[0], "a green leaf", Edict(steps=12), guidance_scale=5),
        client.edit(photos[1], "a green leaf", Ddim(steps=15)),
        client.edit(photos[2], "a green leaf", SdEdit(steps=20)),
        client.edit(photos[3], "a green leaf", DiffEdit(steps=10, samples=5)),
        client.edit(Generated("a yellow star", steps=9), "a green leaf", Edict()),
        client.invert(photos[4], method=DdimInversion(), steps=25, guidance_scale=2, verify=True),
        client.compute_mask(photos[5], "a green leaf", DiffEdit(samples=7)),
        client.generate("a yellow star", steps=18),
    ]


def _agrees_with_the_paper(exported: dict[str, Any]) -> None:
    import torch
    from e2e.paper import regenerate

    x, y, source = (torch.from_numpy(exported[name]) for name in ("x", "y", "source"))
    assert x.dtype == y.dtype == source.dtype == torch.float64
    assert (x - y).abs().max() > 1e-3, "the pair of a real photo is not on the diagonal"
    back = regenerate(x, y, PROMPT, steps=50, used=35, guidance_scale=3.0)
    assert (back - source).abs().max() < 5e-3


def _error(inversion: Inversion) -> float:
    assert inversion.reconstruction_max_abs_error is not None
    assert inversion.reconstruction_psnr_db is not None
    return inversion.reconstruction_max_abs_error


def _autoencoded(client: Client, photo: Image.Image, model: str = "") -> bytes:
    """The photo encoded and decoded: an edit that may change nothing."""
    method = DiffEdit(mask=Image.new("L", photo.size), steps=5, strength=0.4)
    nowhere = client.edit(photo, "anything", method, seed=1, model=model)
    assert [notice.reason for notice in nowhere.notices] == ["MASK_EMPTY"]
    return nowhere.image_bytes


def _pixels(encoded: bytes) -> Any:
    from io import BytesIO

    return np.asarray(Image.open(BytesIO(encoded)).convert("RGB")).astype(int)
