"""Page tokens: where the page before ended, opaque to callers."""

import base64
from datetime import UTC, datetime

from underpaint_server.errors import FieldInvalid, FieldViolation

Key = tuple[datetime, str]
"""Creation time and name: the order of a listing, whatever comes or goes meanwhile."""


def token_of(key: Key) -> str:
    """The token of the page after that entry."""
    created, name = key
    return base64.urlsafe_b64encode(f"{created.isoformat()} {name}".encode()).decode()


def key_of(token: str) -> Key:
    """The entry that a token stands for; raises FieldInvalid for one that is none of ours."""
    try:
        created, name = base64.urlsafe_b64decode(token).decode().split(" ")
        return datetime.fromisoformat(created).astimezone(UTC), name
    except (ValueError, OverflowError):
        raise FieldInvalid(FieldViolation("page_token", "is not the token of a page before")) from None
