"""Numbers out of range are refused by the schema, with key and range."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from postlude.manifest.component import Positive, Seed


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400])
def test_a_seed_has_64_bits(value: int) -> None:
    assert TypeAdapter(Seed).validate_python(2**63 - 1) == 2**63 - 1
    with pytest.raises(ValidationError, match="9223372036854775808"):
        TypeAdapter(Seed).validate_python(value)


@pytest.mark.parametrize("value", [0, 2**53 + 1, 10**400])
def test_a_count_is_exact(value: int) -> None:
    with pytest.raises(ValidationError, match=r"greater than 0|less than or equal to 9007199254740992"):
        TypeAdapter(Positive).validate_python(value)
