"""Which connections the policies of prod allow: those that are needed, and no other."""

from itertools import product

from rules.objects import selects

NAMESPACES = ("ingress-nginx", "monitoring", "somewhere-else")
DNS = {("dns", "UDP", 53), ("dns", "TCP", 53)}
# 443 stands for all of the world that nobody needs.
OUTSIDE = {("outside", "TCP", 5432), ("outside", "TCP", 443)}


def check(overlay):
    policies = overlay.of("NetworkPolicy")
    if not overlay.is_prod:
        return
    if not any(is_default_deny(policy["spec"]) for policy in policies.values()):
        yield "there is no NetworkPolicy that denies everything (podSelector: {}, both policyTypes, no rules)"
    specs = [policy["spec"] for policy in policies.values()]
    ours = {pod.labels["app.kubernetes.io/name"]: pod for pod in overlay.pods}
    needed = set(needed_edges(ours))
    found = set(allowed_edges(ours, specs))
    for source, (target, protocol, port) in sorted(needed - found):
        yield f"network policies stop {source} from reaching {target} at {port}/{protocol}: allow it, on both sides"
    for source, (target, protocol, port) in sorted(found - needed):
        yield f"network policies allow {source} to reach {target} at {port}/{protocol}, which nothing needs"


def is_default_deny(policy):
    return (
        policy["podSelector"] == {}
        and set(policy["policyTypes"]) == {"Ingress", "Egress"}
        and not policy.get("ingress")
        and not policy.get("egress")
    )


def needed_edges(ours):
    yield from product(ours, DNS)
    for service in ("tickets", "orders"):
        yield from product((service, f"{service}-migrate"), [("outside", "TCP", 5432)])
        yield from product(("ingress-nginx", "monitoring"), [(service, "TCP", 3000)])
        yield service, ("nats", "TCP", 4222)
    yield "provision", ("nats", "TCP", 4222)
    yield "nats", ("nats", "TCP", 6222)
    yield "monitoring", ("nats", "TCP", 8222)


def allowed_edges(ours, policies):
    targets = DNS | OUTSIDE | {(name, "TCP", port) for name, pod in ours.items() for port in ports(pod)}
    for source, target in product([*ours, *NAMESPACES], targets):
        leaves = source not in ours or allows(policies, "Egress", ours[source], peer(target[0], ours), target)
        arrives = target[0] not in ours or allows(policies, "Ingress", ours[target[0]], peer(source, ours), target)
        # What strangers do among themselves is not for our policies.
        if leaves and arrives and (source in ours or target[0] in ours):
            yield source, target


def ports(pod):
    return [port["containerPort"] for container in pod.containers for port in container.get("ports", [])]


def peer(name, ours):
    """The labels of a namespace (None: ours; outside there are none) and of a pod in it."""
    if name in ours:
        return None, ours[name].labels
    if name == "dns":
        return {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}
    if name == "outside":
        return "outside", {}
    return {"kubernetes.io/metadata.name": name}, {}


def allows(policies, direction, pod, other, target):
    mine = [one for one in policies if direction in one["policyTypes"] and selects(one["podSelector"], pod.labels)]
    rules = [rule for policy in mine for rule in policy.get(direction.lower(), [])]
    return not mine or any(rule_allows(rule, direction, other, target) for rule in rules)


def rule_allows(rule, direction, other, target):
    _, protocol, port = target
    allowed = [(one.get("protocol", "TCP"), one["port"]) for one in rule.get("ports", [])]
    peers = rule.get("to" if direction == "Egress" else "from", [])
    port_fits = not allowed or (protocol, port) in allowed
    return port_fits and (not peers or any(peer_fits(one, *other) for one in peers))


def peer_fits(wanted, namespace, labels):
    if "ipBlock" in wanted or namespace == "outside":
        # Which addresses are behind names is not known here: a block counts as the outside.
        return "ipBlock" in wanted and namespace == "outside"
    if "namespaceSelector" not in wanted and namespace is not None:
        return False
    if "namespaceSelector" in wanted:
        own = {"kubernetes.io/metadata.name": "ticketing"}
        if not selects(wanted["namespaceSelector"], own if namespace is None else namespace):
            return False
    return selects(wanted.get("podSelector", {}), labels)
