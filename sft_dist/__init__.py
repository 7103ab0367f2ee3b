"""Distributed supervised fine-tuning that proves itself right. Importing it imports neither torch nor transformers."""

__version__ = "0.1.0"
