"""Networks as ONNX files, for the runtimes that compile them.

A file is made once for each checkpoint and kept in the cache directory. Its name is a digest of everything that decides
its contents, it is written under another name first, and its sha256 is stored beside it and compared when it is read.
So servers may share the directory, and a damaged file is made again.
"""

import atexit
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from hashlib import file_digest, sha256
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor, nn

from underpaint_server import cache
from underpaint_server.backends.runtime import Unavailable
from underpaint_server.models.families import Family
from underpaint_server.models.graphs import UNET, Axis, Graph, Input
from underpaint_server.models.taps import blocks
from underpaint_server.settings import Settings

FORMAT = 1
"""Number of the form of the files; a change of this module that changes them takes the next one."""
_EXPORTERS = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
"""Packages whose versions may change the files."""
MAX_ROWS = 63
"""Largest batch of a file: from 64 on, the upsampling layers of diffusers compute in another way."""
MAX_UNITS = 512
"""Largest height and width of a file's inputs, in units of the axis."""
_SITES = "sites.json"
OUTPUT = "output"
"""Name of the output of every graph."""


def flag_name(site: str) -> str:
    """Name of the input (b, 1, 1, 1), bool: whether a row's activation at the site is replaced."""
    return f"{site}_flag"


def value_name(site: str) -> str:
    """Name of the input (b, c, h, w), float32: what replaces the activation. Only rows with the flag use it."""
    return f"{site}_value"


@dataclass(frozen=True, slots=True)
class Site:
    """A feature site of a U-Net: a further output (b, channels, height / divisor, width / divisor) for latents of that
    height and width, and a flag and a value as further inputs."""

    channels: int
    divisor: int

    def shape(self, latents: Sequence[int]) -> tuple[int, int, int, int]:
        """Shape of its activations for latents of this shape, (b, c, h, w)."""
        return latents[0], self.channels, latents[2] // self.divisor, latents[3] // self.divisor


class Exported:
    """The graphs of one model as files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Holds a folder for each graph."""
        loaded: dict[str, list[int]] = json.loads((folder / UNET / _SITES).read_text())
        self.sites = {name: Site(*values) for name, values in loaded.items()}
        """Name of each feature site -> its shape, in the order in which their blocks run."""

    def file(self, graph: str) -> Path:
        """The ONNX file of a graph."""
        return self.folder / graph / "model.onnx"


def export(model: Family, settings: Settings, say: Callable[[str], None]) -> Exported:
    """The model's graphs as files, made where they are missing or damaged.

    Files of a cache directory that cannot be written to are used; what is missing there is written to a temporary
    directory, which is deleted with the process. ``say`` is called before what takes long. Raises :class:`Unavailable`
    if the exporter cannot express a network, or if files cannot be written anywhere.
    """
    try:
        folder = cache.location(settings) / "onnx" / key(model)
        if not _are_whole(folder, model):
            _make(folder, model, say)
    except (OSError, RuntimeError) as error:
        say(f"the exported networks are not kept, and the next start exports again: {error}")
        folder = _temporary()
        try:
            _make(folder, model, say)
        except OSError as second:
            raise Unavailable(f"the exported networks cannot be written to '{folder}': {second}") from second
    return Exported(folder)


def _are_whole(folder: Path, model: Family) -> bool:
    return all(_is_whole(folder / name) for name in model.graphs)


def _make(folder: Path, model: Family, say: Callable[[str], None]) -> None:
    """Export the graphs that are missing or damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for name, graph in model.graphs.items():
            if not _is_whole(folder / name):
                say(f"exporting the {name.replace('_', ' ')} to ONNX; later starts use the file")
                _write(folder / name, graph, model.unet if name == UNET else None)


def key(model: Family) -> str:
    """32 hexadecimal digits: digest of what decides the contents of a model's files."""
    parts = [model.digest, str(FORMAT), *(f"{name} {version(name)}" for name in _EXPORTERS)]
    return sha256("\n".join(parts).encode()).hexdigest()[:32]


def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="underpaint-onnx-")
    atexit.register(rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait while another process exports into the folder, so that the work is not done twice.

    Where the file system has no locks it may be, and is harmless: a graph gets its name when it is whole.
    """
    with (folder / "lock").open("w") as file:
        with suppress(OSError, ImportError):
            from fcntl import LOCK_EX, flock

            flock(file, LOCK_EX)
        yield


# --- files --------------------------------------------------------------------------------------------------------


def _is_whole(folder: Path) -> bool:
    """Whether all files are there, and each has the digest that was stored when it was written."""
    try:
        lines = (folder / "sha256").read_text().splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        return bool(expected) and all(_digest(folder / name) == digest for name, digest in expected.items())
    except OSError:
        return False


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()


def _write(folder: Path, graph: Graph, unet: nn.Module | None) -> None:
    """Export into a folder of another name, then give it its own; another process may do the same meanwhile."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-", ignore_cleanup_errors=True) as made:
        new = Path(made) / folder.name
        new.mkdir()
        _export(graph, unet, new / "model.onnx")
        digests = [f"{_digest(file)}  {file.name}\n" for file in sorted(new.iterdir())]
        (new / "sha256").write_text("".join(digests))
        if folder.exists():  # damaged
            os.replace(folder, Path(made) / "old")
        try:
            os.replace(new, folder)
        except OSError:
            if not _is_whole(folder):  # if it is, another process was faster
                raise


# --- ONNX ---------------------------------------------------------------------------------------------------------


def _export(graph: Graph, unet: nn.Module | None, file: Path) -> None:
    """Write a graph as ONNX. With ``unet``, its feature sites become further inputs and outputs."""
    module, inputs, outputs = graph.module, list(graph.inputs), [OUTPUT]
    rows = torch.export.Dim("rows", min=1, max=MAX_ROWS)
    sizes: dict[str, Any] = {}
    examples, axes = _examples(graph.inputs, rows, sizes)
    hooks = []
    if unet is not None:
        tapped = Tapped(graph.module, unet, len(inputs))
        hooks = tapped.hooks
        with torch.no_grad():
            shapes = tapped.shapes(*examples)
        for site, shape in shapes.items():
            outputs.append(site)
            inputs += [Input(flag_name(site), (1, 1, 1), torch.bool), Input(value_name(site), shape)]
            examples += [torch.zeros((2, 1, 1, 1), dtype=torch.bool), torch.zeros((2, *shape))]
            axes += [{0: rows}, {0: rows, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}]
        height = examples[0].shape[2]
        sites = {site: (shape[0], height // shape[1]) for site, shape in shapes.items()}
        (file.parent / _SITES).write_text(json.dumps(sites))
        module = tapped
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                module,
                tuple(examples),
                dynamo=True,
                verbose=False,
                input_names=[each.name for each in inputs],
                output_names=outputs,
                dynamic_shapes=(tuple(axes),),
            )
            assert program is not None
            program.save(file, external_data=True)
    except OSError:
        raise
    except Exception as error:  # what the exporter raises for a network that it cannot express is of any class
        raise Unavailable(f"the {file.parent.name} cannot be exported to ONNX; the server log has the cause") from error
    finally:
        for hook in hooks:
            hook.remove()


def _examples(inputs: Sequence[Input], rows: Any, sizes: dict[str, Any]) -> tuple[list[Tensor], list[dict[int, Any]]]:
    """Inputs of two rows, and for each its free axes. Free axes differ in length, or they would be taken for one."""
    lengths = {"height": 2, "width": 3}
    examples, axes = [], []
    for each in inputs:
        shape, free = [2], {0: rows}
        for number, axis in enumerate(each.axes, 1):
            if isinstance(axis, Axis):
                size = sizes.setdefault(axis.name, torch.export.Dim(axis.name, min=1, max=MAX_UNITS))
                free[number] = axis.unit * size
                shape.append(lengths[axis.name] * axis.unit)
            else:
                shape.append(axis)
        examples.append(torch.zeros(shape, dtype=each.dtype))
        axes.append(free)
    return examples, axes


class Tapped(nn.Module):
    """A U-Net whose feature sites are outputs, and whose activations there may be replaced row by row.

    ``forward`` takes the graph's own inputs and, for each site, a flag and a value. It returns the graph's output and
    the activation of each site before it is replaced.
    """

    def __init__(self, module: nn.Module, unet: nn.Module, own_inputs: int) -> None:
        super().__init__()
        self.module = module
        self._own_inputs = own_inputs
        self._activations: dict[str, Tensor] = {}
        self._changes: Mapping[str, tuple[Tensor, Tensor]] = {}
        self._sites = blocks(unet)
        self.hooks = [block.register_forward_hook(self._hook(site)) for site, block in self._sites.items()]
        """To be removed when the network is needed as it was."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        changes = inputs[self._own_inputs :]
        self._changes = {site: (changes[2 * i], changes[2 * i + 1]) for i, site in enumerate(self._sites)}
        output = self.module(*inputs[: self._own_inputs])
        return (output, *(self._activations[site] for site in self._sites))

    def shapes(self, *inputs: Tensor) -> dict[str, tuple[int, ...]]:
        """Site -> shape (c, h, w) of its activation for these inputs."""
        self._changes = {}
        self.module(*inputs)
        return {site: tuple(self._activations[site].shape[1:]) for site in self._sites}

    def _hook(self, site: str) -> Callable[[Any, Any, Any], Any]:
        def replace(block: Any, inputs: Any, output: Any) -> Any:
            del block, inputs
            activation: Tensor = output[0] if isinstance(output, tuple) else output
            self._activations[site] = activation
            if site not in self._changes:
                return None
            flag, value = self._changes[site]
            changed = torch.where(flag, value, activation)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return replace


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter prints and warns of; its errors are raised."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
