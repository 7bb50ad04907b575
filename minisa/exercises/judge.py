"""Whether an answer is right in a case of check.py, and values as text: in a few words, or whole to paste."""

import contextlib

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
        return f"{expected}, got {shown(got)}{difference(got, case.expected)}, for {given}"
    if case.after is not None and not cache_is(reply.get("after"), case.after):
        name, _ = next(iter(case.arguments.items()))
        return f"afterward, {name} does not hold exactly its earlier entries and this token's v, for {given}"
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

MOST = 16                       # numbers or words that are shown whole

def shown(value):
    """A value: whole if it is short, else its last row."""
    if value is ValueError:
        return "a ValueError"
    if isinstance(value, (torch.Tensor, np.ndarray)):
        value = {"shape": list(value.shape), "numbers": value.tolist()}
    if isinstance(value, dict) and "numbers" in value:
        return f"a tensor of shape {tuple(value['shape'])}: {shown(value['numbers'])}"
    if isinstance(value, dict):
        return str(value.get("text"))[:80]
    if isinstance(value, list):
        return shown_list(value)
    if isinstance(value, float):
        return f"{value:.5g}"
    return repr(value)[:80]

def shown_list(values):
    size = elements(values)
    if size.ndim > 8:
        return "a list of lists of lists ..."
    if size.size > MOST and isinstance(values[-1], list):
        while isinstance(values[-1], list):
            values = values[-1] or [None]
        return f"[..., {shown(values)}]"
    parts = [shown(part) for part in values[:MOST]]
    more = ["..."] if len(values) > MOST else []
    return f"[{', '.join(parts + more)}]"

def elements(value):
    """→ an array of whatever an answer gave, or a case expects."""
    if isinstance(value, dict):
        value = value.get("numbers")
    return np.array(value, dtype=object)

def difference(got, expected):
    """How a wrong answer differs, in words; "" if there is no more to say."""
    got, expected = elements(got), elements(expected)
    if expected.ndim == 0 or got.ndim == 0:
        return gap(got.item(), expected.item()) if got.ndim == expected.ndim else ""
    if got.shape != expected.shape:
        sizes = [" × ".join(map(str, array.shape)) for array in (got, expected)]
        return " (of size {}, not {})".format(*sizes)
    for place in np.ndindex(got.shape):
        if not is_right([got[place]], [expected[place]]):
            return f" (first at {list(place)}: {shown(expected[place])}, not {shown(got[place])})"
    return ""

def gap(got, expected):
    with contextlib.suppress(TypeError, OverflowError):
        more = got - expected
        size = f"{abs(more):,}" if isinstance(more, int) else shown(abs(more))
        return f" ({size} too {'much' if more > 0 else 'little'})"
    return ""

# ---- a case to paste ----

def pasted(exercise, number):
    """→ a case, whole, as lines of Python to paste below an answer. Raises ValueError if no case has this
    number."""
    every = check.cases(exercise)
    if not 1 <= number <= len(every):
        raise ValueError(f"--case={number}: {exercise.__name__} has cases 1 to {len(every)}")
    case = every[number - 1]
    call = f"{exercise.__name__}({', '.join(case.arguments)})"
    expected = "'a ValueError'" if case.expected is ValueError else as_python(case.expected)
    lines = [f"{name} = {as_python(value)}" for name, value in case.arguments.items()]
    lines = ["import torch", *lines, f"expected = {expected}"]
    if exercise is check.roles:
        lines += ["try:", f"    yours = {call}", "except ValueError:", "    yours = 'a ValueError'"]
        compared = "'right:', yours == expected"
    else:
        lines.append(f"yours = {call}")
        gaps = "torch.as_tensor(yours) - torch.as_tensor(expected)"
        compared = f"'largest difference:', ({gaps}).abs().max().item()"
    lines += ["print('yours:', yours)", "print('expected:', expected)", f"print({compared})"]
    if case.after is not None:
        lines.append(f"print('tokens in the cache:', len(values), 'expected:', {len(case.after)})")
    title = f"# {exercise.__name__}, case {number} ({case.group}): paste this below it, and run your file"
    return "\n".join([title, "if __name__ == '__main__':", *(f"    {line}" for line in lines)])

def as_python(value):
    """A value as an expression of Python, with as many digits as float32 needs."""
    if isinstance(value, torch.Tensor):
        return f"torch.tensor({as_python(value.numpy())})"
    if isinstance(value, np.ndarray):
        digits = value.astype(np.float32).astype(str)               # the fewest that give it back
        return repr(digits.astype(float).tolist())
    if isinstance(value, list):
        return f"[{', '.join(map(as_python, value))}]"
    return repr(value.item() if isinstance(value, np.generic) else value)
