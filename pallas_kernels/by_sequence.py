"""Many small operations on numbers of heads, for each sequence, in one kernel.

What is written once, for the heads of one sequence, runs as XLA operations for all sequences, or as
one kernel with a program or a few for each. XLA makes a kernel for every reduction over heads, and
of fifty numbers of each head one that takes longer than all that it computes.

Axes: B batch, N query heads, K KV heads, G = N // K.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.compat import silence_triton_deprecation
from pallas_kernels.registry import Implementation, dispatch, require_gpu

HEADS = slice(None)
"""In an index: every query head."""


@dataclasses.dataclass(frozen=True)
class Heads:
    """The query heads of one sequence, and what is known of them.

    A kernel has a power of two of them. Those beyond N hold zeros or anything that follows from
    zeros; the sums and maxima here leave them out.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      index: int32 `[N]`, of each head.
      load: `load(name, *at)` is that part of an operand that an index picks: of numbers, `HEADS`
        on the axis of heads, and `...` on another one for all of it. Without heads it is a scalar.
      padded: whether there are heads beyond N.
    """

    num_heads: int
    num_kv_heads: int
    index: jax.Array
    load: Callable[..., Any]
    padded: bool

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    def total(self, x: jax.Array) -> jax.Array:
        """Sum over all heads."""
        return jnp.sum(self._among_all(x, 0))

    def largest(self, x: jax.Array) -> jax.Array:
        """Maximum over all heads, perhaps without those that are not numbers."""
        return jnp.max(self._among_all(x, -jnp.inf))

    def total_of_group(self, x: jax.Array) -> jax.Array:
        """Of every head the sum over its group, `[N]`."""
        if not self.padded:
            return jnp.repeat(x.reshape(-1, self.group).sum(axis=1), self.group)
        return jnp.sum(self._among_group(x, 0), axis=1)

    def largest_of_group(self, x: jax.Array) -> jax.Array:
        """Of every head the maximum over its group, `[N]`, likewise."""
        if not self.padded:
            return jnp.repeat(x.reshape(-1, self.group).max(axis=1), self.group)
        return jnp.max(self._among_group(x, -jnp.inf), axis=1)

    def _among_all(self, x: jax.Array, other: float) -> jax.Array:
        if not self.padded:
            return x
        return jnp.where(self.index < self.num_heads, x, jnp.full_like(x, other))

    def _among_group(self, x: jax.Array, other: float) -> jax.Array:
        """`[N, N]`: in each head's row those of its group. N need not be a multiple of a tile's."""
        shape = (x.size, x.size)
        mine, others = self.index[:, None] // self.group, self.index[None, :] // self.group
        same = jnp.broadcast_to(mine, shape) == jnp.broadcast_to(others, shape)
        x = jnp.broadcast_to(x[None, :], shape)
        return jnp.where(same, x, jnp.full_like(x, other))


class OfGroups(list[jax.Array]):
    """Results `[N]` that are the same for all heads of a group, of which one is kept."""


Results = tuple[Sequence[jax.Array], ...]
"""What a function of heads returns: lists of `[N]`, one list for each result."""


def by_sequence(
    function: Callable[[Heads], Results],
    rows: Mapping[str, jax.Array],
    shared: Mapping[str, jax.Array],
    *,
    num_heads: int,
    num_kv_heads: int,
    num_warps: int = 4,
    programs: int = 1,
    implementation: Implementation = None,
) -> tuple[jax.Array, ...]:
    """Calls a function of the heads of a sequence for every sequence.

    Args:
      function: see `Heads`; elementwise operations on `[N]` and what `Heads` has. The same function
        with the same operands must be an equal object, or every layer is traced anew.
      rows: operands by name, `[B, ...]`; the function sees `[...]` of its sequence.
      shared: operands by name that all sequences see.
      num_heads: N.
      num_kv_heads: K.
      num_warps: of the kernel's programs; 4 because numbers of heads fill no more, 8 for tables of
        heads by channels.
      programs: of a sequence. Each computes its share of each list, and what that follows from:
        worth it for many results of which each needs little of what the others need.
      implementation: "triton" on a GPU, "xla" everywhere, None for the best available.

    Returns:
      For each list of C that the function returns an array `[C, B, N]`, or `[C, B, K]` for one of
      `OfGroups`.
    """
    found: tuple[jax.Array, ...] = dispatch(
        "by_sequence",
        implementation,
        {"triton": by_sequence_triton, "xla": _xla},
        dict(rows),
        dict(shared),
        function=function,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        num_warps=num_warps,
        programs=programs,
    )
    return found


def _xla(
    rows: Mapping[str, jax.Array],
    shared: Mapping[str, jax.Array],
    *,
    function: Callable[[Heads], Results],
    num_heads: int,
    num_kv_heads: int,
    num_warps: int = 4,
    programs: int = 1,
) -> tuple[jax.Array, ...]:
    def of_one(row: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
        operands = {**shared, **row}

        def load(name: str, *at: Any) -> jax.Array:
            return operands[name][tuple(slice(None) if i is ... else i for i in at)]

        index = jnp.arange(num_heads, dtype=jnp.int32)
        heads = Heads(num_heads, num_kv_heads, index, load, padded=False)
        return tuple(
            jnp.stack([jnp.broadcast_to(x, (num_heads,)) for x in result])[
                :, :: heads.group if isinstance(result, OfGroups) else 1
            ]
            for result in function(heads)
        )

    return jax.vmap(of_one, out_axes=1)(rows)


def by_sequence_triton(
    rows: Mapping[str, jax.Array],
    shared: Mapping[str, jax.Array],
    *,
    function: Callable[[Heads], Results],
    num_heads: int,
    num_kv_heads: int,
    num_warps: int = 4,
    programs: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """As `by_sequence`.

    Args:
      rows: see `by_sequence`, as for all that follow.
      shared: operands that all sequences see.
      function: of `Heads`.
      num_heads: N.
      num_kv_heads: K.
      num_warps: of a program.
      programs: of a sequence.
      interpret: run on any platform, slowly; for tests.

    Raises:
      UnsupportedImplementationError: not on a GPU.
    """
    require_gpu(interpret)
    sizes: dict[str, Any] = {
        "function": function,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
    }
    shapes = jax.eval_shape(functools.partial(_xla, **sizes), rows, shared)
    # Every array of a kernel has an axis.
    rows = {name: x[:, None] if x.ndim == 1 else x for name, x in rows.items()}
    shared = {name: x[None] if x.ndim == 0 else x for name, x in shared.items()}
    batch = len(next(iter(rows.values())))

    def of_row(shape: tuple[int, ...]) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda row, _: (row,) + (0,) * len(shape))

    silence_triton_deprecation()
    found: tuple[jax.Array, ...] = pl.pallas_call(
        functools.partial(_kernel, names=(*rows, *shared), programs=programs, **sizes),
        grid=(batch, programs),
        in_specs=[
            *(of_row(x.shape[1:]) for x in rows.values()),
            *(
                pl.BlockSpec(x.shape, lambda *_, axes=x.ndim: (0,) * axes)  # type: ignore[misc]
                for x in shared.values()
            ),
        ],
        out_specs=tuple(
            pl.BlockSpec((x.shape[0], None, x.shape[2]), lambda row, _: (0, row, 0)) for x in shapes
        ),
        out_shape=shapes,
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="by_sequence",
    )(*rows.values(), *shared.values())
    return found


def _kernel(
    *refs: Any,
    names: tuple[str, ...],
    function: Callable[[Heads], Results],
    num_heads: int,
    num_kv_heads: int,
    programs: int,
) -> None:
    operands = dict(zip(names, refs, strict=False))
    index = jnp.arange(pl.next_power_of_2(num_heads), dtype=jnp.int32)

    def load(name: str, *at: Any) -> jax.Array:
        ref = operands[name]
        vectors = [
            (axis, index if i == HEADS else jnp.arange(pl.next_power_of_2(size), dtype=jnp.int32))
            for axis, (i, size) in enumerate(zip(at, ref.shape, strict=False))
            if i is ... or isinstance(i, slice)
        ]
        where: list[Any] = list(at) or [0]
        if not vectors:
            return ref[tuple(where)]
        shape = tuple(vector.size for _, vector in vectors)
        mask = jnp.full(shape, True)
        for place, (axis, vector) in enumerate(vectors):
            along = [None] * len(vectors)
            along[place] = slice(None)  # type: ignore[call-overload]
            where[axis] = jnp.broadcast_to(vector[tuple(along)], shape)
            mask &= where[axis] < ref.shape[axis]
        # Every part of the index must have the shape.
        where = [i if axis in dict(vectors) else jnp.full(shape, i) for axis, i in enumerate(where)]
        return pltriton.load(ref.at[tuple(where)], mask=mask, other=0)

    heads = Heads(num_heads, num_kv_heads, index, load, padded=True)

    def store(program: int) -> None:
        """A program's share of the results; what it does not store is not computed."""
        for ref, result in zip(refs[len(names) :], function(heads), strict=True):
            place, kept = index, index < num_heads
            if isinstance(result, OfGroups):
                kept &= index % heads.group == 0
                # No place twice, not even of what is not kept: interpreted, that writes what was
                # there.
                place = jnp.where(kept, index // heads.group, num_kv_heads + index)
            first, last = (len(result) * i // programs for i in (program, program + 1))
            for i in range(first, last):
                x = jnp.broadcast_to(result[i], index.shape).astype(ref.dtype)
                pltriton.store(ref.at[jnp.full_like(index, i), place], x, mask=kept)

    if programs == 1:
        return store(0)
    for program in range(programs):
        pl.when(pl.program_id(1) == program)(functools.partial(store, program))
