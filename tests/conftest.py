import os
import sys
from pathlib import Path

import pytest
import torch

from minisa.kit.cli import command

torch.set_num_threads(1)                        # models this small are slower with more
os.environ["OMP_NUM_THREADS"] = "1"             # also those of the processes that tests start

@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(main, *flags) → exit status, stdout, stderr of a command run in this process, in its own folder."""
    monkeypatch.chdir(tmp_path)

    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", ["minisa", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            command(main)
        out, err = (printed.replace(os.sep, "/") for printed in capsys.readouterr())    # as on Linux
        return stop.value.code or 0, out, err
    return run

@pytest.fixture(params=["mkdir", "mkfifo"])
def make_odd(request):
    """make_odd(path) puts something that is no file there: a folder, or a pipe where there are any."""
    if not hasattr(os, request.param):
        pytest.skip(f"needs os.{request.param}")
    return getattr(os, request.param)

@pytest.fixture
def make_pipe():
    """make_pipe(path) puts a pipe there."""
    return getattr(os, "mkfifo", None) or pytest.skip("needs os.mkfifo")

@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A real text that is there offline, as a file of 60 kB: scenes of a play."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_bytes((Path(__file__).parent / "text.txt").read_bytes())
    return file

@pytest.fixture
def offline(monkeypatch):
    """No package can be downloaded."""
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "",
                        "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1",
                        "PIP_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
