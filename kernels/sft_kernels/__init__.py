"""Kernels of this project, each beside its plain-PyTorch reference with the same signature.

`choose_head("auto", device)` returns the name of the loss head that suits the device, the function, and the reason.
"""

from sft_kernels.registry import HEADS, KernelUnavailableError, choose_head

__all__ = ["HEADS", "KernelUnavailableError", "choose_head"]
