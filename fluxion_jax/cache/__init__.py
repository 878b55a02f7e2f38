"""The KV cache: its layout, its host part, its resident window, its summaries."""

from fluxion_jax.cache.host_kv import HostKV as HostKV
from fluxion_jax.cache.host_kv import cache_shardings as cache_shardings
from fluxion_jax.cache.layout import BLOCK_TOKENS as BLOCK_TOKENS
from fluxion_jax.cache.layout import GRANULARITIES_TOKENS as GRANULARITIES_TOKENS
from fluxion_jax.cache.layout import KVLayout as KVLayout
