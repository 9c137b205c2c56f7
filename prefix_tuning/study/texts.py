"""What the page of the study says, in both languages: texts.json."""

import json
from pathlib import Path

from prefix_tuning.study.page import Text


class Texts:
    """The texts of a page by key, in Chinese and English, as they stand in a JSON file."""

    def __init__(self, path: Path):
        self.by_key: dict[str, dict[str, str]] = json.loads(path.read_text("utf-8"))

    def say(self, key: str, **values: object) -> Text:
        """A text with its {fields} filled in. A value that is itself a Text is inserted in the same language."""

        def fill(language: str) -> str:
            filled = {name: getattr(value, language) if isinstance(value, Text) else value for name, value in values.items()}
            return self.by_key[key][language].format(**filled)

        return Text(fill("zh"), fill("en"))


TEXTS = Texts(Path(__file__).with_name("texts.json"))
say = TEXTS.say
