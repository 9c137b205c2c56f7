#!/usr/bin/env python3
"""Tunes a prefix: `python train.py` on the bundled demo, `python train.py --help` for everything else."""

from prefix_tuning.cli import train_command

if __name__ == "__main__":
    train_command()
