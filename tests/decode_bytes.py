"""What one step of decoding holds and moves on a TPU, compiled ahead of time: no TPU needed, half a minute each.

`python -m tests.decode_bytes --topology=v5p:2x2x1 --llm=vicuna-7b --batch 8 1 --slots 1024 4096` compiles the program
of `generate` for one chip, with parameters in bfloat16, and prints for each batch and size of the cache:

- its temporaries;
- the bytes of HBM that a step reads and writes, over those of weights and cache. Counted from the program: what is
  copied to VMEM ahead of its use counts once, and a layer's cache that is updated in place as its updates;
- the other arrays that a step writes in the shape of a layer's cache: copies of it.
"""

import argparse
import itertools
import json
import os
import re
import sys
from typing import Any

from llava_jax.cli.compile import ENVIRONMENT

Dims = tuple[int, ...]
# What moves nothing.
FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant", "iota", "copy-done", "slice-done")


def figures(topology: str, llm: Any, batch: int, slots: int) -> dict[str, Any]:
    """The figures of one shape, for an LlamaConfig."""
    from llava_jax.aot import hlo

    whole, held, cache = compile_decode(topology, llm, batch, slots)
    program, memory = hlo.parse(whole.as_text()), whole.memory_analysis()
    assert memory.alias_size_in_bytes >= cache, "the cache is not updated in place"
    (loop,) = (i for i in program.computations[program.entry] if i.opcode == "while")
    layer = batch, llm.kv_heads, slots, llm.head_dim
    table = llm.vocab_size, llm.width
    accessed, copies = traffic(program, loop.attribute("body"), layer, table)
    around = traffic(program, program.entry, layer, table)[1]
    return {
        "batch": batch,
        "slots": slots,
        "temporary_bytes": memory.temp_size_in_bytes,
        "bytes_accessed": accessed,
        "weights_and_cache_bytes": held,
        "ratio": accessed / held,
        "cache_copies": sorted({*copies, *around}),
    }


def traffic(program: Any, name: str, layer: Dims, table: Dims) -> tuple[float, list[str]]:
    """The bytes of HBM that a computation reads and writes, and what it writes in the shape `layer`, but for updates.

    An update is in place where an operand of the result's type is not used again: XLA would copy it otherwise, and the
    copy is an instruction of its own. Of the embeddings, of the shape `table`, a step looks up a row each, which is not
    counted; the head, which has that shape too, is read by a product, and a copy of either is written.
    """
    from llava_jax.aot import hlo

    types = {i.name: i.type for i in program.computations[name]}
    moved, copies = 0.0, []
    for i in program.computations[name]:
        if i.opcode in FREE:
            continue
        if i.opcode in ("while", "conditional", "call"):
            words = set(re.findall(r"[\w.\-]+", i.rest.split("metadata=")[0]))
            inside = [traffic(program, word, layer, table) for word in words & program.computations.keys()]
            moved, copies = moved + sum(one[0] for one in inside), copies + [what for one in inside for what in one[1]]
            continue
        if i.opcode == "slice-start":  # of the type ((operand), the slice in VMEM, its state)
            moved += hlo.array_bytes(i.type)[1]
            continue
        read = [types[operand] for operand in i.operands if operand in types and not types[operand].startswith("(")]
        # What starts a copy has the type (destination, source, its state).
        written = [i.type[: i.type.index("}") + 1] if i.opcode == "copy-start" else i.type]
        if i.op_name.endswith("scatter") and i.type in read:
            read.remove(i.type)
            written = read
        for kind, is_written in [(kind, False) for kind in read] + [(kind, True) for kind in written]:
            for part in hlo.in_hbm(kind):
                ((_, dims),) = hlo.arrays(part)
                is_lookup = dims == table and not is_written and not i.op_name.endswith("dot_general")
                moved += 0 if is_lookup else sum(hlo.array_bytes(part))
                if is_written and sorted(d for d in dims if d > 1) == sorted(d for d in layer if d > 1):
                    copies.append(f"{i.name} {i.type[:80]}")
    return moved, copies


def compile_decode(topology: str, llm: Any, batch: int, slots: int) -> tuple[Any, int, int]:
    """`generate.decode` for the first chip, the bytes of weights and cache, and those of the cache."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from llava_jax.aot.target import named_target
    from llava_jax.infer.engine import MOST_STEPS
    from llava_jax.infer.generate import decode, empty_slots
    from llava_jax.models.layers import stored_as
    from llava_jax.models.llava import build, for_answers
    from llava_jax.types import ModelConfig
    from llava_jax.weights.load import CLIPS

    config = ModelConfig(CLIPS["tiny"], llm, dtype="bfloat16")
    params = stored_as(build(config)[1], "bfloat16")

    def arguments() -> tuple[Any, ...]:
        stops_QV = jnp.zeros((2, llm.vocab_size), jnp.int16)
        return (
            empty_slots(config=config, rows=batch, size=slots),
            stops_QV,
            jnp.zeros(batch, bool),
            jnp.int32(0),
            jnp.int32(MOST_STEPS),
        )

    at = SingleDeviceSharding(named_target(topology).devices[0])
    llm_params = jax.eval_shape(for_answers, params)["llm"]
    state, *others = jax.eval_shape(arguments)
    given = jax.tree.map(lambda x: x.update(sharding=at), (params | {"llm": llm_params}, state, *others))
    read = llm_params if llm.tied else {name: tree for name, tree in llm_params.items() if name != "embed"}
    held, cache = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in ((read, state.cache), state.cache.layers)
    )
    whole = decode.lower(*given, config=config, steps=MOST_STEPS, top=0).compile()
    return whole, held, cache


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
