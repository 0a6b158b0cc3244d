"""OpenMP's threads wait as the user says, and shortly where nobody has said how."""

from __future__ import annotations

import os

from postlude.telemetry import openmp


def test_threads_wait_as_the_user_says_else_shortly(monkeypatch) -> None:
    for name in ("OMP_WAIT_POLICY", *openmp.SHORT_WAIT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    openmp.wait_shortly()
    assert {name: os.environ[name] for name in openmp.SHORT_WAIT} == {**openmp.SHORT_WAIT, "GOMP_SPINCOUNT": "5"}
    for name in openmp.SHORT_WAIT:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    openmp.wait_shortly()
    assert not set(openmp.SHORT_WAIT) & set(os.environ)
