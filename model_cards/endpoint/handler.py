"""Inference Endpoint of an altmoe model: this file and requirements.txt lie in the model repository's root.

Comes in: `{"inputs": ..., "parameters": ...}` with texts, and images or sounds as base64. Goes out: JSON. Only
transformers and the repository's own code are needed. No file is ever opened by a name that came in.

    {"inputs": {"image": b64}, "parameters": {"candidate_labels": ["a dog", "a cat"]}}      labels with probabilities
    {"inputs": {"text": "a dog", "candidates": {"image": [b64, b64]}}, "parameters": {"top_k": 1}}       ranked items
    {"inputs": {"image": [b64], "text": ["a dog"]}, "parameters": {"task": "embed"}}              latents, by modality
    {"inputs": {"image": b64}, "parameters": {"task": "embed", "direction": "image->text"}}         predicted latents

Errors: a bad request raises [`RequestError`]. The endpoint's server answers any exception with status 400 and
`{"error": message}`; a returned `{"error": ...}` would arrive with status 200, as if all were well.
"""

import base64
import binascii
import http.client
import io
import ipaddress
import os
import socket
import ssl
import time
import warnings
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoModel, AutoProcessor

MAX_ITEMS = int(os.environ.get("ALTMOE_MAX_ITEMS", 64))  # of one request, queries and candidates together
MAX_BYTES = int(os.environ.get("ALTMOE_MAX_BYTES", 10_000_000))  # of one image or sound
MAX_PIXELS = int(os.environ.get("ALTMOE_MAX_PIXELS", 25_000_000))  # of one image
MAX_SECONDS = float(os.environ.get("ALTMOE_MAX_SECONDS", 60))  # of one sound
MAX_RATE = 192_000  # samples a second of one sound, before it is resampled
MAX_CHARACTERS = 10_000  # of one text
FETCH_SECONDS = 10
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class RequestError(ValueError):
    """A request that cannot be answered; the message is for the client.

    Args:
        status: for a server of one's own: 400 bad input, 413 too large, 415 not a picture or sound.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------- decoding


def read_image(data: bytes) -> Image.Image:
    """Bytes of an image file -> a loaded image, upright, of at most `MAX_PIXELS`.

    Raises:
        RequestError: not an image, of another format, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
        check_pixels(image)
        return ImageOps.exif_transpose(image)
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(f"The image has more than {MAX_PIXELS} pixels: make it smaller.", 413) from error
    except Exception as error:  # decoders differ in what they raise on damaged files
        raise RequestError(f"This is not a readable image. Formats: {', '.join(FORMATS)}.", 415) from error


def check_pixels(image: Image.Image) -> Image.Image:
    """The image itself.

    Raises:
        RequestError: it has more than `MAX_PIXELS`.
    """
    if image.width * image.height > MAX_PIXELS:
        raise RequestError(
            f"The image has {image.width} x {image.height} pixels, at most {MAX_PIXELS} are taken: make it smaller.",
            413,
        )
    return image


def read_sound(data: bytes, sampling_rate: int) -> np.ndarray:
    """Bytes of a sound file -> a mono signal `(samples,)` at the encoder's rate, of at most `MAX_SECONDS`.

    Raises:
        RequestError: not a sound, too long, or no decoder is installed.
    """
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:
        raise RequestError("Sounds cannot be read here: soundfile and soxr are not installed.") from error
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, most = file.samplerate, int(MAX_SECONDS * file.samplerate)
            if file.channels > 8:
                raise RequestError(f"The sound has {file.channels} channels, at most 8 are taken.")
            if rate > MAX_RATE:
                raise RequestError(f"The sound has {rate} samples a second, at most {MAX_RATE} are taken.")
            blocks = file.blocks(65536, frames=most + 1, dtype="float32", always_2d=True)  # silence packs very small
            signal = np.concatenate([block.mean(axis=1) for block in blocks] or [np.zeros(0, np.float32)])
    except (soundfile.SoundFileError, ValueError, TypeError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError("This is not a readable sound. Send WAV, FLAC, OGG or MP3.", 415) from error
    if len(signal) > most:
        raise RequestError(f"The sound is longer than {MAX_SECONDS:g} seconds: send a part of it.", 413)
    if not len(signal):
        raise RequestError("The sound is empty.")
    return soxr.resample(signal, rate, sampling_rate)


def decode(item, kind: str) -> bytes:
    """What a client sent for an image or a sound -> the file's bytes.

    Args:
        item: base64, a `data:` URL, raw bytes, or, where `ALTMOE_ALLOW_URLS=1`, an http(s) URL.
        kind: `"image"` or `"audio"`, for messages.

    Raises:
        RequestError: none of these, or more than `MAX_BYTES`.
    """
    if isinstance(item, str):
        text = item.strip()
        if text[:7].lower() == "http://" or text[:8].lower() == "https://":
            if os.environ.get("ALTMOE_ALLOW_URLS") != "1":
                raise RequestError(f"URLs are refused here: send the {kind} itself as base64.")
            return fetch(text)
        if text[:5].lower() == "data:":
            head, comma, text = text.partition(",")
            if not comma or not head.lower().endswith(";base64"):
                raise RequestError("A data: URL must be base64, e.g. 'data:image/png;base64,...'.")
        if len(text) > MAX_BYTES * 4 // 3 + 1000:
            raise RequestError(f"The {kind} is larger than {MAX_BYTES} bytes.")
        try:
            item = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"The {kind} is not base64. File names are not opened: send its content.") from error
    if not isinstance(item, (bytes, bytearray)):
        raise RequestError(f"An {kind} must be a base64 string, got {type(item).__name__}.")
    if not item or len(item) > MAX_BYTES:
        raise RequestError(f"The {kind} has {len(item)} bytes, expected 1 to {MAX_BYTES}.")
    return bytes(item)


# ---------------------------------------------------------------- URLs, off unless ALTMOE_ALLOW_URLS=1


def public_address(host: str, port: int) -> str:
    """The host's first address, if all that it resolves to are on the public internet.

    Raises:
        RequestError: unknown, private, loopback, link-local, multicast, or a tunnel to such.
    """
    try:
        found = [ipaddress.ip_address(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, ValueError, UnicodeError) as error:
        raise RequestError("The URL's host is unknown.") from error
    for address in found:
        public = address.is_global and not address.is_multicast
        if address.version == 6:  # 2000::/3 is what is routed; no tunnels that carry an IPv4 address inside
            routed = address in ipaddress.ip_network("2000::/3")
            public = public and routed and address.sixtofour is None and address.teredo is None
        if not public:
            raise RequestError("The URL's host is not on the public internet.")
    return str(found[0])


def fetch(url: str) -> bytes:
    """Read a public http(s) URL: no redirects, at most `MAX_BYTES` and `FETCH_SECONDS`.

    The connection goes to the very address that was checked, so that a second look-up cannot lead elsewhere.

    Raises:
        RequestError: refused, too slow, too large or not found.
    """
    deadline = time.monotonic() + FETCH_SECONDS
    try:
        parts = urlsplit(url)
        host, secure = parts.hostname, parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
    except ValueError as error:
        raise RequestError("The URL cannot be read.") from error
    if parts.scheme not in ("http", "https") or not host or parts.username is not None:
        raise RequestError("A URL must be http(s)://host/path, without a user name.")
    address = public_address(host, port)
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(host, port, timeout=FETCH_SECONDS)
    try:
        connection.sock = socket.create_connection((address, port), timeout=FETCH_SECONDS)
        if secure:
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "altmoe", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RequestError(f"The URL was answered with status {answer.status}; redirects are not followed.")
        content = bytearray()
        while part := answer.read1(65536):
            content += part
            if len(content) > MAX_BYTES:
                raise RequestError(f"The URL's content is larger than {MAX_BYTES} bytes.")
            if time.monotonic() > deadline:
                raise RequestError(f"The URL took longer than {FETCH_SECONDS} seconds.")
        return bytes(content)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"The URL could not be read ({type(error).__name__}).") from error
    finally:
        connection.close()


# ---------------------------------------------------------------- the handler


def as_list(value) -> list:
    """One item or several -> a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


class EndpointHandler:
    """Answers requests; made once, at start.

    Args:
        path: folder of the model repository (default: the folder of this file).
    """

    def __init__(self, path: str = ""):
        path = path or os.path.dirname(os.path.abspath(__file__))
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        self.kinds = {modality: self.processor.kind(modality) for modality in self.processor.processors}

    @torch.inference_mode()
    def __call__(self, data: dict):
        """One request -> a list or dict of plain numbers and strings; see the top of the file.

        Raises:
            RequestError: bad input, in words for the client.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise RequestError(f"'parameters' must be an object, got {type(parameters).__name__}.")
        known = {"task", "direction", "candidate_labels", "hypothesis_template", "top_k"}
        if unknown := set(parameters) - known:
            raise RequestError(f"Unknown parameters {sorted(map(str, unknown))}. Known: {', '.join(sorted(known))}.")
        if not isinstance(inputs, dict):  # as the standard tasks send them: labels for images, else texts to embed
            inputs = {self._first("image" if "candidate_labels" in parameters else "text"): inputs}
        inputs = dict(inputs)
        candidates, batch = inputs.pop("candidates", None), any(isinstance(v, (list, tuple)) for v in inputs.values())
        if not inputs or any(value is None for value in inputs.values()):
            raise RequestError(f"'inputs' holds no query. Give one of: {', '.join(self.kinds)}.")
        task = parameters.get("task")
        if task not in (None, "embed"):
            raise RequestError(f"Unknown task {task!r}. Known: 'embed'; leave it out to rank candidates or labels.")
        if task == "embed":
            answer = self._embed(inputs, parameters.get("direction"))
            return answer if batch else {name: rows[0] for name, rows in answer.items()}
        if "candidate_labels" in parameters:
            results = self._classify(inputs, parameters)
        elif isinstance(candidates, dict) and len(candidates) == 1:
            results = self._rank(inputs, candidates, parameters)
        else:
            raise RequestError(
                "Nothing to compare with. Give parameters.candidate_labels, inputs.candidates as {modality: [items]}, "
                "or parameters.task = 'embed'."
            )
        return results if batch else results[0]

    def _first(self, kind: str) -> str:
        for modality, own in self.kinds.items():
            if own == kind:
                return modality
        raise RequestError(f"This model has no {kind} encoder. It has: {', '.join(self.kinds)}.")

    def _read(self, items: dict, taken: int = 0) -> dict[str, list]:
        """Check and decode every item: `{modality: [text, PIL image or signal]}`; `taken` items were read before."""
        items = {modality: as_list(value) for modality, value in items.items()}
        if (count := taken + sum(map(len, items.values()))) > MAX_ITEMS:
            raise RequestError(f"{count} items in one request, at most {MAX_ITEMS} are taken.")
        read = {}
        for modality, values in items.items():
            if modality not in self.kinds:
                raise RequestError(f"This model has no modality {modality!r}. It has: {', '.join(self.kinds)}.")
            if not values:
                raise RequestError(f"{modality}: the list is empty.")
            read[modality] = []
            for position, value in enumerate(values):
                try:
                    read[modality].append(self._item(modality, value))
                except ValueError as error:
                    raise RequestError(f"{modality}, item {position}: {error}") from error
        return read

    def _item(self, modality: str, value):
        kind = self.kinds[modality]
        if kind == "text":
            if isinstance(value, str) and len(value) > MAX_CHARACTERS:
                raise RequestError(f"the text has {len(value)} characters, at most {MAX_CHARACTERS} are taken.")
            return self.processor.read(modality, value)
        if kind == "image":  # the server itself turns a body of type image/* into a PIL image
            image = value if isinstance(value, Image.Image) else read_image(decode(value, kind))
            return self.processor.read(modality, check_pixels(image))
        rate = self.processor.processors[modality].sampling_rate
        return self.processor.read(modality, read_sound(decode(value, kind), rate))

    def _encode(self, read: dict[str, list], adapted: bool) -> dict[str, torch.Tensor]:
        """Latents `{modality: (n, latent_size)}`; sounds one by one, since their lengths differ."""
        result = {}
        for modality, items in read.items():
            rows = []
            for group in [[item] for item in items] if self.kinds[modality] == "audio" else [items]:
                tensors = self.processor.batch(modality, group)
                tensors = {name: torch.as_tensor(tensor).to(self.model.device) for name, tensor in tensors.items()}
                rows.append(self.model.encode(modality, tensors, adapted=adapted))
            result[modality] = torch.cat(rows)
        return result

    def _direction(self, read: dict[str, list], target: str | None, asked: str | None = None) -> str:
        """The direction from these modalities to the target, or the one that was asked for."""
        for direction in self.model.directions:
            sources, to = self.model.config.resolve(direction)
            if set(sources) == set(read) and target in (None, to) and asked in (None, direction):
                if len({len(items) for items in read.values()}) > 1:
                    raise RequestError(f"{direction}: each query needs one item of every source.")
                return direction
        wanted = asked or f"{'+'.join(sorted(read))}->{target}"
        given = ", ".join(sorted(read))
        raise RequestError(f"No direction {wanted} from inputs of {given}. It has: {', '.join(self.model.directions)}.")

    def _embed(self, inputs: dict, direction: str | None) -> dict[str, list]:
        """Latents by modality; with a direction, what it predicts for its target."""
        read = self._read(inputs)
        if direction is None:
            return {modality: rows.tolist() for modality, rows in self._encode(read, adapted=False).items()}
        direction = self._direction(read, None, direction)
        target = self.model.config.resolve(direction)[1]
        return {target: self.model.predict(self._encode(read, adapted=True), direction).tolist()}

    def _rank(self, inputs: dict, candidates: dict, parameters: dict) -> list[list[dict]]:
        """For each query `[{"index", "score"}, ...]`, best first; texts come back as `"text"`."""
        ((target, values),) = candidates.items()
        queries = self._read(inputs)
        direction = self._direction(queries, target)
        items = self._read({target: values}, taken=sum(map(len, queries.values())))
        scores = self.model.score(
            direction, self._encode(queries, adapted=True), self._encode(items, adapted=False)[target]
        )
        shown = {"text": as_list(values)} if self.kinds[target] == "text" else {}
        return _best(scores, parameters.get("top_k"), {"index": range(scores.shape[1]), **shown})

    def _classify(self, inputs: dict, parameters: dict) -> list[list[dict]]:
        """For each query `[{"label", "score"}, ...]`: a softmax over the labels, as the standard tasks give it."""
        labels, template = parameters["candidate_labels"], parameters.get("hypothesis_template", "{}")
        labels = [part.strip() for part in labels.split(",")] if isinstance(labels, str) else labels
        if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
            raise RequestError("candidate_labels must be a list of strings, or one string with commas.")
        if not isinstance(template, str) or template.count("{}") != 1:
            raise RequestError("hypothesis_template must be a string with one {}, e.g. 'a picture of {}'.")
        target, read = self._first("text"), self._read(inputs)
        if len(read) != 1 or target in read:
            raise RequestError("candidate_labels need one query modality that is not text.")
        ((source, items),) = read.items()
        texts = self._read({target: [template.replace("{}", label) for label in labels]}, taken=len(items))
        parts = []
        for queries, keys, turn in (({source: items}, texts, False), (texts, {source: items}, True)):
            (one,), (other,) = queries, keys
            direction = f"{one}->{other}"
            if direction not in self.model.directions:
                continue
            unit = self.model.queries(direction, self._encode(queries, adapted=True))
            cosine = unit @ self.model.gallery(direction, self._encode(keys, adapted=False)[other]).T
            logits = self.model.logit_scale[self.model.directions.index(direction)].exp() * cosine
            parts.append(logits.T if turn else logits)
        if not parts:
            raise RequestError(
                f"No direction between {source} and {target}. It has: {', '.join(self.model.directions)}."
            )
        return _best(torch.stack(parts).mean(0).softmax(-1), parameters.get("top_k"), {"label": labels})


def _best(scores: torch.Tensor, top_k: int | None, columns: dict) -> list[list[dict]]:
    """Scores `(queries, items)` -> for each query its items, best first."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise RequestError(f"top_k must be a whole number from 1, got {top_k!r}.")
    values, places = scores.float().cpu().topk(min(top_k or scores.shape[1], scores.shape[1]), dim=-1)
    return [
        [
            {**{name: column[place] for name, column in columns.items()}, "score": score}
            for score, place in zip(row, where, strict=True)
        ]
        for row, where in zip(values.tolist(), places.tolist(), strict=True)
    ]
