"""Some cases of the fuzzer, and a few kills. More of them by hand: python tests/fuzz.py 10000."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("script, times", [("fuzz.py", 80), ("kill.py", 6)])
def test_hostile_files_flags_and_moments_cost_nothing(script, times):
    command = [sys.executable, Path(__file__).parent / script, str(times)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
