"""Other libraries are timed beside minisa: stand-ins for both, which are minisa's own models."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisa.kit import checkpoint
from minisa.lab import bench, peers
from minisa.model import GPT, GPTConfig

TINY = {"n_layer": 3, "n_head": 2, "n_embd": 16, "vocab_size": 64, "block_size": 32}
CPU = torch.device("cpu")

class NanoGPT(GPT):
    """What peers uses of nanoGPT."""

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)

class Transformers:
    """What peers uses of transformers' models."""

    def __init__(self, model):
        self.parameters = model.parameters
        self.model = model

    def from_pretrained(self, folder, gguf_file, dtype):
        assert (folder / gguf_file).is_file() and dtype == torch.float32
        return self

    def eval(self):
        return self

    def to(self, where):
        return self

    def generate(self, idx, max_new_tokens, min_new_tokens, do_sample, streamer, pad_token_id):
        assert max_new_tokens == min_new_tokens and not do_sample
        streamer.put(idx)
        for token in self.model.stream(idx, max_new_tokens, 0):
            streamer.put(token)
        streamer.end()

def what(*columns):
    """These columns of the rows that were written, and the speed."""
    rows = csv.DictReader(Path("rows.csv").read_text().splitlines())
    return [tuple(row[column] for column in (*columns, "tokens_per_s")) for row in rows]

def test_nanogpt_comes_first(run, monkeypatch, half_a_second):
    peer = SimpleNamespace(GPT=NanoGPT, GPTConfig=lambda bias, **shape: GPTConfig(**shape))
    monkeypatch.setitem(sys.modules, "model", peer)
    monkeypatch.setattr(bench, "SHAPES", {"tiny": (TINY, (2, 32))})
    status, out, _ = run(peers.main, "nanogpt", "--rounds=1", "--dtype=bfloat16", "--csv=rows.csv")
    nano, ours = what("library", "work", "dtype")[:2], what("library", "work", "dtype")[2:]
    assert status == 0 and nano == [("nanoGPT", "train", "float32", "128.0"),
                                    ("nanoGPT", "decode", "float32", "2.0")]
    assert len(ours) == 9 and ours[0] == ("minisa", "train", "bfloat16", "128.0")

def test_nanogpt_gets_the_shape_that_ours_has(monkeypatch):
    asked = []
    peer = SimpleNamespace(GPT=lambda config: GPT(GPTConfig()), GPTConfig=lambda **shape: asked.append(shape))
    monkeypatch.setitem(sys.modules, "model", peer)
    fields = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32}
    peers.nanogpt_model(fields, CPU)
    assert asked == [{**fields, "vocab_size": GPTConfig(**fields).vocab_size, "dropout": 0.0, "bias": False}]

def test_transformers_reads_the_same_file(run, tmp_path, monkeypatch, half_a_second):
    tiny_gguf = pytest.importorskip("tiny_gguf", reason="needs the gguf package: pip install gguf")
    path = tiny_gguf.write(tmp_path / "x.gguf", tiny_gguf.tensors())
    fake = SimpleNamespace(AutoModelForCausalLM=Transformers(checkpoint.load(path)[0]))
    monkeypatch.setitem(sys.modules, "transformers", fake)
    monkeypatch.setitem(sys.modules, "accelerate", fake)
    monkeypatch.setattr(peers.pretrained, "fetch", lambda: path)
    status, out, _ = run(peers.main, "transformers", "smollm2", "--rounds=1", "--csv=rows.csv")
    assert status == 0 and out.count("s from the file to the first token") == 2
    assert what("model", "library", "work", "dtype") == [
        ("smollm2", "transformers", "decode", "float32", "2.0"),
        ("smollm2", "transformers", "prefill", "float32", "64.0"),
        ("smollm2", "minisa", "decode", "float32", "2.0"),
        ("smollm2", "minisa", "prefill", "float32", "64.0"),
        ("smollm2", "minisa", "decode", "bfloat16", "2.0")]

@pytest.mark.parametrize("words, message", [
    (["nanogpt", "--shapes=small"], "where is nanoGPT? Put its folder on PYTHONPATH"),
    (["transformers", "run"], "run: is not a .gguf file"),
    (["transformers", "smollm2"], "pip install transformers accelerate"),
    (["transformers"], "are required: MODEL"),
    (["nanogpt", "smollm2"], "unrecognized arguments: smollm2"),
])
def test_wrong_use_gets_one_line_and_status_2(run, monkeypatch, words, message):
    for name in ("model", "transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)                # cannot be imported
    status, out, err = run(peers.main, *words)
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err

@pytest.mark.parametrize("command, need", [("nanogpt", "PYTHONPATH"), ("transformers", "pip install")])
def test_the_help_says_what_must_be_installed(run, command, need):
    for words in ([command, "--help"], ["--help"]):
        status, out, _ = run(peers.main, *words)
        assert status == 0 and need in out
