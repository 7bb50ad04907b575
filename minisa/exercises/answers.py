"""Your answers. Copy this file, fill in the functions, and grade the copy:

    cp minisa/exercises/answers.py mine.py
    python -m minisa.exercises --answers=mine.py
    python -m minisa.exercises --answers=mine.py --only=decode              one exercise
    python -m minisa.exercises --only=decode --case=3                       a case, whole, to paste and debug
    python -m minisa.exercises play --answers=mine.py                       your code generates text

README.md describes each exercise. Names of shapes: T tokens, H query heads, G key/value heads, D numbers per
head, C = H·D.

Use torch, or plain Python. minisa itself cannot be imported while answers are graded. Tensors are float32.
What you print goes to the terminal, and is not part of the result.
"""

# ---- lab 1: from the paper to the model ----

def attention_row(q, k, t):
    """The attention weights of the token at position t, which looks at positions 0 to t.

    q, k: lists of T lists of D floats, a query and a key per position, already rotated. A score is q·k / √D.
    Returns a list of T floats that sum to 1; those after t are 0. Scores can be in the thousands, above and
    below zero.
    """
    raise NotImplementedError

def reuse_layer(P, x, W_v, W_out):
    """What a reuse layer of Shared Attention adds to its input.

    P (H, T, T): the anchor's attention weights. x (T, C): the normalized input. W_v (G·D, C), W_out (C, H·D):
    the layer's two matrices, as in nn.Linear. D and G follow from their shapes; C need not be H·D here. H is
    a multiple of G: heads 0 to H/G - 1 use the values of group 0, and so on. Returns (T, C).
    """
    raise NotImplementedError

def decode(values, P, v):
    """One decode step of a reuse layer, with its cache.

    values: the cache, a list of (G, D) tensors, one per token so far; the step must append its own. P (H, S):
    the anchor's weights of the new token for the S tokens that are then in the cache. v (G, D): the new
    token's values. Heads use groups as in reuse_layer. Returns (H, D), the weighted sum of each head.
    """
    raise NotImplementedError

def roles(share, n_layer):
    """The role of each layer. share: spans, as "1-3,5-7", or "" for none.

    Layers count from 0; both ends of a span belong to it; "0-1,2-3" is allowed. Returns a list of n_layer
    words, "full", "anchor" or "reuse". Raises ValueError for anything that is not written exactly like this,
    and for spans that overlap, are not in rising order, have fewer than two layers, or do not fit into
    n_layer.
    """
    raise NotImplementedError

def cache_bytes(roles, kind, n_head, n_kv_head, n_embd, tokens, bytes_per_number):
    """Bytes of the KV cache of one sequence.

    roles: as your roles() gives them. kind: "weights" (Shared Attention) or "kv" (Cross-Layer Attention).
    """
    raise NotImplementedError

def decode_flops(role, kind, n_head, n_kv_head, n_embd, n_hidden, keys):
    """FLOPs of the matrix products of one layer for one new token that sees `keys` tokens, itself included.

    A multiply-add is 2 FLOPs. role: "full", "anchor" or "reuse"; kind: as above. The MLP has three matrices
    between n_embd and n_hidden numbers.
    """
    raise NotImplementedError

# ---- lab 2: which layers, which heads, which tokens ----

def similarity(P, Q):
    """How similarly two layers attend: the mean over heads and rows of the cosine of P[h, t] and Q[h, t].

    P, Q (H, T, T). Returns a float.
    """
    raise NotImplementedError

def best_source(P, anchor):
    """For each head of a layer, the head of the anchor that is most similar.

    P, anchor (H, T, T). Similarity is the cosine of two whole (T, T) matrices, each taken as one long vector.
    Returns a list of H ints: for each head, the number of the anchor's head, 0 to H - 1.
    """
    raise NotImplementedError

def mixture(P, w):
    """Attention weights of H heads, each a mixture of the anchor's heads.

    P (H, T, T): the anchor's. w (H, H): w[h, g] is how much of head g goes into head h; a row need not sum to
    1. Returns (H, T, T).
    """
    raise NotImplementedError

def refit(Z, Y, W, ridge):
    """The output matrix that restores a layer's output after its weights P have changed.

    Z (N, n): the weighted sums of its heads now, for N tokens. Y (N, C): its output before. W (C, n): its
    matrix so far. Returns the W' (C, n) that minimizes |Z W'ᵀ - Y|² + ridge · |W' - W|², where |·|² is the
    sum of all squared entries, and ridge is above 0.
    """
    raise NotImplementedError

def keep(received, budget):
    """Which tokens a squeezed cache keeps after a prompt.

    received: a list of T floats, the attention weight that each token received. The last budget // 2 tokens
    stay, and of the others those that received most, so that `budget` stay in all. Of two that received the
    same, the later one stays. The budget is from 2 to T. Returns the positions that stay, in rising order.
    """
    raise NotImplementedError

def bits_per_byte(nats_per_token, tokens, text):
    """The loss of a model on a text, in a unit that does not depend on the tokenizer.

    nats_per_token: the mean over `tokens` predicted tokens. text: those tokens, as a str; its bytes are those
    of UTF-8.
    """
    raise NotImplementedError
