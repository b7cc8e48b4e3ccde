"""Train the unconditional pixel model: ``python -m recipe.train_ddpm --work work --seconds 7200``.

A ``DDPMPipeline`` of faces, hearts, animals and plain things at 32x32 px (``--px 64`` for twice that, at four times the
cost), in their own colours on plain backgrounds. Its mid block is three halvings down, and a quarter of the samples
lose the deep skips, so that h-space edits and content injection have something to hold. Writes ``work/ddpm``.
"""

from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn import functional

from recipe import training
from recipe.data import PX, Composer, placement
from recipe.diffusion import NoiseLoss, SkipDropper
from recipe.sprites import Sprites
from recipe.vocabulary import FACES, HEARTS

HEADS = """bear cat-face cow-face dog-face fox frog hamster horse-face koala lion monkey-face mouse-face panda pig-face
rabbit-face tiger-face unicorn wolf dragon-face front-facing-baby-chick owl"""
BODIES = "penguin turtle octopus duck fish dolphin tropical-fish butterfly lady-beetle elephant"
THINGS = """green-apple red-apple tangerine lemon peach pear tomato watermelon strawberry cherries doughnut cookie
mushroom full-moon crescent-moon star sun fire droplet rose sunflower tulip evergreen-tree balloon soccer-ball
basketball baseball volleyball tennis crown bell light-bulb gem-stone wrapped-gift alarm-clock game-die umbrella house
automobile bus rocket t-shirt"""
NAMES = frozenset(" ".join([FACES, HEARTS, HEADS, BODIES, THINGS]).split())
"""Of one clear shape each: of all names, a network of this size and training draws blobs."""


def schedule() -> Any:
    """The schedule of DDPM: betas linear from 0.0001 to 0.02."""
    return DDPMScheduler(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear")


def build(px: int = 32) -> Any:
    """Four resolutions, most channels where they cost least; attention at the two deepest."""
    return UNet2DModel(
        sample_size=px,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64, 128, 160),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


class Denoising:
    """The loss of one batch."""

    def __init__(self, composer: Composer, unet: Any, batch: int) -> None:
        self.composer, self.batch, self._px = composer, batch, int(unet.config.sample_size)
        self._index = composer.sprites.index(names=NAMES)
        self._loss = NoiseLoss(schedule().alphas_cumprod, composer.device)
        self._skips = SkipDropper(unet)

    def __call__(self, unet: Any, dice: training.Dice) -> torch.Tensor:
        """The noise loss on fresh composites."""
        self._skips.mark(self.batch, dice.device)
        clean = self._pictures(dice.cpu).contiguous(memory_format=torch.channels_last)
        return self._loss(lambda noisy, t: unet(noisy, t).sample, clean, dice.device)

    def _pictures(self, rng: torch.Generator) -> torch.Tensor:
        n = self.batch
        scenes = self.composer.draw(n, rng, self._index, original_share=1.0)
        u = torch.rand(2, n, generator=rng)
        centred = placement(0.82 + 0.1 * u[0], torch.zeros(n, 2), u[1] < 0.5)
        images = self.composer.images(replace(scenes, pattern=torch.zeros_like(scenes.pattern), theta=centred))
        return functional.avg_pool2d(images, PX // self._px)


def main() -> None:
    """Train the pixel model."""
    parser = training.arguments(__doc__, "ddpm", batch=(32, 512), rate=4e-4)
    parser.add_argument("--px", type=int, choices=[32, 64], default=32)
    args = parser.parse_args()
    options = training.options(args)
    torch.manual_seed(options.seed)
    composer = Composer(Sprites.of(options.work), options.device)
    trainer = training.Trainer(build(args.px).to(memory_format=torch.channels_last), options)
    unet: Any = trainer.fit(Denoising(composer, trainer.model, options.batch))
    DDPMPipeline(unet, schedule()).save_pretrained(options.work / options.name)


if __name__ == "__main__":
    main()
