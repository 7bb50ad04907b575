"""Stored caches: what comes back is what was computed, or is computed anew, whatever happens to the files."""

import os
import random
import signal
import time

import pytest
import torch

from minisa import decode
from minisa.axes import eigen, heads, lowrank
from minisa.axes.store import BLOCK, DIGEST, Damaged, Disk, Store, StoredCache
from minisa.kit.checkpoint import changes
from minisa.model import GPT, GPTConfig, KVCache

SHAPE = dict(block_size=400, vocab_size=50, n_layer=3, n_head=2, n_embd=16, n_hidden=16)

def stir(model):
    """Move the numbers of a model far from their small initial values."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.25)
    return model

def make(seed=0, **mode):
    torch.manual_seed(seed)
    return stir(GPT(GPTConfig(**SHAPE | mode)).eval())

def tokens(n, seed=1):
    return torch.randint(50, (n,), generator=torch.Generator().manual_seed(seed)).tolist()

def narrow():
    return eigen.compress(make(share="1-2"), torch.tensor([tokens(60)]), rank=3)

def changed(technique):
    """A model of each axis, with other numbers than it starts with."""
    if technique == "eigen":
        return narrow()
    if technique == "lowrank":
        return stir(lowrank.correct(make(), "1-2", 2))
    return stir(heads.share(make(), "0-1", technique))

@torch.no_grad()
def read(model, store, history):
    """Read a history through the store, as a chat does → logits after its last token, how many tokens were
    reused, the cache."""
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
    cache = KVCache(model, 1, size)
    for part in torch.tensor([history]).split(100, dim=1):
        logits, _ = model(part, cache=cache)
    return logits[0, -1]

def same(a, b):
    return torch.allclose(a.float(), b.float(), atol=2e-2 if a.dtype == torch.bfloat16 else 1e-4)

def remember(model, folder, history, **limits):
    """A process that reads a history, stores it and ends."""
    store = Store(model, folder, **limits)
    store.save(history, read(model, store, history)[2])
    store.close()

def file_bytes(model, folder):
    """Bytes of a block's file."""
    return Store(model, folder).disk.starts[-1]

def settle(store):
    """Wait until what the store does in the background is done."""
    store.reader.submit(int).result()
    store.background.submit(int).result()

def held(store):
    return list(store.memory)

# ---- what comes back ----

MODELS = {
    "full": make,
    "weights": lambda: make(share="0-1"),
    "kv": lambda: make(share="0-2", share_kind="kv"),
    "one kv head": lambda: make(n_kv_head=1),
    "match": lambda: changed("match"),
    "mix": lambda: changed("mix"),
    "lowrank": lambda: changed("lowrank"),
    "eigen": narrow,
    "bfloat16": lambda: make().bfloat16(),
}

@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("folder", [True, False], ids=["disk", "memory"])
def test_a_history_is_reused_and_the_answer_is_the_same(kind, folder, tmp_path):
    model, history = MODELS[kind](), tokens(300)
    store = Store(model, tmp_path if folder else None)
    _, reused, cache = read(model, store, history[:200])
    assert reused == 0
    store.save(history[:200], cache)
    if folder:                                          # a new process
        store.close()
        store = Store(model, tmp_path)
    logits, reused, cache = read(model, store, history)
    assert reused == 200 // BLOCK * BLOCK and same(logits, fresh(model, history))
    assert cache.k[0].dtype == model.embed.weight.dtype

def test_text_goes_on_in_numpy_from_what_was_loaded(tmp_path):
    model, history = make(share="0-1"), tokens(200)
    remember(model, tmp_path, history)
    _, reused, cache = read(model, Store(model, tmp_path), history)
    assert reused == 192 and decode.handles(model, cache)
    decode.Decoder(model, cache).step(7)
    assert cache.length == 201

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
    for stranger in (other, make(seed=1), make(share="0-1"), make().bfloat16()):
        assert read(stranger, Store(stranger, tmp_path), history)[1] == 0
    assert read(model, Store(model, tmp_path, size=300), history)[1] == 0

def test_what_axes_changed_is_part_of_the_model(tmp_path):
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    assert Store(model).root == Store(make()).root
    model.changes = [{"by": "heads", "settings": {"heads": "match"}}]       # with the same tensors
    assert changes(model) and read(model, Store(model, tmp_path), history)[1] == 0

# a block is lost if it wraps within a turn
@pytest.mark.parametrize("size, n, known", [(128, 200, 192), (128, 500, 448), (100, 330, 192), (64, 200, 0)])
def test_a_history_longer_than_the_window_stays_valid(tmp_path, size, n, known):
    model, history = make(), tokens(n + 10)
    store = Store(model, tmp_path, size=size)
    cache = store.load(history[:n])
    with torch.no_grad():
        for token in history[:n]:
            model(torch.tensor([[token]]), cache=cache)
            if cache.length % 50 == 0:                      # turns
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
    size = file_bytes(model, tmp_path)
    limits = dict(memory=3 * Store(model).block_bytes, disk=5 * size)
    store = Store(model, tmp_path, **limits)
    for seed in (1, 2, 3, 1, 4):                            # 3 blocks each; 1 is used once more
        history = tokens(3 * BLOCK + 1, seed)
        store.save(history, read(model, store, history)[2])
        settle(store)
        assert len(held(store)) <= 3 and len(list(tmp_path.glob("*.kv"))) <= 5
        time.sleep(0.02)
    store.close()
    names = {seed: store.names(tokens(3 * BLOCK + 1, seed)) for seed in (1, 2, 3, 4)}
    assert set(held(store)) == set(names[4])
    found = [read(model, Store(model, tmp_path, **limits), tokens(3 * BLOCK + 1, seed))[1] for seed in names]
    assert found == [2 * BLOCK, 0, 0, 3 * BLOCK]            # the later blocks of 1 went first

def test_layers_arrive_while_earlier_ones_compute(tmp_path, monkeypatch):
    from threading import Event
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    computed, from_disk, remember_new = Event(), Disk.read, StoredCache.remember

    def patient(self, name, layer):
        assert layer < 2 or computed.wait(20)               # layer 2 comes after layer 0 has computed
        return from_disk(self, name, layer)

    def attend(self, name, layer, new):
        out = remember_new(self, name, layer, new)
        computed.set()
        return out
    monkeypatch.setattr(Disk, "read", patient)
    monkeypatch.setattr(StoredCache, "remember", attend)
    logits, reused, _ = read(model, Store(model, tmp_path), history)
    assert reused == 192 and same(logits, fresh(model, history))

def test_a_block_is_written_once_and_while_the_chat_goes_on(tmp_path, monkeypatch):
    from threading import Event
    model, history, go, written, write = make(), tokens(300), Event(), [], Disk.write

    def patient(self, name, block):
        assert go.wait(20)
        written.append(name)
        write(self, name, block)
    monkeypatch.setattr(Disk, "write", patient)
    store = Store(model, tmp_path)
    store.save(history[:200], read(model, store, history[:200])[2])
    assert not written and read(model, store, history[:200])[1] == 192          # from memory, meanwhile
    go.set()
    settle(store)
    store.save(history, read(model, store, history)[2])
    store.close()
    assert written == store.names(history)

def test_what_came_from_disk_comes_from_memory_the_next_time(tmp_path, monkeypatch):
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    store = Store(model, tmp_path)
    read(model, store, history)
    settle(store)
    monkeypatch.setattr(Disk, "read", None)                 # no file is opened
    logits, reused, _ = read(model, store, history)
    assert reused == 192 and same(logits, fresh(model, history))

# ---- damage ----

def harm(whole, rng):
    """Cut or alter a file at random."""
    kind, at = rng.randrange(5), rng.randrange(len(whole))
    if kind == 0:
        return whole[:at]
    if kind == 1:
        return whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:]
    if kind == 2:
        return whole[:at] + rng.randbytes(rng.randrange(1, 100)) + whole[at:]
    if kind == 3:
        return bytes(len(whole))
    n = rng.randrange(1, 500)
    return whole[:at] + rng.randbytes(len(whole[at:at + n])) + whole[at + n:]

MODES = [{}, dict(share="0-1", share_kind="kv")]

@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_thousand_files_cut_or_altered_are_never_read_as_if_whole(mode, tmp_path):
    model, history, rng = make(**mode), tokens(200), random.Random(0)
    remember(model, tmp_path, history)
    disk, found = Store(model, tmp_path).disk, [0, 0, 0]
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.kv")}
    saved = {path: [disk.read(bytes.fromhex(path.stem), layer) for layer in range(3)] for path in whole}
    for i in range(500):
        path = rng.choice(sorted(whole))
        path.write_bytes(harm(whole[path], rng))
        for layer in range(3):
            try:
                pair = disk.read(bytes.fromhex(path.stem), layer)
            except Damaged:
                break
            assert all(map(torch.equal, pair, saved[path][layer])), i
            found[layer] += 1
        else:
            pytest.fail(f"{i}: damage not found")
        assert not path.exists()
        path.write_bytes(whole[path])
    assert found[0] > 100 and found[1] > 50                     # what is damaged later is read until there

@pytest.mark.parametrize("mode", MODES, ids=str)
def test_with_files_cut_or_altered_the_answer_is_the_same(mode, tmp_path):
    model, history, rng = make(**mode), tokens(200), random.Random(0)
    expected = fresh(model, history)
    remember(model, tmp_path, history)
    whole = {path: path.read_bytes() for path in tmp_path.glob("*.kv")}
    store, found = Store(model, tmp_path, memory=1), []
    for i in range(60):
        path = rng.choice(sorted(whole))
        path.write_bytes(harm(whole[path], rng))
        logits, reused, _ = read(model, store, history)
        assert same(logits, expected) and reused < 192 and not path.exists(), i
        found.append(reused)
        path.write_bytes(whole[path])
        settle(store)                                           # memory has let go of all
    assert set(found) == {0, 64, 128} and read(model, store, history)[1] == 192

def alter(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)

def test_a_damaged_layer_reaches_neither_tier(tmp_path):
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    store = Store(model, tmp_path)
    names = store.names(history)
    alter(store.disk.path(names[1]), store.disk.starts[1] + DIGEST + 5)       # layer 1 of block 1
    logits, reused, cache = read(model, store, history)
    assert reused == 64 and same(logits, fresh(model, history))
    settle(store)
    assert names[1] not in held(store) and store.disk.path(names[2]).exists()
    store.save(history, cache)
    assert read(model, store, history)[1] == 192

def test_a_layer_that_caches_nothing_is_checked_too(tmp_path):
    model, history = make(share="0-1", share_kind="kv"), tokens(200)
    remember(model, tmp_path, history)
    store = Store(model, tmp_path)
    disk = store.disk
    assert disk.starts[2] - disk.starts[1] == DIGEST            # layer 1 is a digest of nothing
    alter(disk.path(store.names(history)[1]), disk.starts[1] + 5)
    logits, reused, _ = read(model, store, history)
    assert reused == 64 and same(logits, fresh(model, history))

def test_files_of_others_are_not_used(tmp_path):
    model, history = make(), tokens(100)
    remember(model, tmp_path, history)
    remember(model, tmp_path / "other", tokens(100, 2))
    (path,), (other,) = tmp_path.glob("*.kv"), (tmp_path / "other").glob("*.kv")
    path.write_bytes(path.read_bytes()[:32] + other.read_bytes()[32:])  # another conversation under our name
    logits, reused, _ = read(model, Store(model, tmp_path), history)
    assert reused == 0 and same(logits, fresh(model, history))

def test_many_unreadable_blocks_are_let_go_one_after_the_other(tmp_path):
    model, history = make(), tokens(200 * BLOCK + 1)
    store = Store(model, tmp_path)
    for name in store.names(history):
        store.disk.path(name).write_bytes(b"")
    assert read(model, store, history)[1] == 0

def save_for_ever(disk, blocks, rng):
    """What the background thread does, in a process of its own, whose id is returned."""
    child = os.fork()
    if child:
        return child
    try:
        while True:
            for name, block in blocks.items():
                disk.write(name, block)
                if rng.random() < 0.3:
                    disk.path(name).unlink(missing_ok=True)
    finally:
        os._exit(1)

@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kills_while_saving_leave_whole_files_or_none(tmp_path):
    model, rng, history, found = make(), random.Random(0), tokens(321), []
    expected, folder = fresh(model, history), tmp_path / "store"
    source = Store(model, tmp_path / "source")
    source.save(history, read(model, source, history)[2])
    source.close()
    blocks, disk = dict(source.memory), Store(model, folder).disk
    contents = {path.name: path.read_bytes() for path in source.disk.folder.glob("*.kv")}
    for i in range(12):
        if i % 4 == 0:                                      # from empty again
            for path in folder.glob("*"):
                path.unlink()
        for child in [save_for_ever(disk, blocks, random.Random(2 * i + n)) for n in (0, 1)]:
            time.sleep(rng.uniform(0.0, 0.01))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert all(path.read_bytes() == contents[path.name] for path in folder.glob("*.kv"))
        logits, reused, _ = read(model, Store(model, folder), history)
        assert same(logits, expected)
        found.append(reused)
    assert len(set(found)) > 1                              # killed at different moments

def test_two_stores_may_use_one_folder(tmp_path):
    model = make()
    stores = [Store(model, tmp_path, disk=4 * file_bytes(model, tmp_path), memory=1) for _ in range(2)]
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
    assert "could not be written (No space left on device)" in store.disk.trouble
    assert not list(tmp_path.iterdir())

def test_what_a_killed_process_left_is_cleared_away_and_nothing_else(tmp_path):
    block, stranger = "ab" * 32, "cd" * 32
    begun = bytes.fromhex(block) + b"half"
    files = {f"{block}.kv.0123abcd": (begun, 7200), f"{block}.kv.4567cdef": (begun, 0),     # the first goes
             f"{stranger}.kv.0123abcd": (b"mine", 7200), f"{stranger}.kv": (b"mine", 7200),
             "my.kv": (b"mine", 7200), "my.kv.bak": (b"mine", 7200)}
    for name, (data, age) in files.items():
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    model, history = make(), tokens(200)
    store = Store(model, tmp_path, disk=1)                  # of its own blocks, none may stay
    store.save(history, read(model, store, history)[2])
    store.close()
    assert {path.name for path in tmp_path.iterdir()} == files.keys() - {f"{block}.kv.0123abcd"}

def test_what_is_no_file_in_the_place_of_a_block_is_left_and_done_without(tmp_path, make_odd):
    model, history = make(), tokens(200)
    store = Store(model, tmp_path)
    path = store.disk.path(store.names(history)[1])
    make_odd(path)
    logits, _, cache = read(model, store, history)
    assert same(logits, fresh(model, history))
    store.save(history, cache)
    store.close()
    assert same(read(model, Store(model, tmp_path), history)[0], logits)

def test_a_damaged_block_that_cannot_be_deleted_is_tried_once(tmp_path, monkeypatch):
    model, history = make(), tokens(200)
    remember(model, tmp_path, history)
    store = Store(model, tmp_path)
    alter(store.disk.path(store.names(history)[0]), 2 * DIGEST + 5)
    monkeypatch.setattr(os, "unlink", lambda path: None)
    monkeypatch.setattr(store.disk, "delete", lambda path, ours: None)
    logits, reused, _ = read(model, store, history)
    assert reused == 0 and same(logits, fresh(model, history))

def test_what_cannot_be_a_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="--store=.*not a folder that can be written"):
        Store(make(), tmp_path / "file")
    with pytest.raises(ValueError, match="--context=63"):
        Store(make(), size=63)
