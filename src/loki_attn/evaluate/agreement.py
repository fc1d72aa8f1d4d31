"""Agreement: how long a greedy continuation stays word for word what dense attention says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, final

import torch

from loki_attn.errors import InputError
from loki_attn.evaluate.answering import Answer, answer
from loki_attn.evaluate.contending import read
from loki_attn.evaluate.measuring import is_dense
from loki_attn.evaluate.protocol import Contender, LanguageModel
from loki_attn.evaluate.summary import summarise, traffic_of
from loki_attn.evaluate.task import Item, Record
from loki_attn.evaluate.windows import cut, require_text

PROTOCOL: Final = (
    "a prompt is read densely and continued greedily through the decode path, freely, by dense "
    "attention and by every policy; shared_tokens is the length of the longest common prefix of "
    "the two continuations, shared_share its part of dense attention's, identical 1 where they "
    "are the same"
)


@final
@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The task.

    Attributes:
        ids: Tokens of the text; prompts are taken from its start, one after the other.
        prompts: How many.
        prompt_tokens: Tokens of each.
        new_tokens: Tokens that are generated at the most; a text may end before.
        corpus: Name of the text, for the record.
    """

    ids: tuple[int, ...]
    prompts: int = 4
    prompt_tokens: int = 4096
    new_tokens: int = 64
    corpus: str = "unnamed"
    name: str = "agreement"
    protocol: str = PROTOCOL
    row_labels: tuple[str, ...] = ()
    needs_dense: bool = True
    decodes: bool = True

    def __post_init__(self) -> None:
        """Refuse prompts that the text does not fill, and continuations of nothing."""
        if self.prompts < 1 or self.prompt_tokens < 2 or self.new_tokens < 2:
            raise InputError(
                "Agreement needs a prompt of at least 2 tokens and 2 new tokens, got "
                f"{self.prompts} prompts of {self.prompt_tokens} tokens, {self.new_tokens} new."
            )
        require_text(self.ids, self.prompts, self.prompt_tokens, "prompt")

    @property
    def settings(self) -> dict[str, Any]:
        """What defines the run."""
        return {
            "corpus": self.corpus,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
        }

    def items(self, lm: LanguageModel) -> list[Item]:
        """The prompts."""
        whole = self.prompt_tokens + self.new_tokens
        if whole > lm.context_tokens:
            raise InputError(
                f"Prompt and continuation take {whole} tokens, the model's context is "
                f"{lm.context_tokens}."
            )
        content = {"new_tokens": self.new_tokens}
        return cut(self.ids, self.prompts, self.prompt_tokens, "prompt", content)

    def measure(
        self,
        lm: LanguageModel,
        item: Item,
        contenders: Sequence[Contender],
        dense: Record | None,
    ) -> Iterator[tuple[Contender, Record]]:
        """Continue one prompt, dense attention first."""
        prompt = torch.tensor([item.content["ids"]])
        prefix = read(lm, prompt[:, :-1], contenders)
        for contender in contenders:
            said = answer(
                lm,
                prefix,
                prompt[:, -1:],
                contender,
                max_new_tokens=item.content["new_tokens"],
            )
            if dense is None and not is_dense(contender):
                raise InputError("Agreement compares with dense attention; measure that first.")
            record = _record(said, said.tokens if dense is None else dense.notes["tokens"])
            dense = dense or record
            yield contender, record

    def metrics(
        self, items: Sequence[Item], records: Sequence[Record], dense: Sequence[Record] | None
    ) -> dict[str, Any]:
        """Means with intervals over prompts."""
        del items, dense
        return {**summarise(records, None, what="prompts"), **traffic_of(records)}


def _record(said: Answer, reference: Sequence[int]) -> Record:
    pairs = zip(said.tokens, reference, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return Record(
        values={
            "shared_tokens": [shared],
            "shared_share": [shared / len(reference) if reference else 1.0],
            "identical": [float(said.tokens == tuple(reference))],
        },
        **said.spent,
        notes={"tokens": list(said.tokens)},
    )
