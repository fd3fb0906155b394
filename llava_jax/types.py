"""Dataclasses that cross folders, and the axis letters used in array names.

B batch rows · T text+image tokens · S cache length · N images per row (in pixels) or query heads (in attention)
K kv heads · H head dim · D decoder width · E vision width · F mlp width · P patches per image · V vocabulary
L layers · X image height · Y image width · C channels

`tokens_BT` is an array of shape [B, T]; a parameter stacked over layers gains a leading L.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

IMAGE_PLACEHOLDER = "<image>"
# What the backward pass may keep of a decoder block, so as not to compute it again: `train.remat`.
REMAT_NAMES = ("attention", "q", "k", "v", "residual", "gate", "up")
# The linear layers of a decoder block: what an adapter can be added to, and what is stored in four bits.
DECODER_LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
# The linear layers of a block of the vision tower.
TOWER_LINEARS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")
# As REMAT_NAMES, of the decoder's kernels, which are gathered from all devices, so as not to gather them again.
WEIGHT_NAMES = tuple(f"{linear.split('/')[1]}_weight" for linear in DECODER_LINEARS)
# One image in a tokenised conversation, before it is expanded to its P image tokens (LLaVA's IMAGE_TOKEN_INDEX).
IMAGE_MARK = -200

# How a process ends that the same command may continue: the scripts in launch/ start it again on these, and on signals.
STOPPED_EXIT_CODE = 42  # SIGTERM, and the state is saved, or there was none to save
HUNG_EXIT_CODE = 43  # train.watchdog
LOST_EXIT_CODE = 44  # another process is gone


class InputError(Exception):
    """Something the user gave cannot be used: one line that says what, where, what was expected and what to do.

    The CLI prints it after `error: ` and exits with code 2. Nothing else catches it but what names more than one
    (`prepare verify`, the check before training), adds the line of a file (answers) or continues (chat).
    """


# ---- one training row -------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """One message: `speaker` is human, gpt, or (first only) system; an answer that is no `target` is not trained."""

    speaker: str
    text: str
    target: bool = True


class ImageBytes(bytes):
    """The content of an image file that came with its row; `name` is the file's, for messages."""

    name: str

    def __new__(cls, content: bytes, name: str = "") -> "ImageBytes":
        image = super().__new__(cls, content)
        image.name = name
        return image


@dataclasses.dataclass(frozen=True)
class Record:
    """One row of LLaVA's annotations; `images` are paths relative to `data.images`, or images as the bytes of a file,
    in placeholder order. `unread` are keys of the row that mean nothing to us.
    """

    id: str
    images: tuple[str | bytes, ...]
    turns: tuple[Turn, ...]
    unread: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenised conversation: `tokens` int32[t] with each image once as IMAGE_MARK, `targets` bool[t]."""

    tokens: np.ndarray
    targets: np.ndarray

    @functools.cached_property
    def images(self) -> int:
        """Image marks among the tokens."""
        return int(np.count_nonzero(self.tokens == IMAGE_MARK))


class Batch(NamedTuple):
    """One global batch of fixed shape, as the pipeline yields it (numpy) and the step takes it (jax).

    tokens_BT       int32; image slots hold the model's image token id, right padding holds the pad id
    targets_BT      bool; True where tokens_BT[b, t] is to be predicted (from position t-1)
    segment_ids_BT  int32; 1.. for the conversations of a row, 0 for padding; none sees another
    positions_BT    int32; rotary positions, 0.. within each segment
    pixels_BNXYC    uint8, the RGB squares that the tower sees, before they are normalised (the step does it, so that a
                    quarter of the bytes travels); zeros in image slots a row does not use
    image_mask_BN   bool, image slots that hold an image
    rows_BM         int64, which rows of the annotations stand in each row, in order; -1 where there are fewer than M,
                    -2 - row for one that could not be read (host only: None on the device)
    feature_index_BT  int32, with anyres only: which feature of the row's tiles (n * P + p) an image token takes, -1
                    for image_newline; pixels_BNXYC then holds tiles, and N counts them
    """

    tokens_BT: Any
    targets_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    pixels_BNXYC: Any
    image_mask_BN: Any
    rows_BM: Any = None
    feature_index_BT: Any = None


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A parameter in our layout that is still in its file; stands in for its numpy array.

    Attributes:
      shape, dtype: of the array.
      stacked: whether the first axis counts layers.
      one: layer -> that layer's values in our layout, as the file has them (layer 0 where nothing is stacked).

    Indexing gives one layer in `dtype`, `np.asarray` the whole array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    one: Callable[[int], np.ndarray]

    def __getitem__(self, layer: int) -> np.ndarray:
        return np.asarray(self.one(layer), self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = np.empty(self.shape, self.dtype if dtype is None else dtype)
        if self.stacked:
            for layer in range(self.shape[0]):
                array[layer] = self.one(layer)
        else:
            array[...] = self.one(0)
        return array

    def layer(self, layer: int) -> "LazyTensor":
        """Return one layer of a stack, still in its file."""
        return LazyTensor(self.shape[1:], self.dtype, False, lambda _: self.one(layer))

    def reshape(self, *shape: int) -> "LazyTensor":
        """Return the parameter in another shape, of as many layers where it is stacked, still in its file."""
        return dataclasses.replace(self, shape=shape, one=lambda layer: self.one(layer).reshape(shape[self.stacked :]))

    def swapaxes(self, first: int, second: int) -> "LazyTensor":
        """Return the parameter with two axes in each other's place, neither the one of layers, still in its file."""
        shape = list(self.shape)
        shape[first], shape[second] = shape[second], shape[first]
        axes = first - self.stacked, second - self.stacked
        return dataclasses.replace(self, shape=tuple(shape), one=lambda layer: self.one(layer).swapaxes(*axes))


# ---- models -----------------------------------------------------------------------------------------------------


class Pixels(NamedTuple):
    """How a tower wants its images: resized by `resample` (bicubic, bilinear), then normalised; CLIP's by default."""

    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: str = "bicubic"


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Vision transformer, as far as `feature_layer` needs it (`layers` is the full depth of the checkpoint).

    `family` is clip, or siglip: patches have a bias, there is neither a class token nor a norm before the blocks.
    `pooling_head`: the checkpoint has SigLIP's, which LLaVA never runs and an export copies.
    """

    width: int
    mlp_width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    family: str = "clip"
    pooling_head: bool = False
    pixels: Pixels = Pixels()

    @property
    def class_tokens(self) -> int:
        """Tokens before the patches, which LLaVA drops."""
        return 1 if self.family == "clip" else 0

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; `kind` is default, linear or llama3 (the latter three fields are llama3's)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """LLaMA decoder, driven by its Hugging Face config.

    `family` is Hugging Face's model_type: llama, mistral, qwen2 or qwen3. With a `window` above 0 a token sees itself
    and the `window` - 1 tokens before it.
    """

    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int = 2048
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    family: str = "llama"
    window: int = 0

    @property
    def output_bias(self) -> bool:
        """Whether the bias of attention goes beyond q, k and v: Qwen2's does not."""
        return self.attention_bias and self.family != "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Whether each head of q and k is normalised before it is rotated."""
        return self.family == "qwen3"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters that a model learns through: on the `targets` (of DECODER_LINEARS) of every block of the decoder.

    `split_rank`: matrices that have no width of the decoder are stored split along their rank. `vision_targets` (of
    TOWER_LINEARS) are those of every block of the tower that may learn.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    split_rank: bool = False
    vision_targets: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole LLaVA. `feature_layer` indexes hidden states as in the original: -2 leaves the last block out.

    `image_token_id` may lie outside the vocabulary (the row is never looked up), `remat` is
    models.layers.remat_policy's; `attention` (of the decoder) names an implementation of models.attention, with tiles
    of `attention_block` for splash. `lora`, `nf4` (kernels of the decoder's blocks in four bits) and `learning_blocks`
    (the tower's last blocks, a stack of their own where only they learn; 0: one stack) are a training step's.
    `pinpoints`, (height, width) each, make it a LLaVA-NeXT (data.tiles). `int8` (those kernels in eight bits) is for
    inference.
    """

    vision: ClipConfig
    llm: LlamaConfig
    projector: str = "mlp2x_gelu"
    feature_layer: int = -2
    image_token_id: int = 32000
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    attention_block: int = 512
    lora: LoraConfig | None = None
    nf4: bool = False
    int8: bool = False
    learning_blocks: int = 0
    pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether no layer has an adapter or four bits."""
        return self.lora is None and not self.nf4

    @property
    def tiles(self) -> int:
        """The most tiles that an image is cut into, the whole one included; 1 where it is not cut."""
        area = max((height * width for height, width in self.pinpoints), default=0)
        return 1 + area // self.vision.image_size**2

    @property
    def vision_layers(self) -> int:
        """Blocks that run: hidden_states has layers+1 entries, the first one before any block."""
        layer = self.feature_layer
        return layer + self.vision.layers + 1 if layer < 0 else layer


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn: greedy when temperature is 0; `beams` > 1 is beam search (greedy scoring)."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    beams: int = 1
    seed: int = 0


# ---- the run's settings: the contract's config keys, once ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """The backbones and the projector; not read where `init.model` names a whole model."""

    vision: str
    """CLIP or SigLIP folder of Hugging Face, also at `gs://`, or `owner/name[@REVISION]` on its Hub; `random:NAME`
    (`tiny`, `clip-l-14`, `clip-l-14-336`) or `random:FILE.json` (a Hugging Face config) for random weights.
    """
    llm: str
    """Decoder folder of Hugging Face with its tokenizer, also at `gs://`, or `owner/name[@REVISION]` on its Hub;
    `random:NAME` (`tiny`, `vicuna-7b`, `vicuna-13b`) or `random:FILE.json` for random weights, with the demo's
    tokenizer or the one next to the file.
    """
    projector: str
    """What maps image features to the decoder's width."""
    feature_layer: int
    """Hidden state of the vision tower that is used; -2 is the one before the last block."""


@dataclasses.dataclass(frozen=True)
class InitSettings:
    """Where the weights at the start come from."""

    model: str
    """A whole model to start from: `hf:DIR`, `llava:DIR`, `orbax:DIR` or DIR, which may be `owner/name[@REVISION]` on
    the Hub, or `gs://BUCKET/DIR`. It replaces every `model.` key.
    """
    projector: str
    """A projector to start from, also in place of the one in `init.model`: the workdir of a pretrain run, a
    `.safetensors` or `.bin` file, both also at `gs://`, or `owner/name[@REVISION]` on the Hub. Empty: that of
    `init.model`, or random values without one.
    """


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """What is trained on, and how rows become batches."""

    annotations: str
    """Rows: a JSON, JSONL or Parquet file; a folder of Parquet files, of `save_to_disk` or of `prepare arrayrecord`;
    `hf:USER/NAME[@REVISION][/PATH]` on the Hugging Face Hub; or `tfds:NAME`. Several one after another as
    `a.json,b.json`, mixed by weight as `a.json:0.7,b.json:0.3`.
    """
    images: str
    """Folder that the image paths of the rows are relative to, also at `gs://`; not needed where images come with their
    rows.
    """
    template: str
    """How a conversation becomes text, and which part of it is supervised: `plain` (captions), `v1`, `v0`,
    `llava_llama_2`, `mistral_instruct`, `chatml_direct`, `llama_3`, `qwen`, …, or `tokenizer`: the tokenizer's own chat
    template. Empty: that of `init.model`, else the tokenizer's own if it has one that is not Vicuna's, else `v1`.
    """
    image_position: str
    """`front` moves the placeholder of a turn with one image to its front, as LLaVA's code does; `keep` does not."""
    aspect: str
    """How an image becomes the tower's square: `pad` (to the longer side, with the mean colour), `crop` (the centre),
    `squash` (the whole image, as SigLIP's processor), or `anyres` (LLaVA-NeXT's tiles).
    """
    max_length: int
    """Longest row in tokens, image tokens included; a longer one is truncated."""
    shuffle: bool
    """A new order each epoch, the same for the same seed."""
    group_by: str
    """`modality_length` forms each update of rows of similar length, all with images or all without, as LLaVA does."""
    pack: bool
    """Several conversations in one row, each with its own attention and positions; `train.batch_size` counts them."""
    pack_length: int
    """Tokens in a packed row; 0 takes the length with the least padding."""
    pack_images: int
    """Images (with `data.aspect=anyres`: tiles) in a packed row; 0 takes what is needed."""
    workers: int
    """Threads that read rows, decode images and make batches; 0 and 1 both mean one."""
    exif: str
    """`apply` turns an image as its EXIF orientation says; `ignore` takes the pixels as stored, as the original."""
    eval: str = ""
    """Rows held out from training, in any form of `data.annotations`, each of which counts once; empty: none."""
    eval_images: str = ""
    """Folder that their image paths are relative to; empty: `data.images`."""
    max_rejects: float = 0.001
    """Rows that may turn out unreadable while the run trains (an image that is damaged, or missing but with
    anyres): a share of all rows below 1, a number from there on. Each is padding in its batch, and named in
    `rejects.jsonl`; one more stops the run.
    """
    exclude: str = ""
    """A file of ids, or of #N for row N, one a line: such rows are padding in their batches; empty: none."""


# A conversation a row, read by one thread: the rest of DataSettings where there is no config.
UNPACKED: dict[str, Any] = dict(group_by="none", pack=False, pack_length=0, pack_images=0, workers=0, exif="apply")


@dataclasses.dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule."""

    lr: float
    """Peak learning rate."""
    groups: str
    """Other peak rates by parameter path, as `REGEX=LR,REGEX=LR`: the first pattern found in the path wins, all other
    parameters take `optim.lr`. Paths begin with `projector/`, `llm/`, `vision/`, `lora/` or `vision_lora/` and
    carry no layer number: `^projector/=2e-5,^vision/=2e-6`. A pattern holds no comma; one that decides no parameter
    that learns is an error.
    """
    schedule: str
    """Shape of the rate after the warmup."""
    warmup_ratio: float
    """Share of the steps in which the rate rises from 0."""
    weight_decay: float
    """Of AdamW."""
    clip_norm: float
    """Largest norm of the gradient; 0 is off."""
    b1: float
    """Decay of AdamW's first moment."""
    b2: float
    """Decay of AdamW's second moment."""
    eps: float
    """Of AdamW."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """Adapters of `stage=lora`: W x + `alpha` / `rank` * B A x on linear layers of the decoder, and of the tower."""

    rank: int
    """Rank of A and B."""
    alpha: float
    """The adapter's output is multiplied by `lora.alpha` / `lora.rank`."""
    dropout: float
    """Share of an adapter's inputs that is dropped in training."""
    targets: str
    """Regular expression on the whole path of a decoder's linear layer, `llm/layers/attn/q` (`k`, `v`, `o`) or
    `llm/layers/mlp/gate` (`up`, `down`). A pattern that matches none is an error.
    """
    vision_targets: str = ""
    """The same for the vision tower, `vision/layers/attn/q` (`k`, `v`, `o`) or `vision/layers/mlp/up` (`down`); empty:
    no adapters there.
    """


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Batches, precision, memory, and what a run writes."""

    batch_size: int
    """Conversations in one update, over all devices."""
    steps: int
    """Updates; 0 lets `train.epochs` decide."""
    epochs: float
    """Passes over the data."""
    accumulate: int
    """Microbatches that an update is computed in, one after another, to save memory."""
    dtype: str
    """Dtype of the computation."""
    param_dtype: str
    """Dtype of the weights that learn; `bfloat16` rounds each update stochastically: small ones are not lost."""
    moment_dtype: str
    """Dtype of Adam's two moments; `bfloat16` is rounded stochastically."""
    frozen_dtype: str
    """Dtype of the weights that do not learn. `nf4` (with `stage=lora`) keeps the kernels of the decoder's blocks in
    four bits and the rest in bfloat16: QLoRA.
    """
    remat: str
    """What a block of the decoder, and of a tower that learns, keeps for the backward pass; the rest is computed again.
    `full` keeps nothing, `none` everything, `dots` every matrix product; else names joined by `+`, or `minimal` for all
    activations among them (the tower has `attention` alone). A `_weight` is the decoder's weight as it was gathered
    from the other devices (`mesh.fsdp` above 1).
    """
    attention: str
    """The decoder's attention: `splash` (TPU), `cudnn` (GPU) or `xla`; `auto` takes the first that runs."""
    compiler_options: str
    """`none`, `tuned` (the chip's options of `parallel/chips.py`), or `option=value,option=value` for the compiler."""
    profile: int
    """Updates to trace for the profiler; 0 is off."""
    log_every: int
    """Steps between lines of `metrics.jsonl`."""
    checkpoint_every: int
    """Steps between checkpoints; 0 saves the last step only."""
    keep: int
    """Checkpoints kept."""
    loss_norm: str
    """`global_token`: mean over all supervised tokens of the batch; `rank_mean`: mean of the devices' means."""
    trainable: str = ""
    """Which parameters learn, as a regular expression found in their paths: `projector|llm|vision/layers`. Empty: what
    the stage says. An alternative that finds no parameter is an error.
    """
    eval_every: int = 0
    """Updates between passes over the rows of `data.eval`; 0: one, after the last update."""
    eval_generate: int = 0
    """How many rows of `data.eval`, the first ones, are also asked their first question at each pass: exact match of
    the greedy answers, or ROUGE-L where a reference has more than five words; 0: none.
    """
    keep_best: bool = False
    """Also save after a pass over the rows of `data.eval` that found a smaller loss than any before, and keep that
    checkpoint whatever `train.keep` says.
    """
    wandb: str = ""
    """Project of Weights & Biases that the metrics are also written to; a resumed run continues its run there.
    """
    vision_blocks: int = 0
    """Of the tower only its last so many blocks that run may learn (`model.feature_layer` -2 leaves the very last one
    out); 0: every block and the embeddings, as far as `train.trainable` says.
    """
    max_nonfinite: int = 10
    """Updates in a row whose loss or gradient is not finite, after which the run stops; such an update is skipped.
    """
    watchdog: int = 3600
    """Seconds that the start, the compiler, a restore or a save may take; a step may take 20 times as long as usual, or
    600 s if that is more. Then the process says where it is stuck and ends with exit code 43. 0 is off.
    """


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """Devices along each mesh axis; -1 (at most once) takes what is left."""

    data: int
    """Copies of the model."""
    fsdp: int
    """Shards of the weights and the optimizer's state."""
    tensor: int
    """Devices that share a row: heads, MLP columns and images are split over them."""
    fsdp_inner: int = 1
    """How many of the `mesh.fsdp` devices lie along a second axis of the chips' network (8 on v5e 8x8); gradients are
    then reduce-scattered along one axis after the other. 1: at once.
    """


@dataclasses.dataclass(frozen=True)
class Settings:
    """One training stage, complete: what `--config` and its overrides become, and what config.json holds."""

    stage: str
    """What learns besides the projector, unless `train.trainable` says otherwise: `pretrain` nothing, `mid` (stage 1.5)
    decoder and vision tower, `finetune` the decoder, `lora` adapters of it.
    """
    seed: int
    """Of the initial projector, of random weights, of the row order and of the adapters' dropout."""
    model: ModelSettings
    init: InitSettings
    data: DataSettings
    optim: OptimSettings
    lora: LoraSettings
    train: TrainSettings
    mesh: MeshSettings
