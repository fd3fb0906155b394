"""Whether a model that is split over chips answers within their memory, compiled ahead of time: no TPU needed.

`python -m tests.show_answering_fits --topology=v5e:2x4 --llm=vicuna-13b --tensor=4` compiles what the engine runs with
weights in bfloat16, each copy of the model split over `--tensor` chips: the tower on a call's images, the prefill of a
call's prompts of `--tokens` tokens with an image each (alone, and from a prefix that a slot holds), and the decoding of
all `--slots`. Of each it prints the bytes a chip must hold at once, everything that stays on it included; exit code 1
where one does not fit. Minutes for a 13B.
"""

import argparse
import math
import os
import sys
import time

from llava_jax.cli.compile import ENVIRONMENT


def lowered(mesh, llm, slots, tokens, answer):
    """Return name -> (the engine's program before it is compiled, what stays on a chip next to its arguments)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding

    from llava_jax.infer.engine import MOST_STEPS, POOL_BYTES, POOL_IMAGES
    from llava_jax.infer.generate import (
        Inputs,
        admit,
        bucket,
        decode,
        empty_slots,
        encode_images,
    )
    from llava_jax.infer.placed_model import PlacedModel
    from llava_jax.models.layers import axes_for_answers, stored_as
    from llava_jax.models.llava import build, for_answers, logical_axes
    from llava_jax.parallel.sharding import batch_sharding, param_shardings, replicated, spec_of
    from llava_jax.types import ModelConfig
    from llava_jax.weights.load import CLIPS

    config = ModelConfig(CLIPS["clip-l-14-336"], llm, dtype="bfloat16")
    params, axes = build(config)[1], logical_axes(config)
    params = stored_as(jax.eval_shape(for_answers, params), "bfloat16")
    at = param_shardings(axes | {"llm": axes_for_answers(axes["llm"], llm.layers)}, params, mesh)
    params = jax.tree.map(lambda x, at: x.update(sharding=at), params, at)

    def abstract(tree, at):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at(x)), tree)

    def slot(x):
        heads = "batch", "kv_heads", "length", "head_dim"
        return NamedSharding(mesh, spec_of(heads[: x.ndim], x.ndim))

    def row(x):
        return batch_sharding(mesh)

    def everywhere(x):
        return replicated(mesh)

    placed = PlacedModel({}, config, None, mesh)
    slots, count = placed.rows(slots), placed.group(slots)
    size = bucket(tokens + answer)
    state = abstract(jax.eval_shape(lambda: empty_slots(config=config, rows=slots, size=size)), slot)
    patches = config.vision.patches
    entries = min(POOL_IMAGES, POOL_BYTES // (patches * llm.width * 2))
    pool = abstract(jax.ShapeDtypeStruct((entries, patches, llm.width), jnp.bfloat16), everywhere)
    stops = abstract(jax.ShapeDtypeStruct((2, llm.vocab_size), np.int16), everywhere)
    length = bucket(tokens)
    ids, one = np.zeros((count, length), np.int32), np.ones(count, np.int32)
    alone = Inputs(ids, one, ids)
    side = config.vision.image_size
    pixels = np.zeros((count, side, side, 3), np.float32)

    def prefilled(inputs):
        return admit.lower(params, state, pool, *abstract((inputs, one), row), config=config, size=length)

    tower = encode_images.lower(params, pool, *abstract((pixels, one), row), config=config)
    keep = abstract(np.zeros(slots, bool), row)
    step = decode.lower(
        params, state, stops, keep, np.int32(0), np.int32(MOST_STEPS), config=config, steps=MOST_STEPS, top=0
    )
    cached, pooled = (sum(_on_chip(leaf) for leaf in jax.tree.leaves(tree)) for tree in (state, pool))
    suffix = np.zeros((count, bucket(64)), np.int32)
    return {
        f"tower, {count} images": (tower, cached),
        f"prefill, {count} prompts of {length} tokens": (prefilled(alone), 0),
        f"prefill, {count} suffixes of {suffix.shape[1]} tokens": (prefilled(Inputs(suffix, one, suffix, one, one)), 0),
        f"decode, {slots} slots of {size} tokens": (step, pooled),
    }


def _on_chip(leaf) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--llm", default="vicuna-13b", help="a size of model.llm=random:NAME, or FILE.json")
    parser.add_argument("--tensor", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--slots", type=int, default=8, help="answers at a time")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt, its image included")
    parser.add_argument("--answer", type=int, default=512, help="tokens of an answer")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    # Only now: jax reads the environment when it is imported.
    import jax

    from llava_jax.aot.target import named_target
    from llava_jax.parallel.chips import GIB
    from llava_jax.parallel.sharding import make_mesh
    from llava_jax.types import MeshSettings
    from llava_jax.weights.load import llm_config

    target, fits = named_target(args.topology), True
    for tensor in args.tensor:
        mesh = make_mesh(MeshSettings(-1, 1, tensor), target.devices)
        print(
            f"{args.llm} on {args.topology}: {mesh.shape['data']} x {tensor} chips of {target.hbm_bytes / GIB:.2f} GiB"
        )
        with jax.set_mesh(mesh):
            programs = lowered(mesh, llm_config(f"random:{args.llm}"), args.slots, args.tokens, args.answer)
            for name, (program, beside) in programs.items():
                began = time.monotonic()
                memory = program.compile().memory_analysis()
                new = memory.output_size_in_bytes - memory.alias_size_in_bytes
                code = memory.generated_code_size_in_bytes
                held = memory.argument_size_in_bytes + beside
                total = held + memory.temp_size_in_bytes + new + code
                fits &= total <= target.hbm_bytes
                temporary, verdict = memory.temp_size_in_bytes, "fits" if total <= target.hbm_bytes else "DOES NOT FIT"
                print(
                    f"  {name}: {total / GIB:.2f} GiB a chip ({held / GIB:.2f} of them stay, {temporary / GIB:.2f} are "
                    f"temporary): {verdict}; "
                    f"compiled in {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
