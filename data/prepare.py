"""Gets the plays of Shakespeare that train.py reads: python data/prepare.py writes them beside itself.

minisa/kit/shakespeare.py says where they come from.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from minisa.kit.cli import command
from minisa.kit.files import data_folder
from minisa.kit.shakespeare import prepare

if __name__ == "__main__":
    command(lambda: print("the texts are in", *prepare(data_folder())))
