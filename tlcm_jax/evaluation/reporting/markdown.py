"""The score table of a report as Markdown, to be pasted where people talk about it."""

from tlcm_jax.evaluation.reporting.contents import Report
from tlcm_jax.evaluation.reporting.report import interval_text, score_text


def markdown_table(report: Report) -> str:
    """One row a contestant, one column a score; 95 % intervals where they are known."""
    columns = report.shown_columns
    if not columns:
        return "No scores were asked for.\n"
    head = [f"{column.group}: {column.title}" if column.group else column.title
            for column in columns]  # fmt: skip
    lines = [["", *head], ["---", *("---:" for _ in columns)]]
    for row in report.scores:
        cells = []
        for column in columns:
            interval = interval_text(column, row)
            cell = score_text(column, row.score(column.key))
            cells.append(f"{cell} ({interval})" if interval else cell)
        lines.append([row.label, *cells])
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)


def _escaped(text: str) -> str:
    """Text of a cell: names of prompt sets are whatever their files are called."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
