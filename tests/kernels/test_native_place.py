"""Where the native library is looked for."""

import pytest

from loki_attn.errors import InputError
from loki_attn.kernels.native import place


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """An installation with nothing in it."""
    monkeypatch.setattr(place, "_FOLDER", tmp_path)
    monkeypatch.setattr(place, "_chosen", None)
    return tmp_path


def test_the_library_lies_beside_the_package(folder):
    assert place.find_library() is None
    library = folder / place.LIBRARY_NAME
    library.touch()
    assert place.find_library() == library


def test_a_missing_library_has_a_reason(folder):
    assert place.why_missing() == (
        "its library is missing: it was not built; install loki-attn again with pip"
    )
    (folder / "native_missing.txt").write_text("no compiler, install g++\n")
    assert place.why_missing() == "its library is missing: no compiler, install g++"


def test_another_library_can_be_chosen(folder):
    (folder / place.LIBRARY_NAME).touch()
    other = folder / "other.so"
    with pytest.raises(InputError, match=r"no native library at '.*other\.so'.*sanitize"):
        place.use_library(other)
    assert place.find_library() == folder / place.LIBRARY_NAME
    other.touch()
    place.use_library(other)
    assert place.find_library() == other
