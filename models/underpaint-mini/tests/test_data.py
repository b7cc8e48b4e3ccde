"""Sprites, scenes and what is said of them."""

import numpy as np
import pytest
import torch
from recipe import augment
from recipe.captions import (
    BACKGROUND,
    COLOUR,
    NOUN,
    PATTERN,
    STYLE,
    TONE,
    UNSAID,
    describes,
    leave_out,
    said_parts,
    sentence,
)
from recipe.data import Composer, Scenes
from recipe.prepare import dominant_hue, nearest_colour
from recipe.sprites import Ragged, Sprites, turn_hue
from recipe.train_clip import PALETTE, More
from recipe.train_text import with_one_wrong
from recipe.twins import Twins
from recipe.vocabulary import BACKGROUNDS, COLOURS, HUES, NOUNS, STYLES, name_colour, noun


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "words", "colour"),
    [
        ("red-apple", "apple", "red"),
        ("black-heart", "heart", "black"),
        ("broken-heart", "broken heart", ""),
        ("orange-heart", "heart", "orange"),
        ("cat-face", "cat face", ""),
        ("pineapple", "pineapple", ""),
    ],
)
def test_a_colour_in_a_name_is_said_as_colour(name: str, words: str, colour: str) -> None:
    assert (noun(name), name_colour(name)) == (words, colour)


def test_a_sprite_turned_to_a_hue_has_that_hue() -> None:
    red = np.full((8, 8, 4), (220, 20, 20, 255), dtype=np.uint8)
    for word, hue in HUES.items():
        found, concentration = dominant_hue(turn_hue(red, hue))
        assert nearest_colour(found) == word
        assert concentration == pytest.approx(1, abs=0.01)


def test_only_saturated_icons_without_a_stated_colour_are_recoloured(sprites: Sprites) -> None:
    by_name: dict[str, set[str]] = {}
    for name, colour in zip(sprites.name, sprites.colour, strict=True):
        by_name.setdefault(name, set()).add(colour)
    assert by_name["red-apple"] == {"red"}
    assert by_name["bird"] == {""}  # grey
    assert by_name["bear"] == set(HUES)
    assert by_name["camel"] == by_name["bat"], "an alias draws its parent"


def test_held_out_pairs_are_never_drawn_for_training(composer: Composer) -> None:
    sprites = composer.sprites
    assert sprites.held_out_pairs
    for index, held_out in ((composer.training, False), (composer.held_out, True)):
        drawn = composer.draw(500, dice(), index).sprite.tolist()
        assert {((sprites.name[i], sprites.style[i]) in sprites.held_out_pairs) for i in drawn} == {held_out}


def test_a_seed_determines_scenes_and_pixels(composer: Composer) -> None:
    first, again, other = (composer.images(composer.draw(8, dice(seed))) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_pictures_are_sprites_over_their_background(composer: Composer) -> None:
    scenes = composer.draw(64, dice())
    images, masks = composer.render(scenes)
    assert images.shape == (64, 3, 64, 64)
    assert images.abs().max() <= 1
    plain = scenes.pattern == 0
    corner = (images[plain, :, 0, 0] + 1) * 127.5
    wanted = torch.tensor(list(BACKGROUNDS.values()))[scenes.background[plain]].float()
    outside = masks[plain, 0, 0, 0] == 0
    assert outside.any()
    torch.testing.assert_close(corner[outside], wanted[outside], atol=0.01, rtol=0)


def test_a_group_shares_background_pattern_and_where_it_can_colour(composer: Composer) -> None:
    facts = composer.facts(composer.draw_alike(6, 20, dice())).view(6, 20, 6)
    for group in facts:
        assert len(group[:, BACKGROUND].unique()) == len(group[:, PATTERN].unique()) == 1
    free = composer.facts(composer.draw(120, dice())).view(6, 20, 6)
    assert _colours(facts) < _colours(free)


def _colours(groups: torch.Tensor) -> int:
    return sum(len(set(group[:, COLOUR].tolist())) for group in groups)


def test_twins_differ_in_one_thing_said_and_in_nothing_else(composer: Composer) -> None:
    scenes, part = Twins(composer).draw(200, dice())
    source, target = composer.facts(scenes).chunk(2)
    assert torch.bincount(part).tolist() == [40] * 5
    changed = source != target
    assert changed[torch.arange(200), part].all()
    assert (changed.sum(1) == 1).all()
    first, second = scenes[:200], scenes[200:]
    assert torch.equal(first.theta, second.theta)
    assert torch.equal(first.phase, second.phase)
    sprites = composer.sprites
    pairs = {(sprites.name[i], sprites.style[i]) for i in scenes.sprite.tolist()}
    assert not pairs & sprites.held_out_pairs
    tones = composer.facts(scenes)[torch.cat([part, part]) == TONE, TONE]
    assert len(torch.unique(tones)) == 2, "the set's own yellow is no tone"


def test_facts_become_the_caption() -> None:
    red, apple = COLOURS.index("red"), NOUNS.index("apple")
    glossy, blue = list(STYLES).index("glossy"), list(BACKGROUNDS).index("blue")
    assert sentence([glossy, red, apple, -1, blue, 1]) == "a glossy red apple on a blue striped background"
    assert sentence([-1, -1, apple, -1, blue, 0]) == "an apple on a blue background"
    assert sentence([-1, -1, NOUNS.index("thumbs up"), 4, -1, -1]) == "a thumbs up with dark skin"


def test_a_caption_that_has_to_say_the_background_says_its_pattern() -> None:
    said = said_parts(200, dice(), always=torch.full((200,), BACKGROUND))
    assert said[:, [BACKGROUND, PATTERN]].all()
    assert not said_parts(200, dice())[:, PATTERN].all()


def test_a_shortened_caption_stays_true_and_a_wrong_one_is_false(composer: Composer) -> None:
    facts = composer.facts(composer.draw(300, dice()))
    said = leave_out(facts, dice(1))
    rows = torch.arange(300)
    assert describes(said, facts)[rows, rows].all()
    assert (said != facts).any()
    assert (said[:, NOUN] == facts[:, NOUN]).all()
    assert ((said[:, BACKGROUND] == UNSAID) == (said[:, PATTERN] == UNSAID)).all()
    wrong = with_one_wrong(said, dice(2))
    assert not describes(wrong, facts)[rows, rows].any()
    assert ((wrong != said).sum(1) == 1).all()
    assert set(facts[:, STYLE].tolist()) == set(range(len(STYLES)))


def test_changes_of_the_picture_keep_its_size_range_and_background(composer: Composer) -> None:
    scenes = composer.draw(32, dice())
    images, masks = composer.render(scenes)
    warped, moved = composer.render(augment.warp(scenes, dice()), augment.tint(32, dice()))
    assert (warped != images).flatten(1).any(1).all()
    behind = (masks == 0) & (moved == 0)
    assert torch.equal(warped.where(behind, torch.zeros(())), images.where(behind, torch.zeros(())))
    still = composer.render(augment.warp(scenes, dice(), turn=0, stretch=0), augment.tint(32, dice(), 0, 0, 0))[0]
    torch.testing.assert_close(still, images, atol=1e-5, rtol=0)


def test_a_covered_picture_is_itself_outside_one_rectangle_of_one_colour() -> None:
    images = torch.rand(200, 3, 16, 16, generator=dice())
    covered = augment.cover(images, dice(1), share=0.5, most=12)
    hidden = (covered != images).any(1)
    assert 0.35 < hidden.flatten(1).any(1).float().mean() < 0.5
    for image, where in zip(covered, hidden, strict=True):
        rows, columns = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
        if len(rows):
            block = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].flatten(1)
            assert (block == block[:, :1]).all()
            assert max(len(rows), len(columns)) <= 12


def test_a_repainted_picture_keeps_its_regions_in_other_colours() -> None:
    images = torch.rand(200, 3, 1, 2, generator=dice())[..., [0, 0, 1, 1]] * 1.6 - 0.8
    repainted = augment.repaint(images, dice(1))
    assert repainted.shape == images.shape
    assert repainted.abs().max() <= 1
    assert torch.equal(repainted[..., 0], repainted[..., 1])
    assert torch.equal(repainted[..., 2], repainted[..., 3])
    assert (repainted - images).abs().flatten(1).amax(1).min() > 0.05
    alike = images - torch.einsum("c,nchw->nhw", augment.GREY, images)[:, None]
    level = augment.repaint(alike * 0.2, dice(1))
    flat = (level[..., 0] - level[..., 2]).abs().flatten(1).amax(1) < 1e-5
    assert 0.4 < flat.float().mean() < 0.6, "half of them show brightness alone"


def test_a_spliced_picture_is_half_another_of_its_style() -> None:
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    style = torch.tensor([0, 1, 0, 2, 1, 0])
    spliced, told = augment.splice(images, style, 6, torch.Generator().manual_seed(0))
    kept, other = spliced[:, 0, 0, 0].long(), spliced[:, 0, -1, -1].long()
    assert sorted(kept.tolist()) == list(range(6))
    assert torch.equal(style[kept], told)
    assert torch.equal(style[other], told)
    assert ((other != kept) | (kept == 3)).all(), "only the fourth is alone in its style"
    assert (spliced == kept[:, None, None, None]).flatten(1).float().mean(1).tolist() == [
        1.0 if place == 3 else 0.5 for place in kept.tolist()
    ]


def test_a_palette_is_shares_of_colours_and_of_steps() -> None:
    images = torch.full((2, 3, 8, 8), -1.0)
    images[0, 0, :, 4:] = 1.0
    found = augment.palette(images)
    assert found.shape == (2, PALETTE)
    shares = torch.split(found.square(), [216, 15, 15, 15], dim=1)
    assert all(torch.allclose(part.sum(1), torch.ones(2)) for part in shares)
    assert shares[0][0].nonzero()[:, 0].tolist() == [0, 5 * 36]
    assert shares[1][0, -1] == pytest.approx(1 / 7), "one step of seven across"
    assert shares[2][0, 0] == pytest.approx(1), "and none down"


def test_a_held_out_style_of_a_noun_is_not_known(composer: Composer) -> None:
    known = composer.known_styles()
    seen = composer.facts(composer.draw(2000, torch.Generator().manual_seed(0)))
    hidden = composer.facts(composer.draw(200, torch.Generator().manual_seed(0), composer.held_out))
    assert known[seen[:, NOUN], seen[:, STYLE]].all()
    assert not known[hidden[:, NOUN], hidden[:, STYLE]].any()


def test_more_pictures_have_a_style_without_a_noun_or_a_noun_without_a_style(more: More) -> None:
    facts = more.composer.facts(more.draw(40, torch.Generator().manual_seed(0)))
    unnamed, unstyled = facts[:20], facts[20:]
    assert (unnamed[:, NOUN] == UNSAID).all()
    assert (unnamed[:, STYLE] >= 0).all()
    assert (unstyled[:, NOUN] >= 0).all()
    assert (unstyled[:, STYLE] == UNSAID).all()


def test_scenes_are_selected_row_by_row(composer: Composer) -> None:
    scenes = composer.draw(8, dice())
    rows = torch.tensor([5, 2])
    assert torch.equal(composer.images(scenes[rows]), composer.images(scenes)[rows])
    assert isinstance(scenes[:3], Scenes)
    assert len(scenes[:3]) == 3


def test_ragged_lists_are_drawn_from_evenly_and_only_within() -> None:
    ragged = Ragged.of([[7], [1, 2, 3]])
    rows = torch.tensor([0, 1]).repeat(3000)
    drawn = ragged.pick(rows, torch.rand(6000, generator=dice())).view(-1, 2)
    assert set(drawn[:, 0].tolist()) == {7}
    assert torch.bincount(drawn[:, 1])[1:].min() > 800
