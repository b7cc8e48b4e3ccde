"""Invert an image once, edit it twice."""

from sample import SOURCE_PROMPT, TARGET_PROMPT, flags, red_circle
from underpaint import Client

options = flags(__doc__, "quickstart.png").parse_args()
with Client(options.target) as client:
    photo = client.invert(red_circle(), source_prompt=SOURCE_PROMPT, steps=20, verify=True, progress=True)
    print(f"{photo.name}: largest error of the reconstructed latents {photo.reconstruction_max_abs_error:.1g}")
    blue = client.edit(photo, TARGET_PROMPT, progress=True)
    green = client.edit(photo, TARGET_PROMPT.replace("blue", "green"), seed=blue.resolved.seed)
    print("written", blue.save(options.output), "and edited to green,", green.image.size)
