"""How factors start: one file an initialisation, its source in the docstring."""

from .gaussian import gaussian
from .kaiming import kaiming
from .plain import plain as plain

INITS = {"kaiming": kaiming, "gaussian": gaussian}
METHODS = ("lora",)
