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
numbers are used; then it is deleted, and its tokens are computed anew. A file of another name,
or that does not begin with its own, was made by somebody else, and stays.
"""

import hashlib
import io
import json
import os
import re
import stat
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from minisa.kit.checkpoint import changes
from minisa.kit.files import open_file, refuse_unwritable, write_file
from minisa.model import KVCache

BLOCK = 64              # tokens
DIGEST = 32             # bytes of a sha256
ABANDONED = 3600        # seconds after which a file that is still not whole has no writer any more

class Damaged(Exception):
    """A block could not be used. It is deleted by then, so that the next try does without it."""

class StoredCache(KVCache):
    """A KVCache whose layers are still arriving, at `places`, the slots of each block."""
    in_numpy = True                                     # after a prompt, when all layers are there
    arriving, places = {}, ()                           # layer → a future of its blocks

    def remember(self, name, layer, new):
        """As KVCache.remember(), once the layer is there. Raises Damaged if it did not come whole."""
        if layer in self.arriving:
            blocks = self.arriving.pop(layer).result()          # threads do not touch the device
            for slots, (k, v) in zip(self.places, blocks):
                self.k[layer][0].index_copy_(1, slots, k.to(self.k[layer]))
                self.v[layer][0].index_copy_(1, slots, v.to(self.v[layer]))
        return super().remember(name, layer, new)

def raw(t):
    """A tensor → its bytes, as an array."""
    return t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

def root_name(model, size):
    """A hash of all that keys and values depend on but the tokens."""
    settings = [asdict(model.config), changes(model), str(model.embed.weight.dtype), size, BLOCK]
    h = hashlib.sha256(json.dumps(settings).encode())
    for name, t in sorted(model.state_dict().items()):
        h.update(name.encode())
        h.update(raw(t))
    return h.digest()

def digest(name, layer, numbers):
    return hashlib.sha256(name + layer.to_bytes(4, "little") + numbers).digest()

class Disk:
    """Blocks as files of a folder that other processes may use too, up to `limit` bytes.

    trouble: None, or what went wrong with the last writing or deleting, in words.
    Raises ValueError if the folder cannot be used.
    """

    def __init__(self, folder, limit):
        self.folder, self.limit, self.trouble = Path(folder), limit, None
        try:
            refuse_unwritable(self.folder / "x")
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            raise ValueError(f"--store={folder}: is no folder that can be written; "
                             "name one") from None
        for path, status in self.files(r"\.[0-9a-f]{8}"):           # of a process that was killed
            if status.st_mtime < time.time() - ABANDONED:
                self.delete(path)

    def path(self, name):
        return self.folder / f"{name.hex()}.kv"

    def has(self, name):
        return self.path(name).is_file()

    def files(self, ending=""):
        """Files of the folder, and their os.stat_result. Some may be deleted meanwhile."""
        found = []
        for path in self.folder.iterdir():
            try:
                if re.fullmatch(rf"[0-9a-f]{{64}}\.kv{ending}", path.name):
                    found.append((path, path.lstat()))
            except OSError:
                pass
        return [(path, status) for path, status in found if stat.S_ISREG(status.st_mode)]

    def put(self, name, data):
        try:
            write_file(self.path(name), data, private=True)
        except OSError as error:
            self.trouble = str(error)

    def delete(self, path, ours=False):
        """Delete a file, if it is `ours`: known to be a block, or it begins as one."""
        try:
            with open_file(path) as file:
                ours = ours or file.read(DIGEST) == bytes.fromhex(path.name[:2 * DIGEST])
            if ours:
                path.unlink(missing_ok=True)
        except FileNotFoundError:                               # another process let go of it
            pass
        except OSError as error:
            self.trouble = f"{path}: could not be deleted ({error.strerror})"

    def use(self, names):
        """As Store.use(). A file's time is when it was used last."""
        now = time.time()
        for i, name in enumerate(names):
            try:
                os.utime(self.path(name), (now, now - 1e-3 * i))
            except OSError:                                     # another process let go of it
                pass
        files = sorted(self.files(), key=lambda file: file[1].st_mtime)
        over = sum(status.st_size for _, status in files) - self.limit
        for path, status in files:
            if over > 0:
                self.delete(path)
                over -= status.st_size

class Store:
    """KV caches of a model's conversations, one sequence each: in memory, and on disk in a folder.

    folder: None for none. memory, disk: limits in bytes. size: tokens in the window, as of a
    KVCache; None for block_size.
    Raises ValueError if the window is smaller than a block, or the folder cannot be used.
    """

    def __init__(self, model, folder=None, memory=2**29, disk=2**32, size=None):
        self.model, self.like, self.limit = model, model.embed.weight, memory
        self.size = model.config.block_size if size is None else size
        if self.size < BLOCK:
            raise ValueError(f"--context={self.size}: the store keeps blocks of {BLOCK} tokens; "
                             "take at least as many, and a model with such a block_size")
        block = KVCache(model, 1, BLOCK, self.like.dtype, "meta")
        self.shapes = [(k.shape[1:], v.shape[1:]) for k, v in zip(block.k, block.v)]
        self.head_bytes = DIGEST * (1 + len(block.k))           # the name, and a digest per layer
        self.layer_bytes = [k.nbytes + v.nbytes for k, v in zip(block.k, block.v)]
        self.file_bytes = self.head_bytes + sum(self.layer_bytes)
        self.root = root_name(model, self.size)
        self.memory, self.lock = OrderedDict(), threading.Lock()    # name → the bytes of a file
        self.damaged = set()            # names of files that could not be deleted: not tried again
        self.disk = Disk(folder, disk) if folder else None
        self.reader, self.background = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def names(self, tokens):
        """The names of the whole blocks of a list of tokens."""
        names = [self.root]
        for i in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
            text = json.dumps(tokens[i:i + BLOCK]).encode()
            names.append(hashlib.sha256(names[-1] + text).digest())
        return names[1:]

    def on_disk(self, name):
        return self.disk is not None and name not in self.damaged and self.disk.has(name)

    def load(self, tokens):
        """tokens: a history and a new turn → a StoredCache that holds the longest known beginning
        of it, at most all but the last token; cache.length says how many. A forward pass with it
        may raise Damaged: then load again."""
        names, blocks = self.names(tokens[:-1]), None
        while blocks is None:
            first, end = self.longest(names)
            try:
                blocks = [self.block(name) for name in names[first:end]]
                for block in blocks:
                    next(block)                                 # its head
            except Damaged:
                blocks = None
        cache = StoredCache(self.model, 1, self.size, self.like.dtype, self.like.device)
        if blocks:
            positions = torch.arange(first * BLOCK, end * BLOCK, device=self.like.device)
            slots, cache.length = positions % self.size, end * BLOCK
            cache.where[0, 0, slots] = positions[:, None]
            task, cache.places = (self.bring, names[first:end], blocks), slots.split(BLOCK)
            cache.arriving = {layer: self.reader.submit(*task, layer)
                              for layer in range(len(cache.k))}
        return cache

    def longest(self, names):
        """The longest beginning that is there → the first of its blocks that reaches into the
        window, and the one after its last."""
        have = [name in self.memory or self.on_disk(name) for name in names]
        for end in range(len(names), 0, -1):
            first = max(0, end * BLOCK - self.size) // BLOCK
            if all(have[first:end]):
                return first, end
        return 0, 0

    def block(self, name):
        """Read a block from memory or from its file: yield None if its head is right, then k and v
        (G, 64, d) of each layer. Raises Damaged if it is not as it was saved."""
        data = self.memory.get(name)
        try:
            if data is None and self.disk is None:              # memory let go of it meanwhile
                raise Damaged
            with open_file(self.disk.path(name)) if data is None else io.BytesIO(data) as file:
                whole = file.seek(0, os.SEEK_END) == self.file_bytes
                file.seek(0)
                parts = [file.read(self.head_bytes)]
                if not whole or parts[0][:DIGEST] != name:
                    raise Damaged
                yield
                for layer, n in enumerate(self.layer_bytes):
                    parts.append(file.read(n))
                    expected = parts[0][DIGEST * (layer + 1):DIGEST * (layer + 2)]
                    if data is None and digest(name, layer, parts[-1]) != expected:
                        raise Damaged
                    yield self.unpack(layer, parts[-1])
        except (OSError, Damaged):
            self.forget(name)
            raise Damaged(name.hex()) from None
        if data is None:
            self.put(name, b"".join(parts))

    def unpack(self, layer, numbers):
        """The bytes of a layer → its k and v (G, 64, d)."""
        k_shape, v_shape = self.shapes[layer]
        both = torch.from_numpy(np.frombuffer(bytearray(numbers), np.uint8)).view(self.like.dtype)
        k, v = both.split((k_shape.numel(), v_shape.numel()))
        return k.view(k_shape), v.view(v_shape)

    def bring(self, names, blocks, layer):
        """Read one layer: k and v of each block. After the last, keep the blocks in memory."""
        if not blocks:
            raise Damaged("in a layer below")
        try:
            read = [next(block) for block in blocks]
        except Damaged:
            blocks.clear()
            raise
        if layer == len(self.shapes) - 1:
            for block in blocks:
                next(block, None)                               # it ends
            self.use(names)
        return read

    def save(self, tokens, cache):
        """Keep what a cache holds of its tokens, a list: in memory now, on disk a little later."""
        names = self.names(tokens[:cache.length])
        for i, name in enumerate(names):
            kept = name in self.memory and (self.disk is None or self.on_disk(name))
            overwritten = i * BLOCK < cache.length - self.size
            if not kept and not overwritten:
                data = self.pack(name, cache, i)
                self.put(name, data)
                if self.disk:
                    self.damaged.discard(name)
                    self.background.submit(self.disk.put, name, data)
        self.background.submit(self.use, names)

    def pack(self, name, cache, i):
        """The keys and values of block i of a cache → the bytes of its file."""
        slots = torch.arange(i * BLOCK, (i + 1) * BLOCK, device=self.like.device) % self.size
        layers = [b"".join((raw(k[0][:, slots]), raw(v[0][:, slots])))
                  for k, v in zip(cache.k, cache.v)]
        digests = [digest(name, layer, numbers) for layer, numbers in enumerate(layers)]
        return b"".join((name, *digests, *layers))

    def put(self, name, data):
        with self.lock:
            self.memory[name] = data

    def forget(self, name):
        with self.lock:
            self.memory.pop(name, None)
        if self.disk:
            self.disk.delete(self.disk.path(name), ours=True)   # no other file has this hash
            if self.disk.has(name):
                self.damaged.add(name)                      # it could not be deleted

    def use(self, names):
        """Count blocks as used just now, the later ones first, so that they go first; let go of
        what is over the limits."""
        with self.lock:
            for name in reversed(names):
                if name in self.memory:
                    self.memory.move_to_end(name)
            while len(self.memory) * self.file_bytes > self.limit:
                self.memory.popitem(last=False)
        if self.disk:
            self.disk.use(names)

    def close(self):
        """Wait until all is written."""
        self.background.shutdown()
        self.reader.shutdown()
