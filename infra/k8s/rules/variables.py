"""Files that read the environment: does the container which gets the file have the variables?"""

import re

from rules.objects import dig


def check(overlay):
    for pod in overlay.pods:
        container = pod.spec["containers"][0]
        env = {variable["name"] for variable in container.get("env", [])}
        if container["name"] == "nats":
            files = mounted(overlay, pod, "config")
            read = nats_variables(files, container["args"][1].removeprefix("/etc/nats/"))
        elif container["name"] == "postgres":
            read = set(re.findall(r"^\\getenv \w+ (\w+)$", mounted(overlay, pod, "roles")["roles.sql"], re.MULTILINE))
        else:
            continue
        for name in sorted(read - env):
            yield f"{pod.name}: its configuration reads {name}, which is not in env"


def mounted(overlay, pod, volume):
    name = next(dig(found, "configMap", "name") for found in pod.spec["volumes"] if found["name"] == volume)
    return dig(overlay.of("ConfigMap"), name, "data")


def nats_variables(files, name):
    text = re.sub(r"^\s*#.*$", "", files[name], flags=re.MULTILINE)
    included = re.findall(r"\binclude\s+([\w.-]+)", text)
    return set(re.findall(r"\$(NATS_\w+)", text)).union(*(nats_variables(files, other) for other in included))
