"""English text to compare predictions on."""

from __future__ import annotations

import re
from pathlib import Path


def default_text() -> tuple[str, str]:
    """``(name, text)``: the prose of the Python language reference, which every Python brings along in ``pydoc_data``."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    prose = [re.sub(r"\s+", " ", part).strip() for part in paragraphs if is_prose(part)]
    return "the Python language reference (pydoc_data)", "\n\n".join(prose)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running text, and no heading, code, grammar or table."""
    text = paragraph.strip()
    words = re.findall(r"[A-Za-z]+", text)
    return len(text) > 200 and len("".join(words)) > 0.7 * len(text) and "::=" not in text and ">>>" not in text


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises ``ValueError`` if it is none or empty, ``OSError`` if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
