"""A jaxpr in, a jaxpr with low-rank terms out: which rule serves which primitive.

May import `_numerics`, `errors` and `factors`.
"""

from . import collectives, control, linear, scaling, several, slices, structure

LINEAR = {
    "dot_general": linear.dot_general,
    "conv_general_dilated": linear.conv_general_dilated,
    "ragged_dot_general": linear.ragged_dot_general,
}
STRUCTURE = {
    "add": several.add,
    "add_any": several.add,
    "all_gather": collectives.all_gather,
    "all_gather_invariant": collectives.all_gather,
    "broadcast_in_dim": structure.broadcast_in_dim,
    "complex": several.complex_,
    "concatenate": several.concatenate,
    "convert_element_type": structure.keep,
    "copy": structure.keep,
    "device_put": structure.keep,
    "div": scaling.div,
    "dynamic_slice": slices.dynamic_slice,
    "gather": slices.gather,
    "layout_constraint": structure.keep,
    "mul": scaling.mul,
    "name": structure.name,
    "neg": scaling.neg,
    "optimization_barrier": structure.optimization_barrier,
    "ppermute": collectives.ppermute,
    "pvary": structure.keep,
    "reshard": collectives.reshard,
    "reshape": structure.reshape,
    "rev": structure.rev,
    "select_n": several.select_n,
    "sharding_constraint": structure.keep,
    "slice": slices.slice_,
    "split": slices.split,
    "squeeze": structure.squeeze,
    "stack": several.stack,
    "stop_gradient": structure.stop_gradient,
    "sub": several.sub,
    "transpose": structure.transpose,
    "unstack": slices.split,
}
CONTROL = {
    "closed_call": control.closed_call,
    "cond": control.cond,
    "custom_vmap_call": control.closed_call,
    "jit": control.call,
    "remat2": control.remat,
    "scan": control.scan,
    "shard_map": control.shard_map,
    "while": control.while_loop,
}
RULES = LINEAR | STRUCTURE | CONTROL
