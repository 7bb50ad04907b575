"""The commands of the course; what the exercises are about is on the sheet, minisa/exercises/README.md.

    python -m minisa.exercises --answers=mine.py            grade a file of answers, or
    python -m minisa.exercises --all=FOLDER                 all in a folder
    python -m minisa.exercises play --answers=mine.py       let your answers generate text in a real model
    python -m minisa.exercises rank FOLDER                  rank the entries of the competition
    python -m minisa.exercises handout                      pack the models and pictures of the lecture
    python -m minisa.exercises solutions                    write right answers, for the teacher

`python -m minisa.exercises COMMAND --help` lists the flags of the last four.

Answers run in a program of their own, which holds no expected value and refuses to import minisa; child.py
says what that stops and what it cannot. Grade strangers' files in a container.
"""

import importlib
import os
import sys
from pathlib import Path

from minisa.exercises import grade, report
from minisa.kit.cli import Parser, command, count, table
from minisa.kit.files import write_file
from minisa.kit.results import write_table

COMMANDS = "play", "rank", "handout", "solutions"
TEMPLATE = Path(__file__).parent / "answers.py"

def read_flags():
    parser = Parser(__doc__, usage="python -m minisa.exercises [COMMAND] [--FLAG=VALUE ...]")
    parser.flag("answers", default=str(TEMPLATE), help="Python file with the answers",
                shown="minisa/exercises/answers.py")
    parser.flag("only", help="grade this exercise alone, as reuse_layer", shown="all")
    parser.flag("case", count, help="with --only, print this case whole, as Python to paste", shown="none")
    parser.flag("all", default="", help="grade each .py file of this folder instead", shown="none")
    parser.flag("csv", table, help="with --all, file to write a row per answers file to", shown="none")
    parser.flag("results", default="",
                help="file to write as Gradescope's results.json; with --all a folder for "
                "one per answers file", shown="none")
    parser.switch("json", "print what --results would write, instead of lines")
    parser.switch("strict", "exit with status 1 below full points")
    args = parser.parse_args()
    if args.case and not args.only:
        raise ValueError("--case: goes with --only=NAME, which exercise it is of; add that")
    if args.csv and not args.all:
        raise ValueError("--csv: goes with --all=FOLDER; add that, or take --json")
    if not args.all and os.path.isdir(args.results):
        raise ValueError(f"--results={args.results}: is a folder; name a file in it")
    return args

def grade_one(args):
    """→ the Results of one file, printed as they come."""
    if not Path(args.answers).is_file():
        raise ValueError(f"--answers={args.answers}: no such file; copy minisa/exercises/answers.py")
    results = []
    for result in grade.grade_file(args.answers, args.only):
        results.append(result)
        if not args.json:
            report.show(result)
    found = report.as_json(report.gradescope(results))
    print(found if args.json else report.in_all(results))
    if args.results:
        write_file(args.results, found.encode(), named=True)
    return results

def grade_all(args):
    """→ the Results of all files of a folder, with a row of points printed for each."""
    files = sorted(Path(args.all).glob("*.py"))
    if not files:
        raise ValueError(f"--all={args.all}: holds no .py files; name the folder with the answers")
    graded = {}
    for file in files:
        results = list(grade.grade_file(file, args.only, quiet=True))
        graded[file.name] = results
        if not args.json:
            wrong = report.first_wrong(results) or "right"
            print(f"{file.name}: {report.in_all(results)}   {wrong}", flush=True)
        if args.results:
            found = report.as_json(report.gradescope(results))
            write_file(Path(args.results) / f"{file.stem}.json", found.encode())
    if args.json:
        print(report.as_json({name: report.gradescope(results) for name, results in graded.items()}))
    if args.csv:
        write_table(args.csv, report.rows_of(graded))
    return [result for results in graded.values() for result in results]

def main():
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return importlib.import_module(f"minisa.exercises.{sys.argv.pop(1)}").main()
    args = read_flags()
    exercise = grade.exercise_named(args.only) if args.only else None
    if args.case:
        from minisa.exercises.judge import pasted  # late: it imports torch
        print(pasted(exercise, args.case))
        return 0
    results = grade_all(args) if args.all else grade_one(args)
    full = all(result.points == result.of for result in results)
    return 1 if args.strict and not full else 0

if __name__ == "__main__":
    command(main)
