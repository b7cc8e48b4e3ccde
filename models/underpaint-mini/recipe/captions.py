"""Captions from facts, and token ids from captions."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from recipe.vocabulary import BACKGROUNDS, COLOURS, HUES, NOUNS, PATTERNS, STYLES, TONES

TOKENS = 32
PARTS: dict[str, list[str]] = {  # what a caption may say, in the order of the facts' columns
    "style": list(STYLES),
    "colour": COLOURS,
    "noun": NOUNS,
    "tone": TONES,
    "background": list(BACKGROUNDS),
    "pattern": PATTERNS,
}
STYLE, COLOUR, NOUN, TONE, BACKGROUND, PATTERN = range(6)
SAID_SHARES = torch.tensor([0.75, 0.85, 1.0, 0.9, 0.85, 1.0])
UNSAID = -1
EXTRA = "a an the of on in with and photo picture image icon style background skin no not next to left right small big"
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # CLIP's own pre-tokenisation


def sentence(facts: list[int]) -> str:
    """The caption that says these codes: ``a glossy red apple on a blue striped background``."""
    style, colour, name, tone, background, pattern = (
        words[code] if code != UNSAID else "" for words, code in zip(PARTS.values(), facts, strict=True)
    )
    words = [style, colour, name]
    if tone:
        words += ["with", tone, "skin"]
    if background:
        words += ["on", "a", background, pattern if pattern != "plain" else "", "background"]
    text = " ".join(word for word in words if word)
    return ("an " if text[0] in "aeiou" else "a ") + text


def leave_out(facts: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Facts (n, 6) with parts unsaid at random, as in training; a pattern goes with its background."""
    return torch.where(said_parts(len(facts), rng), facts, UNSAID)


def said_parts(n: int, rng: torch.Generator, always: torch.Tensor | None = None) -> torch.Tensor:
    """Which parts (n, 6) captions say; each says its part of ``always`` (n,)."""
    said = torch.rand(n, len(PARTS), generator=rng) < SAID_SHARES
    if always is not None:
        said[torch.arange(n), always] = True
    said[:, PATTERN] = said[:, BACKGROUND]
    return said


def describes(said: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """(n, m): whether caption ``said[j]`` (m, 6) is true of picture ``facts[i]`` (n, 6)."""
    return ((said[None] == facts[:, None]) | (said[None] == UNSAID)).all(-1)


class Tokens:
    """Token ids of captions, each word looked up once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self._words: dict[str, list[int]] = {}

    def __call__(self, texts: list[str], length: int | None = None) -> torch.Tensor:
        """Ids (n, ``length``), or as long as the longest; the end token fills, as the text tower expects."""
        rows = [[i for word in text.split() for i in self._word(word)] for text in texts]
        length = length or max(map(len, rows)) + 2
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        cut = [[start, *row[: length - 2]] for row in rows]
        return torch.tensor([row + [end] * (length - len(row)) for row in cut])

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            self._words[word] = self.tokenizer(word, add_special_tokens=False)["input_ids"]
        return self._words[word]


def caption_words() -> list[str]:
    """Every word that a caption can hold, sorted."""
    texts = [EXTRA, *HUES, *(text for part in PARTS.values() for text in part)]
    return sorted(set(" ".join(texts).replace("-", " ").split()))


def train_tokenizer(folder: Path) -> None:
    """Write a byte-pair vocabulary in which every caption word is one token and any other text still has some."""
    merges = _merges(caption_words())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + "</w>" for letter in alphabet]
    pieces = [*alphabet, *ends, *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    table = {token: i for i, token in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(table, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    CLIPTokenizer(*files, model_max_length=TOKENS).save_pretrained(folder)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    trained.normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Split(Regex(PIECES), "removed", invert=True)
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=20000, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(words, trainer)
    return [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
