"""URLs of places, and what a wrong one is told."""

from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore, S3Store
from underpaint_server.stores.urls import STORES, open_store


def test_each_scheme_opens_its_store(file_url: str, s3_url: str) -> None:
    assert isinstance(open_store("memory:///"), MemoryStore)
    assert isinstance(open_store(file_url), LocalStore)
    s3 = open_store(s3_url)
    assert isinstance(s3, S3Store)
    assert s3.prefix == "some/prefix"


def test_a_directory_is_made(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/deep/er")
    assert (tmp_path / "deep" / "er").is_dir()


@pytest.mark.parametrize("url", ["redis://host/0", "/var/lib/underpaint", "", "S 3://bucket"])
def test_an_unknown_scheme_is_told_what_exists(url: str) -> None:
    with pytest.raises(ValueError, match=", ".join(STORES)):
        open_store(url)


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("file://host/path", "absolute path"),
        ("file:relative", "absolute path"),
        ("s3:///prefix", "the bucket is missing"),
        ("memory:///folder", "memory store has no path"),
    ],
)
def test_a_malformed_url_is_told_how_to_write_it(url: str, advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        open_store(url)
