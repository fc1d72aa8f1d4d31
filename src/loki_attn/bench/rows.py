"""Rows of the bench: plain numbers with their units in their names, and where they come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from loki_attn.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """What rows of both benches say.

    Attributes:
        task: "bench decode" or "bench generate".
        contender: Who was measured; unique within context and run.
        shape: Name of the layer's sizes, or of the model.
        batch: Batch rows.
        context: Rows of the cache, in tokens.
        dtype: Dtype of keys and values: "bf16", "fp16" or "fp32".
        backend: Which backend served our own contenders.
        threads: Threads of torch.
        median_us: Microseconds per step: of a layer in "bench decode", of a model in "bench
            generate".
        p20_us: A fifth of the samples lies below it.
        p80_us: A fifth of the samples lies above it.
        samples: How many there are.
        gate: Verdict and largest error of the check that came before.
        provenance: Time, commit, versions, machine, command.
    """

    task: str
    contender: str
    shape: str
    batch: int
    context: int
    dtype: str
    backend: str
    threads: int
    median_us: float
    p20_us: float
    p80_us: float
    samples: int
    gate: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=provenance)


@final
@dataclass(frozen=True, kw_only=True)
class StepRow(BenchRow):
    """One contender of "bench decode". What does not apply is None.

    Attributes:
        kind: "torch", "library", "dense", "exact" or "loki".
        part: "score", "choose" or "attend" where a part of a step was timed; else None.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Size of a key row and of a value row.
        k: Rows read of each KV head.
        rank: Coordinates of the lead plane.
        plane: Number format of the lead plane.
        bytes_touched: By formula: what a step reads of caches and maps.
        gb_per_s: Those bytes by the median time, in 1e9 bytes per second.
        read_gb_per_s: What reading memory gave between the turns of the same run.
        read_by: What read it; on a device a copy, bytes read and written.
        share_of_bandwidth: gb_per_s / read_gb_per_s.
        layers: Independent layer caches that took turns.
        bytes_between_visits: What is touched at the least until a layer is visited again.
        last_level_cache_bytes: Of the processor, or of the device.
        device: Where it ran: "cpu" or "cuda".
        timed_by: "steps", each on its own; on a device "graph replay", or "events" around steps
            that no graph can hold.
        ratios: Median of each peer by this median: above 1, this one is faster.
        ratio_best_torch: The same for the fastest dense form of torch; Loki's rows only.
        ratio_best_dense: For the fastest of all dense contenders; Loki's rows only.
        best_dense: Which one that is.
        ratio_hf: For the form that transformers calls; Loki's rows only.
        ratio_dense_native: For our own dense attention; Loki's rows only.
        share_of_byte_limit: Time to read the bytes at full bandwidth by the median; Loki's only.
        eager_us: On a device, microseconds of a step that is started on its own.
    """

    kind: str
    part: str | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    k: int | None
    rank: int | None
    plane: str | None
    bytes_touched: int
    gb_per_s: float
    read_gb_per_s: float
    read_by: str
    share_of_bandwidth: float
    layers: int
    bytes_between_visits: int
    last_level_cache_bytes: int
    device: str
    timed_by: str
    ratios: Mapping[str, float] = field(default_factory=dict)
    ratio_best_torch: float | None = None
    ratio_best_dense: float | None = None
    best_dense: str | None = None
    ratio_hf: float | None = None
    ratio_dense_native: float | None = None
    share_of_byte_limit: float | None = None
    eager_us: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class SpeechRow(BenchRow):
    """One contender of "bench generate". What is not known or does not apply is None.

    Attributes:
        policy: How it attends: "stock", or the attached policy.
        prefill_s: From the call to the first token, with an empty cache.
        prefill_ratio: Stock prefill by this one; above 1, this one is faster.
        tokens_per_s: 1e6 / median_us.
        ratio_stock_dynamic: This rate by that of stock generate with its default cache.
        ratio_stock_static: The same with a preallocated static cache.
        cache_bytes: What the cache holds at the end, unused room included.
        peak_cache_bytes: The most that the cache held, weighed after every layer's attention.
        evicted_rows: Rows that were dropped, summed over layers and KV heads.
        peak_bytes: Resident memory at its highest, from prefill to the end of the first decoding.
        peak_added_bytes: The same without what was resident before.
        sparse_calls: Single-token layer calls that selected, in the turns that count.
        note: "dense" where the budget reads such a context whole; how many rows were evicted.
    """

    policy: str
    prefill_s: float
    prefill_ratio: float | None
    tokens_per_s: float
    ratio_stock_dynamic: float | None
    ratio_stock_static: float | None
    cache_bytes: int
    peak_bytes: int | None
    peak_added_bytes: int | None
    sparse_calls: int
    note: str
    peak_cache_bytes: int | None = None
    evicted_rows: int = 0
