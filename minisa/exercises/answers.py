"""Your answers. Fill in the functions, then say: python -m minisa.exercises

Copy this file first, as in `cp minisa/exercises/answers.py mine.py`, and grade the copy with
`python -m minisa.exercises --answers=mine.py`. What each exercise is about is on the sheet, README.md. Names
of shapes: T tokens, H query heads, G key/value heads, D numbers per head, C = H·D.

Use torch, or nothing but Python. What you import from minisa's model or axes does not count as an answer.
"""

# ---- lab 1: from the paper to the model ----

def attention_row(q, k, t):
    """The attention weights of the token at position t, which looks at positions 0 to t.

    q, k: lists of T lists of D floats, a query and a key per position, rotated already. A score is q·k / √D.
    Returns a list of T floats that add up to 1; those after t are 0. Scores can be in the thousands.
    """
    raise NotImplementedError

def reuse_layer(P, x, W_v, W_out):
    """What a reuse layer of Shared Attention adds to the stream.

    P (H, T, T): the anchor's attention weights. x (T, C): what the layer is given, normalised. W_v (G·D, C),
    W_out (C, H·D): its two matrices, as in nn.Linear; D and G follow from their shapes. H is a multiple of
    G: heads 0 to H/G - 1 use the values of group 0, and so on. Returns (T, C).
    """
    raise NotImplementedError

def decode(values, P, v):
    """One decode step of a reuse layer, with its cache.

    values: the cache, a list of (G, D) tensors, one per token so far; the step must add its own to it.
    P (H, S): the anchor's weights of the new token for the S tokens that are then in the cache. v (G, D): the
    new token's values. Heads use groups as in reuse_layer. Returns (H, D), what the heads sum up.
    """
    raise NotImplementedError

def roles(share, n_layer):
    """What each layer is. share: spans, as "1-3,5-7", or "" for none.

    Layers count from 0; both ends of a span belong to it; "0-1,2-3" is allowed. Returns a list of n_layer
    words, "full", "anchor" or "reuse". Raises ValueError for anything that is not written exactly so, and for
    spans that do not rise, overlap, have fewer than two layers, or do not fit into n_layer.
    """
    raise NotImplementedError

def cache_bytes(roles, kind, n_head, n_kv_head, n_embd, tokens, bytes_per_number):
    """Bytes of the KV cache of one sequence.

    roles: as your roles() gives them. kind: "weights" (Shared Attention) or "kv" (Cross-Layer Attention).
    """
    raise NotImplementedError

def decode_flops(role, kind, n_head, n_kv_head, n_embd, n_hidden, keys):
    """FLOPs of the matrix products of one layer for one new token that sees so many keys, itself included.

    A multiply-add is 2 FLOPs. role: "full", "anchor" or "reuse"; kind: as above. The MLP has three matrices
    between n_embd and n_hidden numbers.
    """
    raise NotImplementedError

# ---- lab 2: which layers, which heads, which tokens ----

def similarity(P, Q):
    """How alike two layers attend: the mean over heads and rows of the cosine of P[h, t] and Q[h, t].

    P, Q (H, T, T). Returns a float.
    """
    raise NotImplementedError

def best_source(P, anchor):
    """For each head of a layer, the head of the anchor that attends most alike.

    P, anchor (H, T, T). Alike is the cosine of two whole (T, T) matrices, as if each were one long vector.
    Returns a list of H numbers of heads.
    """
    raise NotImplementedError

def mixture(P, w):
    """Attention weights of H heads, each a mixture of the anchor's heads.

    P (H, T, T): the anchor's. w (H, H): w[h, g] is how much of head g goes into head h. Returns (H, T, T).
    """
    raise NotImplementedError

def refit(Z, Y, W, ridge):
    """The output matrix that makes a layer with other weights P put out what it did before.

    Z (N, n): what its heads sum up now, for N tokens. Y (N, C): what it should put out. W (C, n): its matrix
    so far. Returns the W' (C, n) of least |Z W'ᵀ - Y|² + ridge · |W' - W|², where |·|² is the sum of all
    squared entries, and ridge is above 0.
    """
    raise NotImplementedError

def keep(received, budget):
    """Which tokens a squeezed cache keeps after a prompt.

    received: a list of T floats, the attention weight that each token received. The last budget // 2 tokens
    stay; of the others, those that received most, until there are `budget` in all. Of two that received the
    same, the later stays. The budget is from 2 to T. Returns the positions that stay, rising.
    """
    raise NotImplementedError

def bits_per_byte(nats_per_token, tokens, text):
    """The loss of a model on a text, as it compares across tokenizers.

    nats_per_token: the mean over so many predicted tokens. text: what those tokens say, a str; its bytes are
    those of UTF-8.
    """
    raise NotImplementedError
