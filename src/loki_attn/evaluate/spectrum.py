"""Spectrum: how many columns of a basis matter, layer by layer and head by head, as a row."""

import json
from typing import Any, Final

import torch

from loki_attn.basis import Basis
from loki_attn.evaluate.results import Row
from loki_attn.policy import preset

PROTOCOL: Final = (
    "spectrum of a fitted basis: rank_at_90 is the smallest number of columns whose share of it "
    "reaches 90 %, of each layer and KV head; cumulative is that share by column, mean over heads; "
    "for pca it is the centred key variance (arXiv 2406.02542, section 3)"
)
_SHARE: Final = 0.9


def spectrum(basis: Basis, name: str | None = None) -> Row:
    """Describe a basis.

    Args:
        basis: The basis; a pca basis for the rank of the keys.
        name: The row's contender; the kind and side of the basis if None.

    Returns:
        A row of task "spectrum": `rank_at_90` [layers][kv_heads], `cumulative`
        [layers][head_dim], `index` [layers]; n counts the layers' heads.
    """
    ranks = basis.rank_at(_SHARE)
    shares = torch.stack([basis.layer(index).spectrum for index in basis.layer_indices])
    held = shares.cumsum(-1) / shares.sum(-1, keepdim=True).clamp_min(1e-300)
    origin: dict[str, Any] = dict(basis.provenance)
    model = origin.pop("model", None)
    return Row(
        task="spectrum",
        protocol=PROTOCOL,
        model=model if isinstance(model, dict) else {"id": "unnamed"},
        contender=name or f"{basis.kind}, {basis.side}-RoPE",
        policy=json.loads(preset("dense").to_json()),
        basis={**origin, "kind": basis.kind, "side": basis.side},
        settings={"side": basis.side, "kind": basis.kind, "tokens": origin.get("tokens")},
        metrics={
            "head_dim": basis.head_dim,
            "index": list(basis.layer_indices),
            "rank_at_90": ranks.tolist(),
            "rank_at_90_mean": float(ranks.double().mean()),
            "cumulative": held.mean(1).tolist(),
        },
        n=ranks.numel(),
    )
