"""Write any model as a complete folder: a .gguf file, smollm2, or a model derived from others.

    python -m minisa.kit.export smollm2 --out=out/smollm2 --dtype=bfloat16
    python -m minisa.kit.export out/small --out=out/whole

With full attention or GQA the folder is a Llama's, which other libraries open too:

    AutoModelForCausalLM.from_pretrained("out/smollm2"), AutoTokenizer.from_pretrained("out/smollm2")
"""

import torch

from minisa.kit import checkpoint
from minisa.kit.cli import Parser, add_model, command
from minisa.kit.files import lock, refuse_taken

def main():
    parser = Parser(__doc__, usage="python -m minisa.kit.export MODEL --out=FOLDER [--FLAG=VALUE ...]")
    add_model(parser)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="folder to write the model to")
    parser.flag("dtype", str, "float32", "of the numbers", choices=("float32", "float16", "bfloat16"))
    args = parser.parse_args()
    with lock(args.out):
        refuse_taken(args.out)
        model, tokenizer, info = checkpoint.load(args.model, dtype=getattr(torch, args.dtype))
        checkpoint.save(args.out, model, tokenizer, info)
    config = model.config
    kind = "minisa" if config.share or checkpoint.changes(model) else "Llama"
    print(f"wrote {args.out}, of type {kind}: {config.n_layer} layers, {config.n_embd} wide, {args.dtype}; "
          f"next: python sample.py {args.out}")

if __name__ == "__main__":
    command(main)
