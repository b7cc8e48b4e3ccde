"""Carry a trained U-Net over to another text tower: ``python -m recipe.warm_start --from PIPELINE --work work``.

The U-Net sees a text only through the keys and values of its cross-attention, which are linear in the text's states. So
the linear map that best turns the new tower's states into the old one's is folded into them, and the U-Net draws nearly
as before: training goes on from there and not from nothing. Writes ``work/unet_start``, for ``train_unet --init``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from recipe.captions import TOKENS, Tokens, leave_out, sentence
from recipe.data import Composer
from recipe.sprites import Sprites
from recipe.train_text import text_encoder

CAPTIONS = 3000


@torch.no_grad()
def states(encoder: Any, tokens: Tokens, captions: list[str]) -> Tensor:
    """(n * tokens, width), float64: what the U-Net is shown of the captions."""
    parts = [encoder(tokens(captions[i : i + 256], TOKENS)).last_hidden_state for i in range(0, len(captions), 256)]
    return torch.cat(parts).flatten(0, 1).double()


def fold(unet: Any, turn: Tensor) -> None:
    """Let every cross-attention take ``states @ turn`` (width, width) for its states."""
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.weight.data = (module.weight.double() @ turn.T).float()


def main() -> None:
    """Fit the map on captions that both tokenizers cut alike, fold it in, and say how well it fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, required=True, help="pipeline directory of the first model")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    old, new = Tokens(args.source / "tokenizer"), Tokens(args.work / "tokenizer")
    composer = Composer(Sprites(args.work / "sprites.npz"), torch.device("cpu"))
    rng = torch.Generator().manual_seed(5)
    facts = leave_out(composer.facts(composer.draw(CAPTIONS, rng)), rng)
    captions = ["", *(sentence(row) for row in facts.tolist())]
    captions = [caption for caption in captions if old([caption]).shape == new([caption]).shape]
    theirs = states(CLIPTextModel.from_pretrained(args.source / "text_encoder").float().eval(), old, captions)
    text = CLIPTextModelWithProjection.from_pretrained(args.work / "text")
    ours = states(text_encoder(text).eval(), new, captions)
    turn = torch.linalg.lstsq(ours, theirs).solution
    missed = (ours @ turn - theirs).square().mean() / (theirs - theirs.mean(0)).square().mean()
    unet = UNet2DConditionModel.from_pretrained(args.source / "unet", dtype=torch.float32)
    fold(unet, turn)
    unet.save_pretrained(args.work / "unet_start")
    print(f"{len(captions)} captions; {100 * float(1 - missed):.1f} % of the variance carried over")


if __name__ == "__main__":
    main()
