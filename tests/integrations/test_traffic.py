"""Traffic: the bytes, against sums done by hand."""

import pytest
import torch
from sparse_policies import METHODS, sparse
from tiny_models import build, greedy, prompts, random_basis

import loki_attn
from loki_attn import Budget, LayerCache, Policy, Selection
from loki_attn.attention import LayerPolicy
from loki_attn.integrations.transformers import Traffic
from loki_attn.integrations.transformers import traffic as traffic_module
from loki_attn.integrations.transformers.traffic import Meter
from loki_attn.select.loki import Loki
from loki_attn.serving import Served
from loki_attn.shards import Shard
from loki_attn.types import LayerShape

# 2 layers of 2 KV heads, head_dim 16, float32: a key row and a value row take 64 bytes each.
LAYERS, HEADS, ROW_BYTES = 2, 2, 128
POSITION_BYTES = 4
# Four single-token steps follow a prompt of 12; the last generated token is not read.
HELD = LAYERS * HEADS * (13 + 14 + 15 + 16)
CALLS = LAYERS * 4


@pytest.mark.parametrize(
    ("method", "score_bytes"),
    [
        ("exact_topk", 64),
        ("loki_planes", 8 + 2),  # int8 codes of rank 6 in two lines of 4, and a float16 scale
        ("loki_rotated", 6 * 4),
    ],
)
def test_bytes_of_a_run(method, score_bytes):
    model = build("Llama")
    with sparse(model, method) as attachment:
        greedy(model, prompts(), 5)
        traffic = attachment.traffic
        assert traffic.sparse_calls == CALLS
        assert traffic.dense_calls == traffic.every_query_calls == 0
        assert traffic.rows_held == HELD
        assert traffic.rows_read == CALLS * HEADS * 6
        assert traffic.dense_bytes == HELD * ROW_BYTES
        assert traffic.read_bytes == CALLS * HEADS * 6 * ROW_BYTES + HELD * score_bytes
        traffic.reset()
        assert traffic == Traffic()


def test_bytes_of_a_dense_run():
    model = build("Llama")
    with loki_attn.attach(model, "dense") as attachment:
        greedy(model, prompts(), 5)
        assert attachment.traffic == Traffic(
            dense_calls=CALLS,
            read_bytes=HELD * ROW_BYTES,
            dense_bytes=HELD * ROW_BYTES,
            rows_read=HELD,
            rows_held=HELD,
            kept_bytes=HELD * (ROW_BYTES + POSITION_BYTES),
        )


@pytest.mark.parametrize(("plane_dtype", "score_bytes"), [("bf16", 12), ("fp32", 24)])
def test_bytes_of_other_planes(plane_dtype, score_bytes):
    model = build("Llama")
    policy = Policy(select=Loki(rank=6, plane_dtype=plane_dtype), budget=Budget(top_k=3))
    with loki_attn.attach(model, policy, basis=random_basis(model)) as attachment:
        greedy(model, prompts(), 5)
        read = CALLS * HEADS * 3 * ROW_BYTES + HELD * score_bytes
        assert attachment.traffic.read_bytes == read


def test_windows_are_not_counted():
    model = build("Gemma3 (windows)")
    with sparse(model, "exact_topk") as attachment:
        greedy(model, prompts(), 5)
        assert attachment.traffic.sparse_calls == 4
        assert attachment.traffic.rows_held == HELD // LAYERS


def record(indices, counts, num_heads=4):
    """Traffic of one call that read `indices` of 8 rows of 2 KV heads."""
    traffic = Traffic()
    assert traffic.record(served(indices, counts, num_heads)) is None
    return traffic


def served(indices, counts, num_heads=4):
    """One call that read `indices` of 8 rows of 2 KV heads."""
    cache = LayerCache()
    batch = indices.shape[0]
    cache.append(torch.zeros(batch, 2, 8, 16), torch.zeros(batch, 2, 8, 16))
    shape = LayerShape(index=0, num_heads=num_heads, num_kv_heads=2, head_dim=16, value_dim=16)
    policy = LayerPolicy(
        shape=shape,
        selector=METHODS["exact_topk"].bind(shape, None),
        budget=Budget(),
        group_reduce="none",
    )
    return Served(Shard(cache), policy, "decode", Selection(indices, counts), scored=True)


def test_heads_that_choose_alone_read_the_union_of_their_group():
    indices = torch.tensor([[[0, 1], [1, 2], [5, 6], [5, 6]]])
    assert record(indices, torch.full((1, 4), 2)).rows_read == 3 + 2


def test_rows_that_fill_up_a_batch_are_not_counted():
    indices = torch.tensor([[[0, 1, 2], [4, 6, 7]], [[7, -1, -1], [6, 7, -1]]])
    assert record(indices, torch.tensor([[3, 3], [1, 2]])).rows_read == 3 + 3 + 1 + 2


def test_heads_that_choose_alone_fill_up_too():
    indices = torch.tensor([[[0, -1], [0, -1], [5, 6], [7, -1]]])
    assert record(indices, torch.tensor([[1, 1, 2, 1]])).rows_read == 1 + 3


def test_nobody_waits_for_counts_of_another_device_before_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(traffic_module, "is_far", lambda tensor: True)
    monkeypatch.setattr(traffic_module, "_MOST_UNREAD", 3)
    indices, counts = torch.tensor([[[0, 1, 2], [4, 6, 7]]]), torch.tensor([[3, 3]])
    meter, once = Meter(), record_near(indices, counts)
    for calls in range(1, 6):
        meter.record(served(indices, counts))
        waited = calls >= 3  # the third filled the list
        assert meter.counts.rows_read == (3 * once.rows_read if waited else 0)
        assert meter.counts.sparse_calls == calls
    settled = meter.settled()
    assert settled.rows_read == 5 * once.rows_read
    assert settled.read_bytes == 5 * once.read_bytes


def record_near(indices, counts):
    """The traffic of the call as the processor knows it at once."""
    traffic = Traffic()
    for unread in filter(None, [traffic.record(served(indices, counts))]):
        traffic.add(int(unread.rows), unread.row_bytes)
    return traffic
