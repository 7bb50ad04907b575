import itertools
import time

import pytest

METHODS = [*(("smollm2", "", policy) for policy in ("sinks", "heavy", "snap", "distinct")),
           *(("smollm2", "8", policy) for policy in ("snap", "distinct")),
           *((model, "8", "distinct") for model in ("out/eight", "out/cla", "out/narrow", "out/top"))]

@pytest.fixture
def recall_rows():
    """Rows of the study of recall: of ten prompts of each depth and needles, 6, 7, 8 and 9 right."""
    cases = itertools.product(METHODS, (100, 60, 40, 25), ("known", "unknown"), (10, 50), (1, 4))
    counts = itertools.cycle([6, 7, 8, 9])
    rows = []
    for (model, bits, policy), ratio, question, depth, needles in cases:
        kept = policy if ratio < (50 if bits else 100) else ""
        size = min(10 * ratio, 530) if bits else 10 * ratio
        rows.append(dict(model=model, share_kind="", policy=kept, bits=bits, length=512, ratio=ratio,
                         full_bytes=1000, cache_bytes=size, question=question, depth=depth,
                         needles=needles, prompts=10, right=next(counts)))
    once = {tuple(row[name] for name in row if name != "right"): row for row in rows}
    return [*once.values()]                                 # all tokens: measured once for all policies

@pytest.fixture
def half_a_second(monkeypatch):
    """Whatever the benchmark times is done once, and took half a second."""
    from minisa.lab import bench, peers
    for module in (bench, peers):
        monkeypatch.setattr(module, "timed", lambda f, where, at_least=0.05: (f(), 0.5)[1])
    monkeypatch.setattr(bench, "reader", lambda where: int)             # nothing large is read
    monkeypatch.setattr(bench, "in_cache", lambda n_bytes, where: True)
    monkeypatch.setattr(bench, "PAUSE", 0)
    monkeypatch.setattr(time, "perf_counter", itertools.count(step=0.5).__next__)
