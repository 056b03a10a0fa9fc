"""What the module of each project has: its names, their arguments and their defaults."""

import importlib
import inspect
import pkgutil

import pytest

from dhcl_ops import compat

REQUIRED = inspect.Parameter.empty
RERANKING = {"k1": 20, "k2": 6, "lambda_value": 0.3}
MATRICES = {"q_g_dist": REQUIRED, "q_q_dist": REQUIRED, "g_g_dist": REQUIRED, **RERANKING}
IDENTITIES = dict.fromkeys(("distmat", "q_pids", "g_pids", "q_camids", "g_camids"), REQUIRED)
EVALUATION = {**IDENTITIES, "max_rank": 50, "use_metric_cuhk03": False, "use_cython": True}
SCORES = {
    "distmat": REQUIRED,
    "query_ids": None,
    "gallery_ids": None,
    "query_cams": None,
    "gallery_cams": None,
}
PROTOCOL = {"separate_camera_set": False, "single_gallery_shot": False, "first_match_break": False}
JACCARD = {"k1": 20, "k2": 6, "print_flag": True, "search_option": 0, "use_float16": False}
BANK = {"temp": 0.05, "momentum": 0.2}

OPEN_REID = {"cmc": {**SCORES, "topk": 100, **PROTOCOL}, "mean_ap": SCORES}
OF_SPCL = {
    **OPEN_REID,
    "compute_jaccard_distance": {"target_features": REQUIRED, **JACCARD},
    "re_ranking": MATRICES,
}
CLUSTERS = {"num_features": REQUIRED, "num_samples": REQUIRED, **BANK}
# As in the projects' own code: what a script may call them with.
SIGNATURES = {
    "spcl": {**OF_SPCL, "HybridMemory": CLUSTERS},
    "clustercontrast": {**OF_SPCL, "ClusterMemory": {**CLUSTERS, "use_hard": False}},
    "ise": {
        **OF_SPCL,
        "ClusterMemory": {**CLUSTERS, "use_hard": False, "sample_type": "hard"},
        "mean_ap": {**SCORES, "draw_image": False},
    },
    "hhcl": {
        **OF_SPCL,
        "ClusterMemory": {
            **CLUSTERS, "mode": "CM", "hard_weight": 0.5, "smooth": 0.0, "num_instances": 1,
        },
    },
    "pplr": {
        **OF_SPCL,
        "compute_ranked_list": {
            "features": REQUIRED, "k": 20, "search_option": 0, "fp16": False, "verbose": True,
        },
    },
    "ice": OF_SPCL,
    "cap": {
        **OPEN_REID,
        "faiss_compute_jaccard_dist": {
            "target_features": REQUIRED, **JACCARD, "search_option": 3,
        },
    },
    "openunreid": {
        "HybridMemory": {"num_features": REQUIRED, "num_memory": REQUIRED, **BANK},
        "compute_jaccard_distance": {
            "features": REQUIRED, "k1": 20, "k2": 6, "search_option": 0, "fp16": False,
            "verbose": True,
        },
        "re_ranking_cpu": MATRICES,
        "evaluate_rank": {**EVALUATION, "cmc_topk": (1, 5, 10), "verbose": True},
    },
    "torchreid": {"evaluate_rank": EVALUATION, "re_ranking": MATRICES},
    "fastreid": {
        "evaluate_rank": EVALUATION,
        "re_ranking": MATRICES,
        "compute_jaccard_distance": {
            "features": REQUIRED, "k1": 20, "k2": 6, "search_option": 0, "fp16": False,
        },
    },
    "transreid": {
        "re_ranking": {
            "probFea": REQUIRED, "galFea": REQUIRED, "k1": REQUIRED, "k2": REQUIRED,
            "lambda_value": REQUIRED, "local_distmat": None, "only_local": False,
        },
        "eval_func": {**IDENTITIES, "max_rank": 50},
    },
    "openreid": OPEN_REID,
}  # fmt: skip


def module_of(project):
    return importlib.import_module(f"dhcl_ops.compat.{project}")


def test_there_is_a_module_for_each_project():
    modules = {module.name for module in pkgutil.iter_modules(compat.__path__)}
    assert {name for name in modules if not name.startswith("_")} == set(SIGNATURES)


@pytest.mark.parametrize("project", SIGNATURES)
def test_the_module_of_a_project_has_its_names_with_their_arguments(project):
    module = module_of(project)
    assert module.__all__ == sorted(SIGNATURES[project])
    for name, expected in SIGNATURES[project].items():
        parameters = inspect.signature(getattr(module, name)).parameters
        assert {key: p.default for key, p in parameters.items()} == expected, name
        assert list(parameters) == list(expected), name
        kinds = {p.kind for p in parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}, name


def test_names_of_three_projects_can_be_imported_from_one_place():
    assert {name: getattr(compat, name).__module__ for name in compat.__all__} == {
        "ClusterMemory": "dhcl_ops.compat.clustercontrast",
        "HybridMemory": "dhcl_ops.compat.spcl",
        "compute_jaccard_distance": "dhcl_ops.compat.spcl",
        "evaluate_rank": "dhcl_ops.compat.torchreid",
        "re_ranking": "dhcl_ops.compat.torchreid",
    }
