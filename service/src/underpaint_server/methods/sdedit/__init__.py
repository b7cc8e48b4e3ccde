"""SDEdit: noise to a strength, denoise with the target prompt."""
