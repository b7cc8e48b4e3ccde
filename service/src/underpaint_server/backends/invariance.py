"""Measure whether the bits of a row's result depend on the pass that computes it: on its size, the other rows, or the
row's position.

Libraries choose kernels and block sizes by the size of a matrix, and another block size adds in another order. EDICT
amplifies one differing bit to a visible error, and other methods to several levels of a pixel (see ARCHITECTURE.md).

A difference is rare: a bfloat16 network on a CPU with AMX gives equal bits for most inputs, and for random numbers more
often than for latents. So the rows of :func:`compare` are what a job has: coupled latents as EDICT's, which go up a
noise schedule and back, each question the result of the answers before it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from math import inf
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from underpaint_server.diffusion.schedule import scaled_linear
from underpaint_server.diffusion.snap import snap
from underpaint_server.errors import OutOfMemory

ROWS = 16
"""Rows that :func:`compare` follows. Each has its own latents, prompt and timesteps."""
STEPS = 10
"""Steps up the schedule, and as many back. A step asks two questions of each row, one for each half of its latents."""
CLASSES = (2, 4, 8, 16)
"""Sizes that :func:`time_passes` measures."""
ENOUGH_S = 1.0
"""Passes of one size are repeated for this long, in seconds, but at most :data:`REPEATS` times."""
SLOW_S = 5.0
"""A second pass of a size is timed unless the first, which may set something up, took this long, in seconds."""
REPEATS = 8
"""Most passes of one size that are timed."""
BEARABLE = 1.5
"""A pass of the batch class may take this many times as long as one of two rows, which a lone guided job would have."""
WORTHWHILE = 0.85
"""Share of the best bearable class's rows a second that a smaller class must reach to be taken instead."""

NoisePreds = Callable[[Tensor, list[int], Tensor], Tensor]
"""Function from latents (b, c, h, w), b timesteps and prompt_embeds (b, tokens, width) to noise predictions."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network as the measurements see it."""

    noise_preds: NoisePreds
    latent_shape: tuple[int, ...]
    """(c, h, w) of its native latents."""
    embeds_shape: tuple[int, ...]
    """(tokens, width) of a prompt."""
    minimum: int
    """Smallest size of a pass."""
    maximum: int
    """Largest size of a pass."""
    isolate: Callable[[], None] | None = None
    """Computes each row of a pass by itself, from then on; None if the runtime cannot."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows in passes of random sizes, positions and neighbours, against the same rows in passes of one size."""

    compared: int
    """Rows compared."""
    unequal: int
    """Those of them with other bits."""
    largest: float
    """Largest difference of a noise prediction."""
    repeatable: bool
    """Whether equal passes gave equal bits."""
    round_trip: float | None
    """Largest difference of the latents after all steps up and back; None if it did not come to an end."""
    evaluations: int
    """Passes done."""
    seconds: float
    """Seconds taken."""

    @classmethod
    def none(cls) -> "Comparison":
        """One that was not begun."""
        return cls(0, 0, 0.0, True, None, 0, 0.0)

    @property
    def is_exact(self) -> bool | None:
        """Whether all bits were equal; None if the comparison was ended before it found a difference."""
        if self.unequal or not self.repeatable:
            return False
        return None if self.round_trip is None else True


def compare(
    network: Network,
    *,
    steps: int = STEPS,
    limit_s: float = inf,
    stop: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Follow :data:`ROWS` rows through ``4 * steps`` questions each, about ``5 * 4 * steps`` passes.

    Ends after ``limit_s`` seconds, and with ``stop`` at the first difference. ``advance`` is told of the rows done, in
    total :func:`rows_of`.
    """
    return _Walk(network, steps, time.monotonic() + limit_s, stop=stop).run(advance)


def rows_of(steps: int = STEPS) -> int:
    """Rows that :func:`compare` compares, at least."""
    return 4 * steps * ROWS


def fingerprint(network: Network, identity: str) -> str:
    """16 hexadecimal digits of the sha256 of ``identity`` and of the noise predictions of one fixed pass.

    The pass has as few rows as possible, so it does not depend on the batch class. Equal fingerprints mean that the
    network gives the same bits, which exact inversions need.
    """
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn((network.minimum, *network.latent_shape), generator=generator)
    timesteps = torch.randint(0, 999, (network.minimum,), generator=generator).tolist()
    embeds = torch.randn((network.minimum, *network.embeds_shape), generator=generator)
    bits = network.noise_preds(latents, timesteps, embeds).double().cpu().numpy().tobytes()
    return sha256(identity.encode() + b"\0" + bits).hexdigest()[:16]


def time_passes(
    network: Network, sizes: Sequence[int] | None = None, *, limit_s: float = inf, thorough: bool = False
) -> dict[int, float]:
    """Rows of a pass -> seconds that it takes, the fastest of several; for ``sizes``, by default :data:`CLASSES`, in
    their order.

    Ends after ``limit_s`` seconds, and unless ``thorough``, with the first size whose pass is not :data:`BEARABLE`:
    larger ones are not either. The first size is always measured. A size that does not fit the device's memory is left
    out, and all after it.
    """
    begin = time.monotonic()
    seconds: dict[int, float] = {}
    for size in (size for size in sizes or CLASSES if network.minimum <= size <= network.maximum):
        question = _Walk(network, 1, inf, stop=True).question(size)
        taken: list[float] = []
        try:
            while len(taken) < REPEATS and sum(taken) < (ENOUGH_S if len(taken) > 1 else SLOW_S):
                start = time.monotonic()
                network.noise_preds(*question)
                taken.append(time.monotonic() - start)
        except (OutOfMemory, torch.OutOfMemoryError):
            if not seconds:
                raise
            break
        seconds[size] = max(min(taken), 1e-9)
        is_bearable = seconds[size] <= BEARABLE * next(iter(seconds.values()))
        if not (is_bearable or thorough) or time.monotonic() - begin > limit_s:
            break
    return seconds


def choose_class(seconds: Mapping[int, float]) -> int:
    """The batch class: of the sizes whose pass is :data:`BEARABLE`, the smallest that is :data:`WORTHWHILE`."""
    smallest = min(seconds)
    paces = {size: size / taken for size, taken in seconds.items() if taken <= BEARABLE * seconds[smallest]}
    return min(size for size, pace in paces.items() if pace >= WORTHWHILE * max(paces.values()))


class _End(Exception):
    """The comparison ends before its last pass."""


class _Walk:
    """The rows of :func:`compare`, on their way."""

    def __init__(self, network: Network, steps: int, end: float, *, stop: bool) -> None:
        self._network = network
        self._steps = steps
        self._end, self._stop = end, stop
        self._random = Random(0)
        self._sizes = self._deck()
        generator = torch.Generator().manual_seed(0)
        channels, height, width = network.latent_shape
        coarse = torch.randn((ROWS, channels, 4, 4), generator=generator)
        fine = torch.randn((ROWS, channels, height, width), generator=generator)
        smooth = functional.interpolate(coarse, (height, width), mode="bicubic", antialias=False)
        self._start = (smooth + 0.1 * fine).double()
        self._embeds = torch.randn((ROWS, *network.embeds_shape), generator=generator)
        gap = 960 // (steps + 1)
        first = [5 + self._random.randrange(gap) for _ in range(ROWS)]
        self._levels = [[t + gap * k for t in first] for k in range(steps + 1)]
        self._compared = self._unequal = self._evaluations = 0
        self._largest, self._repeatable = 0.0, True

    def question(self, size: int) -> tuple[Tensor, list[int], Tensor]:
        """A pass of ``size`` rows, as :func:`compare` begins."""
        rows = [i % ROWS for i in range(size)]
        return self._start[rows], [self._levels[0][i] for i in rows], self._embeds[rows]

    def run(self, advance: Callable[[int], None]) -> Comparison:
        """Go the whole way, or until the end comes."""
        begin = time.monotonic()
        round_trip = None
        with suppress(_End):
            round_trip = self._there_and_back(advance)
        return Comparison(
            self._compared,
            self._unequal,
            self._largest,
            self._repeatable,
            round_trip,
            self._evaluations,
            time.monotonic() - begin,
        )

    def _there_and_back(self, advance: Callable[[int], None]) -> float:
        """The coupling of EDICT without its mixing, with the answers of the passes of random sizes."""

        def answer(latents: Tensor, level: int, *, again: bool = False) -> Tensor:
            result = self._ask(latents, self._levels[level], again=again)
            advance(ROWS)
            return result

        x = y = self._start
        for k in range(self._steps):
            a, b = self._coefficients(k)
            y = a * y + b * answer(x, k + 1, again=k == 0)
            x = a * x + b * answer(y, k + 1)
        for k in reversed(range(self._steps)):
            a, b = self._coefficients(k)
            x = (x - b * answer(y, k + 1)) / a
            y = (y - b * answer(x, k + 1, again=k == 0)) / a
        return float(torch.maximum((x - self._start).abs(), (y - self._start).abs()).max())

    def _ask(self, latents: Tensor, timesteps: list[int], *, again: bool) -> Tensor:
        """Answers of passes of random sizes, compared with those of passes of one size; ``again`` repeats the latter.

        Predictions larger than standard normal noise are scaled down, row by row, so that the latents of an untrained
        network stay in range too.
        """
        questions = torch.stack([snap(row) for row in latents])
        size = min(ROWS, self._network.maximum)
        expected = torch.empty_like(questions)
        for first in range(0, ROWS, size):
            rows = [(first + i) % ROWS for i in range(size)]
            expected[rows] = answers = self._evaluate(questions, timesteps, rows)
            if again and not torch.equal(answers, self._evaluate(questions, timesteps, rows)):
                self._repeatable = False
        answers = torch.empty_like(questions)
        for rows in self._passes():
            found = self._evaluate(questions, timesteps, rows)
            answers[rows] = found
            differences = (found - expected[rows]).abs().amax((1, 2, 3))
            self._compared += len(rows)
            self._unequal += int((differences != 0).sum())
            self._largest = max(self._largest, float(differences.max()))
            if self._stop and (self._unequal or not self._repeatable):
                raise _End
        scale = answers.square().mean((1, 2, 3), keepdim=True).sqrt()
        return answers / (scale / 2).clamp(min=1)

    def _evaluate(self, questions: Tensor, timesteps: list[int], rows: list[int]) -> Tensor:
        if self._evaluations and time.monotonic() >= self._end:
            raise _End
        self._evaluations += 1
        predictions = self._network.noise_preds(questions[rows], [timesteps[i] for i in rows], self._embeds[rows])
        return predictions.double().cpu()

    def _passes(self) -> Iterator[list[int]]:
        """Rows of passes, in random order, until each row was in one; the last pass is filled up with other rows."""
        order = self._random.sample(range(ROWS), ROWS)
        while order:
            size = next(self._sizes)
            rows, order = order[:size], order[size:]
            others = [i for i in range(ROWS) if i not in rows]
            while len(rows) < size:
                rows.append(self._random.choice(others or rows))
            self._random.shuffle(rows)
            yield rows

    def _deck(self) -> Iterator[int]:
        """Sizes of passes, endlessly: every size in random order, small ones several times, because they are cheap and
        the most frequent when few jobs run."""
        smallest, largest = self._network.minimum, self._network.maximum
        sizes = [size for size in range(smallest, largest + 1) for _ in range(max(1, round(64 / size**2)))]
        while True:
            yield from self._random.sample(sizes, len(sizes))

    def _coefficients(self, k: int) -> tuple[Tensor, Tensor]:
        """Of the DDIM step from level k to level k + 1, for each row."""
        alphas = torch.as_tensor(scaled_linear(), dtype=torch.float64)
        abar, next_abar = (alphas[self._levels[i]].reshape(-1, 1, 1, 1) for i in (k, k + 1))
        a = (next_abar / abar).sqrt()
        return a, (1 - next_abar).sqrt() - a * (1 - abar).sqrt()
