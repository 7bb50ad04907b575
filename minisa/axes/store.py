"""AttentionStore (Gao et al. 2024, CachedAttention, arXiv:2403.19708): keep the KV cache of a
conversation between its turns.

Without it, each turn reads the whole history again. With it, the cache of what was read is kept in
memory, up to a number of bytes, and on disk, up to another; in both, the least recently used goes
first. It is saved in the background after a turn, and loaded layer by layer, while the layers below
already compute.

The paper keeps one cache per conversation. Here it is cut into blocks of 64 tokens, as the key and
value of a token depend on the tokens before it and on nothing after it. A block's name is a hash of
all tokens up to its end:

    name_i = sha256(name_{i-1}, the 64 tokens of block i)
    name_{-1} = sha256(the weights, the config, what axes changed, the size of the window)

So the longest common beginning of two histories is found by its names: an edited history reuses
what comes before the edit, conversations with the same system prompt share it, another model finds
nothing, and several processes can use one folder. What remains, less than 64 tokens and the new
turn, is computed. When a conversation outgrows the window, the oldest tokens drop out of the cache
as they do from any KVCache. The rest stays valid, as only distances count in RoPE; the paper stores
keys before RoPE for that.

A file holds its name, then for each layer a sha256 of (name, layer, numbers) and the numbers. It is
written under another name and renamed when complete. Any damage is found before the numbers are
used; then the file is deleted, and its tokens are computed again. A file with another name, or one
that does not begin with its own, was made by something else, and stays.
"""

import hashlib
import json
import os
import re
import stat
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import torch

from minisa.kit import checkpoint
from minisa.kit.files import open_file, refuse_unwritable, write_file
from minisa.model import KVCache

BLOCK = 64              # tokens
DIGEST = 32             # bytes of a sha256
ABANDONED = 3600        # seconds after which an incomplete file has no writer any more

class Damaged(Exception):
    """A block could not be used. It is gone by then, so the next load() does without it."""

class StoredCache(KVCache):
    """A KVCache of one sequence, whose layers are still arriving."""
    in_numpy = True                                     # after a prompt, when all layers are there

    def __init__(self, model, size):
        super().__init__(model, 1, size)
        self.arriving = {}                              # layer → a Future of its numbers
        self.loaded = None                              # their slots

    def remember(self, name, layer, new):
        """As KVCache.remember(), once the layer is there. Raises Damaged if it is not as it was
        saved."""
        if layer in self.arriving:
            k, v = self.k[layer], self.v[layer]             # (1, G, size, d)
            numbers = self.arriving.pop(layer).result()
            k[0, :, self.loaded] = numbers[..., :k.size(3)].to(k)
            v[0, :, self.loaded] = numbers[..., k.size(3):].to(v)
        return super().remember(name, layer, new)

def layers(cache, slots):
    """What each layer of a cache holds in these slots, k beside v: a list of (G, n, d)."""
    pairs = zip(cache.k, cache.v)
    return [torch.cat((k[0, :, slots], v[0, :, slots]), dim=2).cpu() for k, v in pairs]

def root_name(model, size):
    """A hash of all that keys and values depend on but the tokens."""
    settings = [asdict(model.config), checkpoint.changes(model), size, BLOCK]
    weights = {name: t.cpu() for name, t in model.state_dict().items()}
    return bytes.fromhex(checkpoint.digest(settings, weights))

def digest(name, layer, numbers):
    return hashlib.sha256(name + layer.to_bytes(4, "little") + numbers).digest()

# ---- blocks as files ----

class Disk:
    """Blocks as files of a folder that other processes may use too, up to `limit` bytes. A block is
    a list of tensors (G, 64, d), one per layer; `like` is one with any numbers.

    trouble: None, or what went wrong with the last writing or deleting, in words.
    Raises ValueError if the folder cannot be used.
    """

    def __init__(self, folder, limit, like):
        self.folder, self.limit, self.like = Path(folder), limit, like
        self.trouble = None
        sizes = [DIGEST + numbers.nbytes for numbers in like]
        self.starts = list(accumulate(sizes, initial=DIGEST))   # of each layer in a file, the end
        self.damaged = set()            # names of files that could not be deleted: not tried again
        try:
            refuse_unwritable(self.folder / "x")
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            raise ValueError(f"--store={folder}: is not a folder that can be written; "
                             "name one") from None
        for path, status in self.files(r"\.[0-9a-f]{8}"):           # of a process that was killed
            if status.st_mtime < time.time() - ABANDONED:
                self.delete(path)

    def path(self, name):
        return self.folder / f"{name.hex()}.kv"

    def has(self, name):
        return name not in self.damaged and self.path(name).is_file()

    def files(self, ending=""):
        """Files of the folder, and their os.stat_result. Some may be deleted meanwhile."""
        found = []
        for path in self.folder.iterdir():
            if re.fullmatch(rf"[0-9a-f]{{64}}\.kv{ending}", path.name):
                with suppress(OSError):
                    found.append((path, path.lstat()))
        return [(path, status) for path, status in found if stat.S_ISREG(status.st_mode)]

    def read(self, name, layer):
        """→ a layer's numbers. Raises Damaged if they are not as they were saved."""
        start, end = self.starts[layer:layer + 2]
        found = expected = numbers = b""
        with suppress(OSError), open_file(self.path(name)) as file:
            found = file.read(DIGEST)
            file.seek(start)
            expected, numbers = file.read(DIGEST), file.read(end - start - DIGEST)
        if found != name or expected != digest(name, layer, numbers):
            self.delete(self.path(name), ours=True)             # no other file has this hash
            if self.has(name):
                self.damaged.add(name)                          # it could not be deleted
            raise Damaged(name.hex())
        like = self.like[layer]
        flat = torch.from_numpy(np.frombuffer(bytearray(numbers), np.uint8))
        return flat.view(like.dtype).view(like.shape)

    def write(self, name, block):
        data = bytearray(name)
        for layer, numbers in enumerate(block):
            numbers = numbers.flatten().view(torch.uint8).numpy().tobytes()
            data += digest(name, layer, numbers) + numbers
        try:
            write_file(self.path(name), data, private=True)
            self.damaged.discard(name)
        except OSError as error:
            self.trouble = str(error)

    def delete(self, path, ours=False):
        """Delete a file, if it is `ours`: known to be a block, or it begins as one."""
        try:
            name = bytes.fromhex(path.name[:2 * DIGEST])
            with open_file(path) as file:
                ours = ours or file.read(DIGEST) == name
            if ours:
                path.unlink(missing_ok=True)
        except FileNotFoundError:                               # another process deleted it
            pass
        except OSError as error:
            self.trouble = f"{path}: could not be deleted ({error.strerror})"

    def use(self, names):
        """As Store.use(). A file's time is when it was used last."""
        now = time.time()
        for i, name in enumerate(names):
            modified = now - 1e-3 * i
            with suppress(OSError):                             # another process deleted it
                os.utime(self.path(name), (now, modified))
        files = sorted(self.files(), key=lambda file: file[1].st_mtime)
        over = sum(status.st_size for _, status in files) - self.limit
        for path, status in files:
            if over > 0:
                self.delete(path)
                over -= status.st_size

# ---- memory, and both together ----

class Store:
    """KV caches of a model's conversations, one sequence each: in memory, and on disk in a folder.

    folder: None for none. memory, disk: limits in bytes. size: tokens in the window, as of a
    KVCache; None for block_size.
    Raises ValueError if the window is smaller than a block, or the folder cannot be used.
    """

    def __init__(self, model, folder=None, memory=2**29, disk=2**32, size=None):
        self.model, self.limit = model, memory
        self.device = model.embed.weight.device
        self.size = model.config.block_size if size is None else size
        if self.size < BLOCK:
            raise ValueError(f"--context={self.size}: the store keeps blocks of {BLOCK} tokens; "
                             "take at least as many, and a model with such a block_size")
        like = KVCache(model, 1, BLOCK)
        self.block_bytes = like.nbytes
        self.root = root_name(model, self.size)
        self.memory = OrderedDict()     # name → its block; only the background thread removes one
        block = layers(like, slice(None))
        self.disk = Disk(folder, disk, block) if folder else None
        self.reader = ThreadPoolExecutor(1)
        self.background = ThreadPoolExecutor(1)

    def names(self, tokens):
        """The names of the complete blocks of a list of tokens."""
        names = [self.root]
        for i in range(0, len(tokens) // BLOCK * BLOCK, BLOCK):
            text = json.dumps(tokens[i:i + BLOCK]).encode()
            names.append(hashlib.sha256(names[-1] + text).digest())
        return names[1:]

    def load(self, tokens):
        """tokens: a history and a new turn → a StoredCache that holds the longest known beginning
        of it, at most all but the last token; cache.length says how many. A forward pass with it
        may raise Damaged: then load again."""
        names = self.names(tokens[:-1])
        have = {name: self.memory.get(name) or bool(self.disk and self.disk.has(name))
                for name in names}
        start, end = self.longest(list(have.values()))
        positions = torch.arange(start, end, device=self.device)
        cache = StoredCache(self.model, self.size)
        cache.length, cache.loaded = end, positions % self.size
        cache.where[0, 0, cache.loaded] = positions[:, None]
        if end:
            futures = [Future() for _ in cache.k]
            cache.arriving = dict(enumerate(futures))
            found = dict(islice(have.items(), start // BLOCK, end // BLOCK))
            self.reader.submit(self.bring, found, end - start, futures)
        return cache

    def longest(self, have):
        """have: of each block of a history, whether it is there → the positions of the first token
        that is in the window at the end of the longest such beginning, and of the one after it."""
        for n in range(len(have), 0, -1):
            start = max(0, n * BLOCK - self.size)
            if all(have[start // BLOCK:n]):
                return start, n * BLOCK
        return 0, 0

    def bring(self, found, n, futures):
        """Give each layer's future its numbers (G, n, d) of the last n tokens of the blocks found.
        Then keep the blocks in memory. found: their names → what memory holds, or True: a file."""
        blocks = {name: [] for name in found}
        try:
            for layer, future in enumerate(futures):
                for name, known in found.items():
                    read = self.disk.read(name, layer) if known is True else known[layer]
                    blocks[name].append(read)
                numbers = torch.cat([block[layer] for block in blocks.values()], dim=1)
                future.set_result(numbers[:, -n:])
        except Exception as error:
            for future in futures[layer:]:
                future.set_exception(error)
        else:
            self.memory.update(blocks)
            self.background.submit(self.use, list(blocks))

    def save(self, tokens, cache):
        """Keep what a cache holds of its tokens, a list: in memory now, on disk a little later."""
        names = self.names(tokens[:cache.length])
        for i, name in enumerate(names):
            start = i * BLOCK
            overwritten = start < cache.length - self.size
            on_disk = self.disk is None or self.disk.has(name)
            if overwritten or (name in self.memory and on_disk):
                continue
            positions = torch.arange(start, start + BLOCK, device=self.device)
            block = layers(cache, positions % self.size)
            self.memory[name] = block
            if self.disk:
                self.background.submit(self.disk.write, name, block)
        self.background.submit(self.use, names)

    def use(self, names):
        """Count blocks as used just now, the later ones first, so that they go first; let go of
        what is over the limits."""
        for name in reversed(names):
            if name in self.memory:
                self.memory.move_to_end(name)
        while len(self.memory) * self.block_bytes > self.limit:
            self.memory.popitem(last=False)
        if self.disk:
            self.disk.use(names)

    def close(self):
        """Wait until all is written."""
        self.reader.shutdown()
        self.background.shutdown()
