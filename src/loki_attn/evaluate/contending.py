"""Contending: a context read once, densely, and every contender's own copy of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.types import Mode


def read(lm: LanguageModel, ids: Tensor, contenders: Sequence[Contender]) -> Any:
    """Read tokens int64 [1, n] densely, so that all of these contenders can go on from there."""
    return lm.prefill(ids, record=any(contender.policy.evicts for contender in contenders))


@contextmanager
def contending(
    lm: LanguageModel, cache: Any, contender: Contender, mode: Mode = "decode"
) -> Iterator[Any]:
    """Attend as a contender does inside the block, on a copy of a cache, which is handed out.

    What the contender evicts at the end of a prompt is gone from the copy.
    """
    own = lm.fork(cache)
    with lm.using(contender.policy, contender.basis, mode, contender.profile):
        if contender.policy.evicts:
            lm.compress(own)
        yield own


def spent(lm: LanguageModel) -> dict[str, int]:
    """What attention did since `using` began, as fields of a `Record`."""
    traffic = lm.traffic
    return {
        "decode_calls": traffic.sparse_calls,
        "every_query_calls": traffic.every_query_calls,
        "read_bytes": traffic.read_bytes,
        "dense_bytes": traffic.dense_bytes,
        "kept_bytes": traffic.kept_bytes,
        "evicted_rows": traffic.evicted_rows,
    }
