"""Files with an object of JSON a line, read as carefully as files from elsewhere must be."""

import dataclasses
import json
from pathlib import Path

from envs import UserError
from plumbing.runs import write


def write_lines(path, objects):
    """Write dicts or dataclasses, one a line; the folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, "".join(json.dumps(fields, default=vars) + "\n" for fields in objects))


def read_lines(path, make):
    """What `make(**fields)` makes of each line; a malformed one is named by its number."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from None
    if not text.strip():
        raise UserError(f"the data set {path} is empty")
    found = []
    # Not splitlines(): it also breaks at U+2028 and U+0085, which may stand inside a JSON text.
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        try:
            found.append(make(**json.loads(line)))
        except (UserError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
    return found


def check_types(record):
    """A `UserError` where a field of a dataclass is of another type than it says."""
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        # True is an int to Python, and would quietly mean the second action.
        if not isinstance(value, field.type) or (field.type is int and isinstance(value, bool)):
            raise UserError(f"{field.name} must be of type {field.type.__name__}, not {str(value)[:80]!r}")
