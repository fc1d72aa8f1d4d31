"""The second pass: the model repeats its prompt, and what it reads in doing so judges the rows."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from loki_attn.errors import CacheError, InputError
from loki_attn.evict.kvzip import KVzip, forget, judge
from loki_attn.eviction import LayerEviction
from loki_attn.integrations.transformers.function import (
    LayerState,
    Observation,
    Observer,
    Shared,
)
from loki_attn.integrations.transformers.layers import LokiLayer, plain_tensors

INSTRUCTION: Final = "\n\nRepeat the text above, word for word:\n\n"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What a cache was filled with, for methods that let the model read it again.

    Attributes:
        ids: int64 [batch, tokens], all that the cache holds, without padding.
        tokenizer: The model's tokenizer, which turns `INSTRUCTION` into tokens.
        instruction_ids: Tokens that ask to repeat the prompt, in place of a tokenizer.
    """

    ids: Tensor
    tokenizer: Any = None
    instruction_ids: Sequence[int] | None = None

    @property
    def instruction(self) -> list[int]:
        """The tokens that ask to repeat the prompt.

        Raises:
            InputError: If there are none, or nothing to make them with.
        """
        found = self.instruction_ids
        if found is None and self.tokenizer is not None:
            found = self.tokenizer(INSTRUCTION, add_special_tokens=False).input_ids
        if not found:
            raise InputError(
                "To repeat a prompt the model must be asked to; give the prompt's tokenizer, or "
                "instruction_ids with at least one token."
            )
        return list(found)


def reads_twice(eviction: LayerEviction) -> bool:
    """Whether rows are judged by a second pass, and so go in `compress` and at no other time."""
    return isinstance(eviction.evict, KVzip)


def second_pass(
    model: PreTrainedModel,
    shared: Shared,
    states: Iterable[LayerState],
    cache: Cache,
    prompt: Prompt | None,
) -> None:
    """Make a model repeat the prompt in a cache, and judge its rows by that.

    Chunk by chunk the model reads an instruction, the last tokens of the chunk before, and the
    chunk, each time on top of the whole prompt (arXiv 2505.23416). Afterwards the cache is as it
    was, but that its rows are judged. Nothing may be evicted meanwhile.

    Args:
        model: The attached model.
        shared: What the layers of its attachment share.
        states: Its layers.
        cache: A densely read prompt, stored as the policy of each layer wants it.
        prompt: What it was filled with.

    Raises:
        InputError: If the prompt is missing, padded, or not the cache's.
    """
    bound = {s.index: s for s in states if s.policy is not None}
    evictions = [s.policy.eviction for s in bound.values() if s.policy is not None]
    spec = next(e.evict for e in evictions if e is not None and isinstance(e.evict, KVzip))
    layers = [layer for i, layer in enumerate(cache.layers) if i in bound]
    told = _checked(prompt, layers)
    ids, instruction = told.ids, torch.tensor(told.instruction, dtype=told.ids.dtype)
    asking = instruction.to(ids.device).expand(ids.shape[0], -1)
    try:
        for start in range(0, ids.shape[1], spec.chunk):
            chunk = slice(start, min(start + spec.chunk, ids.shape[1]))
            quote = ids[:, max(0, start - spec.quote) : start]
            text = torch.cat([asking, quote, ids[:, chunk]], 1).to(model.device)
            with (
                _put_back(cache, bound, ids.shape[1]),
                _watching(shared, _judge_of(bound, cache, chunk)),
                torch.no_grad(),
            ):
                model.base_model(input_ids=text, past_key_values=cache, use_cache=True)
    except BaseException:
        for state in bound.values():
            if state.policy is not None and state.policy.eviction is not None:
                forget(_whole(cache.layers[state.index]))
        raise


def _checked(prompt: Prompt | None, layers: Sequence[LokiLayer]) -> Prompt:
    """Refuse a prompt that the rows are not those of."""
    if prompt is None:
        raise InputError(
            "This eviction reads the prompt a second time to judge its rows, and was not told it; "
            "give compress(cache, Prompt(ids=..., tokenizer=...))."
        )
    given = tuple(prompt.ids.shape)
    for layer in layers:
        held = layer.rows.batch, layer.rows.seen
        if given != held:
            raise InputError(
                f"The prompt that is to be read again is {list(given)} tokens, but the cache holds "
                f"[batch={held[0]}, tokens={held[1]}]; give the ids that it was filled with."
            )
        if layer.turn.valid is not None and not bool(layer.turn.valid.all()):
            raise InputError(
                "A second pass needs a prompt without padding; read and compress rows of different "
                "lengths one by one."
            )
    return prompt


def _judge_of(bound: Mapping[int, LayerState], cache: Cache, chunk: slice) -> Observer:
    """Judges a chunk of each layer by the queries that repeat it."""

    def observe(seen: Observation) -> None:
        policy = bound[seen.layer_index].policy
        if policy is None or policy.eviction is None:
            return
        query = policy.selector.query_rows(seen.query)
        rows = _whole(cache.layers[seen.layer_index])
        with plain_tensors():
            judge(rows, query, seen.call, chunk, policy.eviction.budget.keep_first)

    return observe


@contextmanager
def _watching(shared: Shared, observer: Observer) -> Iterator[None]:
    """Let an observer see dense forwards inside the block, which nobody else notices."""
    before = shared.mode, shared.observer, shared.recording
    shared.mode, shared.observer, shared.recording = "decode", observer, False
    try:
        yield
    finally:
        shared.mode, shared.observer, shared.recording = before


@contextmanager
def _put_back(cache: Cache, ours: Collection[int], tokens: int) -> Iterator[None]:
    """Undo what the block does to a cache, but for the marks of its rows.

    Layers of other kinds, of a window or a running state, cannot forget: copies stand in for them.
    """
    layers = list(cache.layers)
    before = {i: _remembered(layers[i]) for i in ours}
    cache.layers[:] = [
        layer if i in before else copy.deepcopy(layer) for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        cache.layers[:] = layers
        for i, (turn, memory, chosen) in before.items():
            layer, rows = layers[i], _whole(layers[i])
            with plain_tensors():
                layer.rows.truncate(tokens)
            rows.memory |= memory
            rows.chosen |= chosen
            layer.turn.valid, layer.turn.waiting = turn
            layer.show()


_Remembered = tuple[tuple[Tensor | None, bool], dict[str, Tensor], dict[str, Tensor]]


def _remembered(layer: LokiLayer) -> _Remembered:
    """What a layer knows beside its rows; a truncation forgets it."""
    rows = _whole(layer)
    memory, chosen = (
        {name: held.clone() for name, held in kept.items()} for kept in (rows.memory, rows.chosen)
    )
    return (layer.turn.valid, layer.turn.waiting), memory, chosen


def _whole(layer: LokiLayer) -> Any:
    """The rows of a layer of which nothing was evicted."""
    rows = layer.rows.whole
    if rows is None:
        raise CacheError("A second pass needs a cache of which nothing was evicted.")
    return rows
