"""Status bits: errors of a compiled step travel as data and become Python errors afterwards."""

from __future__ import annotations

import host_ops

STATUS_NAN = 32
STATUS_FULL = 64
STATUS_PLAN = 128
STATUS_LAYER = 256

_MEANINGS = {
    STATUS_PLAN: "expected a granularity of 16, 32, 64 or 128 tokens in the policy's plan, got "
    "another; correct the policy",
    STATUS_LAYER: "expected the index of a layer of the module's kind, global or sliding, got "
    "another; correct the indices that the loop over layers runs through",
    host_ops.STATUS_INVALID: "a native operation refused its arguments (this is a defect of "
    "fluxion_jax; please report it with the output of `fluxion info`)",
    host_ops.STATUS_CANCELLED: "the step was cancelled",
    host_ops.STATUS_TIMEOUT: "the host work did not finish in time; raise FLUXION_TIMEOUT_S or "
    "look for what keeps the CPUs busy",
    host_ops.STATUS_INTERNAL: "a native operation failed (out of memory, or an injected fault)",
    host_ops.STATUS_NOT_IN_PLACE: "expected the host cache to be updated in place, got a copy of "
    "it: the program does not donate the cache; use fluxion_jax.jit instead of jax.jit, or pass "
    "donate_argnums and out_shardings=fluxion_jax.cache_shardings(cache); a cache inside another "
    "argument of fluxion_jax.jit needs that argument's name in donate_argnames; and NumPy views of "
    "its arrays must not be held (np.array copies, np.asarray does not)",
    STATUS_FULL: "expected room for another token in every active row, got a sequence at "
    "max_tokens; allocate a larger cache, or deactivate or reset the row",
    STATUS_NAN: "expected finite logits, got NaN or infinity: the weights, the keys in the cache "
    "or the inputs are not finite",
}


def describe_status(status: int) -> str:
    """Explains a status word; the cache keeps the tokens of the last good step."""
    reasons = [text for bit, text in _MEANINGS.items() if status & bit]
    unknown = status & ~sum(_MEANINGS)
    if unknown:
        reasons.append(f"unknown status bits {unknown:#x}")
    return f"a step failed (status {status}): " + "; ".join(reasons)
