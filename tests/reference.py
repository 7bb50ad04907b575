"""The paper's own code beside ours, on random weights: logits, and text from a cache.

    git clone https://github.com/metacarbon/shareAtt ../shareAtt
    python3 -m venv ../paper && ../paper/bin/pip install torch transformers==4.33.3 numpy tiktoken
    PYTHONPATH=. ../paper/bin/python tests/reference.py ../shareAtt

This runs code of that repository. Its model has 32 layers, of which 23 to 26 reuse the weights of layer 22,
which is --share=22-26 here.
"""

import importlib.util
import sys
import warnings

import torch

from minisa.model import GPT, GPTConfig

V, C, H, M, L, T = 500, 64, 8, 96, 32, 100
SHARE = "22-26"

def paper(folder):
    """The paper's model file, as a module. It imports its neighbour, so both are put into a package."""
    package = importlib.util.spec_from_loader("paper", None, is_package=True)
    sys.modules["paper"] = importlib.util.module_from_spec(package)
    for name in "configuration_llama", "modeling_llama":
        file = f"{folder}/models/Llama2-7b-hf/{name}.py"
        spec = importlib.util.spec_from_file_location(f"paper.{name}", file)
        sys.modules[f"paper.{name}"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module

def in_pairs(rows):
    """Rows of W_q or W_k (n, C), reordered: their RoPE turns numbers i and i + D/2 of a head together, ours
    neighbours."""
    return rows.view(-1, 2, C // H // 2, C).transpose(1, 2).reshape(-1, C)

def weights(theirs):
    """Their weights under our names; the gains of norms go into the matrices behind them."""
    w, ours = theirs.state_dict(), {}
    for i in range(L):
        at, own = f"model.layers.{i}.", f"blocks.{i}."
        first, second = (w[f"{at}{name}_layernorm.weight"] for name in ("input", "post_attention"))
        q, k, v, out = (w[f"{at}self_attn.{name}_proj.weight"] if f"{at}self_attn.{name}_proj.weight" in w
                        else None for name in "qkvo")
        reuses = k is None                                  # they make a q there, and do not use it
        qkv = v if reuses else torch.cat((in_pairs(q), in_pairs(k), v))
        ours |= {f"{own}attn.qkv.weight": qkv * first, f"{own}attn.out.weight": out}
        for name in "gate", "up":
            ours[f"{own}mlp.{name}.weight"] = w[f"{at}mlp.{name}_proj.weight"] * second
        ours[f"{own}mlp.down.weight"] = w[f"{at}mlp.down_proj.weight"]
    return ours | {"embed.weight": w["model.embed_tokens.weight"], "norm.weight": w["model.norm.weight"],
                   "unembed.weight": w["lm_head.weight"]}

@torch.no_grad()
def compare(module, G):
    torch.manual_seed(G)
    config = module.LlamaConfig(vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=L,
                                num_attention_heads=H, num_key_value_heads=G, max_position_embeddings=128)
    theirs = module.LlamaForCausalLM(config).eval()
    for p in theirs.parameters():
        p.copy_(0.15 * torch.randn_like(p) + (p.dim() == 1))        # gains around 1
    ours = GPT(GPTConfig(block_size=128, vocab_size=V, n_layer=L, n_head=H, n_kv_head=G, n_embd=C, n_hidden=M,
                         norm_eps=config.rms_norm_eps, tied=False, share=SHARE)).eval()
    ours.load_state_dict(weights(theirs))
    idx = torch.randint(V, (2, T))
    seen = theirs(idx, output_attentions=True)
    logits, P = ours(idx)[0], ours.attention_weights(idx)
    far = max((a - b).abs().max() for a, b in zip(seen.attentions, P))
    text = theirs.generate(idx[:, :10], max_new_tokens=100, do_sample=False, pad_token_id=0)
    same = torch.equal(text, ours.generate(idx[:, :10], text.size(1) - 10, temperature=0))
    print(f"{G} key/value heads: logits up to {seen.logits.abs().max():.1f} differ by at most "
          f"{(logits - seen.logits).abs().max():.0e}, attention weights by {far:.0e}; greedy text of 100 "
          f"tokens {'is the same' if same else 'DIFFERS'}")

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    module = paper(sys.argv[1])
    for G in (H, H // 4):
        compare(module, G)
