"""The cache of what is computed once per optimizer step, and the detection of stale values."""

from dora_fx.cache.active_adapter import ActiveAdapterRecord, note_adapter, raise_if_other
from dora_fx.cache.call_check import CallCheck, SiteTensors, are_covered
from dora_fx.cache.fingerprint import mix
from dora_fx.cache.parameter_cache import CachedSite, check, empty_base_norm, empty_cache, measure_base, refresh
from dora_fx.cache.step_counts import StepCount, note_step_count, step_count_of
from dora_fx.cache.tracing import have_no_values, is_traced

__all__ = [
    "ActiveAdapterRecord",
    "CachedSite",
    "CallCheck",
    "SiteTensors",
    "StepCount",
    "are_covered",
    "check",
    "empty_base_norm",
    "empty_cache",
    "have_no_values",
    "is_traced",
    "measure_base",
    "mix",
    "note_adapter",
    "note_step_count",
    "raise_if_other",
    "refresh",
    "step_count_of",
]
