"""What runs a file of answers: a program of its own, which grade.py starts and never imports into itself.

    python child.py FILE FOLDER ...         FOLDER: what an answer must not read

It reads a call a line from its standard input, {"call": name, "arguments": [...]}, and writes what the answer
did, a line of JSON each. It knows the arguments of one case, and nothing of what is expected: no frame, no
module and no object here holds it. Only JSON travels back, so nothing that an answer returns runs in the
grader.

An answer must not import minisa, read its files, or start programs: forbid() refuses that, by Python's audit
hooks. That stops most people. It does not stop somebody who uses ctypes, looks into the memory of this
process, reads a copy of minisa under another name, or has a friend write the file: no grader on the same
machine can. Grade strangers' files in a container, and read what looks odd.
"""

import contextlib
import json
import linecache
import math
import numbers
import os
import sys
import traceback
import types
from pathlib import Path

LARGEST = 100_000           # numbers in an answer; its JSON may have ten times as many characters
HIDDEN = "minisa", "tests", "train", "sample"       # modules
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
            "os.startfile", "os.kill", "os.killpg", "pty.spawn")

# ---- what answers must not do ----

class Hider:
    """A finder of modules, the first to be asked, that refuses those of minisa."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ImportError(f"importing {name} does not count as an answer")

def forbid(file, folders):
    """From now on, refuse what answers must not do. file: theirs, which may lie in one of the folders."""
    own = os.path.realpath(file)
    hidden = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)

    def refuse(event, args):
        if event in PROGRAMS:
            raise RuntimeError(f"an answer must not start or stop programs ({event})")
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path.startswith(hidden) and path != own:
                raise ImportError(f"reading {os.path.basename(path)} does not count as an answer")

    sys.meta_path.insert(0, Hider)
    sys.addaudithook(refuse)

# ---- running answers ----

def read_answers(file):
    """Run a file of answers → its functions, as a module."""
    module = sys.modules["answers"] = types.ModuleType("answers")
    module.__file__ = str(file)
    exec(compile(Path(file).read_bytes(), str(file), "exec"), vars(module))
    return module

def line_of(error, file):
    """The last line of a file, or of a notebook's cell, that an error came through, in words; "" if there is
    none."""
    name = Path(file).name if os.path.exists(file) else "this cell"
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f" in line {error.lineno} of {name}: {(error.text or '').strip()}"
    frames = traceback.walk_tb(error.__traceback__)
    lines = [number for frame, number in frames if frame.f_code.co_filename == str(file)]
    if not lines:
        return ""
    text = linecache.getline(str(file), lines[-1]).strip()
    return f" in line {lines[-1]} of {name}: {text}"

def describe(error, file):
    """An error of an answer, in one line."""
    if isinstance(error, SyntaxError):
        said = error.msg
    else:
        said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:160]}{line_of(error, file)}".replace(": in line", " in line")

def call(answer, arguments, file=""):
    """→ what an answer does with its arguments: {"got", "after"}, where `after` is what it left of them, or
    {"error", "kinds"}, where `kinds` names the error's classes."""
    try:
        got = answer(*arguments)
        return {"got": packed(got), "after": [packed(argument) for argument in arguments]}
    except (Exception, SystemExit) as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"error": describe(error, file), "kinds": kinds}

# ---- values as JSON ----

def unpacked(content):
    """For json.loads(): an object → the tensor that it stands for, or the same if it is none."""
    if "numbers" not in content:
        return content
    import torch
    return torch.tensor(content["numbers"], dtype=torch.float32).view(content["shape"])

def packed(value):
    """Whatever an answer returns, as JSON can hold it: numbers, texts and lists as they are, a tensor or an
    array as {"shape", "numbers"}, anything else, or too much of it, as {"text"}."""
    with contextlib.suppress(Exception):
        plain = value
        if isinstance(value, dict):
            raise TypeError                         # only a tensor may look like {"shape", "numbers"}
        if hasattr(value, "tolist") and value.shape:
            if math.prod(value.shape) > LARGEST:
                raise MemoryError
            plain = {"shape": list(value.shape), "numbers": value.tolist()}
        text = json.dumps(plain, default=plain_part)
        if len(text) <= 10 * LARGEST:
            return json.loads(text)
    with contextlib.suppress(Exception):
        return {"text": repr(value)[:200]}
    return {"text": f"a {type(value).__name__}"}

def plain_part(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError

# ---- the program ----

def missing(*arguments):
    """In place of a function that the file does not define."""
    raise NotImplementedError

def serve(file, folders, calls, send):
    import torch
    torch.set_num_threads(1)
    send({"started": True})
    forbid(file, folders)
    try:
        sys.path.insert(0, os.path.dirname(os.path.abspath(file)))
        module = read_answers(file)
    except (Exception, SystemExit) as error:
        send({"error": describe(error, file)})
        return
    send({"loaded": True})
    for line in calls:
        asked = json.loads(line, object_hook=unpacked)
        answer = getattr(module, asked["call"], missing)
        send(call(answer, asked["arguments"], file))

def main():
    calls = os.fdopen(os.dup(0), "rb")
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)        # input() of an answer ends at once,
    os.dup2(2, 1)                                       # and what it prints is no result

    def send(result):
        results.write(json.dumps(result).encode() + b"\n")
        results.flush()

    file, *folders = sys.argv[1:]
    serve(file, folders, calls, send)

if __name__ == "__main__":
    main()
