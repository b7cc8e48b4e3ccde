"""Pure functions of tensors and numbers: schedules, samplers, noise, masks, features. They import no network and no
server."""
