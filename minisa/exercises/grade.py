"""Grading: the cases of check.py, put to answers that run in a program of their own (child.py).

What is expected stays here. The child gets the arguments of one case after the other, and what it sends back
is judged here. It imports torch once for a whole file, in the same way on all systems, and is started anew
only when an answer hung or ended it; so that costs its own points and no others.
"""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from minisa.exercises import child

SECONDS = 20                    # that an exercise may take, or the file to be imported
START = 120                     # that Python and torch may take to start
LONGEST = 2**24                 # bytes of a result

class Ended(Exception):
    """There will be no answer. Its text says why."""

# ---- the process ----

def hidden_folders():
    """What answers must not read: minisa, and its tests."""
    package = Path(__file__).resolve().parents[1]
    return [str(package), str(package.parent / "tests")]

class Pupil:
    """A file of answers, in a process of its own while a `with` lasts."""

    def __init__(self, file, quiet=False):
        self.file, self.quiet = os.path.abspath(file), quiet
        self.process = None
        self.broken = ""                # why no answer of this file can run
        if not Path(file).is_file():
            self.broken = f"{Path(file).name} is not a file"

    def __enter__(self):
        if not self.broken:
            self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        words = [sys.executable, "-P", child.__file__, self.file, *hidden_folders()]
        errors = subprocess.DEVNULL if self.quiet else None
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                        env=environment)
        self.ready = False

    def stop(self):
        process, self.process = self.process, None
        if process:
            process.kill()
            process.wait()
            for pipe in process.stdin, process.stdout:
                with contextlib.suppress(OSError):
                    pipe.close()

    def receive(self, deadline):
        """→ the next result. Raises Ended, and then the process is gone."""
        alarm = threading.Timer(deadline - time.monotonic(), self.process.kill)
        alarm.start()
        line = self.process.stdout.readline(LONGEST)
        alarm.cancel()
        with contextlib.suppress(ValueError, RecursionError):
            result = json.loads(line)
            if isinstance(result, dict):
                return result
        self.stop()
        if time.monotonic() > deadline:
            raise Ended(f"took more than {SECONDS} seconds")
        raise Ended("it wrote into the grader's pipe" if line else "it ended Python")

    def load(self):
        """Have the file imported. Raises Ended, now and at every later call, if that fails."""
        if self.broken:
            raise Ended(self.broken)
        if not self.process:
            self.start()
        if self.ready:
            return
        name = Path(self.file).name
        try:
            self.receive(time.monotonic() + START)
            result = self.receive(time.monotonic() + SECONDS)
            if "error" in result:
                self.broken = f"{name} does not run: {result['error']}"
        except Ended as why:
            self.broken = f"{name} does not run: {why}"
        if self.broken:
            raise Ended(self.broken)
        self.ready = True

    def exercise(self, name):
        """→ ask(arguments) → what the answer to this exercise does, for SECONDS in all. Raises Ended."""
        self.load()
        deadline = time.monotonic() + SECONDS

        def ask(arguments):
            line = as_sent({"call": name, "arguments": arguments})
            with contextlib.suppress(OSError):              # the process is gone: receive() says so
                self.process.stdin.write(line.encode() + b"\n")
                self.process.stdin.flush()
            return self.receive(deadline)
        return ask

def as_sent(content):
    """→ JSON, with tensors as child.unpacked() reads them."""
    return json.dumps(content, default=lambda t: {"shape": list(t.shape), "numbers": t.tolist()})

def interrupt(thread):
    """Raise KeyboardInterrupt in a thread, also where a process ignores Ctrl-C, as in the background."""
    error = ctypes.py_object(KeyboardInterrupt)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

def here(answer):
    """→ ask(arguments) of a function in this process, for tests and notebooks. One that does not end is
    interrupted."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", "")

    def ask(arguments):
        alarm = threading.Timer(SECONDS, interrupt, [threading.get_ident()])
        alarm.start()
        try:
            given = json.loads(as_sent(arguments), object_hook=child.unpacked)      # copies, as in the child
            return child.call(answer, given, file)
        except KeyboardInterrupt:
            raise Ended(f"was interrupted; a case may take {SECONDS} seconds") from None
        finally:
            alarm.cancel()
    return ask

# ---- points ----

@dataclass
class Group:
    """Cases of an exercise that earn points together."""
    name: str
    of: int                         # points, if all of them are right
    wrong: str | None = None        # the first thing that is

    @property
    def points(self):
        return 0 if self.wrong else self.of

@dataclass
class Result:
    """What an exercise earned."""
    name: str
    groups: list

    @property
    def points(self):
        return sum(group.points for group in self.groups)

    @property
    def of(self):
        return sum(group.of for group in self.groups)

    @property
    def wrong(self):
        """The first thing that is wrong, or None."""
        return next((group.wrong for group in self.groups if group.wrong), None)

def grade(exercise, ask):
    """Put all cases of an exercise to an answer → a Result. A group has its points if all its cases are
    right; after an answer that hangs or ends Python, the groups to come have none."""
    from minisa.exercises import check, judge
    groups = {name: Group(name, of) for name, of in check.EXERCISES[exercise].items()}
    for number, case in enumerate(check.cases(exercise), start=1):
        group = groups[case.group]
        if group.wrong:
            continue
        try:
            why = judge.judge(case, ask(case.values))
        except (Ended, NotImplementedError) as error:
            rest = list(groups.values())
            for later in rest[rest.index(group):]:
                later.wrong = str(error)
            break
        if why:
            group.wrong = f"case {number} ({group.name}): {why}"
    return Result(exercise.__name__, list(groups.values()))

def grade_file(file, only=None, quiet=False):
    """Yield the Result of each exercise of a file of answers, or of `only` one."""
    with Pupil(file, quiet) as pupil:                       # torch is imported there while it is here
        from minisa.exercises import check
        for exercise, groups in check.EXERCISES.items():
            if only not in (None, exercise.__name__):
                continue
            try:
                yield grade(exercise, pupil.exercise(exercise.__name__))
            except Ended as why:
                nothing = [Group(name, of, str(why)) for name, of in groups.items()]
                yield Result(exercise.__name__, nothing)

def exercise_named(name):
    """→ an exercise of check.py. Raises ValueError if there is none of this name."""
    from minisa.exercises import check
    if name not in check.NAMES:
        raise ValueError(f"--only={name}: is none of {', '.join(check.NAMES)}")
    return getattr(check, name)
