"""How similarly the layers of a model attend, and how unevenly each one does.

    python -m minisa.lab.similarity out/full                two maps of a trained model
    python -m minisa.lab.similarity out/full --history      a map for each step that --keep_every kept
    python -m minisa.lab.similarity out/full --look="To be, or not to be" --share=1-3
                                                            the attention weights of one text

P_l[h] (T, T) are the attention weights of head h of layer l on a window of T tokens, a row per query.

Similarity of two layers: sim(l, m) = the mean over windows, heads h and rows t of the cosine of P_l[h, t] and
P_m[h, t].

Variance of a layer (the isotropy of Liao & Vargas 2024, section 3): var(l) = the mean over windows, heads and
rows t ≥ 1 of the variance of the t+1 weights that the row gives to the tokens it can see. A layer that
attends to all tokens equally has 0. Row t has at most t / (t+1)², with all weight on one token.
"""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from minisa.kit import checkpoint
from minisa.kit.cli import Parser, add_device, add_model, at_least, command, count, prompt
from minisa.kit.data import data_of
from minisa.kit.files import refuse_unwritable
from minisa.kit.picture import pyplot, save, save_film
from minisa.kit.results import print_table, write_results
from minisa.lab import plot

def layer_similarity(model, idx):
    """idx (B, T) → (L, L): sim(l, m) above, 1 on the diagonal."""
    P = torch.stack(model.attention_weights(idx)).float()           # (L, B, H, T, T)
    unit = F.normalize(P, dim=-1).flatten(1)                        # (L, B·H·T·T)
    return unit @ unit.mT / P[0, ..., 0].numel()                    # by B·H·T, the rows of a layer

def weight_variance(model, idx):
    """idx (B, T ≥ 2) → (L,): var(l) above."""
    P = torch.stack(model.attention_weights(idx)).float()           # (L, B, H, T, T)
    visible = torch.arange(1, idx.size(1) + 1, device=P.device)     # (T,): tokens that a row can see
    mean = 1 / visible
    variance = P.square().sum(-1) * mean - mean**2                  # (L, B, H, T)
    return variance[..., 1:].mean((1, 2, 3))

def mean_over(windows, measure, model):
    """windows (N, T) → the mean of measure(model, window (1, T)), in the memory of one window."""
    print(f"reading the attention weights of {len(windows)} windows", file=sys.stderr, flush=True)
    found = [measure(model, window).cpu() for window in windows.split(1)]
    return torch.stack(found).mean(0)

# ---- what the command does ----

def pairs(similarity, **facts):
    """similarity (L, L) → a row for a CSV file for each pair of layers."""
    layers = range(len(similarity))
    return [{**facts, "layer": layer, "other_layer": other, "cosine": similarity[layer, other].item()}
            for layer in layers for other in layers]

def show_layers(model, windows, folder):
    """Print, write and draw the similarity of all layers, and the variance of each."""
    similarity = mean_over(windows, layer_similarity, model)
    variances = mean_over(windows, weight_variance, model).tolist()
    table = [["layer", "variance", "mean cosine with each layer, in hundredths"]]
    for layer, variance in enumerate(variances):
        hundredths = (100 * similarity[layer]).tolist()
        cosines = "".join(f"{value:4.0f}" for value in hundredths)
        table.append([str(layer), f"{variance:.6f}", cosines])
    print_table(table, words=3)
    write_results(folder / "similarity.csv", pairs(similarity))
    rows = [{"layer": layer, "variance": variance} for layer, variance in enumerate(variances)]
    write_results(folder / "variance.csv", rows)
    save(plot.similarity_maps({"similarity of layers": similarity}), folder / "similarity.png")
    plot.by_layer(variances, "variance of attention weights", folder / "variance.png")
    print(f"wrote {folder}/similarity.csv, similarity.png, variance.csv, variance.png")

def show_history(checkpoints, windows, folder):
    """Draw the similarity of layers at several steps. checkpoints: folders whose names are steps."""
    maps, rows = {}, []
    for path in checkpoints:
        model, _, _ = checkpoint.load(path, device=windows.device)
        similarity = mean_over(windows, layer_similarity, model)
        step = int(path.name)
        maps[f"step {step}"] = similarity
        rows += pairs(similarity, step=step)
    write_results(folder / "history.csv", rows)
    save(plot.similarity_maps(maps), folder / "history.png")
    frames = (plot.similarity_maps({title: maps[title]}) for title in maps)
    save_film(frames, folder / "history.gif")
    print(f"wrote {folder}/history.csv, history.png and history.gif: {len(maps)} maps")

def show_attention(args, model, tokenizer, folder):
    """Draw what four neighboring layers attend to on the text --look, and below it the same with --share."""
    ids = tokenizer.encode(args.look)
    longest = min(64, model.config.block_size)              # more labels cannot be read
    if not 2 <= len(ids) <= longest:
        raise ValueError(f"--look: these are {len(ids)} tokens; give 2 to {longest}")
    models, first = {args.model: model}, 0
    if args.share:
        shared = checkpoint.reconfigure(model, share=args.share, share_kind=args.share_kind)
        models[f"{args.model}, sharing {args.share}"] = shared
        anchor, _ = shared.config.spans[0]
        first = max(0, min(anchor, model.config.n_layer - 4))
    weights, idx = {}, torch.tensor([ids], device=args.device)
    for name, each in models.items():
        of_layers = each.attention_weights(idx)[first:first + 4]
        P = torch.stack(of_layers).float()                                  # (4, 1, H, T, T)
        weights[name] = P.mean((1, 2)).cpu()                                # (4, T, T)
    labels = [repr(tokenizer.decode([i]))[1:-1] for i in ids]
    plot.attention_maps(weights, labels, first, folder / "attention.png")
    print(f"wrote {folder}/attention.png: {len(P)} layers from {first} on, {len(ids)} tokens")

# ---- the command ----

def parser(doc, name):
    """A Parser with the flags of a command that inspects one model."""
    parser = Parser(doc, usage=f"python -m minisa.lab.{name} MODEL [--FLAG=VALUE ...]")
    add_model(parser)
    parser.flag("context", at_least(int, 2), 512, "length of a window, in tokens",
                "512, or block_size if less")
    parser.flag("text", help="UTF-8 text to read", shown="what the model was trained on, or the plays")
    parser.flag("out_dir", help="folder for the pictures and .csv files", shown="MODEL, or "
                "out/similarity-NAME where that is a file")
    add_device(parser)
    return parser

def open_model(args):
    """→ the model, tokenizer and info that the flags of parser() name, and the folder to write to."""
    folder = Path(args.out_dir or args.model)
    if not args.out_dir and not folder.is_dir():
        folder = Path(f"out/similarity-{folder.stem}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out_dir={folder}: is a file; name a folder")
    refuse_unwritable(folder / "x")
    pyplot("this command")                              # refused before the work if it is missing
    return *checkpoint.load(args.model, device=args.device), folder

def open_data(args):
    """→ the model, its Data, the folder to write to, and the length of a window."""
    model, tokenizer, info, folder = open_model(args)
    T = min(args.context, model.config.block_size)
    return model, data_of(info, tokenizer, args.text), folder, T

def read_args():
    flags = parser(__doc__, "similarity")
    flags.flag("windows", count, 4, "how many windows of text to average over")
    flags.switch("history", "draw a map for each step that train.py --keep_every=N kept of this run")
    flags.flag("look", prompt, None, "draw the attention weights of four layers on this text", "none")
    flags.flag("share", str, "", "with --look: spans that share, zero-shot, drawn below it", "none")
    checkpoint.add_share_kind(flags)
    args = flags.parse_args()
    if args.history and args.look:
        raise ValueError("--history, --look: give one of them")
    if args.share and not args.look:
        raise ValueError("--share: goes with --look, as in --look=\"To be, or not to be\" --share=1-3")
    return args

def main():
    args = read_args()
    configs = Path(args.model).glob("steps/[0-9]*/config.json")
    checkpoints = sorted(path.parent for path in configs)
    if args.history and not checkpoints:
        raise ValueError(f"{args.model}/steps: no weights of past steps; train with: "
                         "python train.py --keep_every=200")
    if args.look:
        model, tokenizer, _, folder = open_model(args)
        show_attention(args, model, tokenizer, folder)
        return
    model, data, folder, T = open_data(args)
    windows = data.windows("train", 2 * args.windows, T)
    windows = windows[::2, :-1].to(args.device)             # scan.py measures on the others
    if args.history:
        show_history(checkpoints, windows, folder)
    else:
        show_layers(model, windows, folder)

if __name__ == "__main__":
    command(main)
