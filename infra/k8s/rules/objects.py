"""What an overlay renders to, and how rules look at it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Pod:
    """The template of pods, with what it is called in messages."""

    name: str
    kind: str
    owner: dict
    labels: dict
    spec: dict

    @property
    def containers(self):
        return self.spec.get("initContainers", []) + self.spec["containers"]


@dataclass
class Overlay:
    path: Path
    objects: list

    @property
    def name(self):
        return self.path.name

    @property
    def is_prod(self):
        return self.name.startswith("prod")

    def of(self, kind):
        return {found["metadata"]["name"]: found for found in self.objects if found["kind"] == kind}

    @property
    def pods(self):
        for kind in ("Deployment", "StatefulSet", "Job"):
            for name, owner in self.of(kind).items():
                template = owner["spec"]["template"]
                yield Pod(f"{kind} {name}", kind, owner, template["metadata"]["labels"], template["spec"])


def dig(value, *keys):
    """The value inside of values, or None where one of them is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def selects(selector, labels):
    """Whether a label selector matches. An empty one matches everything."""
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        matches(expression, labels) for expression in selector.get("matchExpressions", [])
    )


def matches(expression, labels):
    if expression["operator"] != "In":
        raise ValueError(f"the rules know no selector with {expression['operator']}: teach them")
    return labels.get(expression["key"]) in expression["values"]
