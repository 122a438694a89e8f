"""Files of every kind that hold the same documents."""

import gzip
import json

TEXTS = ["a long text ?", "", "a", "long\r\nlong", "ß € \u65e5"]


def json_lines(texts, field="text"):
    return b"".join(json.dumps({"id": 1, field: t}).encode() + b"\n" for t in texts)


def write_parquet(path, texts, *, type=None, row_group_rows=2):
    import pyarrow
    from pyarrow import parquet

    column = pyarrow.array(texts, type or pyarrow.string())
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    parquet.write_table(
        table,
        path,
        row_group_size=row_group_rows,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )


def write_arrow(path, texts, *, file_format=False):
    import pyarrow
    from pyarrow import ipc

    table = pyarrow.table({"text": texts})
    new = ipc.new_file if file_format else ipc.new_stream
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_dataset(folder, texts):
    """As `datasets` 4 saves one, in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    half = len(texts) // 2
    write_arrow(folder / names[0], texts[:half])
    write_arrow(folder / names[1], texts[half:])
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {}}')


def write_every_kind(folder, texts):
    """One file or folder a kind; returns where each is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jsonl").write_bytes(json_lines(texts))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(texts)))
    (folder / "c.json.gz").write_bytes(gzip.compress(json_lines(texts)))
    write_parquet(folder / "d.parquet", texts)
    write_arrow(folder / "e.arrow", texts)
    write_arrow(folder / "f.arrow", texts, file_format=True)
    write_dataset(folder / "g", texts)
    return sorted(folder.iterdir())
