import sys

import pytest

from minisa import command


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(main, *flags) → exit status, stdout, stderr of a command run in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(main, *flags):
        monkeypatch.setattr(sys, "argv", ["minisa", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            command(main)
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err
    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A real text that is there offline, as a file: this project's own README and model."""
    from pathlib import Path
    root = Path(__file__).resolve().parent.parent
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((root / "minisa" / "model.py").read_text() + (root / "train.py").read_text() + (root / "sample.py").read_text())
    return file
