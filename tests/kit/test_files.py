"""Files are checked before they are used, written whole or not at all, and kept from others."""

import math
import os
import subprocess

import pytest

from minisa.kit import files

KINDS = {"step": int, "loss": float | None, "names": list, "tied": bool, "inner": dict | None}
GOOD = {"step": 3, "loss": 2.5, "names": ["x"], "tied": True, "inner": {"a": -1}}

@pytest.mark.parametrize("change", [{}, {"loss": None}, {"loss": 2}, {"names": []}, {"step": 2**63 - 1},
                                    {"inner": None}], ids=str)
def test_fields_of_the_right_types_pass(change):
    files.check(GOOD | change, KINDS, "it")

@pytest.mark.parametrize("change", [
    {"step": True}, {"step": 3.0}, {"step": None}, {"step": 2**63}, {"loss": math.nan}, {"loss": -math.inf},
    {"loss": "2"}, {"names": "x"}, {"names": ("x",)}, {"tied": 1}, {"inner": []}, {"more": 1},
], ids=str)
def test_fields_of_other_types_are_refused(change):
    part = "it" if set(change) - set(KINDS) else f"it.{next(iter(change))}"
    with pytest.raises(ValueError, match=rf"^{part} is not as it should be$"):
        files.check(GOOD | change, KINDS, "it")

def test_what_is_no_dict_or_lacks_a_field_is_refused():
    for wrong in (None, [], {"step": 3}):
        with pytest.raises(ValueError, match="^it is not as it should be$"):
            files.check(wrong, KINDS, "it")

@pytest.mark.skipif(os.name == "nt", reason="needs pipes, and files with holes")
def test_a_pipe_a_folder_and_a_huge_file_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")                            # read, it would wait for ever
    with pytest.raises(OSError, match="is not a regular file"):
        files.read_file(tmp_path / "pipe")
    with pytest.raises(OSError, match="directory"):
        files.read_file(tmp_path)
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 10**12)
    with pytest.raises(OSError, match="is larger than the 1 MB"):
        files.read_file(tmp_path / "huge", 2**20)

@pytest.mark.skipif(os.name == "nt", reason="needs permissions as Unix has them")
def test_files_are_as_open_as_the_user_wants_and_private_ones_the_users_alone(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_file(tmp_path / "a", b"x")
        files.write_file(tmp_path / "b", b"x", private=True)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o600]
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]

def test_a_pipe_in_the_place_of_a_file_is_left_alone(tmp_path, make_pipe):
    make_pipe(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        files.write_file(tmp_path / "pipe", b"x")
    assert os.listdir(tmp_path) == ["pipe"]

def test_a_folder_is_locked_until_its_program_ends(tmp_path):
    with files.lock(tmp_path / "run"):
        with pytest.raises(ValueError, match="another program is writing there"):
            with files.lock(tmp_path / "run"):
                pass
    with files.lock(tmp_path / "run"):
        files.write_folder(tmp_path / "run", {"x": b"x"})
        os.rename(tmp_path / "run", tmp_path / "old")       # the lock stays where it is
        with pytest.raises(ValueError, match="another program is writing there"):
            with files.lock(tmp_path / "run"):
                pass
    assert not (tmp_path / "run").exists() and os.listdir(tmp_path / "old") == ["x"]

def test_a_lock_leaves_nothing_where_no_folder_came_of_it(tmp_path):
    with files.lock(tmp_path / "a/b/run"):
        assert (tmp_path / "a/b").is_dir()
    assert os.listdir(tmp_path) == []
    with files.lock(tmp_path / "a/b/run"):
        (tmp_path / "a/mine").write_text("mine")                # another program's
    assert os.listdir(tmp_path / "a") == ["mine"]
    with files.lock(tmp_path / "a/b/run"):
        (tmp_path / "a/b/run").mkdir()
    assert (tmp_path / "a/b/run").is_dir()

def test_a_folder_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    files.write_folder(tmp_path / "empty", {"x": b"1", "y": b"2"})
    assert (tmp_path / "empty/y").read_bytes() == b"2"
    with pytest.raises(OSError, match="taken: could not be written"):
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken/mine").write_text("mine")
        files.write_folder(tmp_path / "taken", {"x": b"1"})
    assert os.listdir(tmp_path / "taken") == ["mine"]
    put, done = files.put, []
    def full(path, data):
        if done:
            raise OSError(28, "No space left on device")
        done.append(path)
        put(path, data)
    monkeypatch.setattr(files, "put", full)
    with pytest.raises(OSError, match="new: could not be written .No space left"):
        files.write_folder(tmp_path / "new", {"x": b"1", "y": b"2"})
    assert sorted(os.listdir(tmp_path)) == ["empty", "taken"]

def test_a_folder_that_is_taken_is_refused_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    files.refuse_taken(tmp_path / "empty")
    files.refuse_taken(tmp_path / "new")
    (tmp_path / "file").write_text("mine")
    for name in ("file", "."):
        with pytest.raises(ValueError, match="--out=.*: is there already"):
            files.refuse_taken(tmp_path / name)

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device without space")
def test_a_device_that_takes_nothing_is_named():
    with pytest.raises(OSError, match="^/dev/full: could not be written"):
        files.write_file("/dev/full", b"a\n1\n", named=True)

# ---- downloads ----

def test_a_download_with_another_hash_is_refused_before_it_is_opened(monkeypatch):
    import hashlib
    import sys
    pip = "import sys; open(sys.argv[-2] + '/x.whl', 'w').write('a wheel')"         # into --dest
    monkeypatch.setattr(files, "find_pip", lambda: [sys.executable, "-c", pip])
    with pytest.raises(ValueError, match="its sha256 is [0-9a-f]{64}, expected 000"):
        with files.wheel("x==1", "0" * 64, "a package", "do without"):
            pytest.fail("it was opened")
    right = hashlib.sha256(b"a wheel").hexdigest()
    with files.wheel("x==1", right, "a package", "do without") as file:
        assert file.read_bytes() == b"a wheel"
    assert not file.exists()

def test_without_pip_the_copy_that_python_carries_is_run(monkeypatch):
    ensurepip = pytest.importorskip("ensurepip", reason="needs a Python with ensurepip")
    find_spec = files.importlib.util.find_spec
    monkeypatch.setattr(files.importlib.util, "find_spec",
                        lambda name: None if name == "pip" else find_spec(name))
    command = files.find_pip()
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and "ensurepip" in done.stdout, done.stderr
    monkeypatch.setattr(ensurepip, "__file__", "/nowhere/__init__.py")
    with pytest.raises(ValueError, match="pip is missing"):
        files.find_pip()

def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def none():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(files.Path, "exists", lambda self: False)
    monkeypatch.setattr(files.Path, "home", none)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ValueError, match="XDG_CACHE_HOME"):
        files.data_folder()
