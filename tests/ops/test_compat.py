"""Where the names of other projects can be imported from."""

import importlib

import pytest

from dhcl_ops import compat

NAMES = {
    "spcl": ["HybridMemory", "compute_jaccard_distance"],
    "clustercontrast": ["ClusterMemory"],
    "torchreid": ["evaluate_rank", "re_ranking"],
    "fastreid": ["re_ranking"],
}


@pytest.mark.parametrize("project", NAMES)
def test_the_module_of_a_project_has_its_names(project):
    module = importlib.import_module(f"dhcl_ops.compat.{project}")
    assert module.__all__ == NAMES[project]
    for name in NAMES[project]:
        assert getattr(module, name) is getattr(compat, name)


def test_every_name_can_be_imported_from_one_place():
    assert set(compat.__all__) == {name for names in NAMES.values() for name in names}
