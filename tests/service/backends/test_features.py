"""Captured and mapped activations: every row as it would be alone, whoever shares its pass."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from torch import Tensor
from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.backends.toy import ToyBackend
from underpaint_server.rows import Batch, Captured, Denoise, Embed
from underpaint_server.settings import Settings


@pytest.fixture(scope="module", params=["toy", "embedded", "users", "users in bfloat16", "ddpm"])
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backend:
    if request.param == "toy":
        return ToyBackend("toy", Settings())
    if request.param == "embedded":
        shared: Backend = request.getfixturevalue("embedded")
        return shared
    build = checkpoints.build_ddpm if request.param == "ddpm" else checkpoints.build
    directory: Path = build(tmp_path_factory.mktemp("sd") / "one")
    return load(str(directory), "users", Settings(dtype="bfloat16" if "bfloat16" in request.param else "float32"))


def double(own: Tensor) -> Tensor:
    return own * 2


def rows_of(backend: Backend, count: int = 12) -> list[Denoise]:
    """Plain, captured and mapped rows in turn, all about other latents, times and texts."""
    info, generator = backend.facts.info, torch.Generator().manual_seed(0)
    shape = backend.facts.latent_shape(info.width, info.height)
    texts = backend.predict(Batch([Embed(t) for t in ("a red apple", "", "a blue fish", "a cat")], 4))
    wants: tuple[dict[str, Any], ...] = (
        {},
        {"capture": ("mid",)},
        {"maps": {"mid": double}},
        {"capture": info.feature_sites, "maps": {"up_0": double, "mid": torch.tanh}},
    )
    return [
        Denoise(
            torch.randn(shape, generator=generator).double(),
            37 * i,
            0.5,
            texts[i % 4].prompt_embeds,
            **wants[(i + i // 4) % 4],
        )
        for i in range(count)
    ]


def plain(row: Denoise) -> Denoise:
    return Denoise(row.latents, row.timestep, row.alpha_bar, row.prompt_embeds)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    pairs = ((one.features[site], other.features[site]) for site in one.features)
    return torch.equal(one.noise_pred, other.noise_pred) and all(torch.equal(a, b) for a, b in pairs)


def test_a_mixed_batch_gives_each_row_the_bits_it_gets_alone(backend: Backend) -> None:
    rows, rng = rows_of(backend), random.Random(0)
    for size in (4, 13):
        alone = {id(row): backend.predict(Batch([row], size))[0] for row in rows}
        for _ in range(4):
            part = rng.sample(rows, rng.randint(1, min(size, len(rows))))
            for row, answer in zip(part, backend.predict(Batch(part, size)), strict=True):
                assert same(answer, alone[id(row)])


def test_rows_that_want_nothing_are_not_touched_by_those_that_do(backend: Backend) -> None:
    rows = rows_of(backend)
    untouched = backend.predict(Batch([plain(row) for row in rows], len(rows)))
    for row, answer, reference in zip(rows, backend.predict(Batch(rows, len(rows))), untouched, strict=True):
        noise_pred = answer.noise_pred if isinstance(answer, Captured) else answer
        assert isinstance(answer, Captured) == bool(row.capture)
        assert torch.equal(noise_pred, reference) == (not row.maps)


def test_what_is_captured_is_float32_and_what_a_map_is_given(backend: Backend) -> None:
    row = rows_of(backend)[1]
    given: list[Tensor] = []

    def same_again(own: Tensor) -> Tensor:
        given.append(own)
        return own

    maps = dict.fromkeys(backend.facts.info.feature_sites, same_again)
    looking = Denoise(row.latents, row.timestep, 0.5, row.prompt_embeds, backend.facts.info.feature_sites, maps)
    (answer,) = backend.predict(Batch([looking], 2))
    assert tuple(answer.features) == backend.facts.info.feature_sites
    for own in given:
        assert own.dtype == torch.float32
        assert own.dim() == 3
        assert any(torch.equal(own, one) for one in answer.features.values())
    (reference,) = backend.predict(Batch([plain(row)], 2))
    assert torch.equal(answer.noise_pred, reference), "a map that changes nothing changes no bit"


def test_a_map_that_fails_leaves_the_next_pass_alone(backend: Backend) -> None:
    row = rows_of(backend)[0]

    def fails(own: Tensor) -> Tensor:
        raise ValueError("a map")

    with pytest.raises(ValueError, match="a map"):
        backend.predict(Batch([Denoise(row.latents, 1, 0.5, row.prompt_embeds, maps={"mid": fails})], 2))
    first, second = (backend.predict(Batch([row], 2))[0] for _ in range(2))
    assert torch.equal(first, second)
