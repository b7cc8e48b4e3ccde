"""The section of one method, and the report that all sections make."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.report import Table, machine, measured_on

FILE = "quality.json"
_GAP = 2
_HEAD = 14


@dataclass(frozen=True, slots=True)
class Sheet:
    """A contact sheet: one row for each case, one column for each image of it."""

    name: str
    """File name without suffix."""
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...] = field(repr=False)
    """Pixels (height, width, 3) uint8, or masks (height, width) bool; all of one size."""
    abreast: int = 2
    """Cases side by side."""

    def paper(self) -> Image.Image:
        """The sheet as one image, with the columns' names at the top."""
        height, width = self.rows[0][0].shape[:2]
        across, down = width + _GAP, height + _GAP
        block = across * len(self.columns) + 3 * _GAP
        lines = -(-len(self.rows) // self.abreast)
        paper = Image.new("RGB", (block * min(self.abreast, len(self.rows)), _HEAD + down * lines), "white")
        draw, font = ImageDraw.Draw(paper), ImageFont.load_default(9)
        for number, row in enumerate(self.rows):
            line, position = divmod(number, self.abreast)
            for column, shown in enumerate(row):
                x = position * block + column * across
                if line == 0:
                    draw.text((x, 1), self.columns[column], fill="black", font=font)
                paper.paste(Image.fromarray(shown).convert("RGB"), (x, _HEAD + line * down))
        return paper


@dataclass(frozen=True, slots=True)
class Section:
    """One method's part of the report."""

    title: str
    about: str
    tables: tuple[Table, ...]
    sheets: tuple[Sheet, ...]
    figures: dict[str, Any] = field(repr=False)
    """All measured numbers, as values that JSON can hold."""

    def markdown(self, sheets: str) -> str:
        """The section as Markdown with a heading; ``sheets`` is the path from the report to the sheets' folder."""
        images = [f"![{', '.join(sheet.columns)}]({sheets}/{sheet.name}.webp)" for sheet in self.sheets]
        return "\n\n".join([f"## {self.title}", self.about, *(table.markdown() for table in self.tables), *images])


def write(folder: Path, about: str, name: str, section: Section, order: Sequence[str], *, quick: bool) -> Path:
    """Write ``quality.md`` into ``folder``, its numbers and sheets into ``folder/results``; returns the report's path.

    ``name`` is the section's name in ``order``. Other sections are kept if a run with the same settings, cases, weights
    and machine wrote them, and dropped otherwise.
    """
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for sheet in section.sheets:
        sheet.paper().save(results / f"{sheet.name}.webp", quality=85, method=6)
    head = {"about": about, "machine": machine(), "quick": quick}
    known = {**_earlier(results / FILE, head), name: _stored(section)}
    sections = {key: known[key] for key in order if key in known}
    (results / FILE).write_text(json.dumps({**head, "sections": sections}, indent=1) + "\n")
    report = folder / "quality.md"
    texts = ["# Quality", about, measured_on(quick), *(stored["markdown"] for stored in sections.values())]
    report.write_text("\n\n".join(texts) + "\n")
    return report


def _stored(section: Section) -> dict[str, Any]:
    tables = [asdict(table) for table in section.tables]
    return {"markdown": section.markdown("results"), "tables": tables, "figures": section.figures}


def _earlier(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The sections in ``file`` if its head is equal but for the date; else none."""
    content = json.loads(file.read_text()) if file.exists() else {}
    if not content or any(_dateless(content.get(key)) != _dateless(value) for key, value in head.items()):
        return {}
    sections: dict[str, Any] = content["sections"]
    return sections


def _dateless(value: Any) -> Any:
    return {key: part for key, part in value.items() if key != "date"} if isinstance(value, dict) else value
