// The page around decode.js: what is drawn, and what can be clicked.
//
// What is shown follows from the controls alone: the prompt, seed, temperature, sharing, and the goal,
// which is how many tokens to generate. Whatever is changed, the text is generated again from the start.
"use strict";

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const find = (selector, inside = document) => inside.querySelector(selector);
const by_id = (id) => document.getElementById(id);
const written = (number) => number.toLocaleString("en-US");
const percent = (part) => `${(100 * part).toFixed(0)} %`;
const MOST = 1000; // tokens generated
const LONGEST = 100000; // characters of a prompt that are looked at
const SLICE = 30; // ms of work between two pictures

const models = JSON.parse(by_id("models").textContent).map(open_model);
let goal = 12;
let playing = false;

// How a token is written where its ends must be seen.
function label(tokenizer, id) {
  const text = tokenizer.text(id);
  if (!text.includes("\ufffd")) return text.replace(/\n/g, "⏎").replace(/ /g, "␣");
  return Array.from(tokenizer.bytes(id), (byte) => "\\x" + byte.toString(16).padStart(2, "0")).join("");
}

// Which layers reuse what, for people.
function in_words(reuse, kind) {
  const taken = { weights: "P", kv: "K and V" }[kind];
  const spans = share_of(reuse).split(",").filter(Boolean).map((span) => {
    const [anchor, last] = span.split("-").map(Number);
    const layers = last - anchor === 1 ? `layer ${last} reuses` : `layers ${anchor + 1}–${last} reuse`;
    return `${layers} ${taken} of layer ${anchor}`;
  });
  return spans.join(", ") || "full attention";
}

// ---- one model: its state, and its part of the page ----

class Side {
  constructor(model, index) {
    this.model = model;
    this.trained = model.kinds.map((kind) => kind !== "full"); // which layers reuse
    this.kind = model.config.share_kind;
    this.letter = "AB"[index];
    this.element = by_id("side").content.cloneNode(true).firstElementChild;
    by_id("sides").append(this.element);
    this.build();
  }

  part(name) {
    return find(`.${name}`, this.element);
  }

  build() {
    const { share } = this.model.config;
    this.rows = this.trained.map((_, l) => {
      const row = by_id("row").content.cloneNode(true).firstElementChild;
      find("button", row).onclick = () => this.set_sharing(this.reuse.with(l, !this.reuse[l]));
      this.part("layers").prepend(row); // layer 0 at the bottom, as each builds on the one below
      return row;
    });
    for (const radio of this.element.querySelectorAll("[type=radio]")) {
      radio.name = `kind-${this.letter}`;
      radio.onchange = () => this.set_sharing(this.reuse, radio.value);
    }
    find("fieldset", this.element).hidden = share !== "";
    this.part("locked").hidden = share === "";
    this.part("as-trained").onclick = () => {
      this.set_sharing(this.trained);
      this.part("layers").focus({ preventScroll: true }); // as the button vanishes
    };
    this.part("layers").onkeydown = (event) => {
      const way = { ArrowUp: 1, ArrowDown: -1 }[event.key];
      if (!way) return;
      this.point((this.pointed ?? this.decoder.slot) + way);
      event.preventDefault();
    };
    for (const canvas of this.element.querySelectorAll("canvas")) {
      canvas.onpointermove = (event) => this.point(Math.floor((event.offsetX - gutter()) / this.box));
      canvas.onpointerleave = () => this.point(null);
    }
    const size = written(this.model.passage_bytes);
    find("summary", this.element).textContent = `The held-out text, ${size} bytes`;
    find("blockquote", this.element).textContent = this.model.passage;
    this.as_trained = new Reading(this.model, this.model.kinds);
    this.set_sharing(this.trained);
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
    find("h2", this.element).textContent = this.name;
    this.element.dataset.kind = kind;
    this.rows.forEach((row, l) => this.describe(row, l));
    this.reading = this.changed ? new Reading(this.model, this.kinds) : this.as_trained;
    this.restart();
  }

  describe(row, l) {
    const on = this.reuse[l];
    const is_anchor = !on && this.reuse[l + 1];
    const anchor = this.reuse.lastIndexOf(false, l - 1); // of l, if it reuses; -1 below layer 0
    const taken = this.kind === "weights" ? "P" : "K, V";
    row.className = `layer${on ? " reuse" : ""}${on || is_anchor ? " span" : ""}`;
    const button = find("button", row);
    button.disabled = l === 0 || this.trained[l];
    button.ariaChecked = String(on);
    button.ariaLabel = `Layer ${l}: ` + (l ? `reuse ${taken} of layer ${anchor}` : "none below");
    find("b", button).textContent = `Layer ${l}${on ? ": reuse" : is_anchor ? ": anchor" : ""}`;
    find("small", button).textContent = on ? `uses ${taken} of layer ${anchor}`
      : is_anchor ? `lends its ${taken} upward` : "full attention";
    find(".switch", button).textContent = l === 0 ? "no layer below" : this.trained[l] ? "trained to reuse"
      : on ? "make it full" : "make it reuse";
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
    this.random = uniform(seed());
    this.written = 0;
    this.total = { flops: 0, read_bytes: 0 };
    this.seconds = 0; // of computing, without drawing
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
    const begun = performance.now();
    this.logits = decoder.step(tokens[decoder.length]);
    this.seconds += (performance.now() - begun) / 1000;
    const cost = predict(this.model.config, this.kinds, decoder.S);
    for (const key in this.total) this.total[key] += cost[key];
  }

  show(all) {
    if (!all || !this.decoder.length) return;
    this.show_text();
    this.show_layers();
    this.show_cost();
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

  show_cost() {
    const cost = predict(this.model.config, this.kinds, this.decoder.S);
    const full = this.full_cost();
    const rows = { "KV cache now, bytes": "cache_bytes", "FLOPs for the newest token": "flops",
      "bytes read for it": "read_bytes" };
    const cells = Object.entries(rows).map(([name, key]) => `<tr><th scope=row>${name}</th>`
      + `<td>${written(cost[key])}</td><td>${percent(cost[key] / full[key])}</td>`
      + `<td>${key in this.total ? written(this.total[key]) : ""}</td></tr>`);
    const n_tokens = sum(sides.map((side) => side.decoder.length));
    const speed = Math.round(n_tokens / sum(sides.map((side) => side.seconds)));
    cells.push(`<tr><th scope=row>tokens/s, mean of all models</th><td>${written(speed)}</td></tr>`);
    find("tbody", this.element).innerHTML = cells.join("");
  }

  // What full attention in all layers would cost.
  full_cost(S = this.decoder.S) {
    return predict(this.model.config, this.kinds.map(() => "full"), S);
  }

  get name() {
    const how = this.changed ? ", never trained to" : this.model.config.share ? ", as trained" : "";
    return `${this.letter}: ${in_words(this.reuse, this.kind)}${how}`;
  }

  // Rows of the table of scores: the model as it is now, and before that as it was trained if that differs.
  get scores() {
    const before = `${this.letter}: ${in_words(this.trained, this.model.config.share_kind)}, as trained`;
    const trained = this.changed ? this.score(before, this.model.kinds, this.as_trained) : "";
    return trained + this.score(this.name, this.kinds, this.reading);
  }

  score(name, kinds, reading) {
    const full = this.full_cost();
    const cost = predict(this.model.config, kinds, this.decoder.S);
    const part = percent(cost.cache_bytes_per_token / full.cache_bytes_per_token);
    const bar = ["keys", "values"].map((name) => {
      const layers = kinds.filter((kind) => KINDS[kind].makes.includes(name[0]));
      return `<i class=${name} style="width: ${50 * layers.length / kinds.length}%"></i>`;
    });
    return `<tr><th scope=row>${name}</th>`
      + `<td><div class=bar style="width: ${100 * full.cache_bytes / longest}%">${bar.join("")}</div></td>`
      + `<td>${written(cost.cache_bytes)} bytes, ${part}</td><td>${this.loss(reading)}</td></tr>`;
  }

  loss(reading) {
    const whole = written(this.model.passage_bytes);
    if (!reading.done) return `measuring… ${written(reading.bytes)} of ${whole} bytes`;
    const bits = `<b class=bpb>${reading.bits_per_byte.toFixed(3)}</b>`;
    if (reading === this.as_trained) return `${bits} ± ${reading.error().toFixed(3)}`;
    if (!this.as_trained.done) return bits;
    const more = reading.bits_per_byte.toFixed(3) - this.as_trained.bits_per_byte.toFixed(3); // as shown
    const error = reading.error(this.as_trained);
    const change = `${more < 0 ? "−" : "+"}${Math.abs(more).toFixed(3)} ± ${error.toFixed(3)}`;
    return `${bits} <span class=change>${change} (same text, paired)</span>`;
  }

  show_next() {
    const p = softmax(this.logits);
    const likeliest = Array.from(p.keys()).sort((a, b) => p[b] - p[a]);
    this.element.querySelectorAll(".next li").forEach((row, i) => {
      const percent = `${(100 * p[likeliest[i]]).toFixed(1)} %`;
      find("code", row).textContent = label(this.model.tokenizer, likeliest[i]);
      find("span", row).textContent = percent;
      row.style.setProperty("--p", percent.replace(" ", ""));
    });
  }

  // ---- the layers ----

  // A column is wide enough for a letter until such columns no longer fit; then all slots are shown.
  fit(width) {
    const { S, size } = this.decoder;
    const wide = Math.floor(width / (0.8 * rem()));
    const columns = S <= wide ? Math.min(wide, size) : size;
    this.box = width / columns;
    return columns;
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
      const anchor = this.reuse.lastIndexOf(false, l);
      paint.strip("P", makes.includes("q"), () => paint.shades(this.weights[l]), slot);
      for (const name of ["K", "V"]) {
        const kept = makes.includes(name.toLowerCase());
        const through = l - anchor > 1 ? `, passed up through layer ${l - 1}` : "";
        const none = this.kind === "weights" ? `no keys: uses P of layer ${anchor}${through}`
          : `uses layer ${anchor}'s ${name === "K" ? "keys" : "values"}`;
        paint.strip(name, kept, () => (kept ? paint.boxes(name) : paint.say(none)), kept ? slot : null);
      }
      paint.context.canvas.ariaLabel = `Layer ${l}, ${S} tokens visible. Stored here: `
        + (makes.includes("k") ? "keys and values" : makes.includes("v") ? "values, no keys" : "nothing");
    });
    this.show_axis();
    this.point(this.pointed);
  }

  show_axis() {
    const paint = new Paint(find(".axis canvas", this.element), this);
    const { context } = paint;
    if (this.box < 0.7 * rem()) return paint.say(`${paint.columns} slots: point at one to see its token`);
    context.fillStyle = paint.color("ink");
    context.textAlign = "right";
    for (let s = 0; s < this.decoder.S; s++) {
      context.save();
      context.translate(gutter() + (s + 0.5) * this.box, 3);
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
    if (this.changed) return "It now reuses, although it was never trained to.";
    return this.model.config.share ? "Point at a column to see its token."
      : "Click a layer above layer 0: it then reuses, although it was never trained to.";
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
    const looks = this.weights.map((row) => percent(row[column])).join(", ");
    const name = label(this.model.tokenizer, this.tokens[position]);
    this.part("hint").textContent = `The newest token's attention to “${name}” (token ${position + 1}), `
      + `layers 0–${this.rows.length - 1}: ${looks}`;
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

const rem = () => parseFloat(colors.rem ??= getComputedStyle(document.documentElement).fontSize);
const gutter = () => 2.6 * rem(); // for arrows and letters on the left
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
    this.font(0.875);
    this.context.textBaseline = "middle";
    this.columns = side.fit(width - gutter() - 2);
    Object.assign(this, { height, S: side.decoder.S, box: side.box });
    this.strip_height = (height - 8) / 3 - 3;
    this.y = 4;
  }

  color(name) {
    return colors[name] ??= getComputedStyle(document.documentElement).getPropertyValue(`--${name}`);
  }

  font(size, weight = "") {
    this.context.font = `${weight} ${size * rem()}px system-ui, sans-serif`;
  }

  // A strip with a letter before it, what fill() puts into it, and a frame around the newest token. The
  // strip's own frame is dashed unless the layer computes that itself.
  strip(name, own, fill, newest) {
    const { context, strip_height: h } = this;
    const hue = { P: "ink", K: "keys", V: "values" }[name];
    context.textAlign = "center";
    context.fillStyle = this.color(own ? hue : "dim");
    this.font(0.9, own ? "bold" : "");
    context.fillText(name, gutter() - 0.6 * rem(), this.y + h / 2 + 1);
    context.strokeStyle = this.color(own ? "line" : "dim");
    context.setLineDash(own ? [] : [4, 3]);
    context.strokeRect(gutter() - 0.5, this.y - 0.5, this.columns * this.box + 1, h + 1);
    context.setLineDash([]);
    fill();
    context.strokeStyle = this.color("ink");
    context.lineWidth = 2;
    const width = Math.max(this.box - 1, 3);
    if (newest !== null) context.strokeRect(gutter() + newest * this.box, this.y, width, h);
    context.lineWidth = 1;
    this.y += h + 3;
  }

  say(text) {
    const { context, y, strip_height: h } = this;
    context.textAlign = "left";
    context.fillStyle = this.color("dim");
    this.font(0.875);
    context.fillText(text, gutter() + 8, y + h / 2 + 1, this.columns * this.box - 12);
  }

  shades(weights) {
    const { context, y, box, strip_height: h } = this;
    context.fillStyle = this.color("ink");
    weights.forEach((p, s) => {
      context.globalAlpha = p ** 0.4; // so that small ones can be seen
      context.fillRect(gutter() + s * box, y, box, h);
    });
    context.globalAlpha = 1;
  }

  // A box for each stored key or value: one bar, cut.
  boxes(name) {
    const { context, y, box, S, strip_height: h } = this;
    const bar = [gutter(), y + 1, S * box, h - 2];
    context.fillStyle = this.color(name === "K" ? "keys" : "values");
    context.fillRect(...bar);
    if (name === "K") {
      context.fillStyle = this.stripes();
      context.fillRect(...bar);
    }
    context.fillStyle = this.color("on");
    this.font(0.7, "bold");
    if (box < 0.7 * rem()) return;
    for (let s = 0; s < S; s++) {
      context.clearRect(gutter() + (s + 1) * box - 1, y + 1, 1, h - 2);
      context.fillText(name, gutter() + (s + 0.5) * box, y + h / 2 + 1);
    }
  }

  stripes() {
    if (colors.stripes) return colors.stripes;
    const tile = new OffscreenCanvas(6, 6);
    const context = tile.getContext("2d");
    context.strokeStyle = this.color("ground");
    context.globalAlpha = 0.45;
    context.stroke(new Path2D("M-6 6l6-6M0 6l6-6M6 6l6-6"));
    return colors.stripes = this.context.createPattern(tile, "repeat");
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
  find("#scores tbody").innerHTML = sides.map((side) => side.scores).join("");
  stale = false;
  if (goal >= MOST && playing) play(false);
  say();
  if (playing || sides.some((side) => side.behind || side.unread)) ask();
}

function say() {
  by_id("degrees").textContent = by_id("temperature").value;
  const notes = [];
  const left_out = Math.max(...sides.map((side) => side.left_out));
  if (!by_id("prompt").value) notes.push("The prompt is empty, so the text begins with a newline.");
  const read = Math.min(...sides.map((side) => side.n_prompt));
  if (left_out) notes.push(`Only the last ${written(read)} tokens of this prompt are read `
    + `(the first ${written(left_out)} can no longer influence the result).`);
  if (!read) notes.push("No token for any of this prompt: type another.");
  const used = written(seed());
  if (String(seed()) !== by_id("seed").value) notes.push(`Seed ${used}: it is a whole number up to 999,999.`);
  if (goal >= MOST) notes.push(`${written(MOST)} tokens are enough: restart, or type another prompt.`);
  const note = notes.join(" ");
  if (by_id("note").textContent !== note) by_id("note").textContent = note;
}

// ---- controls ----

const seed = () => Math.min(Math.max(Math.trunc(by_id("seed").value), 0), 999999);

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
for (const name of ["prompt", "seed", "temperature"]) {
  by_id(name).oninput = () => restart(Math.min(goal, 100));
}

document.onkeydown = (event) => {
  by_pointer = false;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event;
  const typing = target.matches("textarea, [type=number], [type=range]");
  if (key === "Escape" && stop !== null) tour(null);
  else if (key === "ArrowRight" && !typing) (stop === null ? step() : by_id("tour-next").click());
  else if (key === " " && !typing && !target.matches("button, summary, input, select")) play(!playing);
  else return;
  event.preventDefault();
};

// What was clicked loses the focus, so that space and the arrow keys work.
let by_pointer = false;
document.onpointerdown = () => { by_pointer = true; };
const leave = (event, which) => by_pointer && event.target.closest(which)?.blur();
document.onclick = (event) => leave(event, "button:not(#tour *), summary, [type=radio], [type=range]");
document.onchange = (event) => leave(event, "select");

const most_heads = Math.max(...models.map((model) => model.config.n_head));
for (let head = 0; head < most_heads; head++) by_id("head").append(new Option(`head ${head}`, head));
by_id("head").append(new Option("mean of all", "mean"));

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
  if (stop < 4) sides.filter((side) => side.changed).forEach((side) => side.set_sharing(side.trained));
  const { shows, strips } = stops[stop].dataset;
  if (!find(shows)) share(); // no reuse layer yet
  const { reuse } = sides.find((side) => side.reuse.includes(true)) ?? sides[0];
  by_id("anchor").textContent = `layer ${reuse.lastIndexOf(false, reuse.lastIndexOf(true))}`;
  const target = find(shows) ?? by_id("sides");
  target.classList.add("shown");
  target.dataset.strips = strips;
  target.scrollIntoView({ block: "nearest" });
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

// What the tour lets A reuse: what B was trained to, so that only training differs; or else the last layer.
const [a, b] = sides;
const alike = b?.model.config.share && !a.model.config.share && a.rows.length === b.rows.length;
const share = () => (alike ? a.set_sharing(b.trained, b.kind) : a.set_sharing(a.trained.with(-1, true)));
if (!alike) by_id("tour-share").textContent = "Let the last layer of A reuse";
by_id("tour-share").onclick = share;

// All bars of the cache have one scale: it ends where full attention has filled all slots.
const longest = Math.max(...sides.map((side) => side.full_cost(side.decoder.size).cache_bytes));
by_id("scale").textContent = `up to ${written(longest)} bytes`;
matchMedia("(prefers-color-scheme: dark)").onchange = () => { colors = {}; wake(); };
new ResizeObserver(() => { colors = {}; resized += 1; wake(); }).observe(by_id("sides"));
