"""A small GPT that teaches Shared Attention. Read plain.py, decode.py, model.py and cost.py."""

import sys

def quiet(kind, *rest, others=sys.excepthook):
    """Ctrl-C needs no traceback, even while torch is being imported."""
    if kind is not KeyboardInterrupt:
        others(kind, *rest)

sys.excepthook = quiet

def __getattr__(name):
    if name == "load":                      # late, so that `import minisa` does not wait for torch
        from minisa.kit.checkpoint import load
        return load
    raise AttributeError(f"module 'minisa' has no attribute '{name}'")
