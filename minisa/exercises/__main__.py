"""Grade a file of answers to the exercises, which minisa/exercises/README.md describes.

    python -m minisa.exercises                          answers.py in this folder, as it is
    python -m minisa.exercises --answers=mine.py        a copy
    python -m minisa.exercises --answers=mine.py --json     for a program
"""

import json
from pathlib import Path

from minisa.exercises import check
from minisa.kit.cli import Parser, command

def main():
    parser = Parser(__doc__, usage="python -m minisa.exercises [--answers=FILE] [--json]")
    parser.flag("answers", default=str(Path(__file__).parent / "answers.py"),
                help="Python file with the answers", shown="minisa/exercises/answers.py")
    parser.switch("json", "print the result as JSON")
    args = parser.parse_args()
    if not Path(args.answers).is_file():
        raise ValueError(f"--answers={args.answers}: no such file; copy minisa/exercises/answers.py")
    results = []
    for name, got, points, wrong in check.grade_file(args.answers):
        results.append({"exercise": name, "points": got, "of": points, "wrong": wrong})
        if not args.json:
            print(f"{name:<14}{got:>4} of {points:>2}   {wrong or 'right'}", flush=True)
    got, points = (sum(result[key] for result in results) for key in ("points", "of"))
    print(json.dumps({"points": got, "of": points, "exercises": results}, indent=1) if args.json
          else f"{'in all':<14}{got:>4} of {points:>2}")

if __name__ == "__main__":
    command(main)
