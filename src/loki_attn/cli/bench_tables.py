"""The tables of `loki-attn bench`."""

from typing import TYPE_CHECKING

from loki_attn.cli import terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loki_attn.bench.rows import SpeechRow, StepRow


def show_steps(rows: "Sequence[StepRow]") -> None:
    """One table per context."""
    for context in dict.fromkeys(row.context for row in rows):
        own = [row for row in rows if row.context == context]
        first = own[0]
        cells = [
            [
                row.contender,
                f"{row.median_us:,.0f}",
                f"{row.p20_us:,.0f}-{row.p80_us:,.0f}",
                f"{row.bytes_touched / 1e6:,.2f}",
                f"{row.gb_per_s:.1f}",
                f"{row.share_of_bandwidth:.0%}",
                _times(row.ratios.get("sdpa-hf")),
                _times(row.ratio_best_torch),
                _times(row.ratio_dense_native),
            ]
            for row in own
        ]
        heads = f"{first.num_heads}/{first.num_kv_heads} heads of {first.head_dim}"
        terminal.table(
            f"{first.shape} ({heads}), batch {first.batch}, {context:,} tokens, {first.dtype}",
            [
                "contender", "us", "p20-p80", "MB", "GB/s", "of read", "x HF", "x best torch",
                "x dense native",
            ],
            cells,
            note=(
                f"{_counted(first.threads, 'thread')}, backend {first.backend}, "
                f"{_counted(first.layers, 'layer')} in turn; "
                f"reading memory: {first.read_gb_per_s:.1f} GB/s ({first.read_by}); "
                "x: times as fast"
            ),
        )  # fmt: skip


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
