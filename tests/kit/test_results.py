"""Results: tidy CSV files that say where and when they were measured."""

import csv
import datetime
import subprocess

import torch

from minisa.kit import results

def test_a_row_says_what_was_measured_and_where(tmp_path):
    results.write_results(tmp_path / "a.csv", [{"model": "a, b", "loss": 1.5}, {"model": "c", "bpb": 2}])
    first, second = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert list(first) == ["model", "loss", "bpb", "commit", "processor", "torch", "date"]
    assert (first["model"], first["loss"], first["bpb"]) == ("a, b", "1.5", "")
    assert (second["loss"], second["bpb"]) == ("", "2")
    assert first["torch"] == torch.__version__ and first["processor"]
    assert abs(datetime.date.fromisoformat(first["date"]) - datetime.date.today()).days <= 1

def test_what_a_row_says_itself_of_its_origin_counts(tmp_path):
    results.write_results(tmp_path / "a.csv", [{"model": "a", "commit": "1234567", "date": ""}])
    row, = csv.DictReader((tmp_path / "a.csv").read_text().splitlines())
    assert row["commit"] == "1234567" and row["date"] == ""

def test_the_commit_is_that_of_the_checkout_with_a_plus_if_a_file_differs(monkeypatch, tmp_path):
    import shutil

    import pytest
    if not shutil.which("git"):
        pytest.skip("needs git")
    file = tmp_path / "minisa" / "kit" / "results.py"
    file.parent.mkdir(parents=True)
    file.write_text("as it was")
    table = tmp_path / "assets" / "results.csv"
    table.parent.mkdir()
    table.write_text("no rows yet")

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    for words in ["init"], ["add", "."], ["commit", "-m", "x"]:
        git(*words)
    monkeypatch.setattr(results, "__file__", str(file))
    short = git("rev-parse", "--short", "HEAD")
    assert results.commit() == short
    table.write_text("a row")                   # a study adds rows while it runs
    assert results.commit() == short
    file.write_text("changed since then")
    assert results.commit() == f"{short}+"

def test_without_git_there_is_no_commit(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")
    monkeypatch.setattr(subprocess, "run", missing)
    assert results.commit() == ""
