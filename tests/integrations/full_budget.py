"""The law of full budget, measured: a model that reads everything gives the stock answers."""

import warnings
from dataclasses import dataclass

import torch
from tiny_models import SERVED, WINDOW, build, greedy, left_padded, random_basis

import loki_attn
from loki_attn import Budget, Policy
from loki_attn.select.exact_topk import ExactTopK
from loki_attn.select.loki import Loki

EVERYTHING = Budget(fraction=1.0)
NEW_TOKENS = WINDOW + 4
PATHS = {
    "dense path": Policy(select=ExactTopK()),
    "exact top-k, selecting": Policy(select=ExactTopK(), budget=EVERYTHING),
    "loki planes, selecting": Policy(select=Loki(rank=4), budget=EVERYTHING),
    "loki rotated, selecting": Policy(select=Loki(rank=4, layout="rotated"), budget=EVERYTHING),
}


@dataclass(frozen=True)
class Comparison:
    """One architecture at full budget against stock.

    Attributes:
        layers: Layers of the model.
        full_layers: How many of them can become sparse.
        logit_std: Spread of the stock logits.
        differences: Largest absolute difference of a logit, by path.
        same_tokens: Whether greedy decoding gave the stock tokens, by path.
        selected: Single-token layer calls that went through the selection, by path.
        dense: Single-token layer calls that did not, by path.
    """

    layers: int
    full_layers: int
    logit_std: float
    differences: dict[str, float]
    same_tokens: dict[str, bool]
    selected: dict[str, int]
    dense: dict[str, int]


def compare(name: str) -> Comparison:
    """Generate past the window from a left-padded batch, stock and attached."""
    model = build(name)
    batch = left_padded()
    tokens, logits = greedy(model, batch["ids"], NEW_TOKENS, attention_mask=batch["attention_mask"])
    differences, same, selected, dense = {}, {}, {}, {}
    with warnings.catch_warnings():
        # Models without a full layer warn; the caller tests that by itself.
        warnings.filterwarnings("ignore", "Every layer of")
        basis = random_basis(model)
        for path, policy in PATHS.items():
            with loki_attn.attach(model, policy, basis=basis) as attachment:
                attachment.always_select = path != "dense path"
                ours, our_logits = greedy(
                    model, batch["ids"], NEW_TOKENS, attention_mask=batch["attention_mask"]
                )
                full_layers = len(attachment.shapes)
                selected[path] = attachment.traffic.sparse_calls
                dense[path] = attachment.traffic.dense_calls
            differences[path] = float((our_logits - logits).abs().max())
            same[path] = torch.equal(ours, tokens)
    return Comparison(
        layers=model.config.num_hidden_layers,
        full_layers=full_layers,
        logit_std=float(logits.std()),
        differences=differences,
        same_tokens=same,
        selected=selected,
        dense=dense,
    )


def names() -> list[str]:
    """Architectures that this version of transformers can be tested with."""
    return [name for name, architecture in SERVED.items() if not architecture.missing]
