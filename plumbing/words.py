"""How words are compared: by AutoExplore's teacher, by the makers of its data and of the base LM's corpus."""

import functools
import re

# These say nothing about what a file is about.
STOP = """
    a about after all also among an and any are as at be been before but by can code defines described do does each
    every explains file for from gives had has have how if in into is it its just kept may more most must never no
    not of off on one only or other our out over per read say says set sets settings should so some than that the
    their them then there these they this those through to too two under up use used uses was were what when where
    which while who will with without you your table"""
STOP = frozenset(STOP.split())


def spelt_words_of(text):
    """The words of a text that carry meaning, as spelt and in order; `snake_case` and `camelCase` are split."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return [word for word in re.findall(r"[^\W\d_]{3,}", text) if word.lower() not in STOP]


def words_of(text):
    """The same in lower case: what is compared."""
    return [word.lower() for word in spelt_words_of(text)]


@functools.lru_cache(maxsize=100_000)
def stem(word):
    """What words of one family share: roast of `roasts`, `roasted`, `roaster`, `roasting`."""
    word = re.sub(r"(?<=...)(ings?|ers?|ies|y|ed|es|s|e)$", "", word)
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word  # shipp(ing) is ship


def stems_of(text):
    return {stem(word) for word in words_of(text)}
