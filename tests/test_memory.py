"""Memory of freed tensors is reused: fewer pages are asked of the system."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys
from secateur.memory import keep_freed
if sys.argv[1] == "keep" and not keep_freed():
    sys.exit("refused")
for _ in range(20):
    b"1" * 40_000_000  # more than glibc ever keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(way: str) -> int:
    """Return the page faults of a process that fills and frees 40 MB twenty times."""
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, way], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_freed_memory_is_reused() -> None:
    assert faults("keep") < faults("leave") / 2
