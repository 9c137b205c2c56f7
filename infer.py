#!/usr/bin/env python3
"""Asks a tuned model: `python infer.py "法国的首都是哪里？"`, `python infer.py --help` for everything else."""

from prefix_tuning.cli import infer_command

if __name__ == "__main__":
    infer_command()
