"""Learn an edit from one drawn picture, then use it on a photo, more and less of it."""

from sample import SOURCE_PROMPT, TARGET_PROMPT, flags, red_circle
from underpaint import Client, Disentangled, GradientLearning

options = flags(__doc__, "learn_direction.png").parse_args()
with Client(options.target) as client:
    few = GradientLearning(optimization_steps=2)  # ten are usual, and take five times as long
    learning = client.learn(SOURCE_PROMPT, TARGET_PROMPT, [7], method=few, steps=10)
    print(learning.name, "goes on whatever happens here; attach() finds it again")
    direction = learning.result(progress=lambda now: print(now.phase, f"{now.fraction:.0%}", now.loss))
    print(f"{direction.name}: loss {direction.losses[0]:.3f}, at best {min(direction.losses):.3f}")
    blue = client.edit(red_circle(), "", Disentangled(direction=direction))
    half = client.edit(red_circle(), "", Disentangled(direction=direction, scale=0.5), seed=blue.resolved.seed)
    print("written", blue.save(options.output), "and half as much of it", half.image.size)
    client.delete_direction(direction)
    learning.forget()
