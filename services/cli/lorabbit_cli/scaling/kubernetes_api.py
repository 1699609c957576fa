"""The way to a cluster: the caller's kubeconfig or the pod's service account, and what refusals mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException

from lorabbit.config.settings import variable
from lorabbit.errors import BadInput
from lorabbit_cli.scaling.base import OverQuota

NAMESPACE_OF_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
UNAUTHORIZED, FORBIDDEN, SERVER_ERRORS, TOO_MANY = 401, 403, 500, 429
QUOTA = "exceeded quota"
SUCCESS = range(200, 300)
Json = dict[str, Any]


class ApiUnavailable(BadInput):
    """The cluster's API does not answer, for now or at all."""


@dataclass(frozen=True, slots=True)
class ClusterAccess:
    """A cluster and the namespace in it."""

    api: client.ApiClient
    namespace: str


def find_access(context: str | None, namespace: str | None) -> ClusterAccess:
    """Read the kubeconfig, or what a pod is given; raises BadInput where there is neither."""
    settings, file = client.Configuration(), variable("KUBECONFIG") or config.KUBE_CONFIG_DEFAULT_LOCATION
    try:
        config.load_kube_config(file, context=context, client_configuration=settings)
        inside = None
        at_hand = config.list_kube_config_contexts(file)
    except config.ConfigException as error:
        if context is not None:
            raise BadInput(f"--context: the kubeconfig has no usable context {context!r}: {error}") from error
        inside, at_hand = _inside(settings), ([], {})
    chosen = next((each for each in at_hand[0] if each["name"] == context), at_hand[1])
    of_context = chosen.get("context", {}).get("namespace")
    settings.retries = urllib3.Retry(total=2, connect=2, read=0, redirect=0, backoff_factor=0.2)
    return ClusterAccess(client.ApiClient(settings), namespace or of_context or inside or "default")


def _inside(settings: client.Configuration) -> str:
    """Use the service account of this pod; returns the pod's namespace."""
    try:
        config.load_incluster_config(client_configuration=settings)
        return NAMESPACE_OF_POD.read_text(encoding="utf-8").strip()
    except (config.ConfigException, OSError) as error:
        raise BadInput(
            "no cluster: there is no kubeconfig (KUBECONFIG, ~/.kube/config) and this is no pod with a service account"
        ) from error


def asked(call: Callable[..., Any], *arguments: str, **options: Any) -> Any:  # noqa: ANN401 - the library's own
    """Make a call and return its answer unread; raises ApiException for a refusal."""
    answer = call(*arguments, **options, _preload_content=False)
    if answer.status in SUCCESS:
        return answer
    refused = ApiException(status=answer.status, reason=answer.reason)
    refused.body = answer.data.decode(errors="replace")
    raise refused


def plain(call: Callable[..., Any], *arguments: str, **options: Any) -> Json:  # noqa: ANN401 - the library's own
    """Make a call and return its JSON: the library's models refuse what a newer cluster says."""
    found: Json = json.loads(asked(call, *arguments, **options).data)
    return found


@contextmanager
def answers(what: str) -> Iterator[None]:
    """Turn a refusal of the API, or its silence, into one sentence about what was to be done."""
    try:
        yield
    except ApiException as error:
        raise refusal(error, what) from error
    except urllib3.exceptions.HTTPError as error:
        raise ApiUnavailable(
            f"the cluster's API cannot be reached ({_short(error)}); name another with KUBECONFIG"
        ) from error


def refusal(error: ApiException, what: str) -> BadInput:
    """Say what a refusal means."""
    said = _sentence(error)
    if error.status == FORBIDDEN and QUOTA in said:
        return OverQuota(f"the namespace's quota does not let this command {what}: {said}")
    if error.status in {UNAUTHORIZED, FORBIDDEN}:
        return BadInput(f"no permission to {what}: {said}; see scaler.create in the chart's values")
    if error.status >= SERVER_ERRORS or error.status == TOO_MANY:
        return ApiUnavailable(f"the cluster's API could not {what}: {said}")
    return BadInput(f"the cluster refused to {what}: {said}")


def _sentence(error: ApiException) -> str:
    """Return the API's own message."""
    try:
        content: Any = json.loads(error.body or "")
    except ValueError:
        content = None
    said = content.get("message") if isinstance(content, dict) else None
    return str(said or error.reason or error.status)


def _short(error: Exception) -> str:
    """Return the innermost reason of a transport's error, without addresses of objects."""
    reason = getattr(error, "reason", None) or error
    return str(reason).rpartition(": ")[2]
