"""Every test and doctest runs in an empty folder of its own, so that none depends on the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the working directory an empty one."""
    monkeypatch.chdir(tmp_path)
