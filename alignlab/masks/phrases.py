"""Noun phrases of a caption by a rule, where nothing names its entities.

No tagger: a phrase begins at an article, a number, a possessive or a preposition, and ends before
the first word that cannot be in it. How often it is right is in docs/masks.md.
"""

import re
from itertools import zip_longest

BEGINS = frozenset(
    """a an the this that these those another each every some several many both one two three four
    five six seven eight nine ten his her its their my your our""".split()
)
SINGULAR = frozenset(
    "a an another each every one this that its his her their my your our the".split()
)
PREPOSITIONS = frozenset(
    """on in at of with near beside behind before under over above below between among past through
    across against around into onto off out from to toward towards inside outside along down up by
    next""".split()
)
NO_NOUNS = frozenset(
    """and or but while as when where which who whose then so than is are was were be been being has
    have had does do did can will it itself he himself she herself they them themselves him there
    not no very slowly quickly fast away back forward wide close together apart still again also
    just only left right here""".split()
)
DESCRIBING = frozenset(
    """red orange yellow green blue purple violet pink brown black white gray grey silver gold
    golden cyan magenta teal turquoise beige navy maroon olive dark light bright pale big large
    small tiny little huge old new young tall short long wide narrow plain""".split()
)
NOUNS_IN_ING = frozenset(
    """ring king wing thing string spring swing building railing painting ceiling clothing wedding
    drawing morning evening""".split()
)
NO_ENTITIES = frozenset(
    """background foreground camera scene view video clip shot frame moment front left right top
    bottom side middle center centre distance while time day night way""".split()
)
MOST = 8  # phrases of a caption


def noun_phrases(caption: str) -> tuple[str, ...]:
    """What a caption names, without articles, in its order, each once, at most eight.

    >>> noun_phrases("A big gray rabbit leans on gray boulders, in front of its burrow.")
    ('big gray rabbit', 'gray boulders', 'burrow')
    """
    found: dict[str, None] = {}
    for clause in re.split(r"[.,;:!?()\"]+", caption.lower()):
        words = re.findall(r"[\w'-]+", clause)
        at = 0
        while at < len(words):
            begin = at
            while at < len(words) and words[at] in BEGINS | PREPOSITIONS:
                at += 1
            is_first = begin == 0
            if at == begin and not is_first:
                at += 1
                continue
            phrase = _phrase(words[at:], is_singular=at > 0 and words[at - 1] in SINGULAR)
            at += max(1, len(phrase))
            if phrase and phrase[-1] not in NO_ENTITIES:
                found[" ".join(phrase)] = None
    return tuple(found)[:MOST]


def _phrase(words: list[str], *, is_singular: bool) -> list[str]:
    """The words up to the first that cannot be in the phrase they begin."""
    phrase: list[str] = []
    for word, after in zip_longest(words, words[1:], fillvalue="and"):
        if word in BEGINS | PREPOSITIONS | NO_NOUNS:
            break
        has_noun = any(map(_is_noun, phrase))
        is_last = after in BEGINS | PREPOSITIONS | NO_NOUNS
        if has_noun and (word.endswith("ing") or (word.endswith("ed") and is_last)):
            break  # a participle or a verb
        if phrase and _looks_like_a_verb(phrase[-1]) and _looks_like_a_verb(word):
            break  # after a plural
        if has_noun and is_singular and _looks_like_a_verb(word):
            break
        phrase.append(word)
    while phrase and not _is_noun(phrase[-1]):
        phrase.pop()
    return phrase


def _is_noun(word: str) -> bool:
    if word in NOUNS_IN_ING:
        return True
    return word not in DESCRIBING and not word.endswith(("ed", "ing"))


def _looks_like_a_verb(word: str) -> bool:
    """After a singular noun: `leans`, not `bus` or `glass`."""
    return word.endswith("s") and not word.endswith(("ss", "us", "is"))
