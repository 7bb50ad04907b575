"""Results of grading: as text, as rows of a table, and as the JSON that Gradescope reads."""

import json

def show(result):
    """Print what an exercise earned: a line, and one for each group that is wrong, if another is right."""
    partly = 0 < result.points < result.of
    said = "partly right" if partly else result.wrong or "right"
    print(f"{result.name:<14}{result.points:>4} of {result.of:>2}   {said}", flush=True)
    if not partly:
        return
    for group in result.groups:
        said = group.wrong or f"{group.name}: right"
        print(f"{'':<14}{group.points:>4} of {group.of:>2}   {said}", flush=True)

def totals(results):
    return sum(result.points for result in results), sum(result.of for result in results)

def in_all(results):
    got, of = totals(results)
    return f"{'in all':<14}{got:>4} of {of:>2}"

def first_wrong(results):
    """The first thing that is wrong in a file, or None."""
    return next((f"{result.name}: {result.wrong}" for result in results if result.wrong), None)

def gradescope(results):
    """→ what an autograder of Gradescope writes into its results.json: a test for each group of cases."""
    tests = []
    for result in results:
        for group in result.groups:
            tests.append({
                "name": f"{result.name}: {group.name}",
                "score": group.points,
                "max_score": group.of,
                "output": group.wrong or "right"})
    return {"tests": tests}

def as_json(found):
    return json.dumps(found, indent=1)

def rows_of(graded):
    """→ a row, a dict, for each file: points of each exercise and in all, and what is wrong."""
    rows = []
    for file, results in graded.items():
        total, of = totals(results)
        points = {result.name: result.points for result in results}
        wrong = first_wrong(results) or ""
        rows.append({"file": file, **points, "total": total, "of": of, "wrong": wrong})
    return rows
