"""Lines of results: what is written is read, what was cut off is replaced."""

from benchmarks.rows import add_row, read_rows


def test_rows_come_back_and_one_that_was_cut_off_is_written_again(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == read_rows(None) == []
    add_row(None, {"pair": 0})
    rows = [{"pair": 0, "dice": 0.5}, {"pair": 1, "dice": 0.25}]
    for row in rows:
        add_row(file, row)
    assert read_rows(file) == rows
    whole = file.read_text()
    file.write_text(whole[:-5])
    assert read_rows(file) == rows[:1]
    add_row(str(file), rows[1])
    assert file.read_text() == whole
    file.write_text(whole[:-1])  # all but the line break
    assert read_rows(file) == rows
    add_row(file, rows[0])
    assert read_rows(file) == [*rows, rows[0]]
