from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from cistron.errors import InputError
from cistron.io.sheet import read_sheet

NAMESPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
SHEET = f"""<worksheet {NAMESPACE}><sheetData>
<row r="1"><c r="A1" t="s"><v>0</v></c><c r="C1" t="s"><v>1</v></c></row>
<row r="2"><c r="B2"><v>41276135</v></c><c r="AB2" t="inlineStr"><is><t>x</t></is></c></row>
<row r="3"><c r="A3" t="str"><v>a&lt;b</v></c><c r="B3"/></row>
</sheetData></worksheet>"""
STRINGS = f"<sst {NAMESPACE}><si><t>pos</t></si><si><r><t>two </t></r><r><t>runs</t></r></si></sst>"


def test_the_first_sheet_of_a_workbook(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as book:
        book.writestr("xl/worksheets/sheet1.xml", SHEET)
        book.writestr("xl/sharedStrings.xml", STRINGS)
    assert list(read_sheet(tmp_path / "t.xlsx")) == [
        ["pos", "", "two runs"],
        ["", "41276135", *[""] * 25, "x"],
        ["a<b", ""],
    ]


@pytest.mark.parametrize(("name", "mark"), [("t.csv", ","), ("t.tsv", "\t")])
def test_text(tmp_path: Path, name: str, mark: str):
    (tmp_path / name).write_bytes(f'\ufeffa{mark}"b {mark}c"\r\n1{mark}\r\n'.encode())
    assert list(read_sheet(tmp_path / name)) == [["a", f"b {mark}c"], ["1", ""]]


@pytest.mark.parametrize(
    ("name", "message"), [("t.ods", "tables are read from files named .csv"), ("t.xlsx", "not an .xlsx file")]
)
def test_other_files(tmp_path: Path, name: str, message: str):
    (tmp_path / name).write_text("PK no zip")
    with pytest.raises(InputError, match=message):
        list(read_sheet(tmp_path / name))
