"""Reports as one page that needs nothing else: no script, no font, no other file."""

import html
from pathlib import Path

STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


def escape(value: object) -> str:
    return html.escape(str(value))


def frame(title: str, body: str) -> str:
    """The page around a body of `<header>` and `<section>`s."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style><main>{body}</main></html>\n'
    )
