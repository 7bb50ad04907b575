"""A GPT under the names of a Llama: the fields of its config.json and the tensors of its
model.safetensors are those of Hugging Face's LlamaForCausalLM.

Two differences go beyond names. RoPE rotates pairs of numbers of a head: neighbors here, numbers i and
i + D/2 there, so the rows of W_q and W_k are in another order. And each norm of a Llama multiplies its
output by a gain; ours do not, except the last. So a gain is folded into the columns of the matrices
that read the output, and is written as ones.
"""

import torch

from minisa.kit.files import check
from minisa.model import GPTConfig

FIELDS = {      # LlamaConfig's name → ours, and LlamaConfig's default
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("n_embd", 4096),
    "intermediate_size": ("n_hidden", 11008),
    "num_hidden_layers": ("n_layer", 32),
    "num_attention_heads": ("n_head", 32),
    "num_key_value_heads": ("n_kv_head", None),
    "max_position_embeddings": ("block_size", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
}
ENDS = "bos_token_id", "eos_token_id", "pad_token_id"       # not used here, but kept
TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head"}
PARTS = {"attn.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
         "mlp.down": "mlp.down_proj"}
FLOATS = torch.float32, torch.float16, torch.bfloat16
GAINS = {"input_layernorm": ["attn.qkv"], "post_attention_layernorm": ["mlp.gate", "mlp.up"]}

# ---- config.json ----

def write_config(config):
    """GPTConfig → the fields of a LlamaConfig."""
    fields = {name: getattr(config, ours) for name, (ours, _) in FIELDS.items()}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **fields,
            "head_dim": config.head_dim, "rope_theta": config.rope_base, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "rope_scaling": None, **dict.fromkeys(ENDS)}

def read_config(fields):
    """The fields of a LlamaConfig → those of a GPTConfig, as a dict. Raises ValueError if they ask for
    what this GPT does not support."""
    rope = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    activation, model_type = fields.get("hidden_act", "silu"), fields.get("model_type")
    biased = fields.get("attention_bias") or fields.get("mlp_bias")
    quantized = fields.get("quantization_config")
    for wrong, what in (
        (model_type not in ("llama", "minisa"), f"its model_type is {model_type}; supported is llama"),
        (kind != "default", f"its RoPE is scaled ({kind}); supported is RoPE without scaling"),
        (biased, "its matrices have biases; supported is none"),
        (activation != "silu", f"its activation is {activation}; supported is silu"),
        (quantized, "it is quantized; supported is float32, float16, bfloat16"),
    ):
        if wrong:
            raise ValueError(what)
    config = {ours: fields.get(name, default) for name, (ours, default) in FIELDS.items()}
    config["rope_base"] = fields.get("rope_theta", rope.get("rope_theta", 10000.0))
    config |= {name: float(config[name]) for name in ("rope_base", "norm_eps")}
    check(config, {name: GPTConfig.__annotations__[name] for name in config}, "its config")
    width = config["n_embd"] // max(1, config["n_head"])
    if fields.get("head_dim") not in (None, width):
        raise ValueError(f"its head_dim is {str(fields['head_dim'])[:20]}; supported is hidden_size / "
                         "num_attention_heads")
    return config

# ---- tensors ----

def reorder(rows, heads, back=False):
    """Rows (heads·d, C) of W_q or W_k, with neighbors as pairs → the same with number i and i + d/2 as
    pairs, or `back`. Heads of odd width are never rotated, and stay as they are."""
    d, C = len(rows) // heads, rows.size(1)
    if d % 2:
        return rows
    pairs = (heads, 2, d // 2, C) if back else (heads, d // 2, 2, C)
    return rows.view(pairs).transpose(1, 2).reshape(rows.shape)

def names(model):
    """{name of a tensor of our model: [(Llama's name, rows, heads to reorder or 0)]}."""
    found = {}
    for name in model.state_dict():
        top, _, rest = name.partition(".")
        if top != "blocks":
            found[name] = [(f"{TOP[top]}.{rest}", None, 0)]
            continue
        layer, _, part = rest.partition(".")
        attn, at = model.blocks[int(layer)].attn, f"model.layers.{layer}."
        part, _, weight = part.rpartition(".")
        if part == "attn.qkv":
            made = zip("qkv", attn.widths, (attn.H, attn.G, 0))
            found[name] = [(f"{at}self_attn.{x}_proj.weight", n, heads) for x, n, heads in made if n]
        else:
            theirs = PARTS.get(part, "self_attn")           # what an axis added has no name there
            found[name] = [(f"{at}{theirs}.{weight}", None, 0)]
    return found

def write_tensors(model, own=None):
    """A model → its tensors under Llama's names; own: the names of those to write, None for all, and
    the gains of norms with them."""
    state, found = model.state_dict(), {}
    for name, parts in names(model).items():
        if own is not None and name not in own:
            continue
        widths = [n for _, n, _ in parts]
        rows = [state[name]] if None in widths else state[name].split(widths)
        for (theirs, _, heads), part in zip(parts, rows):
            if heads:
                part = reorder(part, heads)
            found[theirs] = part.cpu().contiguous()
    if own is None:
        ones = torch.ones_like(model.norm.weight, device="cpu")
        for layer in range(len(model.blocks)):
            for gain in GAINS:
                found[f"model.layers.{layer}.{gain}.weight"] = ones.clone()
    return found

def take(tensors, name, shape, dtype):
    """Remove the tensor of this name from a dict → that tensor, in a dtype; if the dtype is an integer
    type, the tensor must have that type. Raises ValueError if it is missing, has another shape or type,
    or has numbers that are not finite."""
    if name not in tensors:
        raise ValueError(f"lacks the tensor {name}")
    t = tensors.pop(name)
    if t.shape != shape:
        raise ValueError(f"its tensor {name} has the shape {tuple(t.shape)}, not {tuple(shape)}")
    supported = FLOATS if dtype.is_floating_point else [dtype]
    if t.dtype not in supported:
        raise ValueError(f"its tensor {name} is of the type {t.dtype}; supported is "
                         f"{' or '.join(map(str, supported))}")
    if not t.double().sum().isfinite():
        raise ValueError(f"its tensor {name} has numbers that are not finite")
    return t.to(dtype)

def take_all(tensors, expected):
    """Remove from a dict the tensors that have the names, shapes and types of those expected → the same.
    Raises ValueError as take() does, or if one is left over."""
    found = {name: take(tensors, name, like.shape, like.dtype) for name, like in expected.items()}
    refuse_left(tensors)
    return found

def refuse_left(tensors):
    if tensors:
        left = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"has tensors that this GPT has no place for: {left}")

def read_tensors(tensors, model, inherited, dtype):
    """Tensors under Llama's names → the state of a model on the meta device, in a dtype. inherited: a
    state that provides the tensors that are missing. Raises ValueError if one is left over, or as take()
    does."""
    tensors = {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tied:
        tensors.pop("lm_head.weight", None)
    state, shapes = {}, model.state_dict()
    for name, parts in names(model).items():
        if parts and name in inherited and parts[0][0] not in tensors:
            state[name] = inherited[name]
        else:
            state[name] = read_parts(tensors, parts, shapes[name], dtype)
    for layer in range(len(model.blocks)):
        for gain, matrices in GAINS.items():
            name = f"model.layers.{layer}.{gain}.weight"
            if name in tensors or not inherited:
                columns = take(tensors, name, (model.config.n_embd,), dtype)
                for matrix in matrices:
                    ours = f"blocks.{layer}.{matrix}.weight"
                    state[ours] = state[ours] * columns         # not in place: a parent may own it
    refuse_left(tensors)
    return state

def read_parts(tensors, parts, like, dtype):
    """The tensors that names() lists for one of ours → it."""
    found = []
    for name, n, heads in parts:
        shape = like.shape if n is None else (n, *like.shape[1:])
        wanted = dtype if like.is_floating_point() else like.dtype
        t = take(tensors, name, shape, wanted)
        found.append(reorder(t, heads, back=True) if heads else t)
    if not found:                                           # qkv of a layer that makes nothing
        return torch.empty(like.shape, dtype=dtype)
    return torch.cat(found) if len(found) > 1 else found[0]
