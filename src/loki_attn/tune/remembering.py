"""A language model that remembers prefixes: a search measures the same windows many times."""

from collections import OrderedDict
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from loki_attn.evaluate.protocol import LanguageModel


def remembering(lm: LanguageModel, prefixes: int) -> LanguageModel:
    """Return the model with a memory for the caches that `prefill` makes.

    Args:
        lm: The model. Nothing may observe it while prefixes are read: a remembered one is not read
            again.
        prefixes: How many caches to keep; the one that was not used for longest goes first. They
            must be forked before they are extended, as evaluation does.
    """
    return cast("LanguageModel", _Remembering(lm, prefixes))


class _Remembering:
    """Everything but `prefill` and `identity` is the model's own."""

    def __init__(self, lm: LanguageModel, prefixes: int) -> None:
        self._lm = lm
        self._most = prefixes
        self._caches: OrderedDict[tuple[int | bool, ...], Any] = OrderedDict()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    @cached_property
    def identity(self) -> Any:
        """The model's, worked out once: it hashes weights."""
        return self._lm.identity

    def prefill(self, ids: Tensor, *, record: bool = False) -> Any:
        """Read tokens int64 [1, n] into a cache, or return the one of the same tokens."""
        key = record, *ids[0].tolist()
        if key not in self._caches:
            self._caches[key] = self._lm.prefill(ids, record=record)
        self._caches.move_to_end(key)
        while len(self._caches) > self._most:
            self._caches.popitem(last=False)
        return self._caches[key]
