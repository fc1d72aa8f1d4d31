"""loki-attn: sparse attention and KV-cache compression for pretrained decoder models.

Importing this package patches nothing and imports no framework beside torch.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from loki_attn.basis import Basis
    from loki_attn.budget import Budget
    from loki_attn.cache import LayerCache
    from loki_attn.errors import LokiAttnError
    from loki_attn.fitting import fit
    from loki_attn.integrations.transformers import attach, calibrate
    from loki_attn.keep_budget import KeepBudget
    from loki_attn.key_stats import KeyStats
    from loki_attn.policy import Policy, preset, presets
    from loki_attn.profile import Profile
    from loki_attn.types import Selection

__version__: Final = "0.1.0"

_HOMES: Final = {
    "Basis": "loki_attn.basis",
    "Budget": "loki_attn.budget",
    "KeepBudget": "loki_attn.keep_budget",
    "KeyStats": "loki_attn.key_stats",
    "LayerCache": "loki_attn.cache",
    "LokiAttnError": "loki_attn.errors",
    "Policy": "loki_attn.policy",
    "Profile": "loki_attn.profile",
    "Selection": "loki_attn.types",
    "attach": "loki_attn.integrations.transformers",
    "calibrate": "loki_attn.integrations.transformers",
    "fit": "loki_attn.fitting",
    "preset": "loki_attn.policy",
    "presets": "loki_attn.policy",
}

__all__ = [
    "Basis",
    "Budget",
    "KeepBudget",
    "KeyStats",
    "LayerCache",
    "LokiAttnError",
    "Policy",
    "Profile",
    "Selection",
    "__version__",
    "attach",
    "calibrate",
    "fit",
    "preset",
    "presets",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home at first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loki_attn' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Public names."""
    return list(__all__)
