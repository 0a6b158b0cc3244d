"""Models: transformers' own classes, loaded, given document attention, verified and exported."""

from transformers.utils import logging

logging.disable_progress_bar()  # a stage has a progress line of its own
