"""The measurement of whether a pass changes the bits of its rows, on functions that are known."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from underpaint_server.backends.invariance import Network, choose_class, compare, fingerprint, rows_of, time_passes
from underpaint_server.errors import OutOfMemory

BIT = 2.0**-20
"""A difference as of one bit of float32."""

Drift = Callable[["Passes", int, Tensor], float]
"""What is added to a row: a function of the passes so far, the row's position and the row."""


@dataclass
class Passes:
    """A network with a known dependence on its passes; it counts them."""

    drift: Drift = lambda passes, position, row: 0.0
    sizes: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)

    def __call__(self, latents: Tensor, timesteps: list[int], embeds: Tensor) -> Tensor:
        assert len(latents) == len(timesteps) == len(embeds)
        self.sizes.append(len(latents))
        self.rows.extend(latents)
        self.timesteps.extend(timesteps)
        predictions = 0.9 * latents + torch.tensor(timesteps)[:, None, None, None] / 1000
        drifts = [self.drift(self, position, row) for position, row in enumerate(latents)]
        return predictions + torch.tensor(drifts, dtype=torch.float64)[:, None, None, None]

    def network(self, minimum: int = 2, maximum: int = 16) -> Network:
        return Network(self, (4, 8, 8), (4, 8), minimum, maximum)


def _size(passes: Passes) -> int:
    return passes.sizes[-1]


def _smooth(row: Tensor) -> bool:
    """Whether neighbouring latents are alike, as in an encoded photo and not in random numbers."""
    return bool((row[:, 1:] - row[:, :-1]).std() < row.std())


DRIFTS: dict[str, Drift] = {
    "at every size": lambda p, i, row: BIT * _size(p),
    "only at size 5": lambda p, i, row: BIT * (_size(p) == 5),
    "only at size 10": lambda p, i, row: BIT * (_size(p) == 10),
    "only at size 15": lambda p, i, row: BIT * (_size(p) == 15),
    "only at the largest size": lambda p, i, row: BIT * (_size(p) == 16),
    "only in the last position": lambda p, i, row: BIT * (i == 15),
    "only in position 3 of six": lambda p, i, row: BIT * (_size(p) == 6 and i == 3),
    "only after 100 passes": lambda p, i, row: BIT * (len(p.sizes) == 101),
    "for one row in 32": lambda p, i, row: BIT * _size(p) * (int(row.sum() * 1e9) % 32 == 0),
    "only for latents as photos have": lambda p, i, row: BIT * _size(p) * _smooth(row),
    "for one such row in 50": lambda p, i, row: BIT * _size(p) * (_smooth(row) and int(row.sum() * 1e9) % 50 == 0),
    "if a large neighbour is there": lambda p, i, row: BIT * bool(p.rows[-1].abs().max() > 2.5) * (i == 0),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_what_changes_bits_is_found(name: str) -> None:
    found = compare(Passes(DRIFTS[name]).network())
    assert found.is_exact is False
    assert found.unequal > 0
    assert 0 < found.largest <= 17 * BIT
    assert found.round_trip is None, "ended at the first difference"


@pytest.mark.parametrize(("minimum", "maximum"), [(2, 16), (1, 16), (1, 1), (2, 2), (2, 5), (4, 4), (3, 40)])
def test_a_function_of_the_row_alone_is_exact_at_any_sizes(minimum: int, maximum: int) -> None:
    passes = Passes()
    found = compare(passes.network(minimum, maximum))
    assert found.is_exact is True
    assert (found.unequal, found.largest, found.repeatable) == (0, 0.0, True)
    assert found.round_trip is not None
    assert found.round_trip <= 1e-12
    assert found.evaluations == len(passes.sizes)
    assert found.compared >= rows_of()
    assert set(passes.sizes) == set(range(minimum, maximum + 1)), "every size is met"


def test_the_walk_is_long_and_its_latents_are_those_of_photos() -> None:
    passes = Passes()
    compare(passes.network())
    assert len(passes.sizes) >= 150
    assert sum(map(_smooth, passes.rows)) >= 1000
    assert min(passes.timesteps) < 100
    assert max(passes.timesteps) > 900


def test_a_pass_that_is_not_repeated_by_another_is_not_exact() -> None:
    """Neither with passes of any size nor with a batch class."""
    for sizes in ((2, 16), (4, 4)):
        found = compare(Passes(lambda p, i, row: BIT * (len(p.sizes) % 2)).network(*sizes))
        assert not found.repeatable
        assert found.is_exact is False


def test_a_dependence_on_the_size_alone_is_exact_in_passes_of_one_size() -> None:
    assert compare(Passes(lambda p, i, row: BIT * _size(p)).network(4, 4)).is_exact is True
    assert compare(Passes(lambda p, i, row: BIT * i).network(4, 4)).is_exact is False


def test_without_a_stop_all_differences_are_counted() -> None:
    found = compare(Passes(lambda p, i, row: BIT * (_size(p) != 16)).network(), stop=False)
    assert found.compared >= rows_of()
    assert found.compared / 2 < found.unequal < found.compared
    assert found.largest == pytest.approx(BIT)
    assert found.round_trip is not None
    assert found.round_trip > 1e-8, "what this does to an inversion"


def test_the_limit_of_time_ends_it_without_an_answer() -> None:
    done: list[int] = []
    found = compare(Passes().network(), limit_s=0, advance=done.append)
    assert found.is_exact is None
    assert (found.evaluations, found.round_trip, done) == (1, None, [])


def test_progress_is_told_of_every_row() -> None:
    done: list[int] = []
    compare(Passes().network(), steps=2, advance=done.append)
    assert sum(done) == rows_of(2)


def test_the_fingerprint_is_of_bits_and_of_what_may_change_them() -> None:
    one = fingerprint(Passes().network(), "two threads")
    assert one == fingerprint(Passes().network(maximum=8), "two threads")
    assert one != fingerprint(Passes().network(), "three threads")
    assert one != fingerprint(Passes(lambda p, i, row: BIT).network(), "two threads")


@pytest.mark.parametrize(
    ("rows_per_s", "batch_class"),
    [
        ({2: 53, 4: 92, 8: 146, 16: 216}, 8),  # bfloat16 on a CPU with AMX; 16 rows take 1.96 times as long as two
        ({2: 78, 4: 111, 8: 136, 16: 142}, 4),  # without AMX: eight rows take 2.3 times as long
        ({2: 5.4, 4: 5.8, 8: 6.3}, 2),  # a large network on a CPU gains nothing
        ({2: 100, 4: 200, 8: 390, 16: 780}, 16),  # a GPU that is idle below 16 rows
        ({2: 100, 4: 150, 8: 160}, 4),
        ({2: 100}, 2),
        ({3: 100, 4: 110}, 3),
    ],
)
def test_the_batch_class_is_the_smallest_that_a_busy_server_and_a_lone_request_can_bear(
    rows_per_s: dict[int, float], batch_class: int
) -> None:
    assert choose_class({size: size / pace for size, pace in rows_per_s.items()}) == batch_class


def _slow(seconds: Callable[[int], float], monkeypatch: pytest.MonkeyPatch, fits: int = 99) -> Callable[..., Any]:
    """A network on a clock of its own."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def noise_preds(latents: Tensor, timesteps: list[int], embeds: Tensor) -> Tensor:
        if len(latents) > fits:
            raise OutOfMemory("too large")
        now[0] += seconds(len(latents))
        return latents

    return noise_preds


@pytest.mark.parametrize(
    ("seconds", "options", "sizes"),
    [
        (lambda rows: 0.1, {}, [2, 4, 8, 16]),
        (lambda rows: 0.1 * rows, {}, [2, 4]),  # four rows take too long, and larger passes would take longer
        (lambda rows: 0.1 * rows, {"thorough": True}, [2, 4, 8, 16]),
        (lambda rows: 30.0, {"limit_s": 50.0}, [2, 4]),
        (lambda rows: 100.0, {"limit_s": 50.0}, [2]),
        (lambda rows: 0.1, {"sizes": [2, 12]}, [2, 12]),
    ],
)
def test_passes_are_timed_up_to_the_size_that_takes_too_long(
    seconds: Callable[[int], float], options: dict[str, Any], sizes: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(_slow(seconds, monkeypatch), (4, 8, 8), (4, 8), 2, 16)
    taken = time_passes(network, **options)
    assert list(taken) == sizes
    assert taken == {size: pytest.approx(seconds(size)) for size in sizes}


def test_sizes_that_do_not_fit_the_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(time_passes(Network(_slow(lambda _: 1.0, monkeypatch, fits=7), (4, 8, 8), (4, 8), 2, 16))) == [2, 4]
    with pytest.raises(OutOfMemory):
        time_passes(Network(_slow(lambda _: 1.0, monkeypatch, fits=1), (4, 8, 8), (4, 8), 2, 16))
