"""Readings of the machine agree with what is known of it."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from postlude.telemetry import hardware

MEGABYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be reset on Linux only")
def test_the_peak_follows_what_is_held() -> None:
    if not hardware.reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    before = hardware.peak_resident_bytes()
    held = np.ones(100 * MEGABYTE, dtype=np.uint8)
    grown = hardware.peak_resident_bytes() - before
    assert 95 * MEGABYTE < grown < 130 * MEGABYTE
    assert hardware.resident_bytes() - before > 90 * MEGABYTE
    del held
    assert hardware.peak_resident_bytes() - before > 95 * MEGABYTE, "a peak does not sink by itself"
    assert hardware.reset_peak()
    assert hardware.peak_resident_bytes() - before < 50 * MEGABYTE


def test_memory_is_the_process_own_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert hardware.memory_bytes() == hardware.peak_resident_bytes()


def test_the_peak_rate_of_a_cpu_is_measured_once_and_leaves_the_threads_alone() -> None:
    threads = torch.get_num_threads()
    rate = hardware.peak_flops("cpu", torch.float32, 1)
    assert rate is not None
    assert 1e8 < rate < 1e14
    assert hardware.peak_flops(torch.device("cpu"), torch.float32, 1) == rate
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("name", "number_format", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "float16", 989.4),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA L4", "float16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA RTX 6000 Ada Generation", "bfloat16", 364.2),
        ("Tesla T4", "tf32", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3", "float8_e4m3fn", None),
        ("Somebody's GPU", "bfloat16", None),
    ],
)
def test_gpus_are_known_by_the_names_that_drivers_give(name: str, number_format: str, tflops: float | None) -> None:
    assert hardware.datasheet_flops(name, number_format) == (tflops and tflops * 1e12)


def test_there_is_a_core_and_a_name() -> None:
    assert hardware.cores() >= 1
    assert hardware.device_name("cpu")


@pytest.mark.gpu
def test_a_gpu_in_use_is_what_memory_is_read_from() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    held = torch.ones(64 * MEGABYTE, dtype=torch.uint8, device="cuda")
    hardware.reset_peak()
    assert 64 * MEGABYTE <= hardware.memory_bytes() < 128 * MEGABYTE
    del held
