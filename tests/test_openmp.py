"""OpenMP's teams, counted as threads of a process in which nothing else runs."""

import json
import re
import subprocess
import sys

import pytest
import torch

torch.ones(1)  # with it comes its OpenMP
MAPS = open("/proc/self/maps").read() if sys.platform == "linux" else ""  # noqa: SIM115
pytestmark = pytest.mark.skipif(not re.search("libgomp", MAPS), reason="torch has no GNU OpenMP here")

PROGRAM = """
import json, os, threading, time
import torch
from fastpix2pix.openmp import release_team

def threads(wanted):  # waits until there are as many as wanted, since threads end in their own time
    for _ in range(3000):
        if len(os.listdir("/proc/self/task")) == wanted:
            break
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(1 << 20).exp_()

def other():
    torch.set_num_threads(4)
    compute()
    computed.set()
    released.wait()

torch.set_num_threads(3)
alone = len(os.listdir("/proc/self/task"))
release_team()  # none yet
found = {"none": threads(alone) - alone}
compute()
found["computed"] = threads(alone + 2) - alone
release_team()
found["released"] = threads(alone) - alone
compute()
found["again"] = threads(alone + 2) - alone
computed, released = threading.Event(), threading.Event()
thread = threading.Thread(target=other)
thread.start()
computed.wait()
found["two teams"] = threads(alone + 2 + 1 + 3) - alone
release_team()
found["the other's"] = threads(alone + 1 + 3) - alone
released.set()
thread.join()
found["set"] = torch.get_num_threads()
print(json.dumps(found))
"""


def test_the_calling_threads_team_ends_and_comes_back_and_others_stay():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    expected = {"none": 0, "computed": 2, "released": 0, "again": 2, "two teams": 6, "the other's": 4, "set": 3}
    assert json.loads(done.stdout) == expected
