"""Bases of models: the file that is named, or the one that `loki-attn calibrate` keeps."""

from pathlib import Path
from typing import Final, get_args

from loki_attn.basis import Basis, BasisKind
from loki_attn.errors import BasisError
from loki_attn.models.sources import basis_path
from loki_attn.policy import Policy
from loki_attn.select.loki import Loki

# Which cached basis is looked for, the best first.
_KINDS: Final[tuple[str, ...]] = ("mixed", "balanced", "pca")
_ORTHOGONAL_KINDS: Final[tuple[str, ...]] = ("pca",)


def find_basis(
    policy: Policy, model: str, given: str | Path | None = None
) -> tuple[Path, Basis] | None:
    """Load the basis that a policy needs.

    Args:
        policy: The policy.
        model: The model, by the name or the folder that it is loaded from.
        given: A file; or a kind of basis, where no file has that name, whose cached file is meant;
            None for the best cached one.

    Returns:
        The file and the basis, or None where the method needs none.

    Raises:
        BasisError: If there is none, or it cannot be read.
    """
    if not policy.select.needs_basis:
        return None
    match policy.select:
        case Loki(layout="rotated"):
            kinds = _ORTHOGONAL_KINDS
        case _:
            kinds = _KINDS
    if given is not None and str(given) in get_args(BasisKind) and not Path(given).is_file():
        kinds = (str(given),)
    elif given is not None:
        return Path(given), Basis.load(given)
    for kind in kinds if model else ():
        path = basis_path(model, kind)
        if path.is_file():
            return path, Basis.load(path)
    wish = "" if kinds[0] == "mixed" else f" --kind {kinds[0]}"
    raise BasisError(
        f"Policy {policy.name!r} needs a basis and there is none of {model or 'this model'!r} yet; "
        f"run `loki-attn calibrate --model {model or 'MODEL'}{wish}` once, or give a basis file."
    )
