"""Ask the demo's questions in free words: ten wordings a kind for training, four others for the held-out scenes."""

import collections
import re

import numpy as np

from llava_jax.demo import world

# How llava_jax/demo/world.py asks; the group is what the question is about.
PLAIN = {
    "presence": re.compile(r"Is there a (.+)\?"),
    "colour": re.compile(r"What colour is the (.+)\?"),
    "shape": re.compile(r"What shape is the (.+) object\?"),
    "count": re.compile(r"How many (.+) are there\?"),
    "position": re.compile(r"Where is the (.+)\?"),
}
TRAINED = {
    "presence": (
        "Is there a {}?",
        "Can you see a {}?",
        "Does the picture have a {} in it?",
        "Is a {} visible here?",
        "Do you spot a {} anywhere?",
        "Tell me whether a {} is shown.",
        "Would you say that there is a {} in this image?",
        "I am looking for a {}. Is it here?",
        "Does this image contain a {}?",
        "Has the picture got a {}?",
    ),
    "colour": (
        "What colour is the {}?",
        "Which colour does the {} have?",
        "Tell me the colour of the {}.",
        "The {} is painted in what colour?",
        "Name the {}'s colour.",
        "In which colour is the {} drawn?",
        "What is the colour of the {} you see?",
        "How is the {} coloured?",
        "Please say what colour the {} has.",
        "Of what colour is the {}?",
    ),
    "shape": (
        "What shape is the {} object?",
        "Which shape does the {} object have?",
        "Tell me the shape of the {} one.",
        "The {} thing is what shape?",
        "What is the {} object?",
        "Name the shape that is {}.",
        "What kind of figure is the {} object?",
        "Which figure is drawn in {}?",
        "Please say what shape the {} object has.",
        "What do you see in {}?",
    ),
    "count": (
        "How many {} are there?",
        "How many {} can you see?",
        "Count the {}.",
        "What is the number of {}?",
        "How many {} does the picture show?",
        "Tell me how many {} are in the image.",
        "Give me the number of {} here.",
        "How many {} do you find?",
        "What number of {} is drawn?",
        "Please count the {} in this picture.",
    ),
    "position": (
        "Where is the {}?",
        "Where do you see the {}?",
        "In which place is the {}?",
        "Tell me where the {} is.",
        "What is the position of the {}?",
        "Which part of the picture holds the {}?",
        "Where in the image is the {} located?",
        "Please say where the {} sits.",
        "At what place is the {} drawn?",
        "Where can I find the {}?",
    ),
}
# How late a kind comes in a conversation, and how often at most. Where a thing is tells what it is, so places are late.
LATER = {"colour": 0.0, "shape": 0.0, "count": 0.1, "position": 0.5}
MOST = {"colour": 2, "shape": 2, "count": 1, "position": 1}
PRESENCE = 0.6  # of the conversations begin with such a question
DESCRIBE = (
    "Describe the picture.",
    "What does this image show?",
    "Say what you see, and where.",
    "List everything in the picture with its place.",
)
HELD_OUT = {
    "presence": (
        "Is a {} part of this picture?",
        "Do you see any {}?",
        "Does a {} appear in the image?",
        "Look closely: can a {} be found?",
    ),
    "colour": (
        "Can you tell me which colour the {} is?",
        "What colour has been used for the {}?",
        "I would like to know the colour of the {}.",
        "The {} has which colour?",
    ),
    "shape": (
        "Can you tell me which shape the {} object is?",
        "What form does the {} thing have?",
        "I would like to know the shape of the {} object.",
        "Which shape is the {} one?",
    ),
    "count": (
        "Can you give me a count of the {}?",
        "How many {} are visible?",
        "I would like to know how many {} there are.",
        "What is the count of {} in the image?",
    ),
    "position": (
        "Where has the {} been drawn?",
        "Whereabouts is the {}?",
        "I would like to know the place of the {}.",
        "In what part of the image do you see the {}?",
    ),
}


def reworded(question: world.Question, wordings: dict[str, tuple[str, ...]], rng: np.random.Generator) -> str:
    """Return the question in one of the wordings of its kind. Raises ValueError when the demo asks otherwise."""
    return str(rng.choice(wordings[question.kind])).format(asked_for(question))


def untold_questions(scene: world.Scene, rng: np.random.Generator) -> list[world.Question]:
    """Draw questions about a scene in an order in which no answer is told by an earlier question and its answer.

    "Where is the red circle?" tells that there is a red circle; "What colour is the circle?" and its answer tell that
    there is a red one and no other circle. Nothing that is told needs the image, so nothing is learned from it.
    """
    questions = world.questions(scene, rng)
    # First or not at all: later on, what is left to ask would tell whether the answer is yes or no.
    answer = rng.choice(["yes", "no"])
    presence = [each for each in questions if each.kind == "presence" and each.answer == answer]
    chosen = [presence[rng.integers(len(presence))]] if rng.random() < PRESENCE else []
    things = {about(each) for each in chosen if each.answer == "yes"}
    denied = len(chosen) - len(things)
    unique, asked = set(), collections.Counter()
    others = [each for each in questions if each.kind != "presence"]
    late = rng.random() * np.array([LATER[each.kind] for each in others])
    for i in np.argsort(rng.random(len(others)) + late):
        kind, thing = others[i].kind, about(others[i])
        if kind == "count":
            plurals = {f"{word}{ending}" for word in unique for ending in ("s", "es")}
            told = denied or len(things) >= (3 if thing == "objects" else 2) or thing in plurals
        elif kind == "shape":
            told = thing in things or asked["count"] or (denied and asked["colour"] == 2)
        else:
            told = kind == "colour" and thing in things
        if told or asked[kind] == MOST[kind]:
            continue
        chosen.append(others[i])
        asked[kind] += 1
        if kind != "count":
            things.add(thing)
        if kind in ("colour", "shape"):
            unique.add(asked_for(others[i]))
    return chosen


def about(question: world.Question) -> str:
    """Return the thing that question and answer name together ("red circle"), or what is counted. Raises ValueError."""
    asked = asked_for(question)
    if question.kind == "colour":
        return f"{question.answer} {asked}"
    return f"{asked} {question.answer}" if question.kind == "shape" else asked


def asked_for(question: world.Question) -> str:
    """Return what the question names: "red circle", "circle", "red" or "circles"."""
    asked = PLAIN[question.kind].fullmatch(question.text)
    if asked is None:
        raise ValueError(f"{question.text!r}: expected {PLAIN[question.kind].pattern}")
    return asked[1]
