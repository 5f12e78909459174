"""Write questions for AutoExplore down: a JSON object a line, made from files by rules (`envs.tasks_of_tree`).

A draft that belongs into negatives.py. The lines can be read, mended, or replaced by questions of a large model, and
used with `AutoExplore(questions="questions.jsonl")`.

    python questions.py --repos DIR --out questions.jsonl
"""

import argparse
import json
import random

from envs import UserError, repositories, run_main, tasks_of_tree, tree_of


def write_tasks(path, tasks):
    """Tasks as JSON lines (ASCII, so that file names of any bytes survive)."""
    try:
        with open(path, "w", encoding="ascii") as file:
            file.writelines(json.dumps(task) + "\n" for task in tasks)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error}") from None


def main():
    parser = argparse.ArgumentParser(description="Write questions about the files of a directory.", allow_abbrev=False)
    parser.add_argument("--repos", help="directory of repositories, or one repository (default: data/repos)")
    parser.add_argument("--out", default="questions.jsonl", help="file to write (default: questions.jsonl)")
    parser.add_argument("--per-file", type=int, default=2, help="most questions about one file (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="which questions are chosen (default: 0)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    tasks = []
    for root in repositories(args.repos):
        tasks += tasks_of_tree(tree_of(root), root, rng, args.per_file)
    write_tasks(args.out, tasks)
    for task in tasks[:5]:
        print(f"{task['question']}  ->  {task['targets'][0]}")
    print(f"{len(tasks)} questions in {args.out}")


if __name__ == "__main__":
    run_main(main)
