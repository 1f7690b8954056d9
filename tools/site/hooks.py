"""What MkDocs does beside its plugins: formulas become MathML, which browsers show without a script or a network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """A page's HTML with each formula that arithmatex has marked as a MathML element."""
    return _FORMULA.sub(_mathml, text)


def _mathml(found: re.Match) -> str:
    return convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")
