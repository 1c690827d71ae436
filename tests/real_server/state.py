"""What the server says of itself."""

from typing import Any

from real_server.process import RunningServer


def versions(server: RunningServer, name: str) -> dict[int, dict[str, Any]]:
    """The resident versions of a name by number."""
    (entry,) = [entry for entry in server.get("/v1/guidance").json()["value_models"] if entry["name"] == name]
    return {version["version"]: version for version in entry["versions"]}


def running(server: RunningServer) -> int:
    """Leases held on any version."""
    value_models = server.get("/v1/guidance").json()["value_models"]
    return sum(version["running"] for value_model in value_models for version in value_model["versions"])


def worker_state(server: RunningServer) -> dict[str, Any]:
    """Straight from the worker, by one of vLLM's development routes."""
    state: dict[str, Any] = server.post("/collective_rpc", {"method": "qtilt_describe"}).json()["results"][0]
    return state
