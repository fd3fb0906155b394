"""What VQAv2, VizWiz and TextVQA share: EvalAI's normaliser, and the share of ten people who gave an answer.

What looks odd is the published scorer's, and published figures depend on it.
"""

import re
from collections.abc import Sequence
from typing import Any

from llava_jax.evaluate.answers import field
from llava_jax.types import InputError

PEOPLE = 10
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_IN_NUMBER = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # the scorer passes re.UNICODE where `sub` takes how many to replace
NUMBERS = {
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
CONTRACTED = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
# Each contraction by its spellings that lack one apostrophe; of "somebody'd" the scorer makes one that does.
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalise(text: str) -> str:
    """Return an answer as EvalAI compares it, and as it is submitted: case, articles, punctuation, numbers in words."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return plain_words(without_punctuation(text.strip().replace("\n", " ").replace("\t", " ").strip()))


def without_punctuation(text: str) -> str:
    """Return the text without punctuation, in whose place a space stands where it joined two words."""
    out = text
    for mark in PUNCTUATION:
        apart = f"{mark} " in text or f" {mark}" in text or COMMA_IN_NUMBER.search(text)
        out = out.replace(mark, "" if apart else " ")
    return PERIOD.sub("", out, count=PERIODS)


def plain_words(text: str) -> str:
    """Return the text in small letters with numbers as digits, contractions spelled out and no articles."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over the people of min(1, others who gave the prediction / 3), each of them left out once."""
    same = sum(answer == prediction for answer in answers)
    rest = len(answers) - same
    return (same * min(1.0, (same - 1) / 3) + rest * min(1.0, same / 3)) / len(answers)


def official(prediction: str, answers: Sequence[str]) -> float:
    """Return the accuracy of VQA's own evaluation, which compares as written where all people gave one answer."""
    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = (plain_words(without_punctuation(text)) for text in (prediction, *answers))
    return agreement(prediction, answers)


def people_of(entry: Any, where: str) -> list[str]:
    """Return the answers of the ten people, which some files give as objects. Raises InputError where it is not ten."""
    given = field(entry, "answers", list, where)
    answers = [one.get("answer") if isinstance(one, dict) else one for one in given]
    if len(answers) != PEOPLE or not all(isinstance(one, str) for one in answers):
        raise InputError(f"{where}: {len(answers)} answers, expected the texts of {PEOPLE} people")
    return answers
