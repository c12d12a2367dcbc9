"""Puts the flat folder on the path and finds ../shared, beside the checkout or wherever DINOCELL_SHARED says."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference outputs and labelled images; they are not part of the repository, so tests that need them skip."""
    folder = Path(os.environ.get("DINOCELL_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"needs the reference data folder {folder.name}/ beside the checkout (or DINOCELL_SHARED)")
    return folder
