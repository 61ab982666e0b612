"""What several parity tests start from."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from kdlab.parity import Row, parity

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def stored_rows() -> Callable[[str], list[Row]]:
    """The comparisons of a family's stored files, made once."""
    return cache(lambda family: parity(GOLDEN / family))
