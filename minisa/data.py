"""Text → files of token ids → batches, and the validation loss.

A text becomes a folder data/NAME-TOKENIZER-HASH/ with train.npy (the first nine tenths of its characters), val.npy (the
rest) and meta.json (the tokenizer, learned on the first part only). HASH is that of the text, so a changed text is another folder.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minisa.tokenizer import Tokenizer, learn

FOLDER = Path(__file__).resolve().parent.parent / "data"


def tokenize(text_file, kind="bpe", vocab_size=1024, tokenizer=None, folder=FOLDER):
    """Make the token files of a UTF-8 text file unless they are there; return their folder.

    kind: "bpe" learns vocab_size tokens on the training part, "gpt2" is tiktoken's; or give a Tokenizer.
    Raises ValueError if the text cannot be read, is not UTF-8 or is too short.
    """
    try:
        raw = Path(text_file).read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise ValueError(f"--text={text_file}: {error.strerror}; name a readable file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--text={text_file}: not UTF-8 text (byte {error.start}); convert it first, for instance with iconv") from None
    cut = int(0.9 * len(text))
    train, val = text[:cut], text[cut:]
    if len(val) < 2:
        raise ValueError(f"--text={text_file}: {len(text)} characters are too few; at least 20 are needed")
    name = f"{kind}{vocab_size}" if kind == "bpe" else kind
    if tokenizer:
        name = f"tokens{hashlib.sha256(json.dumps(tokenizer.description).encode()).hexdigest()[:8]}"
    target = Path(folder) / f"{Path(text_file).stem}-{name}-{hashlib.sha256(raw).hexdigest()[:8]}"
    if target.exists():
        return target
    print(f"tokenizing {text_file} ({len(raw):,} bytes)" + (f": learning {vocab_size:,} tokens" if name.startswith("bpe") else ""), flush=True)
    tokenizer = tokenizer or (Tokenizer.from_tokens(learn(train, vocab_size)) if kind == "bpe" else Tokenizer.gpt2())
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    val_ids = tokenizer.encode(val)
    meta = {"tokenizer": tokenizer.description, "vocab_size": tokenizer.vocab_size,
            "val_bytes": len(tokenizer.decode_bytes(val_ids[1:]))}              # of all tokens that are predicted
    Path(folder).mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".making-"))
    try:
        np.save(temporary / "train.npy", np.array(tokenizer.encode(train), dtype))
        np.save(temporary / "val.npy", np.array(val_ids, dtype))
        (temporary / "meta.json").write_text(json.dumps(meta))
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError:
        shutil.rmtree(temporary)
        if not target.exists():                                                 # else another process made it meanwhile
            raise
    return target


class Data:
    """The token files of one folder: .train and .val (arrays of ids), .tokenizer, .val_bytes."""

    def __init__(self, folder):
        try:
            meta = json.loads((Path(folder) / "meta.json").read_text())
            self.tokenizer, self.val_bytes = Tokenizer.load(meta["tokenizer"]), meta["val_bytes"]
            self.train, self.val = (np.load(Path(folder) / f"{part}.npy", mmap_mode="r") for part in ("train", "val"))
            if max(self.train.max(), self.val.max()) >= self.tokenizer.vocab_size:
                raise ValueError("a token id is out of range")
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ValueError(f"{folder}: the token files are damaged or missing ({error}); delete that folder, and they are made again") from None

    def batch(self, step, seed, batch_size, block_size, rows=slice(None)):
        """Inputs and targets (rows, block_size) of a step: a pure function of (seed, step), of which a process takes its rows."""
        starts = np.random.default_rng((seed, step)).integers(len(self.train) - block_size, size=batch_size)[rows]
        windows = torch.from_numpy(np.stack([self.train[s:s + block_size + 1] for s in starts]).astype(np.int64))
        return windows[:, :-1], windows[:, 1:]

    @torch.inference_mode()
    def evaluate(self, model, batch_size=32, autocast=None):
        """The loss on the whole validation split, in nats per token and in bits per byte.

        The split is read in windows of block_size tokens; each token but the first is predicted once.
        """
        T, device = model.config.block_size, model.embed.weight.device
        ids = torch.from_numpy(self.val.astype(np.int64))
        pad = -(len(ids) - 1) % T                                               # of the last window; -100 is no target
        inputs = F.pad(ids[:-1], (0, pad)).view(-1, T).split(batch_size)
        targets = F.pad(ids[1:], (0, pad), value=-100).view(-1, T).split(batch_size)
        nats, training = 0.0, model.training
        model.eval()
        for x, y in zip(inputs, targets):
            with autocast or nullcontext():
                logits, _ = model(x.to(device))
            nats += F.cross_entropy(logits.flatten(0, 1).float(), y.to(device).flatten(), reduction="sum").item()
        model.train(training)
        return nats / (len(ids) - 1), nats / math.log(2) / self.val_bytes
