"""Train the text tower: ``python -m recipe.train_text --work work --steps 6000``.

What is true of a picture is known, so the text tower needs no pictures: a *reader* of facts, a few embedding tables and
two layers, stands for the vision tower while texts and facts are brought together in one space. It takes minutes, it
settles what the U-Net is conditioned on, and the vision tower is then trained towards this fixed space. Writes
``work/text`` and ``work/tokenizer``.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from recipe import training
from recipe.captions import NOUN, PARTS, TOKENS, UNSAID, Tokens, describes, leave_out, sentence, train_tokenizer
from recipe.data import Composer
from recipe.sprites import Sprites
from recipe.vocabulary import NOUNS

WIDTH = 128
MAX_SCALE = 60.0
GROUPS = 2


def build(tokens: Tokens) -> Any:
    """The text tower with its projection."""
    start, end = tokens.tokenizer.bos_token_id, tokens.tokenizer.eos_token_id
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokens.tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            bos_token_id=start,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def text_encoder(towers: Any) -> Any:
    """The tower without its projection: what conditions the U-Net."""
    text = CLIPTextModel(towers.config)
    source = {key.removeprefix("text_model."): value for key, value in towers.text_model.state_dict().items()}
    text.load_state_dict({key: source[key.removeprefix("text_model.")] for key in text.state_dict()})
    return text


class Reader(nn.Module):
    """Facts (n, 6) to vectors (n, 128): what a perfect look at the picture would say."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(len(words) + 1, 256) for words in PARTS.values())
        self.mix = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, WIDTH))

    def forward(self, facts: Tensor) -> Tensor:
        """An unsaid part (-1) is the last row of its table."""
        columns = zip(self.tables, facts.T, strict=True)
        return self.mix(torch.stack([table(codes % table.num_embeddings) for table, codes in columns]).sum(0))


class Pair(nn.Module):
    """The text tower and the reader, trained together."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text, self.reader = text, Reader()
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))


def with_one_wrong(said: Tensor, rng: torch.Generator) -> Tensor:
    """Captions (n, 6) with one said part replaced by another word of its kind; the noun only if it stands alone."""
    n = len(said)
    chance = torch.rand(n, said.shape[1], generator=rng)
    chance[:, NOUN] = 1e-3
    part = torch.where(said != UNSAID, chance, 0).argmax(1)
    counts = torch.tensor([len(words) for words in PARTS.values()])[part]
    shift = 1 + (torch.rand(n, generator=rng) * (counts - 1)).long()
    wrong = said.clone()
    rows = torch.arange(n)
    wrong[rows, part] = (said[rows, part] + shift) % counts
    return wrong


def near(image: Tensor, text: Tensor) -> Tensor:
    """Products (n, m) of two sets of vectors, in their own precision: bfloat16 is too coarse for scaled cosines."""
    with torch.autocast(image.device.type, enabled=False):
        return image @ text.T


class Contrast:
    """Which caption belongs to which facts: both ways, against captions with one word wrong, and noun by noun."""

    def __init__(self, tokens: Tokens, device: torch.device) -> None:
        self.tokens, self.device = tokens, device
        self.nouns = tokens([sentence([-1, -1, i, -1, -1, -1]) for i in range(len(NOUNS))]).to(device)

    def loss(self, seen: Tensor, facts: Tensor, read: Any, rng: torch.Generator) -> Tensor:
        """``seen`` (n, d) are scaled unit vectors of facts; ``read`` turns ids into unit vectors."""
        said = leave_out(facts, rng)
        nouns = functional.cross_entropy(near(seen, read(self.nouns)), facts[:, NOUN].to(self.device))
        captions = torch.cat([said, with_one_wrong(said, rng)])
        return self.both_ways(seen, facts, captions, read(self.ids(captions))) + nouns

    def ids(self, captions: Tensor) -> Tensor:
        """Token ids of captions given as codes (n, 6)."""
        return self.tokens([sentence(row) for row in captions.tolist()]).to(self.device)

    def both_ways(self, seen: Tensor, facts: Tensor, captions: Tensor, text: Tensor) -> Tensor:
        """``seen`` against ``captions``' vectors, the first ``n`` its own; one true of another's facts is no rival."""
        n = len(facts)
        own = torch.arange(n, device=self.device)
        also_true = describes(captions.to(self.device), facts.to(self.device))
        also_true[own, own] = False
        logits = near(seen, text).masked_fill(also_true, float("-inf"))
        return functional.cross_entropy(logits, own) + functional.cross_entropy(logits[:, :n].T, own)


class Reading:
    """The loss of one batch of facts."""

    def __init__(self, composer: Composer, tokens: Tokens, batch: int) -> None:
        self.composer, self.batch = composer, batch
        self._contrast = Contrast(tokens, composer.device)

    def __call__(self, pair: Any, dice: training.Dice) -> Tensor:
        """Half of the facts in groups alike in background, pattern and colour, half of them not."""
        facts = self.composer.facts(self.composer.draw_half_alike(GROUPS, self.batch, dice.cpu))
        seen = functional.normalize(pair.reader(facts.to(self.composer.device)).float(), dim=-1)
        scale = pair.logit_scale.exp().clamp_max(MAX_SCALE)
        return self._contrast.loss(scale * seen, facts, lambda ids: read(pair.text, ids), dice.cpu)


def read(text: Any, ids: Tensor) -> Tensor:
    """Unit vectors (n, 128) of token ids."""
    return functional.normalize(text(ids).text_embeds.float(), dim=-1)


def main() -> None:
    """Train the text tower."""
    parser = training.arguments(__doc__, "text", batch=(128, 512), rate=1e-3, multiple=2 * GROUPS)
    options = training.options(parser.parse_args(), weight_decay=0.05, averaging=0.995)
    torch.manual_seed(options.seed)
    if not (options.work / "tokenizer").exists():
        train_tokenizer(options.work / "tokenizer")
    tokens = Tokens(options.work / "tokenizer")
    composer = Composer(Sprites.of(options.work), options.device)
    trainer = training.Trainer(Pair(build(tokens)), options)
    pair: Any = trainer.fit(Reading(composer, tokens, options.batch))
    pair.text.save_pretrained(options.work / options.name)


if __name__ == "__main__":
    main()
