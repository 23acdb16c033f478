"""Published rows to stand beside ours, as they are printed in METRO (arXiv 2204.06644)."""

from __future__ import annotations

GLUE_COLUMNS = ("MNLI-m/mm", "QQP", "QNLI", "SST-2", "CoLA", "RTE", "MRPC", "STS-B")
SUPERGLUE_COLUMNS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")
SQUAD_COLUMN = "SQuAD 2.0"
AVERAGES = ("AVG Large", "AVG All")

GLUE_DEV = """
XLNet base, Table 6             | 86.8      | 91.4 | 91.7 | 94.7 | 60.2 | 74.0 | 88.2 | 89.5 | -    | 84.6 | 80.2/-
RoBERTa base, Table 6           | 87.6      | 91.9 | 92.8 | 94.8 | 63.6 | 78.7 | 90.2 | 91.2 | -    | 86.4 | 80.5/83.7
UniLM V2 base, Table 6          | 88.5      | 91.7 | 93.5 | 95.1 | 65.2 | 81.3 | 91.8 | 91.0 | -    | 87.1 | 83.3/86.1
DeBERTa base, Table 6           | 88.8/88.5 | -    | -    | -    | -    | -    | -    | -    | -    | -    | 83.1/86.2
COCO-LM base++, Table 6         | 90.2/90.0 | 92.2 | 94.2 | 94.6 | 67.3 | 87.4 | 91.2 | 91.8 | -    | 88.6 | 85.4/88.1
METRO-LM base++, Table 6        | 90.3/90.2 | 92.4 | 94.4 | 95.9 | 71.8 | 88.1 | 91.4 | 92.0 | -    | 89.5 | 85.9/88.5
XLNet large, Table 6            | 90.8/90.8 | 92.3 | 94.9 | 97.0 | 69.0 | 85.9 | 90.8 | 92.5 | -    | 89.2 | 87.9/90.6
RoBERTa large, Table 6          | 90.2/90.2 | 92.2 | 94.7 | 96.4 | 68.0 | 86.6 | 90.9 | 92.4 | -    | 88.9 | 86.5/89.4
ELECTRA large, Table 6          | 90.9      | 92.4 | 95.0 | 96.9 | 69.1 | 88.0 | 90.8 | 92.6 | -    | 89.4 | 88.0/90.6
DeBERTa large, Table 6          | 91.1/91.1 | 92.3 | 95.3 | 96.8 | 70.5 | -    | -    | -    | -    | -    | 88.0/90.7
COCO-LM large++, Table 6        | 91.4/91.6 | 92.8 | 95.7 | 96.9 | 73.9 | 91.0 | 92.2 | 92.7 | -    | 90.8 | 88.2/91.0
METRO-LM large++, Table 6       | 91.7/91.7 | 92.9 | 95.8 | 96.3 | 75.2 | 93.1 | 92.2 | 92.8 | -    | 91.3 | 88.5/91.1
Megatron 1.3B, Table 6          | 90.9/91.0 | 92.6 | -    | -    | -    | -    | -    | -    | -    | -    | 87.1/90.2
Megatron 3.9B, Table 6          | 91.4/91.4 | 92.7 | -    | -    | -    | -    | -    | -    | -    | -    | 88.5/91.2
DeBERTa 1.5B, Table 6           | 91.7/91.9 | 92.7 | 96.0 | 97.2 | 72.0 | -    | -    | -    | -    | -    | 89.7/92.2
METRO-LM XL++, Table 6          | 92.2/92.0 | 93.2 | 96.3 | 97.3 | 76.0 | 93.5 | 91.7 | 93.0 | -    | 91.6 | 89.4/92.1
METRO-LM XXL++, Table 6         | 92.3/92.4 | 93.1 | 96.5 | 97.3 | -    | -    | -    | -    | -    | -    | 89.7/92.4
ELECTRA base, Table 2           | 86.9/86.7 | -    | -    | -    | -    | -    | -    | -    | 91.2 | 85.5 | 80.5/83.3
COCO-LM base, Table 2           | 88.5/88.3 | -    | -    | -    | -    | -    | -    | -    | 91.7 | 87.2 | 82.4/85.2
METRO-LM base, Table 2          | 89.0/88.8 | -    | -    | -    | -    | -    | -    | -    | 92.4 | 88.7 | 84.3/87.2
"""
"""Development sets, single tasks; of METRO-LM the median of five seeds. AVG All is what Table 6 calls AVG."""

SUPERGLUE_DEV = """
METRO-LM XXL, best on dev, Table 8 | 91.9 | 95.7/98.2 | 97.0 | 88.0/62.6 | 96.2/95.7 | 95.7 | 77.0 | 97.1
"""
"""With PDR, multi-task training and staging: no median."""


def published_rows(table: str, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Cells by row and column; what is not printed is left out."""
    rows = {}
    for line in table.strip().splitlines():
        name, *cells = (cell.strip() for cell in line.split(" | "))
        rows[name] = {column: cell for column, cell in zip(columns, cells, strict=True) if cell != "-"}
    return rows


GLUE_ROWS = published_rows(GLUE_DEV, (*GLUE_COLUMNS, *AVERAGES, SQUAD_COLUMN))
SUPERGLUE_ROWS = published_rows(SUPERGLUE_DEV, SUPERGLUE_COLUMNS)
