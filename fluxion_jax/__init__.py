"""fluxion_jax: long-context decoding in JAX with the KV cache in host memory."""

from fluxion_jax.adapters import adapt as adapt
from fluxion_jax.attention import Execution as Execution
from fluxion_jax.attention import LayerStats as LayerStats
from fluxion_jax.attention import decode_attention as decode_attention
from fluxion_jax.cache import HostKV as HostKV
from fluxion_jax.cache import KVLayout as KVLayout
from fluxion_jax.cache import cache_shardings as cache_shardings
from fluxion_jax.calibration.calibrate import calibrate as calibrate
from fluxion_jax.errors import CacheFullError as CacheFullError
from fluxion_jax.errors import ConfigError as ConfigError
from fluxion_jax.errors import FluxionError as FluxionError
from fluxion_jax.errors import IntegrityError as IntegrityError
from fluxion_jax.errors import UnsupportedError as UnsupportedError
from fluxion_jax.generation import Result as Result
from fluxion_jax.generation import Scores as Scores
from fluxion_jax.generation import generate as generate
from fluxion_jax.generation import prefill as prefill
from fluxion_jax.generation import score as score
from fluxion_jax.generation import stream as stream
from fluxion_jax.jitting import jit as jit
from fluxion_jax.policy import Plan as Plan
from fluxion_jax.policy import Policy as Policy
from fluxion_jax.policy import fixed as fixed
from fluxion_jax.policy import full as full
from fluxion_jax.policy import parse_policy as parse_policy
from fluxion_jax.policy import parse_split as parse_split
from fluxion_jax.sampling import Sampling as Sampling
from fluxion_jax.sampling import greedy as greedy
from fluxion_jax.sampling import top_p as top_p

__version__ = "0.1.0"
