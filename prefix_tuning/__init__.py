"""Prefix tuning for Bloom, by hand: start reading in encoder.py, then bloom.py and training.py."""
