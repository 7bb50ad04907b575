"""minisa: a small GPT that teaches Shared Attention. Read plain.py, then model.py."""

import sys

# Ctrl-C while torch is being imported; later cli.command() sees to it
sys.excepthook = lambda kind, *rest: kind is KeyboardInterrupt or sys.__excepthook__(kind, *rest)

def __getattr__(name):
    if name == "load":                      # late, so that `import minisa` does not wait for torch
        from minisa.checkpoint import load
        return load
    raise AttributeError(f"module 'minisa' has no attribute '{name}'")
