"""Makes AutoExplore's data: reads directories, asks questions about their files, makes up more repositories.

Tasks come from *reverse question generation*, the paper's idea: take a file, write a question that it answers and no
other does. Deviation: rules write the questions here, from the headings, sentences, keys and definitions that `cat`
shows of the file. (A model behind an endpoint can write them too, as in the paper; the same checks decide.)

Twelve repositories in repos/ were written by hand. Generated ones are made of the words in themes.json; reworded ones
are those of repos/ in other words. Training has many that come up only once, because words that are met again and
again are learned by heart and not compared. The splits `test` and `final` are people/: small repositories as people
have them, with questions as a colleague asks them, none made by a rule. `templates`, in the rules' words, is from two
of repos/ and ten generated ones that training never shows.

    python data/autoexplore/prepare.py                               # write repos.json.gz; --check compares with it
    python data/autoexplore/prepare.py --repos DIR --out FILE.json   # such a file of a directory of yours
    python data/autoexplore/prepare.py --repos DIR --out FILE.json --teacher openai --teacher-model NAME
"""

import argparse
import collections
import functools
import gzip
import itertools
import json
import keyword
import os
import pathlib
import random
import re
import sys
import zlib

HERE = pathlib.Path(__file__).resolve().parent
if str(HERE.parent.parent) not in sys.path:
    sys.path.append(str(HERE.parent.parent))

import envs  # noqa: E402
from envs import UserError, files_of, pages_of  # noqa: E402
from plumbing.options import add_options  # noqa: E402
from plumbing.words import STOP, stem, stems_of, words_of  # noqa: E402

SHIPPED = HERE / "repos.json.gz"
HEAD_BYTES = 16 * 1024  # of a file, what is read
MAX_DEPTH, MAX_FILES = 40, 100_000
NOTES = ("[empty file]", "[binary file]", "[unreadable file]")  # what `cat` shows where there is no text
CUT = "[cut]"
RESULT_LINES, RESULT_TOKENS = 8, 60  # of a file, what `cat` shows
PER_FILE = 8  # most questions about a file; the generated repositories have many files, and one question each
MOST_WORDS = 30  # of a model's question
LONGEST_WAY = 10  # actions to an answer; the horizon leaves room for mistakes

# ---------------------------------------------------------------------------------------------------------
# From the disk to a tree: nested dicts, name -> dict (a directory) or str (the text of a file). Nothing is ever written
# there and no link followed.

LONGEST_NAME = 80  # characters of a name as it is shown: a prompt has each up to five times


def show_name(name):
    """A name as the agent sees it, one line and unmistakable: odd ones are quoted, with escapes.

    `\\xNN` is a byte that is not UTF-8, `\\u` a character that does not print. In a long name `\\...` and a checksum
    replace what stands before its ending.
    """
    plain = name.isprintable() and not set(name) & set(" \"'\\") and not name.startswith("-")
    if plain and len(name) <= LONGEST_NAME:
        return name
    shown = list(map(escape, name))
    if len("".join(shown)) > LONGEST_NAME:
        ending = re.search(r"(\.[A-Za-z]{1,6})?$", name)[0]
        while len("".join(shown)) > LONGEST_NAME - 20:
            shown.pop()
        # No other name is shown like this: a backslash in a name becomes two.
        shown.append(f"\\...{zlib.crc32(name.encode('utf-8', 'surrogateescape')):08x}{ending}")
    return '"' + "".join(shown) + '"'


def escape(c):
    if "\udc80" <= c <= "\udcff":  # how Python decodes a byte of a file name that is not UTF-8
        return f"\\x{ord(c) - 0xDC00:02x}"
    special = {"\n": "\\n", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
    return special.get(c) or (c if c.isprintable() else f"\\u{ord(c):06x}")


def read_directory(path, depth=MAX_DEPTH, counter=None):
    """A directory as a tree. Hidden entries, `__pycache__`, links and special files (pipes, devices) are left out."""
    counter = counter or itertools.count(1)
    try:
        with os.scandir(path) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError:  # unreadable: an empty directory
        return {}
    tree = {}
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        name = show_name(entry.name)
        if entry.is_dir(follow_symlinks=False):
            tree[name] = read_directory(entry.path, depth - 1, counter) if depth else {}
        elif entry.is_file(follow_symlinks=False):
            tree[name] = read_head(entry.path)
            if next(counter) > MAX_FILES:
                raise UserError(f"more than {MAX_FILES} files: choose a smaller directory ({path!r})")
    return tree


def read_head(path):
    """The first `HEAD_BYTES` of a file as text; a note of `NOTES` where there is none to show."""
    # O_NOFOLLOW and O_NONBLOCK: the entry may have become a link or a pipe since it was listed.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            head = file.read(HEAD_BYTES + 1)
    except OSError:
        return "[unreadable file]"
    if b"\0" in head:
        return "[binary file]"
    text = head[:HEAD_BYTES].decode("utf-8-sig", errors="replace")
    lines = []
    for line in text.splitlines():
        line = "".join(c if c.isprintable() else " " for c in line).rstrip()
        if line:
            lines.append(line)
    text = "\n".join(lines)
    return (text + "\n" + CUT if len(head) > HEAD_BYTES else text) or "[empty file]"


# ---------------------------------------------------------------------------------------------------------
# What `cat` shows

CODE = ("py", "pyi", "js", "ts", "sh", "c", "h", "cpp", "go", "rs", "java", "rb", "sql")
COMMENT = re.compile(r"\s*(?:#+|//+|--|/?\*+(?=\s)|[rR]?\"\"\"|''')\s*(\w.*)")
DEFINITION = re.compile(r"\s*(?:async |export |public |static )*(?:def|class|function|func?|fn)\s+(?!__)(\w+)")
PROSE = ("md", "rst", "txt", "tex", "org", "adoc", "readme")
BLOCKS = (  # markup of paragraphs: what is found, what is shown
    (r"(?ms)^(```|:::).+?\n\1$\n?", ""),  # code and boxes
    (r"(?m)^(\w.*)\n([=~^\"'*+-])\2{2,}$", r"# \1"),  # underlined headings
    (r"(?m)^([^\w\s])\1{2,}\n", ""),  # rules
    (r"(?m)^ *(?:\.\. |:[\w-]+:(?!`)|[<{]|\([\w-]+\)=$|\[?!\[|```).*\n?", ""),  # directives, anchors, HTML, badges
)
SPANS = (  # markup of words
    (r"(?:[:{][\w:-]{1,40}[:}])?`{1,3}~?([^`<\n]{1,80}?) ?(?:<[^`\n]{1,200}>)?`{1,3}_*", r"\1"),  # :class:`~a.B`
    (r"\[([^\[\]]{1,80})\]\([^()\n]*\)", r"\1"),  # links
)


def suffix_of(name):
    return name.rstrip('"').rpartition(".")[2].lower()


def replaced(text, rules):
    for pattern, new in rules:
        text = re.sub(pattern, new, text)
    return text


def unwrapped(text, start, mark=""):
    """The text with each sentence on one line: a long line without a final mark goes on in the next. The first line
    begins with the pattern `start`, the others with `mark`."""
    line, more = r'(?:(?!""").)*', rf"\n[ \t]*{mark}(?=[\w(`]|:[a-z:]{{1,20}}:`)"
    # A capital letter begins a new sentence unless the line is as long as wrapped ones are; a `|` stands in a table.
    end = rf'(?<![.!?:"])(?:(?<=[^|\n]{{60}}){more}|(?<=[^|\n]{{35}}){more}(?![A-Z]))'
    return re.sub(rf"(?m)^[ \t]*{start}{line}(?:{more}{line})+", lambda lines: re.sub(end, " ", lines[0]), text)


def shown_text(name, text):
    """What `cat` shows before it is cut to its budget.

    Prose is shown without its markup. Long code begins with a licence and imports, so an outline of it is shown:
    comments, first sentences of docstrings, and what is defined.
    """
    if suffix_of(name) in PROSE:
        return replaced(text, BLOCKS + SPANS).strip("\n") or text
    if suffix_of(name) not in CODE:
        return text
    header = re.match(r"(?:[ \t]*(?:#|//|/?\*).*\n)+", text)
    if header and re.search("copyright|licen[sc]e", header[0], re.IGNORECASE):
        text = text[header.end() :]
    if text.count("\n") < 15:
        return text
    # Docstrings that begin on their second line. Quotes that end one stand behind neither `:` nor the file's beginning.
    text = re.sub(r"(?m)((?:\A|:\n)[ \t]*[rR]?\"\"\")\n\s*(?=[A-Z])", r"\1", text)
    text = unwrapped(unwrapped(text, "#", "# ?"), "[rR]?\"\"\"(?=\\w)")
    outline = []
    for line in text.split("\n"):
        found = DEFINITION.match(line) or COMMENT.match(line)
        if found:
            outline.append(found[0].strip())
    return replaced("\n".join(dict.fromkeys(outline)), SPANS) or text


def count_tokens(text):
    """About what a small byte-level tokenizer makes of a text: every digit, mark and new line counts."""
    return len(re.findall(r"[A-Za-z]{1,8}|\n|[^A-Za-z\s]", text))


def cut_text(text, max_lines=RESULT_LINES, max_tokens=RESULT_TOKENS):
    """The beginning of a text, with a mark when something is left out; the mark is not part of the budget."""
    kept = "\n".join(text.split("\n", max_lines)[:max_lines])
    low, high = 0, min(len(kept), 16 * max_tokens)  # a token has hardly ever more characters
    if high < len(kept) or count_tokens(kept) > max_tokens:
        while low < high:  # the longest prefix within the budget, by bisection
            middle = (low + high + 1) // 2
            if count_tokens(kept[:middle]) <= max_tokens:
                low = middle
            else:
                high = middle - 1
        kept = kept[:low]
    return kept if len(kept) == len(text) else kept.rstrip() + "\n" + CUT


def shown_tree(tree):
    """The tree as AutoExplore has it: of each file what `cat` shows."""
    shown = {}
    for name in sorted(tree):
        if isinstance(tree[name], dict):
            shown[name] = shown_tree(tree[name])
        else:
            shown[name] = cut_text(shown_text(name, tree[name]))
    return shown


# ---------------------------------------------------------------------------------------------------------
# Facts: what a question can be asked about, `(noun, verb, phrase)`

# of files that say nothing of their own: licences, lists of changes, what a program wrote
BOILERPLATE = re.compile(r"(?im)copyright|auto-?\s?generated|^#+ (?:version )?\[?v?\d+\.\d+")


def facts_of(name, text):
    """The facts in what `cat` shows of a file."""
    suffix = suffix_of(name)
    if suffix in PROSE:
        text = unwrapped(text, "(?!#)")
    if text.endswith(CUT):  # the last sentence or row may have been cut within
        last = r"(?:[^.!?\n]|[.!?](?=\S))*[.!?]?" if suffix in (*CODE, *PROSE) else r".*"
        text = re.sub(last + r"\n?\Z", "", text.removesuffix(CUT).rstrip("\n")).rstrip("\n")
    if not text or text.startswith(NOTES) or BOILERPLATE.search(text):
        return []
    if suffix in ("csv", "tsv"):
        return table_facts(text, "," if suffix == "csv" else "\t")
    if suffix in ("json", "yaml", "yml", "toml", "ini", "cfg"):
        return key_facts(text)
    if suffix in CODE:
        return code_facts(text)
    return prose_facts(text) if suffix in PROSE else []


def sentences(text):
    """Short sentences, without the final mark and with a small first letter."""
    found = []
    for part in re.split(r"(?<=[!?:])\s|(?<=\.)\s(?![a-z])", text):
        part = part.strip(" \"'*#/-")
        if part[:1].isalpha():
            part = part.rstrip(".!?:\"'* ")
            found.append(part[0].lower() + part[1:] if part[1:2].islower() else part)
    return found


def prose_facts(text):
    facts = []
    for line in text.split("\n"):
        verb = "explains" if line.startswith("#") else "says:"
        for phrase in sentences(line.lstrip("# ") if line.startswith("#") else line):
            facts.append(("file", verb, phrase))
    return facts


def code_facts(text):
    facts = []
    for line in text.split("\n"):
        comment, definition = COMMENT.match(line), DEFINITION.match(line)
        if comment:
            for phrase in sentences(comment[1].split('"""')[0]):
                facts.append(("code", "says:", phrase))
        if definition:
            facts.append(("code", "defines", " ".join(words_of(definition[1]))))
    return facts


def table_facts(text, comma):
    rows = []
    for line in text.split("\n"):
        rows.append([cell.strip() for cell in line.split(comma)])
    columns = []
    for cell in rows[0][1:]:  # the first column names the row
        if words_of(cell):
            columns.append(" ".join(words_of(cell)))
    facts = []
    for pair in itertools.combinations(columns, 2):
        facts.append(("table", "gives the", " and ".join(pair)))
    for row in rows[1:]:
        if words_of(row[0]):
            for column in columns:
                facts.append(("table", "gives the", f"{column} of {row[0]}"))
    return facts


def key_facts(text):
    facts, parents = [], {}  # parents: indentation -> key
    for line in text.split("\n"):
        # Blanks are stripped first: two `\s*` in a row would try every way to share them.
        stripped = line.lstrip()
        indent = len(line) - len(stripped)
        entry = re.match(r"[-\[]?\s*\"?([A-Za-z_][\w .-]*?)\"?\s*(?:[:=]\s*(.*)|\]$)", stripped)
        if stripped.startswith("#"):
            for phrase in sentences(line.strip("# ")):
                facts.append(("settings file", "says:", phrase))
        elif entry:
            key = " ".join(words_of(entry[1]))
            parents = {i: name for i, name in parents.items() if i < indent}
            outer = " ".join(parents[i] for i in sorted(parents))
            parents[indent] = key
            value = " ".join(re.findall(r"[^\W\d_]+", entry[2] or ""))
            phrase = f"{key} of {outer}" if outer else f"{key} to {value}" if value else key
            facts.append(("settings file", "sets the", phrase))
    return facts


# ---------------------------------------------------------------------------------------------------------
# Questions


def question_of(fact, hint):
    """A question for a fact; the words of the directories in `hint` tell where to look."""
    noun, verb, phrase = fact
    about = []
    for name in hint:
        for word in words_of(name):
            if word not in about:
                about.append(word)
    return f"Which {noun} {'about ' + ' and '.join(about) + ' ' if about else ''}{verb} {phrase}?"


def quotes_name(question, name):
    """Whether a question gives away a file's name: the name, or the words of its stem in a row."""
    spoken = " ".join(re.findall(r"[^\W\d_]+", question.lower()))
    words = " ".join(re.findall(r"[^\W\d_]+", name.rpartition(".")[0].lower() or name.lower()))
    return name.lower() in question.lower() or (bool(words) and f" {words} " in f" {spoken} ")


def is_unique(phrase, path, holders, texts, shown):
    """Whether a phrase has two to seven words of meaning, and no other file has them all where one would look: in the
    names of its directories together with a single line, or with what `cat` shows of it."""
    stems = stems_of(phrase)
    if not 2 <= len(stems) <= 7 or len(phrase) > 90 or re.search(r"[|`<>{}\[\]=\\]|://|^\S*$|[;,]$", phrase):
        return False
    others = set.intersection(*(holders[word] for word in stems)) - {path}
    if len(others) > 5:  # common words: a poor question, and too many files to look through
        return False
    for other in others:
        for part in (shown[other], *texts[other].split("\n")):
            if stems <= stems_of(" ".join([part, *other[:-1]])):
                return False
    return True


def page_numbers(tree, path=()):
    """`{path: page}` of everything in a tree: on which page of its directory it is listed."""
    numbers = {}
    for page, names in enumerate(pages_of(tree, path)):
        for name in names:
            numbers[path + (name,)] = page
            if isinstance(tree[name], dict):
                numbers |= page_numbers(tree[name], path + (name,))
    return numbers


def index_of(tree):
    """`{path: whole text}`, `{path: what cat shows}` and `{stem: the files that have it}` of a tree."""
    texts, shown = {}, dict(files_of(shown_tree(tree)))
    for path, text in files_of(tree):
        texts[path] = unwrapped(text, "(?!#)") if suffix_of(path[-1]) in PROSE else text
    holders = collections.defaultdict(set)  # stem -> the files that have it
    for path, text in texts.items():
        for word in stems_of(" ".join([text, *path[:-1]])):
            holders[word].add(path)
    return texts, shown, holders


def way_to(path, pages):
    """Actions to an answer: down and down, reading, identifying, and turning pages on the way."""
    return len(path) + 1 + sum(pages[path[:i]] for i in range(1, len(path) + 1))


def tasks_of_tree(tree, repo, kind, rng, per_file, most=400, hint=0.9):
    """Tasks whose questions one file of the tree answers, at most `per_file` each.

    A question is refused when another file answers it too, or when it quotes the file's name. A directory on the way
    whose name the question does not touch is mentioned in it with probability `hint`.
    """
    texts, shown, holders = index_of(tree)
    pages, tasks = page_numbers(tree), []
    for path in rng.sample(sorted(texts), len(texts)):
        way = way_to(path, pages)
        facts = list(dict.fromkeys(facts_of(path[-1], shown[path]))) if way <= LONGEST_WAY else []  # none twice
        rng.shuffle(facts)
        unique = (fact for fact in facts if is_unique(fact[2], path, holders, texts, shown))
        for fact in itertools.islice(unique, per_file):
            missing = [name for name in path[:-1] if not stems_of(name) & stems_of(fact[2]) and rng.random() < hint]
            question = question_of(fact, missing)
            if not quotes_name(question, path[-1]):
                task = {"question": question, "targets": ["/".join(path)], "repo": repo}
                tasks.append({**task, "depth": len(path) - 1, "kind": kind})
        if len(tasks) >= most:
            break
    return tasks


def split_repositories(names):
    """`{split: names}`, 7:2:1, by a fixed shuffle; few repositories leave `valid`, then `test` empty."""
    names = sorted(names)
    random.Random(0).shuffle(names)
    tests, valids = (len(names) + 8) // 10 or int(len(names) > 1), len(names) // 5
    return {"test": names[:tests], "valid": names[tests : tests + valids], "train": names[tests + valids :]}


def refusal(pair, path, texts, shown, holders):
    """Why a model's question about a file, `(question, answer)`, is not kept; "" where it is.

    Its words that the file and its path have must belong to this file alone, as those of a rule's question.
    """
    if pair is None or len(pair[0].split()) > MOST_WORDS:
        return "not in the form that was asked for"
    question, answer = (" ".join(text.split()) for text in pair)
    spoken = [" ".join(re.findall(r"\w+", text.lower())) for text in (answer, shown[path])]
    if f" {spoken[0]} " not in f" {spoken[1]} " or spoken[0] in ("", "yes", "no"):  # a yes answers anything
        return "the answer is not in the file"
    if quotes_name(question, path[-1]):
        return "the name of the file is given away"
    known = stems_of(" ".join([texts[path], *path[:-1]]))
    phrase = " ".join(word for word in dict.fromkeys(words_of(question)) if stem(word) in known)
    if not is_unique(phrase, path, holders, texts, shown):
        return "too few or too many words of the file, or other files have them"
    return ""


def tasks_by_teacher(trees, kind, chat):
    """`{repository: tasks}` with a model's questions, one a file, those that pass `refusal`; None with `--dry-run`."""
    files, indices, refused = {}, {name: index_of(tree) for name, tree in trees.items()}, collections.Counter()
    for name, (_, shown, _) in indices.items():
        pages = page_numbers(trees[name])
        for path, text in shown.items():
            if way_to(path, pages) <= LONGEST_WAY and not text.startswith(NOTES) and not BOILERPLATE.search(text):
                files[name, path] = text
    pairs, tasks = envs.beside("../models/endpoint.py").questions(files, chat), {name: [] for name in trees}
    if pairs is None:
        return None
    for (name, path), pair in pairs.items():
        reason = refusal(pair, path, *indices[name])
        refused[reason] += 1
        if not reason:
            task = {"question": " ".join(pair[0].split()), "targets": ["/".join(path)], "repo": name}
            tasks[name].append({**task, "depth": len(path) - 1, "kind": kind})
    print(f"{len(files)} files, {refused.pop('', 0)} questions kept")
    for reason, n in refused.most_common():
        print(f"  {n} refused: {reason}")
    return tasks


def ask(splits, trees, kind, per_file, written=None):
    """`{split: tasks}`; the questions of train repositories are split again into `train`, `valid_seen`, `test_seen`.

    `written`: `{repository: tasks}` of a teacher, in place of the rules'.
    """
    tasks = {"train": [], "valid": [], "test": [], "valid_seen": [], "test_seen": []}
    for split, names in splits.items():
        for name in names:
            rng = random.Random(name)
            found = written[name] if written else tasks_of_tree(trees[name], name, kind, rng, per_file)
            if split != "train":
                tasks[split] += found
                continue
            rng.shuffle(found)
            first, second = len(found) * 7 // 10, len(found) * 9 // 10
            tasks["train"] += found[:first]
            tasks["valid_seen"] += found[first:second]
            tasks["test_seen"] += found[second:]
    return tasks


# ---------------------------------------------------------------------------------------------------------
# A directory or a file of the user's


@functools.cache
def read(path, test_only=False, chat=None):
    """`{"repos": {name: tree}, "tasks": {split: tasks}}` of a directory: of its subdirectories, if it has nothing
    else, or of itself. Of a file: what is in it, checked. `test_only`: no repository is for training. `chat`: a model
    that writes the questions (models/endpoint.py); with `--dry-run` it writes none, and the result is None."""
    if not os.path.isdir(path):
        return read_file(path)
    trees = read_directory(path)
    inside = [name for name in trees if isinstance(trees[name], dict) and any(files_of(trees[name]))]
    if not inside or len(inside) < len(trees):
        trees = {show_name(os.path.basename(os.path.abspath(path)) or "root"): trees}
    splits = {"test": sorted(trees)} if test_only else split_repositories(trees)
    written = tasks_by_teacher(trees, "your own", chat) if chat else None
    if chat and chat.dry_run:
        return None
    tasks = ask(splits, trees, "your own", PER_FILE, written)
    if not tasks["test" if test_only else "train"]:
        why = "none of the model's passed" if chat else "too few text files"
        raise UserError(f"no question could be made from the files of {path!r}: {why}")
    for split in ("valid", "test"):  # too few repositories to keep one apart: unseen questions must do
        tasks[split] = tasks[split] or tasks[f"{split}_seen"]
        del tasks[f"{split}_seen"]
    return {"repos": shown_tree(trees), "tasks": tasks}


def read_file(path):
    """A file that this script wrote, or of the same form; a `UserError` if it cannot be played."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as file:
            data = json.load(file)
        for tree in data["repos"].values():
            check_tree(tree)
        for split, tasks in data["tasks"].items():
            data["tasks"][split] = [checked_task(task, data["repos"]) for task in tasks]
    except (OSError, EOFError, zlib.error, ValueError, RecursionError, UserError) as error:
        raise UserError(f"cannot read repositories from {path}: {error}") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f'{path} is not of the form {{"repos": ..., "tasks": ...}}: {error!r}') from None
    return data


def check_tree(tree):
    """Refuse names that no path can have, and what is neither a directory nor a text."""
    for name, node in tree.items():
        if name in ("", ".", "..") or "/" in name or not name.isprintable() or len(name) > LONGEST_NAME + 2:
            raise UserError(f"{name!r} can be no name of a file: printable, without '/', {LONGEST_NAME} characters")
        if not isinstance(node, (dict, str)):
            raise UserError(f"{name!r} is neither a directory nor a file of text")
        if isinstance(node, dict):
            check_tree(node)
        else:
            node.encode()  # half of a surrogate pair, which no tokenizer takes, is a ValueError here


def checked_task(task, repos):
    """The task, with `depth` and `kind` where a file written by hand has none."""
    if not isinstance(task, dict):
        raise UserError(f"a task is a dict, not {task!r}")
    for key, kind in (("question", str), ("targets", list), ("repo", str)):
        if not isinstance(task.get(key), kind) or not task[key]:
            raise UserError(f"a task needs a non-empty {kind.__name__} {key!r}: {task!r}")
    if task["repo"] not in repos:
        raise UserError(f"there is no repository {task['repo']!r}")
    for target in task["targets"]:
        node = repos[task["repo"]]
        for name in target.split("/") if isinstance(target, str) else [""]:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, str):
            raise UserError(f"target {target!r} is not a file of the repository {task['repo']!r}")
    task = {"depth": min(target.count("/") for target in task["targets"]), "kind": "your own", **task}
    if not isinstance(task["depth"], int) or not isinstance(task["kind"], str):
        raise UserError(f"the depth of a task must be a whole number, its kind a word: {task!r}")
    task["question"].encode()
    return task


# ---------------------------------------------------------------------------------------------------------
# Generated repositories

INVENTED = 1000  # generated repositories from this seed on speak of things that nobody has heard of


def split_of_seed(seed):
    """Generated repositories are split 7:2:1 by seed, each with themes of its own; invented ones are for training."""
    return "train" if seed % 10 < 7 or seed >= INVENTED else "valid" if seed % 10 < 9 else "test"


@functools.cache
def vocabulary():
    return json.loads((HERE / "themes.json").read_text(encoding="utf-8"))


@functools.cache
def common_words():
    """2,710 words: common English nouns, and what is frequent in the docstrings of Python's standard library."""
    return (HERE / "words.txt").read_text(encoding="utf-8").split()


@functools.cache
def held_out_words():
    """The words of the themes of `valid` and `test`."""
    themes = vocabulary()["themes"]
    return set(re.findall("[a-z]+", json.dumps([themes["valid"], themes["test"]]).lower()))


def invented(words, rng):
    """Words in lists and dictionaries, each replaced by another: an English one, or one that does not exist, such as
    `galling`, of gallery and rolling. Words of `valid` and `test` never come up."""
    if isinstance(words, dict):
        return {invented(key, rng): invented(value, rng) for key, value in words.items()}
    if isinstance(words, list):
        return [invented(word, rng) for word in words]
    word = words
    while word == words or word in held_out_words():
        first, last = rng.sample(common_words(), 2)
        word = first if rng.random() < 0.5 else first[: len(first) // 2 + 1] + last[len(last) // 2 :]
    return word


def generate_tree(seed):
    """A made-up repository: departments, in them areas with files, and files of their own; the same for one seed.

    Themes (departments and the things they deal with) come from the split of the seed; aspects (`price`, `owner`)
    are everybody's, so that files of different departments have words in common. From seed `INVENTED` on all words are
    invented: there one can only compare them, which is what unseen repositories ask for.
    """
    rng = random.Random(f"tree {seed}")
    words = vocabulary() | {"themes": vocabulary()["themes"][split_of_seed(seed)]}
    if seed >= INVENTED:
        words = {key: part if key == "kinds" else invented(part, rng) for key, part in words.items()}
    themes = words["themes"]
    departments = {}
    for theme in rng.sample(sorted(themes), 2):
        for department in rng.sample(sorted(themes[theme]), rng.choice((1, 2, 2))):
            departments[department] = themes[theme][department]
    tree = {"README.md": generated_readme(departments)}
    for department, things in departments.items():
        things = rng.sample(things, len(things))
        tree[department] = generated_files(rng, words, department, things[0], rng.choice((2, 3)))
        for thing in things[1 : rng.choice((2, 3, 4))]:
            tree[department][thing] = generated_files(rng, words, department, thing, rng.choice((2, 3, 4)))
            if rng.random() < 0.3:
                place = rng.choice(words["places"])
                tree[department][thing][place] = generated_files(rng, words, department, thing, 2, place)
    return tree | generated_files(rng, words, "company", rng.choice(words["company"]), 2)


def generated_readme(departments):
    """A table of contents, in a form that no question is made of."""
    lines = ["# Contents"]
    for name, things in departments.items():
        lines.append(" | ".join([name, *things[:3]]))
    return "\n".join(lines)


def generated_files(rng, words, department, thing, count, place=None):
    """Files about one thing, each on an aspect of its own; half of them have a name that tells something."""
    files = {}
    for aspect in rng.sample(sorted(words["aspects"]), count):
        kind = rng.choice(sorted(words["kinds"]))
        related = rng.sample(words["aspects"][aspect], 2)
        slots = {
            "department": department,
            "thing": thing,
            "aspect": aspect,
            "other": related[0],
            "number": rng.randint(2, 90),
            "place": place or rng.choice(words["places"]),
        }
        for slot in ("person", "verb", "adjective"):
            slots[slot] = rng.choice(words[slot + "s"])
        name = rng.choice((related[1], rng.choice(words["names"])))
        files[f"{name}.{kind}"] = "\n".join(rng.choice(words["kinds"][kind])).format(**slots)
    return files


# ---------------------------------------------------------------------------------------------------------
# Reworded repositories

# words that stay: without them code is no code, and a file not of its kind
KEPT = {"csv", "html", "json", "license", "readme", "toml", "txt", "yaml", "yml"}
KEPT |= {*CODE, *map(str.lower, keyword.kwlist)}


def reworded_tree(seed, name, tree):
    """A repository in other words: each word of meaning becomes an invented one, in names and in texts.

    Words of one family stay one: where `roast` becomes `gallery`, `roasting` becomes `galling`. So there are as many
    repositories as one likes that are laid out and phrased as people do it, and none that can be learned by heart.
    """
    rng, others = random.Random(f"reworded {seed} {name}"), {}

    def other(match):
        word = match[0].lower()
        if word in STOP or word in KEPT:
            return match[0]
        root = stem(word)
        if root not in others:
            others[root] = invented(word, rng)
        ending = word[len(root) :]
        new = stem(others[root]) + ending if ending else others[root]
        return new.upper() if match[0].isupper() else new.capitalize() if match[0][0].isupper() else new

    def reworded(text):
        return re.sub(r"[A-Z][a-z]{2,}|[a-z]{3,}|[A-Z]{3,}", other, text)

    def rewritten(tree):
        names = {entry: reworded(entry) for entry in tree}
        clash = len(set(names.values())) < len(names)  # two names became one: better the old than a file lost
        new = {}
        for entry, node in tree.items():
            new[entry if clash else names[entry]] = rewritten(node) if isinstance(node, dict) else reworded(node)
        return new

    return rewritten(tree)


# ---------------------------------------------------------------------------------------------------------
# The shipped file

GENERATED = 100  # generated repositories, and as many invented ones; the tasks of `valid` and `test` are of them too
TRAIN_GENERATED = 170  # training tasks on them
ONCE_GENERATED, ONCE_REWORDED = 600, 800  # training repositories that come up once, with one task each


def pool():
    """All that can come up again, more than is shipped; the corpus of the base LM (models/nano/make.py) draws from it.

    `(splits of the written repositories, {name: tree}, tasks of the written, tasks of the generated ones)`
    """
    written = {path.name: read_directory(path) for path in sorted((HERE / "repos").iterdir()) if path.is_dir()}
    splits = split_repositories(written)
    trees, made_splits = dict(written), {"train": [], "valid": [], "test": []}
    for seed in (*range(GENERATED), *range(INVENTED, INVENTED + GENERATED)):
        trees[f"generated:{seed}"] = generate_tree(seed)
        made_splits[split_of_seed(seed)].append(f"generated:{seed}")
    return splits, trees, ask(splits, written, "written", PER_FILE), ask(made_splits, trees, "generated", 1)


def people(split):
    """`({name: tree}, tasks)` of a split of people/."""
    folder, trees = HERE / "people" / split, {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            trees[path.name] = read_directory(path)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return trees, [checked_task({**json.loads(line), "kind": "people's"}, trees) for line in lines]


def make():
    """`{"repos": {name: tree}, "tasks": {split: tasks}}` as it is shipped."""
    splits, trees, tasks, made = pool()
    rng = random.Random("what comes up once")
    made["train"] = rng.sample(made["train"], TRAIN_GENERATED)
    for split in ("train", "valid", "test"):
        tasks[split] += made[split]
    for i in range(ONCE_GENERATED + ONCE_REWORDED):
        if i < ONCE_GENERATED:
            seed, kind = rng.randrange(10 * INVENTED, 10**9), "generated"
            name, tree = f"generated:{seed}", generate_tree(seed)
        else:
            seed, kind, original = rng.randrange(10**9), "reworded", rng.choice(splits["train"])
            name, tree = f"reworded:{seed}:{original}", reworded_tree(seed, original, trees[original])
        trees[name] = tree
        tasks["train"].append(rng.choice(tasks_of_tree(tree, name, kind, rng, 1)))
    tasks = {"train": tasks["train"], "valid": tasks["valid"], "templates": tasks["test"]}
    for split in ("test", "final"):
        more, tasks[split] = people(split)
        trees |= more
    used = {task["repo"] for split in tasks for task in tasks[split]}
    return {"repos": {name: shown_tree(trees[name]) for name in sorted(used)}, "tasks": tasks}


def write(data, path):
    text = json.dumps(data, separators=(",", ":"))  # ASCII: a name that is not UTF-8 can be written too
    content = (text + "\n").encode()
    # A time stamp would make each file another one.
    pathlib.Path(path).write_bytes(gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)
    counts = ", ".join(f"{len(tasks)} {split}" for split, tasks in data["tasks"].items())
    print(f"{path}: {len(data['repos'])} repositories, tasks: {counts}")


def main():
    parser = argparse.ArgumentParser(description="Make AutoExplore's data.", allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="make the shipped file again and compare")
    parser.add_argument("--repos", metavar="DIR", help="ask about this directory instead; needs --out")
    parser.add_argument("--test-only", action="store_true", help="with --repos: all are for testing, none for training")
    parser.add_argument("--out", metavar="FILE", help="file to write, .json or .json.gz (default: repos.json.gz here)")
    parser.add_argument("--teacher", choices=["rules", "openai"], default="rules",
                        help="who writes the questions about --repos; openai: a model behind an endpoint")
    parser.add_argument("--teacher-model", metavar="NAME", default="", help="its name at the endpoint")
    endpoint = envs.beside("../models/endpoint.py")
    add_options(parser, endpoint.OPTIONS)
    args = parser.parse_args()
    if args.check:
        if read_file(str(SHIPPED)) != make():
            raise SystemExit(f"{SHIPPED} is not what prepare.py makes")
        print(f"{SHIPPED} is what prepare.py makes")
    elif (args.repos and not args.out) or (args.test_only and not args.repos):
        parser.error("--repos needs --out FILE, --test-only needs both")
    elif args.teacher == "openai" and not os.path.isdir(args.repos or ""):
        parser.error("--teacher openai asks about --repos DIR, a directory")
    elif args.repos:
        chat = endpoint.Chat(args.teacher_model, args) if args.teacher == "openai" else None
        data = read(args.repos, args.test_only, chat)
        if data:
            write(data, args.out)
    else:
        write(make(), args.out or SHIPPED)


if __name__ == "__main__":
    envs.run_main(main)
