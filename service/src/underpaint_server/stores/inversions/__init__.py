"""The inversion store: names, file format, objects, index and expiry of stored inversions."""
