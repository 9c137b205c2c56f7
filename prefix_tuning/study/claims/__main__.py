"""The papers' claims, each as a small experiment.

python -m prefix_tuning.study.claims [--quick] [--output claims.html]
"""

from prefix_tuning.cli import claims_command

if __name__ == "__main__":
    claims_command()
