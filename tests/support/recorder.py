"""Records passes on the CPU: what a CUDA graph would replay is called again, on the same memory."""

from collections.abc import Callable

from torch import Tensor
from underpaint_server.backends.recorded import Between
from underpaint_server.models.taps import Handler


class CpuRecorder:
    """See :class:`underpaint_server.backends.recorded.Recorder`."""

    def __init__(self) -> None:
        self.recordings: list[CpuRecording] = []
        """All that were made, in their order."""
        self.replays = 0
        self.error: Exception | None = None
        """What the next recording fails with."""

    def record(self, function: Callable[[Handler], Tensor]) -> "CpuRecording":
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.recordings.append(CpuRecording(self, function))
        return self.recordings[-1]

    def scribble(self) -> None:
        """What a recording has put into its memory lasts until the next replay, and nobody may still read it then."""
        for recording in self.recordings:
            for memory in (recording.output, *recording.kept.values()):
                memory.fill_(float("nan"))


class CpuRecording:
    """See :class:`underpaint_server.backends.recorded.Recording`."""

    def __init__(self, recorder: CpuRecorder, function: Callable[[Handler], Tensor]) -> None:
        self.kept: dict[str, Tensor] = {}
        """The activations at its cuts, by site."""
        self._recorder = recorder
        self._function = function
        self.output = function(self._keep).clone()

    def replay(self, between: Between) -> Tensor:
        self._recorder.scribble()
        self._recorder.replays += 1

        def cut(site: str, activation: Tensor) -> Tensor:
            kept = self.kept[site].copy_(activation)
            between(site, kept)
            return kept

        return self.output.copy_(self._function(cut))

    def _keep(self, site: str, activation: Tensor) -> Tensor:
        self.kept[site] = activation.clone()
        return self.kept[site]
