"""AttentionStore (Gao et al. 2024, CachedAttention, arXiv:2403.19708): keep the KV cache of a
conversation between its turns.

Without it, each turn reads the whole history again. With it, the cache of what was read is kept in
memory, up to a number of bytes, and on disk, up to another; in both the least recently used goes
first. It is saved in the background after a turn, and loaded layer by layer, while the layers below
already compute.

The paper keeps one cache per conversation. Here it is cut into blocks of 64 tokens, as the key and
value of a token depend on the tokens before it and on nothing after it. A block's name is a hash of
all tokens up to its end:

    name_i = sha256(name_{i-1}, the 64 tokens of block i)
    name_{-1} = sha256(the weights, the config, what axes changed, the size of the window)

So the longest common beginning of two histories is found by its names: an edited history reuses
what comes before the edit, conversations with the same system prompt share it, another model finds
nothing, and processes can use one folder together. What is left over, less than 64 tokens and the
new turn, is computed. When a conversation outgrows the window, the oldest tokens drop out of the
cache as out of any KVCache. The rest stays valid, as only distances count in RoPE; the paper stores
keys before RoPE for that.

A file is its name, a sha256 of (name, layer, numbers) for each layer, and the numbers. It is
written under another name and renamed when whole. Whatever is wrong with it is found before its
numbers are used; then it is deleted, and its tokens are computed anew.
"""

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from minisa.checkpoint import changes
from minisa.files import write_file
from minisa.model import KVCache

BLOCK = 64              # tokens
DIGEST = 32             # bytes of a sha256
ABANDONED = 3600        # seconds after which a file that is still not whole has no writer any more

class Damaged(Exception):
    """A block could not be used. It is deleted by then, so that the next try does without it."""

class StoredCache(KVCache):
    """A KVCache whose layers are still arriving."""
    arriving = ()                                       # a future for each layer

    def write(self, name, layer, new):
        """As KVCache.write(), once the layer is there. Raises Damaged if it did not come whole."""
        if self.arriving:
            self.arriving[layer].result()
        return super().write(name, layer, new)

# ---- names, and what is in a file ----

def raw(t):
    """A tensor → its bytes, as a tensor."""
    return t.detach().cpu().contiguous().flatten().view(torch.uint8)

def root_name(model, size):
    """A hash of all that keys and values depend on but the tokens."""
    weights = model.state_dict()
    settings = [asdict(model.config), changes(model), str(model.embed.weight.dtype), size, BLOCK]
    h = hashlib.sha256(json.dumps(settings).encode())
    for name, t in sorted(weights.items()):
        h.update(name.encode())
        h.update(raw(t).numpy())
    return h.digest()

def digest(name, layer, numbers):
    return hashlib.sha256(name + layer.to_bytes(4, "little") + numbers).digest()

class Layout:
    """Where the parts of a file are. .parts: of each layer's numbers the start and the length, in
    bytes. .shapes: of each layer's k and v, (G, 64, d). .file_bytes: of a whole file."""

    def __init__(self, model):
        self.dtype = model.embed.weight.dtype
        block = KVCache(model, 1, BLOCK, self.dtype, "meta")
        self.shapes = [(k.shape[1:], v.shape[1:]) for k, v in zip(block.k, block.v)]
        self.head_bytes = DIGEST * (1 + len(self.shapes))       # the name, and a digest per layer
        self.parts, start = [], self.head_bytes
        for k, v in zip(block.k, block.v):
            self.parts.append((start, k.nbytes + v.nbytes))
            start += k.nbytes + v.nbytes
        self.file_bytes = start

    def pack(self, name, cache, slots):
        """The keys and values in some slots of a cache → the bytes of a file."""
        layers = [torch.cat((raw(k[0][:, slots]), raw(v[0][:, slots]))).numpy().tobytes()
                  for k, v in zip(cache.k, cache.v)]
        digests = [digest(name, layer, numbers) for layer, numbers in enumerate(layers)]
        return b"".join((name, *digests, *layers))

    def unpack(self, layer, numbers):
        """The bytes of a layer → its k and v (G, 64, d)."""
        k_shape, v_shape = self.shapes[layer]
        if not numbers:                                         # a reuse layer of CLA has none
            return torch.empty(k_shape, dtype=self.dtype), torch.empty(v_shape, dtype=self.dtype)
        both = torch.frombuffer(bytearray(numbers), dtype=self.dtype)
        k, v = both.split((k_shape.numel(), v_shape.numel()))
        return k.view(k_shape), v.view(v_shape)

# ---- the two tiers ----

class Memory:
    """The contents of blocks by name, up to `limit` bytes, the least recently used first."""

    def __init__(self, limit, file_bytes):
        self.limit, self.file_bytes = limit, file_bytes
        self.blocks, self.lock = OrderedDict(), threading.Lock()

    def put(self, name, data):
        with self.lock:
            self.blocks[name] = data

    def forget(self, name):
        with self.lock:
            self.blocks.pop(name, None)

    def use(self, names):
        """Count blocks as used just now, the later ones first, so that they go first; let go of
        what is over the limit."""
        with self.lock:
            for name in reversed(names):
                if name in self.blocks:
                    self.blocks.move_to_end(name)
            while len(self.blocks) * self.file_bytes > self.limit:
                self.blocks.popitem(last=False)

class Disk:
    """Blocks as files of a folder that other processes may use too, up to `limit` bytes.

    trouble: None, or what went wrong with the last writing or deleting, in words.
    Raises ValueError if the folder cannot be used.
    """

    def __init__(self, folder, limit):
        self.folder, self.limit, self.trouble = Path(folder), limit, None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            usable = os.access(self.folder, os.W_OK | os.X_OK)
        except OSError:
            usable = False
        if not usable:
            raise ValueError(f"--store={folder}: is no folder that can be written; name one")
        for path, stat in self.files("*.kv.*"):                 # of a process that was killed
            if stat.st_mtime < time.time() - ABANDONED:
                path.unlink(missing_ok=True)

    def path(self, name):
        return self.folder / f"{name.hex()}.kv"

    def files(self, pattern):
        """Files of the folder, and their os.stat_result. Some may be deleted meanwhile."""
        found = []
        for path in self.folder.glob(pattern):
            try:
                found.append((path, path.stat()))
            except OSError:
                pass
        return found

    def put(self, name, data):
        try:
            write_file(self.path(name), data)
        except OSError as error:
            self.trouble = str(error)

    def delete(self, path):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self.trouble = f"{path}: could not be deleted ({error.strerror})"

    def use(self, names):
        """As Memory.use(). A file's time is when it was used last."""
        now = time.time()
        for i, name in enumerate(names):
            try:
                os.utime(self.path(name), (now, now - 1e-3 * i))
            except OSError:                                     # another process let go of it
                pass
        files = sorted(self.files("*.kv"), key=lambda file: file[1].st_mtime)
        over = sum(stat.st_size for _, stat in files) - self.limit
        for path, stat in files:
            if over > 0:
                self.delete(path)
                over -= stat.st_size

# ---- a block that is read ----

class Block:
    """A block while it is loaded, layer by layer, from memory or from its file.

    Its methods raise Damaged, and have deleted it by then, if it is not as it was saved.
    """

    def __init__(self, store, name, i):
        self.store, self.name, self.file = store, name, None
        self.positions = torch.arange(i * BLOCK, (i + 1) * BLOCK, device=store.like.device)
        self.slots = self.positions % store.size
        self.data = store.memory.blocks.get(name)
        if self.data is None:
            self.file = self.open()
        self.head = self.part(0, store.layout.head_bytes)
        if self.head[:DIGEST] != name:
            self.refuse()
        self.layers = []                                        # what came from the file so far

    def open(self):
        if self.store.disk is None:                             # memory let go of it meanwhile
            self.refuse()
        try:
            file = os.open(self.store.disk.path(self.name), os.O_RDONLY)
        except OSError:
            self.refuse()
        if os.fstat(file).st_size != self.store.layout.file_bytes:
            os.close(file)
            self.refuse()
        return file

    def refuse(self):
        self.store.forget(self.name)
        raise Damaged(self.name.hex())

    def part(self, start, n):
        """n bytes of the block, from `start`."""
        if self.data is not None:
            return self.data[start:start + n]
        try:
            found = os.pread(self.file, n, start)
        except OSError:
            self.refuse()
        if len(found) < n:
            self.refuse()
        return found

    def layer(self, layer):
        """→ k and v (G, 64, d) of a layer; the layers must be asked for in order."""
        numbers = self.part(*self.store.layout.parts[layer])
        if self.data is None:
            expected = self.head[DIGEST * (layer + 1):DIGEST * (layer + 2)]
            if digest(self.name, layer, numbers) != expected:
                self.refuse()
            self.layers.append(numbers)
        return self.store.layout.unpack(layer, numbers)

    def whole(self):
        """All its bytes, after its last layer came."""
        return b"".join((self.head, *self.layers)) if self.data is None else self.data

    def __del__(self):
        if getattr(self, "file", None) is not None:
            os.close(self.file)

# ---- the store ----

class Store:
    """KV caches of a model's conversations, one sequence each: in memory, and on disk in a folder.

    folder: None for none. memory, disk: limits in bytes. size: tokens in the window, as of a
    KVCache; None for block_size.
    Raises ValueError if the window is smaller than a block, or the folder cannot be used.
    """

    def __init__(self, model, folder=None, memory=2**29, disk=2**32, size=None):
        self.model, self.like = model, model.embed.weight
        self.size = model.config.block_size if size is None else size
        if self.size < BLOCK:
            raise ValueError(f"--context={self.size}: the store keeps blocks of {BLOCK} tokens; "
                             "take at least as many, and a model with such a block_size")
        self.layout, self.root = Layout(model), root_name(model, self.size)
        self.memory = Memory(memory, self.layout.file_bytes)
        self.disk = Disk(folder, disk) if folder else None
        self.reader, self.background = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def names(self, tokens):
        """The names of the whole blocks of a list of tokens."""
        names = [self.root]
        for i in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
            text = json.dumps(tokens[i:i + BLOCK]).encode()
            names.append(hashlib.sha256(names[-1] + text).digest())
        return names[1:]

    def has(self, name):
        on_disk = self.disk is not None and self.disk.path(name).exists()
        return name in self.memory.blocks or on_disk

    def fresh(self):
        """A StoredCache in which nothing is stored."""
        return StoredCache(self.model, 1, self.size, self.like.dtype, self.like.device)

    def load(self, tokens):
        """tokens: a history and a new turn → a StoredCache that holds the longest known beginning
        of it, at most all but the last token; cache.length says how many. A forward pass with it
        may raise Damaged: then load again."""
        names = self.names(tokens[:-1])
        while True:
            try:
                blocks = self.longest(names)
            except Damaged:
                continue
            return self.cache_of(blocks)

    def longest(self, names):
        """The blocks of the longest beginning that is there, those that reach into the window."""
        have = [self.has(name) for name in names]
        for m in range(len(names), 0, -1):
            first = max(0, m * BLOCK - self.size) // BLOCK
            if all(have[first:m]):
                return [Block(self, names[i], i) for i in range(first, m)]
        return []

    def cache_of(self, blocks):
        """A StoredCache in which the layers of some neighbouring blocks begin to arrive."""
        cache = self.fresh()
        if blocks:
            for block in blocks:
                cache.where[0, 0, block.slots] = block.positions[:, None]
            cache.length = blocks[-1].positions[-1].item() + 1
            cache.arriving = [self.reader.submit(self.bring, cache, layer, blocks)
                              for layer in range(len(cache.k))]
        return cache

    def bring(self, cache, layer, blocks):
        """Fill one layer of a cache; after the last one, count the blocks as used."""
        if not blocks:
            raise Damaged("in a layer below")
        try:
            for block in blocks:
                k, v = block.layer(layer)
                cache.k[layer][0].index_copy_(1, block.slots, k.to(cache.k[layer]))
                cache.v[layer][0].index_copy_(1, block.slots, v.to(cache.v[layer]))
        except Damaged:
            blocks.clear()
            raise
        if layer == len(cache.k) - 1:
            for block in blocks:
                self.memory.put(block.name, block.whole())
            self.use([block.name for block in blocks])

    def save(self, tokens, cache):
        """Keep what a cache holds of its tokens, a list: in memory now, on disk a little later."""
        names = self.names(tokens[:cache.length])
        for i, name in enumerate(names):
            on_disk = not self.disk or self.disk.path(name).exists()
            overwritten = i * BLOCK < cache.length - self.size
            if overwritten or (on_disk and name in self.memory.blocks):
                continue
            positions = torch.arange(i * BLOCK, (i + 1) * BLOCK, device=cache.where.device)
            data = self.layout.pack(name, cache, positions % self.size)
            self.memory.put(name, data)
            if self.disk:
                self.background.submit(self.disk.put, name, data)
        self.background.submit(self.use, names)

    def use(self, names):
        """Count blocks as used just now, and let go of what is over the limits."""
        self.memory.use(names)
        if self.disk:
            self.disk.use(names)

    def forget(self, name):
        self.memory.forget(name)
        if self.disk:
            self.disk.delete(self.disk.path(name))

    def close(self):
        """Wait until all is written."""
        self.background.shutdown()
        self.reader.shutdown()
