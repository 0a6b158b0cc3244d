"""Models that ranks hold together train as the same model in one process does, on every mesh."""

from __future__ import annotations

import numpy as np
import pytest

import meshes
from ranks import run_ranks

FEW = ("llama", "qwen3 tied", "gpt_oss")


def compared(expected, found) -> None:
    """Each number of one process and of a mesh, to 1e-5; gradients and weights relative to the largest of a tensor."""
    for losses in ("losses of SGD", "losses of AdamW"):
        assert found[losses] == pytest.approx(expected[losses], rel=1e-5)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    for kind in ("gradients", "weights"):
        assert found[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            assert np.abs(found[kind][name] - tensor).max() <= 1e-5 * np.abs(tensor).max(), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    meshes.write_checkpoints(folder, tuple(meshes.ARCHITECTURES))
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return meshes.alone(folder, tuple(meshes.ARCHITECTURES))


@pytest.mark.capability("Models larger than one device: FSDP2 and tensor parallelism")
def test_four_ranks_train_as_one_process(folder, expected) -> None:
    for found in run_ranks("meshes:on_mesh", meshes.Mesh(str(folder), FEW, tensor=2), 4):
        for name in FEW:
            compared(expected[name], found[name])


@pytest.mark.long
@pytest.mark.capability("Models larger than one device: FSDP2 and tensor parallelism")
@pytest.mark.parametrize(
    ("ranks", "tensor", "replicas"), [(2, 1, 1), (2, 2, 1), (4, 2, 1), (4, 1, 2)], ids=["2x1", "1x2", "2x2", "replicas"]
)
def test_every_architecture_on_every_mesh(folder, expected, ranks, tensor, replicas) -> None:
    names = tuple(meshes.ARCHITECTURES)
    found = run_ranks("meshes:on_mesh", meshes.Mesh(str(folder), names, tensor, replicas), ranks)[0]
    for name in names:
        compared(expected[name], found[name])
