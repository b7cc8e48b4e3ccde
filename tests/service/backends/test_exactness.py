"""How a model is to be run on this machine: what is measured, what is kept in a file, and when it is used again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from underpaint_server import backends
from underpaint_server.backends import exactness
from underpaint_server.backends.exactness import Key, Survey, Verdict, describe, establish
from underpaint_server.backends.invariance import Network
from underpaint_server.backends.protocol import Backend
from underpaint_server.backends.toy import ToyBackend
from underpaint_server.errors import ModelNotReady, OutOfMemory
from underpaint_server.jobs import Exactness
from underpaint_server.settings import Settings

KEY = Key("1.0", "torch", "2.9", "d" * 64, "float32", "a CPU", 2, 2, 16)
BIT = 2.0**-20


class Model:
    """A network, and how often it was asked."""

    def __init__(self, drift: Callable[[int, int], float] = lambda size, position: 0.0, *, isolates: bool = False):
        self.drift, self.gain, self.fits = drift, 0.9, 99
        self.isolates, self.is_isolated = isolates, False
        self.evaluations = 0
        self.notes: list[str] = []

    def __call__(self, latents: Tensor, timesteps: list[int], embeds: Tensor) -> Tensor:
        if len(latents) > self.fits:
            raise OutOfMemory("too large")
        self.evaluations += 1
        size = 1 if self.is_isolated else len(latents)
        drifts = [self.drift(size, 0 if self.is_isolated else position) for position in range(len(latents))]
        return self.gain * latents + torch.tensor(drifts, dtype=torch.float64)[:, None, None, None]

    def isolate(self) -> None:
        self.is_isolated = True

    def established(self, settings: Settings, survey: Survey | None = None, key: Key = KEY) -> Verdict:
        """The verdict of a server that starts; it counts anew."""
        self.evaluations = 0
        self.is_isolated = False
        self.notes.clear()
        isolate = self.isolate if self.isolates else None
        network = Network(self, (4, 8, 8), (4, 8), key.minimum, key.maximum, isolate)
        return establish(network, key, settings, self.notes.append, survey)


def by_size(size: int, position: int) -> float:
    return BIT * size


def by_position(size: int, position: int) -> float:
    return BIT * position


def file_of(directory: Path) -> Path:
    (file,) = (directory / "exactness").iterdir()
    return file


@pytest.fixture
def kept(tmp_path: Path) -> Settings:
    return Settings(cache_dir=str(tmp_path))


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch class is not chosen by the clock of a busy machine."""
    monkeypatch.setattr(exactness, "choose_class", lambda seconds: 4 if 4 in seconds else min(seconds))


# --- verdicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["auto", "pinned"])
@pytest.mark.parametrize(
    ("drift", "isolates", "says"),
    [
        (lambda size, position: 0.0, False, {"auto": Exactness.ANY_SIZE, "pinned": Exactness.FIXED_SIZE}),
        (lambda size, position: 0.0, True, {"auto": Exactness.ANY_SIZE, "pinned": Exactness.ROW_BY_ROW}),
        (by_size, False, {"auto": Exactness.FIXED_SIZE, "pinned": Exactness.FIXED_SIZE}),
        (by_size, True, {"auto": Exactness.ROW_BY_ROW, "pinned": Exactness.ROW_BY_ROW}),
        (by_position, False, {"auto": Exactness.INEXACT, "pinned": Exactness.INEXACT}),
        (by_position, True, {"auto": Exactness.ROW_BY_ROW, "pinned": Exactness.ROW_BY_ROW}),
    ],
)
def test_each_network_is_run_in_the_way_that_keeps_its_bits(
    drift: Any, isolates: bool, says: dict[str, Exactness], batching: Any, tmp_path: Path
) -> None:
    """The complete measurement, and the start of a server after it."""
    settings = Settings(cache_dir=str(tmp_path), exact_batching=batching)
    model = Model(drift, isolates=isolates)
    complete = model.established(settings, Survey(complete=True))
    started = model.established(settings)
    for verdict in (complete, started):
        assert verdict.exactness is says[batching]
        is_free = isolates or verdict.exactness is Exactness.ANY_SIZE
        assert verdict.native_class == (None if is_free else 4)
        assert verdict.other_class == (None if isolates else 4)
    assert model.is_isolated is (started.exactness is Exactness.ROW_BY_ROW)
    assert model.evaluations == 1, "the fingerprint"


def test_a_start_stops_at_the_first_difference_and_the_complete_measurement_counts(kept: Settings) -> None:
    model = Model(by_size)
    at_start = model.established(kept).measured.any_size
    complete = model.established(kept, Survey(complete=True)).measured.any_size
    assert at_start is not None
    assert complete is not None
    assert at_start.compared < 40
    assert complete.compared >= 640
    assert complete.unequal > 500


def test_a_network_that_is_not_exact_is_warned_of_at_every_start(
    kept: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(by_position)
    for _ in range(2):
        assert model.established(kept).exactness is Exactness.INEXACT
        assert "no inversion is exact" in capsys.readouterr().out


@pytest.mark.parametrize("isolates", [False, True])
def test_no_time_for_the_measurement_is_said_and_changes_no_bit(isolates: bool, tmp_path: Path) -> None:
    short = Settings(cache_dir=str(tmp_path), exact_batching_s=1e-9)
    model = Model(isolates=isolates)
    verdict = model.established(short)
    assert verdict.exactness is (Exactness.ROW_BY_ROW if isolates else Exactness.FIXED_SIZE)
    assert "underpaint-server self-test" in model.notes[-1]
    assert "--exact-batching-s" in model.notes[-1]
    assert model.established(short) == verdict
    assert model.evaluations == 1, "what had no time is not begun at every start"
    longer = model.established(short.model_copy(update={"exact_batching_s": 3600.0}))
    assert longer.exactness is Exactness.ANY_SIZE
    assert longer.measured.fingerprint == verdict.measured.fingerprint, "inversions of both may be used by both"
    assert model.established(short).exactness is Exactness.ANY_SIZE, "now it is known"


def test_what_is_too_large_for_the_limit_is_not_begun(kept: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness, "time_passes", lambda *_, **__: {2: 10.0})
    model = Model()
    assert model.established(kept.model_copy(update={"exact_batching_s": 60.0})).exactness is Exactness.FIXED_SIZE
    assert model.evaluations == 1, "the fingerprint"
    assert model.established(kept, Survey(complete=True)).exactness is Exactness.ANY_SIZE


def test_the_complete_measurement_settles_it_for_later_starts(tmp_path: Path) -> None:
    short = Settings(cache_dir=str(tmp_path), exact_batching_s=1e-9)
    Model().established(short)
    Model().established(short, Survey(complete=True))
    model = Model()
    assert model.established(short).exactness is Exactness.ANY_SIZE
    assert model.evaluations == 1


def test_the_largest_pass_may_not_fit_the_memory(kept: Settings) -> None:
    model = Model()
    model.fits = 8
    assert model.established(kept).exactness is Exactness.FIXED_SIZE
    assert any("passes of 16 rows do not fit" in note for note in model.notes)
    model.fits = 99
    assert model.established(kept).exactness is Exactness.ANY_SIZE, "measured as soon as it fits"


def test_a_class_that_does_not_fit_the_memory_is_refused(tmp_path: Path) -> None:
    model = Model()
    model.fits = 8
    with pytest.raises(ModelNotReady, match=r"a pass of 12 rows .* use a smaller --exact-batch-class"):
        model.established(Settings(cache_dir=str(tmp_path), exact_batch_class=12))
    model.fits = 1
    with pytest.raises(ModelNotReady, match=r"a pass of 2 rows .* half precision"):
        model.established(Settings(cache_dir=str(tmp_path)))


def test_another_class_is_measured_when_it_is_asked_for(tmp_path: Path) -> None:
    model = Model(by_size)
    for batch_class in (8, 3, 0, 40):
        verdict = model.established(Settings(cache_dir=str(tmp_path), exact_batch_class=batch_class))
        assert verdict.native_class == verdict.measured.fallback_class == {0: 4, 40: 16}.get(batch_class, batch_class)
        assert verdict.measured.fallback is not None
        assert verdict.measured.fallback.is_exact


@pytest.mark.parametrize(("exact", "chosen"), [({"a"}, "a"), ({"b"}, "b"), (set(), "b"), ({"a", "b"}, "a")])
def test_auto_takes_the_first_backend_that_is_exact_or_the_last(
    exact: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader(name: str) -> Any:
        def load(location: str, model_id: str, settings: Settings, survey: Survey | None) -> Backend:
            backend = ToyBackend(model_id, settings)
            exactness = Exactness.ANY_SIZE if name in exact else Exactness.INEXACT
            info = replace(backend.facts.info, backend=name, exactness=exactness)
            backend.facts = replace(backend.facts, info=info)
            return backend

        return lambda: load

    monkeypatch.setattr(backends, "BACKENDS", {name: loader(name) for name in "ab"})
    monkeypatch.setattr(backends, "AUTO", dict.fromkeys(("cpu", "cuda"), ("a", "b")))
    assert backends.load("", "toy", Settings(backend="auto")).facts.info.backend == chosen


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drift", [lambda size, position: 0.0, by_size])
def test_a_second_start_measures_nothing(drift: Any, kept: Settings) -> None:
    first, second = Model(drift), Model(drift)
    verdict = first.established(kept)
    assert first.evaluations > 1
    assert second.established(kept) == verdict
    assert second.evaluations == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"server": "1.1"},
        {"backend": "openvino"},
        {"version": "2.10"},
        {"model": "e" * 64},
        {"dtype": "bfloat16"},
        {"device": "another CPU"},
        {"threads": 3},
        {"minimum": 3},
        {"maximum": 8},
    ],
)
def test_what_was_measured_of_something_else_is_not_used(changed: dict[str, Any], kept: Settings) -> None:
    """Neither from its own file nor if its file has the name of ours."""
    Model(by_size).established(kept)
    theirs = file_of(Path(kept.cache_dir)).read_text()
    model, key = Model(), replace(KEY, **changed)
    assert model.established(kept, key=key).exactness is Exactness.ANY_SIZE
    assert model.evaluations > 100
    for file in (Path(kept.cache_dir) / "exactness").iterdir():
        file.write_text(theirs)
    assert model.established(kept, key=key).exactness is Exactness.ANY_SIZE
    assert model.evaluations > 100


def test_another_function_with_the_same_key_is_measured_again(kept: Settings) -> None:
    """Such as after another library was put under the same version."""
    Model(by_size).established(kept)
    model = Model()
    model.gain = 0.91
    assert model.established(kept).exactness is Exactness.ANY_SIZE
    assert model.evaluations > 100
    assert any("other bits" in note for note in model.notes)
    model.established(kept)
    assert model.evaluations == 1


def _without(part: str) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        values = json.loads(data)
        del values[part]
        return json.dumps(values).encode()

    return edit


def _with(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"\xff\xfe" + data,
        lambda data: b"[]",
        lambda data: b"null",
        lambda data: data.replace(b"true", b'"yes"'),
        _without("fingerprint"),
        _without("key"),
        _with(format=2),
        _with(pass_seconds={"2": "fast"}),
        _with(pass_seconds={"2": -1.0}),
        _with(pass_seconds={"0": 1.0}),
        _with(any_size={"compared": 1}),
        _with(more=1),
    ],
)
def test_a_damaged_file_is_said_and_written_again(
    damage: Callable[[bytes], bytes], kept: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    verdict = model.established(kept)
    file = file_of(Path(kept.cache_dir))
    file.write_bytes(damage(file.read_bytes()))
    assert model.established(kept).exactness is verdict.exactness
    assert model.evaluations > 100
    assert "a file of measurements cannot be used" in capsys.readouterr().out
    model.established(kept)
    assert model.evaluations == 1
    assert capsys.readouterr().out == ""


def test_without_a_directory_that_can_be_written_every_start_measures(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = Model()
    for _ in range(2):
        assert model.established(Settings(cache_dir=str(tmp_path / "file"))).exactness is Exactness.ANY_SIZE
        assert model.evaluations > 100


def test_a_directory_that_can_only_be_read_is_used(kept: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that an image was built with."""
    Model().established(kept)
    monkeypatch.setattr("underpaint_server.cache.directory", lambda settings: None)
    model = Model()
    assert model.established(kept).exactness is Exactness.ANY_SIZE
    assert model.evaluations == 1


def test_a_file_that_cannot_be_written_is_said(kept: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(kept.cache_dir) / "exactness").write_text("a file where the directory should be")
    assert Model().established(kept).exactness is Exactness.ANY_SIZE
    assert "cannot be written" in capsys.readouterr().out


def test_nothing_but_whole_files_is_left(kept: Settings) -> None:
    Model().established(kept)
    assert [file.suffix for file in (Path(kept.cache_dir) / "exactness").iterdir()] == [".json"]


# --- the device ---------------------------------------------------------------------------------------------------

INFO = (
    "processor\t: 0\nmodel name\t: A CPU\nmodel\t: 143\nstepping\t: 8\nflags\t\t: fpu avx2 amx_bf16\n\nprocessor\t: 1\n"
)


def test_a_cpu_is_told_by_its_model_and_its_instructions(tmp_path: Path) -> None:
    file, cpu = tmp_path / "cpuinfo", torch.device("cpu")

    def described(text: str) -> str:
        file.write_text(text)
        return describe(cpu, file)

    one = described(INFO)
    assert one.startswith("A CPU 143 8 ")
    assert described(INFO.replace("fpu avx2", "avx2 fpu")) == one
    for other in (INFO.replace(" amx_bf16", ""), INFO.replace("A CPU", "B"), INFO.replace(": 8", ": 9")):
        assert described(other) != one
    arm = described("processor\t: 0\nFeatures\t: fp asimd sve\nCPU part\t: 0xd40\n")
    assert arm != described("processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd40\n")
    assert describe(cpu, tmp_path / "none")
