import io
import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from dhcl.cli import main
from dhcl.errors import FeatureError
from dhcl.files import NpyRows
from dhcl.inference.features import check_pair, common_numbers, read_features
from dhcl.inference.writing import feature_writer

ROWS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
IDS = [3, 3, -1, 5, 5, 5]
PATHS = [f"a b/ü{i}.jpg" for i in range(6)]


def write(path, **content):
    content = {"features": ROWS, "ids": np.array(IDS), "paths": np.array(PATHS), **content}
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".pt":
        content["paths"] = PATHS
        torch.save(
            {k: torch.from_numpy(v) if k != "paths" else v for k, v in content.items()}, path
        )
    elif path.suffix == ".mat":
        from scipy.io import savemat

        savemat(path, content)
    else:
        import pyarrow
        from pyarrow import parquet

        content["features"] = list(content["features"])
        parquet.write_table(pyarrow.table(content), path)
    return path


@pytest.mark.parametrize("kind", [".npz", ".pt", ".mat", ".parquet"])
def test_every_kind_of_file_gives_the_same(kind, tmp_path):
    found = read_features(write(tmp_path / f"f{kind}"))
    assert torch.equal(found.values, torch.from_numpy(ROWS))
    assert found.ids.tolist() == IDS
    assert found.ids.dtype == np.int64
    assert list(found.paths) == PATHS
    assert found.cameras is None
    assert torch.allclose(found.unit().norm(dim=1), torch.ones(6))


def test_bare_arrays(tmp_path):
    np.save(tmp_path / "f.npy", ROWS.astype(np.float64))
    torch.save(torch.from_numpy(ROWS).bfloat16(), tmp_path / "f.pt")
    assert torch.equal(read_features(tmp_path / "f.npy").values, torch.from_numpy(ROWS))
    rounded = torch.from_numpy(ROWS).bfloat16().float()
    assert torch.equal(read_features(tmp_path / "f.pt").values, rounded)
    assert read_features(tmp_path / "f.npy").ids is None


def test_arrays_in_a_torch_file(tmp_path):
    content = {"features": ROWS, "ids": np.array(IDS), "paths": PATHS, "mAP": np.float64(0.5)}
    torch.save(content, tmp_path / "f.pt")
    found = read_features(tmp_path / "f.pt")
    assert torch.equal(found.values, torch.from_numpy(ROWS))
    assert found.ids.tolist() == IDS
    torch.save(content | {"how": os.system}, tmp_path / "f.pt")
    with pytest.raises(FeatureError, match=r"posix\.system; code that a file names is not run"):
        read_features(tmp_path / "f.pt")


def test_a_file_of_both_sides_and_matlabs_shapes(tmp_path):
    from scipy.io import savemat

    both = {"query_f": ROWS[:2], "query_label": [[3.0, 5.0]], "query_cam": [[1, 2]]}
    both |= {
        "gallery_f": ROWS,
        "gallery_label": np.array(IDS)[None],
        "gallery_cam": np.ones((6, 1)),
    }
    savemat(tmp_path / "both.mat", both)
    query = read_features(tmp_path / "both.mat", role="query")
    gallery = read_features(tmp_path / "both.mat", role="gallery")
    assert query.ids.tolist() == [3, 5]
    assert query.cameras.tolist() == [1, 2]
    assert gallery.ids.tolist() == IDS
    assert len(gallery) == 6


def test_the_only_matrix_of_floats_needs_no_name_and_a_key_chooses(tmp_path):
    np.savez(tmp_path / "one.npz", stuff=ROWS, pids=np.array(IDS))
    assert read_features(tmp_path / "one.npz").ids.tolist() == IDS
    np.savez(tmp_path / "two.npz", stuff=ROWS, other=2 * ROWS)
    with pytest.raises(FeatureError, match="it holds: 'stuff', 'other'"):
        read_features(tmp_path / "two.npz")
    chosen = read_features(tmp_path / "two.npz", key="other")
    assert torch.equal(chosen.values, torch.from_numpy(2 * ROWS))
    with pytest.raises(FeatureError, match="there is no 'third'"):
        read_features(tmp_path / "two.npz", key="third")


NAN = np.where(np.arange(24).reshape(6, 4) == 13, np.nan, ROWS)
MISTAKES = {
    "nan": ({"features": NAN}, "nan or inf in row 3, 1 such rows"),
    "one dimension": ({"features": ROWS[0]}, r"must be \(N, d\).*shape \(4,\)"),
    "no rows": ({"features": ROWS[:0]}, r"shape \(0, 4\)"),
    "text": ({"features": np.full((6, 4), "x")}, "must be numbers"),
    "too few ids": ({"ids": np.array([1, 2])}, r"'ids'.* must be 6 values.*shape \(2,\)"),
    "a matrix of ids": ({"ids": np.ones((6, 6), int)}, r"shape \(6, 6\)"),
    "half an id": ({"ids": np.full(6, 0.5)}, "whole numbers or texts"),
    "too few cameras": ({"cameras": np.arange(5)}, "'cameras'"),
    "too few paths": ({"paths": np.array(["a"])}, r"'paths'.* must be 6 paths.*got 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_files_are_named(mistake, tmp_path):
    content, message = MISTAKES[mistake]
    with pytest.raises(FeatureError, match=message):
        read_features(write(tmp_path / "f.npz", **content))


def test_files_that_are_no_features(tmp_path):
    with pytest.raises(FeatureError, match=r"no such file.*none\.npy"):
        read_features(tmp_path / "none.npy")
    (tmp_path / "f.txt").write_text("1 2")
    with pytest.raises(FeatureError, match=r"must be one of \.npy"):
        read_features(tmp_path / "f.txt")
    for kind in (".npy", ".npz", ".pt", ".mat", ".parquet"):
        (tmp_path / f"f{kind}").write_bytes(b"no features at all, of no kind" * 20)
        with pytest.raises(FeatureError, match=f"f{kind} can't be read"):
            read_features(tmp_path / f"f{kind}")
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FeatureError, match="can't be read"):
        read_features(tmp_path / "o.npy")


def damaged_mat(seed):
    """A file of MATLAB with up to eight flipped bits, of which some end SciPy's process."""
    from scipy.io import savemat

    numbers = np.arange(6, dtype=np.float32)
    names = np.array(["a", "b"], dtype=object)
    whole = io.BytesIO()
    savemat(whole, {"features": np.outer(numbers, numbers[:5]), "ids": numbers, "names": names})
    data, draw = bytearray(whole.getvalue()), random.Random(seed)
    for _ in range(draw.choice([1, 1, 8])):
        data[draw.randrange(128, len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("seed", [81, 129, 163])  # of ten among 500 that SciPy 1.17.1 crashes on
def test_a_damaged_file_of_matlab_does_not_end_the_process(tmp_path, seed):
    (tmp_path / "f.mat").write_bytes(damaged_mat(seed))
    code = (
        "import sys; from dhcl.inference.features import FeatureError, read_features\n"
        "try: read_features(sys.argv[1])\nexcept FeatureError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f.mat")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "f.mat" in done.stdout or not done.stdout


def test_the_end_of_the_process_that_reads_a_file_of_matlab_is_named(tmp_path, monkeypatch):
    from scipy.io import savemat

    savemat(tmp_path / "f.mat", {"features": np.eye(6, dtype=np.float32)})
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr("dhcl.inference.apart._CHILD", kill)
    with pytest.raises(FeatureError, match=r"f\.mat can't be read as .mat .SIGSEGV: .* damaged"):
        read_features(tmp_path / "f.mat")
    monkeypatch.setattr("dhcl.inference.apart._CHILD", "raise SystemExit(3)")
    with pytest.raises(FeatureError, match=r"f\.mat can't be read as .mat .status 3: "):
        read_features(tmp_path / "f.mat")
    (tmp_path / "f.parquet").write_bytes(b"")
    with pytest.raises(FeatureError, match=r"f\.parquet can't be read as .parquet .status 3: "):
        read_features(tmp_path / "f.parquet")


def test_lists_of_several_widths_are_no_matrix(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"features": [[1.0, 2.0], [1.0]]}), tmp_path / "f.parquet")
    with pytest.raises(FeatureError, match=r"same width \(got widths \[1, 2\]"):
        read_features(tmp_path / "f.parquet")


def test_a_row_of_zeros_has_no_direction(tmp_path):
    np.save(tmp_path / "f.npy", np.vstack([ROWS, np.zeros((1, 4))]))
    with pytest.raises(FeatureError, match="zeros in row 6"):
        read_features(tmp_path / "f.npy").unit()


def test_common_numbers_of_numbers_and_texts():
    numbers = common_numbers(np.array([7, -1]), np.array([7, 9]))
    assert [column.tolist() for column in numbers] == [[7, -1], [7, 9]]
    one, other = common_numbers(np.array(["bob", "7", ""]), np.array([7, -1]))
    assert one[1] == other[0]
    assert one[0] not in (one[1], -1)
    assert one[2] == other[1] == -1


def matlab_cells(texts):
    cells = np.empty((len(texts), 1), dtype=object)
    cells[:, 0] = texts
    return cells


WRITTEN = {
    "numbers": np.array([1, 2, 10, -1]),
    "small numbers": np.array([1, 2, 10, -1], np.int8),
    "floats": np.array([1.0, 2.0, 10.0, -1.0]),
    "texts": np.array(["1", "2", "10", "-1"]),
    "zeros before": np.array(["01", "0002", "010", "-1"]),
    "blanks": np.array([" 1", "2 ", "10\n", " "]),
    "bytes": np.array([b"01", b"2", b"10", b""]),
    "objects": np.array([1, "02", b"10", None], dtype=object),
}


@pytest.mark.parametrize("one", WRITTEN)
@pytest.mark.parametrize("other", WRITTEN)
def test_equal_identifiers_are_equal_however_they_are_written(one, other):
    numbers = common_numbers(WRITTEN[one], WRITTEN[other])
    assert [column.tolist() for column in numbers] == [[1, 2, 10, -1]] * 2
    # Beside a name that is no number.
    left, right = common_numbers(np.append(WRITTEN[one].astype(object), "bob"), WRITTEN[other])
    assert left[:4].tolist() == right.tolist()
    assert right[3] == -1
    assert left[4] not in right


@pytest.mark.parametrize("kind", [".npz", ".pt", ".mat", ".parquet"])
@pytest.mark.parametrize("texts", [False, True])
def test_text_in_files_is_read_as_a_pattern_reads_paths(kind, texts, tmp_path):
    names = [*["03", " 3 ", "", "5", "005"], "bob" if texts else "5"]
    path = tmp_path / f"f{kind}"
    if kind == ".pt":
        torch.save({"features": torch.from_numpy(ROWS), "ids": names}, path)
    else:
        write(path, ids=matlab_cells(names) if kind == ".mat" else np.array(names))
    expected = ["3", "3", "", "5", "5", "bob"] if texts else [3, 3, -1, 5, 5, 5]
    found = read_features(path).ids
    assert found.tolist() == expected
    assert found.dtype.kind == ("U" if texts else "i")


def test_columns_of_something_else_are_refused():
    for wrong in (np.array([0.5]), np.array([{}], dtype=object), np.array([True])):
        with pytest.raises(FeatureError, match="whole numbers or texts"):
            common_numbers(wrong, np.array([1]))


@pytest.mark.parametrize("kind", [".npz", ".parquet"])
def test_written_batch_by_batch_and_read_again(kind, tmp_path):
    path = tmp_path / "new folder" / f"f{kind}"
    rows = torch.from_numpy(ROWS)
    names = ["bob", -1, 3, 3, "eve", "eve"]
    with feature_writer(path, 4, "abc") as writer:
        writer.append(rows[:4], PATHS[:4], names[:4], [1, 2, -1, 1])
        writer.append(rows[4:], PATHS[4:], names[4:], [2, 2])
    found = read_features(path)
    assert torch.equal(found.values, rows)
    assert list(found.paths) == PATHS
    assert found.ids.tolist() == ["bob", "", "3", "3", "eve", "eve"]
    assert found.cameras.tolist() == [1, 2, -1, 1, 2, 2]
    assert found.model == "abc"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", [".npz", ".parquet"])
def test_a_writer_that_fails_leaves_the_old_file(kind, tmp_path):
    path = tmp_path / f"f{kind}"
    path.write_bytes(b"old")

    def fail_in_the_middle():
        with feature_writer(path, 4, "abc") as writer:
            writer.append(torch.from_numpy(ROWS), PATHS, None, None)
            raise KeyError

    with pytest.raises(KeyError):
        fail_in_the_middle()
    with pytest.raises(FeatureError, match="none to write"), feature_writer(path, 4, "abc"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


def test_rows_that_grow_are_a_numpy_file(tmp_path):
    rows = NpyRows(tmp_path / "r.npy", 4)
    for _ in range(40):
        rows.append(ROWS)
    with pytest.raises(ValueError, match=r"must be \(n, 4\)"):
        rows.append(ROWS[:, :2])
    rows.close()
    assert np.array_equal(np.load(tmp_path / "r.npy", mmap_mode="r"), np.tile(ROWS, (40, 1)))


def test_pairs_must_have_one_width_and_one_model(tmp_path):
    paths = {}
    for name, width, model in (("a", 4, "m"), ("b", 3, "m"), ("c", 4, "n")):
        paths[name] = tmp_path / f"{name}.npz"
        np.savez(paths[name], features=ROWS[:, :width], model=np.array(model))
    a, b, c = (read_features(path) for path in paths.values())
    with pytest.raises(FeatureError, match=r"one width \(got 4 in .*a.npz and 3 in .*b.npz"):
        check_pair(a, b)
    with pytest.raises(FeatureError, match="of one model"):
        check_pair(a, c)


def test_reading_needs_numpy_and_torch_alone():
    code = """
import sys
import dhcl.inference.features
import dhcl.inference.writing
wrong = {"torchvision", "timm", "accelerate", "yaml", "tyro", "PIL", "scipy", "pyarrow", "sklearn"}
assert not wrong & set(sys.modules), wrong & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "f.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(FeatureError, match=r"pip install 'dhcl\[export\]'"):
        read_features(path)
    with pytest.raises(FeatureError, match="pyarrow"), feature_writer(path, 4, "abc"):
        pass


# ---- the commands -------------------------------------------------------------------------------


@pytest.fixture
def people(tmp_path):
    """Features of 10 people in two cameras that hang together by person."""
    noise = np.random.default_rng(1)
    centers = noise.normal(size=(10, 32))
    for name, count in (("query", 2), ("gallery", 8)):
        ids = np.arange(10).repeat(count)
        np.savez(
            tmp_path / f"{name}.npz",
            features=(centers[ids] + 0.3 * noise.normal(size=(len(ids), 32))).astype(np.float32),
            ids=ids,
            cameras=np.arange(len(ids)) % 2,
        )
    return tmp_path


def test_metrics_of_saved_features(people, capsys):
    import json

    from dhcl_ops import evaluate_ranking

    pair = ["--query", str(people / "query.npz"), "--gallery", str(people / "gallery.npz")]
    assert main(["metrics", *pair, "--rerank", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    query, gallery = (read_features(people / f"{n}.npz") for n in ("query", "gallery"))
    expected = evaluate_ranking(
        (query.unit(), gallery.unit()), query.ids, gallery.ids, query.cameras, gallery.cameras
    )
    assert got["features"]["mAP"] == expected.mAP
    assert got["features"]["queries"] == 20
    assert got["re-ranked"]["mAP"] >= 0.99
    assert main(["metrics", *pair, "--metric", "euclidean"]) == 0
    assert "20 of 20 queries" in capsys.readouterr().out


def test_metrics_say_what_is_missing(people, capsys):
    plain = people / "plain.npz"
    np.savez(plain, features=read_features(people / "gallery.npz").values.numpy())
    assert main(["metrics", "--query", str(people / "query.npz"), "--gallery", str(plain)]) == 2
    assert "ids: there are none in" in capsys.readouterr().err
    half = people / "half.npz"
    gallery = read_features(people / "gallery.npz")
    np.savez(half, features=gallery.values.numpy(), ids=gallery.ids)
    assert main(["metrics", "--query", str(people / "query.npz"), "--gallery", str(half)]) == 2
    assert "cameras: there are none in" in capsys.readouterr().err
    assert main(["metrics", "--query", str(half), "--gallery", str(half)]) == 0
    assert "no cameras are known" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["{:02d}", "{:04d}", " {} "])
@pytest.mark.parametrize("what", ["ids", "cameras"])
@pytest.mark.parametrize("side", ["query", "gallery"])
def test_metrics_are_the_same_however_identifiers_are_written(people, capsys, written, what, side):
    import json

    def measured(**files):
        pair = {name: str(people / f"{name}.npz") for name in ("query", "gallery")} | files
        given = [f"--{name}={file}" for name, file in pair.items()]
        assert main(["metrics", *given, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    expected = measured()
    with np.load(people / f"{side}.npz") as file:
        content = dict(file)
    content[what] = np.array([written.format(each) for each in content[what]])
    np.savez(people / "other.npz", **content)
    assert measured(**{side: str(people / "other.npz")}) == expected


def test_metrics_say_where_no_camera_is_on_both_sides(people, capsys):
    with np.load(people / "query.npz") as file:
        content = dict(file)
    np.savez(people / "north.npz", **content | {"cameras": np.full(20, "north")})
    pair = ["--query", str(people / "north.npz"), "--gallery", str(people / "gallery.npz")]
    assert main(["metrics", *pair]) == 0
    assert "no camera of the queries is one of the gallery's" in capsys.readouterr().out
    assert main(["metrics", *pair, "--json"]) == 0
    assert "no camera of the queries is one of the gallery's" in capsys.readouterr().err


def test_metrics_of_one_camera_are_within_it(people, capsys):
    import json

    def measured(cameras):
        pair = []
        for name in ("query", "gallery"):
            with np.load(people / f"{name}.npz") as file:
                content = {key: value for key, value in file.items() if key != "cameras"}
            if cameras:
                content["cameras"] = np.full(len(content["ids"]), "north")
            np.savez(people / f"{name} one.npz", **content)
            pair += [f"--{name}", str(people / f"{name} one.npz")]
        assert main(["metrics", *pair, "--json"]) == 0
        said = capsys.readouterr()
        return json.loads(said.out), said.err

    expected, _ = measured(False)
    found, hint = measured(True)
    assert found == expected
    assert "those within the camera count" in hint


def test_rerank_of_saved_features(people, capsys):
    from dhcl_ops import rerank

    pair = ["--query", str(people / "query.npz"), "--gallery", str(people / "gallery.npz")]
    out = people / "lists.npz"
    assert main(["rerank", *pair, "--topk", "8", "--out", str(out)]) == 0
    query, gallery = (read_features(people / f"{n}.npz").unit() for n in ("query", "gallery"))
    expected = rerank(query, gallery, topk=8)
    with np.load(out) as lists:
        assert np.array_equal(lists["indices"], expected.indices.numpy())
        assert np.array_equal(lists["distances"], expected.distances.numpy())
    assert main(["rerank", *pair, "--out", str(people / "lists.txt")]) == 2
    narrow = people / "narrow.npy"
    np.save(narrow, np.ones((5, 31)))
    assert main(["rerank", *pair[:3], str(narrow), "--out", str(out)]) == 2
    assert "must have one width (got 32 in" in capsys.readouterr().err


def test_cluster_of_saved_features(people, capsys):
    import csv

    out = people / "labels.csv"
    given = ["cluster", str(people / "gallery.npz"), "--out", str(out), "--k1", "8", "--k2", "3"]
    assert main(given) == 0
    assert "80 images, 10 clusters of 8 to 8 images, 0 in none" in capsys.readouterr().out
    rows = list(csv.reader(out.open()))
    assert rows[0] == ["row", "label"]
    assert [int(label) for _, label in rows[1:]] == np.arange(10).repeat(8).tolist()
    assert main([*given, "--eps", "1.5"]) == 2
    assert "eps must be in (0, 1)" in capsys.readouterr().err
    assert main([*given, "--run", "nowhere"]) == 2
    assert "run: is for a folder" in capsys.readouterr().err
    assert main(["cluster", str(people), "--out", str(out)]) == 2
    assert "--run RUN" in capsys.readouterr().err


def test_metrics_at_other_ranks_and_with_the_older_average_precision(people, capsys):
    import json

    from dhcl_ops import evaluate_ranking

    sides = [read_features(people / f"{n}.npz") for n in ("query", "gallery")]
    # Noise, so that the two kinds of average precision differ.
    noise = torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
    for name, side, more in zip(("q", "g"), sides, noise.split([20, 80]), strict=True):
        values = (side.values + 2 * more).numpy()
        np.savez(people / f"{name}.npz", features=values, ids=side.ids, cameras=side.cameras)
    given = ["metrics", "--query", str(people / "q.npz"), "--gallery", str(people / "g.npz")]
    other = ["--ranks", "1", "20", "--ap", "trapezoid"]
    assert main([*given, *other, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["features"]
    query, gallery = (read_features(people / f"{n}.npz") for n in "qg")
    expected = evaluate_ranking(
        (query.unit(), gallery.unit()),
        *(query.ids, gallery.ids, query.cameras, gallery.cameras),
        ap="trapezoid",
    )
    assert {*found} == {"mAP", "rank1", "rank20", "mINP", "queries"}
    assert found["mAP"] == expected.mAP
    assert found["rank20"] == expected.cmc[19]
    assert main([*given, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)["features"]
    assert plain["mAP"] != found["mAP"]
    assert {"rank5", "rank10"} < {*plain}
    assert main([*given, *other, "--rerank"]) == 0
    assert "|  rank1 | rank20 |" in capsys.readouterr().out
    assert main([*given, "--ranks", "0"]) == 2
    assert "dhcl: ranks: must be numbers from 1 to 1000000 (got 0)" in capsys.readouterr().err


def test_cluster_says_how_well_it_agrees_with_identities_in_the_file(people, capsys):
    gallery = read_features(people / "gallery.npz")
    out = ["--out", str(people / "labels.csv"), "--k1", "8", "--k2", "3"]
    assert main(["cluster", str(people / "gallery.npz"), *out]) == 0
    line = "agreement with the identities of 80 images: ARI 1.000, NMI 1.000, purity 1.000\n"
    assert line in capsys.readouterr().out
    texts = np.where(gallery.ids == 3, "", np.char.add("p", gallery.ids.astype(str)))
    np.savez(people / "text.npz", features=gallery.values, ids=texts)
    assert main(["cluster", str(people / "text.npz"), *out]) == 0
    assert line.replace("80", "72") in capsys.readouterr().out
    np.savez(people / "none.npz", features=gallery.values)
    np.savez(people / "unknown.npz", features=gallery.values, ids=np.full(80, -1))
    for name in ("none", "unknown"):
        assert main(["cluster", str(people / f"{name}.npz"), *out]) == 0
        assert "agreement" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [".npz", ".mat", ".pt"])
def test_features_that_are_a_column_for_each_image(kind, tmp_path):
    file = write(tmp_path / f"f{kind}", features=np.ascontiguousarray(ROWS.T))
    found = read_features(file, transposed=True)
    assert torch.equal(found.values, torch.from_numpy(ROWS))
    assert found.values.is_contiguous()
    assert found.ids.tolist() == IDS
    with pytest.raises(FeatureError, match=r"4 x 6: if each column is an image, --transposed"):
        read_features(file)
    only = {"features": np.ascontiguousarray(ROWS.T), "ids": np.arange(4), "paths": np.array(PATHS)}
    with pytest.raises(FeatureError, match=r"must be 4 paths.*--transposed"):
        read_features(write(tmp_path / f"g{kind}", **only))
    with pytest.raises(FeatureError, match=r"must be 6 values, one per row.*\(got shape[^;]*$"):
        read_features(write(tmp_path / f"h{kind}", ids=np.arange(5)))


def test_commands_take_columns_for_images(people, capsys):
    for name in ("query", "gallery"):
        with np.load(people / f"{name}.npz") as file:
            content = dict(file)
        from scipy.io import savemat

        savemat(people / f"{name}.mat", content | {"features": content["features"].T})
    sides = [("--query", "query"), ("--gallery", "gallery")]

    def given(kind):
        return [word for flag, name in sides for word in (flag, str(people / f"{name}{kind}"))]

    assert main(["metrics", *given(".npz"), "--json"]) == 0
    expected = capsys.readouterr().out
    assert main(["metrics", *given(".mat"), "--json", "--transposed"]) == 0
    assert capsys.readouterr().out == expected
    assert main(["metrics", *given(".mat"), "--json"]) == 2
    assert "--transposed" in capsys.readouterr().err
    for kind, more in ((".npz", []), (".mat", ["--transposed"])):
        out = str(people / f"lists{kind}.npz")
        assert main(["rerank", *given(kind), *more, "--topk", "8", "--out", out]) == 0
        labels = ["--out", str(people / f"labels{kind}.csv"), "--k1", "8", "--k2", "3"]
        assert main(["cluster", str(people / f"gallery{kind}"), *more, *labels]) == 0
    texts = [(people / f"labels{kind}.csv").read_text() for kind in (".npz", ".mat")]
    assert texts[0] == texts[1]
    lists = [np.load(people / f"lists{kind}.npz")["indices"] for kind in (".npz", ".mat")]
    assert np.array_equal(*lists)


@pytest.fixture
def small_limit(monkeypatch):
    """Files may become 1 MiB, or 100 times their size."""
    monkeypatch.setattr("dhcl.stored._UNPACKED", 1 << 20)


def packed(path):
    """A file of torch with 32 MiB of zeros in next to nothing."""
    torch.save({"features": torch.zeros(2, 3)}, path)
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
        archive.writestr("archive/data/1", bytes(1 << 25))


def repeated(path):
    torch.save({"features": torch.zeros(1).expand(1 << 12, 1 << 11)}, path)


@pytest.mark.parametrize("write", [packed, repeated])
def test_what_unpacks_to_more_than_the_limit_is_refused(tmp_path, small_limit, write):
    write(tmp_path / "f.pt")
    with pytest.raises(FeatureError, match=r"f\.pt can't be read .*at most [\d,]+ bytes"):
        read_features(tmp_path / "f.pt")


def test_a_process_that_reads_has_a_limit_of_memory(tmp_path, small_limit, monkeypatch):
    from scipy.io import savemat

    monkeypatch.setattr("dhcl.inference.apart._OWN", 1 << 23)
    savemat(tmp_path / "f.mat", {"features": np.zeros((4096, 2048))}, do_compression=True)
    with pytest.raises(FeatureError, match=r"f\.mat can't be read .*at most [\d,]+ bytes"):
        read_features(tmp_path / "f.mat")


def test_numpy_arrays_in_files_of_torch(tmp_path):
    content = {
        "features": np.asfortranarray(np.arange(6.0).reshape(3, 2)),
        "ids": np.array(["a", "b", "a"]),
        "cameras": [np.int64(3), np.int64(4), np.int64(3)],
        "paths": np.array(["x", "y", "z"], object),
        "other": np.zeros(2, [("a", "f4")]),
    }
    torch.save(content, tmp_path / "f.pt")
    read = read_features(tmp_path / "f.pt")
    assert read.values.tolist() == content["features"].tolist()
    assert read.ids.tolist() == ["a", "b", "a"]
    assert read.cameras.tolist() == [3, 4, 3]
    assert read.paths == ("x", "y", "z")


def test_a_dtype_that_says_of_numbers_that_they_are_objects(tmp_path):
    """NumPy believes the flags in its pickles, and takes the numbers for addresses."""
    torch.save({"features": np.arange(6.0).reshape(3, 2)}, tmp_path / "f.pt",
               _use_new_zipfile_serialization=False)  # fmt: skip
    data = (tmp_path / "f.pt").read_bytes()
    flags = b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK"
    assert flags + b"\0" in data
    (tmp_path / "f.pt").write_bytes(data.replace(flags + b"\0", flags + b"\x3f"))
    assert read_features(tmp_path / "f.pt").values.tolist() == [[0, 1], [2, 3], [4, 5]]
