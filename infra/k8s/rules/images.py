"""Images are called the same by whoever builds, pulls or runs them, and skaffold.yaml refers to things that exist."""

import re

import yaml


def check(root, overlays):
    skaffold = yaml.safe_load((root / "skaffold.yaml").read_text())
    built = {artifact["image"] for artifact in skaffold["build"]["artifacts"]}
    pulled = set(names(root))
    yield from in_overlays(overlays, built, pulled)
    yield from in_compose(root / "docker-compose.yml", built, pulled)
    yield from configuration(root, skaffold)
    yield from forwards(skaffold, overlays)


def names(root):
    lines = (root / "infra/images/names").read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.partition("=")[0] in ("nats", "postgres")]


def in_overlays(overlays, built, pulled):
    for overlay in overlays:
        found = {container["image"] for pod in overlay.pods for container in pod.containers}
        wanted = {image for image in pulled if not (overlay.is_prod and image.startswith("postgres"))}
        yield from differences(f"overlay {overlay.name}", found, built, wanted)


def in_compose(path, built, pulled):
    if not path.exists():
        yield f"{path.name} is missing, its images cannot be compared"
        return
    services = yaml.safe_load(path.read_text())["services"]
    found = {defaults(service["image"]) for service in services.values() if "image" in service}
    yield from differences(path.name, found, built, pulled)


def differences(where, found, built, pulled):
    found = {known_as(image, built) for image in found}
    for image in sorted(found - built - pulled):
        yield f"{where}: image {image} is neither built by skaffold.yaml nor in infra/images/names: call it the same in all"
    for image in sorted((built | pulled) - found):
        yield f"{where}: nothing runs {image}, which skaffold.yaml or infra/images/names has: call it the same in all"


def known_as(image, built):
    """Those that we build have a tag, and may have a registry, of their own in each place; the others are what they are."""
    path, slash, name = image.rpartition("/")
    untagged = path + slash + name.partition(":")[0]
    return next((ours for ours in built if f"/{untagged}".endswith(f"/{ours}")), image)


def defaults(text):
    """What compose makes of ${NAME:-default} if nothing is set."""
    return re.sub(r"\$\{\w+(?::?-([^}]*))?\}", lambda match: match[1] or "", text)


def configuration(root, skaffold):
    if skaffold["apiVersion"] != "skaffold/v4beta13":
        yield f"skaffold.yaml: apiVersion {skaffold['apiVersion']} is not what this was checked with, skaffold/v4beta13"
    if {artifact["image"] for artifact in skaffold["build"]["artifacts"]} != {"ticketing/tickets", "ticketing/orders"}:
        yield "skaffold.yaml: artifacts have to be ticketing/tickets and ticketing/orders"
    profiles = {profile["name"]: profile for profile in skaffold.get("profiles", [])}
    if "prod" not in profiles:
        yield "skaffold.yaml: there is no profile prod"
    paths = [path for part in (skaffold, *profiles.values()) for path in part["manifests"]["kustomize"]["paths"]]
    for artifact in skaffold["build"]["artifacts"]:
        paths += [artifact["custom"]["buildCommand"], *artifact["custom"]["dependencies"]["paths"]]
    for path in dict.fromkeys(paths):
        if not (root / path).exists():
            yield f"skaffold.yaml: there is no {path}"


def forwards(skaffold, overlays):
    dev = next(overlay for overlay in overlays if overlay.name == "dev")
    for forward in skaffold["portForward"]:
        service = dev.of("Service").get(forward["resourceName"], {"spec": {"ports": []}})
        if forward["port"] not in [port["port"] for port in service["spec"]["ports"]]:
            yield f"skaffold.yaml: forwards port {forward['port']} of {forward['resourceName']}, which dev does not have"
        if forward["namespace"] != "ticketing":
            yield f"skaffold.yaml: forwards {forward['resourceName']} of another namespace than ticketing"
