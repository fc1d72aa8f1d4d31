"""Profiling: run a model over text and let a method learn from its queries and keys."""

from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attn.artefact import JSON
from loki_attn.calibrating import calibrator
from loki_attn.errors import InputError
from loki_attn.integrations.transformers.attachment import attach
from loki_attn.integrations.transformers.calibration import Progress, check_context
from loki_attn.integrations.transformers.function import Observation
from loki_attn.integrations.transformers.identity import identity
from loki_attn.integrations.transformers.probe import quiet
from loki_attn.profile import Profile


def collect_profile(
    model: PreTrainedModel,
    method: str,
    tokens: Tensor,
    *,
    window_tokens: int = 2048,
    corpus: Mapping[str, JSON] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Profile:
    """Let one method learn from a tokenised text.

    Args:
        model: A causal LM of transformers that `attach` can serve.
        method: One of `loki_attn.calibrating.calibrated_methods()`.
        tokens: int64 [n], rounded down to whole windows.
        window_tokens: Tokens per forward.
        corpus: What the text is, for the record: name, sha256.
        progress: Called with the tokens done and the tokens to do, after every window. A method
            that trains does so after the last one.
        settings: Of the method's calibrator.

    Returns:
        The profile, with its provenance.

    Raises:
        UnknownNameError: If the method learns nothing, or has no such setting.
        InputError: If there is less than one window of tokens, a window exceeds the model's
            context, or a setting cannot be used.
    """
    learner = calibrator(method, **settings)
    count = int(tokens.numel()) // window_tokens
    if count == 0:
        raise InputError(
            f"A profile needs at least one window of {window_tokens} tokens, the text has "
            f"{int(tokens.numel())}; give more text or a smaller window."
        )
    check_context(model, window_tokens)

    def learn(seen: Observation) -> None:
        learner.observe(seen.layer_index, seen.query, seen.key)

    with attach(model, "dense", verify_first=False) as attachment, quiet(model), torch.no_grad():
        attachment.observe(learn)
        for index in range(count):
            piece = tokens[index * window_tokens : (index + 1) * window_tokens]
            model.base_model(input_ids=piece[None].to(model.device), use_cache=False)
            if progress is not None:
                progress((index + 1) * window_tokens, count * window_tokens)
    about: dict[str, JSON] = {
        "settings": dict(learner.settings),
        "corpus": dict(corpus or {}),
        "window": window_tokens,
        "tokens": count * window_tokens,
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
    }
    return Profile(
        layers=learner.finish(),
        provenance={"model": identity(model), "methods": {method: about}},
    )
