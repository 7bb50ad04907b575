"""Gets the plays of Shakespeare that train.py reads: python data/prepare.py writes them beside itself.

minisa/shakespeare.py says where it comes from.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minisa.cli import command
from minisa.shakespeare import prepare

if __name__ == "__main__":
    command(lambda: print("the texts are in", *prepare()))
