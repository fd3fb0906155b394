import pytest

from llava_jax.data.templates import SPECIAL_STRINGS, TEMPLATES, find_template, render
from llava_jax.types import InputError, Turn

POLITE_USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
POLITE_HUMAN = POLITE_USER.replace("user", "human")
TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural "
    "language.The visual content will be provided with the following format: <Image>visual content</Image>."
)
LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
Q1, A1, Q2, A2 = Turn("human", "<image>\nQ1"), Turn("gpt", "A1"), Turn("human", "Q2"), Turn("gpt", "A2")


def _text(spans):
    return "".join(span.text for span in spans)


def _targets(spans):
    return "".join(span.text for span in spans if span.is_target)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("v1", POLITE_USER + " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"),
        ("vicuna_v1", POLITE_USER + " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"),
        ("llava_v1", POLITE_HUMAN + " USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"),
        ("v0", POLITE_HUMAN + "\n\n### Human: <image>\nQ1\n### Assistant: A1\n### Human: Q2\n### Assistant:"),
        ("v1_mmtag", TAGGED + " USER: <Image><image></Image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"),
        (
            "v0_mmtag",
            TAGGED + "\n\n### Human: <Image><image></Image>\nQ1\n### Assistant: A1\n### Human: Q2\n### Assistant:",
        ),
        (
            "llava_llama_2",
            f"[INST] <<SYS>>\n{LANGUAGE_AND_VISION}\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
        ),
        ("mistral_instruct", "[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
            "<|im_start|>assistant\n"
            "A1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n",
        ),
    ],
)
def test_prompt_of_each_template(name, prompt):
    assert _text(render([Q1, A1, Q2], find_template(name), open_turn=True)) == prompt


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("v1", " A1</s> A2</s>"),
        ("v0", "###### Assistant: A1\n###### Assistant: A2\n### "),
        ("llava_llama_2", " A1 </s> A2 </s>"),
        ("mistral_instruct", " A1 </s> A2 </s>"),
        ("mpt", "A1<|im_end|>A2<|im_end|>"),
    ],
)
def test_what_is_trained(name, trained):
    assert _targets(render([Q1, A1, Q2, A2], find_template(name))) == trained


def test_training_text_continues_the_prompt():
    for name, template in TEMPLATES.items():
        turns = [Q1, A1] if template.caption_only else [Q1, A1, Q2, A2]
        prompt = _text(render(turns[:-1], template, open_turn=True))
        assert _text(render(turns, template)).startswith(prompt + template.before_answer + turns[-1].text), name
        assert all(stop in _text(render(turns, template)) for stop in template.stop), name


def test_plain_keeps_the_image_and_the_caption():
    spans = render([Turn("human", "Describe <image> briefly."), A1], find_template("plain"))
    assert (_text(spans), _targets(spans)) == ("<image>A1\n", "A1\n")


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([Q1, A1, Q2, A2], "one image and its caption, found 4 turns"),
        ([A1, Q1], "no answer|last turn shows an image"),
        ([Turn("human", "Q"), A1], "needs <image> in the first turn"),
    ],
)
def test_plain_refuses_conversations(turns, reason):
    with pytest.raises(InputError, match=reason):
        render(turns, find_template("plain"))


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("What is <image> this? ", "front", "<image>\nWhat is  this?"),
        ("What is <image> this? ", "keep", "What is <image> this? "),
        ("Q\n<image>", "front", "<image>\nQ"),
        ("<image>", "front", "<image>"),
        (" <image> \n", "front", "<image>"),
        ("First <image>, then <image>. ", "front", "First <image>, then <image>. "),
        ("No image ", "front", "No image "),
    ],
)
def test_image_position(text, position, expected):
    spans = render([Turn("human", text), A1], find_template("mistral_instruct"), image_position=position)
    assert _text(spans) == f"[INST] {expected} [/INST] A1 </s>"
    assert [span.text for span in spans if span.special] == ["<image>"] * text.count("<image>") + ["</s>"]


def test_unanswered_and_leading_turns():
    v1, v0 = find_template("v1"), find_template("v0")
    greeting = Turn("gpt", "Hello there.")
    assert render([greeting, Q1, A1], v1) == render([Q1, A1], v1)
    assert "### Assistant: Hello there.\n### Human: <image>" in _text(render([greeting, Q1, A1], v0))
    assert render([Q1, A1, Q2], v1) == render([Q1, A1], v1)


@pytest.mark.parametrize(
    ("turns", "open_turn", "reason"),
    [
        ([Q1, Q2, A1], False, "two human turns in a row"),
        ([Q1, A1, A2], False, "two gpt turns in a row"),
        ([Q2], False, "no answer to train on"),
        ([A1], False, "no answer to train on"),
        ([Turn("human", "Hi"), A1, Q1], False, "the last turn shows an image but has no answer"),
        ([Q1, A1], True, "no question to answer"),
        ([], True, "no question to answer"),
    ],
)
def test_conversations_no_template_can_hold(turns, open_turn, reason):
    for name in ("v1", "llava_llama_2", "mpt"):
        with pytest.raises(InputError, match=reason):
            render(turns, find_template(name), open_turn=open_turn)


def test_text_of_a_conversation_is_never_special():
    hostile = " ".join((*SPECIAL_STRINGS, "ASSISTANT:", "###", "[/INST]"))
    for name, template in TEMPLATES.items():
        for span in render([Turn("human", "<image>\n" + hostile), Turn("gpt", hostile)], template):
            assert not (span.special and hostile in span.text), name
            assert span.special == (span.text in (*SPECIAL_STRINGS, "<image>")), name


def test_unknown_names_are_listed():
    with pytest.raises(InputError, match="unknown template 'v9'; expected one of .*plain.*v1"):
        find_template("v9")
