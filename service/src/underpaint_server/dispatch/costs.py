"""What one network row costs, by model and size of the image; for the estimate of the backlog."""

from collections import OrderedDict
from typing import Final

_WEIGHT: Final = 0.1
"""Weight of a new value in the exponential moving average."""
_SIZES: Final = 64
"""Most sizes that are remembered. Callers choose the sizes of generated images."""


class RowCosts:
    """Seconds of one network row: moving averages over the passes of each model and image size."""

    def __init__(self) -> None:
        self._row_s: OrderedDict[tuple[str, int], float] = OrderedDict()
        """(model, pixels) -> seconds; the sizes measured last at the end."""

    def add(self, model: str, pixels: int, rows: int, duration_s: float) -> None:
        """Count a pass of ``rows`` network rows for images of ``pixels`` pixels."""
        value = duration_s / rows
        mean = self._row_s.pop((model, pixels), value)
        self._row_s[model, pixels] = (1 - _WEIGHT) * mean + _WEIGHT * value
        if len(self._row_s) > _SIZES:
            self._row_s.popitem(last=False)

    def row_s(self, model: str, pixels: int) -> float:
        """Estimated seconds of one row for an image of ``pixels`` pixels; 0 where nothing of the model is known.

        A size that has not been measured is estimated from the nearest one, in proportion to the pixels.
        """
        known = [size for name, size in self._row_s if name == model]
        if not known:
            return 0.0
        nearest = min(known, key=lambda size: max(size / pixels, pixels / size))
        return self._row_s[model, nearest] * pixels / nearest
