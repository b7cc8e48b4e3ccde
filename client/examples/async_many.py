"""Invert one image once, then edit it eight times concurrently; the server runs the steps of all edits in batches."""

import asyncio
from pathlib import Path

from sample import SOURCE_PROMPT, flags, red_circle
from underpaint import AsyncClient, Edited

COLOURS = ("orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown")


async def main() -> None:
    """Run one inversion, then eight concurrent edits."""
    options = flags(__doc__, "async_many").parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    async with AsyncClient(options.target) as client:
        inversion = await client.invert(red_circle(), source_prompt=SOURCE_PROMPT, steps=20, verify=True)
        print(f"{inversion.name}: reconstruction {inversion.reconstruction_psnr_db:.1f} dB")

        async def paint(colour: str) -> Edited:
            result = await client.edit(inversion, SOURCE_PROMPT.replace("red", colour), seed=1)
            result.save(folder / f"{colour}.png")
            return result

        results = await asyncio.gather(*map(paint, COLOURS))
    batch_size = sum(result.usage.mean_batch_size for result in results) / len(results)
    print(
        f"{len(results)} edits written to {folder}; each shared its steps with {batch_size - 1:.1f} others on average"
    )


if __name__ == "__main__":
    asyncio.run(main())
