"""What directions are learned by: CLIPs and features of two kinds, and a loss that is finite where it is flat."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import underpaint_mini
from safetensors.torch import load_file, save_file
from support import checkpoints
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)
from underpaint_server.backends import load
from underpaint_server.errors import ModelNotReady
from underpaint_server.models import checkpoint
from underpaint_server.models.clip import Clip
from underpaint_server.models.edit_loss import EditLoss, vgg_features
from underpaint_server.rows import Score
from underpaint_server.settings import Settings

CPU = torch.device("cpu")
TEXT = CLIPTextConfig(
    vocab_size=1569, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=16, bos_token_id=1567, eos_token_id=1568, pad_token_id=1568,
)  # fmt: skip
VGG = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
       17: (256, 512), 19: (512, 512), 21: (512, 512)}  # fmt: skip


@pytest.fixture(scope="module", params=["transformer", "convolutional"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, of either class of transformers."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    if request.param == "transformer":
        vision = CLIPVisionConfig(
            image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        )
        CLIPModel(
            CLIPConfig(text_config=TEXT.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
        ).save_pretrained(folder)
    else:
        towers = ConvNextConfig(image_size=32, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], hidden_size=16)
        config = VisionTextDualEncoderConfig.from_vision_text_configs(towers, TEXT, projection_dim=16)
        VisionTextDualEncoderModel(config, ConvNextModel(towers), CLIPTextModel(TEXT)).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(underpaint_mini.CLIP).save_pretrained(folder)
    return folder


def pictures(n: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 48, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def edges(images: Tensor) -> list[Tensor]:
    return [functional.avg_pool2d(images, 4), images.diff(dim=-1)]


def test_both_kinds_of_clip_see_and_read(directory: Path) -> None:
    clip = Clip.load(directory, device=CPU)
    seen, read = clip.image_embeds(pictures()), clip.text_embeds(["a red heart", "a blue heart", "a red heart"])
    assert seen.shape == (2, 16)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(2))
    assert torch.equal(read[0], read[2])
    assert not torch.equal(read[0], read[1])
    assert torch.equal(clip.text_embeds(["a " * 50])[0], clip.text_embeds(["a " * 14])[0]), "what is too long is cut"


def test_pictures_are_normalised_as_the_clip_was_trained(directory: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(directory, folder)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    clip, images = Clip.load(folder, device=CPU), functional.avg_pool2d(pictures(), 3)[..., :16].repeat(1, 1, 2, 2)
    given = CLIPImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, image_mean=mean, image_std=std)(
        list((images + 1) / 2), return_tensors="pt", input_data_format="channels_first"
    ).pixel_values
    wanted = clip.model.visual_projection(clip.model.vision_model(given).pooler_output)
    torch.testing.assert_close(clip.image_embeds(images), functional.normalize(wanted, dim=-1))


def test_what_is_no_clip_is_refused(directory: Path, tmp_path: Path) -> None:
    CLIPTextModel(TEXT).save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    with pytest.raises(ModelNotReady, match="is not a CLIP model"):
        Clip.load(tmp_path, device=CPU)
    with pytest.raises(ModelNotReady, match="cannot be read as a CLIP"):
        Clip.load(tmp_path / "nowhere", device=CPU)


def test_a_damaged_clip_is_refused(directory: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(directory, cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelNotReady, match="cannot be read as a CLIP"):
        Clip.load(cut, device=CPU)
    copy = tmp_path / "clip"
    shutil.copytree(directory, copy)
    with pytest.raises(ModelNotReady, match=r"lacks visual_projection\.weight: copy"):
        Clip.load(checkpoints.without_tensor(copy, "model.safetensors", "visual_projection.weight"), device=CPU)
    (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": "grey"}))
    with pytest.raises(ModelNotReady, match="cannot be read as a CLIP"):
        Clip.load(copy, device=CPU)


def test_a_clip_that_cannot_compare_is_refused(directory: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    checkpoints.fill(broken / "model.safetensors", "text_projection.weight", float("nan"))
    with pytest.raises(ModelNotReady, match="the CLIP returns NaN"):
        Clip.load(broken, device=CPU)
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    tokenizer = CLIPTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<my-style>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(ModelNotReady, match="tokenizer has 1570 tokens, but the CLIP only 1569"):
        Clip.load(other, device=CPU)


def test_an_unchanged_picture_has_a_finite_gradient(directory: Path) -> None:
    """No change has no direction: the loss is 1 there, and learning can leave it."""
    loss = EditLoss("vae", Clip.load(directory, device=CPU), edges)
    (image,) = pictures(1)
    (scored,) = loss.scores([Score(image, image, "a red heart", "a blue heart", 0.5, gradient=True)])
    assert scored.directional == pytest.approx(1)
    assert scored.content == 0
    assert scored.gradient.isfinite().all()
    assert scored.gradient.abs().max() > 0


def test_the_content_loss_is_in_units_of_each_layers_own_size(directory: Path) -> None:
    clip, (one, two) = Clip.load(directory, device=CPU), pictures(2)
    row = Score(one, two, "a red heart", "a blue heart", 0.5, gradient=False)
    ours, theirs = edges(one[None]), edges(two[None])
    wanted = sum(float((a - b).abs().mean() / b.abs().mean()) for a, b in zip(ours, theirs, strict=True))
    for scale in (1.0, 100.0):
        (scored,) = EditLoss("vae", clip, lambda x, s=scale: [s * part for part in edges(x)]).scores([row])  # type: ignore[misc]
        assert scored.content == pytest.approx(wanted, rel=1e-5)


def test_each_row_is_scored_by_itself(directory: Path) -> None:
    loss = EditLoss("vae", Clip.load(directory, device=CPU), edges)
    one, two = pictures(2)
    rows = [Score(one, two, "a red heart", "a blue heart", 0.5, True), Score(two, one, "a sun", "a moon", 0.1, True)]
    for row, together in zip(rows, loss.scores(rows), strict=True):
        (alone,) = loss.scores([row])
        assert together.directional == pytest.approx(alone.directional, abs=1e-5)
        assert together.content == pytest.approx(alone.content, rel=1e-5)
        torch.testing.assert_close(together.gradient, alone.gradient, atol=1e-5, rtol=1e-3)


def test_rows_with_and_without_a_gradient_share_a_pass(directory: Path) -> None:
    loss = EditLoss("vae", Clip.load(directory, device=CPU), edges)
    one, two = pictures(2)
    plain = Score(one, two, "a red heart", "a blue heart", 0.5, gradient=False)
    learning = Score(two, one, "a sun", "a moon", 0.1, gradient=True)
    (alone,) = loss.scores([learning])
    for rows in ([plain, learning], [learning, plain]):
        scored = dict(zip(rows, loss.scores(rows), strict=True))
        assert scored[plain].gradient is None
        torch.testing.assert_close(scored[learning].gradient, alone.gradient, atol=1e-5, rtol=1e-3)
    assert loss.scores([plain])[0].gradient is None


def vgg_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    torch.manual_seed(0)
    weights = {}
    for number, (inside, outside) in VGG.items():
        weights[f"features.{number}.weight"] = torch.randn(outside, inside, 3, 3) * 0.05
        weights[f"features.{number}.bias"] = torch.randn(outside) * 0.05
    save_file(weights, folder / "vgg16.safetensors")
    return folder / "vgg16.safetensors", weights


def test_vgg_features_are_those_of_its_first_four_blocks(tmp_path: Path) -> None:
    file, weights = vgg_file(tmp_path)
    found = vgg_features(file, CPU)(pictures(1))
    assert [tuple(each.shape[1:]) for each in found] == [(64, 224, 224), (128, 112, 112), (256, 56, 56), (512, 28, 28)]
    x = functional.interpolate((pictures(1) + 1) / 2, (224, 224), mode="bilinear", antialias=True)
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        1, 3, 1, 1
    )
    for number in (0, 2):
        x = functional.conv2d(x, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], padding=1)
        x = x.relu()
    torch.testing.assert_close(found[0], x)


def test_a_clip_for_a_model_that_cannot_learn_is_refused(directory: Path, tmp_path: Path) -> None:
    faces = checkpoints.build_ddpm(tmp_path / "ddpm")
    settings = Settings.model_validate({"models": f"faces={faces}", "clips": f"faces={directory}"})
    with pytest.raises(ModelNotReady, match=r"'faces' has a CLIP, but a .* model cannot learn directions"):
        load(str(faces), "faces", settings)


def test_other_weights_are_no_vgg(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for file in (tmp_path / "other.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(ModelNotReady, match="torchvision's names"):
            vgg_features(file, CPU)


@pytest.mark.parametrize(
    ("number", "value", "says"),
    [
        (7, torch.zeros(128, 64, 3, 3), "torchvision's names"),
        (7, torch.zeros(128), "torchvision's names"),
        (21, torch.full((512, 512, 3, 3), float("nan")), "NaN or infinite"),
    ],
)
def test_weights_that_cannot_compare_two_images_are_no_vgg(
    number: int, value: Tensor, says: str, tmp_path: Path
) -> None:
    """They are found when the server starts, and not by the first caller who learns a direction."""
    file, weights = vgg_file(tmp_path)
    save_file({**weights, f"features.{number}.weight": value}, file)
    with pytest.raises(ModelNotReady, match=says):
        vgg_features(file, CPU)


def test_a_clip_that_is_pickled_is_refused(directory: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(directory, tmp_path / "clip"))
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelNotReady, match="cannot be read as a CLIP"):
        Clip.load(copy, device=CPU)


def test_a_clip_is_found_beside_inside_or_by_name(directory: Path, tmp_path: Path) -> None:
    model = checkpoints.build(tmp_path / "sd")
    assert load(str(model), "sd", Settings()).facts.info.content_features == ""
    served = {"models": f"sd={model}"}
    named = load(str(model), "sd", Settings.model_validate({**served, "clips": f"sd={directory}"}))
    assert (named.facts.info.content_features, named.facts.info.gradients) == ("vae", True)
    (model / "clip").symlink_to(directory)
    assert checkpoint.clip(model, "") == model / "clip"
    (tmp_path / "empty").mkdir()
    for name, why in (("nowhere", "is not a directory"), ("empty", "has no config.json")):
        with pytest.raises(ModelNotReady, match=why):
            load(str(model), "sd", Settings.model_validate({**served, "clips": f"sd={tmp_path / name}"}))
    file, _ = vgg_file(tmp_path)
    assert load(str(model), "sd", Settings(vgg=str(file))).facts.info.content_features == "vgg16"
