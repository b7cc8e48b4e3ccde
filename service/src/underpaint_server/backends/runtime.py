"""The interface between a model backend and what computes its networks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from underpaint_server.rows import Captured, Denoise, Row

NoisePreds = Callable[[list[Denoise]], Iterable[Tensor]]
"""Function from rows to their noise predictions, by one call of the U-Net's function in ``Family.compute``."""


class Unavailable(Exception):
    """The runtime cannot compute this model on this machine; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Passes:
    """Sizes of the passes of one kind of row."""

    minimum: int = 1
    """Smallest size; smaller passes are padded to it."""
    batch_class: int | None = None
    """Size of all passes; None where the size does not change the bits of a result."""


class Runtime(Protocol):
    """Computes the networks of one model. While it is made, it may replace functions in ``Family.compute``."""

    name: str
    """Of the backend: "torch", "openvino" or "onnxruntime"."""
    version: str
    """Of the library, for logs and for what is remembered about a machine."""
    dtype: str
    """Number format of the U-Net's passes, such as "bfloat16"."""
    sites: tuple[str, ...]
    """Names of the feature sites, in the order in which their blocks run; see :class:`Denoise`."""

    def passes(self, kind: type[Row]) -> Passes:
        """Sizes of passes of this kind of row: Denoise, Encode, Decode or Embed. Of Denoise, the batch class is left to
        the backend, which measures whether one is needed."""
        ...

    def answers(self, noise_preds: NoisePreds, rows: list[Denoise]) -> list[Tensor | Captured]:
        """Results of ``rows``, in their order, with the captures and maps that they ask for."""
        ...

    def prepare(self, run_pass: Callable[[int], object], sizes: Sequence[int]) -> None:
        """Called once at the end of loading: ``run_pass`` runs a pass of the U-Net of so many rows at the model's own
        size, and ``sizes`` are those that will come. What the runtime keeps for a size, it may make then."""
        ...

    @property
    def isolate_rows(self) -> Callable[[], None] | None:
        """Computes each row by itself at the model's own size too, from then on, so that the size of a pass cannot
        change its bits; None if the runtime cannot. One that can always does so at other sizes of latents."""
        ...
