"""minisa: a small GPT that teaches Shared Attention. Read model.py first; here is only what the commands have in common."""

import argparse
import math
import os
import sys


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag raises ValueError, which command() prints in one line."""

    def __init__(self, doc, usage):
        super().__init__(usage=usage, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise ValueError(f"{message}; see --help")


def at_least(kind, lowest):
    """A type for a flag: int or float, finite, not below lowest."""
    def parse(text):
        value = kind(text)
        if not lowest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {lowest} up")
        return value
    parse.__name__ = kind.__name__
    return parse


def device(name):
    """A type for a flag: a torch.device that this machine has."""
    import torch
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name} is not on this machine") from None


count, amount = at_least(int, 1), at_least(float, 0.0)


def command(main):
    """Run a script's main(). What the user can mend becomes one line on stderr and exit status 2, without a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:                             # the reader of our output, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        message = str(error)
    except RuntimeError as error:                       # torch has no class of its own for a CPU that is out of memory
        if "memory" not in str(error):
            raise
        message = f"out of memory: {str(error).splitlines()[0]}; take a smaller --batch_size, --block_size or model"
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    sys.exit(2)
