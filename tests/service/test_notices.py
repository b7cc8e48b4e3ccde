"""What a caller may not expect, and is told: prompts without effect, few steps, inversions that rounding spoils."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from support.engine import Bench
from support.jobs import (
    ddim_options,
    diffedit,
    disc,
    disentangled,
    edict_options,
    edit_job,
    injection,
    injection_job,
    invert_job,
)
from underpaint_server.backends.toy import SCALE, SHAPE, ToyBackend
from underpaint_server.jobs import EditJob, Generated, Job, MaskJob, Photo, Stored
from underpaint_server.methods.ddim.options import DdimEdit
from underpaint_server.methods.edict.options import EdictEdit, EdictInversion
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.programs.notices import about_syntax
from underpaint_server.settings import Settings
from underpaint_server.stores.inversions import record

PX = SHAPE[1] * SCALE


def notices(job: Job) -> dict[str, str]:
    """Reason -> message of the job's notices."""
    with Bench(ToyBackend("toy", Settings())) as bench:
        (result,) = bench.run([job])
    assert not isinstance(result, Exception), result
    return {notice.reason: notice.message for notice in result.notices}


def sdedit(**fields: Any) -> EditJob:
    return replace(edit_job("toy", PX, SdEdit(0.8, 20)), **fields)


def test_an_ordinary_edit_has_none() -> None:
    for method in (SdEdit(0.8, 20), DdimEdit(), EdictEdit(), disentangled(20, 8)):
        assert notices(edit_job("toy", PX, method)) == {}, method
    assert notices(sdedit(negative_prompt="fog")) == {}
    assert notices(sdedit(target_prompt="a cat (asleep), BREAKFAST, 16:9 [sic] <3, C+, HANDS & AND1")) == {}
    assert notices(injection_job("toy", PX, injection())) == {}
    assert notices(invert_job("toy", PX)) == {}


@pytest.mark.parametrize(
    "job",
    [
        sdedit(negative_prompt="fog", guidance_scale=1.0),
        replace(injection_job("toy", PX, injection()), negative_prompt="fog"),
        replace(edit_job("toy", PX, EdictEdit()), negative_prompt="fog", guidance_scale=1.0),
        MaskJob("toy", Photo(disc(PX)), ddim_options(), diffedit(), "a cat", "fog", 5.0, 3),
    ],
    ids=lambda job: type(job.method).__name__ + type(job).__name__,
)
def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(job: Job) -> None:
    assert "negative_prompt" in notices(job)["PROMPT_UNUSED"]


def test_at_guidance_zero_a_prompt_is_said_to_do_nothing() -> None:
    assert "target_prompt" in notices(sdedit(guidance_scale=0.0))["PROMPT_UNUSED"]
    assert "source_prompt" in notices(invert_job("toy", PX, edict_options(guidance_scale=0.0)))["PROMPT_UNUSED"]


@pytest.mark.parametrize(
    "syntax",
    [
        "(snow:1.3)", "(deep snow: 0.8)", "((snow))", "[snow:rain:0.5]", "[snow|rain]", "{snow|rain}", "<lora:ice:0.8>",
        "<hypernet:ice:1>", "a cat BREAK a dog", "a cat AND a dog", "snow++", "(deep snow)++",
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["target_prompt", "negative_prompt"])
def test_syntax_of_other_programs_is_said_to_be_read_literally(field: str, syntax: str) -> None:
    message = notices(sdedit(**{field: f"a photo, {syntax}"}))["PROMPT_SYNTAX"]
    assert message.startswith(field)
    assert any(word in message for word in (syntax, "BREAK", "AND", "snow++", ")+"))


@pytest.mark.parametrize(
    "once", ["a", "1", "(", "[", "{", "<a", "+", ":", "|", " ", "(a:", "[a:", "{a|", ": ", "((", "(1.", "a+", "(:1"]
)
@pytest.mark.parametrize("begin", ["", "(", "(:", "[", "(a:."])
def test_no_prompt_takes_long_to_be_looked_at(begin: str, once: str) -> None:
    """The engine looks at prompts between two passes, and all jobs wait for it. A search
    that begins again at each of 30,000 characters takes a minute."""
    list(about_syntax({"target_prompt": begin + once * 1_000_000}))


def test_a_source_prompt_and_a_reference_prompt_are_looked_at_too() -> None:
    options = replace(edict_options(), source_prompt="(snow:1.3)")
    assert "source_prompt" in notices(invert_job("toy", PX, options))["PROMPT_SYNTAX"]
    method = replace(diffedit(), reference_prompt="((snow))")
    assert "reference_prompt" in notices(edit_job("toy", PX, method))["PROMPT_SYNTAX"]


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (edit_job("toy", PX, SdEdit(1.0, 1)), True),
        (edit_job("toy", PX, SdEdit(0.8, 1)), True),
        (edit_job("toy", PX, SdEdit(0.5, 2)), True),
        (edit_job("toy", PX, SdEdit(1.0, 4)), False),
        (edit_job("toy", PX, SdEdit(0.02, 50)), False),
        (edit_job("toy", PX, DdimEdit(), Generated("a cat", 1, PX, PX, 1), steps=1), True),
        (edit_job("toy", PX, disentangled(1, 1), steps=1), True),
        (invert_job("toy", PX, edict_options(1, 1.0)), True),
        (invert_job("toy", PX, edict_options(10, 0.1)), False),
    ],
)
def test_few_steps_do_not_start_from_noise_and_that_is_said(job: Job, told: bool) -> None:
    assert ("NOISE_TOO_LOW" in notices(job)) is told


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize(("p", "told"), [(0.6, True), (0.8, False), (0.93, False), (1.0, False)])
def test_a_small_mixing_coefficient_over_many_steps_is_said_to_be_inexact(p: float, told: bool, verify: bool) -> None:
    """Before anyone measures it; and what is measured agrees. Also where an edit begins from that inversion."""
    options = replace(edict_options(50), method=EdictInversion(p))
    with Bench(ToyBackend("toy", Settings())) as bench:
        (made,) = bench.run([invert_job("toy", PX, options, verify)])
        source = Stored(made.inversion)
        (edited,) = bench.run([EditJob("toy", source, options, EdictEdit(), "a cat", "", 3.0, 1)])
    for result in (made, edited):
        assert ("INVERSION_INEXACT" in {notice.reason for notice in result.notices}) is told
    if verify:
        assert (made.inversion.reconstruction_max_abs_error > 1e-10) is told


def test_the_notices_of_a_stored_inversion_are_stored_with_it() -> None:
    options = replace(edict_options(50, guidance_scale=0.0), method=EdictInversion(0.6))
    with Bench(ToyBackend("toy", Settings())) as bench:
        (made,) = bench.run([invert_job("toy", PX, options)])
    assert {notice.reason for notice in made.notices} == {"PROMPT_UNUSED", "INVERSION_INEXACT"}
    read, _ = record.decode("a", record.encode("a", made.inversion, {}, datetime.now(UTC)))
    assert read.notices == made.notices
