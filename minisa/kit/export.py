"""Write any model as a complete folder: a .gguf file, smollm2, or a model derived from others.

    python -m minisa.kit.export smollm2 --out=out/smollm2 --dtype=bfloat16
    python -m minisa.kit.export out/small --out=out/whole

With full attention or GQA the folder is a Llama's, which other libraries open too:

    AutoModelForCausalLM.from_pretrained("out/smollm2"), AutoTokenizer.from_pretrained("out/smollm2")
"""

from minisa.kit import checkpoint
from minisa.kit.cli import Parser, command
from minisa.kit.files import lock, refuse_taken

def main():
    parser = Parser(__doc__, usage="python -m minisa.kit.export MODEL --out=FOLDER [--FLAG=VALUE ...]")
    parser.add_argument("model", metavar="MODEL", help="a model's or run's folder, a .gguf file, or smollm2, "
                        "which is downloaded once")
    parser.flag("out", shown="none, it must be given", help="folder to write the model to")
    parser.flag("dtype", str, "float32", "of the numbers", choices=[*checkpoint.DTYPES])
    args = parser.parse_args()
    if not args.out:
        raise ValueError("--out: name a folder to write the model to")
    with lock(args.out):
        refuse_taken(args.out, "out")
        model, tokenizer, info = checkpoint.load(args.model, dtype=checkpoint.DTYPES[args.dtype])
        checkpoint.save(args.out, model, tokenizer, info)
    config = model.config
    kind = "minisa's" if config.share or checkpoint.changes(model) else "a Llama's"
    print(f"wrote {args.out}, {kind}: {config.n_layer} layers, {config.n_embd} wide, {args.dtype}; "
          f"next: python sample.py {args.out}")

if __name__ == "__main__":
    command(main)
