"""minisa: a small GPT that teaches Shared Attention. Read plain.py, then model.py."""

def __getattr__(name):
    if name == "load":                      # late, so that `import minisa` does not wait for torch
        from minisa.checkpoint import load
        return load
    raise AttributeError(f"module 'minisa' has no attribute '{name}'")
