"""Routing workloads: which experts the tokens go to, synthetic, measured or recorded.

:func:`make_routing` covers the usual needs with a one-line description; the parts it is made of
are exported beside it. Suffixes name the shape: T tokens, E experts, K experts per token.
"""

from .destinations import Destinations, count_destinations
from .gate import GateConfig, gate, update_bias
from .load_sampler import LoadSampler, profile_sampler, realised_load, zipf_sampler
from .profiles import (
    LoadProfile,
    list_profiles,
    load_profile,
    profile_from_counts,
    profiles_about,
    rank_loads,
)
from .result import Routing
from .spec import SPEC_HELP, make_routing
from .trace_common import RoutingTrace
from .trace_sglang import load_expert_counts
from .traces import load_trace
from .uniform import uniform_routing

__all__ = [
    "SPEC_HELP",
    "Destinations",
    "GateConfig",
    "LoadProfile",
    "LoadSampler",
    "Routing",
    "RoutingTrace",
    "count_destinations",
    "gate",
    "list_profiles",
    "load_expert_counts",
    "load_profile",
    "load_trace",
    "make_routing",
    "profile_from_counts",
    "profile_sampler",
    "profiles_about",
    "rank_loads",
    "realised_load",
    "uniform_routing",
    "update_bias",
    "zipf_sampler",
]
