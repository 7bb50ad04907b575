"""Whether an answer is right in a case of check.py, and values as text: in a few words, or whole to paste."""

import numpy as np
import torch

from minisa.exercises import check

def judge(case, reply):
    """What an answer did in a case, as child.call() says it → None if that is right, else why not. Raises
    NotImplementedError if there is no answer yet."""
    given = ", ".join(f"{name}={shown(value)}" for name, value in case.arguments.items())
    expected = f"expected {shown(case.expected)}"
    if "error" in reply:
        kinds = reply.get("kinds", [])
        if "NotImplementedError" in kinds:
            raise NotImplementedError("not answered yet")
        if case.expected is ValueError and "ValueError" in kinds:
            return None
        return f"{expected}, got {reply['error']}, for {given}"
    got = reply.get("got")
    if not is_right(got, case.expected):
        return f"{expected}, got {shown(got)}, for {given}"
    if case.after is not None and not cache_is(reply.get("after"), case.after):
        name, _ = next(iter(case.arguments.items()))
        return f"afterwards, {name} does not hold what it held and this token's v, once, for {given}"
    return None

def is_right(got, expected):
    """Is an answer what was expected? Whole numbers are exact, others may be rounded as by float32."""
    if expected is ValueError:
        return False
    if isinstance(expected, list) and isinstance(expected[0], str):
        return got == expected
    if isinstance(got, dict):
        got = got.get("numbers")
    expected = np.asarray(expected)
    try:
        numbers = np.asarray(got)
    except ValueError:                                              # lists of different lengths
        return False
    if numbers.dtype.kind not in "biuf" or numbers.shape != expected.shape:
        return False
    if expected.dtype.kind == "i":
        return np.array_equal(numbers, expected)
    return np.allclose(numbers, expected, rtol=1e-4, atol=1e-5)

def cache_is(after, expected):
    """Is the first argument, as it was left, a list of these tensors?"""
    values = after[0] if isinstance(after, list) and after else None
    if not isinstance(values, list) or len(values) != len(expected):
        return False
    return all(is_right(got, value.numpy()) for got, value in zip(values, expected))

# ---- values as text ----

def shown(value):
    """A value in a few words."""
    if value is ValueError:
        return "a ValueError"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = {"shape": list(value.shape), "numbers": value.tolist()}
    if isinstance(value, dict) and "numbers" in value:
        numbers = np.asarray(value["numbers"], dtype=object).ravel().tolist()
        return f"a tensor of shape {tuple(value['shape'])}: {shown(numbers)}"
    if isinstance(value, dict):
        return str(value.get("text"))[:80]
    if isinstance(value, list):
        parts = [shown(part) for part in value[:4]]
        more = ["..."] if len(value) > 4 else []
        return f"[{', '.join(parts + more)}]"
    if isinstance(value, (float, np.floating)):
        return f"{value:.5g}"
    return repr(value)[:80]

def pasted(exercise, number):
    """→ a case, whole, as lines of Python to paste below an answer. Raises ValueError if no case has this
    number."""
    every = check.cases(exercise)
    if not 1 <= number <= len(every):
        raise ValueError(f"--case={number}: {exercise.__name__} has cases 1 to {len(every)}")
    case = every[number - 1]
    lines = [f"# {exercise.__name__}, case {number} ({case.group})", "import torch"]
    lines += [f"{name} = {as_python(value)}" for name, value in case.arguments.items()]
    expected = "ValueError" if case.expected is ValueError else as_python(case.expected)
    lines.append(f"expected = {expected}")
    lines.append(f"print({exercise.__name__}({', '.join(case.arguments)}))")
    if case.after is not None:
        lines.append("print(len(values), 'tokens in the cache')")
    return "\n".join(lines)

def as_python(value):
    """A value as an expression of Python. Numbers of a tensor have the nine digits of float32."""
    if isinstance(value, torch.Tensor):
        return f"torch.tensor({as_python(value.numpy())})"
    if isinstance(value, np.ndarray):
        return repr(NINE_DIGITS(value).tolist())
    if isinstance(value, list):
        return f"[{', '.join(map(as_python, value))}]"
    return repr(value.item() if isinstance(value, np.generic) else value)

NINE_DIGITS = np.vectorize(lambda number: float(f"{number:.9g}"), otypes=[float])
