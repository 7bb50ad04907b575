"""Flags and one-line errors: what all commands have in common."""

import argparse
import math
import os
import sys

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
                          help=f"{help} (default {shown})".replace("%", "%%"))

    def switch(self, name, help):
        """Add --name, which takes no value."""
        self.add_argument(f"--{name}", action="store_true", help=f"{help} (default off)")

def at_least(kind, lowest):
    """A type for a flag: int or float, finite, not below lowest."""
    def parse(text):
        value = kind(text)
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {lowest} up")
        return value
    parse.__name__ = kind.__name__
    return parse

count, amount = at_least(int, 1), at_least(float, 0.0)

def device(name):
    """A type for a flag: a torch.device that this machine has, and that can compute."""
    import torch
    try:
        x = torch.ones(2, device=name)
        (x + x).sum().item()                            # a card may be too old for this torch
        return x.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).partition("\n")[0][:80]
        why = f"{name} is not on this machine, or cannot compute ({why}); take another, such as cpu"
        raise argparse.ArgumentTypeError(why) from None

def picture(name):
    """A type for a flag: the name of a picture to write."""
    if not name.endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{name} must end in .png, .svg or .pdf")
    return output(name)

def output(name):
    """A type for a flag: the name of a file to write."""
    if name.endswith("/") or os.path.isdir(name):
        raise argparse.ArgumentTypeError(f"{name} is a folder; name a file in it")
    return name

def prompt(text):
    """A type for a flag: a text; - means that of standard input, FILE:NAME that of a file."""
    try:
        if text == "-":
            text = sys.stdin.buffer.read().decode()
        elif text.startswith("FILE:"):
            with open(text[5:], encoding="utf-8") as file:
                text = file.read()
        text.encode()                                   # a flag can hold bytes that are no UTF-8
    except OSError as error:
        why = f"{text}: {error.strerror}; name a readable file"
        raise argparse.ArgumentTypeError(why) from None
    except UnicodeError:
        why = "not UTF-8 text; convert it first, for instance with iconv"
        raise argparse.ArgumentTypeError(why) from None
    if not text:
        raise argparse.ArgumentTypeError("is empty; give at least one character")
    return text

def command(main):
    """Run a command's main(). What the user can mend becomes one line on stderr, and status 2."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                           # the reader of our output, such as head, left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        message = str(error)
    except RuntimeError as error:                      # torch has no class for a CPU without memory
        if "memory" not in str(error):
            raise
        first = str(error).splitlines()[0]
        message = f"out of memory: {first}; take a smaller --batch_size, --block_size or model"
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    sys.exit(2)
