"""Names: of people, towns and trades that nobody knows anything about."""

from typing import Final


def listed(text: str, separator: str = " ") -> tuple[str, ...]:
    """Return the parts of a text.

    Args:
        text: Words or names in a row.
        separator: What stands between them.
    """
    return tuple(text.split(separator))


GIVEN_NAMES: Final = listed(
    "Ada Agnes Alban Amos Beatrix Bennet Cecil Clara Conrad Dinah Edith Edmund Esther Felix Flora "
    "Gilbert Greta Harold Hester Hugo Ida Isaac Ivy Jasper Judith Laurence Leah Lydia Magnus Maud "
    "Miles Nora Oswin Ottilie Percy Phoebe Quentin Rhoda Rufus Sabina Silas Stella Tobias Ursula "
    "Vera Walter Wilfred Winifred"
)
SURNAMES: Final = tuple(
    start + end
    for start in listed("Black Bright Crow Fair Gold Green Hart Long Mar Red Stan Thorn Wake White")
    for end in listed("bridge field grove land ley man more shaw smith ton wood worth")
)
TOWNS: Final = tuple(
    start + end
    for start in listed("Alder Birch Corn Dun Ever Fox Glen Holl Kings Lark Mill Nettle Otter")
    for end in listed("brook bury by combe dale ford ham haven mouth stead wick")
)
TRADES: Final = listed(
    "baker brewer carpenter chandler clockmaker cooper dyer engraver farrier glazier glover hatter "
    "joiner locksmith mason miller potter printer saddler tailor tanner thatcher weaver"
)
