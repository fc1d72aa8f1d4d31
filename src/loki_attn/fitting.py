"""fit: from streamed moments to a basis. Pure mathematics in float64, no model code.

Why every rank of a `balanced` or `mixed` basis is a good estimate
------------------------------------------------------------------
Let Ck be the key covariance, Cq the uncentred query second moment, M the key map with columns m_j.

1. M^T Ck M is diagonal, L. So the coordinates k'_j = m_j^T k of a centred key are uncorrelated,
   and the linear regression of k on any leading r of them is the sum of r single regressions:
   E[k | k'[:r]] = sum_j<r Ck m_j k'_j / L_j.
2. From M^T (Ck M L^-1) = Id the vector Ck m_j / L_j is column j of M^-T, the query map. So the
   truncated score q'[:r] . k'[:r] is q^T E[k | k'[:r]] for every r at once. (An uncentred key adds
   a constant per query, which cannot move a ranking.)
3. What is left out is uncorrelated between columns: its mean square, for independent q and k, is
   the sum over j >= r of E[q'_j^2] Var[k'_j]. That product is the spectrum, so the loss at rank r
   is the tail of the spectrum.
4. With t = Ck^1/2 m every such map is M = Ck^-1/2 T S with an orthonormal T and free positive
   column scales S, chosen so that E[q'_j^2] = Var[k'_j]: then both are e_j^1/2 and S_j = e_j^1/4,
   where e_j = |Cq^1/2 Ck^1/2 t_j|^2 is the spectrum.

The choices of T: `balanced` takes T = W of the singular value decomposition Cq^1/2 Ck^1/2 =
U Sig W^T, which by Eckart-Young makes every tail the smallest possible (e = Sig^2). The columns of
pca are T = P, the eigenvectors of Ck. `mixed` takes the Gram-Schmidt of the columns of W and P in
turn, which is Gram-Schmidt of the columns of the two maps in the Ck inner product: its leading
columns span the leading ones of both, and points 1 to 4 hold for it at every rank.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import final

import torch
from torch import Tensor

from loki_attn.artefact import JSON
from loki_attn.basis import Basis, BasisKind, LayerBasis, Side
from loki_attn.errors import InputError, unknown_name
from loki_attn.key_stats import KeyStats

_KINDS: tuple[BasisKind, ...] = ("pca", "balanced", "mixed", "random", "identity")
DEFAULT_KIND: BasisKind = "mixed"
_BALANCED: tuple[BasisKind, ...] = ("balanced", "mixed")
_DEFAULT_PCA_COLUMNS = 1


@final
@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The arguments of `fit`, checked."""

    kind: BasisKind
    side: Side
    centred: bool
    regularisation: float
    seed: int
    sharpness: float
    pca_columns: int


def fit(  # noqa: PLR0913 - each is a choice of its own, by keyword
    stats: KeyStats,
    kind: BasisKind,
    *,
    side: Side = "post",
    centred: bool = True,
    regularisation: float = 1e-6,
    seed: int = 0,
    sharpness: float = 0.0,
    pca_columns: int | None = None,
    provenance: Mapping[str, JSON] | None = None,
) -> Basis:
    """Fit a basis per layer and KV head.

    - `pca`: eigenvectors of the key covariance, falling (arXiv 2406.02542, section 3).
    - `balanced`: the invertible map whose r leading columns lose the least mean-square score.
    - `mixed`: columns of `balanced` (what most queries ask for) and of `pca` (what tells keys
      apart) in turn; the module's docstring derives both.
    - `random`, `identity`: controls; random orthogonal, different in every layer and head.

    Args:
        stats: The moments.
        kind: One of the above.
        side: For `pca`, keys after RoPE or before it; `balanced` and `mixed` need "post".
        centred: Whether the key moment is taken about the mean.
        regularisation: Eigenvalues are raised to at least this share of the largest.
        seed: Seed of `random`.
        sharpness: Share in [0, 1] of the weighted query moment, both moments taken at equal traces.
        pca_columns: `mixed` only: balanced columns before each pca column; 1 alternates (default).
        provenance: Plain JSON, kept beside the settings, the token count and the versions.

    Returns:
        The basis.

    Raises:
        InputError: If an argument does not fit, or the statistics lack what it needs.
        BasisError: If the result does not keep scores; a larger `regularisation` mends that.
    """
    settings = _Settings(
        kind=kind,
        side=side,
        centred=centred,
        regularisation=regularisation,
        seed=seed,
        sharpness=sharpness,
        pca_columns=_DEFAULT_PCA_COLUMNS if pca_columns is None else pca_columns,
    )
    _check(stats, settings, pca_given=pca_columns is not None)
    return Basis(
        kind=kind,
        side=side,
        orthogonal=kind not in _BALANCED,
        layers={layer: _fit_layer(stats, layer, settings) for layer in stats.layers},
        provenance={**(provenance or {}), **_origin(stats, settings)},
    )


def _fit_layer(stats: KeyStats, layer: int, settings: _Settings) -> LayerBasis:
    """Fit one layer."""
    key_moment = stats.covariance(layer, settings.side, settings.centred)
    heads, size = stats.shape(layer)
    match settings.kind:
        case "pca":
            columns = torch.linalg.eigh(key_moment).eigenvectors.flip(-1)
        case "random":
            columns = torch.stack(
                [_random_orthogonal(size, settings.seed, layer, head) for head in range(heads)]
            )
        case "identity":
            columns = torch.eye(size, dtype=torch.float64).repeat(heads, 1, 1)
        case "balanced" | "mixed":
            return _fit_invertible(key_moment, _query_moment(stats, layer, settings), settings)
    return _orthogonal_layer(columns, key_moment)


def _orthogonal_layer(columns: Tensor, key_moment: Tensor) -> LayerBasis:
    """Wrap orthonormal columns; the spectrum is the key variance along each."""
    key_map = _fix_signs(columns).float()
    variance = ((key_moment @ columns) * columns).sum(-2)
    return LayerBasis(key_map=key_map, query_map=key_map, spectrum=variance.clamp_min(0))


def _fit_invertible(key_moment: Tensor, query_moment: Tensor, settings: _Settings) -> LayerBasis:
    """Fit `balanced` or `mixed` from Ck and Cq; see `fit`."""
    key_values, key_vectors = _clamped_eigh(key_moment, settings.regularisation)
    query_values, query_vectors = _clamped_eigh(query_moment, settings.regularisation)
    key_half = (key_vectors * key_values.sqrt()[:, None, :]) @ key_vectors.mT
    key_inverse_half = (key_vectors * key_values.rsqrt()[:, None, :]) @ key_vectors.mT
    query_half = (query_vectors * query_values.sqrt()[:, None, :]) @ query_vectors.mT
    coupling = query_half @ key_half
    whitened = torch.linalg.svd(coupling).Vh.mT
    if settings.kind == "mixed":
        pairs = zip(whitened, key_vectors, strict=True)
        whitened = torch.stack([_interleave(w, p, settings.pca_columns) for w, p in pairs])
    # Mean-square score carried by each column; Sig^2 where the columns are W.
    energy = (coupling @ whitened).square().sum(-2)
    columns = (key_inverse_half @ whitened) * energy.pow(0.25)[:, None, :]
    key_map = _fix_signs(columns).float()
    # The inverse of what is stored, so that scores survive the rounding of the key map.
    query_map = torch.linalg.inv(key_map.double()).mT.float().contiguous()
    return LayerBasis(key_map=key_map, query_map=query_map, spectrum=energy)


def _interleave(balanced: Tensor, pca: Tensor, pca_columns: int) -> Tensor:
    """Gram-Schmidt two orthonormal bases [d, d], one pca column after `pca_columns` balanced.

    A candidate of which less than 1/(4 d) of the squared length is new counts as spanned and its
    turn goes to the next of its kind. Whatever the order, d columns are found: were the accepted
    span smaller, a unit vector outside it would have a component of at least 1/sqrt(d) along some
    balanced column, which would then have been accepted.
    """
    size = balanced.shape[0]
    columns = balanced.new_zeros(size, size)
    sources = [iter(balanced.T), iter(pca.T)]
    for count in range(size):
        turn = count % (pca_columns + 1) == pca_columns
        lead = columns[:, :count]
        column = _next_new(sources[turn], lead)
        if column is None:
            column = _next_new(sources[not turn], lead)
        if column is None:
            raise ArithmeticError("Two orthonormal bases did not span the space.")
        columns[:, count] = column
    return columns


def _next_new(candidates: Iterator[Tensor], spanned: Tensor) -> Tensor | None:
    """Return the next candidate's part outside the span, normalised, or None at the end."""
    threshold = 0.5 / math.sqrt(spanned.shape[0])
    for candidate in candidates:
        rest = candidate - spanned @ (spanned.T @ candidate)
        if float(rest.norm()) > threshold:
            # Once more: one pass leaves rounding errors of the size of eps / threshold.
            rest = rest - spanned @ (spanned.T @ rest)
            unit: Tensor = rest / rest.norm()
            return unit
    return None


def _query_moment(stats: KeyStats, layer: int, settings: _Settings) -> Tensor:
    """Return Cq, mixed with the sharp moment at equal traces."""
    plain = stats.query_moment(layer)
    if settings.sharpness == 0.0:
        return plain
    sharp = stats.query_moment(layer, sharp=True)
    plain_trace, sharp_trace = _trace(plain), _trace(sharp)
    ratio = torch.where(sharp_trace > 0, plain_trace / sharp_trace.clamp_min(1e-300), 0.0)
    return (1.0 - settings.sharpness) * plain + settings.sharpness * ratio * sharp


def _trace(moment: Tensor) -> Tensor:
    """Return traces as [heads, 1, 1]."""
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def _clamped_eigh(moment: Tensor, regularisation: float) -> tuple[Tensor, Tensor]:
    """Return falling eigenvalues, clamped from below, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(moment)
    largest = values[:, -1:]
    # Nothing varies (a single token, say): every direction is as good, and one is a safe scale.
    floor = torch.where(largest > 0, largest * regularisation, 1.0)
    return values.clamp_min(floor).flip(-1), vectors.flip(-1)


def _random_orthogonal(size: int, seed: int, layer: int, head: int) -> Tensor:
    """Draw a uniformly random orthogonal matrix [size, size]."""
    # Hashed, so that no caller's own small seed draws the same numbers.
    digest = hashlib.sha256(f"loki-attn random basis {seed} {layer} {head}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, triangle = torch.linalg.qr(normal)
    # Without the signs the QR of a Gaussian matrix is not uniform (Mezzadri, math-ph/0609050).
    signed: Tensor = orthogonal * triangle.diagonal().sign()
    return signed


def _fix_signs(columns: Tensor) -> Tensor:
    """Turn every column [..., d, d] so that its largest component is positive."""
    largest = columns.abs().argmax(-2, keepdim=True)
    signs = columns.gather(-2, largest).sign()
    return torch.where(signs == 0, 1.0, signs) * columns


def _check(stats: KeyStats, settings: _Settings, *, pca_given: bool) -> None:
    """Refuse arguments that are out of range or mean nothing for this kind."""
    kind = settings.kind
    if kind not in _KINDS:
        raise unknown_name("basis kind", kind, _KINDS)
    if settings.side not in ("post", "pre"):
        raise unknown_name("side", settings.side, ("post", "pre"))
    if stats.tokens == 0:
        raise InputError("Cannot fit a basis: the statistics hold no tokens. Calibrate on text.")
    if not 0.0 < settings.regularisation < 1.0:
        raise InputError(
            f"regularisation is a share in (0, 1), got {settings.regularisation}; 1e-6 is usual."
        )
    if not 0.0 <= settings.sharpness <= 1.0:
        raise InputError(f"sharpness is a share in [0, 1], got {settings.sharpness}.")
    if kind not in _BALANCED and settings.sharpness:
        raise InputError(f"sharpness weighs queries, which a {kind} basis does not use.")
    if kind != "mixed" and pca_given:
        raise InputError(f"pca_columns belongs to kind 'mixed', got kind '{kind}'.")
    if settings.pca_columns < 1:
        raise InputError(f"pca_columns must be 1 or more, got {settings.pca_columns}.")
    if kind in _BALANCED and settings.side == "pre":
        raise InputError(
            f"A {kind} basis weighs keys against queries, which are recorded after RoPE: "
            "use side='post'."
        )


def _origin(stats: KeyStats, settings: _Settings) -> dict[str, JSON]:
    """State the settings, the token count and the versions."""
    fitted: dict[str, JSON] = {"centred": settings.centred}
    if settings.kind in _BALANCED:
        fitted["regularisation"] = settings.regularisation
        fitted["sharpness"] = settings.sharpness
    if settings.kind == "mixed":
        fitted["pca_columns"] = settings.pca_columns
    if settings.kind == "random":
        fitted["seed"] = settings.seed
    versions: dict[str, JSON] = {}
    for name in ("loki-attn", "torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {"fit": fitted, "tokens": stats.tokens, "versions": versions}
