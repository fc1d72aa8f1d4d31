"""Errors: one family, and a message that helps."""

import pytest

from loki_attn import errors
from loki_attn.errors import LokiAttnError, unknown_name


def test_every_error_is_of_the_family():
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(kinds) > 5
    assert [e for e in kinds if not issubclass(e, LokiAttnError)] == []


@pytest.mark.parametrize("kind", [errors.InputError, errors.BudgetError, errors.PolicyError])
def test_bad_values_are_value_errors(kind):
    assert issubclass(kind, ValueError)


def test_unknown_names_list_the_valid_ones_and_the_nearest():
    text = str(unknown_name("fruit", "aple", ["pear", "apple"]))
    assert text == "Unknown fruit 'aple'. Did you mean 'apple'? Valid: apple, pear."


def test_nothing_near_means_no_guess():
    text = str(unknown_name("fruit", "xyz", ["pear", "apple"]))
    assert text == "Unknown fruit 'xyz'. Valid: apple, pear."
    assert str(unknown_name("fruit", "xyz", [])) == "Unknown fruit 'xyz'. Valid: (none)."
