"""Registering: our functions made known to transformers, and what a model used before."""

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from loki_attn.integrations.transformers.function import IMPLEMENTATION, loki_attention


def register() -> None:
    """Make the attention function and its masks known; other names are untouched."""
    AttentionInterface.register(IMPLEMENTATION, loki_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def implementations(model: PreTrainedModel) -> list[tuple[PreTrainedConfig, str | None]]:
    """Every config of a model with its attention implementation, outer ones first."""
    found: dict[int, PreTrainedConfig] = {}
    queue = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    while queue:
        config = queue.pop(0)
        found.setdefault(id(config), config)
        inner = (getattr(config, name, None) for name in config.sub_configs)
        queue += [c for c in inner if c is not None and id(c) not in found]
    return [(config, config._attn_implementation) for config in found.values()]
