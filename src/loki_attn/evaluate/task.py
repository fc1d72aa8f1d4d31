"""Tasks: what is measured, cut into items that every contender is given alike."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from loki_attn.evaluate.protocol import Contender, LanguageModel


@final
@dataclass(frozen=True, kw_only=True)
class Item:
    """One unit of work, the same for all contenders.

    Attributes:
        name: What news and errors call it.
        content: Everything that defines it, plain JSON.
        labels: What it belongs to, plain JSON: sub-task, length, depth.
    """

    name: str
    content: Any
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The sha256 of the content."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()


@final
@dataclass(frozen=True, kw_only=True)
class Record:
    """What one contender made of one item.

    Attributes:
        values: Observations by metric, equally many of each.
        decode_calls: Single-token layer calls that selected.
        every_query_calls: Multi-token layer calls in which every query selected.
        read_bytes: Cache bytes that single-token calls read.
        dense_bytes: What dense attention over all tokens would have read in the same calls.
        kept_bytes: What the rows held then, planes and marks included.
        evicted_rows: Rows that were dropped, summed over layers and KV heads.
        notes: What else is worth keeping, plain JSON: the answer's text.
    """

    values: Mapping[str, Sequence[float]]
    decode_calls: int = 0
    every_query_calls: int = 0
    read_bytes: int = 0
    dense_bytes: int = 0
    kept_bytes: int = 0
    evicted_rows: int = 0
    notes: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """What is measured."""

    @property
    def name(self) -> str:
        """Name in rows."""

    @property
    def protocol(self) -> str:
        """How, in words that leave no doubt."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Numbers and names that define the run, plain JSON."""

    @property
    def row_labels(self) -> tuple[str, ...]:
        """Labels of items that make a row of their own."""

    @property
    def needs_dense(self) -> bool:
        """Whether dense attention is measured as one of the contenders, to compare with."""

    @property
    def decodes(self) -> bool:
        """Whether a policy must have selected in single-token steps, not only in longer ones."""

    def items(self, lm: LanguageModel) -> Sequence[Item]:
        """The items, in order; the same at every call."""

    def measure(
        self,
        lm: LanguageModel,
        item: Item,
        contenders: Sequence[Contender],
        dense: Record | None,
    ) -> Iterator[tuple[Contender, Record]]:
        """Measure contenders on one item.

        Args:
            lm: The model.
            item: The item.
            contenders: What is not known yet; dense attention, if among them, is the first.
            dense: The record of dense attention where it is known already.
        """

    def metrics(
        self, items: Sequence[Item], records: Sequence[Record], dense: Sequence[Record] | None
    ) -> dict[str, Any]:
        """What a contender's records of one row come to."""
