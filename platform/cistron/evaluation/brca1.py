"""Saturation genome editing of BRCA1: 3,893 single-nucleotide variants and what each does to the protein's function.

The table is supplementary table 1 of Findlay et al. 2018 (doi:10.1038/s41586-018-0461-z). It is the publisher's, so it
is read from where the user keeps it. Positions are those of GRCh37. Loss of function is what a score should find;
functional and intermediate variants are the others, as in published evaluations of DNA language models.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Final

from cistron.errors import InputError
from cistron.inference.windows import Variant
from cistron.io.sheet import read_sheet
from cistron.io.storage import PathLike

FUNCTION_CLASSES: Final = ("FUNC", "INT", "LOF")
"""Functional, intermediate, loss of function."""

_COLUMNS: Final = {
    "chrom": ("chrom", "chromosome"),
    "pos": ("pos", "position (hg19)", "pos_hg19"),
    "ref": ("ref", "reference"),
    "alt": ("alt",),
    "consequence": ("consequence",),
    "function_class": ("class", "func.class", "func_class"),
}
"""Names of the columns: plain ones, those of the published sheet, and those of a common extract of it."""

_TITLE_ROWS: Final = 10


@dataclass(frozen=True, slots=True)
class EditedVariant:
    """A variant and what the experiment found.

    Attributes:
        variant: on GRCh37.
        consequence: such as ``Missense``.
        function_class: one of :data:`FUNCTION_CLASSES`.
    """

    variant: Variant
    consequence: str
    function_class: str

    @property
    def is_loss_of_function(self) -> bool:
        """Whether the variant is to be found."""
        return self.function_class == "LOF"


def read_edited_variants(path: PathLike) -> list[EditedVariant]:
    """Read the table, an .xlsx, CSV or TSV file; rows above the header are skipped.

    Raises:
        InputError: no such file, a column that is missing, or a row that cannot be read; names the row.
    """
    rows = enumerate(read_sheet(path), 1)
    places = None
    for _, cells in islice(rows, _TITLE_ROWS):
        if places := _places(cells):
            break
    if not places:
        wanted = ", ".join(" or ".join(map(repr, names)) for names in _COLUMNS.values())
        raise InputError(f"{path}: no header with the columns {wanted} in the first {_TITLE_ROWS} rows")
    found = [_parsed(path, number, cells, places) for number, cells in rows if any(cells)]
    if not found:
        raise InputError(f"{path}: there are no rows below the header")
    return found


def _places(cells: list[str]) -> dict[str, int] | None:
    """Return the place of each column in a header, or None when the row is not one."""
    by_name = {cell.strip().lower(): place for place, cell in enumerate(cells)}
    found = {column: by_name[name] for column, names in _COLUMNS.items() for name in names[::-1] if name in by_name}
    return found if len(found) == len(_COLUMNS) else None


def _parsed(path: PathLike, number: int, cells: list[str], places: dict[str, int]) -> EditedVariant:
    if len(cells) <= max(places.values()):
        raise InputError(f"{path}, row {number}: only {len(cells)} cells")
    cell = {column: cells[place].strip() for column, place in places.items()}
    if not cell["pos"].isdecimal():
        raise InputError(f"{path}, row {number}: the position must be a whole number, got {cell['pos']!r}")
    if cell["function_class"] not in FUNCTION_CLASSES:
        allowed = ", ".join(FUNCTION_CLASSES)
        raise InputError(f"{path}, row {number}: the class must be one of {allowed}, got {cell['function_class']!r}")
    variant = Variant(cell["chrom"], int(cell["pos"]), cell["ref"], cell["alt"])
    return EditedVariant(variant, cell["consequence"], cell["function_class"])
