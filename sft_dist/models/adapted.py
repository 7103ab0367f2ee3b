"""Whether PEFT has been put around a model, without importing PEFT.

With bitsandbytes and torch's compiler, which come along, it is a fifth of a rank's start, and full fine-tuning never
needs it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


def is_adapted(model: nn.Module) -> TypeGuard[PeftModel]:
    """True of a PeftModel. None can exist where nobody has imported peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)
