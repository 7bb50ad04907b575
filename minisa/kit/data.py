"""Text → files of token ids → batches; and the validation loss.

A text becomes a folder data/NAME-TOKENIZER-HASH/ with train.npy (the first nine tenths of its
characters), val.npy (the rest) and meta.json (the tokenizer, learned on the first part only). For
Shakespeare, val.npy is four whole plays. HASH is the hash of the text, so a changed text gets a new
folder.
"""

import hashlib
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from minisa.kit import shakespeare
from minisa.kit.files import MOST, data_folder, read_file, reading, write_folder
from minisa.kit.tokenizer import Tokenizer, from_json, learn, to_json

def read_text(file):
    """A UTF-8 file → str. Raises OSError if it cannot be read, ValueError if it is not UTF-8."""
    try:
        return read_file(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--text={file}: not UTF-8 text (byte {error.start}); "
                         "convert it first, for instance with iconv") from None

def tokenize(file=None, kind="bpe", vocab_size=1024, tokenizer=None, folder=None):
    """Make the token files of a UTF-8 text file, or of the plays, unless they already exist → their Data.

    kind: "bpe" learns vocab_size tokens on the training part, "gpt2" is tiktoken's; or give a
    Tokenizer. Raises ValueError if the text cannot be used.
    """
    if file:
        text = read_text(file)
        cut = int(0.9 * len(text))
        train, val = text[:cut], text[cut:]
    else:
        file, held_out = shakespeare.prepare(data_folder())
        train, val = read_text(file), read_text(held_out)
    raw = (train + val).encode()
    name = f"bpe{vocab_size}" if kind == "bpe" else kind
    if tokenizer:
        name = f"tokens{tokenizer.identity[:8]}"
    target = Path(folder or data_folder()) / f"{Path(file).stem}-{name}-{hashlib.sha256(raw).hexdigest()[:8]}"
    if target.exists():
        return Data(target)
    print(f"tokenizing {file} ({len(raw):,} bytes), into {name}", flush=True)
    if tokenizer is None and kind == "gpt2":
        tokenizer = Tokenizer.gpt2()
    elif tokenizer is None:
        tokenizer = Tokenizer(learn(train, vocab_size))
    write_tokens(target, tokenizer, train, val)
    return Data(target)

def write_tokens(target, tokenizer, train, val):
    """Write a folder of token files, whole or not at all. Raises OSError, or ValueError if a part has less
    than two tokens."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    ids = {"train": tokenizer.encode(train), "val": tokenizer.encode(val)}
    if min(map(len, ids.values())) < 2:
        raise ValueError("--text: the text is too short to train and validate on; give more")
    files = {f"{part}.npy": npy(np.array(ids[part], dtype)) for part in ids}
    val_bytes = len(tokenizer.decode_bytes(ids["val"][1:]))         # of all tokens that are predicted
    meta = {"tokenizer": to_json(tokenizer), "val_bytes": val_bytes}
    meta["digest"] = digest(meta, files)
    files["meta.json"] = json.dumps(meta).encode()
    try:
        write_folder(target, files)
    except OSError:
        if not target.exists():                                     # else another process made it
            raise

def npy(array):
    """→ the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()

def digest(meta, files):
    """A hash of all that is in a folder of token files, as they were made. files: {name: bytes}."""
    known = json.dumps([meta["tokenizer"], meta["val_bytes"]]).encode()
    return hashlib.sha256(known + files["train.npy"] + files["val.npy"]).hexdigest()

def data_of(info, tokenizer, text=None):
    """The Data for a model that load() returned: of the text it was trained on, or of `text`, a file;
    for a downloaded model, of the plays. Raises ValueError if the text it was trained on is gone."""
    if text or info["data"] is None:
        return tokenize(text, tokenizer=tokenizer)
    name = Path(info["data"]).name
    places = [Path(info["data"]), data_folder() / name]
    if name.startswith("shakespeare-") and not any(folder.is_dir() for folder in places):
        places.append(tokenize(tokenizer=tokenizer).folder)        # the plays can be had again
    for folder in places:
        if (folder / "meta.json").is_file():
            data = Data(folder)
            same = data.tokenizer.identity == tokenizer.identity
            if same and info.get("data_digest") in (None, data.digest):
                return data
    raise ValueError(f"{info['data']}, the tokens of the text that the model was trained on, is "
                     "missing, or of another text; bring it back")

def windows_at(ids, starts, T):
    """→ windows of T + 1 token ids, (n, T + 1) int64."""
    rows = ids[starts[:, None] + np.arange(T + 1)]
    return torch.from_numpy(rows.astype(np.int64))

class Data:
    """The token files of a folder: .train and .val (arrays of ids), .tokenizer, .val_bytes."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        fix = "delete that folder, and its files are made again"
        with reading(folder, "not a folder of token files", fix):
            names = "train.npy", "val.npy", "meta.json"
            most = 4 * MOST                             # a text of MOST bytes: as many tokens, of 4 bytes
            files = {name: read_file(self.folder / name, most) for name in names}
            meta = json.loads(files["meta.json"])
            self.val_bytes, self.digest = meta["val_bytes"], meta["digest"]
            if self.digest != digest(meta, files):
                raise ValueError("they are not as they were made")
            self.tokenizer = from_json(meta["tokenizer"])
            self.train = np.load(io.BytesIO(files["train.npy"]))
            self.val = np.load(io.BytesIO(files["val.npy"]))

    def batch(self, step, seed, batch_size, block_size, rows=slice(None)):
        """Inputs and targets (rows, block_size) of a training step: a pure function of seed and step. Each
        process takes its own rows of the batch."""
        last = len(self.train) - block_size
        random = np.random.default_rng((seed, step))
        starts = random.integers(last, size=batch_size)
        windows = windows_at(self.train, starts[rows], block_size)
        return windows[:, :-1], windows[:, 1:]

    def windows(self, part, n, T):
        """n windows of T + 1 tokens, evenly spaced over "train" or "val" → (n, T + 1) int64.

        Raises ValueError if the part is shorter than a window.
        """
        ids = getattr(self, part)
        if len(ids) < T + n:                                          # no two may be the same
            raise ValueError(f"the text has only {len(ids)} tokens in its {part} part; "
                             f"{n} windows of {T} need more text")
        starts = np.linspace(0, len(ids) - T - 1, n).astype(int)
        return windows_at(ids, starts, T)

    def all_of_val(self, T):
        """The whole validation split → inputs and targets (n, T), padded at the end with -100, which does
        not count as a target; and the number of bytes in the targets."""
        ids = torch.from_numpy(self.val.astype(np.int64))
        padding = -(len(ids) - 1) % T
        x = F.pad(ids[:-1], (0, padding))
        y = F.pad(ids[1:], (0, padding), value=-100)
        return x.view(-1, T), y.view(-1, T), self.val_bytes

    def part_of_val(self, T, tokens):
        """About this many tokens of the validation split, evenly spaced, in the form of all_of_val()."""
        windows = self.windows("val", tokens // T, T)
        x, y = windows[:, :-1], windows[:, 1:]
        texts = [self.tokenizer.decode_bytes(row) for row in y.tolist()]
        return x, y, sum(map(len, texts))

    @torch.inference_mode()
    def evaluate(self, model, tokens=None):
        """The loss on the validation split → nats per token, and bits per byte.

        The whole split is read in windows of block_size tokens, at most 4,096, and each token but the
        first is predicted once. For a large model, only about `tokens` tokens of it are read, in windows
        of at most 512.
        """
        T = min(model.config.block_size, 4096)
        device = model.embed.weight.device
        if tokens and tokens < len(self.val) - 1:
            x, y, n_bytes = self.part_of_val(min(T, 512, tokens), tokens)
        else:
            x, y, n_bytes = self.all_of_val(T)
        logits_of_a_row = x.size(1) * model.config.vocab_size
        batch_size = max(1, min(32, 2**26 // logits_of_a_row))        # 256 MB of logits
        nats, training = 0.0, model.training
        model.eval()
        for x_part, y_part in zip(x.split(batch_size), y.split(batch_size)):
            logits, _ = model(x_part.to(device))
            logits = logits.flatten(0, 1).float()
            targets = y_part.to(device).flatten()
            nats += F.cross_entropy(logits, targets, reduction="sum").item()
        model.train(training)
        n_targets = (y != -100).sum().item()
        return nats / n_targets, nats / math.log(2) / n_bytes
