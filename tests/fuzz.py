"""A hostile user: commands with damaged files and odd flags.

    python tests/fuzz.py 10000              so many cases, from case 0 on
    python tests/fuzz.py 1 --first=1234     that case again, with all that it printed

Each case damages one file of a small world (runs, a derived model, a store, a .gguf file, token files,
texts, tables), or gives a command odd flags, and runs it in a process of its own; now and then beside
another command on the same folders. Allowed is: status 0 with an answer that is right, or status 2 with one
line that says what is wrong. Nothing may take more than 20 seconds or 2 GB, and no file may be lost.
"""

import argparse
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

import sample  # noqa: E402
import train  # noqa: E402
from minisa.axes import eigen, heads, lowrank  # noqa: E402
from minisa.kit import checkpoint, cli  # noqa: E402
from minisa.kit.tokenizer import BYTES, Tokenizer  # noqa: E402
from minisa.lab import bench, chat, plot, scan, similarity  # noqa: E402
from minisa.model import GPT, GPTConfig  # noqa: E402

torch.set_num_threads(1)
SECONDS, MEMORY = 20, 2 * 2**30
DATA = "--data_dir=data"
TINY = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--n_hidden=32", "--block_size=16", "--batch_size=4",
        "--vocab_size=300", "--max_iters=4", "--eval_interval=2", "--log_interval=1", "--warmup_iters=2",
        "--device=cpu", "--dtype=float32", "--text=text.txt", DATA]
CHAT = ["chatty", "--store=s", "--temperature=0", "--max_new_tokens=4"]
MAINS = {"train": train.main, "sample": sample.main, "heads": heads.main, "eigen": eigen.main,
         "lowrank": lowrank.main, "similarity": similarity.main, "scan": scan.main, "plot": plot.main,
         "chat": chat.main, "bench": bench.main}

# command, its words, and the files that it may replace or let go
COMMANDS = {
    "train": ("train", [*TINY, "--out_dir=out/new"], "out/new/"),
    "over": ("train", [*TINY, "--out_dir=out/full", "--overwrite", "--seed=2"], "out/full/"),
    "resume": ("train", ["--resume", "--out_dir=out/half", DATA], "out/half/"),
    "tune": ("train", ["--init_from=out/full", "--text=text.txt", DATA, "--max_iters=2", "--batch_size=2",
                       "--out_dir=out/new", "--device=cpu"], "out/new/"),
    "sample": ("sample", ["out/full", "--max_new_tokens=8", "--prompt=FILE:prompt.txt", "--csv=new.csv"], ""),
    "mixed": ("sample", ["out/mixed", "--max_new_tokens=8", "--temperature=0"], ""),
    "squeeze": ("sample", ["out/full", "--max_new_tokens=4", "--squeeze=8", "--context=16",
                           "--eval_tokens=64"], ""),
    "gguf": ("sample", ["x.gguf", "--max_new_tokens=8", "--temperature=0", "--prompt=the a"], ""),
    "heads": ("heads", ["out/full", "--share=1-2", "--heads=match", "--refit", "--out=out/new"], ""),
    "eigen": ("eigen", ["out/full", "--error=0.1", "--out=out/new"], ""),
    "lowrank": ("lowrank", ["out/full", "--share=1-2", "--share_rank=4", "--out=out/new"], ""),
    "similarity": ("similarity", ["out/full", "--windows=1", "--out_dir=maps"], ""),
    "scan": ("scan", ["out/full", "--windows=1", "--out_dir=scan"], "scan/"),
    "plot": ("plot", ["bill.csv", "--file=new.svg"], ""),
    "chat": ("chat", CHAT, "s/"),
    "bench": ("bench", ["model", "out/full", "--rounds=1"], ""),
}
# the files that each reads
MODEL = [f"out/full/{name}" for name in checkpoint.FILES[:3]]
READS = {
    "train": ["text.txt", "DATA/meta.json", "DATA/train.npy", "DATA/val.npy"],
    "over": ["text.txt", "DATA/train.npy"],
    "resume": ["out/half/train.safetensors", "out/half/log.jsonl", "out/half/config.json", "DATA/meta.json",
               "text.txt"],
    "tune": MODEL,
    "sample": [*MODEL, "prompt.txt"],
    "mixed": ["out/mixed/config.json", "out/mixed/model.safetensors", *MODEL, "DATA/val.npy"],
    "squeeze": [*MODEL, "DATA/val.npy", "DATA/meta.json"],
    "gguf": ["x.gguf"] * 3,
    "heads": MODEL,
    "eigen": [*MODEL, "DATA/train.npy"],
    "scan": ["scan/scan-weights.csv", *MODEL],
    "plot": ["bill.csv"],
    "chat": ["s/chat.json", "s/chat.json", "BLOCK", "BLOCK", "chatty/config.json", "chatty/tokenizer.json"],
}
SLOW = {"bench", "scan", "similarity", "eigen", "heads", "tune"}        # cases of these are rarer

# ---- the world ----

def run(name, *words, stdin=""):
    """A command in this process → status, stdout, stderr."""
    out, err, kept = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO()), sys.stdin
    typed = io.BytesIO(stdin.encode("utf-8", "surrogateescape"))
    sys.argv, sys.stdin = [name, *words], io.TextIOWrapper(typed)
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    status = 0
    try:
        cli.command(MAINS[name])
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 99
    finally:
        sys.stdout, sys.stderr, sys.stdin = stdout, stderr, kept
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="replace"))
    return status, *texts

def must(*words, **more):
    status, out, err = run(*words, **more)
    assert status == 0, (words, out, err)

def plain(tensors):
    """Those of a dict that safetensors can write."""
    def writable(t):
        plain = isinstance(t, torch.Tensor) and t.layout == torch.strided
        return plain and not t.is_meta and t.numel() < 10**7
    return {str(name): t.contiguous().clone() for name, t in tensors.items() if writable(t)}

def metadata(data):
    return json.loads(data[8:8 + int.from_bytes(data[:8], "little")])["__metadata__"]

def rewrite_state(path, change, config=None):
    """Change what a file of tensors holds, and say the right hash."""
    data = Path(path).read_bytes()
    tensors, known = safetensors.torch.load(data), json.loads(metadata(data)["minisa"])
    change(known, tensors)
    known = json.loads(json.dumps(known, default=str))
    Path(path).write_bytes(checkpoint.pack(plain(tensors), config, known))

def longer(state, _):
    state["settings"] = [flag.replace("max_iters=2", "max_iters=4") for flag in state["settings"]]

def make_world():
    """Fill the current folder."""
    text = (ROOT / "tests/text.txt").read_text()[:6000]
    Path("text.txt").write_text(text)
    Path("prompt.txt").write_text("ROMEO: What\n")
    Path("mine.txt").write_text("not to be lost\n")
    must("train", *TINY, "--out_dir=out/full")
    must("train", *TINY, "--out_dir=out/half", "--max_iters=2")
    rewrite_state("out/half/train.safetensors", longer)
    must("heads", "out/full", "--share=1-2", "--heads=mix", "--out=out/mixed")
    must("sample", "out/full", "--max_new_tokens=4", "--csv=bill.csv")
    must("scan", "out/full", "--windows=1", "--out_dir=scan")
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, vocab_size=258, n_layer=2, n_head=2, n_embd=16))
    tokenizer = Tokenizer([*BYTES, b"<|im_start|>", b"<|im_end|>"], [256, 257], "gpt-2")
    info = {**checkpoint.UNKNOWN, "val_loss": 1.0, "val_bpb": 1.0}
    checkpoint.save("chatty", model, tokenizer, info)
    must("chat", *CHAT, stdin="Hello there, how are you?\n")
    Path("s/mine.kv").write_text("not a block\n")
    try:
        import tiny_gguf
        tiny_gguf.write("x.gguf", tiny_gguf.tensors())
    except ImportError:
        del COMMANDS["gguf"], READS["gguf"]

def named(name):
    """A name of READS → the path."""
    if name == "BLOCK":
        return next(path for path in Path("s").glob("*.kv") if len(path.stem) == 64)
    return next(Path("data").iterdir()) / name[5:] if name.startswith("DATA/") else Path(name)

# ---- damage ----

ODD = [None, True, -1, 0, 1, 2, 3, 7, 64.5, 2**31, 2**62, 2**63, 10**30, float("nan"), float("inf"), -1e308,
       "", "x", "../../../etc/passwd", "1-2", "0-9", "ab" * 40, [], [0], [[1]], {}, {"a": 1}, (), b"x"]

def odd_tensor(rng, t):
    """A tensor in the place of t."""
    poisoned = t.clone().flatten()
    if poisoned.numel() and poisoned.is_floating_point():
        poisoned[rng.randrange(len(poisoned))] = rng.choice([float("nan"), float("inf"), 1e38])
    return rng.choice([
        poisoned.view(t.shape), t[:-1] if t.dim() else t[None], t.flatten(), t.double(), t.long(), t[None],
        torch.zeros(1), torch.zeros(()).expand(t.shape), torch.empty(0), t.to_sparse() if t.dim() else t,
        torch.zeros(()).expand(10**9, 10**3), t.mT if t.dim() > 1 else t, t.to("meta")])

def mutate_tree(rng, tree):
    """Change one place of nested dicts and lists."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        if not keys:
            return
        key = rng.choice(list(keys))
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        how = rng.random()
        if how < 0.15:
            del tree[key]
        elif how < 0.25 and isinstance(tree, dict):
            tree[rng.choice(["x", "0", "a.b", *keys])] = tree[key]
        elif how < 0.35 and isinstance(tree, list):
            tree.extend(tree * rng.choice([1, 100]))
        elif isinstance(tree[key], torch.Tensor) and rng.random() < 0.8:
            tree[key] = odd_tensor(rng, tree[key])
        else:
            tree[key] = rng.choice(ODD)
        return

def mutate_inside(rng, path):
    """Change what a file says, in its own format. → whether it did"""
    try:
        def change(known, tensors):
            mutate_tree(rng, rng.choice([known, tensors]))
        if path.name == "train.safetensors":
            rewrite_state(path, change)
        elif path.suffix == ".safetensors":
            config = json.loads(path.with_name("config.json").read_text())
            if rng.random() < 0.3:
                mutate_tree(rng, config)                        # both change, and agree
                path.with_name("config.json").write_text(json.dumps(config, default=str))
                config = json.loads(json.dumps(config, default=str))
            rewrite_state(path, change, config)
        elif path.suffix == ".json":
            tree = json.loads(path.read_text())
            mutate_tree(rng, tree)
            path.write_text(json.dumps(tree, default=str))
        elif path.suffix == ".csv":
            lines = [line.split(",") for line in path.read_text().splitlines()]
            row = rng.choice(lines)
            odd = [*ODD, '"', "\n\n", "$\\frac$", "\0", "9" * 200]
            row[rng.randrange(len(row))] = str(rng.choice(odd))
            path.write_text("\n".join(map(",".join, lines)))
        elif path.suffix == ".gguf":
            data, at = bytearray(path.read_bytes()), rng.randrange(2500)
            size = rng.choice("BIQf")
            value = rng.choice([0, 1, 2, 3, 8, 63, 65, 127, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63])
            value = float(value) if size == "f" else value % 2**(8 * struct.calcsize(size))
            struct.pack_into(f"<{size}", data, at, value)
            path.write_bytes(data)
        elif path.suffix == ".txt":
            rng.choice([lambda: path.write_text("a" * 10**6), lambda: path.write_text("\n" * 10**6),
                        lambda: path.write_bytes(rng.randbytes(5000)), lambda: path.write_text("ab" * 10),
                        lambda: path.write_text("é日本\0\u2028" * 2000), lambda: path.write_text("x"),
                        lambda: path.write_text(" x" * 300_000)])()
        else:
            return False
    except (OverflowError, KeyError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return True

def damage(rng, path):
    """Damage a file. → what was done, in words"""
    if rng.random() < 0.5 and mutate_inside(rng, path):
        return "mutated inside"
    data, what = bytearray(path.read_bytes()), rng.randrange(14)
    at = rng.randrange(len(data) or 1)
    if what == 0:
        path.write_bytes(data[:at])
        return f"cut at {at}"
    if what == 1:
        path.write_bytes(data + rng.randbytes(rng.choice([1, 100, 10000])))
        return "longer"
    if what == 2:
        path.write_bytes(rng.randbytes(len(data)))
        return "noise"
    if what == 3:
        data[at:at + 64] = bytes(min(64, len(data) - at))
        path.write_bytes(data)
        return f"zeros at {at}"
    if what == 4:
        other = rng.choice([p for p in Path(".").rglob("*") if p.is_file()])
        path.write_bytes(other.read_bytes())
        return f"a copy of {other}"
    if what == 5:
        path.unlink()
        rng.choice([os.mkfifo, os.mkdir, lambda p: os.symlink(p, p)])(path)
        return "no file"
    if what == 6:
        path.unlink()
        return "missing"
    if what == 7:
        os.truncate(path, rng.choice([0, 10**12]))
        return "another length"
    if what == 8:
        deep = "[" * 10**5, '{"a":' * 10**4
        path.write_text(rng.choice([*deep, "{}", "[]", "null", "\0", "1e999", "PK\3\4"]))
        return "other text"
    for _ in range(rng.choice([1, 1, 1, 8])):                   # most often: bits
        data[rng.randrange(len(data) or 1)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return "bits"

WORDS = [
    "", "0", "-1", "1", "2", "3", "7", "16", "1.5", "nan", "inf", "-inf", "1e308", "1e-46", "1e30", "1e-3",
    "10000000000", "9" * 24, "9" * 401, "9" * 5000, "0x10", "1_000", "+3", " 3 ", "x", ".", "..", "out",
    "out/full", "mine.txt", "/dev/null", "/dev/full", "/proc/x/y", "x" * 300, "a/" * 200, "n\udce9", "a\nb",
    "$\\frac$",
    "1-2", "0-1,1-2", "0-2", "2-1", "1-2,", "0-99999999999999999999", "True", "none", "kv", "weights",
    "bpe", "meta", "cuda:7", "é日", "out/full/config.json", "text.txt", "-", "FILE:none", "FILE:s", "sinks,x",
    "window,sinks,heavy", "0.5,1", "x.gguf", "smollm3", "new.png", "out/full.png", "new.csv", "s/new.csv"]
LONG = {"--max_iters", "--max_new_tokens", "--num_samples", "--rounds"}     # work that was asked for
OFFLINE = {"--tokenizer=gpt2"}

def flags_of(main):
    """The names of a command's flags."""
    _, out, _ = run(main, *["model"] * (main == "bench"), "--help")
    return sorted(set(re.findall(r"^  (--\w+)", out, re.MULTILINE)) - {"--help"})

# ---- a case ----

def files():
    """All files of the current folder → {path: hash of what it holds}."""
    found = {}
    for folder, _, names in os.walk("."):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink() and path.stat().st_size < 10**9:
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found

def without_speed(out):
    """What is printed, but for what may differ from run to run."""
    out = re.sub(r"\d+m\d+s left|[\d,]+ tokens/s|done in \S+|after [\d.]+ s", "", out)
    out = re.sub(r"[\d,]+ of [\d,]+ tokens reused", "", out)
    lines = [re.sub(r"\s+[\d,]*(\s+[\d.]+)?(\s+(numpy|torch))?$", "", line) for line in out.splitlines()]
    return [" ".join(line.split()) for line in lines]

def child(name, words, stdin):
    """Run a command in a new process → status (below 0: a signal), stdout, stderr, seconds, bytes."""
    begun, limit = time.time(), 10 * 2**30
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open("../stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        status, out, err = run(name, *words, stdin=stdin)
        Path("../result").write_text(json.dumps([status, out, err]))
        sys.stderr.flush()
        os._exit(0)
    while time.time() < begun + SECONDS:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.005)
    else:
        os.kill(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
    seconds, low = time.time() - begun, Path("../stderr").read_text(errors="replace")
    if os.waitstatus_to_exitcode(status):
        return -abs(os.waitstatus_to_exitcode(status)), "", low, seconds, usage.ru_maxrss * 1024
    return *json.loads(Path("../result").read_text()), seconds, usage.ru_maxrss * 1024

def wrong(result, before, after, own, other, expected, words):
    """What is wrong with how a case ended, or None. own, other: the folders of the command, and of the one
    beside it."""
    status, out, err, seconds, memory = result
    if seconds > SECONDS - 0.5:
        return "hangs"
    if status not in (0, 2):
        return f"status {status}"
    if memory > MEMORY:
        return f"took {memory / 2**20:,.0f} MB"
    if "Traceback" in err + out:
        return "a traceback"
    told = err.rpartition("\r\033[K")[2]                    # progress is wiped from the terminal
    if status == 2 and len(re.findall(r"^\w+: error: .*\n\Z", told, re.MULTILINE)) != 1:
        return "not one line"
    if status == 0 and re.search(r"\bnan\b|ERROR|DIFFER", out) and "nan" not in str(words):
        return "a wrong answer"
    unknown = " ?  " in out                                     # the loss, as the text is damaged
    if status == 0 and expected is not None and without_speed(out) != expected and not unknown:
        return "another answer"
    lost = {path for path, content in before.items()
            if content not in after.values() and not path.startswith(tuple(filter(None, (own, other))))}
    if status == 2 and not re.search(r"validation loss|tokens reused|span ", out):
        lost |= {path for path, content in before.items()
                 if content not in after.values() and not path.endswith(".kv")
                 and not (other and path.startswith(other))}
    return f"lost {', '.join(sorted(lost))}" if lost else None

CHECKED = (".safetensors", ".npy", ".kv", "meta.json")      # damage is found: an answer is the whole file's

def case(number, world, flags, baselines):
    """Run one case in a copy of the world. → (what it was, what is wrong or None, its result)"""
    rng = random.Random(number)
    os.chdir(world.parent)
    shutil.rmtree("case", ignore_errors=True)
    shutil.copytree("world", "case", symlinks=True)
    os.chdir("case")
    key = rng.choice([key for key in COMMANDS if key not in SLOW or rng.random() < 0.25])
    name, words, own = COMMANDS[key]
    words, expected, stdin = list(words), None, "Why?\n"
    if key in READS and rng.random() < 0.6:
        path = named(rng.choice(READS[key]))
        done = damage(rng, path)
        what = f"{key}: {path.name} {done}"
        if str(path).endswith(CHECKED) and key in baselines and done != "mutated inside" \
                and not done.endswith((".safetensors", ".json")):           # another model that is whole
            expected = baselines[key]
    else:
        for _ in range(rng.choice([1, 1, 2])):
            flag = rng.choice(flags[name])
            value = rng.choice(WORDS)
            word = flag if rng.random() < 0.1 else f"{flag}={value}"
            big = value.lstrip("+ 0")[:1].isdigit() and len(value) > 2
            if word not in OFFLINE and not (flag in LONG and big):
                words.insert(rng.randrange(len(words) + 1), word)
        if name == "chat" and rng.random() < 0.4:
            stdin = rng.choice(["\udce9\nWhy?\n", "a" * 10**6 + "\n", "/reset\n/undo\n/undo\n", "x\n" * 5,
                                "\0\n", "/bill\n/x\n", "a " * 30000, "", "<|im_end|>" * 9 + "\n"])
        what = f"{key}: {' '.join(words)[:300]!a} < {stdin[:20]!a}"
    before, pid, beside = files(), 0, ""
    if rng.random() < 0.05:                                     # another command, at the same time
        other = rng.choice([key for key in COMMANDS if key not in SLOW])
        what, expected = f"{what} beside {other}", None
        beside = COMMANDS[other][2]
        pid = os.fork()
        if not pid:
            run(COMMANDS[other][0], *COMMANDS[other][1], stdin="Why?\n")
            os._exit(0)
    result = child(name, words, stdin)
    if pid:
        os.waitpid(pid, 0)
    return what, wrong(result, before, files(), own, beside, expected, words), result

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", type=int, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default 0)")
    args = parser.parse_args()
    found, begun = Counter(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        world.mkdir()
        os.chdir(world)
        make_world()
        flags = {name: flags_of(name) for name in MAINS}
        baselines = {}
        for key in ("resume", "sample", "mixed", "squeeze", "chat", "train"):
            shutil.copytree(world, "../case", symlinks=True)
            os.chdir("../case")
            status, out, err, seconds, memory = child(COMMANDS[key][0], COMMANDS[key][1], "Why?\n")
            assert status == 0, (key, out, err)
            baselines[key] = without_speed(out)
            os.chdir(world)
            shutil.rmtree("../case")
        for i in range(args.cases):
            number = args.first + i
            what, problem, (status, out, err, seconds, memory) = case(number, world, flags, baselines)
            found[problem or f"status {status}"] += 1
            if problem or args.cases == 1:
                print(f"case {number}: {what}: {problem} (status {status}, {seconds:.1f} s, "
                      f"{memory / 2**20:,.0f} MB)\n{out[-1500:] if args.cases == 1 else ''}{err[-700:]}",
                      flush=True)
            if (i + 1) % 500 == 0:
                left = (time.time() - begun) / (i + 1) * (args.cases - i - 1)
                print(f"{i + 1} cases, {int(left)} s left", flush=True)
        os.chdir(ROOT)
    print(f"{args.cases} cases from {args.first} in {time.time() - begun:.0f} s: {dict(found)}")
    return 0 if not set(found) - {"status 0", "status 2"} else 1

if __name__ == "__main__":
    sys.exit(main())
