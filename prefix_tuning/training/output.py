"""What a run leaves: its settings, the prefix, the summary, a model card, pictures of its curves, and a copy on the hub.

files/names.py lists all files of an output folder.
"""

import dataclasses
import json
import platform
import re
from pathlib import Path

import torch
import transformers

from prefix_tuning import distributed
from prefix_tuning.base_model.identity import LOCAL, portable_name
from prefix_tuning.devices import peak_memory_mb
from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.files.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ANSWERS_FILE,
    BOARD_FOLDER,
    CARD_FILE,
    CONFIG_FILE,
    ENCODER_FILE,
    METRICS_FILE,
    PLOT_FILE,
    SEARCH_FILE,
)
from prefix_tuning.files.prefixes import recorded_template, save_adapter, save_encoder
from prefix_tuning.files.writing import atomic_write, remove_drafts, write_json
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.training.checkpoints import Resumed, clear_checkpoints, metrics_so_far
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import TrainingState
from prefix_tuning.training.teacher import Answers

PATH_SETTINGS = tuple(field.name for field in dataclasses.fields(TrainConfig) if field.metadata["rules"].is_path)
# A loss that falls by less than this share does not count as learnt.
WORTH_MENTIONING = 0.01
_CARD = Path(__file__).with_name("model_card.md")
# The card's words on how to ask, for each kind of template.
_NOTEBOOK = """\
Questions are asked in the template of training:

    Human: 法国的首都是哪里？

    Assistant: 
"""
_CHAT = """\
Questions are asked in the chat template of the base's tokenizer, as in training. (A copy of it is in the metadata of
`{adapter}`, under `template`.)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{load}")
    messages = [{{"role": "user", "content": "法国的首都是哪里？"}}]
    options = {{"add_generation_prompt": True, {thinking}"return_dict": True, "return_tensors": "pt"}}
    inputs = tokenizer.apply_chat_template(messages, **options)
"""


def describe_run(
    settings: dict, prefix_config: PrefixConfig, dtype: torch.dtype, device: torch.device, distilled: dict | None
) -> dict:
    """All that is needed to repeat a run, without any path of this machine.

    settings: by name, the command's settings and what the run derived from them.
    """
    settings = settings | {name: portable_name(settings[name]) for name in PATH_SETTINGS if settings[name] is not None}
    # An earlier run fixes the shape.
    if settings["prefix_from"]:
        shape = dataclasses.asdict(prefix_config)
        settings |= {"prefix_init": None, **{name: shape[name] for name in settings if name in shape}}
    return {
        **settings,
        "prefix_config": dataclasses.asdict(prefix_config),
        "distilled": distilled,
        "ran_with": {
            "processes": distributed.world_size(),
            "job": distributed.torchrun_job(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def prepare_output(output_dir: Path, description: dict, resumed: Resumed | None, answers: Answers | None = None) -> None:
    """Removes from the folder what a killed or replaced run left, and writes what is known before the first step.

    An earlier prefix stays in place until the new one is whole. answers: of a teacher.
    """
    remove_drafts(output_dir)
    clear_checkpoints(output_dir, resumed)
    write_json(output_dir / CONFIG_FILE, description)
    with atomic_write(output_dir / METRICS_FILE) as draft:
        draft.write_bytes(metrics_so_far(resumed))
    if answers and answers.texts:
        write_json(output_dir / ANSWERS_FILE, answers._asdict())
    else:
        (output_dir / ANSWERS_FILE).unlink(missing_ok=True)


def save_output(output_dir: Path, state: TrainingState, fingerprint: dict) -> None:
    """Writes what a run is for: the trainable weights and the baked prefix. All ranks call this together."""
    encoder = state.encoder
    distributed.check_equal(list(encoder.parameters()), "weights")
    if distributed.is_main():
        adapter = encoder.bake(), encoder.config, fingerprint, state.history, state.template, state.distilled
        try:
            save_encoder(output_dir, encoder, fingerprint)
        except UserError as error:
            # The prefix is 200 times smaller than its encoder at bloom-1b4-zh's shape, so it may still fit on the disk.
            if (output_dir / ENCODER_FILE).exists():
                raise
            save_adapter(output_dir, *adapter)
            raise UserError(f"{error}; the prefix is saved in {output_dir}, without its trainable weights") from error
        save_adapter(output_dir, *adapter)


def save_good_prefix(output_dir: Path, prefix: torch.Tensor, state: TrainingState, fingerprint: dict) -> None:
    """Writes the last good prefix of a run whose loss is no longer finite. All ranks call this together."""
    if distributed.is_main():
        records = state.history, state.template, state.distilled
        save_adapter(output_dir, prefix, state.encoder.config, fingerprint, *records)
        # An earlier run's weights must not stay beside it, and this run's are not finite.
        (output_dir / ENCODER_FILE).unlink(missing_ok=True)
    # All wait until it is saved: torchrun stops all processes when the first one ends.
    distributed.barrier()


def summarise(state: TrainingState) -> dict:
    """The last line of metrics.jsonl."""
    progress, seconds = state.progress, state.clock.seconds()
    return {
        "summary": True,
        "steps": progress.step,
        "train_seconds": round(seconds, 3),
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / seconds, 1) if seconds else 0.0,
        "compile_seconds": round(state.compile_seconds, 3),
        "peak_memory_mb": peak_memory_mb(state.losses.device),
        "trainable_parameters": sum(parameter.numel() for parameter in state.encoder.parameters()),
    }


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
    # Neither bundled nor in a folder.
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base)
    load = base if on_hub else "the folder of " + base.removeprefix(LOCAL)
    how_to_ask = _NOTEBOOK
    if template := recorded_template(folder):
        reads_it = "enable_thinking" in template["chat_template"]
        thinking = f'"enable_thinking": {template["enable_thinking"]}, ' if reads_it else ""
        how_to_ask = _CHAT.format(load=load, adapter=ADAPTER_FILE, thinking=thinking)
    text = _CARD.read_text("utf-8").format(
        base_model=f"base_model: {base}\n" if on_hub else "",
        base=base.removeprefix(LOCAL),
        load=load,
        how_to_ask=how_to_ask,
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
        distilled=_distilled(settings["distilled"], settings["distill_alpha"]),
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


def _distilled(record: dict | None, alpha: float) -> str:
    """The card's line about the teacher, if there was one."""
    if record is None:
        return ""
    what = {"text": "the text", "prefix": "the prefix"}[record["kind"]]
    size = f"{record['tokens']:,} tokens, sha256 {record['sha256']}"
    mixed = f"; {alpha:g} of the training loss is the rows' own cross-entropy" if alpha else ""
    teacher = f"the base with {what} {record['name'].removeprefix(LOCAL)} in front of each row ({size})"
    return f"- **Teacher**: {teacher}; losses are KL(teacher || student) in nats per label{mixed}\n"


def _figures(records: list[dict], save_best: bool) -> str:
    """The last training loss, and the held-out figures of the frozen base and of the prefix that was saved, as Markdown."""
    losses, evaluations = _intervals(records), _evaluations(records, save_best)
    text = f"Loss on the training rows at step {losses[-1]['step']}: {losses[-1]['loss']:.4f}.\n" if losses else ""
    if not evaluations:
        return text
    if (match := evaluations[0].get("teacher_exact_match")) is not None:
        text += f"The teacher's exact match on held-out rows: {match:.4g}.\n"
    shown = [("frozen base", x) if x.get("frozen_base") else (f"this prefix, step {x['step']}", x) for x in evaluations]
    names = [name for name in ("eval_loss", "eval_perplexity", "eval_exact_match") if name in evaluations[-1]]
    rows = [f"| {title} |" + "".join(f" {record[name]:.4g} |" for name in names) for title, record in shown]
    head = "| on held-out rows | " + " | ".join(name.removeprefix("eval_").replace("_", " ") for name in names) + " |"
    return "\n".join([text, head, "|---" * (len(names) + 1) + "|", *rows, ""])


def _intervals(records: list[dict]) -> list[dict]:
    """The records of metrics.jsonl about training rows."""
    return [record for record in records if record.get("loss") is not None]


def _evaluations(records: list[dict], save_best: bool) -> list[dict]:
    """The records of metrics.jsonl about held-out rows: the frozen base's, then the saved prefix's."""
    evaluations = [record for record in records if record.get("eval_loss") is not None]
    frozen = [record for record in evaluations if record.get("frozen_base")]
    tuned = [record for record in evaluations if not record.get("frozen_base")]
    return frozen + (sorted(tuned, key=lambda record: record["eval_loss"])[:1] if save_best else tuned[-1:])


def what_was_learnt(records: list[dict], save_best: bool) -> str:
    """One line about a finished run: its losses before and after, and what to try if they fell by less than 1 %.

    records: the lines of metrics.jsonl.
    """
    # Each with a loss before and a loss after.
    pairs = []
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
