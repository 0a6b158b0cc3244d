"""Readings of the machine agree with what is known of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

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


@pytest.mark.parametrize(
    ("table", "quotas", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, [1.5]),
        ("0::/", {"cpu.max": "max 100000"}, []),
        ("0::/run/job", {"run/cpu.max": "300000 100000", "run/job/cpu.max": "max 100000"}, [3.0]),
        ("0::/of/the/host", {"cpu.max": "200000 100000"}, [2.0]),
        (
            "9:memory:/elsewhere\n4:cpu,cpuacct:/job\n0::/",
            {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1"},
            [0.5],
        ),
        ("", {}, []),
    ],
)
def test_quotas_of_control_groups_of_both_versions_are_read(tmp_path, table, quotas, cores) -> None:
    """Files as cgroups(7), the kernel's admin-guide/cgroup-v2 and scheduler/sched-bwc describe them."""
    own = tmp_path / "cgroup"
    own.write_text(table)
    for name, value in quotas.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(value + "\n")
    assert list(hardware._quotas(own, tmp_path)) == cores


def test_a_process_in_a_group_with_a_quota_has_so_many_cores() -> None:
    """A control group of version 1 or 2 is made, where this machine lets us."""
    code = "from postlude.telemetry import hardware; input(); print(hardware.cores())"
    above = Path("/sys/fs/cgroup")
    group = (above / "cpu" if (above / "cpu").is_dir() else above) / f"postlude-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("no right to make control groups")
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as process:
        try:
            if (group / "cpu.cfs_quota_us").exists():
                (group / "cpu.cfs_quota_us").write_text("100000")
            elif (group / "cpu.max").exists():
                (group / "cpu.max").write_text("100000 100000")
            else:
                process.kill()
                pytest.skip("control groups without the cpu controller")
            (group / "cgroup.procs").write_text(str(process.pid))
            assert process.communicate("\n")[0] == "1\n"
        finally:
            process.wait()
            group.rmdir()


@pytest.mark.gpu
def test_a_gpu_in_use_is_what_memory_is_read_from() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    held = torch.ones(64 * MEGABYTE, dtype=torch.uint8, device="cuda")
    hardware.reset_peak()
    assert 64 * MEGABYTE <= hardware.memory_bytes() < 128 * MEGABYTE
    del held
