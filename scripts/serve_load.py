"""Poisson load on an OpenAI endpoint: the plan of a run, its requests, and what is seen of each.

A plan is drawn before anything is sent: when each request is due, how long its prompt is and how
long its answer may get; the same seed draws the same plan. A request is sent when it is due,
however the server fares: who is slow collects a queue, as with real clients. All times count from
when it was due, so what a client waits for one of its own few connections counts, too.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
from answers import Trouble

CHAT = "/v1/chat/completions"
WORDS = tuple(
    word
    for line in (
        "the of and to in is was for that on as with by at from his it an be are this had not but",
        "they have her which one you were all their there been who will more when she no if out so",
        "said what up its about into than them can only other time new some could these two may",
        "then do first any my now such like our over man me even most made after also did many",
    )
    for word in line.split()
)
"""Each of them is one token of most vocabularies, with the space before it."""


@dataclass(frozen=True)
class Lengths:
    """How many tokens: as many each time, or between two bounds, or log-normal."""

    text: str
    least: float
    most: float
    sigma: float | None = None
    """Of a log-normal distribution, whose median is then ``least``."""

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Read ``128``, ``64-512`` or ``lognormal:200:0.8`` (median and sigma); ValueError."""
        found = re.fullmatch(r"(\d+)(?:-(\d+))?|lognormal:(\d+):(\d*\.?\d+)", text)
        if found is None:
            raise ValueError(f"{text!r} is no N, A-B or lognormal:MEDIAN:SIGMA")
        if found[3]:
            return cls(text, float(found[3]), float("inf"), float(found[4]))
        return cls(text, float(found[1]), float(found[2] or found[1]))

    def draw(self, chance: random.Random) -> int:
        """Return a length of at least one."""
        if self.sigma is not None:
            return max(1, round(chance.lognormvariate(0, self.sigma) * self.least))
        return max(1, round(chance.uniform(self.least, self.most)))


@dataclass(frozen=True)
class Planned:
    """A request: seconds after the start, and the tokens of its prompt and of its answer."""

    due: float
    number: int
    input_tokens: int
    output_tokens: int


def plan(
    rate: float, seconds: float, inputs: Lengths, outputs: Lengths, seed: int
) -> list[Planned]:
    """Draw the requests that become due within *seconds* when *rate* a second do on average."""
    chance = random.Random(f"{seed} {rate}")  # noqa: S311
    due, planned = chance.expovariate(rate), list[Planned]()
    while due < seconds:
        planned.append(Planned(due, len(planned), inputs.draw(chance), outputs.draw(chance)))
        due += chance.expovariate(rate)
    return planned


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts of so many tokens out of words; nothing is known of the server's tokeniser.

    Two questions told how many tokens a word is and what the chat's template adds. All prompts
    begin with the same *shared_tokens*; the rest is each one's own.
    """

    seed: str
    shared_tokens: int = 0
    tokens_per_word: float = 1.0
    template_tokens: float = 0.0

    def of(self, seed: str, shared_tokens: int) -> PromptMaker:
        """Return one that knows the same of the server, and makes other prompts."""
        return replace(self, seed=seed, shared_tokens=shared_tokens)

    def prompt(self, number: int, tokens: int) -> str:
        """Return the text of the prompt *number*; of at least one word."""
        words = max(1, round((tokens - self.template_tokens) / self.tokens_per_word))
        shared = min(words, round(self.shared_tokens / self.tokens_per_word))
        return " ".join((*self._words("shared", shared), *self._words(number, words - shared)))

    def _words(self, of: object, count: int) -> list[str]:
        return random.Random(f"{self.seed} {of}").choices(WORDS, k=count)  # noqa: S311


@dataclass
class Seen:
    """What came of a request; times are seconds since it was due."""

    planned: Planned
    pieces: list[float] = field(default_factory=list)
    """When each piece of the answer came."""
    tokens: int | None = None
    """As the server counts them; None where it does not say."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    ended: float = 0.0
    error: str | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer, or its pieces where the server counts none."""
        return len(self.pieces) if self.tokens is None else self.tokens

    @property
    def first(self) -> float:
        """Seconds to the first piece, or to the end of an answer without any."""
        return self.pieces[0] if self.pieces else self.ended

    @property
    def gaps(self) -> list[float]:
        """Seconds between the pieces."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]

    @property
    def seconds_per_token(self) -> float:
        """Of all tokens but the first; 0 where there is no other."""
        rest = self.output_tokens - 1
        return (self.pieces[-1] - self.pieces[0]) / rest if rest > 0 and self.pieces else 0.0


class Endpoint:
    """An OpenAI endpoint, asked for streams of chat completions."""

    def __init__(
        self, session: aiohttp.ClientSession, base_url: str, model: str, extras: dict[str, Any]
    ) -> None:
        self._session = session
        self._url = base_url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._extras = extras
        self._usage: dict[str, Any] = {"stream_options": {"include_usage": True}}

    async def first_model(self) -> str:
        """Return the first of its models, and use it from now on; raise Trouble."""
        try:
            async with self._session.get(f"{self._url}/v1/models") as response:
                listed = await response.json(content_type=None)
            self._model = str(listed["data"][0]["id"])
        except aiohttp.ClientConnectorError as exc:
            raise Trouble(f"{self._url}: {_words(exc)}") from exc
        except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError) as exc:
            raise Trouble(f"{self._url} names no model ({exc!r}): say --model") from exc
        return self._model

    async def calibrated(self, maker: PromptMaker) -> PromptMaker:
        """Return *maker* with the words of this server's tokeniser; warms the server up as well.

        Raise Trouble where it does not answer.
        """
        few, many = 20, 220
        counts = []
        for words in (few, many):
            seen = await self._probe(maker.prompt(-words, words))
            if seen.error:
                raise Trouble(f"{self._url} does not answer: {seen.error}")
            counts.append(seen.prompt_tokens)
        if counts[0] is None or counts[1] is None or counts[1] <= counts[0]:
            return maker
        per_word = (counts[1] - counts[0]) / (many - few)
        return replace(maker, tokens_per_word=per_word, template_tokens=counts[0] - few * per_word)

    async def _probe(self, prompt: str) -> Seen:
        """Ask for one token; where usage in a stream is refused do without it from now on."""
        planned = Planned(0.0, 0, 0, 1)
        seen = await self.ask(planned, prompt, time.perf_counter())
        if seen.error and seen.error.startswith("400") and self._usage:
            self._usage = {}
            seen = await self.ask(planned, prompt, time.perf_counter())
        return seen

    async def ask(self, planned: Planned, prompt: str, due: float) -> Seen:
        """Send a request that was due at *due* and read its stream to the end."""
        seen = Seen(planned)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": planned.output_tokens,
            "stream": True,
            **self._usage,
            **self._extras,
        }
        try:
            async with self._session.post(self._url + CHAT, json=body) as response:
                if response.status != 200:
                    seen.error = f"{response.status} {_code(await response.read())}"
                else:
                    seen.error = await _read(response, seen, due)
        except TimeoutError:
            seen.error = "timeout"
        except ValueError:
            seen.error = "an event that is no JSON"
        except (aiohttp.ClientError, OSError) as exc:
            seen.error = _words(exc)
        seen.ended = time.perf_counter() - due
        return seen


def _words(exc: aiohttp.ClientError | OSError) -> str:
    """Return what is wrong with a connection."""
    if isinstance(exc, aiohttp.ClientConnectorError) and not isinstance(
        exc, aiohttp.ClientSSLError
    ):
        return f"nothing answers at {exc.host}:{exc.port}"
    return f"connection: {type(exc).__name__}"


async def _read(response: aiohttp.ClientResponse, seen: Seen, due: float) -> str | None:
    """Note the pieces of a stream; return what was wrong with it."""
    async for event in _events(response):
        if event is None:
            return None
        if "error" in event:
            return f"in the stream: {_code(json.dumps(event).encode())}"
        if any(_says_something(choice) for choice in event.get("choices") or ()):
            seen.pieces.append(time.perf_counter() - due)
        if usage := event.get("usage"):
            seen.tokens = usage.get("completion_tokens")
            seen.prompt_tokens = usage.get("prompt_tokens")
            details = usage.get("prompt_tokens_details") or {}
            seen.cached_tokens = details.get("cached_tokens")
    return "ended without [DONE]"


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any] | None]:
    """Yield the events of a stream; None is [DONE]."""
    async for line in response.content:
        name, _, value = line.decode(errors="replace").strip().partition(":")
        if name == "data":
            value = value.strip()
            yield None if value == "[DONE]" else json.loads(value)


def _says_something(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any(delta.get(part) for part in ("content", "reasoning_content", "tool_calls"))


def _code(body: bytes) -> str:
    """Return what an error calls itself."""
    try:
        error = json.loads(body)["error"]
        if isinstance(error, dict):
            return str(error.get("code") or error.get("type") or error.get("message"))[:60]
        return str(error)[:60]
    except (ValueError, LookupError, TypeError):
        return repr(body[:60])


async def run(
    endpoint: Endpoint,
    planned: Sequence[Planned],
    maker: PromptMaker,
    concurrency: int | None,
    ended: list[Seen],
) -> None:
    """Send *planned* when they are due; what was seen of each is added to *ended* as it ends."""
    seats = asyncio.Semaphore(concurrency or len(planned) or 1)
    start = time.perf_counter()

    async def send(one: Planned) -> None:
        await asyncio.sleep(start + one.due - time.perf_counter())
        async with seats:
            prompt = maker.prompt(one.number, one.input_tokens)
            ended.append(await endpoint.ask(one, prompt, start + one.due))

    async with asyncio.TaskGroup() as tasks:
        for one in planned:
            tasks.create_task(send(one))
