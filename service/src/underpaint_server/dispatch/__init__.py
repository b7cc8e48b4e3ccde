"""The front process's side of the engine: admission, the queue, and starting and restarting the engine process."""
