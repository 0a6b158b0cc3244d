"""Reward functions that the tests name by their module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def digits(prompt: Any, completion: str, record: Mapping[str, Any]) -> int:
    """How many different characters below 128 there are: not the same for all that a random model says."""
    return len({character for character in completion if ord(character) < 128})


def broken_at_seven(prompt: Any, completion: str, record: Mapping[str, Any]) -> float:
    """Fails at one record."""
    if prompt[0]["content"].startswith("7+"):
        raise KeyError("seven")
    return 0.0


def nothing(prompt: Any, completion: str, record: Mapping[str, Any]) -> None:
    """Forgets to return a number."""


def stays_at_seven(prompt: Any, completion: str, record: Mapping[str, Any]) -> float:
    """Does not end at one record."""
    while prompt[0]["content"].startswith("7+"):
        pass
    return 0.0


def stays_at_eight(prompt: Any, completion: str, record: Mapping[str, Any]) -> float:
    """Does not end at another."""
    while prompt[0]["content"].startswith("8+"):
        pass
    return 0.0


def broken(prompt: Any, completion: str, record: Mapping[str, Any]) -> float:
    """Fails at every record."""
    raise KeyError("all")
