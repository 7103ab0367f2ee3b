"""Models: loaded, made segment-aware, tuned, and wrapped with the loss head."""

import logging

# PEFT imports bitsandbytes wherever it is installed, and that then tells of faster kernels that it did not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
