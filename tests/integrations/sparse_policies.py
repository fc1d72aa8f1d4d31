"""Policies that really leave rows out of the tiny models' short contexts."""

from typing import Any

from tiny_models import random_basis
from transformers import PreTrainedModel

import loki_attn
from loki_attn import Budget, Policy
from loki_attn.integrations.transformers import Attachment
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki
from loki_attn.types import Mode

FEW = Budget(top_k=6, sinks=1, recents=2)
METHODS = {
    "exact_topk": ExactTopK(),
    "loki_planes": Loki(rank=6),
    "loki_rotated": Loki(rank=6, layout="rotated"),
}


def sparse(
    model: PreTrainedModel,
    method: str = "loki_planes",
    mode: Mode = "decode",
    budget: Budget = FEW,
    **more: Any,
) -> Attachment:
    """Attach a method of `METHODS` to a tiny model."""
    policy = Policy(select=METHODS[method], budget=budget, **more)
    return loki_attn.attach(model, policy, basis=random_basis(model), mode=mode)
