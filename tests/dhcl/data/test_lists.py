import numpy as np
import pytest
from dhcl.data import ImageList, load_data

from tests.dhcl.data.layouts import as_tuple, market


def test_select(tmp_path):
    images = load_data("market1501", market(tmp_path)).train
    for chosen in ([3, 0], np.array([3, 0])):
        assert as_tuple(images.select(chosen)) == (
            (images.paths[3], images.paths[0]),
            [7, 2],
            [1, 0],
        )
    assert as_tuple(images.select(images.ids == 7))[1] == [7, 7]
    assert len(images.select([])) == 0
    assert images.select([]).num_cameras == 0
    with pytest.raises(IndexError):
        images.select([4])


@pytest.mark.parametrize("ids", [np.zeros(1, np.int64), np.zeros(2), np.zeros((2, 1), np.int64)])
def test_image_list_refuses_what_does_not_fit(tmp_path, ids):
    with pytest.raises(ValueError, match="ids must be 2 integers"):
        ImageList((tmp_path / "a", tmp_path / "b"), ids, np.zeros(2, np.int64))
