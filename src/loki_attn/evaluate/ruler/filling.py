"""Filling: how much fits into a number of tokens, found with few long encodings."""

from collections.abc import Callable
from typing import Final

# A prompt this full is not searched further; guesses aim between that and the brim.
_FULL: Final = 0.975
_AIM: Final = 0.99
# How many units more than the least give the first guess of the tokens per unit.
_PROBE_UNITS: Final = 24
# No unit is free: more than so many in a token is a tokenizer that swallows text.
_UNITS_PER_TOKEN: Final = 8
# After so many guesses in proportion the rest is halved.
_GUESSES: Final = 6


def most_units(cost: Callable[[int], int], room_tokens: int, least: int) -> int | None:
    """Find how many units fill a room without exceeding it.

    Args:
        cost: Tokens of a prompt with that many units; grows with them, roughly in proportion.
        room_tokens: What the prompt may take.
        least: The smallest number of units.

    Returns:
        A number of units whose cost is within the room, and that fills nearly all of it or is
        followed by one that does not fit; None if the least does not fit.
    """
    fits, used = least, cost(least)
    if used > room_tokens:
        return None
    most = least + _PROBE_UNITS + _UNITS_PER_TOKEN * room_tokens
    before, used_before = fits, used
    too_many, used_by_too_many = most + 1, 0
    guess = least + _PROBE_UNITS
    tries = 0
    while used < _FULL * room_tokens and too_many - fits > 1:
        taken = cost(guess)
        if taken > room_tokens:
            too_many, used_by_too_many = guess, taken
        else:
            before, used_before = fits, used
            fits, used = guess, taken
        tries += 1
        if too_many > most:
            # Nothing was too much yet: go on as steeply as the last step.
            steps, tokens = fits - before, used - used_before
        else:
            steps, tokens = too_many - fits, used_by_too_many - used
        if tries > _GUESSES and too_many <= most:
            guess = (fits + too_many) // 2
        else:
            guess = fits + int((_AIM * room_tokens - used) * steps / max(tokens, 1))
        guess = min(max(guess, fits + 1), too_many - 1)
    return fits
