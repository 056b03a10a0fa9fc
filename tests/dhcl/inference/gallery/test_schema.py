"""Rows as Arrow columns: what is written is read again, and what has changed is found."""

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from dhcl.inference.gallery.schema import (
    Record,
    arrow_batch,
    arrow_schema,
    checked_features,
    checked_records,
    read,
    written,
)
from dhcl.stored import Damaged

WIDTH = 6
RECORDS = [
    Record(0, "a/1.png", 7, 2, 100, 10**18, 3.5),
    Record(1, os.fsdecode(b"caf\xe9 \xf4\x8f\xba\x80.png"), 'who\'s "that"', -1, 0, -1),
    Record(0, "人/%_\\ '; --.jpg", -1, "left\n", 2**62, 0, -0.0),
]


def features(count):
    rows = np.random.default_rng(0).normal(size=(count, WIDTH)).astype("f4")
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def batch():
    return arrow_batch(np.array([4, 5, 9]), features(3), RECORDS, "ab" * 32)


def test_rows_are_read_as_they_were_written(batch):
    assert batch.schema.equals(arrow_schema(WIDTH))
    assert checked_records(batch, "ab" * 32, 2) == RECORDS
    rows, found = checked_features(batch, WIDTH)
    assert rows.tolist() == [4, 5, 9]
    assert np.array_equal(found, features(3))
    part = batch.slice(1, 2)
    assert checked_records(part, "ab" * 32, 2) == RECORDS[1:]
    assert np.array_equal(checked_features(part, WIDTH)[1], features(3)[1:])


def test_names_of_any_bytes_are_text_that_is_utf8():
    for name in (os.fsdecode(bytes(range(1, 256))), "\U0010fe80\udc80", "plain ä 人", ""):
        assert read(written(name)) == name
        written(name).encode()
    assert written("plain ä 人") == "plain ä 人"
    with pytest.raises(ValueError, match="surrogates not allowed"):
        written("\ud800")


def changed(batch, name, value):
    values = batch[name].to_pylist()
    values[1] = value
    place = batch.schema.get_field_index(name)
    return batch.set_column(place, batch.schema.field(name), pa.array(values, batch[name].type))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("row", 6), ("root", 0), ("path", "b.png"), ("id", "8"), ("camera", "1")),
        *(("time", 1.0), ("size", 1), ("mtime_ns", 2), ("about_sum", 3), ("model", "cd" * 32)),
    ],
)
def test_a_changed_column_is_found(batch, name, value):
    with pytest.raises(Damaged, match="checksum"):
        checked_records(changed(batch, name, value), "ab" * 32, 2)


def test_a_changed_feature_is_found(batch):
    row = features(3)[1]
    row[2] = np.nextafter(row[2], np.float32(2))
    with pytest.raises(Damaged, match=r"feature of row 5 .* checksum"):
        checked_features(changed(batch, "feature", row), WIDTH)
    with pytest.raises(Damaged, match=r"feature of row 6 .* checksum"):
        checked_features(changed(batch, "row", 6), WIDTH)
    with pytest.raises(Damaged, match=r"not \(n, 5\)"):
        checked_features(batch, 5)


def test_rows_that_no_index_would_read_are_not_written():
    rows = features(3)
    rows[1, 0] = np.nan
    with pytest.raises(Damaged, match=r"length 1 \(got nan in row 5\)"):
        arrow_batch(np.array([4, 5, 9]), rows, RECORDS, "ab")
    for path in ("", ".", "/etc/passwd", "../x", "a/../../x", "a\0b"):
        with pytest.raises(ValueError, match="below its root"):
            arrow_batch(np.array([1]), features(1), [replace(RECORDS[0], path=path)], "ab")


def test_rows_of_another_model_or_folder_are_refused(batch):
    with pytest.raises(Damaged, match="row 4 is of the model ab"):
        checked_records(batch, "cd" * 32, 2)
    with pytest.raises(Damaged, match="row 5 names a root beyond the 1 there are"):
        checked_records(batch, "ab" * 32, 1)
