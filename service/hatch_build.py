"""Pins the client to the server's own version, which stands in one place only."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ClientPin(BuildHookInterface):
    """The client has the wire code; a second copy of the messages would fail at import."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002 (standard or editable)
        """Add the requirement."""
        build_data["dependencies"].append(f"underpaint=={self.metadata.version}")
