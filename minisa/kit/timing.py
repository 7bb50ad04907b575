"""How fast something is, and the most that this machine's memory allows."""

import time

import torch

SMALL = 2**22           # bytes that the cache of any processor holds
LARGE = 2**28           # bytes, more than the cache of nearly any processor
IN_CACHE = 2.0          # what is read this many times as fast as main memory is in the cache

def timed(f, where, at_least=0.05):
    """Seconds per call of f() on the device `where`, over as many calls as fill at_least seconds."""
    calls, elapsed, begun = 0, 0.0, time.perf_counter()
    while elapsed < at_least:
        f()
        if where.type != "cpu":
            torch.accelerator.synchronize(where)
        calls, elapsed = calls + 1, time.perf_counter() - begun
    return elapsed / calls

def reader(where, n_bytes=LARGE):
    """→ a function that reads the same n_bytes on a device each time it is called."""
    return torch.ones(n_bytes // 4, device=where).sum

def in_cache(n_bytes, where):
    """Whether this many bytes, read over and over, come from the processor's cache."""
    if not SMALL < n_bytes < LARGE:                     # reading less would time starting to read
        return n_bytes <= SMALL
    speed, memory = (max(n / timed(reader(where, n), where, 0.03) for _ in range(3))
                     for n in (n_bytes, LARGE))
    return speed > IN_CACHE * memory

def share_of_limit(read_bytes, seconds, where):
    """The fraction of a step's time in which main memory could have delivered what the step read; None if
    that fits into the processor's cache."""
    if in_cache(read_bytes, where):
        return None
    return read_bytes / LARGE * timed(reader(where), where) / seconds
