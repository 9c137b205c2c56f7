"""What the page says, in both languages: texts.json, with its {fields} filled in."""

import json
from pathlib import Path

from prefix_tuning.study.page import Text

TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text("utf-8"))


def say(key: str, **values: object) -> Text:
    """A text of texts.json with its {fields} filled in; a value that is a Text is so in its language."""

    def of(language: str) -> str:
        filled = {name: getattr(value, language) if isinstance(value, Text) else value for name, value in values.items()}
        return TEXTS[key][language].format(**filled)

    return Text(of("zh"), of("en"))
