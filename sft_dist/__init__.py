"""Distributed supervised fine-tuning that proves itself right. Importing it imports neither torch nor transformers."""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes wherever it is installed, and that then tells of faster kernels that it did not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
