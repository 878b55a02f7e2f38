"""What differs between the JAX versions that this package supports."""

from __future__ import annotations

import jax

# XLA's CPU backend before JAX 0.11 has no bfloat16 dynamic_update_slice: it converts the whole
# operand to float32 and back.
XLA_CPU_WRITES_BFLOAT16_IN_PLACE = jax.__version_info__ >= (0, 11)
