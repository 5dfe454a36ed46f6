"""What messages are made of."""

from __future__ import annotations

import pytest

from compressor.errors import with_article


@pytest.mark.parametrize(
    ("noun", "said"),
    [("int", "an int"), ("OrderedDict", "an OrderedDict"), ("list", "a list"), ("ndarray", "an ndarray")],
)
def test_a_types_name_has_its_article(noun: str, said: str) -> None:
    assert with_article(noun) == said
