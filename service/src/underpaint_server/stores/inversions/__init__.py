"""The inversion store: names, files, an index of what is stored, and expiry."""
