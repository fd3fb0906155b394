"""Parse a teacher's reply into turns, or into the reason why it cannot be used."""

import re

from llava_jax.types import IMAGE_PLACEHOLDER, Turn

SEPARATOR = re.compile(r"^[ \t]*===[ \t\r]*$", re.MULTILINE)
BLOCK = re.compile(r"\s*(Question|Answer):[ \t]*(.*)", re.DOTALL)

# A share of the width or the height, as boxes are given: 0.318, .5, 1.0, 0, 1.
_SHARE = r"(?:0?\.\d+|1\.0+|[01])"
# Two to four of them in brackets, at least one with a decimal point; or four in a row without brackets.
COORDINATES = re.compile(
    rf"[\[(](?=[^\])]*\.)\s*{_SHARE}(?:\s*,\s*{_SHARE}){{1,3}}\s*[\])]|(?<![\d.])0?\.\d+(?:\s*,\s*{_SHARE}){{3}}(?![\d.])"
)
# Words of somebody who reads captions instead of seeing an image: "the caption says", "according to the second
# sentence", "the provided information". A caption that is part of the image may be mentioned.
LEAKS = re.compile(
    r"""
    \b bounding [ ] box (?:es)? \b
    | \b (?: the | these | their | its | given | provided ) [ ] coordinates \b
    | \b (?: captions? | sentences? | descriptions? ) [ ] (?: (?: also | all ) [ ] )?
      (?: says? | said | states? | mentions? | mentioned | describes? | indicates? | suggests? | tells? | provided
        | impl(?: y | ies | ied ) | notes? | agree | do(?: es )? [ ] not )
      (?! [ ] (?: by | on | in ) ) \b
    | \b (?: in | of ) (?: [ ] (?: the | these | all | five | given | provided | image | picture ) )+
      [ ] (?: captions | sentences | descriptions ) \b
      (?! [ ] (?: at | above | below | beside | in | on | under | printed | written ) \b )
    | \b (?: according [ ] to | based [ ] on | from | (?: mentioned | described | stated | listed ) [ ] in )
      (?: [ ] (?: the | these | this | all | five | given | provided | image | picture | first | second | third ) )+
      [ ] (?: captions? | sentences? | descriptions? | annotations? | boxes ) \b
    | \b (?: provided | given ) [ ]
      (?: captions? | descriptions? | sentences? | information | context | annotations? ) \b
    | \b information [ ] (?: provided | given ) \b
    """,
    re.IGNORECASE | re.VERBOSE,
)
COORDINATES_LEAK = "box coordinates in the text"
WORDS_LEAK = "speaks of captions or boxes"
LEAK_REASONS = (COORDINATES_LEAK, WORDS_LEAK)


class RejectedReply(Exception):
    """A reply that is not in the layout asked for; its text is the reason, in words fit for counting."""


def parse_dialogue(reply: str) -> tuple[Turn, ...]:
    """Return the turns of `Question:` and `Answer:` blocks with a line `===` between them. Raises RejectedReply."""
    _check_content(reply)
    turns = []
    for block in SEPARATOR.split(reply):
        match = BLOCK.fullmatch(block)
        if match is None:
            raise RejectedReply("text outside a Question or Answer block" if block.strip() else "empty block")
        speaker = "human" if match[1] == "Question" else "gpt"
        if not match[2].strip():
            raise RejectedReply(f"empty {match[1].lower()}")
        if re.search(r"^(Question|Answer):", match[2], re.MULTILINE):
            raise RejectedReply("no === between two blocks")
        if speaker == ("gpt" if len(turns) % 2 == 0 else "human"):
            raise RejectedReply("answer without a question" if speaker == "gpt" else "question without an answer")
        turns.append(Turn(speaker, match[2].strip()))
    if len(turns) % 2:
        raise RejectedReply("question without an answer")
    return tuple(turns)


def parse_exchange(reply: str) -> tuple[Turn, ...]:
    """Return the two turns of a reply that holds one question and its answer. Raises RejectedReply."""
    turns = parse_dialogue(reply)
    if len(turns) != 2:
        raise RejectedReply("more than one question")
    return turns


def parse_description(reply: str) -> str:
    """Return the reply itself. Raises RejectedReply for one that is empty or holds blocks."""
    _check_content(reply)
    if SEPARATOR.search(reply) or re.search(r"^(Question|Answer):", reply, re.MULTILINE):
        raise RejectedReply("blocks where a description was asked for")
    return reply.strip()


def _check_content(reply: str) -> None:
    if not reply.strip():
        raise RejectedReply("empty reply")
    if any("\ud800" <= letter <= "\udfff" for letter in reply):
        raise RejectedReply("half a character in the text")
    if "<think>" in reply:
        raise RejectedReply("thoughts without an end")
    if IMAGE_PLACEHOLDER in reply:
        raise RejectedReply(f"the placeholder {IMAGE_PLACEHOLDER} in the text")
    if COORDINATES.search(reply):
        raise RejectedReply(COORDINATES_LEAK)
    if LEAKS.search(reply):
        raise RejectedReply(WORDS_LEAK)
