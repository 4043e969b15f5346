"""Every secret and config map that is used, with the keys that are used: are they there?"""

import re
from collections import defaultdict

import yaml

# A line of the comment that lists secrets: "#   name: KEY, KEY"
DOCUMENTED = re.compile(r"^#   ([a-z-]+): (\S.*)$", re.MULTILINE)


def check(overlay):
    secrets, maps = used(overlay)
    yield from missing("config map", maps, keys_of(overlay.of("ConfigMap")), "generate it")

    rendered, documented = keys_of(overlay.of("Secret")), documented_at(overlay.path)
    for name in sorted(rendered if overlay.is_prod else documented):
        yield f"secret {name}: prod has no secrets in its files, and others have nothing but those"
    there = documented if overlay.is_prod else rendered
    where = "list it at the top of the overlay" if overlay.is_prod else "generate it"
    yield from missing("secret", secrets, there, where)
    for name, keys in sorted(there.items()):
        for key in sorted(keys - secrets.get(name, set())):
            yield f"secret {name}: nothing uses its key {key}, remove it"


def missing(kind, used, there, advice):
    for name, keys in sorted(used.items()):
        if name not in there:
            yield f"{kind} {name} is used, and not there: {advice}"
        for key in sorted(keys - there.get(name, keys)):
            yield f"{kind} {name}: its key {key} is used, and not there: {advice}"


def used(overlay):
    """Keys by the names of secrets, and by the names of config maps."""
    secrets, maps = defaultdict(set), defaultdict(set)
    for pod in overlay.pods:
        for source in (source for container in pod.containers for source in sources(container)):
            for kind, found in (("secretKeyRef", secrets), ("configMapKeyRef", maps)):
                if kind in source:
                    found[source[kind]["name"]].add(source[kind]["key"])
        for volume in pod.spec.get("volumes", []):
            whole_or_items(volume.get("secret"), "secretName", secrets, overlay)
            whole_or_items(volume.get("configMap"), "name", maps, overlay)
    for ingress in overlay.of("Ingress").values():
        for tls in ingress["spec"].get("tls", []):
            secrets[tls["secretName"]] |= {"tls.crt", "tls.key"}
    return secrets, maps


def sources(container):
    if "envFrom" in container:
        raise ValueError(f"container {container['name']}: name variables one by one, so that none can be missing")
    return [variable["valueFrom"] for variable in container.get("env", []) if "valueFrom" in variable]


def whole_or_items(volume, name, found, overlay):
    if volume and "items" in volume:
        found[volume[name]] |= {item["key"] for item in volume["items"]}
    elif volume:
        known = keys_of(overlay.of("ConfigMap")) | documented_at(overlay.path)
        found[volume[name]] |= known.get(volume[name], set())


def keys_of(objects):
    return {name: set(found.get("data", {})) | set(found.get("stringData", {})) for name, found in objects.items()}


def documented_at(path):
    """The secrets in the comments of a kustomization and of all that it is made of."""
    text = (path / "kustomization.yaml").read_text()
    found = defaultdict(set)
    for name, keys in DOCUMENTED.findall(text):
        found[name] |= set(keys.split(", "))
    kustomization = yaml.safe_load(text)
    for part in kustomization.get("resources", []) + kustomization.get("components", []):
        if (path / part).is_dir():
            found |= documented_at(path / part)
    return found
