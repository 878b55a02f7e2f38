"""The NumPy reference against small answers known by hand, and against brute force."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from host_ops import numpy_reference
from tests.host_ops import cases


def test_bits_of_a_bitmap():
    chosen = np.zeros((1, 40), bool)
    chosen[0, [0, 5, 31, 32, 39]] = True
    bitmap = numpy_reference.pack(chosen)
    assert bitmap.tolist() == [[1 | 1 << 5 | 1 << 31, 1 | 1 << 7]]
    assert (numpy_reference.unpack(bitmap, 40) == chosen).all()


def test_query_quantisation_by_hand():
    q = np.zeros((1, 4, 3), np.float32)
    q[0, 0] = [4, -2, 1]
    q[0, 1] = [1, 0, 0]
    q[0, 2] = [np.inf, 1, 1]
    exponents = np.zeros((1, 2, 3), np.int32)
    exponents[0, 0, 2] = 3
    for shared, second in ((False, [127, 0, 0]), (True, [16, 0, 0])):
        got = numpy_reference.quantise_query(q, exponents, np.full((1, 2), shared))
        # The third channel counts eightfold: (4, -2, 8) in steps of 8 / 127.
        assert got[0].tolist() == [[64, -32, 127], second, [0, 0, 0], [0, 0, 0]]


def test_scores_bound_every_key_of_their_unit():
    rng = np.random.default_rng(0)
    keys = rng.integers(-127, 128, size=(16, 40))
    summaries = np.zeros((1, 1, 15, 2, 40), np.int8)
    summaries[0, 0, 0] = keys.min(axis=0), keys.max(axis=0)
    q8 = rng.integers(-127, 128, size=(1, 3, 40)).astype(np.int8)
    scores = numpy_reference.score(q8, summaries, np.full((1, 1), 16), np.ones(1, np.int32))
    assert (scores[0, :, 0] >= (q8[0].astype(int) @ keys.T).max(axis=-1)).all()
    assert (scores[0, :, 1:] == numpy_reference.NOT_A_UNIT).all()


def select(scores, granularity, host_blocks, k_units, shared=False):
    padded = np.full((1, len(scores), 8), numpy_reference.NOT_A_UNIT, np.int32)
    padded[0, :, : len(scores[0])] = scores
    bitmap = numpy_reference.select(
        padded,
        np.array([[granularity]]),
        np.array([host_blocks]),
        np.array([k_units]),
        np.array([[shared]]),
    )
    return [format(int(word), "b") for word in bitmap[0, :, 0]]


def test_selection_by_hand():
    assert select([[5, 9, 9, 1]], 16, 4, [2]) == ["110"]
    assert select([[5, 9, 9, 9]], 16, 4, [2]) == ["110"]
    assert select([[5, 9]], 64, 7, [1]) == ["1110000"]
    assert select([[5, 9]], 64, 7, [9]) == ["1111111"]
    assert select([[5, 9], [8, 2]], 32, 4, [1, 0]) == ["1100", "0"]
    assert select([[5, 9], [8, 2]], 32, 4, [1, 0], shared=True) == ["1100", "1100"]
    assert select([[-7, -9]], 16, 2, [1]) == ["1"]


def test_attention_by_brute_force():
    case = cases.random_case(cases.Shape(dtype="bfloat16"), bitmap=True)
    out, lse = numpy_reference.attend(case.work.q, case.k, case.v, case.work.bitmap, case.scale)
    # Head 5 of 12 belongs to KV head 1 of 3.
    keys = np.asarray(case.k[1, 1], np.float64)
    values = np.asarray(case.v[1, 1], np.float64)
    total, weighted = 0.0, np.zeros(40)
    for block in range(136):
        if case.work.bitmap[1, 5, block // 32] >> np.uint32(block % 32) & 1:
            for token in range(16):
                weight = np.exp(case.scale * keys[block, token] @ case.work.q[1, 5])
                total += weight
                weighted += weight * values[block, token]
    np.testing.assert_allclose(lse[1, 5], np.log(total), 1e-6)
    np.testing.assert_allclose(out[1, 5], weighted / total, 1e-5, 1e-6)


def test_summaries_by_hand():
    k, v = np.zeros((2, 1, 1, 8, 16, 2), jnp.bfloat16)
    summaries = np.full((1, 1, 15, 2, 2), 99, np.int8)
    blocks = np.zeros((1, 1, 4, 16, 2), k.dtype)

    def append(values, first, shift):
        new = np.zeros((1, 1, 4, 2, 2), np.int8)
        new[0, 0, : len(values), :, 0] = values
        flush = cases.Flush(
            blocks,
            blocks,
            new,
            np.array([[[shift, 0]]], np.int32),
            np.array([first], np.int32),
            np.array([len(values)], np.int32),
        )
        numpy_reference.append(k, v, summaries, flush)

    append([(-7, 5), (-3, 9), (-2, -1)], 0, 0)
    assert summaries[0, 0, [0, 1, 2], :, 0].tolist() == [[-7, 5], [-3, 9], [-2, -1]]
    assert summaries[0, 0, [8, 9], :, 0].tolist() == [[-7, 9], [-2, -1]]
    assert summaries[0, 0, [12, 14], :, 0].tolist() == [[-7, 9], [-7, 9]]
    append([(-1, 6)], 3, 1)
    # Low halves rounded down, high halves up.
    assert summaries[0, 0, :4, :, 0].tolist() == [[-4, 3], [-2, 5], [-1, 0], [-1, 6]]
    assert summaries[0, 0, [8, 9, 12, 14], :, 0].tolist() == [[-4, 5], [-1, 6], [-4, 6], [-4, 6]]
    append([(0, 0)], 4, 0)
    assert summaries[0, 0, [10, 13, 14], :, 0].tolist() == [[0, 0], [0, 0], [-4, 6]]
