"""What MkDocs does beside its plugins: formulas become MathML, and names in code may be broken between their parts."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_CODE = re.compile(r"(<pre>.*?</pre>)|<code>([^<]*)</code>", re.DOTALL)  # of blocks, which scroll, or in a sentence


def on_page_content(text: str, **_: Any) -> str:
    """A page's HTML, whose formulas browsers show without a script or a network, and which fits a phone."""
    return _CODE.sub(_breakable, _FORMULA.sub(_mathml, text))


def _mathml(found: re.Match) -> str:
    if found[2] == "(":
        return convert(html.unescape(found[3]), display="inline")
    return f'<div class="formula">{convert(html.unescape(found[3]), display="block")}</div>'


def _breakable(found: re.Match) -> str:
    """Code that is broken behind a dot, an underscore, a slash, a comma or "=", and not within a flag's first word."""
    if found[1]:
        return found[1]
    parts = re.sub(r"([._/=,])(?=[\w\"'(-])", r"\1<wbr>", found[2])
    parts = re.sub(r"--\w+", r'<span class="flag">\g<0></span>', parts)
    return f"<code>{parts}</code>"
