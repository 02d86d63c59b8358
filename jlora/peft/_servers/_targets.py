"""Which modules PEFT adapts, and which it keeps whole, by an adapter's config.

Read from PEFT 0.21.2: `tuners_utils.py: BaseTuner._check_tied_modules`,
`_maybe_include_all_linear_layers`; `tuners/lora/model.py:
LoraModel._add_modules_to_save_to_tie`, `_add_targets_to_tie`; `peft_model.py:
PeftModelForSequenceClassification.__init__`.
"""

from collections.abc import Mapping, Sequence

from ..._io.torch_models import is_head, is_table
from .._selection import left_out_by, targeting
from ..config import endings
from ._adapter import Adapter
from ._base import Shape

_TIED = ("embed_tokens", "lm_head")  # the names by which PEFT looks for a tie
# What PEFT keeps whole of a model for a task, whatever the config says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Targets:
    """What PEFT makes of a config, for one model.

    Attributes:
      of_type: what PEFT adapts of the model's type if the config does not say.
      saved: the ends of modules that are kept whole.
      listed: what `modules_to_save` names, with a table that its head's tie adds.
      tied: the head whose factors are those of its table, or empty.
      table: that table.
    """

    def __init__(
        self,
        adapter: Adapter,
        modules: Mapping[str, Shape | None],
        ties: Mapping[str, str],
        *,
        of_type: Sequence[str],
        by_task: bool,
    ):
        """Reads a config.

        Args:
          adapter: the adapter.
          modules: the model's, as its class names them.
          ties: tables of the model, each with the head that has the same weight.
          of_type: what PEFT adapts of the model's type if the config does not say.
          by_task: whether the config's task keeps more modules whole.
        """
        self._adapter, self._modules, self.of_type = adapter, modules, of_type
        self._left_out_by = left_out_by(adapter.config)
        task = adapter.fields.get("task_type") if by_task else None
        self.saved = (*adapter.config.saved, *_HEADS.get(str(task), ()))
        self.listed = adapter.config.saved
        self.tied = self.table = ""
        for table, head in ties.items() if adapter.config.tying else ():
            if any(entry.rpartition(".")[2] in _TIED for entry in self.saved):
                self.saved = (*self.saved, table, head)
                self.listed = (*self.listed, table)
            elif self._names_a_tie():
                self.tied, self.table = head, table

    def _names_a_tie(self) -> bool:
        targets = self._adapter.config.targets
        if isinstance(targets, tuple):
            return any(entry.rpartition(".")[2] in _TIED for entry in targets)
        return not self.every and any(map(targeting(self._adapter.config), _TIED))

    @property
    def every(self) -> bool:
        """Whether it adapts all linear modules."""
        return str(self._adapter.config.targets).lower() == "all-linear"

    def keeps(self, module: str) -> bool:
        """Returns whether a module is kept whole."""
        return any(map(module.endswith, self.saved))

    def adapts(self, module: str) -> bool:
        """Returns whether a module gets A and B."""
        if self.tied and module == self.tied:
            return True
        field = self._left_out_by(module)
        if field == "exclude_modules" or self._keeps_around(module):
            return False
        if self.table and module == self.table:
            return True
        if self.every:  # PEFT leaves heads and tables out
            shape = self._modules.get(module)
            flat = shape is None or len(shape) == 2
            return flat and not is_table(module) and not self._is_output(module)
        if self._adapter.config.targets is None:
            return not (field or {*self.of_type}.isdisjoint(endings(module)))
        return not field

    def _is_output(self, module: str) -> bool:
        task = self._adapter.fields.get("task_type")
        outputs = _HEADS["SEQ_CLS"] if task == "SEQ_CLS" else ()
        return is_head(module) or module in outputs

    def _keeps_around(self, module: str) -> bool:
        """Returns whether it is in a module that is kept whole, or is one."""
        parts = f".{module}."
        return any(f".{entry}." in parts for entry in self.saved)
