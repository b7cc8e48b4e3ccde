"""Edit one image with every method concurrently, and write the results side by side into one image."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from sample import flags
from underpaint import (
    AsyncClient,
    ContentInjection,
    Ddim,
    DdimInversion,
    DiffEdit,
    Disentangled,
    Edict,
    EdictInversion,
    Edited,
    EditMethod,
    Inversion,
    SdEdit,
)
from underpaint import Progress as Step

PHOTO = Path(__file__).with_name("sunglasses.png")  # from Fluent Emoji, MIT licence
SOURCE = "a glossy smiling face with sunglasses on a white background"
TARGET = "a glossy smiling face with sunglasses on a green background"
CONTENT = "a glossy red heart on a white background"
INJECTION = "content injection"
METHODS: dict[str, EditMethod] = {
    "EDICT": Edict(),
    "DiffEdit": DiffEdit(threshold=0.3, reference_prompt=SOURCE),
    "disentangled": Disentangled(switch_step=15),
    "DDIM": Ddim(),
    "SDEdit": SdEdit(strength=0.6),
}
WITH_SOURCE_PROMPT = ("EDICT", "DDIM", "disentangled")
COLUMNS = (
    TextColumn("{task.description:<14}"),
    BarColumn(),
    TextColumn("{task.fields[phase]:<10}"),
    TimeElapsedColumn(),
)
CELL = 192
ACROSS = 5


@dataclass(frozen=True)
class Row:
    """One row of the printed table."""

    method: str
    evaluations: int
    seconds: float
    psnr_db: float | None
    batch_size: float


async def main() -> None:
    """Run two inversions with their reconstructions, then all edits concurrently."""
    options = flags(__doc__, "contact_sheet").parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("invert EDICT", "invert DDIM", *METHODS, INJECTION)
    async with AsyncClient(options.target) as client:
        with Progress(*COLUMNS) as drawing:
            bars = {name: drawing.add_task(name, start=False, total=1.0, phase="") for name in names}
            inversions, inversion_rows = await _inversions(client, drawing, bars)
            content = (await client.generate(CONTENT, seed=1)).image
            edits, edit_rows = await _edits(client, drawing, bars, ContentInjection(content=content))
        exact = inversions["EDICT"]
        reconstruction = (await client.edit(exact, SOURCE, Edict(), seed=1)).image
    images = {"source": Image.open(PHOTO), "EDICT reconstruction": reconstruction}
    if edits["DiffEdit"].mask is not None:
        images["DiffEdit mask"] = edits["DiffEdit"].mask
    images |= {name: edit.image for name, edit in edits.items() if name != INJECTION}
    images |= {"content": content, INJECTION: edits[INJECTION].image}
    file = folder / "contact_sheet.png"
    _sheet(images).save(file)
    _print(inversion_rows + edit_rows)
    print(
        f"largest error of the reconstructed latents: EDICT {exact.reconstruction_max_abs_error:.1e}, "
        f"DDIM {inversions['DDIM'].reconstruction_max_abs_error:.1e}"
    )
    print(f"wrote {file}")


async def _inversions(
    client: AsyncClient, drawing: Progress, bars: dict[str, TaskID]
) -> tuple[dict[str, Inversion], list[Row]]:
    async def invert(name: str, method: EdictInversion | DdimInversion) -> tuple[Inversion, float]:
        begin = time.monotonic()
        inversion = await client.invert(
            PHOTO, method=method, source_prompt=SOURCE, verify=True, progress=_follow(drawing, bars[f"invert {name}"])
        )
        drawing.update(bars[f"invert {name}"], completed=1.0, phase="done")
        return inversion, time.monotonic() - begin

    names = ("EDICT", "DDIM")
    results = await asyncio.gather(invert("EDICT", EdictInversion()), invert("DDIM", DdimInversion()))
    rows = [
        Row(
            f"invert {name}, verify",
            inversion.usage.network_evaluations,
            seconds,
            inversion.reconstruction_psnr_db,
            inversion.usage.mean_batch_size,
        )
        for name, (inversion, seconds) in zip(names, results, strict=True)
        if inversion.usage is not None
    ]
    return {name: inversion for name, (inversion, _) in zip(names, results, strict=True)}, rows


async def _edits(
    client: AsyncClient, drawing: Progress, bars: dict[str, TaskID], injection: ContentInjection
) -> tuple[dict[str, Edited], list[Row]]:
    methods = METHODS | {INJECTION: injection}

    async def edit(name: str) -> tuple[Edited, float]:
        begin = time.monotonic()
        edited = await client.edit(
            PHOTO,
            "" if name == INJECTION else TARGET,
            methods[name],
            source_prompt=SOURCE if name in WITH_SOURCE_PROMPT else "",
            seed=1,
            progress=_follow(drawing, bars[name]),
        )
        drawing.update(bars[name], completed=1.0, phase="done")
        return edited, time.monotonic() - begin

    results = dict(zip(methods, await asyncio.gather(*map(edit, methods)), strict=True))
    rows = [
        Row(name, edited.usage.network_evaluations, seconds, None, edited.usage.mean_batch_size)
        for name, (edited, seconds) in results.items()
    ]
    return {name: edited for name, (edited, _) in results.items()}, rows


def _follow(drawing: Progress, bar: TaskID) -> Callable[[Step], None]:
    def show(step: Step) -> None:
        drawing.start_task(bar)
        drawing.update(bar, completed=step.fraction, phase=str(step.phase))

    return show


def _sheet(images: dict[str, Image.Image]) -> Image.Image:
    """One image of all images, each under its label."""
    label, gap = 22, 8
    down = -(-len(images) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (CELL + gap) + gap, down * (CELL + label + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for k, (name, image) in enumerate(images.items()):
        line, column = divmod(k, ACROSS)
        left, top = gap + column * (CELL + gap), gap + line * (CELL + label + gap)
        pen.text((left + CELL // 2, top), name, fill="black", anchor="ma", font=font)
        top += label
        sheet.paste(image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC), (left, top))
        pen.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline="silver")
    return sheet


def _print(rows: list[Row]) -> None:
    table = Table("method", "evaluations", "seconds", "reconstruction PSNR", "batch size")
    for row in rows:
        psnr = "" if row.psnr_db is None else f"{row.psnr_db:.1f} dB"
        table.add_row(row.method, str(row.evaluations), f"{row.seconds:.1f}", psnr, f"{row.batch_size:.1f}")
    Console().print(table)


if __name__ == "__main__":
    asyncio.run(main())
