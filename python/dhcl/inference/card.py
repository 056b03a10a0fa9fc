"""The card of a model: what it is, how it is used, and what was measured of it."""

from __future__ import annotations

from typing import Any

import yaml

from dhcl.inference.hub import CARD_MARK, Description, public_options
from dhcl.metrics import RANKS, table

__all__ = ["model_card"]

_USE = """\
```python
from dhcl import ReID

model = ReID.from_pretrained("FOLDER-OR-OWNER/NAME")
found = model.search("query.jpg", "gallery/", topk=5)
```
"""


def model_card(name: str, description: Description) -> str:
    """The card as Markdown, with the hub's metadata in front.

    Args:
        name: of the model.
        description: of what was saved; metrics are shown as they are there, and nothing else.
    """
    config = description.config
    options = yaml.safe_dump(public_options(config), sort_keys=False, allow_unicode=True)
    height, width = config.model.image_size
    about = description.about
    parts = [
        f"---\n{_metadata(name, description)}---",
        CARD_MARK,
        f"# {name}",
        f"A model for re-identification: images of people (or vehicles) to {about['dim']} numbers, "
        f"by whose cosine equal ones are near. {_training(description)}",
        "## Use",
        _USE.rstrip(),
        f"Needs `pip install 'dhcl[train]'`. Images are RGB, resized to {height} x {width} (height "
        "x width; bicubic, antialiased) from 8 bits, scaled to [0, 1] and normalised by mean "
        f"{about['mean']} and deviation {about['std']}.",
        "## What was measured",
        _measured(description),
        "## Options of the training",
        f"```yaml\n{options}```",
        f"Fingerprint of weights and preprocessing: `{description.fingerprint}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _training(description: Description) -> str:
    config = description.config
    cameras = description.num_cameras
    own = f" It has batch-norm statistics of {cameras} cameras." if cameras else ""
    return (
        f"Backbone `{config.model.backbone}`, trained by dhcl {description.version} on "
        f"`{config.data.data}`; checkpoint `{description.which}`.{own}"
    )


def _measured(description: Description) -> str:
    metrics = description.metrics
    if not metrics:
        return "Nothing: no evaluation of this model was kept."
    rows = {description.which: metrics}
    if "reranked" in metrics:
        rows[f"{description.which}, re-ranked"] = metrics["reranked"]
    text = f"On `{description.config.data.data}`, in percent, {metrics['queries']:,} queries:\n\n"
    text += table(rows)
    if "protocol" in metrics:
        text += f"\n\nProtocol: {metrics['protocol']}."
    if "chosen_by" in metrics:
        text += f"\n\nThe epoch was chosen by {metrics['chosen_by']}."
    return text


def _metadata(name: str, description: Description) -> str:
    """The hub's metadata as YAML, with the results where there are any."""
    content: dict[str, Any] = {
        "library_name": "dhcl",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["person-re-identification", "unsupervised", description.config.model.backbone],
    }
    metrics = description.metrics
    if metrics:
        data = description.config.data.data
        shown = ("mAP", *(f"rank{k}" for k in RANKS), "mINP")
        measured = [
            {"type": each, "name": each, "value": round(100 * metrics[each], 2)} for each in shown
        ]
        task = {"type": "image-feature-extraction", "name": "re-identification"}
        result = {"task": task, "dataset": {"name": data, "type": data}, "metrics": measured}
        content["model-index"] = [{"name": name, "results": [result]}]
    return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
