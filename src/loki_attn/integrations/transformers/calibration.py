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
from loki_attn.integrations.transformers.rotary import Layout, find_layouts, undo_rotary
from loki_attn.kernels import ops
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
    check_context(model, window)
    run: dict[str, JSON] = {
        "model": identity(model),
        "corpus": dict(corpus or {}),
        "window": window,
        "tokens": count * window,
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
    }
    collector = _Collector(*_resume(partial, run))
    with attach(model, "dense", verify_first=False) as attachment, quiet(model):
        collector.layouts = find_layouts(model, attachment)
        attachment.observe(collector)
        try:
            for index in range(collector.done[1], count):
                piece = ids[index * window : (index + 1) * window]
                collector.begin()
                model.base_model(input_ids=piece[None].to(model.device), use_cache=False)
                collector.commit()
                if progress is not None:
                    progress((index + 1) * window, count * window)
                if partial is not None and (index + 1) % _SAVE_EVERY_WINDOWS == 0:
                    collector.save(partial, run)
        except BaseException:
            if partial is not None:
                collector.save(partial, run)
            raise
    return collector.done[0], run


class _Collector:
    """Adds the moments of a window only when the whole window went through."""

    def __init__(self, stats: KeyStats, windows: int) -> None:
        # One field for both, so that an interrupt cannot come between them.
        self.done = stats, windows
        self.layouts: dict[int, Layout] = {}
        self._window = KeyStats()

    def begin(self) -> None:
        self._window = KeyStats()

    def commit(self) -> None:
        stats, windows = self.done
        self.done = stats.merge(self._window), windows + 1

    def save(self, path: Path, run: Mapping[str, JSON]) -> None:
        stats, windows = self.done
        if windows:
            stats.save(path, {**run, "windows_done": windows})

    def __call__(self, seen: Observation) -> None:
        layout, pre = self.layouts.get(seen.layer_index), None
        if layout is not None and seen.rotary is not None:
            pre = undo_rotary(seen.key, *seen.rotary, layout)
        weight = sharpness(seen)
        self._window.update(
            seen.layer_index, seen.key, seen.query, pre_key=pre, query_weight=weight
        )


def sharpness(seen: Observation) -> Tensor:
    """How much one far token matters to a query: its largest weight outside sinks and recents.

    Computed for every 8th query of the window, 0 for the others; a sample is enough for moments.

    Returns:
        float32 (float64 stays) [batch, heads, q_len].
    """
    q_len, seq = seen.query.shape[2], seen.key.shape[2]
    rows = torch.arange(q_len, device=seen.query.device)[_SHARP_STRIDE - 1 :: _SHARP_STRIDE]
    columns = torch.arange(seq, device=rows.device)
    ages = rows[:, None] + (seq - q_len) - columns[None]
    logits = ops().score(seen.query[:, :, rows], seen.key, None, seen.call)
    weights = ops().estimated_weights(logits, ages >= 0, seen.call)
    far = (ages >= _SHARP_RECENTS) & (columns >= _SHARP_SINKS)
    result = weights.new_zeros(seen.query.shape[:3])
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


def check_context(model: PreTrainedModel, window: int) -> None:
    """Refuse windows, in tokens, whose last positions the model has never been trained on.

    Raises:
        InputError: If the window exceeds the model's context.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise InputError(
            f"Windows of {window} tokens exceed the model's context of {limit}; use a window of at "
            f"most {limit}."
        )
