"""Flags, one-line errors and exit statuses: what a user of any command meets."""

import argparse
import dataclasses
import io
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisa.kit import cli

ROOT = Path(__file__).resolve().parent.parent.parent

def raising(error):
    def main():
        raise error
    return main

@pytest.mark.parametrize("error", [
    ValueError("--share=3-1: give spans in increasing order"),
    OSError("out/run: could not be written"),
], ids=repr)
def test_what_the_user_can_mend_is_one_line_on_stderr_and_status_2(run, error):
    assert run(raising(error)) == (2, "", f"minisa: error: {error}\n")

def test_an_error_of_a_file_names_it(run):
    error = FileNotFoundError(2, "No such file or directory", "x.txt")
    assert run(raising(error)) == (2, "", "minisa: error: x.txt: No such file or directory\n")

def test_words_of_the_command_line_that_are_not_utf8_are_refused_before_anything_else(run):
    status, out, err = run(lambda: print("begun"), "--text=n\udce9")
    assert (status, out) == (2, "") and "'--text=n\\udce9': not UTF-8 text" in err and err.count("\n") == 1

@pytest.mark.parametrize("error", [
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 4 TB\nat: frames"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 TiB\nstacks"),
], ids=["cpu", "cuda"])
def test_too_little_memory_is_one_line_that_says_what_to_do(run, error):
    status, out, err = run(raising(error))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("minisa: error: out of memory: " + str(error).splitlines()[0])
    assert "--batch_size" in err

def test_the_machines_own_refusal_of_memory_is_known(run):
    status, _, err = run(lambda: torch.empty(2**58))
    assert status == 2 and err.startswith("minisa: error: out of memory") and err.count("\n") == 1

@pytest.mark.parametrize("error", [
    RuntimeError("unsupported memory format option"), RuntimeError("size mismatch"), KeyError("x"),
    TypeError("x"),
], ids=repr)
def test_a_mistake_of_ours_is_not_hidden(monkeypatch, error):
    with pytest.raises(type(error)) as raised:
        cli.command(raising(error))
    assert raised.value is error

def test_those_who_change_the_code_may_ask_where_an_error_was_raised(monkeypatch):
    monkeypatch.setenv("MINISA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="math domain error"):
        cli.command(lambda: math.log(-1))

def test_ctrl_c_is_quiet_and_status_130(run):
    assert run(raising(KeyboardInterrupt())) == (130, "", "")

@pytest.mark.parametrize("status", [0, 1, None])
def test_what_main_returns_is_the_exit_status(run, status):
    assert run(lambda: status) == (status or 0, "", "")

@pytest.mark.skipif(os.name == "nt", reason="Windows reports a closed pipe as it likes")
def test_a_reader_that_leaves_ends_the_command_quietly_with_status_0():
    code = ("from minisa.kit.cli import command\n"
            "def main():\n"
            "    while True:\n"
            "        print('line ' * 20)\n"
            "command(main)\n")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert process.stdout.readline().startswith(b"line ")
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=60), err) == (0, b"")

def parser():
    made = cli.Parser("What it does.\n\n    an example", usage="x [--FLAG=VALUE ...]")
    made.flag("size", cli.count, 4, "how many, in 100% of tokens")
    made.flag("top", cli.count, None, "how many at most", "all")
    made.flag("kind", str, "a", "which", choices=["a", "b"])
    made.switch("fast", "hurry")
    return made

def test_flags_have_defaults_and_a_switch_takes_no_value():
    assert vars(parser().parse_args([])) == dict(size=4, top=None, kind="a", fast=False)
    given = parser().parse_args(["--size=7", "--top", "2", "--kind=b", "--fast"])
    assert vars(given) == dict(size=7, top=2, kind="b", fast=True)

WRONG_FLAGS = {
    "--size=0": "--size: 0 is not a number from 1 up",
    "--size=x": "--size: invalid int value: 'x'",
    "--kind=c": "--kind: invalid choice: 'c'",
    "--siz=3": "unrecognized arguments: --siz=3",
    "--size": "--size: expected one argument",
    "--fast=1": "--fast: ignored explicit argument '1'",
    "stray": "unrecognized arguments: stray",
}

@pytest.mark.parametrize("flag", WRONG_FLAGS)
def test_a_wrong_flag_is_one_line_that_names_it_and_the_help(run, flag):
    status, out, err = run(parser().parse_args, flag)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert WRONG_FLAGS[flag] in err and err.endswith("; see --help\n")

def test_help_shows_every_flag_with_its_default(run):
    status, out, err = run(parser().parse_args, "--help")
    assert (status, err) == (0, "") and "    an example\n" in out
    lines = " ".join(out.split())
    assert "--size INT how many, in 100% of tokens (default: 4)" in lines
    assert "--top INT how many at most (default: all)" in lines
    assert "--kind {a,b} which (default: 'a')" in lines
    assert "--fast hurry (default: off)" in lines

@dataclasses.dataclass
class Settings:
    size: cli.count = 4         # how many; 1: alone
    width: cli.count = None     # how wide; default: twice the size
    name: str = ""              # of what; default: none
    fast: bool = False          # hurry

def test_comments_of_settings_are_the_help_and_a_default_in_words_is_said_once(run):
    status, out, err = run(lambda: cli.read_settings(Settings, on_gpu={"size": 8, "width": 9}), "--help")
    lines = " ".join(out.split())
    assert (status, err) == (0, "")
    assert "--size INT how many; 1: alone (default: 4, on a GPU 8)" in lines
    assert "--width INT how wide (default: twice the size, on a GPU 9)" in lines
    assert "--name STR of what (default: none)" in lines and "--fast hurry (default: off)" in lines

@pytest.mark.parametrize("kind, text, value", [
    (cli.count, "1", 1), (cli.count, "12", 12), (cli.amount, "0", 0.0), (cli.amount, "2.5", 2.5),
    (cli.at_least(int, -3), "-3", -3), (cli.at_least(float, 0.1), "1e-1", 0.1),
])
def test_a_number_is_read_as_its_kind(kind, text, value):
    read = kind(text)
    assert read == value and type(read) is type(value) and kind.__name__ == type(value).__name__

@pytest.mark.parametrize("kind, text", [
    (cli.count, "0"), (cli.count, "-1"), (cli.count, "9" * 401), (cli.amount, "1e30"),
    (cli.amount, "-0.1"), (cli.amount, "nan"), (cli.amount, "inf"),
    (cli.at_least(float, 1.0), "0.999"), (cli.at_least(float, -math.inf), "nan"),
])
def test_a_number_that_is_too_low_or_not_finite_is_refused(kind, text):
    message = f"^{text[:20]}.* is not a number from .* up$|^{text[:20]} is more than .*$"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(text)

@pytest.mark.parametrize("kind, text", [(cli.count, "1.5"), (cli.count, ""), (cli.amount, "many")])
def test_what_is_no_number_is_refused(kind, text):
    with pytest.raises(ValueError):
        kind(text)

def test_a_device_is_one_that_this_machine_has():
    assert cli.device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "tpu", "", "meta"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{name} is not on this machine, .*; take "):
            cli.device(name)

@pytest.mark.parametrize("kind, name", [(cli.table, "a.csv"), (cli.picture, "a.svg")])
def test_an_output_is_a_file_of_its_ending_that_can_be_written(kind, name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    assert kind(f"out/{name}") == f"out/{name}" and cli.table("/dev/stdout") == "/dev/stdout"
    with pytest.raises(argparse.ArgumentTypeError, match="/dev/stdout must end in .png"):
        cli.picture("/dev/stdout")                      # of which kind?
    refused = {f"{tmp_path}/{name}": f"{name} is a folder", "out/model.pt": "out/model.pt must end in",
               "": "must end in"}
    if os.name != "nt":                                 # which says it otherwise, and later
        refused |= {f"{tmp_path}/file/{name}": "Not a directory", f"{'x' * 300}/{name}": "name too long"}
    for wrong, why in refused.items():
        with pytest.raises((argparse.ArgumentTypeError, OSError), match=f"(?i){why}"):
            kind(wrong)

def test_a_prompt_is_a_text_or_that_of_a_file_or_of_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("Zoë: 日本\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("né\n".encode())))
    assert cli.prompt("ROMEO:") == "ROMEO:" and cli.prompt("\n") == "\n"
    assert cli.prompt(f"FILE:{file}") == "Zoë: 日本\n"
    assert cli.prompt("-") == "né\n"

def test_a_prompt_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"n\xe9")))
    wrong = {
        "": "has 0 characters; give 1 to",
        "a" * 2**20 + "a": "has 1,048,577 characters",
        f"FILE:{tmp_path}/empty.txt": "has 0 characters; give 1 to",
        f"FILE:{tmp_path}/none.txt": "No such file or directory: .*none.txt",
        f"FILE:{tmp_path}": "Is a directory|Permission denied",        # the latter on Windows
        f"FILE:{tmp_path}/latin.txt": "not UTF-8",
        "-": "not UTF-8",
    }
    for text, message in wrong.items():
        with pytest.raises((argparse.ArgumentTypeError, OSError), match=message):
            cli.prompt(text)

@pytest.mark.skipif(os.name == "nt", reason="needs a shell that can close streams")
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_a_closed_stream_is_no_traceback(tmp_path, closed):
    (tmp_path / "fails.py").write_text("""if True:
        from minisa.kit.cli import command
        def main():
            print("a text")
            raise ValueError("an error")
        command(main)
    """)
    command = f'"{sys.executable}" "{tmp_path}/fails.py" {closed}'
    done = subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout

def test_control_characters_of_a_name_are_not_printed_as_they_are(tmp_path, run):
    import sample
    status, _, err = run(sample.main, "no\x1b[31m\u2028such.gguf")
    assert status == 2 and "\x1b" not in err and err.count("\n") == 1
