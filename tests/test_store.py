"""Stored caches: what comes back is what was computed, or it is computed anew; whatever happens to the files."""

import os
import random
import signal
import time

import pytest
import torch

from minisa import store as store_module
from minisa.eigen import compress
from minisa.model import GPT, GPTConfig, KVCache
from minisa.store import BLOCK, Damaged, Store


def make(seed=0, **mode):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(block_size=400, vocab_size=50, n_layer=3, n_head=2, n_embd=16, n_hidden=16), **mode})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.25)
    return model


def tokens(n, seed=1):
    return torch.randint(50, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def read(model, store, history):
    """Read a history through the store, as a chat does → logits after its last token, how many tokens were reused, the cache."""
    while True:
        cache = store.load(history)
        reused = cache.length
        try:
            for part in torch.tensor([history[reused:]]).split(min(100, store.size), dim=1):
                logits, _ = model(part, cache=cache)
            return logits[0, -1], reused, cache
        except Damaged:
            continue


@torch.no_grad()
def fresh(model, history, size=400):
    cache = KVCache(model.config, 1, size, model.embed.weight.dtype)
    for part in torch.tensor([history]).split(100, dim=1):
        logits, _ = model(part, cache=cache)
    return logits[0, -1]


def same(a, b):
    return torch.allclose(a.float(), b.float(), atol=2e-2 if a.dtype == torch.bfloat16 else 1e-4)


def remember(model, folder, history, **limits):
    """A process that reads a history, stores it and ends."""
    store = Store(model, folder, **limits)
    _, _, cache = read(model, store, history)
    store.save(history, cache)
    store.close()


MODES = [dict(), dict(share="0-1"), dict(share="0-2", share_kind="kv"), dict(share="0-1", heads="mix"), dict(share="1-2", share_rank=2), dict(n_kv_head=1)]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("folder", [True, False], ids=["disk", "memory"])
def test_a_history_is_reused_and_the_answer_is_the_same(mode, folder, tmp_path):
    model, history = make(**mode), tokens(300)
    store = Store(model, tmp_path if folder else None)
    _, reused, cache = read(model, store, history[:200])
    assert reused == 0
    store.save(history[:200], cache)
    if folder:                                          # a new process
        store.close()
        store = Store(model, tmp_path)
    logits, reused, _ = read(model, store, history)
    assert reused == 200 // BLOCK * BLOCK and same(logits, fresh(model, history))


def test_narrow_keys_and_bfloat16_come_back_too(tmp_path):
    for i, model in enumerate((compress(make(), torch.tensor([tokens(60)]), rank=3), make().bfloat16())):
        remember(model, tmp_path / str(i), tokens(200))
        logits, reused, cache = read(model, Store(model, tmp_path / str(i)), tokens(200))
        assert reused == 192 and same(logits, fresh(model, tokens(200))) and cache.k[0].dtype == model.embed.weight.dtype


def test_an_edited_history_reuses_what_comes_before_the_edit(tmp_path):
    model, history = make(), tokens(300)
    remember(model, tmp_path, history)
    edited = history[:150] + [(history[150] + 1) % 50] + history[151:]
    logits, reused, _ = read(model, Store(model, tmp_path), edited)
    assert reused == 128 and same(logits, fresh(model, edited))
    assert read(model, Store(model, tmp_path), history[:100])[1] == 64


def test_another_model_config_or_window_finds_nothing(tmp_path):
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    assert read(model, Store(model, tmp_path), history)[1] == 192
    other = make()
    with torch.no_grad():
        other.blocks[1].mlp.down.weight[0, 0] += 1e-3       # one number
    for stranger, size in ((other, None), (make(seed=1), None), (make(share="0-1"), None), (model, 300), (make().bfloat16(), None)):
        logits, reused, _ = read(stranger, Store(stranger, tmp_path, size=size), history)
        assert reused == 0


@pytest.mark.parametrize("size, n, known", [(128, 200, 192), (128, 500, 448), (100, 330, 192), (64, 200, 0)])      # a block is lost if it wraps within a turn
def test_a_history_longer_than_the_window_stays_valid(tmp_path, size, n, known):
    model, history = make(), tokens(n + 10)
    store = Store(model, tmp_path, size=size)
    cache = store.load(history[:n])
    with torch.no_grad():
        for token in history[:n]:
            model(torch.tensor([[token]]), cache=cache)
            if cache.length % 50 == 0:                  # turns
                store.save(history[:cache.length], cache)
        store.save(history[:n], cache)
        store.close()
        expected = [model(torch.tensor([[token]]), cache=cache)[0][0, 0] for token in history[n:]][-1]
    logits, reused, _ = read(model, Store(model, tmp_path, size=size), history)
    assert reused == known and same(logits, expected)


def test_conversations_share_what_they_have_in_common(tmp_path):
    model, store = make(), Store(make(), tmp_path)
    first, second = tokens(128) + tokens(100, 2), tokens(128) + tokens(100, 3)
    store.save(first, read(model, store, first)[2])
    logits, reused, cache = read(model, store, second)
    assert reused == 128 and same(logits, fresh(model, second))
    store.save(second, cache)
    store.close()
    assert len(list(tmp_path.glob("*.kv"))) == 2 + 1 + 1


def test_both_tiers_keep_their_limits_and_let_the_least_recently_used_go(tmp_path):
    model = make()
    store = Store(model, tmp_path)
    limits = dict(memory=3 * store.file_bytes, disk=5 * store.file_bytes)
    store = Store(model, tmp_path, **limits)
    for seed in (1, 2, 3, 1, 4):                            # 3 blocks each; 1 is used once more
        history = tokens(3 * BLOCK + 1, seed)
        store.save(history, read(model, store, history)[2])
        store.background.submit(int).result()
        assert len(store.memory) <= 3 and len(list(tmp_path.glob("*.kv"))) <= 5
        time.sleep(0.02)
    store.close()
    found = [read(model, Store(model, tmp_path, **limits), tokens(3 * BLOCK + 1, seed))[1] for seed in (1, 2, 3, 4)]
    assert found[3] == 3 * BLOCK and found[1] == found[2] == 0 and found[0] == 2 * BLOCK      # the later blocks of 1 went first


def test_layers_arrive_while_earlier_ones_compute(tmp_path, monkeypatch):
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    events, layer_of, write = [], store_module.Block.layer, store_module.StoredCache.write

    def slow(self, layer):
        time.sleep(0.01)
        events.append(("arrived", layer))
        return layer_of(self, layer)

    def attend(self, layer, tensors, new):
        out = write(self, layer, tensors, new)
        events.append(("computed", layer))
        return out
    monkeypatch.setattr(store_module.Block, "layer", slow)
    monkeypatch.setattr(store_module.StoredCache, "write", attend)
    logits, reused, _ = read(model, Store(model, tmp_path), history)
    assert reused == 192 and same(logits, fresh(model, history))
    assert events.index(("computed", 0)) < events.index(("arrived", 2))


def harm(raw, rng):
    """Cut or alter a file at random."""
    kind, at = rng.randrange(5), rng.randrange(len(raw))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
    if kind == 2:
        return raw[:at] + rng.randbytes(rng.randrange(1, 100)) + raw[at:]
    if kind == 3:
        return bytes(len(raw))
    n = rng.randrange(1, 500)
    return raw[:at] + rng.randbytes(len(raw[at:at + n])) + raw[at + n:]


def test_a_thousand_files_cut_or_altered_give_no_wrong_answer(tmp_path):
    model, history, rng = make(), tokens(200), random.Random(0)
    expected = fresh(model, history)
    remember(model, tmp_path, history)
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.kv")}
    store, reused_at_all = Store(model, tmp_path, memory=1), 0
    for i in range(1000):
        path = rng.choice(sorted(whole))
        path.write_bytes(harm(whole[path], rng))
        logits, reused, _ = read(model, store, history)
        assert same(logits, expected) and reused < 192 and not path.exists(), i
        reused_at_all += reused > 0
        path.write_bytes(whole[path])
    assert reused_at_all > 300 and read(model, store, history)[1] == 192


def test_a_damaged_layer_reaches_neither_tier(tmp_path):
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    store = Store(model, tmp_path)
    path = store.path(store.names(history)[1])
    raw = bytearray(path.read_bytes())
    raw[store.parts[1][0] + 5] ^= 1                         # layer 1 of 3 of the second block
    path.write_bytes(raw)
    logits, reused, cache = read(model, store, history)
    assert reused == 64 and same(logits, fresh(model, history))
    store.reader.submit(int).result()
    assert store.names(history)[1] not in store.memory and store.path(store.names(history)[2]).exists()
    store.save(history, cache)
    assert read(model, store, history)[1] == 192


def test_files_of_others_are_not_used(tmp_path):
    model, history = make(), tokens(100)
    remember(model, tmp_path, history)
    remember(model, tmp_path / "other", tokens(100, 2))
    (path,), (other,) = tmp_path.glob("*.kv"), (tmp_path / "other").glob("*.kv")
    path.write_bytes(path.read_bytes()[:32] + other.read_bytes()[32:])          # another conversation under our name
    logits, reused, _ = read(model, Store(model, tmp_path), history)
    assert reused == 0 and same(logits, fresh(model, history))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_two_hundred_kills_while_saving_leave_whole_files_or_none(tmp_path):
    model, rng = make(), random.Random(0)
    history = tokens(321)
    expected = fresh(model, history)
    store = Store(model, tmp_path / "source")
    store.save(history, read(model, store, history)[2])
    store.close()
    blocks, found = sorted((tmp_path / "source").glob("*.kv")), []
    contents, folder = [(path.name, path.read_bytes()) for path in blocks], tmp_path / "store"
    for i in range(200):
        if i % 20 == 0:                                     # from empty again
            for path in folder.glob("*"):
                path.unlink()
        folder.mkdir(exist_ok=True)
        child = os.fork()
        if child == 0:                                      # what the background thread does, for ever
            try:
                while True:
                    for name, data in contents:
                        store.write(folder / name, data)
                        if rng.random() < 0.3:
                            os.unlink(folder / name)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert all(path.read_bytes() == dict(contents)[path.name] for path in folder.glob("*.kv"))
        logits, reused, _ = read(model, Store(model, folder), history)
        assert same(logits, expected)
        found.append(reused)
    assert len(set(found)) > 1                              # killed at different moments


def test_two_stores_may_use_one_folder(tmp_path):
    model = make()
    stores = [Store(model, tmp_path, disk=4 * Store(model).file_bytes, memory=1) for _ in range(2)]
    for turn in range(12):                                  # each lets go of what the other has just written
        for i, store in enumerate(stores):
            history = tokens(200, 10 * (turn % 3) + i)
            logits, _, cache = read(model, store, history)
            assert same(logits, fresh(model, history))
            store.save(history, cache)


def test_a_disk_that_is_full_stops_the_saving_only(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    model, history = make(), tokens(200)
    store = Store(model, tmp_path)
    store.save(history, read(model, store, history)[2])
    assert read(model, store, history)[1] == 192            # from memory
    store.close()
    assert "could not be written (No space left on device)" in store.trouble and not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    model = make()
    for name, age in (("old.kv.x1", 7200), ("new.kv.x2", 0)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    Store(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new.kv.x2"]


def test_what_cannot_be_a_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--store=.*no folder that can be written"):
        Store(make(), tmp_path / "file")
    with pytest.raises(ValueError, match="--context=63"):
        Store(make(), size=63)
