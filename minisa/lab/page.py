"""A page on which trained models generate text in the browser, and show their KV caches and their bill.

    python -m minisa.lab.page out/full out/weights-1-3 --out=page.html

The page is one file that needs no network and no server. It holds the models' weights, rounded to float16;
decode.js, which is minisa/decode.py in JavaScript; and page.js, which draws. Layers of a model trained with
full attention can be made to share by a click, zero-shot.
"""

import base64
import json
from dataclasses import asdict
from pathlib import Path

import torch

from minisa.kit.checkpoint import changes, load
from minisa.kit.cli import Parser, command, output
from minisa.kit.data import data_of
from minisa.kit.files import write_file
from minisa.kit.tokenizer import PATTERNS

FOLDER = Path(__file__).parent
MOST = 8_000_000        # parameters of a model on a page: 21 MB in base64, and some 50 tokens/s
PASSAGE = 2000          # bytes of held-out text, on which the page measures a loss

def pack(source):
    """A model → what open_model() of decode.js takes. Raises ValueError if a page cannot hold it."""
    model, tokenizer, info = load(source)
    tensors = model.state_dict()
    size = sum(t.numel() for t in tensors.values())
    if size > MOST:
        raise ValueError(f"{source}: has {size:,} parameters, a page at most {MOST:,}; take a smaller model")
    if changes(model) or model.config.share_kind not in ("weights", "kv"):
        raise ValueError(f"{source}: has layers of an axis, which a page does not know; take a model with "
                         "full attention, Shared Attention or Cross-Layer Attention")
    numbers = torch.cat([t.flatten() for t in tensors.values()]).half()
    if not numbers.isfinite().all():
        raise ValueError(f"{source}: has weights too large for float16; take another model")
    passage = held_out(data_of(info, tokenizer))
    pattern = PATTERNS[tokenizer.words]
    for ours, theirs in ((r"\s", r"\p{White_Space}"), (r"\S", r"\P{White_Space}")):
        pattern = pattern.replace(ours, theirs)             # \s of JavaScript is another set
    return {
        "name": str(source),
        "config": asdict(model.config),
        "tokens": [token.decode("latin-1") for token in tokenizer.tokens],
        "special": tokenizer.special,
        "pattern": pattern,
        "passage": passage,
        "passage_bytes": len(passage.encode()),
        "shapes": {name: list(t.shape) for name, t in tensors.items()},
        "weights": base64.b64encode(numbers.numpy().tobytes()).decode(),
    }

def held_out(data):
    """→ the first characters of the text that a model was not trained on."""
    text = data.tokenizer.decode_bytes(data.val[:PASSAGE].tolist())
    return text[:PASSAGE].decode("utf-8", "ignore")

def build(models):
    """Packed models → the page."""
    page = (FOLDER / "page.html").read_text(encoding="utf-8")
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    page = page.replace('<link rel="stylesheet" href="page.css">', f"<style>\n{style}</style>")
    for name in ("decode.js", "page.js"):
        script = (FOLDER / name).read_text(encoding="utf-8")
        page = page.replace(f'<script src="{name}">', f"<script>\n{script}")
    packed = json.dumps(models).replace("<", r"\u003c")         # so that no text can end the element
    return page.replace('id="models">', f'id="models">{packed}')

def main():
    parser = Parser(__doc__, usage="python -m minisa.lab.page MODEL [MODEL] [--out=FILE]")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="one or two folders of runs or models")
    parser.flag("out", output(".html"), "page.html", "file to write")
    args = parser.parse_args()
    if len(args.models) > 2:
        raise ValueError(f"{args.models[2]}: a page has room for two models; leave it out")
    page = build([pack(source) for source in args.models]).encode()
    write_file(args.out, page, named=True)
    print(f"wrote {args.out}: {len(page):,} bytes; open it in a browser")

if __name__ == "__main__":
    command(main)
