"""Passes that are recorded and replayed give the answers of passes that are not, whatever is recorded when."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from support.engine import Bench
from support.jobs import ddim_options, edit_job, every_kind_of_job, injection, injection_job, invert_job
from support.recorder import CpuRecorder
from torch import Tensor, nn
from underpaint_server.backends.model import ModelBackend, load_model
from underpaint_server.backends.recorded import Recorded
from underpaint_server.backends.torch_ import TorchRuntime
from underpaint_server.methods.sdedit.options import SdEdit
from underpaint_server.models.taps import Taps
from underpaint_server.rows import Batch, Captured, Denoise, Embed
from underpaint_server.settings import Settings


class Net(nn.Module):
    """A network with feature sites, whose answer depends on the number of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Tanh()
        self.up_blocks = nn.ModuleList([nn.Softplus(), nn.Tanh()])
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        x = self.mid_block(x + t[:, None, None, None])
        for block in self.up_blocks:
            x = block(x)
        return x + len(x)


def inputs(rows: int, side: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, 2, side, side), generator=generator), torch.randint(0, 9, (rows,), generator=generator)


class Bed:
    """The network alone, and recorded."""

    def __init__(self, rare: int = 3) -> None:
        self.net = Net()
        self.taps = Taps(self.net)
        self.recorder = CpuRecorder()
        self.recorded = Recorded(self.net, self.taps, self.recorder, rare)

    def prepare(self, *sizes: int) -> None:
        self.recorded.prepare(lambda size: self.recorded(*inputs(size)), sizes)

    def rows(self) -> list[int]:
        """Numbers of rows of all that was recorded, in the order in which it was."""
        return [len(recording.output) for recording in self.recorder.recordings]


def test_nothing_is_recorded_before_it_is_known_what_will_come() -> None:
    bed = Bed()
    assert torch.equal(bed.recorded(*inputs(3)), bed.net(*inputs(3)))
    assert bed.rows() == []


def test_the_largest_is_recorded_first_and_each_once() -> None:
    bed = Bed()
    bed.prepare(2, 8, 4)
    assert bed.rows() == [8, 4, 2]
    for size in (2, 4, 8, 2):
        calls = bed.net.calls
        answer = bed.recorded(*inputs(size, seed=size))
        assert bed.net.calls == calls + 1
        assert torch.equal(answer, bed.net(*inputs(size, seed=size)))
    assert bed.rows() == [8, 4, 2]
    assert bed.recorder.replays == 2 * 3 + 4, "each was compared once, and then answered"


def test_an_answer_stays_what_it_is_when_others_are_computed() -> None:
    bed = Bed()
    bed.prepare(2, 4)
    given = [inputs(size, seed=seed) for seed, size in enumerate((2, 4, 2, 3, 2))]
    answers = [bed.recorded(*one) for one in given]
    for one, answer in zip(given, answers, strict=True):
        assert torch.equal(answer, bed.net(*one))


def test_what_was_given_may_be_written_to_afterwards_and_is_not_changed() -> None:
    bed = Bed()
    bed.prepare(2)
    x, t = inputs(2)
    before = x.clone()
    answer = bed.recorded(x, t)
    assert torch.equal(x, before)
    x.zero_()
    assert torch.equal(answer, bed.net(before, t))


def test_rare_shapes_are_recorded_when_they_come_and_the_longest_unused_are_dropped() -> None:
    bed = Bed(rare=2)
    bed.prepare(4)
    for side in (8, 6, 8, 10):  # 6 is the longest unused when 10 comes
        bed.recorded(*inputs(4, side))
    assert len(bed.recorder.recordings) == 4
    bed.recorded(*inputs(4, 8))
    bed.recorded(*inputs(4, 10))
    assert len(bed.recorder.recordings) == 4
    bed.recorded(*inputs(4, 6))
    assert len(bed.recorder.recordings) == 5
    bed.recorded(*inputs(4))
    assert len(bed.recorder.recordings) == 5, "what was prepared is never dropped"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("operation not permitted when stream is capturing"), torch.OutOfMemoryError("no memory")],
    ids=["cannot be captured", "no memory"],
)
@pytest.mark.parametrize("at_start", [True, False], ids=["at start", "later"])
def test_what_cannot_be_recorded_is_called(error: Exception, at_start: bool) -> None:
    bed = Bed()
    if not at_start:
        bed.prepare()
    bed.recorder.error = error
    if at_start:
        bed.prepare(4, 2)
    for _ in range(2):
        assert torch.equal(bed.recorded(*inputs(4)), bed.net(*inputs(4)))
    assert bed.rows() == ([2] if at_start else []), "it is not tried again with every pass"


def test_a_replay_with_other_bits_is_not_used() -> None:
    bed = Bed()
    bed.net.mid_block.register_forward_hook(lambda block, given, out: out + 1e-6 * bed.net.calls)
    bed.prepare(4)
    replays = bed.recorder.replays
    bed.recorded(*inputs(4))
    assert bed.recorder.replays == replays


def test_a_network_that_raises_raises() -> None:
    bed = Bed()
    bed.prepare(2)
    with pytest.raises(RuntimeError, match="must match"):
        bed.recorded(inputs(2)[0], torch.zeros(3))
    assert torch.equal(bed.recorded(*inputs(2)), bed.net(*inputs(2)))


# --- the embedded model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorder() -> CpuRecorder:
    return CpuRecorder()


@pytest.fixture(scope="module")
def replayed(recorder: CpuRecorder) -> ModelBackend:
    """The embedded model with a batch class, its passes recorded."""
    settings = Settings(exact_batching="pinned", exact_batch_class=4)
    make = partial(TorchRuntime, recorder=recorder)
    return load_model("", "mini", settings, None, torch.float32, make)


@pytest.fixture(scope="module")
def eager() -> ModelBackend:
    return load_model(
        "", "mini", Settings(exact_batching="pinned", exact_batch_class=4), None, torch.float32, TorchRuntime
    )


def double(own: Tensor) -> Tensor:
    return own * 2


def rows_of(backend: ModelBackend, wants: Sequence[dict[str, Any]]) -> list[Denoise]:
    shape = backend.facts.latent_shape(backend.facts.info.width, backend.facts.info.height)
    (text,) = backend.predict(Batch([Embed("a red apple")], 4))
    generator = torch.Generator().manual_seed(0)
    return [
        Denoise(torch.randn(shape, generator=generator).double(), 37 * i, 0.5, text.prompt_embeds, **want)
        for i, want in enumerate(wants)
    ]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    pairs = [(one.noise_pred, other.noise_pred), *((one.features[site], other.features[site]) for site in one.features)]
    return all(torch.equal(a, b) for a, b in pairs)


def test_with_a_batch_class_only_passes_of_that_size_are_recorded(
    replayed: ModelBackend, recorder: CpuRecorder
) -> None:
    assert [len(one.output) for one in recorder.recordings][:1] == [replayed.facts.info.batch_class] == [4]
    assert not recorder.recordings[0].kept


def test_without_one_every_size_that_the_engine_runs_is() -> None:
    recorder = CpuRecorder()
    settings, make = Settings(max_batch_size=4), partial(TorchRuntime, recorder=recorder)
    known = load_model("", "mini", settings, None, torch.float32, TorchRuntime).facts.info
    if known.batch_class is not None:
        pytest.skip("rows depend on the size of their pass on this processor")
    load_model("", "mini", settings, None, torch.float32, make)
    assert [len(one.output) for one in recorder.recordings] == [4, 3, 2]


def test_captured_and_mapped_rows_are_replayed_with_the_bits_of_eager_ones(
    replayed: ModelBackend, eager: ModelBackend, recorder: CpuRecorder
) -> None:
    sites = replayed.facts.info.feature_sites
    wants: list[dict[str, Any]] = [
        {},
        {"capture": ("mid",)},
        {"maps": {"mid": double}},
        {"capture": sites, "maps": {"up_0": double, "mid": torch.tanh}},
        {"maps": dict.fromkeys(sites, torch.tanh)},
    ]
    rows, rng, before = rows_of(replayed, wants), random.Random(0), recorder.replays
    for _ in range(8):
        part = rng.sample(rows, 4)
        answers = zip(replayed.predict(Batch(part, 4)), eager.predict(Batch(part, 4)), strict=True)
        assert all(same(ours, theirs) for ours, theirs in answers)
    assert recorder.replays >= before + 8


def test_a_row_has_the_bits_of_a_plain_one_beside_mapped_rows_and_with_a_map_that_changes_nothing(
    replayed: ModelBackend,
) -> None:
    plain, mapped, unchanged = rows_of(replayed, [{}, {"maps": {"mid": double}}, {"maps": {"mid": lambda own: own}}])
    expected = replayed.predict(Batch([plain, unchanged], 4))
    beside = replayed.predict(Batch([plain, mapped], 4))[0]
    assert torch.equal(beside, expected[0])
    as_plain = Denoise(unchanged.latents, unchanged.timestep, 0.5, unchanged.prompt_embeds)
    assert torch.equal(replayed.predict(Batch([plain, as_plain], 4))[1], expected[1])


def test_what_is_captured_stays_what_it_is(replayed: ModelBackend) -> None:
    rows = rows_of(replayed, [{"capture": ("mid",)}] * 2)
    (first,) = replayed.predict(Batch(rows[:1], 4))
    assert isinstance(first, Captured)
    before = first.features["mid"].clone()
    replayed.predict(Batch(rows[1:], 4))
    assert torch.equal(first.features["mid"], before)


def test_a_map_that_fails_leaves_the_next_pass_alone(replayed: ModelBackend, eager: ModelBackend) -> None:
    def fails(own: Tensor) -> Tensor:
        raise ValueError("a map")

    plain, failing = rows_of(replayed, [{}, {"maps": {"mid": fails}}])
    with pytest.raises(ValueError, match="a map"):
        replayed.predict(Batch([failing], 4))
    assert same(replayed.predict(Batch([plain], 4))[0], eager.predict(Batch([plain], 4))[0])


def test_every_kind_of_job_has_the_same_bytes(replayed: ModelBackend, eager: ModelBackend) -> None:
    """At other sizes too."""
    wide = invert_job("mini", 64, ddim_options(3))
    jobs = [*every_kind_of_job("mini", 64, 3), edit_job("mini", 48, SdEdit(0.9, 3)), wide]
    jobs.append(injection_job("mini", 64, injection(weight=0.0), steps=3))
    with Bench(replayed) as ours, Bench(eager) as theirs:
        for one, other in zip(ours.run(jobs), theirs.run(jobs), strict=True):
            assert _bits(one) == _bits(other)


def _bits(result: Any) -> list[bytes]:
    assert not isinstance(result, Exception), result
    arrays = [getattr(result, name, None) for name in ("pixels", "mask", "difference")]
    for inversion in (getattr(result, name, None) for name in ("inversion", "companion")):
        arrays += inversion.arrays.values() if inversion is not None else ()
    return [array.tobytes() for array in arrays if array is not None] + [repr(getattr(result, "state", None)).encode()]
