"""Draw the content of one image in the style of another, with four weights; each image is inverted once."""

from pathlib import Path

from PIL import Image
from sample import flags, red_circle
from underpaint import Client, ContentInjection, Ddim, DdimInversion

STYLE = Path(__file__).with_name("sunglasses.png")  # from Fluent Emoji, MIT licence
WEIGHTS = (0.0, 0.15, 0.3, 0.45)


def main() -> None:
    """Invert both images, inject with each weight, write the results side by side into one image."""
    options = flags(__doc__, "content_injection.png").parse_args()
    with Client(options.target) as client:
        style = client.invert(STYLE, method=DdimInversion(), steps=20, strength=1)
        content = client.invert(red_circle(), method=DdimInversion(features=["mid"]), steps=20, strength=1)
        results = [client.edit(style, method=ContentInjection(content=content, weight=weight)) for weight in WEIGHTS]
        plain = client.edit(style, "an icon", Ddim(), guidance_scale=1)
    print(f"{results[0].usage.network_evaluations} evaluations each, {plain.usage.network_evaluations} without content")
    sheet = Image.new("RGB", (64 * len(results), 64))
    for k, result in enumerate(results):
        sheet.paste(result.image, (64 * k, 0))
    sheet.save(options.output)
    print("written", options.output)


if __name__ == "__main__":
    main()
