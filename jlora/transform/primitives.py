"""Sets of names of primitives; with the table of rules they choose what is done.

A test checks that each name exists in a supported JAX.
"""

# A parameter that meets data in one of these is a bias, a norm's scale, a position
# table or similar. It is not the weight of a linear operation.
POINTWISE = (
    frozenset(["add", "add_any", "atan2", "div", "max", "min", "mul", "nextafter"])
    | frozenset(["pow", "rem", "sub", "and", "or", "xor", "clamp", "select_n"])
    | frozenset(["eq", "ge", "gt", "le", "lt", "ne", "scatter", "scatter-add"])
    | frozenset(["concatenate", "pad", "dynamic_update_slice"])
)

# These make one weight of several. A parameter that meets data in one is a bias, a
# position table or a token.
JOINS = frozenset(["add", "add_any", "complex", "concatenate", "stack", "sub"])

# These scale a weight by their other operand.
SCALES = frozenset(["div", "mul"])

# A bias is added to the result of an output head by one of these.
BIASES = frozenset(["add", "add_any", "sub"])

# What mostly stands between a parameter and its product.
PREPARES = frozenset(["broadcast_in_dim", "convert_element_type", "copy", "reshape"])
PREPARES |= {"squeeze", "transpose"}

# Inside a `shard_map`, all devices along the mesh axes of one of these get one result.
AGREEING = frozenset(["all_gather", "all_gather_invariant", "pmax", "pmin", "psum"])
AGREEING |= {"psum_invariant"}

# These name mesh axes in a type, and leave the value as it is.
RETYPING = frozenset(["pvary"])

# These say where an array lies, and act on codes and scales one by one.
PLACES = RETYPING | {"device_put"}

# These run inner code once, on their own operands in their own order.
CALLS = frozenset(["closed_call", "jit", "remat2"])

# As CALLS, but the inner code sees other shapes than the operands have.
MAPPED_CALLS = frozenset(["custom_vmap_call", "shard_map"])

# These act on each operand on its own, or run inner code that says how operands meet.
SEPARATE = CALLS | MAPPED_CALLS | {"cond", "optimization_barrier", "scan", "while"}

# The plan's word for the operation of a use; for all other primitives it is "linear".
OPERATIONS = {"gather": "embedding", "conv_general_dilated": "conv"}

# Cheap steps from arrays that the gradient keeps anyway to an activation, see `trail`.
ARITHMETIC = frozenset(["add", "add_any", "div", "integer_pow", "max", "min", "mul"])
ARITHMETIC |= {"neg", "select_n", "square", "sub"}
CHEAP = ARITHMETIC | {"broadcast_in_dim", "convert_element_type", "reshape", "squeeze"}

# Elementwise steps whose result the gradient keeps, or computes again, anyway.
KEPT = frozenset(["erf", "erfc", "exp", "exp2", "log", "log1p", "logistic", "pow"])
KEPT |= {"rsqrt", "sqrt", "tanh"}
