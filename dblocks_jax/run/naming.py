"""Names that strangers chose, of files, classes and fields: how they are shown, and how a flag lists them."""

import os


def shown(name: object) -> str:
    """A name as one line that is safe in a terminal, a log, a page and a picture.

    What does not print (ESC, newline, marks that turn the direction of writing, bytes that are no text) becomes its
    Python escape, such as \\x1b. Everything else stays as it is.
    """
    return _escaped(str(name), kept="")


def shown_lines(text: object) -> str:
    """A whole message that may hold such names, shown likewise; its line breaks and tabs stay."""
    return _escaped(str(text), kept="\n\t")


def _escaped(text: str, kept: str) -> str:
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in kept else _escape(each) for each in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is no text
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def split_names(text: str) -> list[str]:
    """Names of files with commas between. One that is there with commas in it is one name, the longest such first."""
    parts, names = text.split(","), []
    start = 0
    while start < len(parts):
        ends = range(len(parts), start + 1, -1)
        end = next((end for end in ends if os.path.lexists(",".join(parts[start:end]))), start + 1)
        names.append(",".join(parts[start:end]))
        start = end
    return [name for name in names if name]
