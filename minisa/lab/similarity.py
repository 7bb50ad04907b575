"""How alike the layers of a model attend, and how spread each of them.

    python -m minisa.lab.similarity out/full                two maps of a trained model
    python -m minisa.lab.similarity out/full --history      how alike, at each step that --keep_every kept
    python -m minisa.lab.similarity out/full --look="To be, or not to be" --share=1-3
                                                            the attention weights of one text themselves

P_l[h] (T, T) is what head h of layer l attends with on a window of T tokens, a row per query.

Similarity of two layers: sim(l, m) = mean over windows, heads h and rows t of the cosine of P_l[h, t] and
P_m[h, t].

Spread of a layer (the isotropy of Liao & Vargas 2024, section 3): var(l) = mean over windows, heads and rows
t ≥ 1 of the variance of the t+1 weights that the row gives to the tokens it can see. 0 is a layer that looks
at all tokens alike; the largest that row t can have, all weight on one token, is t / (t+1)².
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa.kit import checkpoint
from minisa.kit.cli import Parser, at_least, command, count, device, prompt
from minisa.kit.data import data_of
from minisa.kit.files import refuse_unwritable, write_csv
from minisa.kit.picture import pyplot, save, save_film
from minisa.kit.results import print_table
from minisa.lab import plot

def layer_similarity(model, idx):
    """idx (B, T) → (L, L): how alike each two layers attend, 1 on the diagonal; see sim(l, m) above."""
    unit = [F.normalize(P.float(), dim=-1).flatten() for P in model.attention_weights(idx)]
    rows = torch.stack(unit)                                        # (L, B·H·T·T)
    return rows @ rows.mT / (idx.numel() * model.config.n_head)

def spread(model, idx):
    """idx (B, T ≥ 2) → (L,): var(l) above."""
    n = torch.arange(1, idx.size(1) + 1, device=idx.device)         # tokens that row t sees
    every_P = [P.float() for P in model.attention_weights(idx)]
    variances = [P.pow(2).sum(-1) / n - 1 / n**2 for P in every_P]  # (B, H, T) each; the mean of a row is 1/n
    return torch.stack([variance[..., 1:].mean() for variance in variances])

def mean_over(windows, measure, model):
    """windows (N, T) → the mean of measure(model, window (1, T)). Takes the memory of one window."""
    print(f"looking at the attention weights of {len(windows)} windows", file=sys.stderr, flush=True)
    return sum(measure(model, window[None]).cpu() / len(windows) for window in windows)

# ---- the command ----

def maps(model, windows, out):
    """Print and draw how alike the layers attend, and how spread. out: the folder of the pictures."""
    layers = range(model.config.n_layer)
    alike, variance = (mean_over(windows, measure, model) for measure in (layer_similarity, spread))
    print("mean cosine of the attention weights of two layers, in hundredths:")
    print("layer " + "".join(f"{layer:>4}" for layer in layers))
    for layer in layers:
        print(f"{layer:>5} " + "".join(f"{100 * value:>4.0f}" for value in alike[layer].tolist()))
    following = [f"{value:.3f}" for value in alike.diagonal(1).tolist()] + [""]
    print()
    print_table([("layer", "like the next", "spread (variance of the weights)"),
                 *((str(layer), following[layer], f"{variance[layer]:.6f}") for layer in layers)])
    rows = [[layer, *row] for layer, row in enumerate(alike.tolist())]
    write_csv(out / "similarity.csv", ["layer", *layers], rows)
    write_csv(out / "spread.csv", ["layer", "variance"], enumerate(variance.tolist()))
    save(plot.similarity_maps({"how alike the layers attend": alike}), out / "similarity.png")
    plot.by_layer(variance.tolist(), "variance of attention weights", out / "spread.png")
    print(f"wrote {out}/similarity.csv, similarity.png, spread.csv, spread.png")

def history(steps, windows, out):
    """Draw how alike the layers attend in each of some models: folders, whose names are steps."""
    maps, rows = {}, []
    for folder in steps:
        step = int(folder.name)
        model, _, _ = checkpoint.load(folder, device=windows.device)
        maps[f"step {step}"] = alike = mean_over(windows, layer_similarity, model)
        rows += [[step, layer, *row] for layer, row in enumerate(alike.tolist())]
    write_csv(out / "history.csv", ["step", "layer", *range(len(alike))], rows)
    save(plot.similarity_maps(maps), out / "history.png")
    save_film((plot.similarity_maps({title: alike}) for title, alike in maps.items()), out / "history.gif")
    print(f"wrote {out}/history.csv, history.png and history.gif: {len(maps)} maps")

def look(model, tokenizer, args, out):
    """Draw what four neighbouring layers attend with on the text --look; below it the same after --share."""
    ids = tokenizer.encode(args.look)
    if not 2 <= len(ids) <= min(64, model.config.block_size):
        raise ValueError(f"--look: these are {len(ids)} tokens; give 2 to {min(64, model.config.block_size)}")
    models = {args.model: model}
    if args.share:
        models[f"{args.model}, sharing {args.share}"] = checkpoint.reconfigure(model, share=args.share)
    first = int(args.share.partition("-")[0]) if args.share else 0
    first = max(0, min(first, model.config.n_layer - 4))
    rows, idx = {}, torch.tensor([ids], device=args.device)
    for name, shown in models.items():
        layers = shown.attention_weights(idx)[first:first + 4]
        rows[name] = [P[0].float().mean(0).cpu() for P in layers]           # (T, T)
    plot.attention_maps(rows, [repr(tokenizer.decode([i]))[1:-1] for i in ids], first, out / "attention.png")
    print(f"wrote {out}/attention.png: layers {first} to {first + len(layers) - 1}, {len(ids)} tokens")

def parser(doc, name):
    """A Parser with the flags of a command that looks into one model."""
    parser = Parser(doc, usage=f"python -m minisa.lab.{name} MODEL [--FLAG=VALUE ...]")
    parser.add_argument("model", metavar="MODEL", help="a run's or model's folder, a .gguf file, or "
                        "smollm2, which is downloaded once")
    parser.flag("context", at_least(int, 2), 512, "length of a window, in tokens",
                "512, or block_size if less")
    parser.flag("text", help="UTF-8 text to read", shown="what the model was trained on, or the plays")
    parser.flag("out_dir", help="folder for the pictures and .csv files", shown="MODEL, or "
                "out/similarity-NAME where that is a file")
    parser.flag("device", device, "cpu", "cpu, cuda, cuda:1 or mps")
    return parser

def open_data(args):
    """What the flags of parser() name → model, its Data, the folder to write to, and the length of a window.
    Raises ValueError."""
    model, tokenizer, info, out = open_model(args)
    return model, data_of(info, tokenizer, args.text), out, min(args.context, model.config.block_size)

def open_model(args):
    """What the flags of parser() name → model, tokenizer, info, and the folder to write to."""
    out = Path(args.model if Path(args.model).is_dir() else f"out/similarity-{Path(args.model).stem}")
    out = Path(args.out_dir or out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out_dir={out}: is a file; name a folder")
    refuse_unwritable(out / "x")
    pyplot("this command")                              # refused before the work if it is missing
    return *checkpoint.load(args.model, device=args.device), out

def main():
    flags = parser(__doc__, "similarity")
    flags.flag("windows", count, 4, "windows of text that the maps are the mean over")
    flags.switch("history", "draw a map for each step that train.py --keep_every=N kept of this run")
    flags.flag("look", prompt, None, "draw the attention weights of four layers on this text", "none")
    flags.flag("share", str, "", "with --look: spans that share, zero-shot, below it", "none")
    args = flags.parse_args()
    if args.history and args.look:
        raise ValueError("--history, --look: give one of them")
    if args.share and not args.look:
        raise ValueError("--share: goes with --look, as in --look=\"To be, or not to be\" --share=1-3")
    steps = sorted(path.parent for path in Path(args.model).glob("steps/[0-9]*/config.json"))
    if args.history and not steps:
        raise ValueError(f"{args.model}/steps: no weights of past steps; train with: "
                         "python train.py --keep_every=200")
    if args.look:
        model, tokenizer, _, out = open_model(args)
        look(model, tokenizer, args, out)
        return
    model, data, out, T = open_data(args)
    windows = data.windows("train", 2 * args.windows, T)[::2, :-1].to(args.device)      # scan.py: the others
    if args.history:
        history(steps, windows, out)
    else:
        maps(model, windows, out)

if __name__ == "__main__":
    command(main)
