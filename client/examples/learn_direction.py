"""Learn a direction from one generated image, then apply it to another image at full and at half scale."""

from sample import SOURCE_PROMPT, TARGET_PROMPT, flags, red_circle
from underpaint import Client, Disentangled, GradientLearning

options = flags(__doc__, "learn_direction.png").parse_args()
with Client(options.target) as client:
    method = GradientLearning(optimization_steps=2)  # the default of 10 takes five times as long
    learning = client.learn(SOURCE_PROMPT, TARGET_PROMPT, [7], method=method, steps=10)
    print(learning.name, "runs on the server; attach() returns its handle to any program")
    direction = learning.result(
        progress=lambda progress: print(progress.phase, f"{progress.fraction:.0%}", progress.loss)
    )
    print(f"{direction.name}: loss {direction.losses[0]:.3f} at first, {min(direction.losses):.3f} at best")
    blue = client.edit(red_circle(), "", Disentangled(direction=direction))
    half = client.edit(red_circle(), "", Disentangled(direction=direction, scale=0.5), seed=blue.resolved.seed)
    print("written", blue.save(options.output), "and edited at half scale,", half.image.size)
    client.delete_direction(direction)
    learning.forget()
