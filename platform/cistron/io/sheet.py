"""Rows of a spreadsheet as text: CSV, TSV (plain or compressed) or the first sheet of an .xlsx file."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator
from typing import Final
from xml.etree import ElementTree

from cistron.errors import InputError
from cistron.io import storage
from cistron.io.compressed import open_decompressed
from cistron.io.storage import PathLike

_DELIMITERS: Final = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_XLSX: Final = ".xlsx"
_SHEET: Final = "xl/worksheets/sheet1.xml"
_STRINGS: Final = "xl/sharedStrings.xml"
_COLUMN: Final = re.compile(r"[A-Z]+")


def read_sheet(path: PathLike) -> Iterator[list[str]]:
    """Yield the rows; a cell that is not there is an empty string.

    Raises:
        InputError: no such file, a name that says no known format, or a file that is not of it.
    """
    text = str(path).removesuffix(".gz")
    if text.endswith(_XLSX):
        yield from _xlsx_rows(path)
        return
    delimiter = next((mark for suffix, mark in _DELIMITERS.items() if text.endswith(suffix)), None)
    if delimiter is None:
        raise InputError(f"{path}: tables are read from files named {', '.join(_DELIMITERS)} (also .gz) and {_XLSX}")
    with open_decompressed(path) as stream:
        yield from csv.reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter)


def _xlsx_rows(path: PathLike) -> Iterator[list[str]]:
    """Yield the rows of the first sheet: ECMA-376 part 1, 18.3 (cells) and 18.4 (shared strings)."""
    try:
        with zipfile.ZipFile(io.BytesIO(storage.read_bytes(path))) as book:
            names = set(book.namelist())
            strings = _shared_strings(book.read(_STRINGS)) if _STRINGS in names else []
            sheet = ElementTree.fromstring(book.read(_SHEET))
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise InputError(f"{path}: not an .xlsx file that can be read ({error})") from error
    for row in sheet.iterfind(".//{*}row"):
        cells: list[str] = []
        for cell in row.iterfind("{*}c"):
            column = _column_number(cell.get("r", ""), default=len(cells))
            cells += [""] * (column - len(cells))
            cells.append(_cell_text(cell, strings))
        yield cells


def _shared_strings(content: bytes) -> list[str]:
    return ["".join(part.text or "" for part in item.iterfind(".//{*}t")) for item in ElementTree.fromstring(content)]


def _cell_text(cell: ElementTree.Element, strings: list[str]) -> str:
    if cell.get("t") == "inlineStr":
        return "".join(part.text or "" for part in cell.iterfind(".//{*}t"))
    value = cell.find("{*}v")
    text = "" if value is None else value.text or ""
    return strings[int(text)] if cell.get("t") == "s" and text else text


def _column_number(reference: str, *, default: int) -> int:
    """Return the column of a cell from 0: ``A7`` is 0, ``AA7`` is 26."""
    letters = _COLUMN.match(reference)
    if letters is None:
        return default
    number = 0
    for letter in letters[0]:
        number = number * 26 + ord(letter) - ord("A") + 1
    return number - 1
