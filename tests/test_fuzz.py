"""Some cases of the fuzzer, and a few kills. More of them by hand: python tests/fuzz.py 10000."""

import subprocess
import sys
from pathlib import Path

import pytest

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs fork, and limits of memory that hold")
def test_hostile_files_flags_and_moments_cost_nothing():
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, Path(__file__).parent / script, str(times)], **pipes)
            for script, times in (("fuzz.py", 50), ("kill.py", 6))]           # a core for each
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out[-5000:] + err[-2000:]
