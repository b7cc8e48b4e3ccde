"""The loop, the tokenizer, the losses' parts and the export's arithmetic."""

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe import training
from recipe.captions import NOUN, TOKENS, UNSAID, Tokens, caption_words
from recipe.data import Composer
from recipe.diffusion import DROP_SKIPS, NoiseLoss, SkipDropper
from recipe.evaluate import sheet
from recipe.export import sums, tidy
from recipe.judge import Judge
from recipe.listening import FIFTHS, noise_errors
from recipe.sprites import Sprites
from recipe.train_clip import Looking, More, Taught
from recipe.train_clip import build as build_clip
from recipe.train_ddpm import build as build_ddpm
from recipe.train_text import Pair, Reading, text_encoder
from recipe.train_text import build as build_text
from recipe.train_unet import Bank, schedule, settle_conditioning
from recipe.train_unet import build as build_unet
from recipe.train_unet import main as train_unet
from recipe.train_vae import Reconstruction, build, psnr, whiten
from recipe.training import Dice, Options, Trainer
from recipe.whitening import Whitening
from torch import nn
from transformers import AutoModel, CLIPTextModel

CPU = torch.device("cpu")


def options(work: Path, **more: Any) -> Options:
    given = {"name": "line", "work": work, "device": CPU, "batch": 4, "rate": 0.05, "warmup": 1, "dtype": "float32"}
    return Options(**{**given, **more})


def line(work: Path, **more: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(nn.Linear(2, 1), options(work, **more))


def squared(model: nn.Module, dice: Dice) -> torch.Tensor:
    x = torch.randn(4, 2, generator=dice.cpu)
    error: torch.Tensor = model(x) - x.sum(1, keepdim=True)
    return error.square().mean()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = line(tmp_path, steps=8, name="whole").fit(squared)
    calls = 0

    def interrupted(model: nn.Module, dice: Dice) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return squared(model, dice)

    with pytest.raises(KeyboardInterrupt):
        line(tmp_path, steps=8, save_every_s=0.0).fit(interrupted)
    resumed = line(tmp_path, steps=8, save_every_s=0.0)
    assert resumed.step == 4
    assert torch.equal(weights(resumed.fit(squared)), weights(whole))


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    done = line(tmp_path, steps=3).fit(squared)
    again = line(tmp_path, steps=3).fit(lambda *_: pytest.fail("trained again"))
    assert torch.equal(weights(again), weights(done))


def test_time_ends_a_training_over_all_its_resumptions(tmp_path: Path) -> None:
    trainer = line(tmp_path, seconds=0.05)
    trainer.fit(squared)
    assert trainer.step > 0
    assert trainer.spent_s >= 0.05
    assert line(tmp_path, seconds=0.05).progress == 1


def test_training_lowers_the_loss_and_averages(tmp_path: Path) -> None:
    trainer = line(tmp_path, steps=300, averaging=0.9)
    dice = Dice.at(9, 0, CPU)
    before = squared(trainer.model, dice).item()
    trainer.fit(squared)
    after = squared(trainer.average, Dice.at(9, 0, CPU)).item()
    assert after < before / 100
    assert not torch.equal(weights(trainer.average), weights(trainer.model))


def test_the_measured_dtype_is_kept_in_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line(tmp_path, steps=2, dtype="auto").fit(squared)
    assert "s a step" in capsys.readouterr().out
    resumed = line(tmp_path, steps=4, dtype="auto")
    assert resumed.dtype in ("bfloat16", "float32")
    resumed.fit(squared)
    assert "s a step" not in capsys.readouterr().out


def test_an_explicit_dtype_outweighs_the_checkpoints(tmp_path: Path) -> None:
    line(tmp_path, steps=2, dtype="bfloat16").fit(squared)
    resumed = line(tmp_path, steps=3, dtype="float32")
    assert resumed.dtype == "bfloat16"
    resumed.fit(squared)
    assert resumed.dtype == "float32"


def test_layers_that_draw_by_themselves_draw_the_same_after_a_resumption(tmp_path: Path) -> None:
    def blurred(model: nn.Module, dice: Dice) -> torch.Tensor:
        return squared(model, dice) * torch.rand(())

    whole = line(tmp_path, steps=6, name="whole").fit(blurred)
    line(tmp_path, steps=6, seconds=1e-9).fit(blurred)
    assert torch.equal(weights(line(tmp_path, steps=6).fit(blurred)), weights(whole))


@pytest.mark.parametrize("wrong", ["--steps 0", "--seconds -1", "--steps 5 --batch 24", "--steps 5 --batch 0", ""])
def test_a_training_that_cannot_be_is_refused(wrong: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        training.options(arguments().parse_args(["--work", str(tmp_path), *wrong.split()]))


def test_the_batch_follows_the_device_unless_said(tmp_path: Path) -> None:
    given = ["--work", str(tmp_path), "--steps", "5", "--device", "cpu"]
    assert training.options(arguments().parse_args(given)).batch == 32
    assert training.options(arguments().parse_args([*given, "--batch", "48"])).batch == 48


def arguments() -> argparse.ArgumentParser:
    return training.arguments("", "line", batch=(32, 1024), rate=1e-3, multiple=16)


def test_a_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"recipe\.prepare"):
        Sprites.of(tmp_path)


def test_what_is_drawn_says_nothing_of_the_noise_on_it() -> None:
    dice = Dice.at(0, 5, CPU)
    data, noise = (torch.rand(4096, generator=rng) for rng in (dice.cpu, dice.device))
    assert torch.corrcoef(torch.stack([data, noise]))[0, 1].abs() < 0.1
    assert torch.equal(torch.rand(4096, generator=Dice.at(0, 5, CPU).device), noise)


def test_every_caption_word_is_one_token_and_ids_are_the_tokenizers_own(tokens: Tokens) -> None:
    assert all(len(tokens([word])[0]) == 3 for word in caption_words())
    texts = ["a glossy red apple on a blue striped background", "", "quixotic zebras, it's 3", "apple " * 40]
    own = tokens.tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    assert torch.equal(tokens(texts, TOKENS), own["input_ids"])
    assert tokens(texts[:2]).shape == (2, 11)


def test_shorter_padding_reads_the_same(tokens: Tokens) -> None:
    torch.manual_seed(0)
    tower = text_encoder(build_text(tokens)).eval()
    texts = ["a glossy red apple", "a star"]
    with torch.no_grad():
        short, long = (tower(tokens(texts, length)).pooler_output for length in (None, TOKENS))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_the_conditioning_of_a_new_unet_is_the_text_tower(tokens: Tokens, tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = build_text(tokens).eval()
    text.save_pretrained(tmp_path / "text")
    tokens.tokenizer.save_pretrained(tmp_path / "tokenizer")
    settle_conditioning(tmp_path, None)
    ids = tokens(["a red heart"], TOKENS)
    kept = CLIPTextModel.from_pretrained(tmp_path / "conditioning").eval()
    with torch.no_grad():
        assert torch.equal(kept(ids).last_hidden_state, text(ids).last_hidden_state)
    assert Tokens(tmp_path / "conditioning")(["a red heart"]).equal(tokens(["a red heart"]))


def learned(loss: Any, trainer: Trainer) -> tuple[float, float]:
    """The loss of one and the same batch before and after training on it."""
    same = Dice.at(0, 0, CPU).cpu.get_state()

    def repeated(model: nn.Module, dice: Dice) -> torch.Tensor:
        dice.cpu.set_state(same)
        value: torch.Tensor = loss(model, dice)
        return value

    before = repeated(trainer.model, Dice.at(0, 0, CPU)).item()
    return before, repeated(trainer.fit(repeated), Dice.at(0, 0, CPU)).item()


def test_a_text_tower_is_brought_to_the_facts(composer: Composer, tokens: Tokens, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trainer = Trainer(Pair(build_text(tokens)), options(tmp_path, steps=15, rate=1e-3, warmup=5, averaging=0.5))
    before, after = learned(Reading(composer, tokens, 16), trainer)
    assert after < 0.7 * before


def test_a_clip_learns_a_batch_by_its_vision_tower_alone(
    composer: Composer, more: More, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recipe.train_clip.RIVALS", 1024)
    torch.manual_seed(0)
    text = build_text(tokens)
    fixed = weights(text)
    trainer = Trainer(Taught(build_clip(text)), options(tmp_path, steps=25, rate=1e-3, warmup=5, averaging=0.5))
    before, after = learned(Looking(composer, more, tokens, 16), trainer)
    assert after < 0.7 * before
    clip: Any = trainer.average.get_submodule("clip")
    towers = (clip.text_model, clip.text_projection)
    assert torch.equal(torch.cat([weights(tower) for tower in towers]), fixed), "the text tower stays as it is"


def test_a_judge_finds_the_word_whose_caption_is_nearest(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    judge, facts = Judge(build_clip(build_text(tokens)).eval(), tokens), torch.full((40, 6), UNSAID)
    facts[:, NOUN] = torch.arange(40)
    for shift, share in ((0, 1.0), (1, 0.0)):
        with torch.no_grad():
            seen = judge.captions(facts.roll(shift, 0))
        monkeypatch.setattr(judge, "pictures", lambda _, seen=seen: seen)
        found = judge.recognise(torch.zeros(40, 3, 64, 64), facts)
        assert found.keys() == {"noun"}
        assert (found["noun"].share, found["noun"].total) == (share, 40)


def test_a_saved_clip_is_read_back_by_its_kind(tokens: Tokens, tmp_path: Path) -> None:
    torch.manual_seed(0)
    clip = build_clip(build_text(tokens)).eval()
    clip.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        read = AutoModel.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(read.vision_model(images).pooler_output, clip.vision_model(images).pooler_output)


def test_whitened_latents_are_standard_and_decode_to_the_same_picture(composer: Composer) -> None:
    torch.manual_seed(0)
    vae = build().eval()
    images = composer.images(composer.draw(16, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        before, wide = psnr(vae, images), vae.encode(images).latent_dist
        whiten(vae, images)
        after, white = psnr(vae, images), vae.encode(images).latent_dist
    torch.testing.assert_close(after, before, atol=1e-3, rtol=0)
    torch.testing.assert_close(white.mode().mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(white.mode().std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    scale = wide.mode().std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(white.std * scale, wide.std, atol=1e-4, rtol=1e-4)


def test_latents_are_encoded_once_and_anew_for_another_autoencoder(composer: Composer, work: Path) -> None:
    torch.manual_seed(0)
    vae = build().eval()
    vae.save_pretrained(work / "vae")
    first = Bank(work, composer, 8)
    written = (work / "latents.pt").stat().st_mtime_ns
    assert torch.equal(Bank(work, composer, 8).latents, first.latents)
    assert (work / "latents.pt").stat().st_mtime_ns == written
    vae.quant_conv.bias.data += 1
    vae.save_pretrained(work / "vae")
    other = Bank(work, composer, 8)
    torch.testing.assert_close(other.latents - first.latents, torch.ones_like(first.latents), atol=0.01, rtol=0)
    assert torch.equal(other.facts, first.facts)


def test_whitened_states_change_what_a_unet_learns_from_and_not_what_it_computes() -> None:
    torch.manual_seed(0)
    unet = build_unet()
    strong = torch.cat([torch.full((8,), 3.0), torch.full((184,), 0.2)])
    states = torch.randn(4096, 192) * strong
    whitening = Whitening(states)
    seen, context, t = torch.randn(2, 4, 16, 16), states[:64].reshape(2, 32, 192), torch.tensor([10, 900])
    with torch.no_grad():
        plain = unet(seen, t, context).sample
        whitening.enter(unet)
        torch.testing.assert_close(unet(seen, t, whitening(context)).sample, plain, atol=1e-5, rtol=1e-4)
        assert (unet(seen, t, context).sample - plain).abs().max() > 1e-3
        whitening.leave(unet)
        torch.testing.assert_close(unet(seen, t, context).sample, plain, atol=1e-5, rtol=1e-4)
    power = whitening(states).square().mean(0)
    assert power.max() / power.min() < 1.6, "225 before"


def test_a_finished_unet_is_written_alike_whatever_the_bank_and_the_text_tower_of_now(
    work: Path, tokens: Tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("recipe.train_unet.READ", 512)
    shutil.copytree(work, tmp_path, dirs_exist_ok=True)
    build().save_pretrained(tmp_path / "vae")
    command = ["train_unet", "--work", str(tmp_path), "--steps", "1", "--batch", "2", "--dtype", "float32"]
    written = []
    for bank in ("8", "12"):
        build_text(tokens).save_pretrained(tmp_path / "text")
        monkeypatch.setattr("sys.argv", [*command, "--bank", bank])
        train_unet()
        written.append((tmp_path / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_wrong_noun_costs_nothing_where_there_is_but_one(composer: Composer, tokens: Tokens) -> None:
    torch.manual_seed(0)
    unet, text = build_unet().eval(), text_encoder(build_text(tokens)).eval()
    parts = {"tokenizer": tokens.tokenizer, "scheduler": schedule()}
    pipe = SimpleNamespace(vae=build().eval(), unet=unet, text_encoder=text, **parts)
    scenes = composer.draw(20, torch.Generator().manual_seed(0))
    images, facts = composer.images(scenes), composer.facts(scenes)
    found = noise_errors(pipe, images, facts, 8)
    assert len(found) == 2 * FIFTHS
    errors, added = list(found.values())[:FIFTHS], list(found.values())[FIFTHS:]
    assert all(error > 0.5 for error in errors), "it was never trained"
    assert all(added)
    facts[:, NOUN] = 0
    assert list(noise_errors(pipe, images, facts, 8).values())[FIFTHS:] == [0] * FIFTHS


def test_a_sheet_shows_every_image() -> None:
    shown = sheet(torch.full((17, 3, 4, 4), -1.0))
    assert shown.size == (16 * 8, 2 * 8)
    assert shown.getpixel((0, 15)) == (0, 0, 0)
    assert shown.getpixel((8, 15)) == (255, 255, 255)


def test_the_timesteps_of_a_batch_cover_the_schedule() -> None:
    seen: list[torch.Tensor] = []

    def denoise(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return noisy

    loss, rng = NoiseLoss(torch.linspace(0.99, 0.01, 1000), CPU), torch.Generator().manual_seed(0)
    for _ in range(20):
        loss(denoise, torch.zeros(10, 1, 1, 1), rng)
    assert all((t // 100).tolist() == list(range(10)) for t in seen)
    assert len(set(torch.cat(seen).tolist())) > 150


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_dropped_skips_reach_only_marked_samples(kind: str) -> None:
    torch.manual_seed(0)
    unet, size, more = (
        (build_unet(), (8, 4, 16, 16), (torch.randn(8, TOKENS, 192),))
        if kind == "conditional"
        else (build_ddpm(), (8, 3, 64, 64), ())
    )
    sample, t = torch.randn(size), torch.full((8,), 10)
    with torch.no_grad():
        whole = unet(sample, t, *more).sample
        skips = SkipDropper(unet)
        assert torch.equal(unet(sample, t, *more).sample, whole), "without marks nothing is dropped"
        rng = torch.Generator().manual_seed(3)
        skips.mark(8, rng)
        dropped = unet(sample, t, *more).sample
    marked = torch.rand(8, generator=torch.Generator().manual_seed(3)) < DROP_SKIPS
    assert 0 < marked.sum() < 8
    changed = (dropped - whole).flatten(1).abs().amax(1) > 1e-3
    assert torch.equal(changed, marked)


def test_the_noise_loss_is_zero_for_the_noise_itself_and_weights_much_noise_most() -> None:
    alphas = torch.tensor([0.999, 0.5, 0.001])
    clean = torch.randn(512, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    def perfect(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        a = alphas[t][:, None, None, None]
        return (noisy - a.sqrt() * clean) / (1 - a).sqrt()

    loss = NoiseLoss(alphas, CPU)
    assert loss(perfect, clean, torch.Generator().manual_seed(1)) < 1e-6
    assert set(seen[0].tolist()) == {0, 1, 2}

    def off_at(step: int) -> float:
        wrong = lambda noisy, t: perfect(noisy, t) + (t == step).float()[:, None, None, None]  # noqa: E731
        return loss(wrong, clean, torch.Generator().manual_seed(1)).item()

    assert off_at(0) < 0.02 * off_at(1)
    assert off_at(2) == pytest.approx(10 * off_at(1), rel=0.2), "twenty against two"


def test_a_new_autoencoders_loss_reaches_every_weight(composer: Composer) -> None:
    torch.manual_seed(0)
    vae = build()
    torch.autograd.backward(Reconstruction(composer, 4)(vae, Dice.at(0, 1, CPU)))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_exported_configurations_tell_no_folder(tmp_path: Path) -> None:
    tower = {"hidden_size": 192, "_name_or_path": "work/text"}
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "work", "text_config": tower}))
    (tmp_path / "vocab.json").write_text("[1]")
    tidy(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {"text_config": {"hidden_size": 192}}
    assert (tmp_path / "vocab.json").read_text() == "[1]"


def test_too_large_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "model.safetensors").write_bytes(b"weights")
    assert sums(tmp_path) == f"{hashlib.sha256(b'weights').hexdigest()}  part/model.safetensors\n"
    monkeypatch.setattr("recipe.export.LIMIT_BYTES", 3)
    with pytest.raises(SystemExit, match="3 are allowed"):
        sums(tmp_path)
