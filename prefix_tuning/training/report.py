"""What a run shows to others: a model card, a plot of its curves, TensorBoard, the hub. Training needs none of it."""

import json
import re
from pathlib import Path

from prefix_tuning.base_model.identity import LOCAL
from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.files.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    BOARD_FOLDER,
    CARD_FILE,
    CONFIG_FILE,
    ENCODER_FILE,
    METRICS_FILE,
    PLOT_FILE,
    SEARCH_FILE,
)
from prefix_tuning.files.writing import atomic_write

WORTH_MENTIONING = 0.01  # of a loss

_CARD = Path(__file__).with_name("model_card.md")


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text("utf-8").splitlines()]


def write_card(folder: Path) -> None:
    """Writes README.md, the model card, from the settings and figures that a finished run left in `folder`."""
    settings = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    records = read_metrics(folder)
    summary = records[-1]
    base, shape = settings["model_name_or_path"], settings["prefix_config"]
    held_out = settings["eval_dataset"] or (f"{settings['eval_rows']:,} others" if settings["eval_rows"] else None)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base)  # neither bundled nor in a folder
    text = _CARD.read_text("utf-8").format(
        base_model=f"base_model: {base}\n" if on_hub else "",
        base=base.removeprefix(LOCAL),
        load=base if on_hub else "the folder of " + base.removeprefix(LOCAL),
        auto=f"""
`AutoPeftModelForCausalLM` does not find this base by itself: `{ADAPTER_CONFIG_FILE}` names it `{base}`, as a path would be
valid on one machine only. Write the path of the base there, as `base_model_name_or_path`, and it does.
"""
        if not on_hub
        else "",
        where=" --model_name_or_path FOLDER_OF_THE_BASE" if base.startswith(LOCAL) else "",
        num_virtual_tokens=shape["num_virtual_tokens"],
        numbers=shape["num_virtual_tokens"] * shape["num_layers"] * 2 * shape["token_dim"],
        data=f"{settings['dataset'].removeprefix(LOCAL)}, {settings['train_rows']:,} rows"
        + (f"; held out: {held_out.removeprefix(LOCAL)}" if held_out else ""),
        steps=summary["steps"],
        rows_per_step=settings["rows_per_step"],
        learning_rate=settings["learning_rate"],
        trainable=summary["trainable_parameters"],
        seconds=summary["train_seconds"],
        figures=_figures(records, settings["save_best"]),
        plot=f"![loss over steps]({PLOT_FILE})\n\n" if (folder / PLOT_FILE).exists() else "",
        adapter=ADAPTER_FILE,
        adapter_config=ADAPTER_CONFIG_FILE,
        encoder=ENCODER_FILE,
        config=CONFIG_FILE,
        metrics=METRICS_FILE,
    )
    with atomic_write(folder / CARD_FILE) as draft:
        draft.write_text(text, "utf-8")


def _figures(records: list[dict], save_best: bool) -> str:
    """The last training loss, and the held-out figures of the frozen base and of the prefix that was saved, as Markdown."""
    losses, evaluations = _intervals(records), _evaluations(records, save_best)
    text = f"Loss on the training rows at step {losses[-1]['step']}: {losses[-1]['loss']:.4f}.\n" if losses else ""
    if not evaluations:
        return text
    shown = [("frozen base", x) if x.get("frozen_base") else (f"this prefix, step {x['step']}", x) for x in evaluations]
    names = [name for name in ("eval_loss", "eval_perplexity", "eval_exact_match") if name in evaluations[-1]]
    rows = [f"| {title} |" + "".join(f" {record[name]:.4g} |" for name in names) for title, record in shown]
    head = "| on held-out rows | " + " | ".join(name.removeprefix("eval_").replace("_", " ") for name in names) + " |"
    return "\n".join([text, head, "|---" * (len(names) + 1) + "|", *rows, ""])


def _intervals(records: list[dict]) -> list[dict]:
    """The records of metrics.jsonl about training rows."""
    return [record for record in records if record.get("loss") is not None]


def _evaluations(records: list[dict], save_best: bool) -> list[dict]:
    """Of the records of metrics.jsonl about held-out rows, those of the frozen base and of the prefix that was saved."""
    evaluations = [record for record in records if record.get("eval_loss") is not None]
    frozen = [record for record in evaluations if record.get("frozen_base")]
    tuned = [record for record in evaluations if not record.get("frozen_base")]
    return frozen + (sorted(tuned, key=lambda record: record["eval_loss"])[:1] if save_best else tuned[-1:])


def what_was_learnt(records: list[dict], save_best: bool) -> str:
    """One line about a finished run: its losses before and after, and if less than 1% of them went, what to try.

    records: those of metrics.jsonl.
    """
    pairs = []  # of losses, before and after
    if len(losses := [record["loss"] for record in _intervals(records)]) > 1:
        pairs.append(("training loss", losses[0], losses[-1]))
    if len(evaluations := _evaluations(records, save_best)) > 1:
        pairs.append(("held-out loss", *(record["eval_loss"] for record in evaluations)))
    if not pairs:
        return "too few steps to say what was learnt; --logging_steps 1 and held-out rows would tell"
    line = ", ".join(f"{name} {before:.4f} -> {after:.4f}" for name, before, after in pairs)
    if len(matches := [record["eval_exact_match"] for record in evaluations if "eval_exact_match" in record]) > 1:
        line += f", exact match {matches[0]:.1%} -> {matches[1]:.1%}"
    learnt = [after < (1 - WORTH_MENTIONING) * before for _, before, after in pairs]
    if not any(learnt):
        searched = any("learning_rate_search" in record for record in records)
        first = "" if searched else "leave out --learning_rate, so that it is found; else "
        return f"nothing was learnt: {line}; {first}more --num_train_epochs or --num_virtual_tokens may help"
    if not learnt[-1]:
        return f"learnt by heart only: {line}; more rows, fewer --num_train_epochs or --save_best may help"
    return f"learnt: {line}"


def plot_curves(folder: Path) -> None:
    """Draws training.png, loss and evaluation over steps, if matplotlib is installed. One of an earlier run is removed."""
    figure = _new_figure(folder / PLOT_FILE, (8, 4.5))
    if figure is None:
        return
    records = [record for record in read_metrics(folder) if "step" in record]
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    for name, label, style in (("loss", "training", "-"), ("eval_loss", "held out", "o-")):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), style, markersize=4, label=label)
    points = [(record["step"], record["eval_exact_match"]) for record in records if "eval_exact_match" in record]
    if points:
        right = axes.twinx()
        right.set(ylabel="exact match", ylim=(0, 1))
        axes.plot(
            *zip(*points, strict=True),
            "s--",
            color="tab:green",
            markersize=4,
            label="exact match",
            transform=right.transData,
        )
    if not axes.lines:
        return
    axes.set_yscale("log")
    axes.legend()
    with atomic_write(folder / PLOT_FILE) as draft:
        figure.savefig(draft, format="png", dpi=120)


def _new_figure(path: Path, inches: tuple[float, float]):
    """An empty figure, None if matplotlib is not installed. The picture of an earlier run is removed."""
    path.unlink(missing_ok=True)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=inches, layout="constrained")


def plot_search(folder: Path) -> None:
    """Draws learning_rate.png if a rate was searched for and matplotlib is installed. One of an earlier run is removed."""
    figure = _new_figure(folder / SEARCH_FILE, (6, 4))
    searches = [record["learning_rate_search"] for record in read_metrics(folder) if "learning_rate_search" in record]
    if figure is None or not searches:
        return
    (search,) = searches
    axes = figure.add_subplot(xlabel="learning rate", ylabel="loss at the end of a trial (nats per token)", xscale="log")
    points = sorted((rate, loss) for rate, loss in zip(search["rates"], search["losses"], strict=True) if loss is not None)
    axes.plot(*zip(*points, strict=True), "o-", markersize=4)
    axes.axvline(search["rate"], color="tab:green", linestyle="--", label=f"taken: {search['rate']:.2g}")
    axes.legend()
    with atomic_write(folder / SEARCH_FILE) as draft:
        figure.savefig(draft, format="png", dpi=120)


def open_board(folder: Path, step: int):
    """A SummaryWriter for TensorBoard, for a run that is at `step`. Figures of later steps are removed."""
    from torch.utils.tensorboard import SummaryWriter

    if step == 0:
        for old in (folder / BOARD_FOLDER).glob("events.out.tfevents.*"):
            old.unlink()
    return SummaryWriter(str(folder / BOARD_FOLDER), purge_step=step + 1 if step else 0)


def create_repository(name: str) -> str:
    """Creates the repository on the hub unless it is there. Returns its full name. Raises UserError if the hub refuses."""
    from huggingface_hub import HfApi

    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # no network, no token, no permission, no such name: each raises a class of its own
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "log in with `hf auth login`" if status in (401, 403) else "try again later"
        raise UserError(f"--push_to_hub {name}: {reason_of(error)}; {hint}, or leave the flag out") from error


def push_to_hub(folder: Path, repository: str) -> None:
    """Uploads a finished run, but for its checkpoints. Raises UserError where the hub refuses; nothing local is lost."""
    from huggingface_hub import HfApi

    files = [CARD_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, ENCODER_FILE, CONFIG_FILE, METRICS_FILE, PLOT_FILE, SEARCH_FILE]
    try:
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=[*files, f"{BOARD_FOLDER}/*"],
            commit_message="Prefix and figures of a training run",
        )
    except Exception as error:
        raise UserError(
            f"--push_to_hub: {reason_of(error)}; the prefix is saved in {folder}; "
            f"try again with `hf upload {repository} {folder}`"
        ) from error
