"""The report of a benchmark: tables, findings and the machine they were measured on, as Markdown and JSON."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table as RichTable

console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
"""Console for progress and tables, on stderr."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption; the first column names the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """Sentences printed under the table."""

    def markdown(self) -> str:
        """The table as Markdown, with all columns but the first aligned right, and the notes."""
        lines = [self.columns, tuple("---" if i == 0 else "--:" for i in range(len(self.columns))), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"### {self.caption}", table, *self.notes])

    def show(self) -> None:
        """Print the table on the console."""
        table = RichTable(*self.columns, title=self.caption, title_justify="left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


@dataclass(frozen=True, slots=True)
class Report:
    """The report of one benchmark."""

    name: str
    about: str
    """What was measured and how, in a few sentences."""
    tables: tuple[Table, ...]
    findings: tuple[str, ...]
    """What follows from the tables, one sentence each, with this run's numbers."""
    figures: dict[str, Any] = field(repr=False)
    """All measured numbers, as values that JSON can hold."""
    picture: Image.Image | None = field(default=None, repr=False)
    """A contact sheet, or None."""
    legend: str = ""
    """Description of ``picture``."""

    def write(self, folder: Path, *, quick: bool) -> None:
        """Write ``{name}.md`` and ``{name}.json`` into ``folder``, and ``{name}.webp`` if there is a picture."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self._markdown(quick) + "\n")
        if self.picture is not None:
            self.picture.save(folder / f"{self.name}.webp", quality=90, method=6)
        tables = [asdict(table) for table in self.tables]
        content = {"machine": machine(), "quick": quick, "findings": self.findings, "tables": tables}
        content |= {"figures": self.figures}
        (folder / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")

    def _markdown(self, quick: bool) -> str:
        measured = measured_on(quick)
        findings = "\n".join(f"* {finding}" for finding in self.findings)
        tables = [table.markdown() for table in self.tables]
        picture = [f"![{self.legend}]({self.name}.webp)", self.legend] if self.picture is not None else []
        return "\n\n".join([f"# {self.name.capitalize()}", self.about, measured, findings, *tables, *picture])


def measured_on(quick: bool) -> str:
    """The machine and the day, in one sentence."""
    description = "{cpu}, {cores} cores{gpu}; torch {torch}, Python {python}; {date}".format(**machine())
    return f"Measured on: {description}{'; quick run' if quick else ''}."


def machine() -> dict[str, str]:
    """Processor, cores that this process may use, GPU (empty without one), versions of torch and Python, and the date
    in UTC."""
    return {
        "cpu": _processor(),
        "cores": str(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else str(os.cpu_count()),
        "gpu": _gpu(),
        "torch": version("torch"),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median of the values, with the smallest and the largest if there are several."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _gpu() -> str:
    torch = sys.modules.get("torch")  # a report alone needs none
    if torch is None or not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.get_device_name()} (CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()})"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    amx = " with AMX" if any(" amx_tile" in line for line in lines) else ""
    return (name or platform.machine()) + amx
