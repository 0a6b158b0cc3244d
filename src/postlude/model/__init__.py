"""Models: transformers' own classes, loaded, given document attention, verified and exported."""

import logging as python_logging

from transformers.utils import logging

logging.disable_progress_bar()  # a stage has a progress line of its own
for name in ("torchao", "torch.utils._pytree"):  # where torchao is there, both tell of kernels for other machines
    python_logging.getLogger(name).setLevel(python_logging.ERROR)
