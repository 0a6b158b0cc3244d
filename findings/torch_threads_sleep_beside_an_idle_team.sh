#!/usr/bin/env bash
# torch 2.13.0 with its own libgomp (Linux): threads stop spinning at barriers while an idle team of OpenMP stands beside.
#
# By itself a thread that waits for the next parallel region spins for some 10 ms before it sleeps. libgomp keeps a
# second, short count for processes that manage more of its threads than they have cores, and looks at each wait which
# of the two holds. So a second thread of Python that once enters a parallel region of enough threads, and then waits
# for an event, makes all others sleep almost at once; when it ends they spin again. Unlike GOMP_SPINCOUNT and
# OMP_WAIT_POLICY, which are read once as the library is loaded, this can be switched while a program runs, and it
# changes no result. Seen on two cores, milliseconds of the processor for each wait of 10 ms:
#
#   alone 9.20, beside an idle team 0.24, alone again 9.71
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat > "$folder/wait.py" <<'PY'
import ctypes
import os
import resource
import sys
import threading
import time

import torch

cores = len(os.sched_getaffinity(0))
if cores < 2:
    sys.exit("Two cores are needed.")
torch.set_num_threads(2)
maps = open("/proc/self/maps").read().splitlines()
library = ctypes.CDLL(next(line.split(maxsplit=5)[5] for line in maps if "/libgomp" in line))
numbers = torch.ones(2**16)


def burnt():
    """Milliseconds of the processor for each round of a small parallel region and a wait of 10 ms."""
    numbers.exp()
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for _ in range(100):
        numbers.exp()
        time.sleep(0.01)
    return 10 * (sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before)


def idle(leave):
    nothing = ctypes.cast(library.omp_get_level, ctypes.c_void_p)
    library.GOMP_parallel(nothing, None, cores, 0)  # with the other team: more threads than cores
    leave.wait()


readings = [burnt()]
leave = threading.Event()
beside = threading.Thread(target=idle, args=(leave,))
beside.start()
time.sleep(0.5)
readings.append(burnt())
leave.set()
beside.join()
time.sleep(0.5)
readings.append(burnt())
print("alone {:.2f}, beside an idle team {:.2f}, alone again {:.2f}".format(*readings))
if not 4 * readings[1] < min(readings[0], readings[2]):
    sys.exit("An idle team makes no difference: the finding is out of date.")
PY
env -u GOMP_SPINCOUNT -u OMP_WAIT_POLICY OMP_NUM_THREADS=2 "$folder/venv/bin/python" "$folder/wait.py"
