"""Arrays put aside: what comes back, and where it was."""

import numpy as np
import pytest

from expe_edge.spool import Spool


@pytest.mark.parametrize("in_memory", [100, 1 << 20])
def test_arrays_come_back_in_order_as_often_as_asked(in_memory: int) -> None:
    """With 100 bytes in memory, all that counts is on disk."""
    arrays = [np.random.default_rng(seed).normal(size=(3, 5)).astype(np.float32)[:, seed:] for seed in range(4)]
    spool = Spool(iter(arrays[:-1]), in_memory)
    assert len([*spool]) == len(arrays) - 1
    spool.append(arrays[-1])
    for _ in range(2):
        found = [*spool]
        assert len(found) == len(arrays)
        for one, expected in zip(found, arrays, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, expected)


def test_the_file_is_closed_with_the_spool() -> None:
    spool = Spool([np.zeros(3)])
    file = spool._file
    assert not file.closed
    del spool
    assert file.closed
