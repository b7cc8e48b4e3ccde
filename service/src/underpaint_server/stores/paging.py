"""Page tokens: the key of the last entry of a page, opaque to callers."""

import base64
from datetime import UTC, datetime

from underpaint_server.errors import FieldInvalid, FieldViolation

Key = tuple[datetime, str]
"""Creation time and name. Listings are sorted by it, so entries added or removed between pages move no others."""


def token_of(key: Key) -> str:
    """The token of the page that follows this entry."""
    created, name = key
    return base64.urlsafe_b64encode(f"{created.isoformat()} {name}".encode()).decode()


def key_of(token: str) -> Key:
    """The key in a page token; raises FieldInvalid for a text that is no such token."""
    try:
        created, name = base64.urlsafe_b64decode(token).decode().split(" ")
        return datetime.fromisoformat(created).astimezone(UTC), name
    except (ValueError, OverflowError):
        raise FieldInvalid(
            FieldViolation("page_token", "not a page token: send the next_page_token of the previous page, unchanged")
        ) from None
