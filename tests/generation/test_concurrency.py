"""Two threads of one program, each with its own cache, share compiled functions and the host."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tests.generation import tiny

NEW_TOKENS = 40


@pytest.mark.native
def test_two_threads_generate_as_if_each_were_alone():
    rows = [tiny.prompts((9, 340, 480), seed=6), tiny.prompts((400, 20, 333), seed=7)]
    options = {"policy": "fixed:16:0.05", "max_new_tokens": NEW_TOKENS}
    alone = [tiny.generate(tiny.llama(), prompts, **options).tokens for prompts in rows]
    together: list[list] = [[], []]
    meet = threading.Barrier(2)

    def program(index: int) -> None:
        meet.wait()
        for _ in range(3):
            together[index].append(tiny.generate(tiny.llama(), rows[index], **options).tokens)

    threads = [threading.Thread(target=program, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, results in zip(alone, together, strict=True):
        assert len(results) == 3
        for got in results:
            np.testing.assert_array_equal(got, expected)
