"""The sections of gpu_check.py, one question each."""
