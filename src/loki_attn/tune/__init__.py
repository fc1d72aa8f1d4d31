"""Tuning: the fastest Loki policy within a bound on quality, on the user's own text and machine.

space --bytes, a few timed steps--> cost of every policy
text  --one dense forward-------->  what every policy is likely to lose
both  --search, decode protocol-->  the cheapest within the bound, confirmed on held-out text
"""

from loki_attn.tune.outcome import (
    NothingFoundError,
    Tuning,
    check_policy_path,
    write_policy,
)
from loki_attn.tune.spec import Bound, Cost, Spec
from loki_attn.tune.tuning import tune

__all__ = [
    "Bound",
    "Cost",
    "NothingFoundError",
    "Spec",
    "Tuning",
    "check_policy_path",
    "tune",
    "write_policy",
]
