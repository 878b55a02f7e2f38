"""Shares of the selected blocks: all of them, once, and evenly."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.shares import shares


@pytest.mark.parametrize("total", [[0, 0], [1], [1000, 3, 0, 77], [64] * 8, [5, 1029]])
@pytest.mark.parametrize("programs", [1, 9, 264])
def test_every_block_is_in_one_share_and_no_share_is_longer_than_need_be(total, programs):
    cut = shares(jnp.asarray(total, jnp.int32), programs, tile_blocks=4)
    blocks, of_task = int(cut.blocks), np.asarray(cut.programs)
    assert blocks % 4 == 0
    assert blocks - 4 < max(sum(total) / programs, 1)
    np.testing.assert_array_equal(cut.end, np.cumsum(of_task))
    assert cut.end[-1] <= programs + len(total)
    for count, wanted in zip(of_task, total, strict=True):
        assert (count - 1) * blocks < wanted <= count * blocks or count == wanted == 0
