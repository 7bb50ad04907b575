"""The page that runs models in a browser, beside plain.py, model.py, cost.py and the tokenizer; and the page
that is part of the repository."""

import base64
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minisa import cost
from minisa.kit import checkpoint, data
from minisa.kit.tokenizer import Tokenizer, learn
from minisa.lab import page
from minisa.model import GPT, GPTConfig
from minisa.plain import gpt

ROOT = Path(__file__).resolve().parent.parent.parent
COMMITTED = ROOT / "assets" / "page.html"
BROWSERS = "chromium", "chromium-browser", "google-chrome", "chrome"
PROMPT = "ROMEO: what's here? "

@pytest.fixture(scope="module")
def browser():
    reason = "needs playwright: pip install -e '.[page-test]'"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    system = next(filter(None, map(shutil.which, BROWSERS)), None)
    with playwright.sync_playwright() as tools:
        try:
            browser = tools.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("needs Chromium: playwright install chromium")
        yield browser
        browser.close()

@pytest.fixture
def open_page(browser):
    """open_page(file) → the page, when it is done. At the end: it asked for nothing, and had no error."""
    tabs, trouble = [], []

    def open_page(file, **settings):
        tab = browser.new_page(**settings)
        tabs.append(tab)
        tab.on("request", lambda request: trouble.append(request.url))
        tab.on("console", lambda message: trouble.append(message.text))
        tab.on("pageerror", lambda error: trouble.append(str(error)))
        tab.goto(Path(file).as_uri())
        assert trouble.pop(0).startswith("file:")
        settle(tab)
        return tab
    yield open_page
    for tab in tabs:
        tab.close()
    assert not trouble

def settle(tab):
    """Wait until the page has nothing left to read."""
    for _ in range(600):
        if tab.evaluate("!playing && !asked && sides.every(side => !side.behind && !side.unread)"):
            return
        tab.wait_for_timeout(50)
    raise AssertionError("the page is never done")

def tiny(text, seed=0, **fields):
    """A model with random weights whose heads attend differently, and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(learn(text.read_text(), 300))
    sizes = {"block_size": 24, "vocab_size": 300, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**{**sizes, **fields})).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3 if p.dim() == 2 else 1 + 0.1 * torch.randn_like(p)
    return model, tokenizer

def save(folder, text, model, tokenizer):
    tokens = data.tokenize(text, tokenizer=tokenizer, folder=folder.parent / "data").folder
    checkpoint.save(folder, model, tokenizer, {**checkpoint.UNKNOWN, "data": str(tokens)})
    return folder

@pytest.fixture(scope="module")
def tiny_page(text, tmp_path_factory):
    """A page of two random models: one with full attention, one that shares and whose head is not tied."""
    folder = tmp_path_factory.mktemp("page")
    models = {"full": tiny(text), "shared": tiny(text, 1, share="1-3", tied=False, n_hidden=37)}
    folders = [save(folder / name, text, *model) for name, model in models.items()]
    file = folder / "page.html"
    file.write_text(page.build([page.pack(source) for source in folders]), encoding="utf-8")
    return file

def packed(file):
    """What is in a page → a list of dicts, as pack() returns them."""
    written = file.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="models">(.*?)</script>', written)[1])

def model_of(packed, share=None, share_kind="weights"):
    """A packed model, with its rounded weights → GPT, Tokenizer."""
    model = GPT(GPTConfig(**packed["config"])).eval()
    halves = np.frombuffer(base64.b64decode(packed["weights"]), np.float16)
    shapes = packed["shapes"]
    parts = torch.from_numpy(halves.astype(np.float32)).split([math.prod(shape) for shape in shapes.values()])
    model.load_state_dict({name: part.view(shapes[name]) for name, part in zip(shapes, parts)})
    tokens = [token.encode("latin-1") for token in packed["tokens"]]
    if share is not None:
        model = checkpoint.reconfigure(model, share=share, share_kind=share_kind)
    return model, Tokenizer(tokens, packed["special"])

def plain_logits(model, ids):
    """Of every token, as plain.py computes them."""
    with torch.inference_mode():
        return gpt(model.state_dict(), model.config, torch.tensor(ids), model.config.block_size)

def click(tab, index, share, kind="weights"):
    """Choose layers and the kind of sharing as a user does."""
    side = tab.locator(".side").nth(index)
    radio = side.locator(f"[type=radio][value={kind}]")
    if radio.is_visible():                                      # not where a model was trained to share
        radio.click()
    buttons = side.locator(".layers button")
    wanted = tab.evaluate("([share, n]) => reuse_of(share, n)", [share, buttons.count()])
    for layer, on in enumerate(wanted[::-1]):                   # the last layer is at the top
        button = buttons.nth(layer)
        if (button.get_attribute("aria-checked") == "true") != on:
            button.click()
    settle(tab)

def generate(tab, prompt, n, temperature=0):
    """Type a prompt, let the page generate n tokens, → the ids of each model's text."""
    tab.fill("#prompt", prompt)
    tab.fill("#temperature", str(temperature))
    tab.evaluate("n => restart(n)", n)
    settle(tab)
    return tab.evaluate("sides.map(side => side.tokens)")

WAYS = {(0, ""): "weights", (0, "1-3"): "weights", (0, "0-1,2-3"): "weights", (0, "0-2"): "kv",
        (1, "1-3"): "weights", (1, "0-3"): "weights"}           # (model, --share): --share_kind

@pytest.mark.parametrize("way", WAYS, ids=str)
def test_logits_attention_text_and_loss_are_those_of_plain_and_model(tiny_page, open_page, way):
    (index, share), kind = way, WAYS[way]
    tab = open_page(tiny_page)
    content = packed(tiny_page)[index]
    model, tokenizer = model_of(content, share, kind)
    click(tab, index, share, kind)
    ids = tokenizer.encode(PROMPT)
    text = generate(tab, PROMPT, 40)[index]                     # past the cache of 24 tokens
    assert text == model.generate(torch.tensor([ids]), 40, temperature=0)[0].tolist()
    logits, P = plain_logits(model, text)
    theirs = tab.evaluate("i => Array.from(sides[i].logits)", index)
    assert torch.allclose(torch.tensor(theirs), logits[-1], atol=1e-4)
    rows = tab.evaluate("i => sides[i].decoder.P.map(P => Array.from(P))", index)
    for row, whole in zip(rows, P):                             # a ring: the slots are in another order
        mine = torch.tensor(row).view(4, 24).sort().values
        assert torch.allclose(mine, whole[:, -1, -24:].sort().values, atol=1e-5)
    passage = tokenizer.encode(content["passage"])
    logits, _ = plain_logits(model, passage)
    nats = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(passage[1:]), reduction="sum")
    bits = nats.item() / math.log(2) / len(tokenizer.decode_bytes(passage[1:]))
    assert tab.evaluate("i => sides[i].reading.bits_per_byte", index) == pytest.approx(bits, rel=1e-5)
    assert f"{bits:.3f}" in tab.locator("#scores .bpb").all_inner_texts()

@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_counters_are_what_cost_predicts(tiny_page, open_page, way):
    (index, share), kind = way, WAYS[way]
    tab = open_page(tiny_page)
    content = packed(tiny_page)[index]
    model, _ = model_of(content, share, kind)
    full = GPT(GPTConfig(**{**content["config"], "share": ""}))
    click(tab, index, share, kind)
    for n in (3, 60):                                           # before the cache is full, and after
        length = len(generate(tab, PROMPT, n)[index])
        expected = cost.predict(model, min(length, 24))
        of_full = cost.predict(full, min(length, 24))
        rows = tab.locator(".side").nth(index).locator("tbody tr").all_inner_texts()
        *cells, speed = [row.split("\t")[1:] for row in rows]
        assert int(speed[0].replace(",", "")) > 0
        for cell, name in zip(cells, ("cache_bytes", "decode_flops", "read_bytes"), strict=True):
            number, whole = getattr(expected, name), getattr(of_full, name)
            assert cell[0] == f"{number:,}"
            assert int(cell[1].removesuffix(" %")) == pytest.approx(100 * number / whole, abs=0.5)
            if name != "cache_bytes":                           # in all: of every token so far
                so_far = [cost.predict(model, min(S, 24)) for S in range(1, length + 1)]
                assert cell[2] == f"{sum(getattr(one, name) for one in so_far):,}"
        assert f"{expected.cache_bytes:,} bytes" in tab.locator("#scores").inner_text()
        held = tab.evaluate("i => sum(sides[i].decoder.layers.map(({ k, v }) => k.length + v.length))", index)
        assert 4 * held == cost.predict(model, 24).cache_bytes

TEXTS = ["", " ", "\n\n", "To be, or not to be", "I'll we've 'tis 's 'S", "a  b   c\t\n d \n\n\n e",
         "x" * 10_000, " " * 10_001 + "x", "été naïve ß ſ", "👩‍👩‍👧 🏳️‍🌈 ☃", "日本語 العربية हिन्दी",
         "1234 5,678.90 ½ Ⅷ", "\ufeff\u0085\u00a0\u2003\u200b!", "a\u0301 \x00\x1c\x1f\x7f",
         "\U0010ffff\ue000", "<|endoftext|>", "!?!\n\n--\n"]

def test_tokens_are_those_of_the_tokenizer(tiny_page, open_page):
    tab = open_page(tiny_page)
    _, tokenizer = model_of(packed(tiny_page)[0])
    for text in TEXTS:
        ids = tab.evaluate("text => models[0].tokenizer.encode(text)", text)
        assert ids == tokenizer.encode(text), text[:40]
        bytes_of = "ids => ids.map(id => Array.from(models[0].tokenizer.bytes(id))).flat()"
        assert tab.evaluate(bytes_of, ids) == list(text.encode()), text[:40]

@pytest.mark.parametrize("prompt, shown, note", [
    ("", "\n", "The prompt is empty"), ("👩‍👧 ☃", "👩‍👧 ☃", ""), ("x y " * 2500, None, "Only the last 96 "),
    ("\x00", "\x00", "")], ids=["empty", "emoji", "10,000 characters", "unseen"])
def test_any_prompt_is_handled(tiny_page, open_page, prompt, shown, note):
    tab = open_page(tiny_page)
    tokenizer = model_of(packed(tiny_page)[0])[1]
    for ids in generate(tab, prompt, 5):
        expected = tokenizer.encode(prompt or "\n")[-4 * 24:]
        assert ids[:-5] == expected
    assert tab.locator("#note").inner_text().startswith(note)
    if shown:
        assert tab.locator(".text").first.text_content().startswith(shown)

def test_the_same_settings_give_the_same_text_and_another_seed_another(tiny_page, open_page):
    tab = open_page(tiny_page)
    first = generate(tab, PROMPT, 30, 1)
    tab.fill("#seed", "7")
    other = generate(tab, PROMPT, 30, 1)
    tab.fill("#seed", "1337")
    assert generate(tab, PROMPT, 30, 1) == first != other

def test_tokens_are_drawn_as_often_as_they_are_likely(tiny_page, open_page):
    tab = open_page(tiny_page)
    counts = tab.evaluate("""() => {
        const [random, counts] = [uniform(5), [0, 0, 0]];
        for (let i = 0; i < 20000; i++) counts[draw(Float32Array.of(0, 1, -1), 0.5, random())] += 1;
        return counts;
    }""")
    p = torch.tensor([0.0, 1.0, -1.0]).div(0.5).softmax(0)
    assert torch.allclose(torch.tensor(counts) / 20000, p, atol=0.015)

def test_keys_and_buttons_step_play_and_pause(tiny_page, open_page):
    tab = open_page(tiny_page)
    drawn = "sides.map(side => side.tokens.length - side.n_prompt)"
    before = tab.evaluate(drawn)
    tab.keyboard.press("ArrowRight")
    tab.click("#step")
    settle(tab)
    assert tab.evaluate(drawn) == [n + 2 for n in before]
    tab.select_option("#speed", "Infinity")
    tab.locator("h1").click()
    tab.keyboard.press("Space")
    assert tab.locator("#play").inner_text() == "Pause"
    tab.wait_for_timeout(500)
    tab.locator("#step").evaluate("button => button.blur()")
    tab.keyboard.press("Space")
    settle(tab)
    assert tab.locator("#play").inner_text() == "Play" and tab.evaluate(drawn)[0] > before[0] + 4
    tab.click("#restart")
    settle(tab)
    assert tab.evaluate(drawn) == [0, 0]

def test_what_the_cache_forgot_turns_pale_and_a_click_can_be_taken_back(tiny_page, open_page):
    tab = open_page(tiny_page)
    length = len(generate(tab, PROMPT, 40)[0])
    side = tab.locator(".side").first
    assert side.locator(".text .gone").count() == length - 24
    assert "24 slots are taken" in side.locator(".hint").inner_text()
    before = side.locator(".text").text_content()
    click(tab, 0, "1-3")
    assert "--share=1-3" in side.locator(".command").text_content()
    scores = tab.locator("#scores tbody tr").all_inner_texts()
    assert "A: full attention, as trained" in scores[0] and "same text, paired" in scores[1]
    side.locator(".as-trained").click()
    settle(tab)
    assert side.locator(".text").text_content() == before
    assert "--share" not in side.locator(".command").text_content()
    assert tab.locator("#scores tbody tr").count() == 2
    assert tab.evaluate("document.activeElement.className") == "layers"

def test_pointing_at_a_column_names_the_token_whose_slot_it_is(tiny_page, open_page):
    tab = open_page(tiny_page)
    ids = generate(tab, PROMPT, 40)[0]
    position = max(p for p in range(len(ids)) if p % 24 == 3)
    canvas = tab.locator(".layers canvas").first
    gutter = tab.evaluate("gutter()")
    box = (canvas.bounding_box()["width"] - gutter - 2) / 24
    canvas.hover(position={"x": gutter + 3.5 * box, "y": 20})
    assert f"(token {position + 1})" in tab.locator(".hint").first.inner_text()
    marked = tab.locator(".text .at")
    assert marked.count() == 1
    assert marked.evaluate("at => [...at.parentNode.children].indexOf(at)") == position

def painted(tab, index):
    """Of each layer of a model, from the last to the first: are there boxes of keys, and of values?"""
    canvases = tab.locator(".side").nth(index).locator(".layers canvas")
    return canvases.evaluate_all("""all => all.map(canvas => {
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d");
        copy.drawImage(canvas, 0, 0);
        const { data } = copy.getImageData(gutter(), 0, canvas.width, canvas.height);   // beside the letters
        const has = (color) => data.some((_, i) => i % 4 === 0 && color.every((c, j) => data[i + j] === c));
        return [has([9, 105, 218]), has([188, 76, 0])];
    })""")

def test_boxes_are_drawn_for_what_a_layer_stores(tiny_page, open_page):
    tab = open_page(tiny_page, color_scheme="light")
    both, values, nothing = [True, True], [False, True], [False, False]
    assert painted(tab, 0) == [both] * 4 and painted(tab, 1) == [values, values, both, both]
    click(tab, 0, "2-3")
    assert painted(tab, 0) == [values, both, both, both]
    click(tab, 0, "1-3", "kv")
    assert painted(tab, 0) == [nothing, nothing, both, both]

def test_a_layer_trained_to_reuse_stays_so(tiny_page, open_page):
    side = open_page(tiny_page).locator(".side").nth(1)
    buttons = side.locator(".layers button")                    # from layer 3 down to 0
    assert [buttons.nth(i).is_disabled() for i in range(4)] == [True, True, False, True]
    assert side.locator("[value=kv]").is_hidden() and side.locator(".locked").is_visible()
    assert [buttons.nth(i).locator(".switch").inner_text() for i in range(4)] == [
        "trained to reuse", "trained to reuse", "make it reuse", "no layer below"]
    labels = side.locator(".layers canvas").evaluate_all("all => all.map(canvas => canvas.ariaLabel)")
    assert ["values, no keys" in label for label in labels] == [True, True, False, False]

def test_the_tour_has_six_steps_and_says_what_a_reuse_layer_does_not_keep(tiny_page, open_page):
    tab = open_page(tiny_page)
    tab.click("#tour-start")
    texts = []
    while tab.locator("#tour").is_visible():
        texts.append(tab.locator("#tour").inner_text())
        assert tab.locator(".shown").count() == 1
        tab.keyboard.press("Enter")                             # the focus is on Next
    assert len(texts) == 6 and all(f"{i} of 6" in text for i, text in enumerate(texts, 1))
    assert "Keys only serve to compute" in texts[3] and "stores values only" in texts[3]

def test_the_tour_ends_with_the_same_cache_untrained_and_trained(tiny_page, open_page):
    tab = open_page(tiny_page)
    click(tab, 0, "2-3")                                        # the tour begins with the models as trained
    tab.click("#tour-start")
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert tab.locator(".side").nth(1).locator(".shown").count() == 1
    assert "layer 1 (the anchor)" in tab.locator("#tour").inner_text()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    tab.click("text=Make A share like B")
    settle(tab)
    names = [row.split("\t")[0] for row in tab.locator("#scores.shown tbody tr").all_inner_texts()]
    assert names == ["A: full attention, as trained", "A: layers 2–3 reuse P of layer 1, never trained to",
                     "B: layers 2–3 reuse P of layer 1, as trained"]
    tab.keyboard.press("Escape")
    assert tab.locator("#tour").is_hidden()

def test_keys_work_wherever_the_mouse_was(tiny_page, open_page):
    tab = open_page(tiny_page)
    for control in ("#temperature", "[value=kv]", "#restart", ".layers button"):
        tab.locator(control).first.click()
        goal = tab.evaluate("goal")
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate("goal") == goal + 1, control
    tab.keyboard.press("Space")
    assert tab.locator("#play").inner_text() == "Pause"
    tab.keyboard.press("Space")

def test_the_arrow_keys_choose_a_token(tiny_page, open_page):
    tab = open_page(tiny_page)
    length = len(generate(tab, PROMPT, 3)[0])
    tab.locator(".layers").first.focus()
    tab.keyboard.press("ArrowDown")
    assert f"(token {length - 1})" in tab.locator(".hint").first.inner_text()
    tab.keyboard.press("ArrowUp")
    assert f"(token {length})" in tab.locator(".hint").first.inner_text()

@pytest.mark.parametrize("typed, used", [("", 0), ("-5", 0), ("1.5", 1), ("1e20", 999999)])
def test_a_seed_that_is_none_is_named(tiny_page, open_page, typed, used):
    tab = open_page(tiny_page)
    tab.fill("#seed", typed)
    settle(tab)
    assert f"Seed {used:,}: " in tab.locator("#note").inner_text()

def test_bars_of_the_cache_have_one_scale_and_grow(tiny_page, open_page):
    tab = open_page(tiny_page)
    widths = "all => all.map(bar => bar.getBoundingClientRect().width)"
    for n in (0, 5, 60):
        length = len(generate(tab, PROMPT, n)[0])
        keys = tab.locator("#scores .bar .keys").evaluate_all(widths)
        values = tab.locator("#scores .bar .values").evaluate_all(widths)
        space = tab.locator("#scores td:nth-of-type(1)").first.evaluate(
            "td => td.clientWidth - parseFloat(getComputedStyle(td).paddingLeft)")
        whole = space * min(length, 24) / 24 - 2                # without its border
        assert [*keys, *values] == pytest.approx([whole / 2, whole / 4, whole / 2, whole / 2], abs=1)

@pytest.mark.parametrize("width", [320, 800, 1920])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_all_that_can_be_clicked_has_a_name(tiny_page, open_page, width, scheme):
    tab = open_page(tiny_page, viewport={"width": width, "height": 700}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    for control in tab.locator("button, input, select, textarea, canvas[role]").all():
        assert control.evaluate("c => c.ariaLabel || c.textContent.trim() || c.labels[0].textContent.trim()")

def test_a_page_of_one_model_works(tiny_page, open_page, tmp_path):
    file = tmp_path / "one.html"
    file.write_text(page.build(packed(tiny_page)[:1]), encoding="utf-8")
    tab = open_page(file)
    for _ in range(7):
        tab.click("#tour-start" if tab.locator("#tour").is_hidden() else "#tour-next")
    assert tab.locator(".side").count() == 1 and tab.locator(".layer.reuse").count() == 1

# ---- the command ----

def test_the_command_writes_one_file_that_names_nothing_outside_it(run, text, tmp_path):
    save(tmp_path / "a", text, *tiny(text))
    status, out, err = run(page.main, "a", "--out=x.html")
    written = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert (status, err) == (0, "") and "wrote x.html: " in out
    assert "default-src 'none'" in written and not re.search(r"(src|href)=|https?:", written)

def test_text_in_a_model_cannot_end_the_script(text, tmp_path):
    model, tokenizer = tiny(text)
    tokenizer = Tokenizer([*tokenizer.tokens[:-1], b"</script>"])
    content = page.pack(save(tmp_path / "a", text, model, tokenizer))
    (tmp_path / "x.html").write_text(page.build([content]), encoding="utf-8")
    assert packed(tmp_path / "x.html") == [content]

def test_the_passage_is_text_that_the_model_was_not_trained_on(text, tmp_path):
    content = page.pack(save(tmp_path / "a", text, *tiny(text)))
    whole = text.read_text()
    held_out = whole[int(0.9 * len(whole)):]
    assert held_out.startswith(content["passage"])
    assert 1000 < content["passage_bytes"] == len(content["passage"].encode()) <= 2000

def too_large(folder, text, monkeypatch):
    monkeypatch.setattr(page, "MOST", 1000)
    save(folder, text, *tiny(text))

def of_an_axis(folder, text, monkeypatch):
    model, tokenizer = tiny(text, share="1-3")
    save(folder, text, checkpoint.change(model, "heads", heads="mix"), tokenizer)

def too_wide(folder, text, monkeypatch):
    model, tokenizer = tiny(text)
    model.embed.weight.data[0, 0] = 1e5
    save(folder, text, model, tokenizer)

def without_text(folder, text, monkeypatch):
    save(folder, text, *tiny(text))
    shutil.rmtree(folder.parent / "data")
    monkeypatch.setattr(data, "data_folder", lambda: folder)            # nor is it in the usual place

def of_another_architecture(folder, text, monkeypatch):
    save(folder, text, *tiny(text))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "mamba"
    (folder / "config.json").write_text(json.dumps(config))

WRONG = {too_large: "a page at most 1,000", of_an_axis: "layers of an axis",
         too_wide: "too large for float16", without_text: "is missing",
         of_another_architecture: "a: damaged, or not a model of this kind"}

@pytest.mark.parametrize("make", WRONG)
def test_a_model_that_a_page_cannot_hold_is_refused_in_one_line(run, text, tmp_path, monkeypatch, make):
    make(tmp_path / "a", text, monkeypatch)
    status, out, err = run(page.main, "a")
    assert status == 2 and WRONG[make] in err and err.count("\n") == 1
    assert not (tmp_path / "page.html").exists()

@pytest.mark.parametrize("flags, why", [
    ([], "the following arguments are required: MODEL"), (["nothing"], "nothing: no such model"),
    (["a", "a", "a"], "room for two models"), (["a", "--out=x.txt"], "must end in .html"),
    (["a", "--out=."], "must end in .html"), (["a", "--colour=red"], "--colour")])
def test_a_wrong_flag_gets_one_line_and_status_2(run, text, tmp_path, flags, why):
    save(tmp_path / "a", text, *tiny(text))
    status, _, err = run(page.main, *flags)
    assert status == 2 and why in err and err.count("\n") == 1

# ---- the page that is part of the repository ----

def test_the_committed_page_is_what_the_command_makes_of_its_models():
    content = packed(COMMITTED)
    assert COMMITTED.stat().st_size <= 5.5e6 and (ROOT / "assets/page.png").stat().st_size <= 300_000
    assert page.build(content) == COMMITTED.read_text(encoding="utf-8"), "make assets/page.html again"
    assert [model["config"]["share"] for model in content] == ["", "1-3"]

@pytest.mark.slow
@pytest.mark.parametrize("index, share, kind", [
    (0, "", "weights"), (1, "1-3", "weights"), (0, "1-3", "weights"), (0, "1-3", "kv")])
def test_the_committed_page_writes_what_sample_py_writes(open_page, index, share, kind):
    tab = open_page(COMMITTED)
    model, tokenizer = model_of(packed(COMMITTED)[index], share, kind)
    click(tab, index, share, kind)
    text = generate(tab, "ROMEO:", 100)[index]
    ids = torch.tensor([tokenizer.encode("ROMEO:")])
    assert text == model.generate(ids, 100, temperature=0)[0].tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([text]))[0][0, -1]
    theirs = torch.tensor(tab.evaluate("i => Array.from(sides[i].logits)", index))
    assert (theirs - expected).abs().max() <= 1e-3
