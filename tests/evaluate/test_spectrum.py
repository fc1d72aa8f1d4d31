"""Spectrum rows: ranks and cumulative shares of a basis whose spectrum is known."""

import pytest
import torch

from loki_attn.basis import Basis, LayerBasis
from loki_attn.evaluate.spectrum import spectrum


def make_basis(spectra, **provenance):
    """A basis of identity maps with one spectrum per layer and head."""
    maps = torch.eye(4).repeat(len(spectra[0]), 1, 1)
    layers = {
        index * 2: LayerBasis(
            key_map=maps, query_map=maps, spectrum=torch.tensor(rows, dtype=torch.float64)
        )
        for index, rows in enumerate(spectra)
    }
    return Basis(layers=layers, kind="pca", side="post", orthogonal=True, provenance=provenance)


def test_ranks_and_shares():
    flat, steep = [1.0, 1.0, 1.0, 1.0], [97.0, 1.0, 1.0, 1.0]
    row = spectrum(make_basis([[flat, steep], [steep, steep]], tokens=64, model={"id": "tiny"}))
    assert row.task == "spectrum"
    assert row.model == {"id": "tiny"}
    assert row.metrics["index"] == [0, 2]
    assert row.metrics["rank_at_90"] == [[4, 1], [1, 1]]
    assert row.metrics["rank_at_90_mean"] == 1.75
    assert row.metrics["cumulative"][1] == pytest.approx([0.97, 0.98, 0.99, 1.0])
    assert row.metrics["cumulative"][0] == pytest.approx([0.61, 0.74, 0.87, 1.0])
    assert (row.n, row.settings["tokens"], row.basis["kind"]) == (4, 64, "pca")
    assert "model" not in row.basis


def test_a_basis_that_does_not_say_its_model():
    row = spectrum(make_basis([[[1.0, 0.0, 0.0, 0.0]]]), name="mine")
    assert (row.model, row.contender) == ({"id": "unnamed"}, "mine")
    assert row.metrics["cumulative"] == [[1.0, 1.0, 1.0, 1.0]]
