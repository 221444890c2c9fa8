"""The service over HTTP: `POST /search`, `GET /health`, `GET /metrics`, and the documentation that FastAPI gives.

Comes in: JSON with a text or a latent, or a multipart form with an uploaded picture or sound; each source under the name of
its modality. Goes out: JSON. Concurrent queries are answered in one batch (see `batching`); uploads are decoded in threads.
"""

import asyncio
import concurrent.futures
import contextlib
import json
import time
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import to_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from serving.batching import Batcher
from serving.engine import Answer, Engine
from serving.gate import LOG, SEARCH, Gate
from serving.limits import Limits
from serving.metrics import Metrics

FORM = "multipart/form-data"
MAX_JSON = 1_000_000  # bytes of a JSON request, and of one plain field of a form


class HitModel(BaseModel):
    """One found item."""

    id: str
    score: float = Field(description="larger is better; comparable within one direction")
    columns: dict[str, Any] = Field(description="what the store keeps beside the vector")


class AnswerModel(BaseModel):
    """What one search brought."""

    direction: str
    hits: list[HitModel] = Field(description="best first")
    confidence: float | None = Field(description="that the first hit is a true match; null without a calibration")
    found: bool = Field(description="whether that is enough")
    milliseconds: dict[str, float] = Field(
        description="read: this request; encode, connector, search: its batch; total"
    )
    batch: int = Field(description="queries that were answered together")


class ErrorModel(BaseModel):
    """What was wrong, in one sentence."""

    error: str


def question_model(engine: Engine, limits: Limits) -> type[BaseModel]:
    """The JSON of a search, with a field for each text modality of this service."""
    text = (str | None, Field(None, max_length=limits.max_characters, description="a query in words"))
    texts = {modality: text for modality in engine.texts}
    targets = sorted({direction.partition("->")[2] for direction in engine.indexes})
    return create_model(
        "Question",
        __config__=ConfigDict(extra="forbid"),
        **texts,
        latent=(dict[str, list[float]] | None, Field(None, description="{modality: vector}, encoded elsewhere")),
        protocol=(str | None, Field(None, description="fingerprint of the latents' protocol, which is then checked")),
        target=(str | None, Field(None, description=f"what to find: {', '.join(targets)}")),
        k=(int, Field(10, ge=1, le=limits.max_k, description="results")),
        where=(
            dict[str, Any] | None,
            Field(None, description='{column: value | [values] | {"ge"|"gt"|"le"|"lt"|"ne"}}'),
        ),
    )


class Service:
    """
    Args:
        engine: what answers.
        limits: how much of everything.
    """

    def __init__(self, engine: Engine, limits: Limits):
        self.engine, self.limits, self.metrics = engine, limits, Metrics()
        self.batcher = Batcher(self._work, limits.max_batch, limits.max_wait, engine.weight)
        self.metrics.waiting.set_function(lambda: len(self.batcher))
        self.readers = concurrent.futures.ThreadPoolExecutor(limits.readers, thread_name_prefix="altmoe-read")
        self.question = question_model(engine, limits)
        self.about = engine.about()
        app = FastAPI(
            title="altmoe search",
            description=f"Search {', '.join(engine.indexes)} with {engine.name}.",
            lifespan=self._lifespan,
        )
        app.add_exception_handler(HTTPException, _refused)
        app.add_exception_handler(Exception, _failed)
        errors = {code: {"model": ErrorModel} for code in (400, 408, 413, 415, 500, 503, 504)}
        app.post(
            SEARCH, response_model=AnswerModel, responses=errors, openapi_extra={"requestBody": self._request_body()}
        )(self.search)
        app.get("/health")(self.health)
        app.get("/metrics", response_class=Response)(self.show_metrics)
        self.gate = Gate(app, self.metrics, limits.max_bytes, limits.max_queue, limits.timeout)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        self.batcher.start()
        yield
        await self.batcher.stop()
        self.readers.shutdown(wait=False, cancel_futures=True)

    def _request_body(self) -> dict:
        question = self.question.model_json_schema()
        uploads = [m for m in self.engine.sources() if self.engine.kinds.get(m) in ("image", "audio")]
        fields = {name: about for name, about in question["properties"].items() if name not in ("latent", "protocol")}
        fields.update({m: {"type": "string", "format": "binary"} for m in uploads})
        return {
            "content": {
                "application/json": {"schema": question},
                FORM: {"schema": {"type": "object", "properties": fields}},
            }
        }

    def _work(self, queries: list) -> list:
        answers = self.engine.answer(queries)
        first = next((answer for answer in answers if isinstance(answer, Answer)), None)
        if first is not None:
            self.metrics.batch(len(queries), first.seconds)
        return answers

    # ---------------------------------------------------------------- endpoints

    async def search(self, request: Request) -> Response:
        """Find items with a text, a picture, a sound or a latent. Name each source by its modality; several make a query
        for a direction that joins them."""
        start = time.perf_counter()
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            if kind == FORM:
                question, sources = await self._read_form(request)
            elif kind == "application/json":
                question, sources = self._read_json(await request.body()), {}
            else:
                raise HTTPException(415, f"Send application/json or {FORM}, not {kind or 'nothing'}.")
            query = self._query(question, sources)
        except ValidationError as error:
            raise HTTPException(400, _in_words(error)) from error
        except ValueError as error:
            raise HTTPException(getattr(error, "status", 400), str(error)) from error
        read = time.perf_counter()
        self.metrics.stage("read", read - start)
        try:
            answer = await self.batcher.submit(query)
        except OSError as error:
            LOG.error("the index cannot be reached: %s", error)
            raise HTTPException(503, "The index cannot be reached: try again in a moment.") from error
        times = {"read": read - start, **answer.seconds, "total": time.perf_counter() - start}
        request.scope["about"] = f" {answer.direction} batch {answer.batch}"
        hits = answer.hits
        shown = {
            "direction": answer.direction,
            "hits": [{"id": hit.id, "score": hit.score, "columns": hit.columns} for hit in hits],
            "confidence": hits.confidence,
            "found": hits.found,
            "milliseconds": {name: round(1000 * seconds, 3) for name, seconds in times.items()},
            "batch": answer.batch,
        }
        body = to_json(shown, inf_nan_mode="null", bytes_mode="base64", fallback=str)
        return Response(body, media_type="application/json")

    async def health(self) -> Response:
        """Whether searches are answered, and what can be searched."""
        ready = self.batcher.running and not self.gate.stopping
        status = "ready" if ready else "stopping" if self.gate.stopping else "broken"
        return JSONResponse({"status": status, **self.about}, 200 if ready else 503)

    async def show_metrics(self) -> Response:
        """Prometheus text."""
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    # ---------------------------------------------------------------- reading

    def _query(self, question: BaseModel, sources: dict[str, Any]):
        """A checked question and prepared uploads -> a query."""
        latents = question.latent or {}
        for modality, numbers in latents.items():
            if modality in sources:
                raise ValueError(f"'{modality}' is given twice, as an upload and as a latent.")
            sources[modality] = self.engine.latent(modality, numbers)
        if question.protocol is not None:
            self._check_protocol(latents, question.protocol)
        for modality in self.engine.texts:
            text = getattr(question, modality)
            if text is not None:
                if modality in sources:
                    raise ValueError(f"'{modality}' is given twice, as text and as a latent.")
                sources[modality] = self.engine.processor.read(modality, text)
        if not sources:
            raise ValueError(f"No query: give one of {', '.join(self.engine.sources())}, or a latent.")
        return self.engine.query(sources, question.target, question.k, question.where)

    def _check_protocol(self, latents: dict, protocol: str) -> None:
        for modality in latents:
            own = self.about["sources"][modality]["protocol"]
            if own != protocol:
                raise ValueError(f"The latent of '{modality}' is of protocol {protocol}, this model's is {own}.")

    def _read_json(self, body: bytes) -> BaseModel:
        if len(body) > MAX_JSON:
            raise HTTPException(413, f"The JSON has {len(body)} bytes, at most {MAX_JSON} are taken.")
        return self.question.model_validate_json(body)

    async def _read_form(self, request: Request) -> tuple[BaseModel, dict[str, Any]]:
        """A multipart form -> the question and its prepared uploads."""
        fields, sources = {}, {}
        count = len(self.engine.kinds)
        async with request.form(max_files=count, max_fields=count + 8, max_part_size=MAX_JSON) as form:
            for name, value in form.multi_items():
                if name in fields or name in sources:
                    raise ValueError(f"The field '{name}' is given twice.")
                if isinstance(value, UploadFile):
                    self.engine.kind(name)
                    sources[name] = await self._prepare(name, await value.read())
                elif self.engine.kinds.get(name) in ("image", "audio"):
                    raise HTTPException(415, f"'{name}' must be an upload, not text: paths and URLs are not opened.")
                else:
                    fields[name] = value
        for name in ("where", "latent"):
            if name in fields:
                try:
                    fields[name] = json.loads(fields[name])
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"The field '{name}' is not JSON.") from error
        return self.question.model_validate(fields), sources

    async def _prepare(self, modality: str, data: bytes):
        return await asyncio.get_running_loop().run_in_executor(self.readers, self.engine.prepare, modality, data)


def _in_words(error: ValidationError) -> str:
    """What pydantic found -> one sentence, without what was sent."""
    found = [f"{'.'.join(map(str, item['loc'])) or 'body'}: {item['msg']}" for item in error.errors()[:3]]
    return "; ".join(found) + "."


async def _refused(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "The service failed to answer; its log says why."}, 500)
