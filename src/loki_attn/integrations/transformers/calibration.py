"""Calibration: run a model over text and stream the moments of its keys and queries."""

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from loki_attn.artefact import JSON
from loki_attn.basis import Basis, BasisKind
from loki_attn.errors import InputError
from loki_attn.fitting import DEFAULT_KIND, fit
from loki_attn.integrations.transformers.attachment import attach
from loki_attn.integrations.transformers.function import Observation
from loki_attn.integrations.transformers.identity import identity
from loki_attn.integrations.transformers.probe import quiet
from loki_attn.integrations.transformers.rotary import undo_rotary
from loki_attn.key_stats import KeyStats
from loki_attn.texts import digest

Progress = Callable[[int, int], None]
"""Called with the tokens done and the tokens to do."""

_SAVE_EVERY_WINDOWS: Final = 4
_SHARP_STRIDE: Final = 8
_SHARP_SINKS: Final = 4
_SHARP_RECENTS: Final = 64


def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    *,
    kind: BasisKind = DEFAULT_KIND,
    tokens: int = 24_576,
    window: int = 2048,
    corpus: str = "unnamed",
    progress: Progress | None = None,
    **fit_options: Any,
) -> Basis:
    """Fit a basis for a model on a text.

    Args:
        model: A causal LM of transformers that `attach` can serve.
        tokenizer: Its tokenizer.
        text: Text of the kind that the model will read; about 100,000 characters are enough.
        kind: The basis, see `loki_attn.fit`.
        tokens: How many tokens of it to use.
        window: Tokens per forward.
        corpus: Name of the text, for the record.
        progress: Called after every window.
        fit_options: Passed on to `loki_attn.fit`.

    Raises:
        InputError: If the text is empty or shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]
    about: dict[str, JSON] = {"name": corpus, "sha256": digest(text)}
    stats, provenance = collect_stats(
        model, ids, tokens=tokens, window=window, corpus=about, progress=progress
    )
    return fit(stats, kind, provenance=provenance, **fit_options)


def collect_stats(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    tokens: int = 24_576,
    window: int = 2048,
    corpus: Mapping[str, JSON] | None = None,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> tuple[KeyStats, dict[str, JSON]]:
    """Stream the moments of keys and queries over windows of a tokenised text.

    Args:
        model: A causal LM of transformers that `attach` can serve.
        ids: int64 [n], the tokens.
        tokens: How many to use, rounded down to whole windows.
        window: Tokens per forward.
        corpus: What the text is, for the record: name, sha256.
        partial: Where to keep what is done: written every few windows and on Ctrl-C, continued
            from when it exists and belongs to the same run, left for the caller to delete.
        progress: Called after every window.

    Returns:
        The moments and their provenance.

    Raises:
        InputError: If there is less than one window of tokens, a window exceeds the model's
            context, or `partial` is of another run.
    """
    count = min(int(ids.numel()), tokens) // window
    if count == 0:
        raise InputError(
            f"Calibration needs at least one window of {window} tokens, the text has "
            f"{int(ids.numel())} (asked for {tokens}); give more text or a smaller window."
        )
    _check_context(model, window)
    run: dict[str, JSON] = {
        "model": identity(model),
        "corpus": dict(corpus or {}),
        "window": window,
        "tokens": count * window,
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
    }
    stats, done = _resume(partial, run)
    collector = _Collector(stats)
    with attach(model, "dense", verify_first=False) as attachment, quiet(model):
        attachment.observe(collector)
        try:
            for index in range(done, count):
                piece = ids[index * window : (index + 1) * window]
                collector.begin()
                model.base_model(input_ids=piece[None].to(model.device), use_cache=False)
                collector.commit()
                done = index + 1
                if progress is not None:
                    progress(done * window, count * window)
                if partial is not None and done % _SAVE_EVERY_WINDOWS == 0:
                    collector.stats.save(partial, {**run, "windows_done": done})
        except BaseException:
            if partial is not None and done:
                collector.stats.save(partial, {**run, "windows_done": done})
            raise
    return collector.stats, run


class _Collector:
    """Adds the moments of a window only when the whole window went through."""

    def __init__(self, stats: KeyStats) -> None:
        self.stats = stats
        self._window = KeyStats()

    def begin(self) -> None:
        self._window = KeyStats()

    def commit(self) -> None:
        self.stats = self.stats.merge(self._window)

    def __call__(self, seen: Observation) -> None:
        pre = None if seen.rotary is None else undo_rotary(seen.key, *seen.rotary)
        weight = sharpness(seen)
        self._window.update(
            seen.layer_index, seen.key, seen.query, pre_key=pre, query_weight=weight
        )


def sharpness(seen: Observation) -> Tensor:
    """How much one far token matters to a query: its largest weight outside sinks and recents.

    Computed for every 8th query of the window, 0 for the others; a sample is enough for moments.

    Returns:
        float32 [batch, heads, q_len].
    """
    batch, heads, q_len, dim = seen.query.shape
    kv_heads = seen.key.shape[1]
    rows = torch.arange(_SHARP_STRIDE - 1, q_len, _SHARP_STRIDE, device=seen.query.device)
    query = seen.query[:, :, rows].float().reshape(batch, kv_heads, -1, dim)
    logits = query @ seen.key.float().transpose(2, 3) * seen.call.scaling
    logits = logits.view(batch, heads, rows.numel(), -1)
    columns = torch.arange(logits.shape[-1], device=rows.device)
    ages = rows[:, None] + (logits.shape[-1] - q_len) - columns[None]
    weights = logits.masked_fill(ages < 0, float("-inf")).softmax(-1)
    far = (ages >= _SHARP_RECENTS) & (columns >= _SHARP_SINKS)
    result = weights.new_zeros(batch, heads, q_len)
    result[:, :, rows] = weights.masked_fill(~far, 0.0).amax(-1)
    return result


def _resume(partial: Path | None, run: Mapping[str, JSON]) -> tuple[KeyStats, int]:
    if partial is None or not partial.exists():
        return KeyStats(), 0
    stats, record = KeyStats.load(partial)
    done = record.pop("windows_done", None)
    if not isinstance(done, int) or record != dict(run):
        raise InputError(
            f"'{partial}' holds the beginning of another calibration (other model, text, tokens, "
            "window or versions); delete it to start anew (`loki-attn calibrate --no-resume`)."
        )
    return stats, done


def _check_context(model: PreTrainedModel, window: int) -> None:
    """Refuse windows whose last positions the model has never been trained on."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise InputError(
            f"Windows of {window} tokens exceed the model's context of {limit}; use a window of at "
            f"most {limit}."
        )
