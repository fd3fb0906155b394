"""What LLaVA-1.5 asks besides a benchmark's question: the published sentences, on which its figures depend."""

from collections.abc import Sequence

SHORT_ANSWER = "Answer the question using a single word or phrase."
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
OPTION_LETTER_CN = "请直接回答选项字母。"
LETTERS = "ABCDE"


def with_options(question: str, options: Sequence[str], last_line: str) -> str:
    """Return a question with its options, a line each, and the line that asks for a letter."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options)), last_line])  # noqa: B905
