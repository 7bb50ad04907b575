"""Eigen Attention (Saxena et al. 2024, arXiv:2408.05646): fewer numbers per head in the KV cache, of a model that is trained.

The keys of a head, D numbers each, lie near a subspace of r < D dimensions, and so do its values. With E (r, D) and F (r, D),
cache the r numbers c = E k in the place of k, and restore k ≈ Fᵀ c when it is read. The same for v. Both fold into the weights:

    values    c = (E W_v) x           P c (r numbers) goes into W_out Fᵀ: nothing is restored, and a token costs less than before
    keys      c = (E W_k) x           k = Fᵀ c is restored, then rotated (RoPE), for all visible tokens: 2·G·r·D·S FLOPs

At r = D both are exact. A reuse layer of Shared Attention has no keys, so there the compression is free.

Which subspace? The paper takes that of the largest singular values, of the keys (with the queries) and of the values. But an error of k
matters only along the queries that meet it, and one of v only as far as W_out lets it through. So each has a metric M (D, D), and
the subspace that minimises E|M^½ (k − Fᵀ E k)|² is, with S = E[k kᵀ] and the r largest eigenvectors U (D, r) of M^½ S M^½,

    E = Uᵀ M^½        Fᵀ = M^-½ U        error: the sum of the other eigenvalues

A head sums z_t = Σ_s P_ts v_s for the query of token t over keys s, its part W_h of W_out makes W_h z_t of it, and the layer puts out the sum
y_t of that over its heads. To first order, an error δk_s of a key changes W_h z_t by Σ_s W_h (v_s − z_t) P_ts q_tsᵀ δk_s / √D, where q_ts is q_t
rotated by t − s. Hence weights w_ts = u_t P_ts² |W_h (v_s − z_t)|² with u_t = 1 / |x_t + y_t|², as the residual stream x + y is
normalised wherever it is read, and

    keys      S = Σ_ts w_ts k_s k_sᵀ  (of all heads that share the keys)        M = Σ_ts w_ts q_ts q_tsᵀ / (D Σ_ts w_ts), from samples of s
    values    S = Σ_t u_t z_t z_tᵀ    (of all heads that share the values)      M = mean over these heads of W_hᵀ W_h

So both errors are parts of the stream, and comparable: numbers are dropped in the order of their eigenvalues, keys and values of a layer
together, while the mean over t of |δy_t|² / |x_t + y_t|² stays within error². All heads of a layer keep as many. Errors of two keys, or of two
heads, are taken as independent, and what an anchor's error does to the layers that share with it is not counted.
"""

from dataclasses import replace

import torch

from minisa.model import GPT, causal_mask, heads, rope_angles, rotate, weighted_sum

SAMPLES = 4     # keys drawn for each query and head


def basis(S, M):
    """S, M (G, D, D) → E and F (G, D, D), of which the first r rows are the best of rank r, and the eigenvalues (G, D), falling."""
    values, U = torch.linalg.eigh(M)
    values = values.clamp(min=0) + 1e-4 * values.amax(-1, keepdim=True)         # directions that M does not see: the least of all
    root, inverse = (U * values.sqrt()[:, None]) @ U.mT, (U * values.rsqrt()[:, None]) @ U.mT
    errors, U = torch.linalg.eigh(root @ S @ root)
    U = U.flip(-1)
    return U.mT @ root, U.mT @ inverse, errors.flip(-1).clamp(min=0)


def moments(config, block, xs, passed, angles, mask, generator):
    """One layer, on the residual streams xs [(1, T, C)] before it and `passed` from the layer below → S and M of its keys and of its
    values, (G, D, D) each, in float64. xs and `passed` become those after the layer."""
    attn, T = block.attn, mask.size(0)
    H, G, C = attn.H, attn.G, xs[0].size(2)
    W = attn.out.weight.view(C, H, -1).transpose(0, 1).float()                  # (H, C, D)
    D = W.size(2)
    S_k, M_k, S_v = torch.zeros(3, G, D, D, dtype=torch.float64)
    total_w = torch.zeros(G, dtype=torch.float64)
    for i, x in enumerate(xs):
        h, seen = block.norm1(x), []
        y, passed[i] = attn(h, angles, mask, passed[i], seen=seen)
        q, k, v = attn.qkv(h).split(attn.made, dim=2)
        v = (heads(v, G) if attn.made[2] else passed[i][1]).float()             # (1, G, T, D)
        P = seen[0].float()
        z = weighted_sum(P, v)[0]                                               # (H, T, D)
        u = (x + y).float().square().sum(-1)[0].reciprocal()                    # (T,)
        S_v += gram((z * u[:, None].sqrt()).reshape(G, -1, D))
        if attn.made[1] and attn.role != "reuse":
            q, k = heads(q, H)[0].float(), heads(k, G)[0].float()               # (H, T, D), (G, T, D)
            out_z, out_v = z @ W.mT, v[0].repeat_interleave(H // G, 0) @ W.mT   # (H, T, C)
            apart = out_z.square().sum(-1)[..., None] - 2 * out_z @ out_v.mT + out_v.square().sum(-1)[:, None]
            w = u[:, None] * P[0].square() * apart.clamp(min=0) + 1e-20 * mask.exp()         # (H, T, T)
            S_k += gram(k * w.sum(1).view(G, H // G, T).sum(1)[..., None].sqrt())
            s = torch.multinomial(w.flatten(0, 1).cpu(), SAMPLES, replacement=True, generator=generator).view(H, T, -1).to(x.device)
            cos, sin = rope_angles(config, torch.arange(T, device=x.device)[:, None] - s)
            q = rotate(q[:, :, None].expand(*s.shape, D), (cos, sin))
            M_k += gram((q * (w.sum(2)[..., None, None] / SAMPLES).sqrt()).reshape(G, -1, D))
            total_w += w.sum((1, 2)).view(G, -1).sum(1).cpu().double()
        x = x + y
        xs[i] = x + block.mlp(block.norm2(x))
    M_v = gram(W.reshape(G, -1, D)) / (H // G)
    return (S_k, M_k / (D * total_w.clamp(min=1e-30))[:, None, None]), (S_v, M_v)


def drop(errors_k, errors_v, budget):
    """What dropping each number of a head costs, (D,) each and falling → how many of the keys' and of the values' to keep, so that
    the dropped ones together cost no more than the budget. At least one of each."""
    D = len(errors_v)
    errors, order = torch.cat((errors_k, errors_v)).sort()
    dropped = order[errors.cumsum(0) <= budget]
    return D - min((dropped < D).sum().item(), D - 1), D - min((dropped >= D).sum().item(), D - 1)


def gram(rows):
    """(G, N, D) → Σ_n row rowᵀ (G, D, D), in float64, on the CPU."""
    return (rows.mT @ rows).cpu().double()


@torch.no_grad()
def compress(model, windows, rank=None, error=None):
    """A model → one that caches fewer numbers per head; its config.ranks says how many, per layer (keys, values). Weights that do not
    change are shared with the model, not copied.

    windows (N, T): of a calibration text. rank: how many numbers each head keeps of each key and value; or
    error: how far the stream after a layer's attention may be off, in the root mean square over tokens of |y' − y| / |x + y|, as predicted
    above; each layer then keeps the least that this allows. Raises ValueError if the model is compressed already.
    """
    config, L, D = model.config, model.config.n_layer, model.config.head_dim
    if config.ranks:
        raise ValueError("--eigen_rank, --eigen_error: the model is compressed already")
    if rank is not None and rank > D:
        raise ValueError(f"--eigen_rank={rank}: a head of this model is only {D} wide")
    T = windows.size(1)
    positions, generator = torch.arange(T, device=windows.device), torch.Generator().manual_seed(0)
    xs, passed = [model.embed(window[None]) for window in windows], [None] * len(windows)
    mask, angles = causal_mask(positions, positions, T, like=xs[0]), rope_angles(config, positions)
    found = [moments(config, block, xs, passed, angles, mask, generator) for block in model.blocks]
    for a, b in config.spans if config.share_kind == "kv" else []:              # CLA: one basis for all who read the anchor's values
        S, M = (sum(found[layer][1][i] for layer in range(a, b + 1)) for i in (0, 1))
        for layer in range(a, b + 1):
            found[layer] = found[a][0], (S, M / (b + 1 - a))

    state, ranks = dict(model.state_dict()), []
    for layer, (keys, values) in enumerate(found):
        (E_k, F_k, errors_k), (E_v, F_v, errors_v) = basis(*keys), basis(*values)
        k_rank, v_rank = (rank, rank) if rank else drop(errors_k.sum(0), errors_v.sum(0), error**2 * windows.numel())
        attn, name = model.blocks[layer].attn, f"blocks.{layer}.attn."
        ranks.append((D if attn.role == "reuse" and attn.shares_weights else k_rank, v_rank))
        W = state[name + "qkv.weight"]

        def fold(E, rows):                                                      # (G, r, D), (G·D, C) → (G·r, C)
            return (E.to(W) @ rows.view(attn.G, D, -1)).flatten(0, 1) if len(rows) else rows

        q, k, v = W.split(attn.made)
        if attn.role != "reuse" and k_rank < D:
            k, state[name + "restore"] = fold(E_k[:, :k_rank], k), F_k[:, :k_rank].to(W)
        if v_rank < D:
            v, out = fold(E_v[:, :v_rank], v), state[name + "out.weight"]
            state[name + "out.weight"] = torch.einsum("cghd,grd->cghr", out.view(len(out), attn.G, -1, D), F_v[:, :v_rank].to(W)).flatten(1)
        state[name + "qkv.weight"] = torch.cat((q, k, v))
    with torch.device("meta"):
        small = GPT(replace(config, ranks=ranks))
    small.load_state_dict(state, assign=True)
    return small.to(W.device).eval()
