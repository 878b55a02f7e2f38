"""Finds operations of a program for a GPU that compute with arrays in pinned host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

# Calls that read such arrays where they lie, and operations that hand them on.
ALLOWED = {"ffi_call", "pallas_call", "mpmd_map", "fluxion_retag", "optimization_barrier"}


def traced_for_gpu(trace: Callable[..., Any], *args: Any) -> Any:
    """The jaxpr of what `trace(*args)` traces, as if the default device were an H100."""
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return trace(*args).jaxpr.jaxpr


def computed_with(jaxpr: Any, on_host: list[bool] | None = None) -> list[str]:
    """Names of the operations that touch what lies in host memory.

    Args:
      jaxpr: of a program.
      on_host: which of its arguments lie there whatever their type says.
    """
    flags = on_host or [False] * len(jaxpr.invars)
    lies = {v for v, flag in zip(jaxpr.invars, flags, strict=True) if flag}

    def is_on_host(atom: Any) -> bool:
        if hasattr(atom, "val"):
            return False
        space = getattr(atom.aval, "memory_space", None)
        return atom in lies or space == jax.memory.Space.Host

    found: list[str] = []
    for eqn in jaxpr.eqns:
        operands = [is_on_host(x) for x in eqn.invars]
        if not any(operands):
            continue
        name = eqn.primitive.name
        if name == "fluxion_retag":
            lies.update(eqn.outvars)
        inner = list(_bodies(eqn, operands))
        for body, flags in inner:
            found += computed_with(body, flags)
        if not inner and name not in ALLOWED:
            found.append(name)
    return found


def _bodies(eqn: Any, operands: list[bool]) -> Iterator[tuple[Any, list[bool]]]:
    """What a control-flow operation runs, with which of its arguments lie on the host."""
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        for branch in params["branches"]:
            yield branch.jaxpr, operands[1:]
    elif name == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        carry = operands[cond + body :]
        yield params["cond_jaxpr"].jaxpr, operands[:cond] + carry
        yield params["body_jaxpr"].jaxpr, operands[cond : cond + body] + carry
    elif name not in ALLOWED:
        for body in (params[key] for key in ("jaxpr", "call") if key in params):
            yield getattr(body, "jaxpr", body), operands
