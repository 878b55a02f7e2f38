"""The attention module for a model's own layers: projections, RoPE and three ways to attend.

`__call__` is dense attention in plain `jnp`; it shares nothing with the cache and serves as the
oracle. `prefill` and `decode` keep keys and values in a host-resident cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fluxion_jax.attention import Execution, LayerStats, decode_attention
from fluxion_jax.cache.host_kv import HostKV
from fluxion_jax.chunk_attention import prefill_attention
from fluxion_jax.errors import ConfigError, require, require_integer, require_number
from fluxion_jax.policy.protocol import Policy
from fluxion_jax.policy.split import Split
from fluxion_jax.rope import Rope
from fluxion_jax.sliding import sliding_decode_attention, sliding_prefill_attention
from pallas_kernels.compat import target_platform

Rotation = Callable[[jax.Array, jax.Array], jax.Array]

_QUERY_TILE_TOKENS = 512
_PLAIN_ROPE = Rope()


def matmul_precision(dtype: Any) -> jax.lax.Precision:
    """The precision at which a matmul of this dtype loses nothing: no TF32 for float32."""
    exact = jnp.dtype(dtype) == jnp.dtype(jnp.float32)
    return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in float32.

    `scale` is what the normalised input is multiplied by. Gemma checkpoints on Hugging Face store
    `scale - 1`; our loaders add the one.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `[..., size]`; the result has the dtype of `x`."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention whose KV cache may live in host memory.

    Axes: B batch, S or T tokens, D model width, N query heads, K KV heads, H head size. Query head
    n belongs to KV head `n // (N // K)`. Keys are cached after RoPE, unscaled.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import fluxion_jax as fx
      >>> from fluxion_jax.modules import Attention
      >>> attention = Attention(16, num_heads=4, num_kv_heads=2, head_dim=8, rngs=nnx.Rngs(0))
      >>> layout = fx.KVLayout(num_layers=1, num_kv_heads=2, head_dim=8, dtype="float32")
      >>> cache = fx.HostKV.allocate(layout, batch=1, max_tokens=512)
      >>> x = jnp.ones((1, 7, 16))

      >>> out, cache = attention.prefill(x[:, :6], jnp.asarray([6]), cache, 0)
      >>> cache = cache.advance(6)
      >>> last, cache, stats = attention.decode(
      ...     x[:, 6:], cache, 0, fx.fixed(16, 0.05), split=fx.parse_split("host")
      ... )
      >>> bool(jnp.allclose(last, attention(x)[:, 6:], atol=1e-5))
      True
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        rope: Rope | Rotation | None = _PLAIN_ROPE,
        scale: float | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm_eps: float | None = None,
        sliding_window: int | None = None,
        dtype: Any = jnp.float32,
    ) -> None:
        """Creates randomly initialised projections.

        Args:
          d_model: model width D.
          num_heads: query heads N.
          num_kv_heads: KV heads K, a divisor of N.
          head_dim: head size H, even.
          rngs: source of the initial parameters.
          rope: rotary embedding of queries and keys; None for none; or your own, a function
            `(x [B, T, heads, H], positions int32 [B, T]) -> [B, T, heads, H]`.
          scale: factor of the scores; None means `H ** -0.5`.
          qkv_bias: biases on the query, key and value projections (Qwen2).
          out_bias: bias on the output projection.
          qk_norm_eps: epsilon of a per-head RMS-norm of queries and keys before RoPE (Qwen3,
            Gemma 3); None for no norm.
          sliding_window: tokens a query sees, itself included; None for all before it.
          dtype: dtype of parameters and activations. Norm scales stay float32.

        Raises:
          ConfigError: for sizes that do not fit together.
        """
        require_integer("d_model", d_model)
        for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            require_integer(name, value, least=0)
        require_integer("head_dim", head_dim, least=0)
        for name, number in (("scale", scale), ("qk_norm_eps", qk_norm_eps)):
            if number is not None:
                require_number(name, number, "or leave it out")
        if not (rope is None or isinstance(rope, Rope) or callable(rope)):
            raise ConfigError(f"expected rope as a Rope, a function or None, got {rope!r}")
        require("rngs", rngs, nnx.Rngs, "make one with nnx.Rngs(0)")
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ConfigError(
                "expected num_heads to be a multiple of num_kv_heads, got "
                f"{num_heads} and {num_kv_heads}; give every KV head the same number of queries"
            )
        if head_dim < 2 or head_dim % 2:
            raise ConfigError(f"expected an even head_dim, got {head_dim}; RoPE rotates pairs")
        if sliding_window is not None:
            require_integer("sliding_window", sliding_window, least=-(2**31))
        if sliding_window is not None and sliding_window < 1:
            raise ConfigError(
                f"expected sliding_window of at least 1 token, got {sliding_window}; "
                "use None for attention to everything"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope = rope
        self.scale = head_dim**-0.5 if scale is None else scale
        self.sliding_window = sliding_window

        def linear(inputs: int, outputs: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                dtype=dtype,
                param_dtype=dtype,
                precision=matmul_precision(dtype),
                rngs=rngs,
            )

        self.q = linear(d_model, num_heads * head_dim, qkv_bias)
        self.k = linear(d_model, num_kv_heads * head_dim, qkv_bias)
        self.v = linear(d_model, num_kv_heads * head_dim, qkv_bias)
        self.o = linear(num_heads * head_dim, d_model, out_bias)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_dim, eps=qk_norm_eps)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
    ) -> jax.Array:
        """Dense causal attention without a cache.

        Args:
          x: `[B, S, D]`.
          positions: int32 `[B, S]` for RoPE; None means `0 .. S - 1`. Causality and the sliding
            window go by the index in the sequence.
          lengths: int32 `[B]`, valid tokens of each row; None means S. What lies behind, NaN
            included, reaches no valid token.

        Returns:
          `[B, S, D]` in the dtype of `x`; rows behind `lengths` are unspecified.

        Raises:
          ConfigError: `x` has another shape.
        """
        self._check_input(x, None, None)
        batch, tokens, _ = x.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
        q, k, v = self._project(x, positions)
        out = dense_attention(q, k, v, lengths, self.scale, self.sliding_window)
        return self.o(out.astype(x.dtype).reshape(batch, tokens, -1))

    def prefill(
        self,
        x: jax.Array,
        count: jax.Array,
        cache: HostKV,
        layer: int | jax.Array,
        *,
        execution: Execution | None = None,
    ) -> tuple[jax.Array, HostKV]:
        """Attends from a chunk of tokens to the cached sequence and itself, and caches the chunk.

        Args:
          x: `[B, T, D]`; row b continues its sequence at position `cache.lengths[b]`.
          count: int32 `[B]`, valid tokens of each row, 0 to T.
          cache: the host KV cache; its lengths stay as they are until the whole model is through.
          layer: index of this layer in the model.
          execution: which implementations run; None for the best available.

        Returns:
          `[B, T, D]`, rows behind `count` unspecified, and the cache. After the last layer and
          `advance`, `undo_if_failed` keeps what the chunk of a failed prefill overwrote.

        Raises:
          ConfigError: shapes do not fit the module or the cache, or `layer` is no layer of the
            module's kind, global or sliding.
        """
        require("cache", cache, HostKV, "allocate one with HostKV.allocate")
        self._check_input(x, cache, None)
        if count.shape != x.shape[:1] or not jnp.issubdtype(count.dtype, jnp.integer):
            raise ConfigError(
                f"expected count as integers [{x.shape[0]}], got {count.dtype}"
                f"{list(count.shape)}; say how many tokens of each row count"
            )
        batch, tokens, _ = x.shape
        positions = cache.lengths[:, None] + jnp.arange(tokens, dtype=jnp.int32)
        q, k, v = self._project(x, positions)
        if self.sliding_window is None:
            host = execution.host if execution else None
            out, cache = prefill_attention(
                q, k, v, count, cache, layer, scale=self.scale, implementation=host
            )
        else:
            out, cache = sliding_prefill_attention(
                q, k, v, count, cache, layer, self.sliding_window, scale=self.scale
            )
        return self.o(out.astype(x.dtype).reshape(batch, tokens, -1)), cache

    def decode(
        self,
        x: jax.Array,
        cache: HostKV,
        layer: int | jax.Array,
        policy: Policy,
        *,
        split: Split,
        execution: Execution | None = None,
        return_selection: bool = False,
    ) -> tuple[jax.Array, HostKV, LayerStats | None]:
        """Attends from one new token per row to its cached sequence and caches the token.

        Args:
          x: `[B, 1, D]`, the token at position `cache.lengths[b]`.
          cache: the host KV cache.
          layer: index of this layer in the model.
          policy: decides how finely and how much of the cache each head reads.
          split: how the work is shared between host and device.
          execution: which implementations run; None for the best available.
          return_selection: also return what was selected, in the statistics.

        Returns:
          `[B, 1, D]`, the cache, and the layer's statistics: None for a sliding-window layer,
          whose keys all stay on the device.

        Raises:
          ConfigError: shapes do not fit the module or the cache, or `layer` is no layer of the
            module's kind, global or sliding.
        """
        require("cache", cache, HostKV, "allocate one with HostKV.allocate")
        self._check_input(x, cache, 1)
        q, k, v = (y[:, 0] for y in self._project(x, cache.lengths[:, None]))
        stats = None
        if self.sliding_window is None:
            out, cache, stats = decode_attention(
                q,
                k,
                v,
                cache,
                layer,
                policy,
                scale=self.scale,
                split=split,
                execution=execution,
                return_selection=return_selection,
            )
        else:
            out, cache = sliding_decode_attention(
                q, k, v, cache, layer, self.sliding_window, scale=self.scale
            )
        return self.o(out.astype(x.dtype).reshape(x.shape[0], 1, -1)), cache, stats

    def _check_input(self, x: jax.Array, cache: HostKV | None, tokens: int | None) -> None:
        """Checks the shape of `x`, and the cache it is for."""
        batch: Any = "B"
        if cache is not None:
            batch, layout = cache.batch, cache.layout
            if (layout.num_kv_heads, layout.head_dim) != (self.num_kv_heads, self.head_dim):
                raise ConfigError(
                    f"expected a cache of {self.num_kv_heads} KV heads of {self.head_dim}, got "
                    f"{layout.num_kv_heads} of {layout.head_dim}; allocate it for this model"
                )
            if self.sliding_window is not None and layout.sliding_window != self.sliding_window:
                raise ConfigError(
                    f"expected a cache whose sliding layers keep {self.sliding_window} tokens, as "
                    f"this module sees, got sliding_window={layout.sliding_window}; allocate it "
                    "for this model"
                )
        width = self.q.in_features
        good = x.ndim == 3 and x.shape[2] == width and tokens in (None, x.shape[1])
        if not good or (cache is not None and x.shape[0] != batch):
            wanted = "S" if tokens is None else tokens
            raise ConfigError(
                f"expected x of shape [{batch}, {wanted}, {width}], got {list(x.shape)}; see "
                "modules.Attention"
            )

    def _project(
        self, x: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`, normed and rotated."""
        batch, tokens, _ = x.shape
        if batch * tokens == 1 and target_platform() == "gpu":
            # For one row XLA writes all products of keys and values to memory before it sums them;
            # for two it makes one matrix product of all three.
            x = jnp.pad(x, ((0, 0), (0, 1), (0, 0)))
        q, k, v = (linear(x)[:, :tokens] for linear in (self.q, self.k, self.v))
        q = q.reshape(batch, tokens, self.num_heads, self.head_dim)
        k = k.reshape(batch, tokens, self.num_kv_heads, self.head_dim)
        v = v.reshape(batch, tokens, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            rotate = self.rope.rotate if isinstance(self.rope, Rope) else self.rope
            q, k = rotate(q, positions), rotate(k, positions)
        return q, k, v


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array | None,
    scale: float,
    sliding_window: int | None,
) -> jax.Array:
    """Causal attention `[B, S, N, H]`, float32, one tile of queries against all keys at a time."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    tile = min(tokens, _QUERY_TILE_TOKENS)
    tiles = -(-tokens // tile)
    q = q.astype(jnp.float32).reshape(batch, tokens, kv_heads, heads // kv_heads, head_dim)
    q = jnp.pad(q, ((0, 0), (0, tiles * tile - tokens), (0, 0), (0, 0), (0, 0)))
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    key_ids = jnp.arange(tokens)
    if lengths is not None:
        # Causality already gives these values no weight, but zero times NaN is NaN.
        v = jnp.where((key_ids < lengths[:, None])[:, :, None, None], v, 0.0)

    def attend(index: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(q, index * tile, tile, axis=1)
        # The padding of the last tile must see some key, or its NaN would reach the gradients.
        query_ids = jnp.minimum(index * tile + jnp.arange(tile), tokens - 1)
        mask = key_ids[None, :] <= query_ids[:, None]
        if sliding_window is not None:
            mask &= key_ids[None, :] > query_ids[:, None] - sliding_window
        scores = jnp.einsum("btkgh,bskh->bkgts", rows, k, precision=jax.lax.Precision.HIGHEST)
        weights = jax.nn.softmax(jnp.where(mask, scores * scale, -jnp.inf), axis=-1)
        return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=jax.lax.Precision.HIGHEST)

    out = jax.lax.map(attend, jnp.arange(tiles))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, tiles * tile, heads, head_dim)
    return out[:, :tokens]
