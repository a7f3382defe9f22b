"""Static HTML pages: nothing is fetched, no scripts."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from .files import write_text

_STYLE = "body{font:15px sans-serif;margin:2em;max-width:1200px}img{max-width:100%}td,th{padding:.2em .8em}"


def write_page(path: Path, title: str, parts: list[str]) -> Path:
    """An HTML file of a headline and parts, which are HTML."""
    head = f'<meta charset="utf-8"><title>{text(title)}</title><style>{_STYLE}</style>'
    body = f"<h1>{text(title)}</h1>{''.join(parts)}"
    write_text(path, f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n")
    return path


def text(value: object) -> str:
    """As HTML shows it; file names that are no UTF-8 with a mark for what is not."""
    return escape(str(value).encode(errors="surrogateescape").decode(errors="replace"))


def address(path: Path) -> str:
    """Of a file beside the page or below it."""
    return quote(os.fsencode(path.as_posix()))


def table(head: list[str], rows: list[list[str]]) -> str:
    """Of cells that are HTML."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)]
    lines += ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
