"""Petrov et al. 2023, "When Do Prompting and Prefix-Tuning Work? A Theory of Capabilities and Limitations",
https://arxiv.org/abs/2310.19698: section 5. Section 4 is in identities.py.
"""

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Finding, Part, finding, joined, say
from prefix_tuning.study.claims.tables import chart_of, table_of, training
from prefix_tuning.study.claims.trials import Longer, Trial, train_longer

TIMES = 10  # how many times the steps of the other trainings the long one takes
TASKS, METHODS = ("short", "reversed", "copied"), ("prefix", "full")


def unlock(lab: Lab) -> Finding:
    """Trained: a prefix, and all weights, on questions that the base knows from its pre-training, and on a new task, to
    write three words in reverse order. Control: to copy three words.

    Agrees: the prefix answers at least 80 % of the known; below 10 % of the new, even with TIMES the steps; all weights
    reach 80 % of the new. If the prefix does not even learn to copy, the control leaves it open what the order matters.
    """
    trials = {(task, method): Trial(method, task=task) for task in TASKS for method in METHODS}
    found = lab.run_trials(trials)
    share = {key: one.median("exact_match") for key, one in found.items()}
    new = "reversed", "prefix"
    (longer,) = (one["exact_match"] for one in lab.run(train_longer, [Longer(trials[new], found[new].rate, TIMES)]))
    known, new_full, copied = share["short", "prefix"], share["reversed", "full"], share["copied", "prefix"]
    methods = {method: say(f"method.{method}") for method in METHODS}
    tasks = {task: say(f"unlock.{task}") for task in TASKS}
    return finding(
        "unlock",
        "Petrov et al. 2023, arXiv 2310.19698, section 5",
        training(lab.scale),
        [
            Part(say("unlock.known", share=known), known >= 0.8),
            Part(say("unlock.new", share=share[new]), share[new] < 0.1),
            Part(say("unlock.longer", times=TIMES, share=longer), longer < 0.1),
            Part(say("unlock.full", share=new_full), new_full >= 0.8),
            Part(say("unlock.control", prefix=copied, full=share["copied", "full"]), True if copied >= 0.5 else None),
        ],
        table_of(
            say("task and method"),
            {joined([tasks[task], methods[method]], "，", ", "): one for (task, method), one in found.items()},
        ),
        [
            chart_of(
                "exact_match",
                say("task"),
                list(tasks.values()),
                {name: [found[task, method] for task in TASKS] for method, name in methods.items()},
            )
        ],
        times=TIMES,
    )
