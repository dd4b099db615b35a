"""Freed memory stays: counted in page faults by a process of its own, because it cannot be taken back."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from byrote.train.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
def pages():
    for _ in range(3):
        torch.ones(2**24)  # 64 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(kept), pages())
"""


def run(word):
    shown = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True)
    return [int(number) for number in shown.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    (kept, faults), (_, faults_without) = run("keep"), run("leave")
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert faults < 1000 < faults_without
