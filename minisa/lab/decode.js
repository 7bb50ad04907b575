// The GPT of minisa/decode.py, generating text one token at a time, in JavaScript: the same
// functions, in the same order. Below them: the bill of minisa/cost.py, and the tokenizer.
//
// All arrays are flat Float32Arrays, row after row. Shapes: S visible tokens, the newest included;
// H query heads, G key/value heads, D head dim, C = H·D width of the model, M width of the MLP,
// V vocabulary.
"use strict";

const BYTES_PER_NUMBER = 4; // of weights and cache, which are in float32 here

// matrix (rows, C), x (C) → y (rows). Four sums at a time, as the processor need not wait for one
// addition before it starts the next.
function times(matrix, x) {
  const C = x.length;
  const y = new Float32Array(matrix.length / C);
  let at = 0;
  for (let row = 0; row < y.length; row++) {
    let a = 0, b = 0, c = 0, d = 0, i = 0;
    for (; i + 3 < C; i += 4, at += 4) {
      a += matrix[at] * x[i];
      b += matrix[at + 1] * x[i + 1];
      c += matrix[at + 2] * x[i + 2];
      d += matrix[at + 3] * x[i + 3];
    }
    for (; i < C; i++, at++) a += matrix[at] * x[i];
    y[row] = a + b + c + d;
  }
  return y;
}

// ---- attention of the newest token ----

// RoPE: turns heads (n, D) in place. turn (D) holds cos and sin of the angle of each pair.
function rotate(heads, turn) {
  for (let i = 0; i < heads.length; i += 2) {
    const j = i % turn.length;
    const [a, b, cos, sin] = [heads[i], heads[i + 1], turn[j], turn[j + 1]];
    heads[i] = a * cos - b * sin;
    heads[i + 1] = a * sin + b * cos;
  }
  return heads;
}

// q (H, D), keys (G, size, D) → P (H, S): where each head looks. Every row sums to 1.
function attention_weights(now, q, keys) {
  const { H, G, D, S, size } = now;
  const P = new Float32Array(H * S);
  for (let h = 0; h < H; h++) {
    const row = P.subarray(h * S, (h + 1) * S);
    const first = Math.floor(h * G / H) * size * D; // heads that share keys stand together
    let largest = -Infinity;
    for (let s = 0; s < S; s++) {
      let product = 0;
      for (let d = 0; d < D; d++) product += q[h * D + d] * keys[first + s * D + d];
      row[s] = product / Math.sqrt(D);
      largest = Math.max(largest, row[s]);
    }
    let total = 0;
    for (let s = 0; s < S; s++) {
      row[s] = Math.exp(row[s] - largest);
      total += row[s];
    }
    for (let s = 0; s < S; s++) row[s] /= total;
  }
  return P;
}

// P (H, S), values (G, size, D) → y (C).
function weighted_sum(now, P, values) {
  const { H, G, D, S, size } = now;
  const y = new Float32Array(H * D);
  for (let h = 0; h < H; h++) {
    const first = Math.floor(h * G / H) * size * D;
    for (let s = 0; s < S; s++) {
      const p = P[h * S + s];
      for (let d = 0; d < D; d++) y[h * D + d] += p * values[first + s * D + d];
    }
  }
  return y;
}

// Writes the newest token's k or v (G, D) into its slot of the cache (G, size, D).
function store(now, cache, heads) {
  for (let g = 0; g < now.G; g++) {
    const head = heads.subarray(g * now.D, (g + 1) * now.D);
    cache.set(head, (g * now.size + now.slot) * now.D);
  }
}

// A function for each kind of layer: x (C) → y (C), and what a reuse layer above may take.

// A full layer, or an anchor: makes q, k and v, and stores k and v.
function full_attention(now, layer, x, below) {
  const q = rotate(times(layer.W_q, x), now.turn);
  const k = rotate(times(layer.W_k, x), now.turn);
  const v = times(layer.W_v, x);
  store(now, layer.k, k);
  store(now, layer.v, v);
  const P = attention_weights(now, q, layer.k);
  return [weighted_sum(now, P, layer.v), { P, keys: layer.k, values: layer.v }];
}

// A reuse layer of Shared Attention: makes v and stores v. P is the anchor's.
function shared_attention(now, layer, x, below) {
  const v = times(layer.W_v, x);
  store(now, layer.v, v);
  return [weighted_sum(now, below.P, layer.v), below];
}

// A reuse layer of Cross-Layer Attention: makes q, stores nothing. Keys and values are the anchor's.
function cross_layer_attention(now, layer, x, below) {
  const q = rotate(times(layer.W_q, x), now.turn);
  const P = attention_weights(now, q, below.keys);
  return [weighted_sum(now, P, below.values), { ...below, P }];
}

const KINDS = {
  full: { makes: "qkv", attention: full_attention },
  weights: { makes: "v", attention: shared_attention },
  kv: { makes: "q", attention: cross_layer_attention },
};

// ---- the whole model ----

function rms_norm(x, eps) {
  let squares = 0;
  for (const number of x) squares += number * number;
  const root = Math.sqrt(squares / x.length + eps);
  return x.map((number) => number / root);
}

// SwiGLU: x (C) → (C).
function mlp(layer, x) {
  const gate = times(layer.gate, x); // (M)
  const up = times(layer.up, x);
  const silu = gate.map((number) => number / (1 + Math.exp(-number)));
  return times(layer.down, silu.map((number, i) => number * up[i]));
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

// Its step() takes the newest token's id, and returns the logits (V) of the next one. kinds: a name
// in KINDS for each layer. P: what each layer attended with, of the last step.
class Decoder {
  constructor(model, kinds) {
    const { n_head, n_kv_head, n_embd, block_size, rope_base } = model.config;
    this.model = model;
    this.kinds = kinds;
    this.H = n_head;
    this.G = n_kv_head;
    this.D = n_embd / n_head;
    this.size = block_size;
    this.length = 0; // tokens seen so far
    this.S = 0;
    this.frequencies = Array.from({ length: this.D / 2 }, (_, i) => rope_base ** (-2 * i / this.D));
    this.layers = model.layers.map((layer, l) => {
      const { makes, attention } = KINDS[kinds[l]];
      const slots = (name) => new Float32Array(makes.includes(name) ? this.G * this.size * this.D : 0);
      return { ...layer, attention, k: slots("k"), v: slots("v") };
    });
  }

  // The cache is a ring: when it is full, a new token takes the oldest one's slot.
  step(token) {
    const position = this.length;
    this.slot = position % this.size;
    this.S = Math.min(position + 1, this.size);
    const angles = this.frequencies.map((frequency) => position * frequency);
    this.turn = angles.flatMap((angle) => [Math.cos(angle), Math.sin(angle)]);

    const { embed, unembed, gain, config } = this.model;
    const C = config.n_embd;
    const x = embed.slice(token * C, (token + 1) * C); // (C), to which the layers add
    let handed_up = null;
    this.P = [];
    for (const layer of this.layers) {
      let h = rms_norm(x, config.norm_eps);
      let y;
      [y, handed_up] = layer.attention(this, layer, h, handed_up);
      add(x, times(layer.out, y));
      h = rms_norm(x, config.norm_eps);
      add(x, mlp(layer, h));
      this.P.push(handed_up.P);
    }
    this.length = position + 1;
    const normed = rms_norm(x, config.norm_eps);
    return times(unembed, normed.map((number, i) => number * gain[i]));
  }
}

function softmax(logits, temperature = 1) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const p = Float64Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const total = p.reduce((a, b) => a + b);
  return p.map((number) => number / total);
}

// logits (V) → a token's id: the first at which the sum of all probabilities up to it exceeds u, a
// random number in [0, 1).
function draw(logits, temperature, u) {
  if (temperature < 1e-6) return logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
  const p = softmax(logits, temperature);
  let total = 0;
  const id = p.findIndex((number) => (total += number) > u);
  return id < 0 ? p.length - 1 : id;
}

// A generator of random numbers in [0, 1): Park and Miller's, of 1988. The first ones, which are
// alike for seeds that are alike, are left out.
function uniform(seed) {
  const modulus = 2 ** 31 - 1;
  let state = Math.abs(Math.trunc(seed)) % (modulus - 1) + 1;
  const next = () => (state = state * 48271 % modulus) / modulus;
  for (let i = 0; i < 10; i++) next();
  return next;
}

// ---- what a token costs, as minisa/cost.py predicts it: products of matrices, and bytes ----

function predict(config, kinds, S) {
  const { n_head: H, n_kv_head: G, n_embd: C, n_hidden: M, vocab_size: V } = config;
  const D = C / H;
  let [cached, numbers_read, flops] = [0, V * C, 2 * C * V];
  for (const kind of kinds) {
    const made = (name, heads) => (KINDS[kind].makes.includes(name) ? heads * D : 0);
    const [q, k, v] = [made("q", H), made("k", G), made("v", G)];
    const layer = C * (q + k + v) + C * C + 3 * C * M;
    const keys_read = q ? G * D * S : 0; // without a q, none are read
    cached += k + v;
    numbers_read += layer + keys_read + G * D * S;
    flops += 2 * layer + 2 * q * S + 2 * C * S; // scores, and weighted sum
  }
  return {
    cache_bytes_per_token: cached * BYTES_PER_NUMBER,
    cache_bytes: cached * BYTES_PER_NUMBER * S,
    read_bytes: numbers_read * BYTES_PER_NUMBER,
    flops,
  };
}

// ---- byte-level BPE, as in minisa/kit/tokenizer.py; bytes are characters from 0 to 255 here ----

class Tokenizer {
  constructor({ tokens, special, pattern }) {
    this.tokens = tokens;
    this.words = new RegExp(pattern, "gu");
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    for (const id of special) this.ids.delete(tokens[id]);
  }

  encode(text) {
    const ids = [];
    for (const part of text.split(/(\p{White_Space}{10000})/u)) {
      for (const [word] of part.matchAll(this.words)) {
        const bytes = Array.from(new TextEncoder().encode(word), (byte) => String.fromCharCode(byte));
        const whole = this.ids.get(bytes.join(""));
        const found = whole === undefined ? this.merge(bytes).map((token) => this.ids.get(token)) : [whole];
        ids.push(...found.filter((id) => id !== undefined)); // some tokenizers lack some bytes
      }
    }
    return ids;
  }

  // Joins the pair of neighbors with the lowest id, again and again.
  merge(parts) {
    const id_of = (i) => (i + 1 < parts.length && this.ids.get(parts[i] + parts[i + 1])) || Infinity;
    const ids = parts.map((_, i) => id_of(i));
    for (;;) {
      let best = 0;
      for (let i = 1; i < ids.length; i++) if (ids[i] < ids[best]) best = i;
      if (ids[best] === Infinity) return parts;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ids.splice(best, 1);
      ids[best] = id_of(best);
      if (best) ids[best - 1] = id_of(best - 1);
    }
  }

  bytes(id) {
    return Uint8Array.from(this.tokens[id], (byte) => byte.charCodeAt(0));
  }

  text(id) {
    return new TextDecoder().decode(this.bytes(id));
  }
}

// ---- a model, as minisa/lab/page.py packs it ----

// Base64 of float16 → Float32Array.
function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), (byte) => byte.charCodeAt(0));
  const halves = new Uint16Array(bytes.buffer);
  const table = Float32Array.from({ length: 2 ** 16 }, (_, half) => {
    const [exponent, fraction] = [half >> 10 & 31, half & 1023];
    const size = exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24;
    return half >> 15 ? -size : size;
  });
  return Float32Array.from(halves, (half) => table[half]);
}

function open_model(packed) {
  const { config, shapes } = packed;
  const weights = unpack(packed.weights);
  const tensors = {};
  let at = 0;
  for (const [name, [rows, columns = 1]] of Object.entries(shapes)) {
    tensors[name] = weights.subarray(at, at += rows * columns);
  }
  const { n_layer, n_head, n_kv_head, n_embd: C } = config;
  const kinds = kinds_of(reuse_of(config.share, n_layer), config.share_kind);
  const layers = kinds.map((kind, l) => {
    const layer = {};
    const qkv = tensors[`blocks.${l}.attn.qkv.weight`];
    let row = 0;
    for (const name of KINDS[kind].makes) {
      const rows = C / n_head * (name === "q" ? n_head : n_kv_head);
      layer[`W_${name}`] = qkv.subarray(row * C, (row += rows) * C);
    }
    layer.out = tensors[`blocks.${l}.attn.out.weight`];
    for (const name of ["gate", "up", "down"]) layer[name] = tensors[`blocks.${l}.mlp.${name}.weight`];
    return layer;
  });
  const embed = tensors["embed.weight"];
  const unembed = config.tied ? embed : tensors["unembed.weight"];
  return { ...packed, kinds, layers, embed, unembed, gain: tensors["norm.weight"],
    tokenizer: new Tokenizer(packed) };
}

// "1-3" → which layers reuse: [false, false, true, true]; and back.
function reuse_of(share, n_layer) {
  const spans = share ? share.split(",").map((span) => span.split("-").map(Number)) : [];
  return Array.from({ length: n_layer }, (_, l) => spans.some(([a, b]) => a < l && l <= b));
}

function share_of(reuse) {
  const spans = [];
  reuse.forEach((on, l) => {
    if (on && reuse[l - 1]) spans.at(-1)[1] = l;
    else if (on) spans.push([l - 1, l]);
  });
  return spans.map((span) => span.join("-")).join(",");
}

function kinds_of(reuse, share_kind) {
  return reuse.map((on) => (on ? share_kind : "full"));
}
