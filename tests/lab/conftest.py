import itertools
import time

import pytest

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
