"""AttentionStore (Gao et al. 2024, CachedAttention, arXiv:2403.19708): keep the KV cache of a conversation between its turns.

Without it, each turn reads the whole history again. With it, the cache of what has been read is kept in memory, up to a number of bytes, and
on disk, up to another; in both the least recently used goes first. It is saved in the background after a turn, and loaded layer by layer,
while the layers below already compute.

The paper keeps one cache per conversation. Here the unit is a block of 64 tokens, as the key and value of a token depend on the tokens before
it and on nothing after it. A block's name is a hash of all tokens up to its end:

    name_i = sha256(name_{i-1}, the 64 tokens of block i)        name_{-1} = sha256(the weights, the config, the size of the window)

So the longest common beginning of two histories is found by its names: an edited history reuses what comes before the edit, conversations
with the same system prompt share it, another model finds nothing, and processes can use one folder together. What is left over, less than 64
tokens and the new turn, is computed. When a conversation outgrows the window, the oldest tokens drop out of the cache as out of any
KVCache. The rest stays valid, as only distances count in RoPE; the paper stores keys before RoPE for that.

A file is its name, a sha256 of (name, layer, numbers) for each layer, and the numbers. It is written under another name and renamed when whole.
Whatever is wrong with it is found before its numbers are used, then it is deleted, and its tokens are computed anew.
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

from minisa.checkpoint import write_file
from minisa.model import KVCache

BLOCK = 64      # tokens
DIGEST = 32     # bytes of a sha256


class Damaged(Exception):
    """A block could not be used. It is deleted by then, so that the next try does without it."""


class StoredCache(KVCache):
    """A KVCache whose layers are still arriving. write() waits for its layer, and raises Damaged if it did not come whole."""

    arriving = ()                                                                       # a future for each layer

    def write(self, layer, tensors, new):
        if self.arriving:
            self.arriving[layer].result()
        return super().write(layer, tensors, new)


def raw(t):
    """A tensor → its bytes, as a tensor."""
    return t.detach().cpu().contiguous().flatten().view(torch.uint8)


def digest(name, layer, numbers):
    return hashlib.sha256(name + layer.to_bytes(4, "little") + numbers).digest()


class Store:
    """KV caches of a model's conversations, one sequence each: in memory and, with a folder, on disk.

    memory, disk: limits in bytes. size: tokens in the window, as of a KVCache. Raises ValueError if the folder cannot be used.
    trouble: None, or what went wrong with the last writing in the background.
    """

    def __init__(self, model, folder=None, memory=2**29, disk=2**32, size=None):
        self.config, self.like, self.size = model.config, model.embed.weight, size or model.config.block_size
        self.folder, self.limit, self.disk_limit = Path(folder) if folder else None, memory, disk
        self.memory, self.lock = OrderedDict(), threading.Lock()                        # name → bytes of a file, the least recently used first
        self.reader, self.background, self.trouble = ThreadPoolExecutor(1), ThreadPoolExecutor(1), None
        one = KVCache(self.config, 1, BLOCK, self.like.dtype, "meta")
        self.shapes = [(k.shape[1:], v.shape[1:]) for k, v in zip(one.k, one.v)]        # (G, 64, d) of each layer
        sizes = [(k.numel() + v.numel()) * k.element_size() for k, v in zip(one.k, one.v)]
        starts = [DIGEST * (1 + len(sizes))]                                            # where the numbers of each layer are in a file
        for n in sizes:
            starts.append(starts[-1] + n)
        self.parts, self.file_bytes = list(zip(starts, sizes)), starts[-1]
        h = hashlib.sha256(json.dumps([asdict(self.config), str(self.like.dtype), self.size, BLOCK]).encode())
        for name, t in sorted(model.state_dict().items()):
            h.update(name.encode())
            h.update(raw(t).numpy())
        self.root = h.digest()
        if self.size < BLOCK:
            raise ValueError(f"--context={self.size}: the store keeps blocks of {BLOCK} tokens; take at least as many")
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                assert os.access(self.folder, os.W_OK | os.X_OK)
            except (OSError, AssertionError):
                raise ValueError(f"--store={folder}: is no folder that can be written; name one") from None
            for path, old in self.files("*.kv.*"):                                      # of a process that was killed while it wrote
                if old.st_mtime < time.time() - 3600:
                    path.unlink(missing_ok=True)

    def names(self, tokens):
        """The names of the whole blocks of a list of tokens."""
        names = [self.root]
        for i in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
            names.append(hashlib.sha256(names[-1] + json.dumps(tokens[i:i + BLOCK]).encode()).digest())
        return names[1:]

    def path(self, name):
        return self.folder / f"{name.hex()}.kv"

    def files(self, pattern):
        """Files of the folder, and their os.stat_result. Other processes may delete some meanwhile."""
        found = []
        for path in self.folder.glob(pattern):
            try:
                found.append((path, path.stat()))
            except OSError:
                pass
        return found

    def fresh(self):
        return StoredCache(self.config, 1, self.size, self.like.dtype, self.like.device)

    def load(self, tokens):
        """tokens: a history and a new turn → a StoredCache that holds the longest known beginning of it, at most all but the last token;
        cache.length says how many. A forward pass with it may raise Damaged: then load again."""
        names = self.names(tokens[:-1])
        have = [name in self.memory or self.folder is not None and self.path(name).exists() for name in names]
        cache = self.fresh()
        for m in range(len(names), 0, -1):
            first = max(0, m * BLOCK - self.size) // BLOCK                              # the first block that reaches into the window
            if all(have[first:m]):
                break
        else:
            return cache
        try:
            blocks = [Block(self, names[i], i) for i in range(first, m)]
        except Damaged:
            return self.load(tokens)
        for block in blocks:
            cache.where[0, 0, block.slots] = block.positions[:, None]
        cache.length = m * BLOCK
        cache.arriving = [self.reader.submit(self.bring, cache, layer, blocks) for layer in range(self.config.n_layer)]
        return cache

    def bring(self, cache, layer, blocks):
        """Fill one layer of a cache; after the last one, count the blocks as used."""
        try:
            for block in blocks:
                k, v = block.layer(layer)
                cache.k[layer][0].index_copy_(1, block.slots, k.to(cache.k[layer]))
                cache.v[layer][0].index_copy_(1, block.slots, v.to(cache.v[layer]))
        except Damaged:
            blocks.clear()                                                              # nobody will read the layers after this one
            raise
        if layer == self.config.n_layer - 1:
            self.use([block.name for block in blocks], {block.name: block.data or b"".join((block.head, *block.layers)) for block in blocks})

    def save(self, tokens, cache):
        """Keep what the cache holds of its tokens, a list: in memory now, on disk in the background."""
        names = self.names(tokens[:cache.length])
        for i, name in enumerate(names):
            known = name in self.memory and (self.folder is None or self.path(name).exists())
            if not known and i * BLOCK >= cache.length - self.size:                     # else it is kept, or overwritten, already
                slots = torch.arange(i * BLOCK, (i + 1) * BLOCK, device=cache.where.device) % self.size
                layers = [torch.cat((raw(k[0][:, slots]), raw(v[0][:, slots]))).numpy().tobytes() for k, v in zip(cache.k, cache.v)]
                data = b"".join((name, *(digest(name, layer, numbers) for layer, numbers in enumerate(layers)), *layers))
                with self.lock:
                    self.memory[name] = data
                if self.folder:
                    self.background.submit(self.write, self.path(name), data)
        self.background.submit(self.use, names, {})

    def write(self, path, data):
        try:
            write_file(path, data)
        except OSError as error:
            self.trouble = str(error)

    def use(self, names, data):
        """Count blocks as used just now, earlier ones last, and let go what is over the limits: the later ones of the longest unused."""
        with self.lock:
            for name in reversed(names):
                if name in data:
                    self.memory[name] = data[name]
                if name in self.memory:
                    self.memory.move_to_end(name)
            while len(self.memory) * self.file_bytes > self.limit:
                self.memory.popitem(last=False)
        if self.folder:
            now = time.time()
            for i, name in enumerate(names):
                try:
                    os.utime(self.path(name), (now, now - 1e-3 * i))
                except OSError:                                                         # another process let go of it
                    pass
            files = sorted(self.files("*.kv"), key=lambda file: file[1].st_mtime)
            over = sum(stat.st_size for _, stat in files) - self.disk_limit
            for path, stat in files:
                if over > 0:
                    self.delete(path)
                    over -= stat.st_size

    def forget(self, name):
        with self.lock:
            self.memory.pop(name, None)
        if self.folder:
            self.delete(self.path(name))

    def delete(self, path):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self.trouble = f"{path}: could not be deleted ({error.strerror})"

    def close(self):
        """Wait until all is written."""
        self.background.shutdown()
        self.reader.shutdown()


class Block:
    """A block while it is loaded, layer by layer, from memory or from its file. Raises Damaged, and deletes it, if it is not as it was saved."""

    def __init__(self, store, name, i):
        self.store, self.name = store, name
        self.positions = torch.arange(i * BLOCK, (i + 1) * BLOCK, device=store.like.device)
        self.slots = self.positions % store.size
        self.data = store.memory.get(name)
        try:
            self.file = None if self.data else os.open(store.path(name), os.O_RDONLY)
        except (OSError, TypeError):                                                    # let go of meanwhile; TypeError: there is no folder
            self.spoilt()
        self.head = self.part(0, store.parts[0][0])
        if self.head[:DIGEST] != name or self.file and os.fstat(self.file).st_size != store.file_bytes:
            self.spoilt()
        self.layers = []

    def spoilt(self):
        self.store.forget(self.name)
        raise Damaged(self.name.hex())

    def part(self, start, n):
        """n bytes of the block, from `start`."""
        try:
            found = self.data[start:start + n] if self.data else os.pread(self.file, n, start)
        except OSError:
            self.spoilt()
        return found if len(found) == n else self.spoilt()

    def layer(self, layer):
        """→ k and v (G, 64, d) of a layer."""
        numbers = self.part(*self.store.parts[layer])
        if not self.data:
            if digest(self.name, layer, numbers) != self.head[DIGEST * (layer + 1):DIGEST * (layer + 2)]:
                self.spoilt()
            self.layers.append(numbers)
        k_shape, v_shape = self.store.shapes[layer]
        both = torch.frombuffer(bytearray(numbers), dtype=self.store.like.dtype) if numbers else torch.empty(0)      # CLA's reuse layers have none
        return both[:k_shape.numel()].view(k_shape), both[k_shape.numel():].view(v_shape)

    def __del__(self):
        if getattr(self, "file", None):
            os.close(self.file)
