"""What cases of the tables need besides the table's own entry."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def packages(request: pytest.FixtureRequest) -> None:
    """The slow cases of adamw8bit have its package, which is not in the environment."""
    if "adamw8bit" in request.node.name and request.node.get_closest_marker("slow"):
        request.getfixturevalue("bitsandbytes")
