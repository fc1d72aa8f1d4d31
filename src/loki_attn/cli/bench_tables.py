"""The tables of `loki-attn bench`."""

from typing import TYPE_CHECKING

from loki_attn.cli import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loki_attn.bench.rows import SpeechRow, StepRow


def show_steps(rows: "Sequence[StepRow]") -> None:
    """One table per batch and context."""
    for batch, context in dict.fromkeys((row.batch, row.context) for row in rows):
        own = [row for row in rows if (row.batch, row.context) == (batch, context)]
        first = own[0]
        on_device = first.device != "cpu"
        heads = f"{first.num_heads}/{first.num_kv_heads} heads of {first.head_dim}"
        terminal.table(
            f"{first.shape} ({heads}), batch {batch}, {context:,} tokens, {first.dtype}",
            [
                "contender", "us", "p20-p80", "MB", "GB/s", "of read", "x HF", "x best torch",
                "x best dense" if on_device else "x dense native",
            ],
            [_step_cells(row) for row in own],
            note=f"{_ran(own)}; x: times as fast",
        )  # fmt: skip


def _step_cells(row: "StepRow") -> list[str]:
    last = row.ratio_dense_native if row.device == "cpu" else row.ratio_best_dense
    digits = 0 if row.device == "cpu" else 1
    # A step that no graph holds is timed as it is started, which a reader must know.
    eager = " *" if row.timed_by == "events" else ""
    return [
        row.contender + eager,
        f"{row.median_us:,.{digits}f}",
        f"{row.p20_us:,.{digits}f}-{row.p80_us:,.{digits}f}",
        f"{row.bytes_touched / 1e6:,.2f}",
        f"{row.gb_per_s:.1f}",
        f"{row.share_of_bandwidth:.0%}",
        _times(row.ratios.get("sdpa-hf")),
        _times(row.ratio_best_torch),
        _times(last),
    ]


def _ran(rows: "Sequence[StepRow]") -> str:
    """Where and how the rows of a table came about."""
    row = rows[0]
    layers = _counted(row.layers, "layer")
    speed = f"{row.read_gb_per_s:.1f} GB/s ({row.read_by})"
    if row.device == "cpu":
        threads = _counted(row.threads, "thread")
        return f"{threads}, backend {row.backend}, {layers} in turn; reading memory: {speed}"
    name = row.provenance.get("gpu", row.device)
    note = f"{name}, backend {row.backend}, {layers} in a graph; memory: {speed}"
    best = next((f"; best dense: {own.best_dense}" for own in rows if own.best_dense), "")
    return f"{note}{best}; *: no graph holds it, timed by events"


def show_speech(rows: "Sequence[SpeechRow]") -> None:
    """One table per context."""
    for context in dict.fromkeys(row.context for row in rows):
        own = [row for row in rows if row.context == context]
        first = own[0]
        cells = [
            [
                row.contender,
                f"{row.prefill_s:.2f}",
                f"{row.tokens_per_s:.1f}",
                f"{row.p20_us / 1e3:.1f}-{row.p80_us / 1e3:.1f}",
                _times(row.ratio_stock_dynamic),
                _times(row.ratio_stock_static),
                f"{row.cache_bytes / 1e6:,.1f}",
                "-" if row.peak_cache_bytes is None else f"{row.peak_cache_bytes / 1e6:,.1f}",
                "unknown" if row.peak_added_bytes is None else f"{row.peak_added_bytes / 1e6:,.0f}",
                row.note or f"{row.sparse_calls:,}",
            ]
            for row in own
        ]
        terminal.table(
            f"{first.shape}, {context:,} tokens, {first.dtype}",
            [
                "contender", "prefill s", "tokens/s", "ms p20-p80", "x dynamic", "x static",
                "cache MB", "its peak", "peak + MB", "sparse calls",
            ],
            cells,
            note=(
                f"{_counted(first.threads, 'thread')}, backend {first.backend}; x: times as fast "
                "as stock generate with that cache; peak: resident memory that prefill and "
                "decoding added"
            ),
        )  # fmt: skip


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
