"""A cache with one array for all layers: scans over layers are in place, with the same numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fluxion_jax as fx
import host_ops
from fluxion_jax.cache.rebuild import rebuild_summaries
from fluxion_jax.chunk_attention import prefill_attention
from fluxion_jax.modules import Attention
from fluxion_jax.policy import parse_split
from fluxion_jax.rope import Rope
from tests.hlo import full_size_copies

LAYERS, HEADS, KV_HEADS, SIZE = 2, 6, 2, 32
KERNEL_SIZE = 64  # the smallest head size that every kernel takes
LENGTHS = (700, 335)
SCALE = 0.2


def filled(summaries="host", *, stacked, layers=LAYERS, dtype="float32", size=SIZE):
    layout = fx.KVLayout(layers, KV_HEADS, size, dtype, summaries=summaries)
    rng = np.random.default_rng(0)
    shape = (len(LENGTHS), max(LENGTHS), KV_HEADS, size)
    k, v = ([rng.standard_normal(shape).astype(np.float32) for _ in range(layers)] for _ in "kv")
    return fx.HostKV.from_arrays(layout, k, v, LENGTHS, 1024, stacked=stacked)


def layer_step(cache, q, layer, split, implementation, device=None, policy=None):
    """One layer of a model whose keys and values follow from what came before."""
    out, cache, stats = fx.decode_attention(
        q,
        q[:, :KV_HEADS],
        q[:, KV_HEADS : 2 * KV_HEADS],
        cache,
        layer,
        fx.fixed(16, 0.2) if policy is None else policy,
        scale=SCALE,
        split=split,
        execution=fx.Execution(host=implementation, device=device, dense_below_tokens=0),
    )
    return out + 0.5 * q, cache, stats


def unrolled(cache, q, split, implementation, device):
    collected = []
    for layer in range(LAYERS):
        q, cache, stats = layer_step(cache, q, layer, split, implementation, device)
        collected.append(stats)
    return q, cache.advance(), jax.tree.map(lambda *xs: jnp.stack(xs), *collected)


def scanned(cache, q, split, implementation, device):
    def body(carry, layer):
        q, cache = carry
        q, cache, stats = layer_step(cache, q, layer, split, implementation, device)
        return (q, cache), stats

    (q, cache), stats = jax.lax.scan(body, (q, cache), jnp.arange(LAYERS))
    return q, cache.advance(), stats


def compiled(program):
    return fx.jit(program, static_argnames=("implementation", "device"))


def held(cache):
    """Everything the cache holds, layers one behind the other."""
    names = ("k", "v", "summaries", "exponents", "window_k", "window_v")
    arrays = {name: np.concatenate([np.array(x) for x in getattr(cache, name)]) for name in names}
    return arrays | {"lengths": np.array(cache.lengths)}


def places(cache):
    assert all(x.sharding.memory_kind == "pinned_host" for x in cache.host_arrays)
    return [x.unsafe_buffer_pointer() for x in cache.host_arrays]


@pytest.fixture
def exact_products():
    """A GPU would round the factors of a product to 10 bits."""
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def query():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((len(LENGTHS), HEADS, SIZE)), jnp.float32)


ON_GPU = (pytest.mark.native, pytest.mark.gpu)


@pytest.mark.parametrize(
    ("implementation", "summaries", "split", "device"),
    [
        pytest.param("native", "host", "0.5", None, marks=pytest.mark.native),
        pytest.param("native", "device", "host", None, marks=pytest.mark.native),
        ("xla", "host", "host", None),
        ("numpy", "host", "host", None),
        *(
            pytest.param("native", summaries, split, device, marks=ON_GPU)
            for summaries in ("host", "device")
            for split, device in (
                *(("host", "triton"), ("device", "triton")),
                *(("0.5", kernel) for kernel in ("triton", "mosaic", "triton_mma", "wgmma")),
            )
        ),
    ],
)
def test_a_scan_over_layers_is_in_place_and_equals_unrolled_layers(
    query, implementation, summaries, split, device
):
    results = []
    dtype = "bfloat16" if device in ("triton_mma", "wgmma") else "float32"
    if device is not None:
        query = jnp.concatenate([query] * (KERNEL_SIZE // SIZE), axis=-1)
    for program, stacked in ((unrolled, False), (scanned, True)):
        run = compiled(program)
        cache = filled(summaries, stacked=stacked, dtype=dtype, size=query.shape[-1])
        if stacked:
            arguments = (cache, query, parse_split(split), implementation, device)
            hlo = run.trace(*arguments).lower().compile()
            assert full_size_copies(hlo.as_text(), [x.shape for x in cache.host_arrays]) == []
        before, q = places(cache), query
        for _ in range(18):  # a block leaves the window on the way
            q, cache, stats = run(cache, q, parse_split(split), implementation, device)
        cache.check()
        assert places(cache) == before
        results.append((q, stats, held(cache)))
    (expected, expected_stats, expected_cache), (got, stats, cache) = results
    # Keys follow from what came before, and may be rounded to bfloat16 the other way.
    tolerance = 2e-5 if dtype == "float32" else 1e-2
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
    for name in ("host_blocks", "device_blocks", "host_units", "device_units"):
        np.testing.assert_array_equal(getattr(stats, name), getattr(expected_stats, name))
    assert (int(stats.host_blocks.sum()) > 0) == (split != "device")
    for name, array in cache.items():
        if implementation == "native" and device is None:
            np.testing.assert_array_equal(array, expected_cache[name], err_msg=name)
        else:  # their sums go by how XLA or NumPy vectorise a program
            at_most = 1 if name in ("summaries", "exponents") and device else tolerance
            np.testing.assert_allclose(
                array.astype(np.float32), expected_cache[name].astype(np.float32),
                rtol=0, atol=at_most, err_msg=name,
            )  # fmt: skip


STEPS = 20


def over_layers(body, carry, looped):
    """Runs `body(carry, layer)` for all layers: in a scan, or one written behind the other."""
    if looped:
        return jax.lax.scan(lambda carry, layer: (body(carry, layer), None), carry, jnp.arange(3))[
            0
        ]
    for layer in range(3):
        carry = body(carry, layer)
    return carry


@functools.partial(fx.jit, static_argnames=("looped", "device"))
def generation(cache, prompt, counts, q, split, looped, device):
    """Two chunks of a prompt, of which the second reads what the first wrote, and some steps."""

    def read(carry, layer):
        x, count, cache = carry
        k, v = x[:, :, :KV_HEADS], x[:, :, KV_HEADS : 2 * KV_HEADS]
        out, cache = prefill_attention(x, k, v, count, cache, layer, scale=SCALE)
        return out + 0.5 * x, count, cache

    def write(carry, layer):
        # Nothing is ranked, so that no rounding in the prompt's products can tip the scales.
        q, cache = layer_step(carry[1], carry[0], layer, split, "native", device, fx.full())[:2]
        # As between layers of a model, or sixty of them make numbers beyond any absolute tolerance.
        return q / jnp.sqrt(jnp.mean(q**2, axis=-1, keepdims=True)), cache

    for x, count in zip(prompt, counts, strict=True):
        prefilled, _, cache = over_layers(read, (x, count, cache), looped)
        cache = cache.advance(count)

    def step(_, carry):
        q, cache = over_layers(write, carry, looped)
        return q, cache.advance()

    q, cache = jax.lax.fori_loop(0, STEPS, step, (q, cache))
    return cache, q, prefilled


@pytest.mark.parametrize(
    ("summaries", "split", "device"),
    [
        pytest.param("host", "0.5", None, marks=pytest.mark.native),
        *(
            pytest.param(summaries, split, "triton", marks=ON_GPU)
            for summaries in ("host", "device")
            for split in ("host", "0.5", "device")
        ),
    ],
)
def test_a_prompt_and_steps_in_scans_equal_unrolled_layers(summaries, split, device):
    layout = fx.KVLayout(3, KV_HEADS, KERNEL_SIZE, "float32", summaries=summaries)
    rng = np.random.default_rng(2)
    prompt = jnp.asarray(rng.standard_normal((2, 2, 500, HEADS, KERNEL_SIZE)), jnp.float32)
    counts = jnp.asarray([[500, 410], [487, 3]], jnp.int32)
    q = jnp.asarray(rng.standard_normal((2, HEADS, KERNEL_SIZE)), jnp.float32)
    results = []
    for looped in (False, True):
        cache = fx.HostKV.allocate(layout, 2, 1200, stacked=looped)
        arguments = (cache, prompt, counts, q, parse_split(split), looped, device)
        hlo = generation.trace(*arguments).lower().compile().as_text()
        assert full_size_copies(hlo, [x.shape for x in cache.host_arrays]) == []
        before = places(cache)
        cache, *outputs = generation(*arguments)
        cache.check()
        assert places(cache) == before
        results.append((outputs, held(cache)))
    (expected, expected_cache), (got, cache) = results
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    assert cache["lengths"].tolist() == [987 + STEPS, 413 + STEPS]
    assert np.abs(cache["k"]).sum(axis=(1, 2, 3, 4)).all()
    for name, array in cache.items():
        at_most = 1 if name in ("summaries", "exponents") else 2e-5
        np.testing.assert_allclose(array, expected_cache[name], rtol=0, atol=at_most, err_msg=name)


def test_a_conditional_over_layers_copies_in_older_versions(query):
    """Why there is a stacked cache: choosing among arrays of layers may cost a copy of them all."""
    cache = filled(stacked=False)
    branches = [
        lambda q, cache, layer=layer: layer_step(cache, q, layer, parse_split("host"), None)[:2]
        for layer in range(LAYERS)
    ]

    def program(cache, q):
        def body(carry, layer):
            return jax.lax.switch(layer, branches, *carry), None

        (q, cache), _ = jax.lax.scan(body, (q, cache), jnp.arange(LAYERS))
        return q, cache.advance()

    hlo = fx.jit(program).trace(cache, query).lower().compile().as_text()
    assert bool(full_size_copies(hlo, [cache.k[0].shape])) == (jax.__version_info__ < (0, 11))


class Layer(nnx.Module):
    def __init__(self, rngs, sliding_window=None):
        rope = Rope(500.0)
        own = lambda x, positions: rope.rotate(x, positions)  # noqa: E731
        self.attention = Attention(
            24, 4, 2, 16, rngs=rngs, rope=own, sliding_window=sliding_window, qk_norm_eps=1e-6
        )


def stacked_layers(count, sliding_window=None):
    make = nnx.vmap(lambda rngs: Layer(rngs, sliding_window), in_axes=0, out_axes=0)
    return nnx.split_rngs(splits=count)(make)(nnx.Rngs(3))


@pytest.mark.parametrize(
    "split",
    ["host", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("host", "0.5", "device"))],
    ids=["anywhere-host", "gpu-host", "gpu-0.5", "gpu-device"],
)
def test_nnx_scan_of_global_and_sliding_layers(split, exact_products):
    """Two stacks of modules over one cache, prefilled and decoded, against the dense path.

    Compiled by `nnx.jit` with donation for the prefill and by split and merge for the steps.
    """
    layout = fx.KVLayout(
        4, 2, 16, "float32", sliding_window=40, sliding_layers=(0, 2), recent_tokens=64
    )
    stacks = (stacked_layers(2, 40), stacked_layers(2))
    indices = jnp.asarray([[0, 2], [1, 3]], jnp.int32)
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.standard_normal((2, 300, 24)), jnp.float32)
    cache = fx.HostKV.allocate(layout, 2, 512, stacked=True)
    before = places(cache)

    @nnx.scan(in_axes=(0, 0, nnx.Carry, 0), out_axes=nnx.Carry)
    def prefill_pair(sliding, wide, carry, index):
        x, count, cache = carry
        for layer, number in ((sliding, index[0]), (wide, index[1])):
            attended, cache = layer.attention.prefill(x, count, cache, number)
            x = x + attended
        return x, count, cache

    @nnx.scan(in_axes=(0, 0, nnx.Carry, 0), out_axes=nnx.Carry)
    def decode_pair(sliding, wide, carry, index):
        x, cache = carry
        for layer, number in ((sliding, index[0]), (wide, index[1])):
            attended, cache, _ = layer.attention.decode(
                x, cache, number, fx.full(), split=parse_split(split)
            )
            x = x + attended
        return x, cache

    def prefill(cache, stacks, x):
        count = jnp.asarray([290, 171], jnp.int32)
        _, _, cache = prefill_pair(*stacks, (x, count, cache), indices.T)
        return cache.advance(count)

    run = nnx.jit(prefill, donate_argnums=0, out_shardings=fx.cache_shardings(cache))
    cache = run(cache, stacks, x[:, :290])
    graph, states = nnx.split(stacks)

    @fx.jit
    def step(cache, states, token):
        out, cache = decode_pair(*nnx.merge(graph, states), (token, cache), indices.T)
        return out, cache.advance()

    for token in range(290, 300):
        out, cache = step(cache, states, x[:, token : token + 1])
    cache.check()
    assert places(cache) == before
    assert step.compilations() == 1

    @nnx.scan(in_axes=(0, 0, nnx.Carry), out_axes=nnx.Carry)
    def dense_pair(sliding, wide, x):
        x = x + sliding.attention(x)
        return x + wide.attention(x)

    rows = (x[0], jnp.concatenate([x[1, :171], x[1, 290:]]))
    for row, tokens in enumerate(rows):
        wanted = dense_pair(*stacks, tokens[None])[0, -1]
        np.testing.assert_allclose(out[row, 0], wanted, rtol=0, atol=1e-4)


def test_a_layer_of_a_kind_that_the_cache_has_not_is_refused():
    layers, cache = stacked_layers(2, 40), filled(stacked=True, layers=2, size=16)

    def run(cache, x):
        @nnx.scan(in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry)
        def one(layer, carry, index):
            x, cache = carry
            out, cache = layer.attention.prefill(x, jnp.asarray([3, 3]), cache, index)
            return out, cache

        return one(layers, (x, cache), jnp.arange(2))[1]

    x = jnp.ones((2, 3, 24))
    with pytest.raises(fx.ConfigError, match=r"sliding layers keep 40 tokens.*sliding_window=None"):
        run(cache, x)
    layers = stacked_layers(2)
    layout = fx.KVLayout(2, 2, 16, "float32", sliding_window=40, sliding_layers=(0, 1))
    with pytest.raises(fx.ConfigError, match="expected a cache with global layers"):
        run(fx.HostKV.allocate(layout, 2, 1024, stacked=True), x)


@pytest.mark.native
def test_a_chunk_that_failed_is_undone_in_every_layer():
    cache = filled(stacked=True)
    before = held(cache)
    rng = np.random.default_rng(6)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 100, n, SIZE)), jnp.float32)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    count = jnp.full((2,), 100, jnp.int32)

    @fx.jit
    def read(cache, q, k, v):
        def body(cache, layer):
            _, cache = prefill_attention(q, k, v, count, cache, layer, scale=SCALE)
            return cache, None

        after, _ = jax.lax.scan(body, cache, jnp.arange(LAYERS))
        return after.advance(count).undo_if_failed(cache)

    host_ops.inject_fault(host_ops.STATUS_INTERNAL, 1, operation="append")
    try:
        cache = jax.block_until_ready(read(cache, q, k, v))
    finally:
        host_ops.inject_fault(host_ops.STATUS_OK, operation="append")
    with pytest.raises(fx.FluxionError, match="native operation failed"):
        cache.check()
    after = held(cache)
    for name in ("window_k", "window_v", "lengths"):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


def test_rows_are_reset_and_forked_in_every_layer(query):
    whole, cache = filled(stacked=False), filled(stacked=True)
    for rows in ([1], [1, 0, 1]):
        copied, expected = held(cache.fork(rows)), held(whole.fork(rows))
        for name, array in expected.items():
            np.testing.assert_array_equal(copied[name], array, err_msg=name)
    np.testing.assert_array_equal(
        held(cache.reset([0]))["exponents"], held(whole.reset([0]))["exponents"]
    )
    assert "2 layers, stacked, batch 2" in repr(cache)
    assert (cache.host_bytes, cache.batch) == (whole.host_bytes, 2)


@pytest.mark.native
@pytest.mark.parametrize("summaries", ["host", "device"])
def test_summaries_are_rebuilt_from_the_keys_of_every_layer(summaries):
    cache = filled(summaries, stacked=True)
    before = held(cache)
    # As after a chunk that did not count: bounds that are too loose, with scales that have grown.
    (exponents,) = cache.exponents
    cache = cache.replace(exponents=(exponents + 3,))
    assert (held(cache)["exponents"] != before["exponents"]).any()
    after = held(rebuild_summaries(cache))
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)


@pytest.mark.native
def test_a_layer_that_is_none_ends_in_an_error_and_changes_nothing(query):
    cache = filled(stacked=True)
    before = held(cache)

    @fx.jit
    def run(cache, q, layer):
        q, cache, _ = layer_step(cache, q, layer, parse_split("host"), None)
        return q, cache.advance()

    for layer in (-1, LAYERS):
        _, cache = run(cache, query, jnp.asarray(layer, jnp.int32))
        with pytest.raises(fx.FluxionError, match="the index of a layer of the module's kind"):
            cache.check()
        cache = cache.clear_status()
        for name, array in held(cache).items():
            np.testing.assert_array_equal(array, before[name])
    with pytest.raises(fx.ConfigError, match="expected a global layer"):
        layer_step(cache, query, LAYERS, parse_split("host"), None)


def test_what_a_stacked_cache_cannot_do(tmp_path):
    with pytest.raises(fx.UnsupportedError, match="stacked=False"):
        filled(stacked=True).save(tmp_path / "cache")
    sketched = fx.KVLayout(2, 2, 16, num_heads=4, sketch=True)
    with pytest.raises(fx.UnsupportedError, match="without a sketch"):
        fx.HostKV.allocate(sketched, 1, 512, stacked=True)
    mesh = jax.make_mesh((1,), ("heads",))
    with pytest.raises(fx.UnsupportedError, match="on one device"):
        fx.HostKV.allocate(fx.KVLayout(2, 2, 16), 1, 512, mesh=mesh, stacked=True)


def test_a_loop_over_layers_needs_a_stacked_cache():
    cache = filled(stacked=False)
    q = jnp.zeros((2, 4, HEADS, SIZE))
    k = jnp.zeros((2, 4, KV_HEADS, SIZE))
    count = jnp.asarray([4, 4], jnp.int32)
    with pytest.raises(fx.ConfigError, match="allocate it with stacked=True"):
        jax.eval_shape(
            lambda cache, layer: prefill_attention(q, k, k, count, cache, layer, scale=SCALE),
            cache,
            jnp.asarray(0),
        )
