"""What one step of decoding holds and moves on a TPU, compiled ahead of time: no TPU needed, seconds each.

`python -m tests.decode_bytes --topology=v5p:2x2x1 --llm=vicuna-7b --batch 8 1 --slots 1024 4096` compiles the program
of `generate` for one chip, with parameters in bfloat16, and prints for each batch and size of the cache:

- its temporaries;
- the bytes that a step accesses, over those of weights and cache. XLA counts the body of a loop once, so what the
  layers alone access, compiled by themselves, is added for each layer after the first;
- the arrays of the program that are as large as a layer's cache: copies of it.
"""

import argparse
import itertools
import json
import os
import sys
from typing import Any

from llava_jax.cli.compile import ENVIRONMENT


def figures(topology: str, llm: Any, batch: int, slots: int) -> dict[str, Any]:
    """The figures of one shape, for an LlamaConfig."""
    from llava_jax.aot import hlo

    whole, layers, held = compile_decode(topology, llm, batch, slots)
    accessed = [program.cost_analysis()["bytes accessed"] for program in (whole, layers)]
    accessed = accessed[0] + (llm.layers - 1) * accessed[1]
    layer = [(batch, llm.kv_heads, slots, llm.head_dim)]
    return {
        "batch": batch,
        "slots": slots,
        "temporary_bytes": whole.memory_analysis().temp_size_in_bytes,
        "bytes_accessed": accessed,
        "weights_and_cache_bytes": held,
        "ratio": accessed / held,
        "cache_copies": hlo.buffers_shaped(hlo.parse(whole.as_text()), layer),
    }


def compile_decode(topology: str, llm: Any, batch: int, slots: int) -> tuple[Any, Any, int]:
    """`generate.decode` for the first chip, a step through the layers alone, and the bytes of weights and cache."""
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from jax.sharding import SingleDeviceSharding

    from llava_jax.aot.target import named_target
    from llava_jax.infer.engine import STEPS
    from llava_jax.infer.generate import decode, empty_slots
    from llava_jax.models.layers import merge_heads, stored_as
    from llava_jax.models.llava import build
    from llava_jax.types import ModelConfig
    from llava_jax.weights.load import CLIPS

    config = ModelConfig(CLIPS["tiny"], llm, dtype="bfloat16")
    graphdef, params = build(config)
    params = stored_as(params, "bfloat16")

    def arguments() -> tuple[Any, ...]:
        stops_QV = jnp.zeros((2, llm.vocab_size), jnp.int16)
        return empty_slots(config=config, rows=batch, size=slots), stops_QV, jnp.zeros(batch, bool), jnp.int32(0)

    at = SingleDeviceSharding(named_target(topology).devices[0])
    llm_params = jax.eval_shape(merge_heads, params["llm"])
    state, *others = jax.eval_shape(arguments)
    given = jax.tree.map(lambda x: x.update(sharding=at), (params | {"llm": llm_params}, state, *others))
    read = llm_params if llm.tied else {name: tree for name, tree in llm_params.items() if name != "embed"}
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((read, state.cache)))
    whole = decode.lower(*given, graphdef=graphdef, steps=STEPS, top=0).compile()
    layers = jax.jit(lambda params, x, cache: nnx.merge(graphdef, params).llm.decode(x, cache), donate_argnums=2)
    x_B1D = jax.ShapeDtypeStruct((batch, 1, llm.width), jnp.bfloat16, sharding=at)
    return whole, layers.lower(given[0], x_B1D, given[1].cache).compile(), held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5p:2x2x1")
    parser.add_argument("--llm", default="vicuna-7b", help="a size of model.llm=random:NAME, or FILE.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--slots", type=int, nargs="+", default=[1024])
    parser.add_argument("--json", action="store_true", help="one object a line")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    # Only now: jax reads the environment when it is imported.
    from llava_jax.weights.load import llm_config

    for batch, slots in itertools.product(args.batch, args.slots):
        found = figures(args.topology, llm_config(f"random:{args.llm}"), batch, slots)
        if args.json:
            print(json.dumps(found))
            continue
        print(
            f"batch {batch}, {slots} slots: {found['temporary_bytes'] / 2**20:.1f} MiB of temporaries, "
            f"{found['bytes_accessed'] / 2**20:,.0f} MiB accessed, {found['ratio']:.3f} x weights and cache, "
            f"{len(found['cache_copies'])} copies of a layer's cache"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
