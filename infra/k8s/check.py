"""Checks what the overlays render to, and that images are called the same everywhere. Started by `check`."""

import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import yaml

from rules import images, network, pods, references, services, variables
from rules.objects import Overlay

K8S = Path(__file__).resolve().parent
ROOT = K8S.parent.parent


def main():
    overlays = [render(path) for path in sorted((K8S / "overlays").iterdir()) if path.is_dir()]
    errors = [f"{overlay.name}: {error}" for overlay in overlays for error in check(overlay)]
    errors += images.check(ROOT, overlays)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    for overlay in overlays:
        print(f"{overlay.name}: {len(overlay.objects)} objects, Kubernetes {kubernetes_validate.latest_version()}")
    sys.exit(1 if errors else 0)


def render(path):
    result = subprocess.run(["kubectl", "kustomize", path], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {path.relative_to(ROOT)} cannot be rendered: {result.stderr.strip()}")
    return Overlay(path, [document for document in yaml.safe_load_all(result.stdout) if document])


def check(overlay):
    yield from fields(overlay)
    for rules in (pods, references, variables, services, network):
        yield from rules.check(overlay)


def fields(overlay):
    for document in overlay.objects:
        name = f"{document['kind']} {document['metadata']['name']}"
        try:
            kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{name}: {'.'.join(map(str, error.path))}: {error.message}"
        except kubernetes_validate.SchemaNotFoundError:
            yield f"{name}: there is no such kind in {document['apiVersion']}"
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != "ticketing":
            yield f"{name} is in no namespace, or in another than ticketing"


if __name__ == "__main__":
    main()
