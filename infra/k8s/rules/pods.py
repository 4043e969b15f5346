"""What has to hold for every pod: nothing it does not need, an end in order, and a way to see whether it works."""

import re

from rules.objects import dig

SERVICE_PROBES = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
NATS_PROBES = {
    "startupProbe": "/healthz",
    "livenessProbe": "/healthz?js-enabled-only=true",
    "readinessProbe": "/healthz?js-server-only=true",
}
PROBES = {"tickets": SERVICE_PROBES, "orders": SERVICE_PROBES, "nats": NATS_PROBES}

POD_SETTINGS = {
    ("automountServiceAccountToken",): False,
    ("enableServiceLinks",): False,
    ("securityContext", "runAsNonRoot"): True,
    ("securityContext", "seccompProfile", "type"): "RuntimeDefault",
}
CONTAINER_SETTINGS = {
    ("imagePullPolicy",): "IfNotPresent",
    ("securityContext", "allowPrivilegeEscalation"): False,
    ("securityContext", "capabilities"): {"drop": ["ALL"]},
    ("securityContext", "readOnlyRootFilesystem"): True,
}
JOB_LIMITS = ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")


def check(overlay):
    for pod in overlay.pods:
        yield from settings(pod.name, pod.spec, POD_SETTINGS)
        yield from users(pod)
        yield from volumes(pod)
        yield from {"Job": job, "Deployment": deployment, "StatefulSet": stateful_set}[pod.kind](pod)
        for container in pod.containers:
            where = f"{pod.name}, container {container['name']}"
            yield from settings(where, container, CONTAINER_SETTINGS)
            yield from resources(where, container)
            yield from interpolation(where, container)
            if pod.kind != "Job":
                yield from probes(where, container)
            if overlay.is_prod:
                yield from tag(where, container["image"])


def settings(where, spec, wanted):
    for keys, value in wanted.items():
        if dig(spec, *keys) != value:
            yield f"{where}: {'.'.join(keys)} is {dig(spec, *keys)}, set it to {value}"


def users(pod):
    for key in ("runAsUser", "runAsGroup"):
        if not dig(pod.spec, "securityContext", key):
            yield f"{pod.name}: securityContext.{key} is missing or root"


def volumes(pod):
    claims = dig(pod.owner, "spec", "volumeClaimTemplates") or []
    there = {volume["name"] for volume in pod.spec.get("volumes", [])} | {claim["metadata"]["name"] for claim in claims}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in there:
                yield f"{pod.name}: mounts a volume {mount['name']} that it does not have"
    if claims and dig(pod.spec, "securityContext", "fsGroup") is None:
        yield f"{pod.name}: without securityContext.fsGroup it cannot write to its volume"
    if claims and dig(pod.spec, "securityContext", "fsGroupChangePolicy") != "OnRootMismatch":
        yield f"{pod.name}: fsGroupChangePolicy has to be OnRootMismatch, Postgres refuses what Always does to its files"


def job(pod):
    if pod.spec.get("restartPolicy") != "OnFailure":
        yield f"{pod.name}: restartPolicy has to be OnFailure"
    for key in JOB_LIMITS:
        if key not in pod.owner["spec"]:
            yield f"{pod.name}: {key} is missing"


def deployment(pod):
    if dig(pod.owner, "spec", "strategy", "rollingUpdate", "maxUnavailable") != 0:
        yield f"{pod.name}: strategy.rollingUpdate.maxUnavailable has to be 0, or an update takes replicas away"
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    for container in pod.containers:
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        stop = re.fullmatch(r"(\d+)s", env.get("STOP_GRACE") or "")
        sleep = dig(container, "lifecycle", "preStop", "sleep", "seconds")
        if not stop or not sleep:
            yield f"{pod.name}: STOP_GRACE (as in 20s) or lifecycle.preStop.sleep.seconds is missing"
        elif grace <= sleep + int(stop[1]):
            yield f"{pod.name}: terminationGracePeriodSeconds {grace} has to exceed preStop ({sleep} s) and STOP_GRACE ({stop[1]} s)"


def stateful_set(pod):
    if pod.spec.get("terminationGracePeriodSeconds", 30) < 60:
        yield f"{pod.name}: terminationGracePeriodSeconds has to be 60 or more"


def resources(where, container):
    for kind in ("requests", "limits"):
        for resource in ("cpu", "memory"):
            if not dig(container, "resources", kind, resource):
                yield f"{where}: resources.{kind}.{resource} is missing"


def interpolation(where, container):
    """Kubernetes replaces $(NAME) in a value only if NAME stands before it, and leaves it as it is otherwise."""
    known = set()
    for variable in container.get("env", []):
        if variable["name"] in known:
            yield f"{where}: {variable['name']} is there twice"
        for name in re.findall(r"\$\((\w+)\)", variable.get("value", "")):
            if name not in known:
                yield f"{where}: {variable['name']} uses $({name}), which has to be defined before it"
        known.add(variable["name"])
    for name in re.findall(r"\$\((\w+)\)", " ".join(container.get("args", []))):
        if name not in known:
            yield f"{where}: args use $({name}), which is not in env"


def probes(where, container):
    ports = {port["name"] for port in container.get("ports", [])}
    for probe in SERVICE_PROBES:
        found = container.get(probe)
        if not found:
            yield f"{where}: {probe} is missing"
        elif container["name"] in PROBES:
            wanted = PROBES[container["name"]][probe]
            if dig(found, "httpGet", "path") != wanted:
                yield f"{where}: {probe} has to ask for {wanted}"
            if dig(found, "httpGet", "port") not in ports:
                yield f"{where}: {probe} asks at a port that the container does not name"
        elif "--host=127.0.0.1" not in (dig(found, "exec", "command") or []):
            yield f"{where}: {probe} has to ask over TCP, see the comment there"


def tag(where, image):
    if image.rpartition("/")[2].partition(":")[2] in ("", "latest"):
        yield f"{where}: image {image} has no version; give it one under `images` of the overlay"
