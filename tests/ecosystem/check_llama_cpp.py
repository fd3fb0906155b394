"""Runs where llama.cpp is: `python check_llama_cpp.py DIR SOURCE` converts and asks what make_export wrote there.

SOURCE is the unpacked llama-cpp-python, whose vendor/llama.cpp holds the converters. The export in the original's
layout becomes a text model and an mmproj as llama.cpp's guide for LLaVA says. The ids of the prompts are those trained
here; the answers are those of the same weights in PyTorch with what llama.cpp computes otherwise.
"""

import base64
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import llama_cpp
import numpy as np
import torch
import transformers
from llama_cpp.llama_chat_format import MTMDChatHandler
from PIL import Image
from sentencepiece import sentencepiece_model_pb2 as sentencepiece


def write_sentencepiece(folder: pathlib.Path) -> None:
    """Write tokenizer.model, which Vicuna and Mistral come with and the demo's tokenizer lacks.

    Without it the converter gives all pieces one score, and llama.cpp merges them from left to right.
    """
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ranks = {}
    for rank, (left, right) in enumerate(content["model"]["merges"]):
        ranks.setdefault(left + right, rank)
    special = {token["content"] for token in content["added_tokens"]}
    model = sentencepiece.ModelProto()
    kinds = model.SentencePiece
    for text in sorted(content["model"]["vocab"], key=content["model"]["vocab"].get):
        kind = kinds.BYTE if text.startswith("<0x") else kinds.CONTROL if text in special else kinds.NORMAL
        kind = kinds.UNKNOWN if text == "<unk>" else kind
        model.pieces.add(piece=text, type=kind, score=-ranks.get(text, len(ranks)))
    model.trainer_spec.model_type = sentencepiece.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def convert(folder: pathlib.Path, source: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Run llama.cpp's converters and return (text model, mmproj), both in float32 as far as they have it."""
    legacy, text, mmproj = source / "tools/mtmd/legacy-models", folder / "text.gguf", folder / "mmproj-model-f32.gguf"
    tower = ["-m", folder / "clip-vision-tower", "--clip-model-is-vision", "--llava-projector"]
    for command in (
        [legacy / "llava_surgery_v2.py", "-m", folder],
        [legacy / "convert_image_encoder_to_gguf.py", *tower, folder / "llava.projector", "-o", folder, "--use-f32"],
        [source / "examples/convert_legacy_llama.py", folder, "--skip-unknown", "--outtype=f32", "--outfile", text],
    ):
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return text, mmproj


def llama_answers(folder: pathlib.Path, text: pathlib.Path, mmproj: pathlib.Path, questions: list[dict]) -> list[str]:
    """Return llama.cpp's greedy answers, after a comparison of the prompts' ids."""
    handler = MTMDChatHandler(str(mmproj), verbose=False)
    model = llama_cpp.Llama(
        str(text), chat_handler=handler, n_ctx=512, type_k=0, type_v=0, logits_all=False, verbose=False
    )
    answers = []
    for asked in questions:
        url = "data:image/png;base64," + base64.b64encode((folder / asked["image"]).read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": asked["text"]}]
        given = model.create_chat_completion(
            [{"role": "user", "content": content}], temperature=0, max_tokens=16, repeat_penalty=1.0
        )
        ids = np.array(asked["ids"])
        read = model.input_ids[: len(ids)]
        assert ((read == ids) | (ids == ids.max())).all(), (asked["text"], read)
        answers.append(given["choices"][0]["message"]["content"].strip())
    return answers


class ClassTokenLast(torch.nn.Module):
    """The tower's first layer as llama.cpp has it: the class token comes last, while rows 1 to P are the features.

    So each patch gets its neighbour's position, and the decoder sees the class token in place of the first patch
    (https://github.com/ggml-org/llama.cpp/issues/25814).
    """

    def __init__(self, theirs: torch.nn.Module):
        super().__init__()
        self.theirs = theirs

    def forward(self, pixels: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        patches = self.theirs.patch_embedding(pixels).flatten(2).transpose(1, 2)
        class_token = self.theirs.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([patches, class_token], dim=1) + self.theirs.position_embedding.weight


def torch_answers(folder: pathlib.Path, questions: list[dict]) -> list[str]:
    """Return PyTorch's answers with what llama.cpp does: that order, GELU by tanh, patches and projector in float16."""
    processor = transformers.AutoProcessor.from_pretrained(folder / "hf")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "hf", dtype=torch.float32)
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower.vision_model
    projector.act = torch.nn.GELU(approximate="tanh")
    for layer in (projector.linear_1, projector.linear_2, tower.embeddings.patch_embedding):
        layer.weight.data = layer.weight.data.half().float()
    tower.embeddings = ClassTokenLast(tower.embeddings)
    answers = []
    for asked in questions:
        content = [{"type": "image"}, {"type": "text", "text": asked["text"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=Image.open(folder / asked["image"]), text=text, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=16)
        answers.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def main(folder: pathlib.Path, source: pathlib.Path) -> None:
    torch.set_num_threads(1)
    questions = json.loads((folder / "expected.json").read_text(encoding="utf-8"))["questions"]
    with tempfile.TemporaryDirectory() as made:
        copy = pathlib.Path(made, "llava")
        shutil.copytree(folder / "llava", copy)
        write_sentencepiece(copy)
        answers = llama_answers(folder, *convert(copy, source / "vendor/llama.cpp"), questions)
    explained = torch_answers(folder, questions)
    ours = sum(answer == asked["answer"] for answer, asked in zip(answers, questions, strict=True))
    alike = sum(answer == other for answer, other in zip(answers, explained, strict=True))
    right = sum(answer == asked["right"] for answer, asked in zip(answers, questions, strict=True))
    print(
        f"llama.cpp (llama-cpp-python {llama_cpp.__version__}): ids of {len(questions)} prompts are the same; {ours} "
        f"answers are the same, {alike} are PyTorch's with llama.cpp's order of the patches and its GELU; {right} of "
        f"its answers and {sum(asked['answer'] == asked['right'] for asked in questions)} of ours are right"
    )
    assert alike == len(questions), list(zip(answers, explained, strict=True))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
