"""The methods, oldest idea first; each file is one idea, as pure functions."""

from .bitfit import bitfit as bitfit
from .bottleneck import houlsby as houlsby, pfeiffer as pfeiffer
from .dora import dora as dora
from .full import full as full
from .head import head_only as head_only
from .ia3 import ia3 as ia3
from .lora import lora as lora
from .method import Method as Method
from .prefix import prefix as prefix, through as through
from .prompt import prompt as prompt
