"""OpenAI's `prediction`: text the client expects in the answer. It is used as a draft and never changes the answer."""

from __future__ import annotations

from typing import Literal

from server.openai.messages import Text
from server.openai.strict import Strict


class Prediction(Strict):
    type: Literal["content"]
    content: Text

    def text(self) -> str:
        return "".join(part.text for part in self.content)
