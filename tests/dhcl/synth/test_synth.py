import json
import re

import numpy as np
import pytest
import torch
from dhcl.errors import ConfigError
from dhcl.synth import contact_sheet, render_crop, render_dataset
from dhcl.synth.cameras import make_camera
from dhcl.synth.plan import plan
from dhcl.synth.progress import draw_once
from PIL import Image

from dhcl_ops import evaluate_ranking

NAME = re.compile(r"(-1|\d{4})_c(\d)s1_(\d{6})_(\d\d)\.jpg")
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
SMALL = {"ids": 8, "cameras": 3, "images_per_camera": 2, "image_size": (48, 24), "junk": 3}


def parse(folder):
    """(identity, camera, path) of each image, by name."""
    images = []
    for path in sorted(folder.iterdir()):
        match = NAME.fullmatch(path.name)
        assert match, path.name
        images.append((int(match[1]), int(match[2]), path))
    return images


def contents(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "small"
    return out, render_dataset(out, **SMALL)


# ---- what is written ----


def test_layout_names_and_counts(small):
    out, summary = small
    assert {p.name for p in out.iterdir()} == {*FOLDERS, "synth.json"}
    train, query, gallery = (parse(out / folder) for folder in FOLDERS)
    assert {i for i, _, _ in train} == set(range(1, 5))
    assert {i for i, _, _ in query} == set(range(5, 9))
    assert {i for i, _, _ in gallery} == {-1, 0, *range(5, 9)}
    counted = (summary.train_images, summary.query_images, summary.gallery_images)
    assert counted == (len(train), len(query), len(gallery))
    assert sum(i == -1 for i, _, _ in gallery) == summary.junk == 3
    assert sum(i == 0 for i, _, _ in gallery) == summary.distractors == 4
    assert {c for _, c, _ in train} == {1, 2, 3}
    frames = [p.name[3:15] for _, _, p in train + query + gallery]
    assert len(set(frames)) == len(frames)


def test_one_query_per_camera_and_a_match_in_another(small):
    out, _ = small
    query = [(i, c) for i, c, _ in parse(out / "query")]
    gallery = {(i, c) for i, c, _ in parse(out / "bounding_box_test")}
    assert len(set(query)) == len(query)
    for identity, camera in query:
        assert any(i == identity and c != camera for i, c in gallery)


def test_numbers_of_images_vary_around_their_mean():
    jobs = plan(0, 200, 4, 4, 0, 0)
    counts = {}
    for job in jobs:
        counts[job.identity, job.camera] = counts.get((job.identity, job.camera), 0) + 1
    assert set(counts.values()) == {2, 3, 4, 5, 6}
    assert abs(np.mean(list(counts.values())) - 4) < 0.2
    cameras_of = np.bincount([identity for identity, _ in counts])[1:]
    assert cameras_of.min() >= 2
    assert 3.3 < cameras_of.mean() < 4


def test_images_have_their_size_and_differ(small):
    out, _ = small
    seen = set()
    for folder in FOLDERS:
        for _, _, path in parse(out / folder):
            with Image.open(path) as image:
                assert image.size == (24, 48)
                assert image.mode == "RGB"
                pixels = np.asarray(image)
            assert pixels.std() > 5
            seen.add(pixels.tobytes())
    assert len(seen) == sum(len(parse(out / folder)) for folder in FOLDERS)


def test_manifest_repeats_the_data_set(small, tmp_path):
    out, summary = small
    manifest = json.loads((out / "synth.json").read_text())
    assert manifest["counts"]["train_images"] == summary.train_images
    arguments = manifest["arguments"]
    assert arguments["seed"] == 0
    render_dataset(tmp_path / "again", **arguments)
    assert contents(tmp_path / "again") == contents(out)


def test_workers_do_not_show_and_seeds_do(small, tmp_path):
    out, _ = small
    calls = []
    render_dataset(
        tmp_path / "two", **SMALL, workers=2, progress=lambda done, of: calls.append((done, of))
    )
    assert contents(tmp_path / "two") == contents(out)
    assert calls[-1][0] == calls[-1][1] == len(contents(out)) - 1
    render_dataset(tmp_path / "other", **SMALL, seed=1)
    same = contents(tmp_path / "other").items() & contents(out).items()
    assert not same


def test_a_crop_depends_on_its_arguments_only():
    crops = {}
    for order in (1, -1):
        for args in [(0, 5, 1, 0), (0, 5, 1, 1), (0, 5, 2, 0), (0, 6, 1, 0), (1, 5, 1, 0)][::order]:
            crops.setdefault(args, []).append(render_crop(*args, (64, 32)).tobytes())
    assert all(first == second for first, second in crops.values())
    assert len({first for first, _ in crops.values()}) == 5


# ---- how hard it is ----


def stripe_histograms(images):
    rows = []
    for _, _, path in images:
        with Image.open(path) as image:
            bins = np.asarray(image).astype(int) // 32 @ np.array([64, 8, 1])
        stripes = np.array_split(bins, 6)
        rows.append(np.sqrt([np.bincount(s.ravel(), minlength=512) for s in stripes]).ravel())
    return torch.from_numpy(np.stack(rows)).float()


def columns(images):
    return torch.tensor([i for i, _, _ in images]), torch.tensor([c for _, c, _ in images])


@pytest.mark.parametrize("gap", [0.1, 1.0])
def test_colour_histograms_fail_across_cameras(tmp_path, gap):
    render_dataset(
        tmp_path / "d", ids=60, images_per_camera=3, image_size=(64, 32), camera_gap=gap, junk=0
    )
    query, gallery = (parse(tmp_path / "d" / folder) for folder in FOLDERS[1:])
    features = stripe_histograms(query), stripe_histograms(gallery)
    (qi, qc), (gi, gc) = columns(query), columns(gallery)
    metrics = evaluate_ranking(features, qi, gi, qc, gc, metric="cosine")
    assert metrics.num_valid == len(query)
    assert metrics.mAP < 0.12
    # Within a camera they don't: there is something to learn from.
    one_camera = evaluate_ranking(features, qi * 9 + qc, gi * 9 + gc, metric="cosine")
    assert one_camera.mAP > 3 * metrics.mAP


def test_the_gap_between_cameras_can_be_narrowed():
    near, half, far = ([make_camera(0, c, 64, 32, gap) for c in (1, 2, 3)] for gap in (0, 0.5, 1))
    for a, b, c in zip(near, half, far, strict=True):
        assert np.array_equal(a.mix, np.eye(3, dtype=np.float32))
        assert (a.gamma, a.contrast, a.haze, a.sharpness, a.yaw) == (1, 1, 0, 1, 0)
        np.testing.assert_allclose(b.mix, (a.mix + c.mix) / 2, rtol=1e-6)
        assert abs(b.yaw - c.yaw / 2) < 1e-12
        assert np.array_equal(a.scene, c.scene)
    pictures = [render_crop(0, 1, 2, 0, (64, 32), "person", gap).tobytes() for gap in (0.0, 1.0)]
    assert pictures[0] != pictures[1]


# ---- refusals, and nothing left behind ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": 3}, ValueError, r"synth: ids must be >= 4 \(got 3\)"),
        ({"ids": 8.0}, TypeError, r"synth: ids must be an integer \(got 8.0\)"),
        ({"cameras": 1}, ValueError, r"synth: cameras must be >= 2.*\(got 1\)"),
        ({"images_per_camera": 1}, ValueError, r"images_per_camera must be >= 2.*\(got 1\)"),
        ({"image_size": (16, 24)}, ValueError, r"height of image_size must be >= 32 \(got 16\)"),
        ({"image_size": (48,)}, ValueError, r"image_size must be \(height, width\)"),
        ({"camera_gap": 1.5}, ValueError, r"synth: camera_gap must be in \[0, 1\] \(got 1.5\)"),
        ({"camera_gap": "0"}, TypeError, r"synth: camera_gap must be a number \(got '0'\)"),
        ({"seed": -1}, ValueError, r"synth: seed must be >= 0 \(got -1\)"),
        ({"junk": -1}, ValueError, r"synth: junk must be >= 0 \(got -1\)"),
        ({"workers": 0}, ValueError, r"synth: workers must be >= 1 \(got 0\)"),
    ],
)
def test_bad_arguments_are_named(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        render_dataset(tmp_path / "out", **{**SMALL, **change})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_never_touched(tmp_path, overwrite):
    out = tmp_path / "out"
    (out / "query").mkdir(parents=True)
    (out / "query" / "0001_c1s1_000001_00.jpg").write_bytes(b"precious")
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="must be new, empty or an earlier output"):
        render_dataset(out, **SMALL, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_an_earlier_output_is_replaced_only_on_request(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    render_dataset(out, **SMALL)
    before = contents(out)
    with pytest.raises(FileExistsError, match="pass overwrite to replace it"):
        render_dataset(out, **SMALL, seed=1)
    assert contents(out) == before
    render_dataset(out, **SMALL, seed=1, overwrite=True)
    assert json.loads((out / "synth.json").read_text())["arguments"]["seed"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"must hold nothing else .*notes\.txt"):
        render_dataset(out, **SMALL, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("there", [False, True])
def test_nothing_half_written_stays(small, tmp_path, error, there):
    out = tmp_path / "out"
    if there:
        render_dataset(out, **SMALL, seed=1)
    before = contents(tmp_path)

    def stop(done, total):
        raise error

    with pytest.raises(error):
        render_dataset(out, **SMALL, overwrite=True, progress=stop)
    assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if there else [])


# ---- contact sheet ----


def test_contact_sheet(small, tmp_path):
    out, _ = small
    path = contact_sheet(out / "bounding_box_train", tmp_path / "sheet.png", ids=3, columns=5)
    with Image.open(path) as sheet:
        assert sheet.size == (5 * 26, 3 * 50)
        pixels = np.asarray(sheet)
    first = [(c, p) for i, c, p in parse(out / "bounding_box_train") if i == 1][:1]
    with Image.open(first[0][1]) as image:
        assert np.array_equal(pixels[:48, :24], np.asarray(image))


def test_contact_sheet_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must hold images of identities"):
        contact_sheet(tmp_path, tmp_path / "sheet.png")


def test_people_without_pictures_are_not_gone_on_with(tmp_path):
    (tmp_path / "synth.json").write_text('{"arguments": {"ids": 8}}')
    with pytest.raises(ConfigError, match=r"out: .* is not whole"):
        draw_once(tmp_path, sheet=tmp_path / "people.png", workers=1, ids=8)
    (tmp_path / "synth.json").write_text('{"arguments": [1]}')
    with pytest.raises(ConfigError, match="holds no pedestrians of dhcl synth"):
        draw_once(tmp_path, sheet=tmp_path / "people.png", workers=1, ids=8)
