"""What several processes have written is read without running code that a file names."""

import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from dhcl.errors import CheckpointError
from dhcl.stored import Damaged
from dhcl.training.lists import lists_to_save, own_lists, read_lists
from dhcl.training.memory import Replicated
from dhcl.training.parts import load_parts
from torch.distributed.checkpoint import metadata, save

from dhcl_ops import FalseNegatives

ROWS, WIDTH = 6, 3


def tensors():
    return {
        "features": torch.arange(ROWS * WIDTH, dtype=torch.float32).reshape(ROWS, WIDTH),
        "labels": torch.arange(ROWS),
        "skipped": torch.tensor([2]),
        "labelled": torch.tensor([False]),
    }


@pytest.fixture
def folder(tmp_path):
    with pytest.warns(UserWarning, match="single process"):
        save({"bank": tensors()}, checkpoint_id=tmp_path / "memory.1", no_dist=True)
    return tmp_path / "memory.1"


def read(folder):
    found = {name: torch.zeros_like(value) for name, value in tensors().items()}
    load_parts({"bank": found}, folder, alone=True)
    return found


def change(folder, mend):
    """Write metadata anew with a change, as a stranger can."""
    file = folder / ".metadata"
    found = pickle.loads(file.read_bytes())
    mend(found)
    file.write_bytes(pickle.dumps(found))


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_all_that_was_written_is_read(folder):
    for name, value in read(folder).items():
        assert torch.equal(value, tensors()[name]), name


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_code_in_metadata_is_not_run(folder, tmp_path):
    ran = tmp_path / "ran"

    def mend(found):
        found.planner_data = Runs(ran)

    change(folder, mend)
    with pytest.raises(Damaged, match=r"open, and code that a file names is not run"):
        read(folder)
    assert not ran.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_no_tensor_is_not_unpickled(folder, tmp_path):
    """Torch would read it without ``weights_only``."""
    ran = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(Runs(ran), buffer)
    ran.unlink(missing_ok=True)

    def mend(found):
        found.state_dict_metadata["bank.labels"] = metadata.BytesStorageMetadata()
        index = metadata.MetadataIndex("bank.labels")
        (key,) = [key for key in found.storage_data if key.fqn == "bank.labels"]
        info = found.storage_data.pop(key)
        part = folder / info.relative_path
        info.offset, info.length = part.stat().st_size, len(buffer.getvalue())
        part.write_bytes(part.read_bytes() + buffer.getvalue())
        found.storage_data[index] = info

    change(folder, mend)
    with pytest.raises(Damaged, match=r"must be a tensor|BytesStorageMetadata"):
        read(folder)
    assert not ran.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("path", ["../elsewhere", "/etc/passwd", "sub/__0_0.distcp", ""])
def test_parts_lie_beside_the_metadata(folder, path):
    def mend(found):
        for info in found.storage_data.values():
            info.relative_path = path

    change(folder, mend)
    with pytest.raises(Damaged, match="its parts must lie beside it"):
        read(folder)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1]), b"\x80\x05]"])
@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_no_metadata_is_an_error(folder, content):
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(Exception) as caught:
        read(folder)
    assert not isinstance(caught.value, AssertionError)


def test_a_part_that_is_cut_off_is_an_error_that_says_why(folder):
    (part,) = folder.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(Damaged) as caught:
        read(folder)
    assert "CheckpointException" not in str(caught.value)
    layout = Replicated(SimpleNamespace(), SimpleNamespace(), range(ROWS), WIDTH)
    with pytest.raises(CheckpointError, match=r"memory\.1 can't be read"):
        layout.load({"folder": folder.name}, folder.parent)


def lists_of(images):
    """Lists of 0, 1, 2, ... classes an image."""
    counts = torch.arange(images)
    total = int(counts.sum())
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return FalseNegatives(offsets, torch.arange(total), -torch.rand(total))


def save_lists(folder, found, parts):
    state = {"bank": tensors()}
    for part in parts:
        state |= lists_to_save(own_lists(found, part), part.start)
    with pytest.warns(UserWarning, match="single process"):
        save(state, checkpoint_id=folder, no_dist=True)


def test_lists_of_any_parts_are_read_for_any_images(tmp_path):
    found = lists_of(7)
    # The second process has images without an entry in its list, the last has none.
    save_lists(tmp_path, found, (range(0, 1), range(1, 4), range(4, 7), range(7, 7)))
    for part in (range(0, 7), range(0, 1), range(2, 6), range(4, 7), range(7, 7)):
        read_back = read_lists(tmp_path, part)
        for got, wanted in zip(read_back, own_lists(found, part), strict=True):
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted)
    with pytest.raises(Damaged, match="must be those of images 5 to 8"):
        read_lists(tmp_path, range(5, 9))


def test_a_folder_without_lists_has_none(folder):
    assert read_lists(folder, range(ROWS)) is None


@pytest.mark.parametrize("damage", ["a part is missing", "counts", "size"])
def test_lists_that_are_not_whole_are_refused(tmp_path, damage):
    found = lists_of(6)
    if damage == "counts":
        found = found._replace(classes=found.classes[:-1], logs=found.logs[:-1])
    parts = (range(0, 2), range(4, 6)) if damage == "a part is missing" else (range(6),)
    save_lists(tmp_path, found, parts)
    if damage == "size":

        def mend(stored):
            stored.state_dict_metadata["lists.0.classes"].size = torch.Size([10**9])

        change(tmp_path, mend)
    words = {"counts": "as many entries as they count", "size": "no larger than their files"}
    with pytest.raises(Damaged, match=words.get(damage, "must be those of images 0 to 5")):
        read_lists(tmp_path, range(6))


@pytest.mark.parametrize("name", ["../memory.1", "/tmp", "memory.1/..", 3, "memory."])
def test_a_memory_lies_beside_its_checkpoint(tmp_path, name):
    layout = Replicated(SimpleNamespace(), SimpleNamespace(), range(ROWS), WIDTH)
    with pytest.raises(CheckpointError, match=r"must be a folder memory\.N in"):
        layout.load({"folder": name}, tmp_path)
