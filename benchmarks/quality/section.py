"""What one method's file returns, and how all of them become one report."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from benchmarks.report import Table, machine, measured_on

_GAP = 2
_HEAD = 14


@dataclass(frozen=True, slots=True)
class Sheet:
    """Pictures to look at: a row for each case, a column for each thing that was made of it."""

    name: str
    """Of the file, without suffix."""
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...] = field(repr=False)
    """Pixels (height, width, 3), or masks (height, width) of bool; equal sizes."""
    abreast: int = 2
    """Cases side by side."""

    def paper(self) -> Image.Image:
        """All rows under their columns' names."""
        height, width = self.rows[0][0].shape[:2]
        across, down = width + _GAP, height + _GAP
        block = across * len(self.columns) + 3 * _GAP
        lines = -(-len(self.rows) // self.abreast)
        paper = Image.new("RGB", (block * min(self.abreast, len(self.rows)), _HEAD + down * lines), "white")
        draw, font = ImageDraw.Draw(paper), ImageFont.load_default(9)
        for number, row in enumerate(self.rows):
            line, place = divmod(number, self.abreast)
            for column, shown in enumerate(row):
                x = place * block + column * across
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
    """Every number measured, as plain values."""

    def markdown(self, sheets: str) -> str:
        """Under its own heading; ``sheets`` is the path of their folder, seen from the report."""
        seen = [f"![{', '.join(sheet.columns)}]({sheets}/{sheet.name}.webp)" for sheet in self.sheets]
        return "\n\n".join([f"## {self.title}", self.about, *(table.markdown() for table in self.tables), *seen])


def write(folder: Path, about: str, sections: list[Section], *, quick: bool) -> Path:
    """``quality.md`` in ``folder``; its numbers and sheets in ``folder/results``. The report's path."""
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for sheet in section.sheets:
            sheet.paper().save(results / f"{sheet.name}.webp", quality=85, method=6)
    parts = ["# Quality", about, measured_on(quick), *(section.markdown("results") for section in sections)]
    report = folder / "quality.md"
    report.write_text("\n\n".join(parts) + "\n")
    content = {
        "machine": machine(),
        "quick": quick,
        "sections": {
            section.title: {"tables": [asdict(table) for table in section.tables], "figures": section.figures}
            for section in sections
        },
    }
    (results / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
    return report
