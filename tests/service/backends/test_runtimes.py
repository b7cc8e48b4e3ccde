"""What every runtime must do: the same rows, the same answers as torch, and bits that company does not change."""

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.engine import Bench
from support.jobs import edict_options, edit_job, every_kind_of_job, injection, injection_job, invert_job
from torch import Tensor
from underpaint_server.backends import load
from underpaint_server.backends.protocol import Backend
from underpaint_server.errors import ModelNotReady
from underpaint_server.jobs import Exactness, LearnJob
from underpaint_server.methods.edict.options import EdictEdit
from underpaint_server.rows import Batch, Captured, Decode, Denoise, Embed, Encode, PullBack, Row
from underpaint_server.settings import Settings

RUNTIMES = {
    "openvino-float32": Settings(backend="openvino", dtype="float32"),
    "openvino-bfloat16": Settings(backend="openvino", dtype="bfloat16"),
    "onnxruntime": Settings(backend="onnxruntime"),
}
SITES = ("mid", "up_0", "up_1", "up_2")


def loaded(settings: Settings) -> Backend:
    try:
        return load("", "mini", settings)
    except ModelNotReady as error:
        if "bfloat16" not in str(error):
            raise
        pytest.skip(error.message)  # a CPU without bfloat16


@pytest.fixture(scope="module", params=RUNTIMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return loaded(RUNTIMES[request.param])


@pytest.fixture
def tolerance(backend: Backend) -> Mapping[str, float]:
    return {"rtol": 0.1, "atol": 0.2} if backend.facts.info.dtype == "bfloat16" else {"rtol": 1e-3, "atol": 1e-4}


def predict(backend: Backend, *rows: Row) -> list[Any]:
    kind = type(rows[0])
    return list(backend.predict(Batch(rows, max(len(rows), backend.minimum(kind)))))


def denoise(backend: Backend, number: int, *, height: int = 16, width: int = 16, **changes: Any) -> Denoise:
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn((4, height, width), generator=generator).double()
    embeds = torch.randn(32, 192, generator=generator)
    return Denoise(latents, (37 * number + 11) % 999, 0.5, embeds, **changes)


def close(found: Tensor, expected: Tensor, tolerance: Mapping[str, Any]) -> None:
    torch.testing.assert_close(found.double(), expected.double(), **tolerance)


def doubled(activation: Tensor) -> Tensor:
    return 2 * activation


def shifted(by: float, activation: Tensor) -> Tensor:
    return activation + by


# --- the same as torch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "size"),
    [*((rows, (16, 16)) for rows in (1, 2, 3, 7, 16)), (3, (8, 16)), (2, (20, 12)), (1, (32, 32))],
    ids=str,
)
def test_noise_predictions_are_those_of_torch(
    rows: int, size: tuple[int, int], backend: Backend, embedded: Backend, tolerance: Mapping[str, Any]
) -> None:
    asked = [denoise(backend, number, height=size[0], width=size[1]) for number in range(rows)]
    expected = embedded.predict(Batch(asked, max(2, rows)))
    for found, wanted in zip(predict(backend, *asked), expected, strict=True):
        assert found.dtype == torch.float64
        close(found, wanted, tolerance)


@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=str)
def test_captures_and_maps_are_those_of_torch(
    size: tuple[int, int], backend: Backend, embedded: Backend, tolerance: Mapping[str, Any]
) -> None:
    """Every site alone, all at once, one map after another, beside rows that have none."""
    ask = partial(denoise, backend, height=size[0], width=size[1])
    asked = [
        ask(0),
        ask(1, capture=SITES),
        ask(2, capture=("up_1",)),
        *(ask(3 + i, maps={site: doubled}) for i, site in enumerate(SITES)),
        ask(7, capture=SITES, maps={"mid": doubled, "up_1": partial(shifted, 0.5)}),
        ask(8, capture=("mid",), maps=dict.fromkeys(SITES, doubled)),
        ask(9),
    ]
    expected = embedded.predict(Batch(asked, len(asked)))
    for found, wanted in zip(predict(backend, *asked), expected, strict=True):
        if not isinstance(wanted, Captured):
            close(found, wanted, tolerance)
            continue
        close(found.noise_pred, wanted.noise_pred, tolerance)
        assert set(found.features) == set(wanted.features)
        for site, activation in wanted.features.items():
            assert found.features[site].dtype == torch.float32
            scale = float(activation.abs().max())
            close(found.features[site] / scale, activation / scale, tolerance)


def test_pictures_and_texts_are_those_of_torch(backend: Backend, embedded: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    near = {"rtol": 1e-3, "atol": 1e-3}
    for height, width in ((64, 64), (32, 80)):
        images = [torch.rand((3, height, width), generator=generator) * 2 - 1 for _ in range(3)]
        latents = [torch.randn((4, height // 4, width // 4), generator=generator).double() for _ in range(3)]
        for found, image in zip(predict(backend, *map(Encode, images)), images, strict=True):
            close(found, embedded.predict(Batch([Encode(image)], 2))[0], near)
        for found, latent in zip(predict(backend, *map(Decode, latents)), latents, strict=True):
            close(found, embedded.predict(Batch([Decode(latent)], 2))[0], near)
    for found, text in zip(predict(backend, Embed("a red apple"), Embed("")), ("a red apple", ""), strict=True):
        close(found.prompt_embeds, embedded.predict(Batch([Embed(text)], 4))[0].prompt_embeds, near)


def test_gradients_are_those_of_torch(backend: Backend, embedded: Backend) -> None:
    row = denoise(backend, 1)
    pull_back = PullBack(row.latents, row.timestep, row.alpha_bar, row.prompt_embeds, torch.ones_like(row.latents))
    assert backend.batch_class(PullBack, (4, 16, 16)) == 2
    (found,), (expected,) = (list(each.predict(Batch([pull_back], 2))) for each in (backend, embedded))
    near = {"rtol": 1e-3, "atol": 1e-4}
    close(found.latents, expected.latents, near)
    close(found.prompt_embeds, expected.prompt_embeds, near)


def test_what_a_model_says_of_itself(backend: Backend) -> None:
    info = backend.facts.info
    assert f"{info.backend}-{info.dtype}" in {"openvino-float32", "openvino-bfloat16", "onnxruntime-float32"}
    assert info.feature_sites == SITES
    assert info.batch_class is None
    assert info.batch_class_at(32, 80) is None
    assert backend.minimum(Denoise) == 1


# --- bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (8, 20)], ids=str)
def test_company_changes_no_bit(size: tuple[int, int], backend: Backend) -> None:
    """Plain, captured and mapped rows, in passes of any number of rows and in any order."""
    rng = random.Random(0)
    ask = partial(denoise, backend, height=size[0], width=size[1])
    asked = [ask(i) for i in range(6)]
    asked += [ask(6, capture=SITES), ask(7, maps={"up_0": doubled}), ask(8, maps={"mid": doubled, "up_2": doubled})]
    alone = [predict(backend, row)[0] for row in asked]
    for _ in range(10):
        order = rng.sample(range(len(asked)), rng.randint(1, len(asked)))
        for found, number in zip(predict(backend, *(asked[i] for i in order)), order, strict=True):
            expected = alone[number]
            if isinstance(expected, Captured):
                assert all(torch.equal(found.features[site], expected.features[site]) for site in SITES)
                found, expected = found.noise_pred, expected.noise_pred
            assert torch.equal(found, expected)


def test_a_map_that_changes_nothing_changes_no_bit(backend: Backend) -> None:
    """Also where the plain row is in the same pass and spares the mapped one its first evaluation."""
    plain = denoise(backend, 3)
    mapped = Denoise(
        plain.latents, plain.timestep, plain.alpha_bar, plain.prompt_embeds, maps=dict.fromkeys(SITES, Tensor.clone)
    )
    (expected,) = predict(backend, plain)
    assert torch.equal(predict(backend, mapped)[0], expected)
    first, second, _ = predict(backend, mapped, plain, denoise(backend, 4))
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_rows_by_themselves_have_the_same_bits_at_any_size(backend: Backend) -> None:
    """What is done where chunks of several rows have other bits; the sizes of chunks cannot matter then."""
    pinned = load("", "mini", RUNTIMES[_name(backend)].model_copy(update={"exact_batching": "pinned"}))
    info = pinned.facts.info
    assert (info.batch_class, info.exactness) == (None, Exactness.ROW_BY_ROW)
    asked = [denoise(backend, i, capture=("mid",)) for i in range(5)]
    alone = [predict(pinned, row)[0] for row in asked]
    for found, expected in zip(predict(pinned, *asked), alone, strict=True):
        assert torch.equal(found.noise_pred, expected.noise_pred)


def test_another_process_would_be_the_same_function(backend: Backend) -> None:
    again = load("", "mini", RUNTIMES[_name(backend)]).facts.info
    assert again.fingerprint == backend.facts.info.fingerprint


def _name(backend: Backend) -> str:
    info = backend.facts.info
    return "onnxruntime" if info.backend == "onnxruntime" else f"{info.backend}-{info.dtype}"


def test_a_pass_that_fails_leaves_the_next_ones_as_they_were(backend: Backend) -> None:
    asked = [denoise(backend, number) for number in range(5)]
    expected = predict(backend, *asked)
    row = asked[0]
    wrong = Denoise(row.latents, row.timestep, row.alpha_bar, torch.zeros(32, 7))
    with pytest.raises(Exception, match=r"\w"):
        predict(backend, *[wrong] * 5)
    with pytest.raises(ZeroDivisionError):
        predict(backend, *asked[:2], denoise(backend, 9, maps={"mid": lambda _: 1 / 0}))
    assert all(torch.equal(a, b) for a, b in zip(predict(backend, *asked), expected, strict=True))


# --- jobs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(backend: Backend) -> Iterator[Bench]:
    with Bench(backend) as bench:
        yield bench


def test_edict_returns_alone_and_among_jobs_of_every_kind(backend: Backend, bench: Bench) -> None:
    jobs = [job for job in every_kind_of_job("mini", 64, steps=6) if not isinstance(job, LearnJob)]
    exact = invert_job("mini", 64, edict_options(25, 0.8))
    (alone,) = bench.run([exact])
    beside, *_ = bench.run([exact, *jobs * 2])
    for result in (alone, beside):
        assert result.inversion.reconstruction_max_abs_error == pytest.approx(0, abs=1e-10)
    assert np.array_equal(alone.inversion.arrays["x"], beside.inversion.arrays["x"])


def test_an_injection_of_weight_nothing_is_the_source(backend: Backend, bench: Bench) -> None:
    job = injection_job("mini", 64, injection(weight=0.0), steps=6)
    other = injection_job("mini", 64, injection(weight=0.6), steps=6)
    (plain,) = bench.run([job])
    again, mixed, _ = bench.run([job, other, edit_job("mini", 64, EdictEdit(), steps=6)])
    assert np.array_equal(plain.pixels, again.pixels)
    assert not np.array_equal(plain.pixels, mixed.pixels)
