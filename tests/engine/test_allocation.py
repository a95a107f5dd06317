import json
import platform
import subprocess
import sys

import pytest

# Page faults of ten rounds that allocate and free 160 MiB in blocks of 16 MiB.
PROGRAM = """
import json, os, resource
from batchformer_panoptic.engine.run import tune_allocation
import torch
tune_allocation()

def work():
    blocks = [torch.zeros(2**22) for _ in range(10)]

work(), work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))
"""


def faults(**variables: str) -> int:
    environment = {"PATH": "/usr/bin:/bin", "THP_MEM_ALLOC_ENABLE": "0", **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, check=True, stdout=subprocess.PIPE
    )
    return int(json.loads(done.stdout))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_kept_unless_the_user_has_chosen():
    kept, chosen = faults(), faults(MALLOC_TRIM_THRESHOLD_=str(2**20))
    # About 40 000 pages; the system may take some back from either on its own.
    assert chosen > 10 * 1000
    assert kept < chosen / 3
