"""Files of others: what they claim decides neither memory nor time."""

import io
import json
import os
import random
import resource
import zipfile

import numpy as np
import pytest
from dhcl.config import ConfigError, load_config
from dhcl.inference.features import FeatureError, read_features
from dhcl.inference.hub import is_model_folder, read_folder
from dhcl.npy import read_npy
from dhcl.stored import Damaged, checksum, open_stored, parse_json, read_json, read_text

ROWS = np.arange(12, dtype="f4").reshape(4, 3)


def test_regular_files_alone_are_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("a")
    with open_stored(tmp_path / "link", 3) as file:
        assert file.read() == b"abc"
    with pytest.raises(Damaged, match=r"no larger than 2 bytes \(got 3\)"):
        open_stored(tmp_path / "a", 2)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("fifo", "zero", "."):
        with pytest.raises(Damaged, match="must be a regular file"):
            open_stored(tmp_path / name)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(FileNotFoundError):
        open_stored(tmp_path / "none")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 6000, "{", "", '{"a":' * 50_000])
def test_json_that_is_none(text, tmp_path):
    with pytest.raises(Damaged, match="JSON"):
        parse_json(text)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Damaged, match=r"^a\.json, .*JSON"):
        read_json(tmp_path / "a.json")


def test_text_of_another_encoding(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(Damaged, match="a is not text"):
        read_text(tmp_path / "a")
    assert read_text(tmp_path / "a", errors="replace") == "\ufffd\ufffd"


def test_a_checksum_goes_on(monkeypatch):
    monkeypatch.setattr("dhcl.stored._PIECE", 7)
    assert checksum(b"123456789") == 0xCBF43926  # the check value of CRC-32
    assert checksum(ROWS[2:], checksum(ROWS[:2])) == checksum(ROWS.tobytes())


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("array", [ROWS, np.asfortranarray(ROWS), np.array(["a", "bc"])])
def test_arrays_are_read_as_they_were_saved(array, mapped, tmp_path):
    np.save(tmp_path / "a.npy", array)
    read = read_npy(tmp_path / "a.npy", mapped)
    assert read.dtype == array.dtype
    assert np.array_equal(read, array)
    assert isinstance(read, np.memmap) == mapped


OPTIONS = {
    "a zero byte in a path": 'out: "a\\0b"',
    "deep": "epochs: " + "[" * 5000,
    "deep, closed": "epochs: " + "[" * 5000 + "]" * 5000,
    "digits": "epochs: " + "1" * 6000,
    "hexadecimal": "epochs: 0x" + "f" * 6000,
    "aliases": "a0: &a0 [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(12)),
    "itself": "epochs: &a [*a]",
    "no date": "epochs: 2020-99-99",
    "a tag": "epochs: !!timestamp x",
    "another tag": "epochs: !!bool x",
    "code": "epochs: !!python/object/apply:os.system [ls]",
    "values": "epochs: [" + "1," * 20_000 + "1]",
    "bytes": "#" * (1 << 20) + "\nepochs: 3",
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_are_none(case, tmp_path):
    (tmp_path / "a.yaml").write_text(OPTIONS[case])
    with pytest.raises(ConfigError, match=r"a\.yaml") as caught:
        load_config(tmp_path / "a.yaml")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["fifo", "zero", "folder"])
def test_options_in_what_is_no_file(name, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="must be a regular file"):
        load_config(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "1" * 6000 + "}"])
def test_a_model_s_description_that_is_none(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert not is_model_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json can't be read"):
        read_folder(tmp_path)


# ---- features -----------------------------------------------------------------------------------


def header(shape, kind="<f4"):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize("shape", [(2**42, 3), (2**62, 2**62), (-4, 3), (5, 3)])
@pytest.mark.parametrize("kind", [".npy", ".npz"])
def test_a_header_that_claims_what_is_not_there(kind, shape, tmp_path):
    data, file = header(shape) + ROWS.tobytes(), tmp_path / f"a{kind}"
    file.write_bytes(data)
    if kind == ".npz":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("features.npy", data)
    with pytest.raises(FeatureError, match=r"a\.np. .*can't be read|must have"):
        read_features(file)


def zeros(archive, name, rows):
    """A member of so many rows of 4 MiB, packed to a thousandth."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        file.write(header((rows, 1 << 20)))
        for _ in range(rows):
            file.write(bytes(1 << 22))


def test_members_that_nobody_asks_for_take_no_memory(tmp_path):
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        zeros(archive, "unused", 300)
        buffer = io.BytesIO()
        np.save(buffer, ROWS)
        archive.writestr("features.npy", buffer.getvalue())
        archive.writestr("notes.txt", "no array")
    assert file.stat().st_size < 10 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = read_features(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # in KiB
    assert read.keys == ("unused", "features")
    assert np.array_equal(read.values, ROWS)
    with pytest.raises(FeatureError, match=r"'unused' in .* unpack to no more than"):
        read_features(file, key="unused")


@pytest.mark.parametrize("kind", [".npy", ".npz"])
def test_damaged_features_are_named(kind, tmp_path):
    file, chance = tmp_path / f"a{kind}", random.Random(kind)
    np.save(file, ROWS) if kind == ".npy" else np.savez_compressed(file, features=ROWS, ids=[1] * 4)
    whole = file.read_bytes()
    for _ in range(int(os.environ.get("DHCL_FUZZ", 150))):
        data = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.randrange(8)):
            if data:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            read = read_features(file)
        except FeatureError:
            continue
        assert read.values.isfinite().all()
        # A .npy file has no checksum, each member of a .npz file has one.
        assert kind == ".npy" or np.array_equal(read.values, ROWS)
    file.write_bytes(whole)
    assert json.dumps(read_features(file).values.tolist()) == json.dumps(ROWS.tolist())


MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
)


@pytest.mark.parametrize("text", [MERGES, "- 1\n" * 200_000, "a: &a [" + "*a, " * 50_000 + "]"])
def test_yaml_that_stands_for_more_than_options_ends_early(tmp_path, text):
    (tmp_path / "o.yaml").write_text(text)
    # PyYAML merges a key once since 6.0.4; then the first option is one that there is not.
    with pytest.raises(ConfigError, match=r"at most 10,000 values|none called 'a0'"):
        load_config(tmp_path / "o.yaml")


def test_options_may_be_merged(tmp_path):
    (tmp_path / "o.yaml").write_text("<<: [{seed: 1}, {epochs: 7}]\nseed: 2\n")
    options = load_config(tmp_path / "o.yaml")
    assert (options.seed, options.epochs) == (2, 7)
