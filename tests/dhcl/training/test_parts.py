"""What several processes have written is read without running code that a file names."""

import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from dhcl.errors import CheckpointError
from dhcl.stored import Damaged
from dhcl.training.memory import Replicated
from dhcl.training.parts import load_parts
from torch.distributed.checkpoint import metadata, save

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


@pytest.mark.parametrize("name", ["../memory.1", "/tmp", "memory.1/..", 3, "memory."])
def test_a_memory_lies_beside_its_checkpoint(tmp_path, name):
    layout = Replicated(SimpleNamespace(), SimpleNamespace(), range(ROWS), WIDTH)
    with pytest.raises(CheckpointError, match=r"must be a folder memory\.N in"):
        layout.load({"folder": name}, tmp_path)
