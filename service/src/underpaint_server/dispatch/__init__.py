"""The front's side of the engine: admission, the queue, and the engine process, started, watched and restarted."""
