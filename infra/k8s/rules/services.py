"""How pods are found: selectors, ports, the ingress, and what scales and protects them."""

from rules.objects import dig, selects

SERVICES = {"tickets-srv": {3000}, "orders-srv": {3000}, "nats-srv": {4222, 6222, 8222}, "postgres-srv": {5432}}
PATHS = {"/api/tickets": "tickets-srv", "/api/orders": "orders-srv"}


def check(overlay):
    pods = list(overlay.pods)
    yield from owners(pods)
    yield from services(overlay, pods)
    yield from ingress(overlay)
    yield from disruption_budgets(overlay, pods)
    yield from autoscalers(overlay)


def owners(pods):
    for pod in pods:
        selector = pod.owner["spec"].get("selector", {})
        if pod.kind != "Job":
            selected = [other.name for other in pods if selects(selector, other.labels)]
            if selected != [pod.name]:
                yield f"{pod.name}: its selector has to match its own pods and no others, and it matches {selected}"


def services(overlay, pods):
    found = overlay.of("Service")
    expected = {name: ports for name, ports in SERVICES.items() if name != "postgres-srv" or not overlay.is_prod}
    ports = {name: {port["port"] for port in service["spec"]["ports"]} for name, service in found.items()}
    if ports != expected:
        yield f"services are {ports}, and others rely on {expected}"
    for name, service in found.items():
        yield from targets(name, service["spec"], pods)
    for pod in pods:
        if pod.kind == "StatefulSet" and pod.owner["spec"]["serviceName"] not in found:
            yield f"{pod.name}: there is no service {pod.owner['spec']['serviceName']}"
    if dig(found, "nats-srv", "spec", "clusterIP") != "None":
        yield "Service nats-srv: clusterIP has to be None, or its nodes have no names"
    if not dig(found, "nats-srv", "spec", "publishNotReadyAddresses"):
        yield "Service nats-srv: without publishNotReadyAddresses nodes never find each other"


def targets(name, service, pods):
    selected = [pod for pod in pods if selects({"matchLabels": service["selector"]}, pod.labels)]
    if len(selected) != 1:
        yield f"Service {name}: selects {[pod.name for pod in selected]}, and it has to be one"
    for pod in selected:
        there = {port["name"]: port["containerPort"] for port in pod.spec["containers"][0]["ports"]}
        for port in service["ports"]:
            if there.get(port["targetPort"]) != port["port"]:
                yield f"Service {name}: port {port['port']} leads to {port['targetPort']}, and {pod.name} has {there}"


def ingress(overlay):
    found = {}
    for name, rules in overlay.of("Ingress").items():
        if overlay.is_prod and not rules["spec"].get("tls"):
            yield f"Ingress {name}: tokens would travel unencrypted, add tls"
        for path in (path for rule in rules["spec"]["rules"] for path in rule["http"]["paths"]):
            service = path["backend"]["service"]
            found[path["path"]] = service["name"]
            ports = dig(overlay.of("Service"), service["name"], "spec", "ports") or []
            if service["port"]["number"] not in [port["port"] for port in ports]:
                yield f"Ingress {name}: {path['path']} leads to a port that {service['name']} does not have"
    if found != PATHS:
        yield f"the ingress has {found}, and users expect {PATHS}"


def disruption_budgets(overlay, pods):
    found = overlay.of("PodDisruptionBudget")
    for name, budget in found.items():
        selected = [pod.name for pod in pods if selects(budget["spec"]["selector"], pod.labels)]
        if len(selected) != 1:
            yield f"PodDisruptionBudget {name}: selects {selected}, and it has to be one"
    if overlay.is_prod and set(found) != {"tickets", "orders", "nats"}:
        yield f"disruption budgets are {sorted(found)}: tickets, orders and nats need one"


def autoscalers(overlay):
    found = overlay.of("HorizontalPodAutoscaler")
    for name, scaler in found.items():
        target = overlay.of("Deployment").get(scaler["spec"]["scaleTargetRef"]["name"])
        if not target:
            yield f"HorizontalPodAutoscaler {name}: there is no Deployment {scaler['spec']['scaleTargetRef']['name']}"
        elif "replicas" in target["spec"]:
            yield f"HorizontalPodAutoscaler {name}: each apply would undo it, remove replicas from the Deployment"
        if scaler["spec"].get("minReplicas", 1) < 2:
            yield f"HorizontalPodAutoscaler {name}: minReplicas has to be 2 or more"
    if overlay.is_prod and set(found) != {"tickets", "orders"}:
        yield f"autoscalers are {sorted(found)}: tickets and orders need one"
