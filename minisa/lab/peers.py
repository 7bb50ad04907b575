"""minisa beside other libraries: both are timed in turn in one run, as in minisa/lab/bench.py.

    PYTHONPATH=../nanoGPT python -m minisa.lab.peers nanogpt --shapes=small,recipe,large
    python -m minisa.lab.peers transformers smollm2

nanogpt needs nanoGPT's folder on PYTHONPATH: git clone https://github.com/karpathy/nanoGPT ../nanoGPT
transformers needs two packages: pip install transformers accelerate

`python -m minisa.lab.peers COMMAND --help` lists the flags of each.
"""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from minisa.kit import pretrained
from minisa.kit.cli import command
from minisa.kit.machine import choose_dtype
from minisa.kit.timing import timed
from minisa.lab import bench
from minisa.model import GPTConfig

# ---- nanoGPT ----

def nanogpt_model(fields, where):
    """→ nanoGPT's model in the shape of a GPTConfig with these fields. Raises ValueError if Python does not
    find nanoGPT."""
    try:
        import model as peer  # its file has this name
        shape = {"vocab_size": GPTConfig.vocab_size, **fields}
        config = peer.GPTConfig(**shape, dropout=0.0, bias=False)
        return peer.GPT(config).to(where)
    except (ImportError, AttributeError):
        raise ValueError("where is nanoGPT? Put its folder on PYTHONPATH, as in: "
                         "PYTHONPATH=../nanoGPT python -m minisa.lab.peers nanogpt") from None

def nanogpt_works(shape, where):
    """What is timed of nanoGPT in a shape: training, and decoding, for which it has no KV cache."""
    fields, training = bench.SHAPES[shape]
    context, works = fields["block_size"], []
    if training:                                            # its train.py uses float32 on a CPU
        model = nanogpt_model(fields, where)
        dtype = "float32" if where.type == "cpu" else choose_dtype(where)
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.99), where.type)
        works.append(bench.train_work(shape, model, training, dtype, where, "nanoGPT", optimizer))
    model = nanogpt_model(fields, where).eval()
    one_token = partial(model.generate, bench.prompt(model, context), 1)
    row = bench.row_of(shape, model, "decode", context, library="nanoGPT")
    return [*works, (row, partial(timed, one_token, where))]

def nanogpt(args):
    """Time training and decoding of nanoGPT, and of full attention and both kinds of sharing here.

    Needs nanoGPT's folder on PYTHONPATH: git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    """
    for shape in args.shapes:
        yield shape, nanogpt_works(shape, args.device) + bench.shape_works(shape, args)

# ---- Hugging Face transformers ----

def transformers_model(source, where):
    """A .gguf file → its model in transformers, in float32. Raises ValueError if transformers is not
    installed, or cannot read the source."""
    if not source.endswith((".gguf", "smollm2")):
        raise ValueError(f"{source}: is not a .gguf file, which both libraries read; take one, or smollm2")
    try:
        import accelerate  # noqa: F401 (transformers needs it for .gguf files)
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ValueError("needs transformers and accelerate; install them with: "
                         "pip install transformers accelerate") from None
    path, begun = pretrained.fetch() if source == "smollm2" else Path(source), time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    bench.first_token(model.eval().to(where), 16, token_times)
    print(f"transformers: {time.perf_counter() - begun:.1f} s from the file to the first token")
    return model

def token_times(model, T, n):
    """The same as bench.token_times(), for a model of transformers."""
    times = []
    streamer = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    model.generate(bench.prompt(model, T), max_new_tokens=n, min_new_tokens=n, do_sample=False,
                   pad_token_id=0, streamer=streamer)
    return times

def transformers_flags(parser):
    parser.add_argument("model", metavar="MODEL", help="a .gguf file, or smollm2, which is downloaded once")

def transformers(args):
    """Time prefill and decoding of a model in transformers and here.

    Needs two packages: pip install transformers accelerate
    """
    theirs = transformers_model(args.model, args.device)
    ours = bench.open_models(args.model, None, False, args.device)
    size = ours[0][1].config.block_size
    works = bench.text_works([(args.model, theirs)], size, token_times, "transformers")
    yield args.model, works + bench.text_works(ours, size)

def main():
    bench.run(__doc__, "peers", {"nanogpt": (bench.shape_flags, nanogpt),
                                 "transformers": (transformers_flags, transformers)})

if __name__ == "__main__":
    command(main)
