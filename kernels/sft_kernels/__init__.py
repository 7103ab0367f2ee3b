"""Kernels of this project, each beside its plain-PyTorch reference with the same signature.

    from sft_kernels import choose_head
    name, supervised_loss, reason = choose_head("auto", "cuda")
"""

from sft_kernels.registry import HEADS, KernelUnavailableError, choose_head

__all__ = ["HEADS", "KernelUnavailableError", "choose_head"]
