"""Disentangled edits: two prompts mixed with one weight a step."""
