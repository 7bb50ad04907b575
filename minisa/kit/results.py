"""Results: tables in the terminal, and tidy CSV files that say where and when they were measured."""

import csv
import datetime
import io
import platform
import subprocess
from pathlib import Path

from minisa.kit.files import write_file

def provenance():
    """→ {"commit", "processor", "torch", "date"} of this checkout, this machine and today, as text."""
    import torch
    return {"commit": commit(), "processor": processor(), "torch": torch.__version__,
            "date": datetime.date.today().isoformat()}

def commit():
    """The commit of this checkout, with a + if files differ from it; "" where there is no git. Those in
    assets/ do not count: a study writes its results there while it runs."""
    folder = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(folder)]
    name = [*git, "describe", "--always", "--exclude=*"]
    compare = [*git, "diff", "--quiet", "HEAD", "--", ".", ":(exclude)assets"]
    try:
        known = subprocess.run(name, capture_output=True, text=True).stdout.strip()
        differs = subprocess.run(compare, capture_output=True).returncode == 1
    except OSError:
        return ""
    return f"{known}+" if differs else known

def processor():
    """The name of this machine's processor, as Linux reports it, or else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

def write_results(file, rows):
    """Write rows, dicts of the same keys, as CSV: a column per fact, and those of provenance()."""
    known = provenance()
    own = dict.fromkeys(name for row in rows for name in row if name not in known)
    rows = [{**own, **known, **row} for row in rows]    # a row's own values take precedence
    write_table(file, rows)

def write_table(file, rows):
    """Write rows, dicts of the same keys, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(file, text.getvalue().encode(errors="backslashreplace"), named=True)

def print_table(rows, words=1):
    """Print rows of text, the first of which is the header: the first `words` columns are aligned to the
    left, the rest, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [text.ljust(width) if i < words else text.rjust(width)
                 for i, (text, width) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip())
