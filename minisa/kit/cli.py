"""Flags and one-line errors: what all commands have in common."""

import argparse
import dataclasses
import inspect
import os
import re
import sys
from typing import get_args

from minisa.kit.files import read_file, refuse_unwritable

LONGEST = 2**20         # characters of a prompt
DTYPES = "float32", "bfloat16"
NO_MEMORY = re.compile("(out of|not enough|allocate) memory")   # in a RuntimeError of torch

class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag raises ValueError, which command() prints in one line."""

    def __init__(self, doc, usage):
        super().__init__(usage=usage, description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise ValueError(f"{message}; see --help")

    def flag(self, name, kind=str, default=None, help="", shown=None, choices=None):
        """Add --name=VALUE. Its help ends with the default: `shown`, where that says it better."""
        shown = repr(default) if shown is None else shown
        self.add_argument(f"--{name}", type=kind, default=default, choices=choices,
                          metavar=None if choices else kind.__name__.upper(),
                          help=f"{help} (default: {shown})".replace("%", "%%"))

    def switch(self, name, help, default=False):
        """Add --name, which takes no value."""
        self.add_argument(f"--{name}", action="store_true", default=default, help=f"{help} (default: off)")

def at_least(kind, lowest, highest=None):
    """A type for a flag: int or float, from lowest to highest (None: 2^31 - 1, or 1e18)."""
    highest = (2**31 - 1 if kind is int else 1e18) if highest is None else highest

    def parse(text):
        value = kind(text)
        if not value >= lowest:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {lowest} up")
        if value > highest:
            raise argparse.ArgumentTypeError(f"{text[:20]} is more than {highest}")
        return value
    parse.__name__ = kind.__name__
    return parse

count, whole, amount = at_least(int, 1), at_least(int, 0), at_least(float, 0.0)

def one_of(*choices):
    """A type for a flag: one of some words. (For a single word, Parser.flag() has choices.)"""
    def parse(text):
        if text not in choices:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {', '.join(choices)})")
        return text
    parse.__name__ = "name"
    return parse

def read_settings(settings, words=None, doc="", usage="", on_gpu=()):
    """Words of a command line, or those that Python was given → {name: value} of the flags among them.

    There is a flag for each field of the dataclass `settings`. The field's type reads the value, and the
    comment in its line is the help; it may end in "; default: …", to say the default in words.
    on_gpu: the defaults that differ on a GPU.
    """
    parser = Parser(doc, usage)
    helps = dict(re.findall(r"^    (\w+): .*?# (.*)$", inspect.getsource(settings), re.MULTILINE))
    for field in dataclasses.fields(settings):
        name, choices = field.name, get_args(field.type)
        help, _, in_words = helps[name].partition("; default: ")
        shown = in_words or repr(field.default)
        if name in on_gpu:
            shown += f", on a GPU {on_gpu[name]!r}"
        if field.type is bool:
            parser.switch(name, help, argparse.SUPPRESS)    # no value where the flag is not given
        else:
            kind = str if choices else field.type           # choices: of a Literal
            parser.flag(name, kind, argparse.SUPPRESS, help, shown, choices or None)
    return vars(parser.parse_args(words))

def several(kind):
    """A type for a flag: values of a kind, with commas between them."""
    def parse(text):
        return [kind(part) for part in text.split(",")]
    parse.__name__ = kind.__name__
    return parse

def device(name):
    """A type for a flag: a torch.device that this machine has, and that can compute."""
    import torch
    try:
        x = torch.ones(2, device=name)
        (x + x).sum().item()                            # a card may be too old for this torch
        return x.device
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0][:80]
        why = f"{name} is not on this machine, or cannot compute ({why}); take another, such as cpu"
        raise argparse.ArgumentTypeError(why) from None

def add_model(parser):
    parser.add_argument("model", metavar="MODEL", help="a run's or model's folder, a .gguf file, or smollm2, "
                        "which is downloaded once")

def add_models(parser):
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders of runs or models, .gguf files, "
                        "or smollm2, which is downloaded once; the first is the one to compare with")

def add_device(parser):
    parser.flag("device", device, "cpu", "cpu, cuda, cuda:1 or mps")

def add_dtype(parser, help="number format of weights and cache", default="float32", shown=None):
    parser.flag("dtype", str, default, help, shown, choices=DTYPES)

def output(*endings):
    """A type for a flag: the name of a file to write, with one of these endings. A table can also go to a
    device, such as /dev/stdout; a picture's ending says what kind it is."""
    def parse(name):
        is_device = endings == (".csv",) and name.startswith("/dev/")
        if not name.endswith(endings) and not is_device:
            raise argparse.ArgumentTypeError(f"{name} must end in {' or '.join(endings)}")
        if os.path.isdir(name):
            raise argparse.ArgumentTypeError(f"{name} is a folder; name a file in it")
        refuse_unwritable(name)
        return name
    parse.__name__ = "file"
    return parse

picture, table = output(".png", ".svg", ".pdf"), output(".csv")

def prompt(text):
    """A type for a flag: a text; - stands for standard input, FILE:NAME for the content of a file."""
    try:
        if text == "-":
            text = sys.stdin.buffer.read(LONGEST + 1).decode()
        elif text.startswith("FILE:"):
            text = read_file(text[5:], LONGEST).decode()
    except UnicodeError:
        why = "not UTF-8 text; convert it first, for instance with iconv"
        raise argparse.ArgumentTypeError(why) from None
    if not 0 < len(text) <= LONGEST:
        raise argparse.ArgumentTypeError(f"has {len(text):,} characters; give 1 to {LONGEST:,}")
    return text

def silence():
    """Print nothing more: the reader of our output, such as head, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

def open_streams():
    """Open the standard streams that are closed when the program starts."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    sys.stdout.reconfigure(errors="backslashreplace")       # where a terminal lacks a character

def printable(text):
    """A text → the same, with line ends and other characters that a terminal would obey spelled out."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)

def explain(error):
    """An error that the user can fix → one line. Raises any other."""
    if isinstance(error, ValueError):
        message = str(error)
    elif isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    elif isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        first = str(error).partition("\n")[0]
        message = f"out of memory: {first}; take a smaller --batch_size, --block_size or model"
    else:
        raise error
    return printable(message.replace("\n", " "))

def command(main):
    """Run a command's main(). What the user can fix becomes one line on stderr, and status 2; for those who
    change the code, MINISA_TRACEBACK=1 shows where it was raised."""
    try:
        open_streams()
        odd = [word for word in sys.argv if re.search("[\ud800-\udfff]", word)]
        if odd:
            raise ValueError(f"{odd[0]!a}: not UTF-8 text; write it in UTF-8, or rename the file")
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        silence()
        sys.exit(0)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        if os.environ.get("MINISA_TRACEBACK"):
            raise
        message = explain(error)
    folder, program = os.path.split(sys.argv[0])
    program = os.path.basename(folder) if program == "__main__.py" else program
    print(f"{program}: error: {message}", file=sys.stderr)
    sys.exit(2)
