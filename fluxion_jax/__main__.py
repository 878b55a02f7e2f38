"""`python -m fluxion_jax` is `fluxion`."""

import sys

from fluxion_jax.cli import main

sys.exit(main())
