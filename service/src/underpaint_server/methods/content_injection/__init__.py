"""Content injection: the content of one image in the style of another (Jeong, Kwon, Uh; WACV 2024)."""
