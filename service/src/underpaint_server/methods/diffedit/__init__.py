"""DiffEdit: a mask from two prompts, then an edit inside it."""
