"""`python -m prefix_tuning.study`: what a prefix does, as one page of pictures. What it does is in run.py."""

from prefix_tuning.cli import study_command

if __name__ == "__main__":
    study_command()
