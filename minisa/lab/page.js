// The page around decode.js: what is drawn, and what can be clicked.
//
// What is shown follows from the controls alone: the prompt, seed, temperature, sharing, and the goal,
// which is how many tokens to generate. Whatever is changed, the text is generated again from the start.
"use strict";

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const find = (selector, inside = document) => inside.querySelector(selector);
const by_id = (id) => document.getElementById(id);
const written = (number) => number.toLocaleString("en-US");
const MOST = 1000; // tokens generated
const LONGEST = 100000; // characters of a prompt that are looked at
const SLICE = 30; // ms of work between two pictures
const SHOWN_TOKENS = 6; // of the likeliest next ones

const models = JSON.parse(by_id("models").textContent).map(open_model);
let goal = 12;
let ms = 2; // that a token takes: a mean over all models, as it varies too much to compare them
let playing = false;

// How a token is written where its ends must be seen.
function label(tokenizer, id) {
  const text = tokenizer.text(id);
  if (!text.includes("\ufffd")) return text.replace(/\n/g, "⏎").replace(/ /g, "␣");
  return Array.from(tokenizer.bytes(id), (byte) => "\\x" + byte.toString(16).padStart(2, "0")).join("");
}

// ---- one model: its state, and its part of the page ----

class Side {
  constructor(model, index) {
    this.model = model;
    this.reuse = model.kinds.map((kind) => kind !== "full");
    this.kind = model.config.share_kind;
    this.element = by_id("side").content.cloneNode(true).firstElementChild;
    by_id("sides").append(this.element);
    this.part("name").textContent = `${"AB"[index]}: ${model.name}`;
    const names = { weights: "Shared Attention", kv: "Cross-Layer Attention" };
    const { share, share_kind } = model.config;
    this.part("trained").textContent = "trained with "
      + (share ? `${names[share_kind]}, --share=${share}` : "full attention");
    this.build();
  }

  part(name) {
    return find(`.${name}`, this.element);
  }

  build() {
    const { n_layer, share } = this.model.config;
    this.rows = Array.from({ length: n_layer }, () => {
      const row = document.createElement("li");
      row.className = "layer";
      row.innerHTML = "<button type=button role=switch><b></b><small></small><span class=switch></span>"
        + "</button><canvas role=img></canvas>";
      this.part("layers").prepend(row); // layer 0 at the bottom, as each builds on the one below
      return row;
    });
    this.rows.forEach((row, l) => {
      find("button", row).onclick = () => this.set_sharing(this.reuse.map((on, i) => (i === l ? !on : on)));
    });
    for (const radio of this.element.querySelectorAll("[type=radio]")) {
      radio.name = `kind-${this.model.name}-${this.part("name").textContent}`;
      radio.disabled = Boolean(share) && radio.value !== this.kind;
      radio.onchange = () => this.set_sharing(this.reuse, radio.value);
    }
    this.part("as-trained").onclick = () => this.set_sharing(this.model.kinds.map((kind) => kind !== "full"));
    for (const canvas of this.element.querySelectorAll("canvas")) {
      canvas.onpointermove = (event) => this.point(Math.floor((event.offsetX - GUTTER) / this.box));
      canvas.onpointerleave = () => this.point(null);
    }
    find("summary", this.element).textContent = `The held-out text, ${written(this.model.passage_bytes)} bytes`;
    find("blockquote", this.element).textContent = this.model.passage;
    this.as_trained = new Reading(this.model, this.model.kinds);
    this.set_sharing(this.reuse);
  }

  // Lets other layers reuse, or reuse something else, and begins again.
  set_sharing(reuse, kind = this.kind) {
    this.reuse = reuse;
    this.kind = kind;
    this.kinds = kinds_of(reuse, kind);
    for (const radio of this.element.querySelectorAll("[type=radio]")) radio.checked = radio.value === kind;
    const share = share_of(reuse);
    const flags = share && share !== this.model.config.share
      ? ` --share=${share}` + (kind === "weights" ? "" : ` --share_kind=${kind}`) : "";
    this.part("command").textContent = `python sample.py ${this.model.name}${flags}`;
    this.changed = this.kinds.some((each, l) => each !== this.model.kinds[l]);
    this.part("as-trained").disabled = !this.changed;
    this.rows.forEach((row, l) => this.describe(row, l));
    this.reading = this.changed ? new Reading(this.model, this.kinds) : this.as_trained;
    this.restart();
  }

  describe(row, l) {
    const on = this.reuse[l];
    const is_anchor = !on && this.reuse[l + 1];
    const locked = l === 0 || this.model.kinds[l] !== "full";
    row.className = `layer${on ? " reuse" : ""}${on || is_anchor ? " span" : ""}`;
    const button = find("button", row);
    const taken = this.kind === "weights" ? "P" : "K and V";
    button.disabled = locked;
    button.ariaChecked = String(Boolean(on));
    button.ariaLabel = `Layer ${l} reuses what layer ${l - 1} computes`;
    button.dataset.taken = taken;
    find("b", button).textContent = `Layer ${l}`;
    find("small", button).textContent = on ? "reuse layer" : is_anchor ? "anchor" : "full attention";
    find(".switch", button).textContent = locked ? "" : on ? "make it full" : "make it reuse";
  }

  // Reads the prompt anew.
  restart() {
    const { tokenizer, config } = this.model;
    const ids = tokenizer.encode(by_id("prompt").value.slice(-LONGEST) || "\n");
    const farthest = config.block_size * config.n_layer; // what all layers together can see
    this.tokens = ids.slice(-farthest);
    this.left_out = ids.length - this.tokens.length;
    this.n_prompt = this.tokens.length;
    this.decoder = new Decoder(this.model, this.kinds);
    this.random = uniform(Number(by_id("seed").value) || 0);
    this.all = { flops: 0, read_bytes: 0 };
    this.written = 0;
    this.part("text").replaceChildren();
    this.utf8 = new TextDecoder();
    wake();
  }

  get behind() {
    return this.n_prompt > 0 && this.decoder.length < this.n_prompt + goal;
  }

  // What is still to be read of the held-out text.
  get unread() {
    return [this.reading, this.as_trained].find((reading) => !reading.done);
  }

  // Reads the next token: of the prompt, or the one that is drawn now.
  advance() {
    const { tokens, decoder } = this;
    if (decoder.length === tokens.length) {
      tokens.push(draw(this.logits, Number(by_id("temperature").value), this.random()));
    }
    stale = true;
    const begin = performance.now();
    this.logits = decoder.step(tokens[decoder.length]);
    ms += 0.02 * (performance.now() - begin - ms);
    this.cost = predict(this.model.config, this.kinds, decoder.S);
    this.all.flops += this.cost.flops;
    this.all.read_bytes += this.cost.read_bytes;
  }

  show(all) {
    this.show_passage();
    if (!all || !this.decoder.length) return;
    this.show_text();
    this.show_layers();
    this.show_bill();
    this.show_next();
  }

  show_text() {
    const box = this.part("text");
    const { length, size } = this.decoder;
    find(".newest", box)?.classList.remove("newest");
    for (; this.written < length; this.written++) {
      const span = document.createElement("span");
      if (this.written < this.n_prompt) span.className = "prompt";
      const bytes = this.model.tokenizer.bytes(this.tokens[this.written]);
      span.textContent = this.utf8.decode(bytes, { stream: true });
      box.append(span);
      if (this.written >= size) box.children[this.written - size].classList.add("gone");
    }
    box.lastChild.classList.add("newest");
  }

  show_bill() {
    const full = predict(this.model.config, this.kinds.map(() => "full"), this.decoder.S);
    const { cost, all } = this;
    const percent = (name) => `${(100 * cost[name] / full[name]).toFixed(0)} %`;
    const is_full = this.decoder.length > this.decoder.size;
    const rows = [
      ["cache bytes", is_full ? 0 : cost.cache_bytes_per_token, cost.cache_bytes, percent("cache_bytes")],
      ["FLOPs", cost.flops, all.flops, percent("flops")],
      ["bytes read", cost.read_bytes, all.read_bytes, percent("read_bytes")],
    ];
    const body = find("tbody", this.element);
    while (body.rows.length < rows.length) body.append(document.createElement("tr"));
    rows.forEach(([name, ...cells], i) => {
      const texts = cells.map((cell) => `<td>${typeof cell === "string" ? cell : written(cell)}</td>`);
      body.rows[i].innerHTML = `<th scope=row>${name}</th>${texts.join("")}`;
    });
    this.part("bytes").textContent = `${written(cost.cache_bytes)} bytes`;
    this.part("of-full").textContent = `${percent("cache_bytes")} of full attention`;
    const bar = this.part("bar");
    const stored = (name) => this.kinds.filter((kind) => KINDS[kind].makes.includes(name)).length;
    for (const [i, name] of ["k", "v"].entries()) {
      bar.children[i].style.width = `${50 * stored(name) / this.kinds.length}%`;
      bar.children[i].textContent = stored(name) ? ["keys", "values"][i] : "";
    }
    bar.ariaLabel = `The cache takes ${percent("cache_bytes")} of what full attention stores`;
    const speed = written(Number((1000 / ms).toPrecision(2)));
    this.part("speed").textContent = `${written(cost.parameters)} parameters; `
      + `about ${speed} tokens/s without drawing`;
  }

  show_next() {
    const p = softmax(this.logits);
    const likeliest = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, SHOWN_TOKENS);
    const list = find(".next ol", this.element);
    while (list.children.length < likeliest.length) list.append(document.createElement("li"));
    likeliest.forEach((id, i) => {
      const text = document.createElement("code");
      text.textContent = label(this.model.tokenizer, id);
      const percent = (100 * p[id]).toFixed(1);
      list.children[i].replaceChildren(text, `${percent} %`);
      list.children[i].style.setProperty("--p", `${percent}%`);
    });
  }

  // ---- the layers ----

  // How wide a column is: as many columns as needed, and no wider than 28 pixels.
  fit(width) {
    let columns = this.decoder.size;
    const needed = Math.max(this.decoder.S, width / 28);
    while (columns / 2 >= needed) columns /= 2;
    this.box = width / columns;
    return Math.floor(columns);
  }

  show_layers() {
    const { P, S, H, slot } = this.decoder;
    const head = by_id("head").value;
    const heads = head === "mean" ? Array.from({ length: H }, (_, h) => h) : [Math.min(Number(head), H - 1)];
    const mean = (P, s) => sum(heads.map((h) => P[h * S + s])) / heads.length;
    this.weights = P.map((rows) => Float32Array.from({ length: S }, (_, s) => mean(rows, s)));
    this.rows.forEach((row, l) => {
      const paint = new Paint(find("canvas", row), this);
      const { makes } = KINDS[this.kinds[l]];
      const from = `layer ${this.reuse.lastIndexOf(false, l)}`;
      paint.strip("P", makes.includes("q"), () => paint.shades(this.weights[l]));
      for (const name of ["K", "V"]) {
        const kept = makes.includes(name.toLowerCase());
        const none = { weights: `no keys: P comes from ${from}`, kv: `those of ${from}, not stored again` };
        paint.strip(name, kept, () => (kept ? paint.boxes(name) : paint.say(none[this.kinds[l]])));
      }
      paint.frame(slot);
      paint.context.canvas.ariaLabel = `Layer ${l}, ${S} tokens visible. Stored here: `
        + (makes.includes("k") ? "keys and values" : makes.includes("v") ? "values, no keys" : "nothing");
    });
    this.show_axis();
    this.point(this.pointed);
  }

  show_axis() {
    const paint = new Paint(find(".axis canvas", this.element), this);
    const { context } = paint;
    const every = Math.ceil(9 / this.box); // 9 pixels hold a letter
    context.fillStyle = paint.color("ink");
    context.textAlign = "right";
    for (let s = 0; s < this.decoder.S; s += every) {
      context.save();
      context.translate(GUTTER + (s + 0.5) * this.box, 3);
      context.rotate(-Math.PI / 2);
      context.fillText(label(this.model.tokenizer, this.tokens[this.position(s)]), 0, 0, paint.height - 4);
      context.restore();
    }
  }

  // A slot → the position of the token that it holds.
  position(slot) {
    const { length, size } = this.decoder;
    return length - 1 - (length - 1 - slot) % size;
  }

  get hint() {
    const { length, size } = this.decoder;
    if (length > size) return `All ${size} slots are taken: each new token overwrites the oldest.`;
    return this.model.config.share ? "Point at a column to see its token."
      : "Click a layer: it then reuses what the layer below computes, without having been trained to.";
  }

  // Says which token is in a column, and how much each layer looks at it.
  point(column) {
    const seen = column !== null && column >= 0 && column < this.decoder.S;
    this.pointed = seen ? column : null;
    find(".at", this.element)?.classList.remove("at");
    this.part("hint").textContent = this.hint;
    if (!seen) return;
    const position = this.position(column);
    this.part("text").children[position]?.classList.add("at");
    const looks = this.weights.map((row, l) => `layer ${l} ${(100 * row[column]).toFixed(0)} %`);
    const name = label(this.model.tokenizer, this.tokens[position]);
    this.part("hint").textContent = `Token ${position}, “${name}”. Looked at: ${looks.join(", ")}`;
  }

  show_passage() {
    const { reading } = this;
    const known = reading.n > 1;
    this.part("bpb").textContent = known ? reading.bits_per_byte.toFixed(2) : "…";
    let change = known ? ` ± ${reading.error().toFixed(2)}` : "";
    if (!reading.done) change += " so far";
    if (this.changed && reading.done && this.as_trained.done) {
      const more = reading.bits_per_byte - this.as_trained.bits_per_byte;
      const error = reading.error(this.as_trained);
      const sign = more < 0 ? "−" : "+";
      change += `; as trained ${this.as_trained.bits_per_byte.toFixed(2)}, `
        + (Math.abs(more) < 2.5 * error ? "too close to tell apart on this text"
          : `so sharing adds ${sign}${Math.abs(more).toFixed(2)} ± ${error.toFixed(2)}`);
    }
    this.part("change").textContent = change;
  }
}

// The loss on the built-in text, token after token.
class Reading {
  constructor(model, kinds) {
    model.passage_ids ??= model.tokenizer.encode(model.passage);
    this.ids = model.passage_ids;
    this.tokenizer = model.tokenizer;
    this.decoder = new Decoder(model, kinds);
    this.nats = []; // of each token but the first
    this.bytes = 0;
  }

  get n() {
    return this.nats.length;
  }

  get done() {
    return this.n >= this.ids.length - 1;
  }

  advance() {
    const p = softmax(this.decoder.step(this.ids[this.n]));
    const next = this.ids[this.n + 1];
    this.nats.push(-Math.log(p[next]));
    this.bytes += this.tokenizer.bytes(next).length;
  }

  get bits_per_byte() {
    return sum(this.nats) / Math.LN2 / this.bytes;
  }

  // The standard error of bits_per_byte, or of its difference to another reading of this text.
  error(other) {
    const nats = this.nats.map((number, i) => number - (other ? other.nats[i] : 0));
    const mean = sum(nats) / this.n;
    const variance = sum(nats.map((number) => (number - mean) ** 2)) / (this.n - 1);
    return Math.sqrt(variance * this.n) / Math.LN2 / this.bytes;
  }
}

// ---- drawing ----

const GUTTER = 22; // pixels for the letters on the left
let colors = {};
let resized = 0; // how often the page was: to ask for sizes costs a layout of the page

// A canvas of strips, one below the other, each with a box for a slot.
class Paint {
  constructor(canvas, side) {
    const scale = devicePixelRatio;
    if (canvas.resized !== resized) {
      Object.assign(canvas, { resized, css_width: canvas.clientWidth, css_height: canvas.clientHeight });
      canvas.width = Math.round(canvas.css_width * scale);
      canvas.height = Math.round(canvas.css_height * scale);
    }
    const { css_width: width, css_height: height } = canvas;
    this.context = canvas.getContext("2d");
    this.context.setTransform(scale, 0, 0, scale, 0, 0);
    this.context.clearRect(0, 0, width, height);
    this.context.font = "11px system-ui, sans-serif";
    this.context.textBaseline = "middle";
    this.columns = side.fit(width - GUTTER - 2);
    this.S = side.decoder.S;
    this.box = side.box;
    this.height = height;
    this.strip_height = (height - 2) / 3 - 4;
    this.y = 1;
  }

  color(name) {
    return colors[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
  }

  // A strip with a letter before it, and what fill() puts into it. Its frame is dashed unless the layer
  // computes that itself.
  strip(name, own, fill) {
    const { context, strip_height: h } = this;
    const hue = { P: "ink", K: "keys", V: "values" }[name];
    context.textAlign = "center";
    context.fillStyle = this.color(own ? hue : "dim");
    context.font = `${own ? "bold " : ""}13px system-ui, sans-serif`;
    context.fillText(name, 9, this.y + h / 2);
    context.strokeStyle = this.color(own ? "line" : "dim");
    context.setLineDash(own ? [] : [4, 3]);
    context.strokeRect(GUTTER - 0.5, this.y - 0.5, this.columns * this.box + 1, h + 1);
    context.setLineDash([]);
    fill();
    this.y += h + 5;
  }

  say(text) {
    const { context, y, strip_height: h } = this;
    context.textAlign = "left";
    context.fillStyle = this.color("dim");
    context.font = "12px system-ui, sans-serif";
    context.fillText(text, GUTTER + 8, y + h / 2, this.columns * this.box - 12);
  }

  shades(weights) {
    const { context, y, box, strip_height: h } = this;
    context.fillStyle = this.color("ink");
    weights.forEach((p, s) => {
      context.globalAlpha = p ** 0.4; // so that small ones can be seen
      context.fillRect(GUTTER + s * box, y, box, h);
    });
    context.globalAlpha = 1;
  }

  // A box for each stored key or value: one bar, cut.
  boxes(name) {
    const { context, y, box, S, strip_height: h } = this;
    const bar = [GUTTER, y + 1, S * box, h - 2];
    context.fillStyle = this.color(name === "K" ? "keys" : "values");
    context.fillRect(...bar);
    if (name === "K") {
      context.fillStyle = this.stripes();
      context.fillRect(...bar);
    }
    context.fillStyle = this.color("on");
    context.font = "bold 11px system-ui, sans-serif";
    for (let s = 0; s < S; s++) {
      if (box > 2) context.clearRect(GUTTER + (s + 1) * box - 1, y + 1, 1, h - 2);
      if (box >= 11) context.fillText(name, GUTTER + (s + 0.5) * box, y + h / 2 + 0.5);
    }
  }

  stripes() {
    if (colors.stripes) return colors.stripes;
    const tile = new OffscreenCanvas(6, 6);
    const context = tile.getContext("2d");
    context.strokeStyle = this.color("ground");
    context.globalAlpha = 0.45;
    for (const x of [-6, 0, 6]) {
      context.moveTo(x, 6);
      context.lineTo(x + 6, 0);
    }
    context.stroke();
    return colors.stripes = this.context.createPattern(tile, "repeat");
  }

  // A frame around the newest token's column.
  frame(slot) {
    const { context, box } = this;
    context.strokeStyle = this.color("ink");
    context.lineWidth = 2;
    context.strokeRect(GUTTER + slot * box, 1, Math.max(box, 3), this.y - 6);
    context.lineWidth = 1;
  }
}

// ---- the loop: work for some milliseconds, draw, and again while there is something to do ----

let asked = false;
let stale = true; // what is drawn
let due = 0; // when the next token is

function wake() {
  stale = true;
  ask();
}

function ask() {
  if (!asked) requestAnimationFrame(frame);
  asked = true;
}

function frame(now) {
  asked = false;
  const interval = 1000 / Number(by_id("speed").value);
  if (playing && now >= due && !sides.some((side) => side.behind)) {
    goal += 1;
    due = Math.max(due + interval, now);
  }
  const end = performance.now() + SLICE;
  const busy = (is_busy, work) => {
    const waiting = sides.filter(is_busy);
    for (const each of waiting) work(each);
    return waiting.length && performance.now() < end;
  };
  while (busy((side) => side.behind, (side) => side.advance()));
  while (busy((side) => side.unread, (side) => side.unread.advance()));
  for (const side of sides) side.show(stale);
  stale = false;
  if (goal >= MOST && playing) play(false);
  say();
  if (playing || sides.some((side) => side.behind || side.unread)) ask();
}

function say() {
  by_id("degrees").textContent = by_id("temperature").value;
  const prompt = by_id("prompt").value;
  const notes = [];
  const left_out = Math.max(...sides.map((side) => side.left_out));
  if (!prompt) notes.push("The prompt is empty, so the text begins with a line end.");
  if (left_out) notes.push(`The first ${written(left_out)} tokens are too far back to matter: left out.`);
  if (sides.some((side) => !side.n_prompt)) notes.push("No token for any of this prompt: type another.");
  if (goal >= MOST) notes.push(`${written(MOST)} tokens are enough: restart, or type another prompt.`);
  const note = notes.join(" ");
  if (by_id("note").textContent !== note) by_id("note").textContent = note;
}

// ---- controls ----

function play(on) {
  playing = on && goal < MOST;
  due = 0;
  by_id("play").textContent = playing ? "Pause" : "Play";
  wake();
}

function step() {
  play(false);
  goal = Math.min(goal + 1, MOST);
}

function restart(new_goal = goal) {
  goal = new_goal;
  for (const side of sides) side.restart();
}

by_id("play").onclick = () => play(!playing);
by_id("step").onclick = step;
by_id("restart").onclick = () => restart(0);
by_id("head").onchange = wake;
for (const name of ["prompt", "seed", "temperature"]) by_id(name).oninput = () => restart(Math.min(goal, 100));

document.onkeydown = (event) => {
  const typing = event.target.matches("input:not([type=radio]), textarea, select");
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowRight" && event.target.type !== "radio") step();
  else if (event.key === " " && !event.target.matches("button, summary, input")) play(!playing);
  else if (event.key === "Escape" && stop !== null) tour(null);
  else return;
  event.preventDefault();
};

const most_heads = Math.max(...models.map((model) => model.config.n_head));
by_id("head").append(new Option("mean of all", "mean"));
for (let head = 0; head < most_heads; head++) by_id("head").append(new Option(`head ${head}`, head));

// ---- the tour ----

const stops = Array.from(document.querySelectorAll("#tour li"));
let stop = null; // the number of the one that is shown, or null

function tour(number) {
  find(".shown")?.classList.remove("shown");
  const begins = stop === null;
  stop = number;
  by_id("tour").hidden = stop === null;
  stops.forEach((each, i) => { each.hidden = i !== stop; });
  if (stop === null) return by_id("tour-start").focus({ preventScroll: true });
  const selector = stops[stop].dataset.shows;
  const last = sides[0].rows.length - 1;
  if (!find(selector) && last > 0) sides[0].set_sharing(sides[0].reuse.map((_, l) => l === last)); // none yet
  const target = find(selector) ?? by_id("sides");
  target.classList.add("shown");
  target.scrollIntoView({ block: "center" });
  by_id("tour-back").disabled = stop === 0;
  by_id("tour-next").textContent = stop + 1 < stops.length ? "Next" : "Done";
  if (begins) by_id("tour-next").focus({ preventScroll: true });
}

by_id("tour-start").onclick = () => tour(0);
by_id("tour-back").onclick = () => tour(stop - 1);
by_id("tour-next").onclick = () => tour(stop + 1 < stops.length ? stop + 1 : null);
by_id("tour-end").onclick = () => tour(null);

// ---- begin ----

const sides = [];
models.forEach((model, i) => sides.push(new Side(model, i)));
matchMedia("(prefers-color-scheme: dark)").onchange = () => { colors = {}; wake(); };
new ResizeObserver(() => { resized += 1; wake(); }).observe(by_id("sides"));
