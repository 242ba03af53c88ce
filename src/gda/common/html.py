"""Pages that need nothing else: one look, one file, no network. A leaf module: it imports no room.

What models and files say is data here. It is escaped in the markup, and the page's policy runs one script only, the one
whose hash it names.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2

from gda.common.numbers import finite

TEMPLATES = Path(__file__).parent / "templates"


def page(
    template: Path, *, style: Path | None = None, script: Path | None = None, data: Any = None, **context: Any
) -> str:
    """Render a template that extends `page.html.jinja`. Every value is escaped.

    Args:
        template: A file; what it extends or includes is looked up beside it and among the common ones.
        style: A style sheet of the page, after the common one.
        script: A file to run in the page, after the common charts.
        data: What the script reads, as JSON; numbers that are not finite become null.
        context: Values for the template.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    look = _joined("look.css", style)
    code = "" if script is None else _joined("charts.js", script)
    text = environment.get_template(template.name).render(
        policy=_policy(look, code), style=look, script=code, data="" if data is None else inert_json(data), **context
    )
    return text.encode(errors="replace").decode()  # a file's name may hold what no UTF-8 can


def inert_json(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _joined(common: str, own: Path | None) -> str:
    paths = [TEMPLATES / common] if own is None else [TEMPLATES / common, own]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _policy(style: str, script: str) -> str:
    """Nothing is fetched, and nothing runs but this script."""
    allowed = [f"style-src {_hash(style)}", f"script-src {_hash(script)}" if script else "script-src 'none'"]
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
