from pathlib import Path

from prefix_tuning import bundled
from prefix_tuning.training.settings import TrainConfig

MODELS, DATASETS = (*bundled.MODELS, bundled.READER), (*bundled.DATASETS, bundled.SHEET_QUESTIONS)
NAMES = [*MODELS, "bundled:sheet", *DATASETS, *(f"{name}-eval" for name in DATASETS)]


def test_a_bundled_name_is_a_path_that_is_there_and_back():
    assert all(Path(bundled.resolve(name), "config.json").is_file() for name in MODELS)
    for name in NAMES:
        path = Path(bundled.resolve(name))
        assert path.exists() and bundled.name_of(path.resolve()) == name
    assert len({bundled.resolve(name) for name in NAMES}) == len(NAMES)


def test_other_names_stay_what_they_are(tmp_path):
    for name in ("Langboat/bloom-1b4-zh", "rows.jsonl", str(tmp_path), "bundled:nothing"):
        assert bundled.resolve(name) == name
    assert bundled.name_of(tmp_path) is None


def test_the_demos_settings_are_settings_that_differ_from_the_defaults():
    for settings in (bundled.SETTINGS, bundled.SHEET_SETTINGS):
        assert all(value != getattr(TrainConfig, name) for name, value in settings.items())


def test_the_demos_steps_have_the_rows_that_the_readme_says():
    settings = bundled.SETTINGS
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 32
