"""The nouns are plain and frozen."""

from dataclasses import FrozenInstanceError

import pytest

from loki_attn.testing import layer_shape
from loki_attn.types import Lead, Reading


def test_group():
    assert layer_shape(9, 3).group == 3
    assert layer_shape(4, 4).group == 1


def test_frozen():
    with pytest.raises(FrozenInstanceError):
        layer_shape().head_dim = 3
    with pytest.raises(FrozenInstanceError):
        Lead(None).plane = 3
    with pytest.raises(FrozenInstanceError):
        Reading(counts=3).counts = 4
