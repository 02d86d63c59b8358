"""Names of primitives that choose what the transform does, besides the table of rules.

Each name exists in a supported JAX; a test looks them up.
"""

# Where one of these meets a parameter and data, the parameter is a bias, a norm's
# scale, a position table or the like, not the weight of a linear operation.
POINTWISE = (
    frozenset(["add", "add_any", "atan2", "div", "max", "min", "mul", "nextafter"])
    | frozenset(["pow", "rem", "sub", "and", "or", "xor", "clamp", "select_n"])
    | frozenset(["eq", "ge", "gt", "le", "lt", "ne", "scatter", "scatter-add"])
    | frozenset(["concatenate", "pad", "dynamic_update_slice"])
)

# These make one weight of several; with data among them it is a bias or a token.
JOINS = frozenset(["add", "add_any", "concatenate", "stack", "sub"])

# These scale a weight by their other operand.
SCALES = frozenset(["div", "mul"])

# A bias is added to the result of an output head by one of these.
BIASES = frozenset(["add", "add_any", "sub"])

# What stands between a parameter and its product, as a rule.
PREPARES = frozenset(["broadcast_in_dim", "convert_element_type", "copy", "reshape"])
PREPARES |= {"squeeze", "transpose"}

# These run inner code once, on their own operands in their own order.
CALLS = frozenset(["closed_call", "jit", "remat2"])

# As CALLS, but for other shapes or devices than outside.
MAPPED_CALLS = frozenset(["custom_vmap_call", "shard_map"])

# What the plan calls the operation of a use; "linear" for all others.
OPERATIONS = {"gather": "embedding", "conv_general_dilated": "conv"}
