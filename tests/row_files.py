"""Files of rows, in the form that their suffix says."""

import gzip
import json

import pytest

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_array(rows):
    return json.dumps(rows, indent=1).encode()


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write_rows(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    else:
        content = as_array(rows) if path.suffix == ".json" else as_lines(rows)
        content = gzip.compress(content) if path.suffix == ".gz" else content
        path.write_bytes(zstd(content) if path.suffix == ".zst" else content)
    return path
