"""Client of the server's HTTP API.

No answer is ServerUnavailable, a refusal is BadInput with the server's own sentence. A watcher's
poll waits on the server, so events arrive at once and nobody polls in vain.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import quote

import httpx

from lorabbit.config.enrollment import JoinTokenRequest
from lorabbit.config.network import TlsSettings, tls_error
from lorabbit.errors import BadInput, NotAllowed, RunFailed, ServerUnavailable
from lorabbit.events.job_events import EVENTS, AnyEvent, JobEnded
from lorabbit.events.report import Report
from lorabbit.job.spec import JobSpec
from lorabbit.runtime.atomic_files import replacing

TIMEOUT_SECONDS = 10.0
WAIT_SECONDS = 20.0
PATIENCE_SECONDS = 60.0
"""How long `watch` bears a server that does not answer, once it has answered."""
WRITTEN_SECONDS = 0.1
"""Between two questions whether a run folder is whole."""


class ApiClient:
    """A server, by its URL."""

    def __init__(self, url: str, *, token: str | None = None, trust: TlsSettings | None = None) -> None:
        """Connect to nothing yet; `token` is what the server asks its operator for."""
        self._url = url.rstrip("/")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        verify = (trust or TlsSettings()).context() if self._url.startswith("https:") else True
        try:
            self._http = httpx.Client(base_url=self._url, timeout=TIMEOUT_SECONDS, headers=headers, verify=verify)
        except (httpx.InvalidURL, ValueError) as error:
            raise BadInput(f"{url!r} is no URL of a server: {error}") from error

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, spec: JobSpec) -> str:
        """Queue a job; returns its id."""
        return str(self._json("POST", "/jobs", content=spec.model_dump_json())["job"])

    def jobs(self) -> list[dict[str, Any]]:
        """Return every job, oldest first."""
        listed: list[dict[str, Any]] = self._json("GET", "/jobs")
        return listed

    def newest(self) -> str:
        """Name the job that was submitted last; raises BadInput when there is none."""
        jobs = self.jobs()
        if not jobs:
            raise BadInput("no job has been submitted yet; submit one with: lorabbit submit FILE")
        return str(max(jobs, key=lambda job: int(job["submitted_ms"]))["job"])

    def status(self, job: str | None) -> dict[str, Any]:
        """Return where a job stands and whom it waits for; the job that was submitted last when None."""
        status: dict[str, Any] = self._json("GET", f"/jobs/{quote(job, safe='')}" if job else "/status")
        return status

    def spec(self, job: str) -> JobSpec:
        """Return the job as it was submitted."""
        return JobSpec.model_validate(self._json("GET", f"/jobs/{quote(job, safe='')}/spec"))

    def cancel(self, job: str) -> dict[str, Any]:
        """End a job."""
        answer: dict[str, Any] = self._json("POST", f"/jobs/{quote(job, safe='')}/cancel")
        return answer

    def report(self, job: str) -> Report:
        """Return the report as it is now."""
        return Report.model_validate(self._json("GET", f"/jobs/{quote(job, safe='')}/report"))

    def clients(self) -> list[dict[str, Any]]:
        """Return every client that the server knows."""
        clients: list[dict[str, Any]] = self._json("GET", "/clients")
        return clients

    def make_token(self, wish: JoinTokenRequest) -> dict[str, Any]:
        """Make a join token; returns it with its id."""
        made: dict[str, Any] = self._json("POST", "/tokens", json=wish.model_dump())
        return made

    def tokens(self) -> list[dict[str, Any]]:
        """Return the join tokens that can still be used, without the secrets."""
        tokens: list[dict[str, Any]] = self._json("GET", "/tokens")
        return tokens

    def drop_token(self, token: str) -> None:
        """Make a join token worthless."""
        self._json("DELETE", f"/tokens/{quote(token, safe='')}")

    def revoke(self, client: str) -> dict[str, Any]:
        """Take a client's user away."""
        answer: dict[str, Any] = self._json("POST", f"/clients/{quote(client, safe='')}/revoke")
        return answer

    def ready(self) -> str | None:
        """Return what keeps the server from working; None when nothing does."""
        answer = self._ask("GET", "/readyz")
        return None if answer.is_success else _sentence(answer)

    def events(
        self, job: str, after: str = "", *, wait_seconds: float, progress: bool = True
    ) -> tuple[list[AnyEvent], str]:
        """Return a job's events after a cursor, waiting for the first; with them the cursor to go on from."""
        query = {"wait": str(wait_seconds), "progress": str(progress).lower(), **({"after": after} if after else {})}
        timeout = wait_seconds + TIMEOUT_SECONDS
        found = self._json("GET", f"/jobs/{quote(job, safe='')}/events", params=query, timeout=timeout)
        return [EVENTS.validate_python(each["event"]) for each in found], str(found[-1]["id"]) if found else after

    def watch(self, job: str) -> Iterator[AnyEvent]:
        """Yield a job's events from the first on, as they happen, up to its end, told once its run folder is whole."""
        after, silent_since = "", None
        while True:
            try:
                found, cursor = self.events(job, after, wait_seconds=WAIT_SECONDS)
            except ServerUnavailable:
                silent_since = silent_since or time.monotonic()
                if not after or time.monotonic() - silent_since > PATIENCE_SECONDS:
                    raise
                time.sleep(1.0)
                continue
            after, silent_since = cursor, None
            for event in found:
                if isinstance(event, JobEnded):
                    self._wait_until_written(job)
                    yield event
                    return
                yield event

    def _wait_until_written(self, job: str) -> None:
        """Return when the server has written everything of a job that has ended, or takes too long over it."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            with suppress(ServerUnavailable):
                if self.status(job)["status"] not in {"queued", "running"}:
                    return
            time.sleep(WRITTEN_SECONDS)

    def fetch(self, job: str, folder: Path, *, below: tuple[str, ...]) -> None:
        """Copy files of a job's run folder; `below` are file names, or folders with a slash at the end."""
        root = f"/jobs/{quote(job, safe='')}/files"
        for entry in self._json("GET", root):
            path = PurePosixPath(str(entry["path"]))
            if path.is_absolute() or ".." in path.parts:
                raise RunFailed(f"the server names the file {path}, which lies outside of the run folder")
            if not any(str(path) == name or (name.endswith("/") and str(path).startswith(name)) for name in below):
                continue
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self._download(f"{root}/{quote(str(path))}", target)

    def _download(self, address: str, target: Path) -> None:
        """Stream a file to the disk, where it appears whole or not at all: the target may be what is being read."""
        try:
            with self._http.stream("GET", address) as answer:
                if not answer.is_success:
                    answer.read()
                    raise _refusal(answer)
                suffix = f".{os.getpid()}.part"
                with replacing(target, suffix=suffix, durable=False) as temporary, temporary.open("wb") as file:
                    for block in answer.iter_bytes():
                        file.write(block)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _json(self, verb: str, path: str, **request: Any) -> Any:  # noqa: ANN401 - JSON
        answer = self._ask(verb, path, **request)
        if not answer.is_success:
            raise _refusal(answer)
        return answer.json()

    def _ask(self, verb: str, path: str, **request: Any) -> httpx.Response:  # noqa: ANN401 - httpx's own options
        try:
            return self._http.request(verb, path, **request)
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ServerUnavailable:
        why = tls_error(error) or error
        return ServerUnavailable(
            f"the server at {self._url} cannot be reached ({why}); start it with `lorabbit server`, "
            "or name another one with --server or LORABBIT_SERVER_URL"
        )


def _refusal(answer: httpx.Response) -> Exception:
    """Turn a refusal into the error that it means."""
    sentence = _sentence(answer)
    if answer.status_code in {401, 403}:
        return NotAllowed(sentence)
    if answer.status_code in {502, 503, 504}:
        return ServerUnavailable(sentence)
    return BadInput(sentence) if answer.is_client_error else RunFailed(f"the server failed: {sentence}")


def _sentence(answer: httpx.Response) -> str:
    """Return the server's own sentence, or what there is instead."""
    try:
        content = answer.json()
    except ValueError:
        content = None
    said = content.get("error") if isinstance(content, dict) else None
    return str(said) if said else f"{answer.request.url} answered {answer.status_code} {answer.reason_phrase}"
