"""Windows: stretches of a text, one after the other, as items."""

from collections.abc import Sequence
from typing import Any

from loki_attn.errors import InputError
from loki_attn.evaluate.task import Item


def require_text(ids: Sequence[int], count: int, size: int, noun: str) -> None:
    """Refuse a text that does not fill its windows.

    Args:
        ids: Tokens of the text.
        count: Windows.
        size: Tokens of each.
        noun: What a window is called, "window" say.

    Raises:
        InputError: If the text is too short.
    """
    need = count * size
    if len(ids) < need:
        raise InputError(
            f"{count} {noun}s of {size} tokens need {need} tokens, the text has {len(ids)}; give "
            f"more text, fewer or shorter {noun}s."
        )


def cut(
    ids: Sequence[int], count: int, size: int, noun: str, content: dict[str, Any]
) -> list[Item]:
    """Cut windows from the start of a text.

    Args:
        ids: Tokens of the text.
        count: Windows.
        size: Tokens of each.
        noun: What a window is called, "window" say.
        content: What else defines an item.
    """
    return [
        Item(
            name=f"{noun} {index + 1}/{count}",
            content={**content, "ids": ids[index * size : (index + 1) * size]},
        )
        for index in range(count)
    ]
