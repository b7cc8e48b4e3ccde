"""Draw one picture with more and more of another's content in it; the second picture is inverted only once."""

from pathlib import Path

from PIL import Image
from sample import flags, red_circle
from underpaint import Client, ContentInjection, Ddim, DdimInversion

LOOK = Path(__file__).with_name("sunglasses.png")  # from Fluent Emoji, MIT licence
WEIGHTS = (0.0, 0.15, 0.3, 0.45)


def main() -> None:
    """Invert both pictures, inject at several weights, lay the results side by side."""
    options = flags(__doc__, "content_injection.png").parse_args()
    with Client(options.target) as client:
        look = client.invert(LOOK, method=DdimInversion(), steps=20, strength=1)
        content = client.invert(red_circle(), method=DdimInversion(features=["mid"]), steps=20, strength=1)
        drawn = [client.edit(look, method=ContentInjection(content=content, weight=weight)) for weight in WEIGHTS]
        plain = client.edit(look, "an icon", Ddim(), guidance_scale=1)
    print(f"{drawn[0].usage.network_evaluations} evaluations each, {plain.usage.network_evaluations} without content")
    sheet = Image.new("RGB", (64 * len(drawn), 64))
    for k, result in enumerate(drawn):
        sheet.paste(result.image, (64 * k, 0))
    sheet.save(options.output)
    print("written", options.output)


if __name__ == "__main__":
    main()
