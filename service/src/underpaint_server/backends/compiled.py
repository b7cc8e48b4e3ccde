"""What the runtimes of exported networks share: cutting passes into chunks, captures and maps.

A chunk is the rows that are computed by one call of the library. At the model's own size a pass is cut into as many
chunks as the library computes side by side. Where the number of rows in a chunk would change bits, and at sizes that
were not measured, every row is a chunk of its own, so the number of rows of a pass cannot matter.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from underpaint_server.backends.export import MAX_ROWS, OUTPUT, Exported, flag_name, value_name
from underpaint_server.backends.model import is_heavy
from underpaint_server.backends.runtime import NoisePreds, Passes
from underpaint_server.models.families import Family
from underpaint_server.models.graphs import ENCODER, UNET, Axis, Graph, Input
from underpaint_server.rows import Captured, Denoise, Row


class Session(Protocol):
    """One graph, ready to be computed on one device. Flags and values of sites that are left out are zeros."""

    workers: int
    """Chunks that are computed side by side."""

    def run(self, inputs: Mapping[str, Tensor], chunks: Sequence[slice], outputs: Sequence[str]) -> dict[str, Tensor]:
        """The named outputs for all rows of ``inputs``, (b, ...) each, computed in ``chunks``, which cover the rows.

        The inputs are contiguous. The outputs are the caller's own.
        """
        ...


class CompiledRuntime:
    """See :class:`underpaint_server.backends.runtime.Runtime`. Replaces all functions in ``model.compute``.

    ``sessions`` has one for each of the model's graphs, by name.
    """

    def __init__(
        self, name: str, version: str, dtype: str, model: Family, exported: Exported, sessions: Mapping[str, Session]
    ) -> None:
        self.name = name
        self.version = version
        self.dtype = dtype
        self.sites = tuple(exported.sites)
        self._shapes = exported.sites
        width, height = model.native_px
        self._native = (height // model.vae_scale, width // model.vae_scale)
        self._vae_scale = model.vae_scale
        self._graphs, self._compute = model.graphs, model.compute
        self._isolates = is_heavy(model)  # a chunk of each size would be compiled, with a copy of the weights
        self._rows: list[Denoise] = []
        self._captured: list[dict[str, Tensor]] = []
        self._unet, self._inputs = sessions[UNET], [each.name for each in model.graphs[UNET].inputs]
        for graph in model.graphs:
            model.compute[graph] = _Alone(model.graphs[graph], sessions[graph])
        model.compute[UNET] = self._denoise

    def passes(self, kind: type[Row]) -> Passes:
        """See :class:`Runtime`."""
        return Passes()

    def prepare(self, run_pass: Callable[[int], object], sizes: Sequence[int]) -> None:
        """See :class:`Runtime`. Compiles what passes of these sizes and single images and texts need."""
        for size in [1] if self._isolates else sizes:
            run_pass(size)
        for name, graph in self._graphs.items():
            if name != UNET:
                self._compute[name](*(self._example(each, name) for each in graph.inputs))

    def _example(self, each: Input, graph: str) -> Tensor:
        """Zeros for one row of an input at the model's own size."""
        scale = self._vae_scale if graph == ENCODER else 1
        sides = {"height": self._native[0] * scale, "width": self._native[1] * scale}
        shape = [sides[axis.name] if isinstance(axis, Axis) else axis for axis in each.axes]
        return torch.zeros((1, *shape), dtype=each.dtype)

    def isolate_rows(self) -> None:
        """See :class:`Runtime`."""
        self._isolates = True

    def answers(self, noise_preds: NoisePreds, rows: list[Denoise]) -> list[Tensor | Captured]:
        """See :class:`Runtime`."""
        self._rows, self._captured = rows, [{} for _ in rows]
        try:
            results = zip(rows, noise_preds(rows), self._captured, strict=True)
            return [Captured(pred, features) if row.capture else pred for row, pred, features in results]
        finally:
            self._rows, self._captured = [], []

    def _denoise(self, *inputs: Tensor) -> Tensor:
        """The U-Net's output for the rows of :meth:`answers`; for any rows without captures and maps elsewhere.

        A row with maps is computed again after each of its sites, with the changed activation put in. Where a row
        without maps asks the same of the network, as content injection does, the first time is spared.
        """
        own = {name: tensor.contiguous() for name, tensor in zip(self._inputs, inputs, strict=True)}
        mapped = [i for i, row in enumerate(self._rows) if row.maps]
        if not mapped:
            output, features = self._run(own, list(range(len(inputs[0]))))
            self._capture(list(range(len(self._rows))), features)
            return output
        twins = {i: twin for i in mapped if (twin := self._twin(i)) is not None}
        first = [i for i in range(len(self._rows)) if i not in twins]
        output, features = self._run(own, first, self._mapped_sites(mapped))
        self._capture(first, features)
        place = {row: number for number, row in enumerate(first)}
        unmapped = {i: {site: values[place[twins.get(i, i)]] for site, values in features.items()} for i in mapped}
        whole = output.new_empty((len(self._rows), *output.shape[1:]))
        whole[first] = output
        self._map(own, mapped, unmapped, whole)
        return whole

    def _map(
        self, own: Mapping[str, Tensor], mapped: list[int], activations: dict[int, dict[str, Tensor]], output: Tensor
    ) -> None:
        """Replace the output of the rows ``mapped`` by theirs after all maps.

        ``activations`` has those of each row without any map, by site.
        """
        changes: dict[int, dict[str, Tensor]] = {i: {} for i in mapped}
        for site in self.sites:
            now = [i for i in mapped if site in self._rows[i].maps]
            if not now:
                continue
            for i in now:
                changed = self._rows[i].maps[site](activations[i][site].clone())
                changes[i][site] = changed.to(torch.float32)
            results, features = self._run(own, now, self._mapped_sites(now), [changes[i] for i in now])
            output[now] = results
            self._capture(now, features)
            for number, i in enumerate(now):
                activations[i] = {name: values[number] for name, values in features.items()}

    def _run(
        self,
        own: Mapping[str, Tensor],
        rows: list[int],
        sites: Sequence[str] = (),
        changes: Sequence[Mapping[str, Tensor]] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The output of some rows and their activations at ``sites`` and where they capture, with the changed
        activations of each row, if any."""
        inputs = {name: values if len(values) == len(rows) else values[rows] for name, values in own.items()}
        latents = inputs[self._inputs[0]]
        for site in {site for change in changes for site in change}:
            flags, values = (latents.new_zeros(len(rows), 1, 1, 1, dtype=torch.bool), self._zeros(site, latents))
            for number, change in enumerate(changes):
                if site in change:
                    flags[number], values[number] = True, change[site]
            inputs |= {flag_name(site): flags, value_name(site): values}
        captured = {site for i in rows if i < len(self._rows) for site in self._rows[i].capture}
        outputs = [OUTPUT, *(site for site in self.sites if site in captured or site in sites)]
        alone = self._isolates or tuple(latents.shape[2:]) != self._native
        results = self._unet.run(inputs, chunks(len(rows), self._unet.workers, alone=alone), outputs)
        return results.pop(OUTPUT), results

    def _zeros(self, site: str, latents: Tensor) -> Tensor:
        return latents.new_zeros(self._shapes[site].shape(latents.shape), dtype=torch.float32)

    def _capture(self, rows: Sequence[int], features: Mapping[str, Tensor]) -> None:
        for number, i in enumerate(rows):
            for site in self._rows[i].capture if i < len(self._rows) else ():
                self._captured[i][site] = features[site][number].to(torch.float32, copy=True)

    def _mapped_sites(self, rows: Sequence[int]) -> list[str]:
        return [site for site in self.sites if any(site in self._rows[i].maps for i in rows)]

    def _twin(self, mapped: int) -> int | None:
        """A row without maps that asks the same of the network as a row with maps, or None."""
        row = self._rows[mapped]
        for number, other in enumerate(self._rows):
            is_same = other.latents is row.latents and other.prompt_embeds is row.prompt_embeds
            if is_same and other.timestep == row.timestep and not other.maps:
                return number
        return None


class _Alone:
    """A graph that computes each row by itself: function in ``Family.compute``."""

    def __init__(self, graph: Graph, session: Session) -> None:
        self._names = [each.name for each in graph.inputs]
        self._session = session

    def __call__(self, *inputs: Tensor) -> Tensor:
        own = {name: tensor.contiguous() for name, tensor in zip(self._names, inputs, strict=True)}
        rows = chunks(len(inputs[0]), self._session.workers, alone=True)
        return self._session.run(own, rows, [OUTPUT])[OUTPUT]


def chunks(rows: int, workers: int, *, alone: bool) -> list[slice]:
    """The rows of a pass in chunks: each row by itself, or as evenly as possible over the workers."""
    count = rows if alone else max(min(workers, rows), -(-rows // MAX_ROWS))
    bounds = [rows * number // count for number in range(count + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds)]
