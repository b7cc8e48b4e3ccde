"""Content injection against its definition, on the closed-form network and its two feature sites."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.drive import drive
from support.jobs import content_options, ddim_options, injection
from torch import Tensor
from underpaint_server.backends.toy import ToyBackend
from underpaint_server.diffusion.ddim import inversion_levels
from underpaint_server.diffusion.noise import standard_normal
from underpaint_server.diffusion.sampling import Guidance, guided, together
from underpaint_server.diffusion.schedule import Schedule, scaled_linear
from underpaint_server.jobs import DdimConvention, InversionOptions
from underpaint_server.methods.content_injection import steps as injecting
from underpaint_server.methods.content_injection.options import boosted_steps, injected_steps
from underpaint_server.methods.content_injection.steps import Content
from underpaint_server.methods.ddim import steps as ddim
from underpaint_server.methods.ddim.options import DdimInversion
from underpaint_server.methods.task import Editing, Inverting
from underpaint_server.rows import Batch, Denoise, Row
from underpaint_server.settings import Settings

SD = Schedule(scaled_linear(), steps_offset=1)
SHAPE = (4, 8, 8)
STYLE, OTHER = (0.5 * standard_normal(SHAPE, seed=s, purpose="z") for s in (1, 2))
PLAIN = Guidance(torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64), 1.0)
TOY = ToyBackend("toy", Settings())


def network(row: Row) -> Any:
    return TOY.predict(Batch([row], 1))[0]


def invert(source: Tensor, options: InversionOptions, steps: int) -> dict[str, Tensor]:
    return drive(ddim.invert(Inverting(source, SD.grid(steps), PLAIN, options)), network)[0]


def editing(steps: int = 20, content: Tensor = OTHER, region: Tensor | None = None, **more: Any) -> Editing[Any, Any]:
    method = injection(**more)
    recorded = invert(content, content_options(steps, method.sites), steps)
    options = ddim_options(steps, 1.0)
    return Editing(
        arrays=invert(STYLE, options, steps),
        grid=SD.grid(steps),
        guidance=PLAIN,
        noise=lambda purpose, index: standard_normal(SHAPE, seed=3, purpose=purpose, index=index),
        inversion=options,
        options=method,
        extra=Content(
            {site: recorded[f"h_{site}"] for site in method.sites},
            [level.timestep for level in inversion_levels(SD.grid(steps), DdimConvention.TARGET)],
            region,
            injected_steps(method, options),
            boosted_steps(method, options),
        ),
    )


def groups_of(task: Editing[Any, Any]) -> list[list[Any]]:
    return drive(injecting.edit(task), network)[1]


def result(task: Editing[Any, Any]) -> Tensor:
    return drive(injecting.edit(task), network)[0].latents


def mapped(groups: Iterable[list[Any]]) -> list[int]:
    """Timesteps at which content went in."""
    return [row.timestep for group in groups for row in group if isinstance(row, Denoise) and row.maps]


def test_without_weight_it_is_the_regeneration_of_the_source_bit_for_bit() -> None:
    task = editing(weight=0.0)
    assert torch.equal(result(task), drive(ddim.edit(task), network)[0].latents)


def test_more_weight_is_more_of_the_content() -> None:
    source = result(editing(weight=0.0))
    drawn = [result(editing(weight=w)) for w in (0.25, 0.5, 0.75, 1.0)]
    distances = [float((one - source).norm()) for one in drawn]
    assert distances == sorted(distances)
    assert distances[0] > 0.01 * float(source.norm())


def test_a_picture_injected_into_itself_gives_numbers() -> None:
    for more in ({}, {"calibration": 0.5}, {"sites": ("mid", "up_0")}, {"weight": 1.0}):
        assert bool(result(editing(content=STYLE, **more)).isfinite().all())


@pytest.mark.parametrize("steps", [10, 25, 30, 50])
@pytest.mark.parametrize("every", [1, 2, 7])
def test_injection_is_at_every_kth_step_from_the_noisiest_whatever_the_number_of_steps(steps: int, every: int) -> None:
    timesteps = [level.timestep for level in SD.grid(steps)[:0:-1]]
    upper = timesteps[: steps - int(0.4 * steps)]
    assert mapped(groups_of(editing(steps, every=every))) == upper[::every]


def test_each_step_takes_the_content_recorded_nearest_to_it() -> None:
    """Content of half as many steps: the level told is what counts, not the number of the step."""
    steps, method = 20, injection()
    recorded = {"mid": torch.arange(10.0)[:, None, None, None].expand(10, 4, 4, 4).half()}
    timesteps = [level.timestep for level in inversion_levels(SD.grid(10), DdimConvention.TARGET)]
    assert timesteps[:3] == [1, 101, 201]
    content = Content(recorded, timesteps, None, injected_steps(method, ddim_options(steps, 1.0)), 0)

    def taken(maps: Mapping[str, Any]) -> float:
        return float(maps["mid"].args[0].float().mean())

    told_at = {row.timestep: taken(row.maps) for row in _mapped_rows(content, steps)}
    assert told_at[951] == 9.0  # between 901 and the end
    assert told_at[901] == 9.0
    assert told_at[551] in (5.0, 6.0)
    assert told_at[601] == 6.0


def _mapped_rows(content: Content, steps: int) -> list[Denoise]:
    base = editing(steps)
    task = replace(base, extra=content)
    return [row for group in groups_of(task) for row in group if isinstance(row, Denoise) and row.maps]


def test_both_predictions_ask_about_the_same_latents_in_one_group() -> None:
    groups = groups_of(editing())
    for group in groups[:12]:
        plain, changed = group
        assert torch.equal(plain.latents, changed.latents)
        assert (not plain.maps, set(changed.maps)) == (True, {"mid"})
    assert [len(group) for group in groups] == [2] * 12 + [1] * 8


def test_calibration_asks_once_more_and_takes_the_step_from_there() -> None:
    groups = groups_of(editing(calibration=0.3))
    assert [len(group) for group in groups] == [2, 1] * 12 + [1] * 8
    assert not torch.equal(groups[1][0].latents, groups[0][0].latents)
    assert groups[1][0].timestep == groups[0][0].timestep
    assert not torch.equal(result(editing(calibration=0.3)), result(editing()))


def test_boosting_adds_the_jobs_own_noise_to_the_last_steps_only() -> None:
    plain, boosted = groups_of(editing()), groups_of(editing(boosting_start=0.25))
    same = [torch.equal(a[0].latents, b[0].latents) for a, b in zip(plain, boosted, strict=True)]
    assert same == [True] * 16 + [False] * 4, "the first of the five lowest steps has its latents before the noise"
    assert torch.equal(result(editing(boosting_start=0.25)), result(editing(boosting_start=0.25)))


@pytest.mark.parametrize("more", [{"injection_end": 0.4}, {"injection_end": 0.0}, {"injection_end": 0.0, "every": 19}])
@pytest.mark.parametrize("calibration", [0.0, 0.3])
def test_no_noise_of_boosting_stays_in_the_picture(more: dict[str, Any], calibration: float) -> None:
    """Stable Diffusion's finished level has alpha_bar below 1, so a last step with eta 1 would leave noise of 0.021."""
    task = editing(boosting_start=1.0, calibration=calibration, **more)
    groups = groups_of(task)
    last, finished = groups[-1][0], result(task)
    loud = replace(task, noise=lambda purpose, index: task.noise(purpose, index) * (100 if index == 1 else 1))
    assert torch.equal(groups_of(loud)[-1][0].latents, last.latents)
    assert torch.equal(result(loud), finished)
    assert torch.equal(result(editing(boosting_start=0.05)), result(editing())), "one step is the last"


def test_the_region_decides_where() -> None:
    region = torch.zeros(8, 8, dtype=torch.float64)
    region[:, :4] = 1
    change = (result(editing(region=region)) - result(editing(weight=0.0))).abs()
    assert float(change[:, :, :4].mean()) > 0.01
    assert float(change[:, :, 4:].max()) == 0, "this network is local: nothing reaches the other half"


def test_guidance_maps_both_its_rows_each_on_its_own_activation() -> None:
    base = editing()
    text = Guidance(torch.full(SHAPE, 0.5, dtype=torch.float64), PLAIN.prompt_embeds, 2.0)
    task = replace(base, guidance=text)
    first = groups_of(task)[0]
    assert [bool(row.maps) for row in first] == [False, False, True, True]
    assert float(first[2].prompt_embeds.mean()) == 0 < float(first[3].prompt_embeds.mean())


@pytest.mark.parametrize("convention", DdimConvention)
def test_an_inversion_keeps_what_the_network_had_at_each_level_told(convention: DdimConvention) -> None:
    options = InversionOptions(DdimInversion(convention, ("mid", "up_0")), 10, 1.0, 1.0, "")
    arrays, groups = drive(ddim.invert(Inverting(OTHER, SD.grid(10), PLAIN, options)), network)
    assert [arrays[name].shape for name in ("h_mid", "h_up_0")] == [(10, 4, 4, 4), (10, 4, 8, 8)]
    assert arrays["h_mid"].dtype == torch.float16
    plain, _ = drive(ddim.invert(Inverting(OTHER, SD.grid(10), PLAIN, ddim_options(10, 1.0))), network)
    if convention is DdimConvention.TARGET:
        assert torch.equal(arrays["trajectory"], plain["trajectory"]), "looking changes nothing"
    for k, level in enumerate(inversion_levels(SD.grid(10), convention)):
        (row,) = groups[k]
        assert row.timestep == level.timestep
        torch.testing.assert_close(arrays["h_up_0"][k].float(), row.latents.float(), rtol=1e-3, atol=1e-3)


def test_programs_together_share_groups_until_each_ends() -> None:
    def count(rows: int) -> Any:
        for _ in range(rows):
            yield from guided(STYLE, SD.grid(5)[3], PLAIN)
        return rows

    counts, groups = drive(together(count(3), count(0), count(1)), network)
    assert counts == [3, 0, 1]
    assert [len(group) for group in groups] == [2, 1, 1]
