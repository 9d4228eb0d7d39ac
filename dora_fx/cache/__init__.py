"""The cache of what is computed once per optimizer step, and the detection of stale values."""

from dora_fx.cache.fingerprint import mix
from dora_fx.cache.parameter_cache import CachedSite, check, empty_base_norm, empty_cache, measure_base, refresh
from dora_fx.cache.tracing import is_traced

__all__ = [
    "CachedSite",
    "check",
    "empty_base_norm",
    "empty_cache",
    "is_traced",
    "measure_base",
    "mix",
    "refresh",
]
