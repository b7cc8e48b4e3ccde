"""Pure functions of tensors and numbers; nothing here knows a network, a job or a server."""
