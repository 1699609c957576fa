"""The HTTP interface: submit, watch and fetch; JSON in and out, errors as one sentence.

Everything but a submission or a cancellation reads the store and the run folders, so a server that
stands by answers too. A watcher's poll blocks on the store until there is something to tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import structlog
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from lorabbit import __version__
from lorabbit.errors import LoRAbbitError, NotAllowed, Retryable, StoreUnavailable
from lorabbit.events.job_events import EVENTS
from lorabbit.events.report import begin, fold
from lorabbit.job.spec import JobSpec
from lorabbit.job.validation import explain
from lorabbit.state.base import START
from lorabbit_server.api.auth import add_access, guard
from lorabbit_server.api.metrics import ServerMetrics
from lorabbit_server.api.status import JobSummary, StatusService, clients_wanted
from lorabbit_server.clients.listing import ClientInfo, list_clients
from lorabbit_server.health.dependencies import DependencyHealth
from lorabbit_server.server import Server

log = structlog.get_logger()
LONGEST_WAIT_SECONDS = 60.0
Json = dict[str, Any]


class NotFound(LoRAbbitError):
    """There is no such thing."""


STATUS: tuple[tuple[type[LoRAbbitError], int], ...] = ((NotFound, 404), (NotAllowed, 403), (Retryable, 503))
"""How errors of ours are told over HTTP; any other is 400."""


def make_app(service: Server, measures: ServerMetrics, status_service: StatusService | None = None) -> FastAPI:
    """Build the application of a server; `status_service` replaces the default, which waits for the store."""
    if status_service is None:
        status_service = StatusService(
            service, DependencyHealth(service.broker, service.store, service.now_ms), service.store
        )
    app = FastAPI(title="LoRAbbit", version=__version__)
    guard(app, service.settings.http_token, measures.count_refused_request)
    _add_errors(app)
    _add_jobs(app, service)
    _add_status(app, service, status_service)
    _add_watching(app, service)
    _add_files(app, service.settings.folder / "runs")
    _add_health(app, service, measures)
    add_access(app, service, measures.count_refused_request)
    return app


def _add_errors(app: FastAPI) -> None:
    """Answer every failure with one sentence."""

    @app.exception_handler(LoRAbbitError)
    def ours(_: Request, error: LoRAbbitError) -> JSONResponse:
        found = next((code for kind, code in STATUS if isinstance(error, kind)), 400)
        return JSONResponse({"error": str(error)}, found)

    @app.exception_handler(RequestValidationError)
    def parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])[:100]
        told = f"{where}: {first['msg']}".encode(errors="backslashreplace")  # half a surrogate pair cannot be answered
        return JSONResponse({"error": told.decode()}, 400)

    @app.exception_handler(HTTPException)
    def http(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code)


def _add_jobs(app: FastAPI, service: Server) -> None:
    """Take submissions and cancellations, and list jobs."""
    store = service.store

    @app.post("/jobs", status_code=201)
    async def submit(request: Request) -> Json:
        body = await request.body()
        try:
            spec = JobSpec.model_validate_json(body)
        except ValidationError as error:
            raise HTTPException(400, explain(error, JobSpec)) from error
        return {"job": await run_in_threadpool(service.submit, spec)}

    @app.get("/jobs")
    def jobs() -> list[Json]:
        shown = ("job", "status", "submitted_ms", "reason", "exit_code")
        return [{name: getattr(entry, name) for name in shown} for entry in store.jobs().values()]

    @app.post("/jobs/{job}/cancel")
    def cancel(job: str) -> Json:
        entries = store.jobs()
        if job not in entries:
            raise NotFound(_no_job(job, list(entries)))
        return {"job": job, "cancelled": service.cancel(job), "status": entries[job].status}


def _add_status(app: FastAPI, service: Server, status_service: StatusService) -> None:
    """Say where jobs stand and whom they wait for, also while the broker or the store is away."""

    @app.get("/status")
    def newest() -> JobSummary:
        found = status_service.status()
        if found is None:
            raise NotFound("no job has been submitted yet; submit one with: lorabbit submit FILE")
        return found

    @app.get("/jobs/{job}")
    def status(job: str) -> JobSummary:
        found = status_service.status(job)
        if found is None:
            raise NotFound(_no_job(job, list(service.store.jobs())))
        return found


def _add_watching(app: FastAPI, service: Server) -> None:
    """Serve what jobs and clients tell of themselves."""
    store = service.store

    def spec_of(job: str) -> JobSpec:
        entries = store.jobs()
        if job not in entries:
            raise NotFound(_no_job(job, list(entries)))
        return JobSpec.model_validate_json(entries[job].spec)

    @app.get("/jobs/{job}/spec")
    def spec(job: str) -> Json:
        return spec_of(job).model_dump(mode="json")

    @app.get("/jobs/{job}/events")
    def events(
        job: str,
        after: str = START,
        wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT_SECONDS)] = 0.0,
        progress: bool = True,  # noqa: FBT001, FBT002 - a query parameter
    ) -> list[Json]:
        spec_of(job)
        found = store.events(job, after, progress=progress, wait_seconds=wait)
        return [
            {"id": each.cursor, "event": EVENTS.validate_json(each.event).model_dump(mode="json")} for each in found
        ]

    @app.get("/jobs/{job}/report")
    def report(job: str) -> Json:
        spec = spec_of(job)
        logged = store.events(job, progress=False)
        return fold(begin(job, spec), (EVENTS.validate_json(each.event) for each in logged)).model_dump(mode="json")

    @app.get("/clients")
    def clients() -> list[ClientInfo]:
        lease_ms = round(service.settings.client_lease_seconds * 1000)
        heard_ms = service.registry.heard_ms if service.is_leading else {}
        return list_clients(store, heard_ms, now_ms=service.now_ms(), lease_ms=lease_ms)


def _add_files(app: FastAPI, runs: Path) -> None:
    """Serve what lies in run folders, and nothing else."""

    def folder(job: str) -> Path:
        path = (runs / job).resolve()
        if path.parent != runs.resolve() or not path.is_dir():
            raise NotFound(f"there is no run folder of a job {job!r} on this server")
        return path

    @app.get("/jobs/{job}/files")
    def files(job: str) -> list[Json]:
        root = folder(job)
        found = (p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".part")
        return [{"path": str(p.relative_to(root)), "bytes": p.stat().st_size} for p in found]

    @app.get("/jobs/{job}/files/{path:path}")
    def file(job: str, path: str) -> FileResponse:
        root = folder(job)
        wanted = (root / path).resolve()
        if not wanted.is_relative_to(root) or not wanted.is_file():
            raise NotFound(f"job {job!r} has no file {path!r}")
        return FileResponse(wanted)


def _add_health(app: FastAPI, service: Server, measures: ServerMetrics) -> None:
    @app.get("/healthz")
    def healthz() -> Json:
        return {"alive": True, "version": __version__}

    @app.get("/readyz")
    def readyz(standby: bool = False) -> JSONResponse:  # noqa: FBT001, FBT002 - a query parameter
        """Ready is leading; with ``standby``, standing by too, for there it can be told everything."""
        checks: Json = {"broker": service.broker.health(), "store": None, "lease": None}
        try:
            service.store.ping()
        except StoreUnavailable as error:
            checks["store"] = str(error)
        if not service.is_leading and not standby:
            own = service.faults.current(service.now_ms())
            checks["lease"] = own.reason if own else "another server leads, or none does yet; this one stands by"
        troubles = [str(trouble) for trouble in checks.values() if trouble]
        if troubles:
            return JSONResponse({"error": "; ".join(troubles), "checks": checks}, 503)
        return JSONResponse({"ready": True, "checks": checks})

    @app.get("/metrics")
    def metrics() -> Response:
        measures.note_clients(len(service.registry.present), wanted=clients_wanted(service.store))
        measures.note_refused(dict(service.refused))
        text = measures.text(is_leading=service.is_leading)
        return Response(text, media_type="text/plain; version=0.0.4")


def _no_job(job: str, known: list[str]) -> str:
    some = f" (jobs: {', '.join(known[-10:])})" if known else "; none has been submitted yet"
    return f"there is no job {job!r}{some}"
