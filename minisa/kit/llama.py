"""A GPT under the names of a Llama: the fields of its config.json and the tensors of its
model.safetensors are those of Hugging Face's LlamaForCausalLM.

Two things are not just names. RoPE turns pairs of numbers of a head: neighbours here, number i and
i + D/2 there, so the rows of W_q and W_k are in another order. And a norm of Llama multiplies its
output by a gain, ours does not, but for the last: a gain is folded into the columns of the matrices
that read the output, and written as ones.
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
ENDS = "bos_token_id", "eos_token_id", "pad_token_id"       # not ours to know, but kept
TOP = {"embed": "model.embed_tokens", "norm": "model.norm", "unembed": "lm_head"}
PARTS = {"attn.out": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
         "mlp.down": "mlp.down_proj"}
GAINS = {"input_layernorm": ["attn.qkv"], "post_attention_layernorm": ["mlp.gate", "mlp.up"]}

class Refused(Exception):
    """Why a model is not read; who reads it adds which."""

# ---- config.json ----

def write_config(config):
    """GPTConfig → the fields of a LlamaConfig."""
    fields = {name: getattr(config, ours) for name, (ours, _) in FIELDS.items()}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **fields,
            "head_dim": config.head_dim, "rope_theta": config.rope_base, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "rope_scaling": None, **dict.fromkeys(ENDS)}

def read_config(fields):
    """The fields of a LlamaConfig → those of a GPTConfig, as a dict. Raises Refused if it is of what
    this GPT is not."""
    rope = fields.get("rope_parameters") or {}
    scaling = fields.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default")) if type(scaling) is dict else "?"
    for wrong, what in (
        (fields.get("model_type") not in ("llama", "minisa"),
         f"its model_type is {fields.get('model_type')}; supported is llama"),
        (kind != "default", f"its RoPE is scaled ({kind}); supported is RoPE without scaling"),
        (fields.get("attention_bias") or fields.get("mlp_bias"),
         "its matrices have biases; supported is none"),
        (fields.get("hidden_act", "silu") != "silu",
         f"its activation is {fields.get('hidden_act')}; supported is silu"),
        (fields.get("quantization_config"), "it is quantised; supported is float32, float16, bfloat16"),
    ):
        if wrong:
            raise Refused(what)
    config = {ours: fields.get(name, default) for name, (ours, default) in FIELDS.items()}
    config["rope_base"] = fields.get("rope_theta", rope.get("rope_theta", 10000.0))
    kinds = {name: GPTConfig.__annotations__[name] for name in config}
    check(config, kinds, "its config")
    config |= {name: float(config[name]) for name in ("rope_base", "norm_eps")}
    width = fields.get("head_dim")
    check(width, int | None, "head_dim")
    if width is not None and width * config["n_head"] != config["n_embd"]:
        raise Refused(f"its head_dim is {width}; supported is hidden_size / num_attention_heads")
    return config

# ---- tensors ----

def reorder(rows, heads, back=False):
    """Rows (heads·d, C) of W_q or W_k, whose pairs are neighbours → the same with halves as pairs,
    or `back`. Heads of odd width are never rotated, and stay."""
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
        elif part in PARTS:
            found[name] = [(f"{at}{PARTS[part]}.{weight}", None, 0)]
        else:                                               # what an axis added
            found[name] = [(f"{at}self_attn.{weight}", None, 0)]
    return found

def write_tensors(model, own=None):
    """A model → its tensors under Llama's names; own: the names of those to write, None for all, and
    the gains of norms with them."""
    state, found = model.state_dict(), {}
    for name, parts in names(model).items():
        if own is None or name in own:
            rows = state[name].split([n for _, n, _ in parts]) if parts[0][1] else [state[name]]
            for (theirs, _, heads), part in zip(parts, rows):
                found[theirs] = (reorder(part, heads) if heads else part).contiguous()
    if own is None:
        ones = torch.ones_like(model.norm.weight)
        for layer in range(len(model.blocks)):
            for gain in GAINS:
                found[f"model.layers.{layer}.{gain}.weight"] = ones.clone()
    return found

class Taken(dict):
    """Tensors of a file, each to be taken once."""

    def take(self, name, shape, dtype, whole=False):
        """→ the tensor of this name in a dtype; whole: it has whole numbers. Raises Refused if it is
        missing, or of another shape or type, or has numbers that are not finite."""
        if name not in self:
            raise Refused(f"lacks the tensor {name}")
        t = self.pop(name)
        if t.dtype not in ((torch.int64,) if whole else (torch.float32, torch.float16, torch.bfloat16)):
            raise Refused(f"its tensor {name} is of the type {t.dtype}; supported is float32, float16, "
                          "bfloat16")
        if t.shape != shape:
            raise Refused(f"its tensor {name} has the shape {tuple(t.shape)}, not {tuple(shape)}")
        if not t.double().sum().isfinite():
            raise Refused(f"its tensor {name} has numbers that are not finite")
        return t.to(dtype) if t.is_floating_point() else t

def read_tensors(tensors, model, inherited, dtype):
    """Tensors under Llama's names → the state of a model on the meta device, in a dtype. inherited: a
    state from which those come that are not there. Raises Refused if one is missing, left over, or
    not as Taken.take() wants it."""
    rest = Taken((name, t) for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq"))
    if model.config.tied:
        rest.pop("lm_head.weight", None)
    state, shapes = {}, model.state_dict()
    for ours, parts in names(model).items():
        like = shapes[ours]
        if ours in inherited and parts[0][0] not in rest:
            state[ours] = inherited[ours]
            continue
        rows = []
        for name, n, heads in parts:
            shape = like.shape if n is None else (n, *like.shape[1:])
            t = rest.take(name, shape, dtype, whole=not like.is_floating_point())
            rows.append(reorder(t, heads, back=True) if heads else t)
        state[ours] = torch.cat(rows) if len(rows) > 1 else rows[0]
    for gain, parts in GAINS.items():
        for layer in range(len(model.blocks)):
            name = f"model.layers.{layer}.{gain}.weight"
            if not inherited or name in rest:
                columns = rest.take(name, (model.config.n_embd,), dtype)
                for part in parts:
                    ours = f"blocks.{layer}.{part}.weight"
                    state[ours] = state[ours] * columns
    if rest:
        raise Refused("has tensors that this GPT has no place for: " + ", ".join(sorted(rest)[:3]))
    return state
