"""The embedded model on images like photographs: ``python -m benchmarks.photo_like``.

The project ships no photograph, so two images are drawn with what photographs have and icons lack: soft shading, a soft
shadow, texture at every scale, defocus, grain. They are encoded and decoded, and edited. Prints the autoencoder's PSNR
for them and for the icons of ``cases``, and writes the images side by side.
"""

import argparse
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from underpaint import Client, Ddim, DiffEdit, Edict
from underpaint_server.local_server import LocalServer
from underpaint_server.offline import ball

from benchmarks import cases, served
from benchmarks.quality.section import Sheet

PX = 256
"""Width and height of the drawn images; the server resizes them to the model's size."""
FILE = Path("models/underpaint-mini/photo_like.png")
EDITS = {
    "ball": ("a red volleyball on a brown background", "a green volleyball on a brown background"),
    "hills": ("a volcano on a blue background", "a volcano on a orange background"),
}
"""Image -> source prompt and target prompt, in words that the model knows."""


def texture(size: int, rough: float, seed: int) -> NDArray[np.float64]:
    """Noise (size, size) with mean 0 and standard deviation 1 and an amplitude of 1 / frequency ** ``rough``."""
    rng = np.random.default_rng(seed)
    across, down = np.fft.rfftfreq(size), np.fft.fftfreq(size)
    frequency = np.hypot(down[:, None], across[None])
    frequency[0, 0] = np.inf
    drawn = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) / frequency**rough, (size, size))
    made: NDArray[np.float64] = (drawn - drawn.mean()) / drawn.std()
    return made


def shaded_ball() -> Image.Image:
    """A lit ball on a table, both with a texture, (256, 256)."""
    scene = ball(PX, PX) / 255.0
    grain = texture(PX, 1.0, 1) * 0.05 + np.repeat(texture(PX, 1.3, 2)[:, :1], PX, 1) * 0.04
    return _photographed(scene * (1 + grain[..., None]), seed=3)


def hills() -> Image.Image:
    """Three ridges of hills in haze under a cloudy sky, (256, 256)."""
    y, x = np.mgrid[:PX, :PX] / PX
    sky = np.stack([0.45 + 0.45 * y, 0.60 + 0.12 * y, 0.85 - 0.30 * y], 2)
    scene = sky + 0.05 * texture(PX, 1.8, 4)[..., None]
    for number, base in enumerate((0.50, 0.62, 0.78)):
        ridge = base + (0.10 - 0.02 * number) * texture(PX, 1.9, 10 + number)[0]
        haze = 0.55 - 0.25 * number
        ground = np.array([0.16, 0.22, 0.14]) * (1 + 0.35 * texture(PX, 0.9, 20 + number)[..., None])
        scene = np.where((y > ridge[None])[..., None], ground * (1 - haze) + sky * haze, scene)
    return _photographed(scene * (1 - 0.25 * ((x - 0.5) ** 2 + (y - 0.5) ** 2))[..., None], seed=5)


def _photographed(scene: NDArray[np.float64], seed: int) -> Image.Image:
    """The scene with a slight blur and sensor noise."""
    sharp = Image.fromarray((255 * scene.clip(0, 1)).astype(np.uint8))
    soft = np.asarray(sharp.filter(ImageFilter.GaussianBlur(0.8))).astype(np.float64)
    grain = np.random.default_rng(seed).normal(0, 6, soft.shape)
    return Image.fromarray((soft + grain).round().clip(0, 255).astype(np.uint8))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args().out
    with LocalServer() as server, Client(server.target, timeout=600) as client:
        rows = [_row(client, name, photo) for name, photo in (("ball", shaded_ball()), ("hills", hills()))]
        icons = [cases.psnr_db(served.through_autoencoder(client, case), case.source) for case in cases.load()]
    print(f"autoencoder on {len(icons)} icons: mean {mean(icons):.1f} dB, worst {min(icons):.1f} dB")
    sheet = Sheet("photo_like", ("photo", "autoencoder", "DDIM", "EDICT", "DiffEdit"), tuple(rows), abreast=1)
    paper = sheet.paper()
    paper.resize((paper.width * 3, paper.height * 3), Image.Resampling.NEAREST).save(out, optimize=True)
    print(out)


def _row(client: Client, name: str, photo: Image.Image) -> tuple[NDArray[np.uint8], ...]:
    source, target = EDITS[name]
    kept = client.edit(photo, target, DiffEdit(mask=Image.new("L", photo.size, 0), steps=1, strength=1.0))
    edits = [
        client.edit(photo, target, Ddim(), source_prompt=source, seed=1),
        client.edit(photo, target, Edict(), source_prompt=source, seed=1),
        client.edit(photo, target, DiffEdit(reference_prompt=source), seed=1),
    ]
    small = cases.pixels(photo.resize(kept.image.size, Image.Resampling.LANCZOS))
    print(f"autoencoder on the {name}: {cases.psnr_db(cases.pixels(kept.image), small):.1f} dB")
    return small, *(cases.pixels(answer.image) for answer in (kept, *edits))


if __name__ == "__main__":
    main()
