"""HTML pages in one file that need no network and share one style.

Text from models and files is escaped. The content security policy of a page allows only its own script, by its hash.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

from gda.common.numbers import finite

TEMPLATES = Path(__file__).parent / "templates"


def page(
    template: Path, *, style: Path | None = None, script: Path | None = None, data: Any = None, **context: Any
) -> str:
    """Render a template that extends `page.html.jinja`. Every value is escaped.

    `style` and `script` are files, added to the common ones. `data` is given to the script as JSON; numbers that are
    not finite become null.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # of `tojson`, which also escapes markup
    look = _joined("look.css", style)
    code = "" if script is None else _joined("charts.js", script)
    text = environment.get_template(template.name).render(
        policy=_policy(look, code), style=look, script=code, data=finite(data), **context
    )
    return text.encode(errors="replace").decode()  # a file name may contain characters that UTF-8 cannot encode


def _joined(common: str, own: Path | None) -> str:
    paths = [TEMPLATES / common] if own is None else [TEMPLATES / common, own]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _policy(style: str, script: str) -> str:
    """A content security policy: nothing is fetched, and no other script runs."""
    allowed = [f"style-src {_hash(style)}", f"script-src {_hash(script)}" if script else "script-src 'none'"]
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
