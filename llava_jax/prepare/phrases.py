"""Noun phrases of a caption: found by spaCy, or by a small finder of our own that needs no model."""

import re
from collections.abc import Callable, Iterable, Iterator

from llava_jax.types import InputError

# A finder gives the phrases of each text, in order, as they are written there.
Finder = Callable[[Iterable[str]], Iterator[list[str]]]

ARTICLES = frozenset("a an the this that these those some any each every another".split())
POSSESSIVES = frozenset("my your his her its our their".split())
# Between these words stand the noun phrases of a caption; articles and possessives begin one.
BREAKS = frozenset(
    """
    about above across after against along alongside amid among and around as at away back before behind below beneath
    beside besides between beyond but by down during except for from in inside into like near next of off on onto or out
    outside over past per since than through throughout to toward towards under underneath until up upon via when where
    which while who whose why with within without because if so then there here not no nor yet both either neither
    i you he she it we they me him them us himself herself itself themselves what how
    is are was were be been being am has have had having do does did can could will would may might must shall should
    get gets got go goes going make makes made take takes took show shows shown showing see seen seeing
    stand stands standing stood sit sits sitting sat lie lies lying laid hang hangs hanging hold holds holding held
    wear wears wearing wore ride rides riding rode walk walks walking run runs running play plays playing
    look looks looking eat eats eating drink drinks drinking fly flies flying jump jumps jumping carry carries carrying
    park parked parks use uses using work works working watch watches watching wait waits waiting
    lead leads leading follow follows following hit hits hitting throw throws throwing catch catches catching
    contain contains containing cover covered covers filled surrounded attached made placed located topped sits
    very too also just only more most less much many several few all one's
    """.split()
)
WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*|[^\w\s]")


def builtin_phrases(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield the phrases of each text: runs of words between punctuation and the words of BREAKS.

    A run begins anew at an article or a possessive. Without a grammar it knows no verb that is not in the list, so a
    phrase may end with one; for the paper's own counts take spaCy.
    """
    silent = ARTICLES | POSSESSIVES  # words that say nothing by themselves, as figures do not
    for text in texts:
        found = runs(WORD.findall(text))
        yield [" ".join(run) for run in found if not all(word.isdecimal() or word.lower() in silent for word in run)]


def runs(words: Iterable[str]) -> Iterator[list[str]]:
    run: list[str] = []
    for word in words:
        lower = word.lower()
        starts = lower in ARTICLES or lower in POSSESSIVES
        if run and (starts or lower in BREAKS or not word[0].isalnum()):
            yield run
            run = []
        if starts or (word[0].isalnum() and lower not in BREAKS):
            run.append(word)
    if run:
        yield run


def spacy_phrases(model: str) -> Finder:
    """Return a finder that gives spaCy's noun chunks. Raises InputError where spaCy or the model is not installed."""
    try:
        import spacy
    except ImportError as error:
        raise InputError(
            "--finder=spacy needs spaCy: pip install 'llava-jax[concepts]', or --finder=builtin"
        ) from error
    try:
        # The named entities and lemmas of the model are not asked for, and cost half of its time.
        pipeline = spacy.load(model, exclude=["ner", "lemmatizer"])
    except OSError as error:
        raise InputError(
            f"--spacy_model={model}: spaCy has no such model: python -m spacy download {model}, or --finder=builtin"
        ) from error
    if "parser" not in pipeline.pipe_names:
        raise InputError(f"--spacy_model={model}: has no parser, expected one such as en_core_web_sm")

    def find(texts: Iterable[str]) -> Iterator[list[str]]:
        for document in pipeline.pipe(texts, batch_size=1000):
            yield [chunk.text for chunk in document.noun_chunks]

    return find


def normalise(phrase: str, *, case: str, articles: str) -> str:
    """Return the phrase as it is counted, blanks made one; "" where nothing is left.

    It is in lower case unless `case` is keep, and without leading articles unless `articles` is keep.
    """
    words = phrase.split()
    if case == "lower":
        words = [word.lower() for word in words]
    if articles == "drop":
        while words and words[0].lower() in ARTICLES:
            words = words[1:]
    return " ".join(words)
