"""Faults and Ctrl-C in the middle of work: the cache holds all up to the last good step."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
import host_ops
from fluxion_jax import session
from tests.generation import tiny

ROWS = tiny.prompts((9, 340, 480), seed=6)
NEW_TOKENS = 100
NUM_LAYERS = 2


@pytest.fixture(scope="module")
def reference():
    return tiny.generate(tiny.llama(), ROWS, max_new_tokens=NEW_TOKENS)


@pytest.fixture(scope="module")
def broken():
    """The same model with one weight of the last layer's values missing."""
    graph, state = nnx.split(tiny.llama())
    model = nnx.merge(graph, jax.tree.map(lambda x: x, state))
    kernel = model.layers[1].attention.v.kernel
    kernel[...] = kernel[...].at[0, 0].set(np.nan)
    return model


def assert_recovers(cache, reference, **options):
    """With a new object too, because that is what `clear_status` gives."""
    tiny.assert_continues(tiny.llama(), cache.clear_status(), ROWS, reference, **options)


def test_nan_in_prefill_leaves_the_cache_as_it_was(broken):
    """The chunk is longer than what the ring has to spare."""
    cache = tiny.prefilled(tiny.llama(), ROWS)
    untouched = cache.fork()
    with pytest.raises(fx.FluxionError, match=r"expected finite logits, got NaN .* weights"):
        fx.prefill(broken, tiny.prompts((100,) * 3), cache, chunk_tokens=128, progress=False)
    np.testing.assert_array_equal(cache.lengths, untouched.lengths)
    for name in ("window_k", "window_v"):
        for got, expected in zip(getattr(cache, name), getattr(untouched, name), strict=True):
            np.testing.assert_array_equal(got, expected)
    rest = [[1], [2], [3]]
    got = tiny.generate(tiny.llama(), rest, cache=cache.clear_status(), max_new_tokens=40)
    expected = tiny.generate(tiny.llama(), rest, cache=untouched, max_new_tokens=40)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_nan_in_prefill_of_sliding_layers_leaves_them_as_they_were():
    good = tiny.gemma3()
    graph, state = nnx.split(good)
    bad = nnx.merge(graph, jax.tree.map(lambda x: x * np.nan, state))
    cache = tiny.prefilled(good, ROWS)
    untouched = cache.fork()
    with pytest.raises(fx.FluxionError, match="finite logits"):
        fx.prefill(bad, tiny.prompts((100,) * 3), cache, chunk_tokens=128, progress=False)
    rest = [[1], [2], [3]]
    got = tiny.generate(good, rest, cache=cache.clear_status(), max_new_tokens=40)
    expected = tiny.generate(good, rest, cache=untouched, max_new_tokens=40)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_a_chunk_in_a_program_of_ones_own_is_undone(broken):
    cache = tiny.prefilled(tiny.llama(), ROWS)
    untouched = cache.fork()
    graph, params = nnx.split(broken)

    @fx.jit
    def read(cache, params, tokens, count):
        _, after = nnx.merge(graph, params).prefill_chunk(tokens, count, cache)
        return after.undo_if_failed(cache)

    cache = read(cache, params, np.asarray(tiny.prompts((128,) * 3), np.int32), np.full(3, 100))
    with pytest.raises(fx.FluxionError, match="finite logits"):
        cache.check()
    rest = [[1], [2], [3]]
    got = tiny.generate(tiny.llama(), rest, cache=cache.clear_status(), max_new_tokens=40)
    expected = tiny.generate(tiny.llama(), rest, cache=untouched, max_new_tokens=40)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


def test_nan_in_a_step_does_not_count(broken):
    cache = tiny.prefilled(tiny.llama(), ROWS)
    untouched = cache.fork()
    rest = [[1], [2], [3]]
    with pytest.raises(fx.FluxionError, match="expected finite logits, got NaN"):
        tiny.generate(broken, rest, cache=cache, max_new_tokens=5)
    np.testing.assert_array_equal(cache.lengths, untouched.lengths)
    with pytest.raises(fx.FluxionError, match="pending error"):
        tiny.generate(tiny.llama(), rest, cache=cache, max_new_tokens=5)
    got = tiny.generate(tiny.llama(), rest, cache=cache.clear_status(), max_new_tokens=40)
    expected = tiny.generate(tiny.llama(), rest, cache=untouched, max_new_tokens=40)
    np.testing.assert_array_equal(got.tokens, expected.tokens)


@pytest.mark.native
@pytest.mark.parametrize("collects", [0, 1, 2 * 5, 2 * 15 + 1, 2 * 40 + 1])
def test_a_failing_native_operation(reference, collects):
    cache = tiny.new_cache(tiny.llama())
    host_ops.inject_fault(host_ops.STATUS_INTERNAL, after_calls=collects)
    try:
        with pytest.raises(fx.FluxionError, match="native operation failed"):
            tiny.generate(tiny.llama(), ROWS, cache=cache, max_new_tokens=NEW_TOKENS)
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK)
    done = collects // NUM_LAYERS
    np.testing.assert_array_equal(cache.lengths, [len(row) - 1 + done for row in ROWS])
    assert_recovers(cache, reference)


@pytest.mark.native
@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_failing_write_in_prefill_leaves_the_cache_as_it_was(reference, layer):
    """The other layer's write of the same chunk succeeds; the chunk does not count all the same."""
    cache = tiny.new_cache(tiny.llama())
    chunks = 2
    host_ops.inject_fault(host_ops.STATUS_INTERNAL, chunks * NUM_LAYERS + layer, operation="append")
    try:
        with pytest.raises(fx.FluxionError, match="native operation failed"):
            tiny.generate(tiny.llama(), ROWS, cache=cache, max_new_tokens=NEW_TOKENS)
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK, operation="append")
    written = [min(len(row) - 1, chunks * tiny.CHUNK_TOKENS) for row in ROWS]
    np.testing.assert_array_equal(cache.lengths, written)
    cache = cache.clear_status()
    rest = [row[n:] for row, n in zip(ROWS, written, strict=True)]
    result = tiny.generate(tiny.llama(), rest, cache=cache, max_new_tokens=20)
    for got, whole in zip(result.tokens, reference.tokens, strict=True):
        np.testing.assert_array_equal(got, whole[:20])


@pytest.mark.native
def test_a_failing_native_operation_under_a_sparse_policy():
    """What was written before the fault is written again, and summaries fold it twice."""
    options = {"policy": "fixed:32:0.05", "max_new_tokens": 50}
    reference = tiny.generate(tiny.llama(), ROWS, **options)
    cache = tiny.new_cache(tiny.llama())
    host_ops.inject_fault(host_ops.STATUS_TIMEOUT, after_calls=2 * 12 + 1)
    try:
        with pytest.raises(fx.FluxionError, match=r"did not finish in time; .*FLUXION_TIMEOUT_S"):
            tiny.generate(tiny.llama(), ROWS, cache=cache, **options)
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK)
    assert_recovers(cache, reference, policy="fixed:32:0.05")


@pytest.mark.native
def test_a_block_that_could_not_be_written_leaves_no_scale_behind():
    """The step that fails is the one in which the first block leaves the window."""
    rows = tiny.prompts((9, 336, 336), seed=7)
    options = {"policy": "fixed:16:0.05", "max_new_tokens": 40}
    reference = tiny.generate(tiny.llama(), rows, **options)
    cache = tiny.prefilled(tiny.llama(), [row[:-1] for row in rows])
    host_ops.inject_fault(host_ops.STATUS_INTERNAL)
    try:
        with pytest.raises(fx.FluxionError, match="native operation failed"):
            tiny.generate(tiny.llama(), [row[-1:] for row in rows], cache=cache, **options)
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK)
    for exponents, summaries in zip(cache.exponents, cache.summaries, strict=True):
        assert (np.asarray(exponents) == np.asarray(exponents).min()).all()
        assert not np.asarray(summaries).any()
    tiny.assert_continues(
        tiny.llama(), cache.clear_status(), rows, reference, policy="fixed:16:0.05"
    )


def press_after(monkeypatch, name, calls):
    """Sends SIGINT when `session.NAME` has returned for the `calls`-th time."""
    real, count = getattr(session, name), 0

    def press(*args, **kwargs):
        nonlocal count
        result = real(*args, **kwargs)
        count += 1
        if count == calls:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(session, name, press)


@pytest.mark.parametrize("calls", [1, 3])
def test_ctrl_c_before_the_results_of_a_prefill_chunk_are_stored(monkeypatch, reference, calls):
    cache = tiny.new_cache(tiny.llama())
    with monkeypatch.context() as patch:
        press_after(patch, "prefill_chunk", calls)
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(tiny.llama(), ROWS, cache=cache, max_new_tokens=NEW_TOKENS)
    expected = [min(len(row) - 1, calls * tiny.CHUNK_TOKENS) for row in ROWS]
    np.testing.assert_array_equal(cache.lengths, expected)
    assert int(cache.status[0]) == 0
    rest = [row[n:] for row, n in zip(ROWS, expected, strict=True)]
    result = tiny.generate(tiny.llama(), rest, cache=cache, max_new_tokens=20)
    for got, whole in zip(result.tokens, reference.tokens, strict=True):
        np.testing.assert_array_equal(got, whole[:20])


@pytest.mark.parametrize("name", ["decode_chunk", "wait"])
@pytest.mark.parametrize("calls", [1, 2])
def test_ctrl_c_around_a_decode_chunk(monkeypatch, reference, name, calls):
    """Between dispatch and the storing of results, where the cache is nobody's; and behind it."""
    cache = tiny.prefilled(tiny.llama(), [row[:-1] for row in ROWS])
    with monkeypatch.context() as patch:
        press_after(patch, name, calls)
        with pytest.raises(KeyboardInterrupt) as interrupt:
            tiny.generate(
                tiny.llama(), [row[-1:] for row in ROWS], cache=cache, max_new_tokens=NEW_TOKENS
            )
    assert int(cache.status[0]) == 0
    assert int(cache.cancel[0]) == 0
    fed = int(cache.lengths[0]) - (len(ROWS[0]) - 1)
    assert 32 * (calls - 1) <= fed <= 32 * calls
    partial = interrupt.value.partial
    assert partial.stats.num_steps == fed
    for got, expected in zip(partial.tokens, reference.tokens, strict=True):
        np.testing.assert_array_equal(got, expected[:fed])
    tiny.assert_continues(tiny.llama(), cache, ROWS, reference)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_stream_gives_all_that_the_cache_holds_before_ctrl_c(monkeypatch, reference, calls):
    cache = tiny.prefilled(tiny.llama(), [row[:-1] for row in ROWS])
    rows, tokens = [row[-1:] for row in ROWS], []

    def listen() -> None:
        for step in fx.stream(tiny.llama(), rows, cache=cache, max_new_tokens=NEW_TOKENS):
            tokens.append(step.tokens)

    with monkeypatch.context() as patch:
        press_after(patch, "decode_chunk", calls)
        with pytest.raises(KeyboardInterrupt):
            listen()
    assert len(tokens) == int(cache.lengths[0]) - (len(ROWS[0]) - 1)
    for i, row in enumerate(reference.tokens):
        assert [int(step[i]) for step in tokens] == row[: len(tokens)].tolist()


def test_ctrl_c_pressed_again_and_again(monkeypatch, reference):
    cache = tiny.prefilled(tiny.llama(), [row[:-1] for row in ROWS])
    real = session.decode_chunk

    def press(*args, **kwargs):
        result = real(*args, **kwargs)
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(session, "decode_chunk", press)
        with pytest.raises(KeyboardInterrupt):
            tiny.generate(tiny.llama(), [row[-1:] for row in ROWS], cache=cache)
    tiny.assert_continues(tiny.llama(), cache, ROWS, reference)


@pytest.mark.parametrize("delay_s", [0.002, 0.02, 0.08])
def test_ctrl_c_at_any_time(reference, delay_s):
    """A real signal out of another thread, anywhere in prefill or decode."""
    cache = tiny.new_cache(tiny.llama())
    main = threading.main_thread().ident
    # A signal that meets JAX's callback of the collector is lost to Python: nothing raised there
    # gets any further.
    gc.disable()
    timer = threading.Timer(delay_s, lambda: signal.pthread_kill(main, signal.SIGINT))

    def until_the_signal() -> None:
        timer.start()
        tiny.generate(tiny.llama(), ROWS, cache=cache, max_new_tokens=NEW_TOKENS)
        # On a fast machine all is done by now; then the signal must at least find no traces.
        timer.join()
        time.sleep(1)

    try:
        with pytest.raises(KeyboardInterrupt):
            until_the_signal()
    finally:
        gc.enable()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert int(cache.status[0]) == 0
    lengths = np.asarray(cache.lengths)
    if (lengths < [len(row) - 1 for row in ROWS]).any():
        rest = [row[int(n) :] for row, n in zip(ROWS, lengths, strict=True)]
        result = tiny.generate(tiny.llama(), rest, cache=cache, max_new_tokens=20)
        for got, whole in zip(result.tokens, reference.tokens, strict=True):
            np.testing.assert_array_equal(got, whole[:20])
    else:
        tiny.assert_continues(tiny.llama(), cache, ROWS, reference)


@pytest.mark.native
def test_ctrl_c_stops_within_a_chunk(monkeypatch):
    """The cancel word, not the end of the chunk, ends the program; its error is not the user's."""
    cache = tiny.prefilled(tiny.llama(), [row[:-1] for row in ROWS])
    real = host_ops.new_cancel_word

    def cancelled() -> int:
        word = real()
        host_ops.cancel(word)
        return word

    monkeypatch.setattr("fluxion_jax.interrupt.host_ops.new_cancel_word", cancelled)
    before = np.asarray(cache.lengths)
    with pytest.raises(fx.FluxionError, match="the step was cancelled"):
        tiny.generate(tiny.llama(), [row[-1:] for row in ROWS], cache=cache, max_new_tokens=8)
    np.testing.assert_array_equal(cache.lengths, before)


def test_ctrl_c_with_a_handler_of_the_application(reference):
    """It is called, late, and decides; nothing is cancelled on its behalf."""
    calls = []
    previous = signal.signal(signal.SIGINT, lambda *_: calls.append(1))
    try:
        os.kill(os.getpid(), signal.SIGINT)
        timer = threading.Timer(0.02, lambda: os.kill(os.getpid(), signal.SIGINT))
        timer.start()
        result = tiny.generate(tiny.llama(), ROWS, max_new_tokens=NEW_TOKENS)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(calls) == 2
    np.testing.assert_array_equal(result.tokens, reference.tokens)


def test_generating_outside_of_the_main_thread(reference):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(tiny.generate(tiny.llama(), ROWS, max_new_tokens=NEW_TOKENS))
    )
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0].tokens, reference.tokens)
