"""Rows of a table, printed and in a file: what the tables and curves of docs/ are drawn from, without playing."""

import json
from pathlib import Path

from plumbing.runs import write
from reflect_rl import Episode, Step

COLUMNS = {  # what is kept of an episode, beside its task
    "success": lambda episode: int(episode.success),
    "terminated": lambda episode: int(episode.terminated),
    "return": lambda episode: round(episode.total, 3),
    "length": lambda episode: len(episode.steps),
}


def write_rows(rows, path):
    """One row a line, small: of each episode its task (index in the split) and `COLUMNS`."""
    lines = []
    for r in rows:
        places, line = {}, {"sampled": [], "greedy": []}
        for i, task in enumerate(r["env"].tasks(r["split"])):
            places[json.dumps(task)] = i
        for kind in line:
            for episodes in r[kind]:
                columns = {"task": [places[json.dumps(episode.task)] for episode in episodes]}
                for name, value in COLUMNS.items():
                    columns[name] = list(map(value, episodes))
                line[kind].append(columns)
        lines.append(json.dumps({**r, "env": None, **line}) + "\n")
    write(path, "".join(lines))


def read_rows(path, env):
    """The rows of such a file; their episodes have no states."""
    rows = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        r = json.loads(text) | {"env": env}
        tasks = env.tasks(r["split"])
        for kind in ("sampled", "greedy"):
            runs = []
            for columns in r[kind]:
                runs.append([])
                for task, success, terminated, total, length in zip(*columns.values(), strict=True):
                    steps = [Step("", (), reward=total / length)] * length
                    runs[-1].append(Episode(tasks[task], None, None, "", (), steps, bool(success), bool(terminated)))
            r[kind] = runs
        rows.append(r)
    return rows


def print_markdown(title, head, body):
    """A table in Markdown that can be read as it is; the cells are texts, the first of each row is its name."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    print(f"\n{title}\n")
    for name, *cells in [head, ["-" * width for width in widths], *body]:
        padded = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        print("| " + " | ".join([f"{name:{widths[0]}}", *padded]) + " |")
