"""The methods against their papers' promises, on a network that is harder to invert than a real one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.drive import RandomNetwork, drive
from torch import Tensor
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.sampling import Guidance
from underpaint_server.diffusion.schedule import Grid, Schedule, scaled_linear
from underpaint_server.diffusion.snap import QUANTUM, snap
from underpaint_server.jobs import DdimConvention, InversionOptions
from underpaint_server.methods.cost import used_steps
from underpaint_server.methods.ddim import steps as ddim
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.diffedit import steps as diffedit
from underpaint_server.methods.diffedit.options import DiffEdit
from underpaint_server.methods.diffedit.steps import Masking
from underpaint_server.methods.edict import steps as edict
from underpaint_server.methods.edict.options import EdictInversion
from underpaint_server.methods.sdedit import steps as sdedit
from underpaint_server.methods.task import Editing, Inverting
from underpaint_server.rows import Denoise, Row

SD = Schedule(scaled_linear(), steps_offset=1)
SHAPE = (4, 8, 8)
SOURCE = standard_normal(SHAPE, seed=5, purpose="source")


def text(value: float) -> Tensor:
    return torch.full((4, 8), value)


def guidance(scale: float = 3.0, prompt: float = 0.7) -> Guidance:
    return Guidance(text(prompt), text(0.0), scale)


def options(method: EdictInversion | DdimInversion, steps: int, strength: float) -> InversionOptions:
    return InversionOptions(method, steps, strength, 3.0, "a photo")


def noise(purpose: str, index: int) -> Tensor:
    return standard_normal(SHAPE, seed=9, purpose=purpose, index=index)


def editing(arrays: dict[str, Tensor], grid: Grid, **more: object) -> Editing[Any, Any]:
    fields: dict[str, Any] = {
        "guidance": guidance(),
        "noise": noise,
        "inversion": None,
        "options": None,
        "extra": None,
    } | more
    return Editing(arrays=arrays, grid=grid, **fields)


def round_trip(steps: int, strength: float, p: float, network: Callable[[Row], Any]) -> float:
    grid = SD.grid(steps, used_steps(steps, strength))
    arrays, _ = drive(
        edict.invert(Inverting(SOURCE, grid, guidance(), options(EdictInversion(p), steps, strength))), network
    )
    outcome, _ = drive(
        edict.edit(editing(arrays, grid, inversion=options(EdictInversion(p), steps, strength))), network
    )
    return float((outcome.latents - SOURCE).abs().max())


@pytest.mark.parametrize(
    ("steps", "strength"), [(50, 0.8), (50, 0.7), (50, 0.9), (10, 0.9), (9, 0.8), (1, 1.0), (30, 0.5)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_edict_comes_back_exactly(steps: int, strength: float, dtype: torch.dtype) -> None:
    """With any number of used steps, odd ones too, and whatever precision the network has."""
    assert round_trip(steps, strength, 0.93, RandomNetwork(dtype=dtype)) <= 1e-10


def test_edict_without_mixing_comes_back_exactly() -> None:
    assert round_trip(20, 0.8, 1.0, RandomNetwork()) <= 1e-10


def test_edict_is_inexact_when_the_network_is_not_the_same_function_both_times() -> None:
    """The reason for batch classes: a relative change of 1e-3 in the predictions is not forgiven."""
    network, calls = RandomNetwork(), iter(range(10_000))
    assert round_trip(50, 0.8, 0.93, lambda row: network(row) * (1 + 1e-3 * (next(calls) % 3))) > 1e-4


def test_edict_alternates_who_goes_first_and_mixes_x_first() -> None:
    """Two steps written out from the equations, the even one (x first) before the odd one."""
    network, grid, p = RandomNetwork(), SD.grid(10, 2), 0.9
    g = guidance(scale=1.0)

    def eps(latents: Tensor, level: int) -> Tensor:
        return network(Denoise(snap(latents), grid[level].timestep, grid[level].alpha_bar, g.prompt_embeds))

    def ab(level: int) -> tuple[float, float]:
        high, low = grid[level].alpha_bar, grid[level - 1].alpha_bar
        a = (low / high) ** 0.5
        return a, (1 - low) ** 0.5 - a * (1 - high) ** 0.5

    x, y = noise("x", 0), noise("y", 0)
    start = {"source": SOURCE, "x": x, "y": y}
    a, b = ab(2)
    x = a * x + b * eps(y, 2)
    y = a * y + b * eps(x, 2)
    x = p * x + (1 - p) * y
    y = p * y + (1 - p) * x
    a, b = ab(1)
    y = a * y + b * eps(x, 1)
    x = a * x + b * eps(y, 1)
    x = p * x + (1 - p) * y
    outcome, groups = drive(
        edict.edit(editing(start, grid, guidance=g, inversion=options(EdictInversion(p), 10, 0.2))), network
    )
    torch.testing.assert_close(outcome.latents, x, rtol=0, atol=1e-12)
    assert [len(group) for group in groups] == [1] * 4


def test_snapping_is_small_and_forgives_the_last_bits() -> None:
    """Also for encoded images, whose float32 values lie on the borders of every dyadic grid."""
    dyadic = (standard_normal((100_000,), seed=1, purpose="x").float() * 2**12).round().double() / 2**13
    assert float((snap(dyadic) - dyadic).abs().max()) <= QUANTUM / 2 + 1e-12
    assert torch.equal(snap(dyadic * (1 + 4e-15)), snap(dyadic))


def test_edict_is_exact_for_latents_on_the_borders_of_float32() -> None:
    """Latents half-way between two float32 numbers: without snapping, their last bit decides what the network sees."""
    network, grid = RandomNetwork(dtype=torch.float32), SD.grid(10, 8)
    low = SOURCE.float()
    source = (low.double() + torch.nextafter(low, torch.tensor(torch.inf)).double()) / 2
    arrays, _ = drive(edict.invert(Inverting(source, grid, guidance(), options(EdictInversion(), 10, 0.8))), network)
    task = editing(arrays, grid, inversion=options(EdictInversion(), 10, 0.8))
    outcome, _ = drive(edict.edit(task), network)
    assert float((outcome.latents - source).abs().max()) <= 1e-10


def test_edicts_pair_starts_together_and_ends_apart() -> None:
    grid = SD.grid(50, 40)
    arrays, groups = drive(
        edict.invert(Inverting(SOURCE, grid, guidance(), options(EdictInversion(), 50, 0.8))), RandomNetwork()
    )
    assert not torch.equal(arrays["x"], arrays["y"])
    assert len(groups) == 80
    assert all(len(group) == 2 for group in groups)


@pytest.mark.parametrize("convention", DdimConvention)
def test_ddim_inversion_tells_the_network_the_level_its_convention_names(convention: DdimConvention) -> None:
    grid = SD.grid(10, 4)
    task = Inverting(SOURCE, grid, guidance(scale=1.0), options(DdimInversion(convention), 10, 0.4))
    arrays, groups = drive(ddim.invert(task), RandomNetwork())
    told = [group[0].timestep for group in groups]
    assert told == ([1, 101, 201, 301] if convention is DdimConvention.TARGET else [0, 1, 101, 201])
    assert arrays["trajectory"].shape == (5, *SHAPE)
    assert torch.equal(arrays["trajectory"][0], SOURCE)


def test_ddim_comes_back_only_roughly_and_edict_exactly() -> None:
    network, grid = RandomNetwork(), SD.grid(50, 40)
    arrays, _ = drive(ddim.invert(Inverting(SOURCE, grid, guidance(), options(DdimInversion(), 50, 0.8))), network)
    outcome, _ = drive(ddim.edit(editing(arrays, grid)), network)
    assert float((outcome.latents - SOURCE).abs().max()) > 1e-3


def test_sdedit_starts_from_the_image_under_seeded_noise() -> None:
    grid = SD.grid(10, 5)
    _, groups = drive(sdedit.edit(editing({"source": SOURCE}, grid, guidance=guidance(1.0))), RandomNetwork())
    level = grid[-1]
    expected = level.alpha_bar**0.5 * SOURCE + (1 - level.alpha_bar) ** 0.5 * noise("sdedit", 0)
    torch.testing.assert_close(groups[0][0].latents, expected)
    assert [group[0].timestep for group in groups] == [401, 301, 201, 101, 1]


# --- DiffEdit ---------------------------------------------------------------------------------------------------


class LocalNetwork(RandomNetwork):
    """Text changes its answer in the left half only."""

    def __call__(self, row: Row) -> Tensor:
        assert isinstance(row, Denoise)
        plain = super().__call__(Denoise(row.latents, row.timestep, row.alpha_bar, text(0.0)))
        effect = float(row.prompt_embeds.mean()) * torch.ones_like(plain)
        effect[..., 4:] *= 0.02
        return plain + effect


def masking(target: float = 1.0, reference: float = 0.0, samples: int = 6) -> Masking:
    return Masking(SOURCE, SD.grid(50)[25], text(target), text(reference), (target, reference), samples, noise)


def diffedit_method(threshold: float = 0.5) -> DiffEdit:
    return DiffEdit(None, threshold, 6, 0.5, "")


def encoded(network: Callable[[Row], Any], grid: Grid) -> dict[str, Tensor]:
    task = Inverting(SOURCE, grid, guidance(1.0, 0.0), options(DdimInversion(), 50, 0.8))
    return drive(ddim.invert(task), network)[0]


def test_the_mask_is_where_the_texts_disagree_and_all_its_rows_are_one_group() -> None:
    difference, groups = drive(diffedit.difference(masking()), LocalNetwork())
    assert [len(group) for group in groups] == [12]
    assert float(difference[:, :4].min()) > 0.6 > 0.1 > float(difference[:, 4:].max())


def test_every_sample_has_its_own_noise_and_both_texts_the_same() -> None:
    _, (group,) = drive(diffedit.difference(masking()), LocalNetwork())
    drawn = [row.latents for row in group]
    assert all(torch.equal(drawn[i], drawn[i + 6]) for i in range(6))
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(6) for j in range(i + 1, 6))


def test_equal_texts_change_nothing_and_say_so() -> None:
    network, grid = LocalNetwork(), SD.grid(50, 40)
    task = editing(encoded(network, grid), grid, extra=masking(0.4, 0.4), options=diffedit_method())
    outcome, _ = drive(diffedit.edit(task), network)
    assert [notice.reason for notice in outcome.notices] == ["MASK_EMPTY"]
    assert outcome.mask is not None
    assert float(outcome.mask.sum()) == 0
    assert torch.equal(outcome.latents, SOURCE)


def test_outside_the_mask_the_encoded_image_is_back_bit_for_bit() -> None:
    network, grid = LocalNetwork(), SD.grid(50, 40)
    task = editing(encoded(network, grid), grid, extra=masking(), options=diffedit_method())
    outcome, _ = drive(diffedit.edit(task), network)
    assert outcome.mask is not None
    assert torch.equal(outcome.mask[:, :4], torch.ones(8, 4, dtype=torch.float64))
    assert torch.equal(outcome.latents[:, :, 4:], SOURCE[:, :, 4:])
    assert float((outcome.latents - SOURCE)[:, :, :4].abs().max()) > 0.01


def test_each_step_blends_with_the_encoded_latents_of_its_own_level() -> None:
    network, grid = LocalNetwork(), SD.grid(50, 40)
    arrays = encoded(network, grid)
    mask = torch.zeros(8, 8, dtype=torch.float64)
    mask[:4] = 1
    _, groups = drive(diffedit.edit(editing(arrays, grid, extra=mask, options=diffedit_method())), network)
    for k, group in enumerate(groups[1:], start=1):
        assert torch.equal(group[0].latents[:, 4:], arrays["trajectory"][40 - k][:, 4:])


def test_a_given_mask_needs_no_comparison() -> None:
    network, grid = LocalNetwork(), SD.grid(50, 40)
    task = editing(encoded(network, grid), grid, extra=torch.ones(8, 8, dtype=torch.float64), options=diffedit_method())
    outcome, groups = drive(diffedit.edit(task), network)
    assert len(groups) == 40
    assert [notice.reason for notice in outcome.notices] == ["MASK_FULL"]
