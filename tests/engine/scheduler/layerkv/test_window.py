"""The window against a list, however rows come in."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.scheduler.layerkv.window import Window


@given(st.integers(1, 5), st.lists(st.integers(0, 12), max_size=20))
def test_holds_the_last_rows_in_order(capacity, sizes):
    """Pushes of any size, more than it holds among them."""
    window, rows = Window(capacity, 2), []
    for size in sizes:
        new = [[len(rows) + i, -i] for i in range(size)]
        rows += new
        window.push(np.array(new, float).reshape(-1, 2))
        assert window.rows.tolist() == rows[-capacity:]
        assert window.count == len(rows)
