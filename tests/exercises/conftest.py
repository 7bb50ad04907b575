import pytest

from minisa.exercises import solutions

@pytest.fixture(scope="session")
def right(tmp_path_factory):
    """A file of right answers."""
    file = tmp_path_factory.mktemp("solutions") / "right.py"
    file.write_text(solutions.text_of_file(), encoding="utf-8")
    return file
