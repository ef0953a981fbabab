"""Settings of calls to a language model behind an OpenAI-compatible server, and of what they may cost."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raglan.recipe.base import Settings

__all__ = ["EndpointSettings", "MoneySettings", "PriceSettings", "ServedSettings"]

SECRETS, SETTLED = ("api-key", "hf-token"), ("host", "port", "uds", "model", "served-model-name")  # of a server's arguments
Dollars = Annotated[Decimal, Field(ge=0, max_digits=12, decimal_places=6)]


class PriceSettings(Settings):
    """US dollars per million tokens, at most six places behind the point."""

    input: Dollars
    cached: Dollars | None = Field(None, description="Prompt tokens that the server had in its cache; default as `input`.")
    output: Dollars
    as_of: date | None = Field(None, description="When the price list said so.")

    @model_validator(mode="after")
    def _cached_is_no_dearer(self) -> PriceSettings:
        if self.cached is not None and self.cached > self.input:
            raise ValueError("cached tokens cannot cost more than new ones: the reserve reckons with `input`")
        return self


class MoneySettings(Settings):
    """What calls cost, and how much they may cost together."""

    price: PriceSettings | Literal["free"] | None = Field(
        None, description="US dollars per million tokens, or `free`; without it no call is sent."
    )
    cap_usd: Dollars | None = Field(
        None, description="All that the journal's calls may ever cost; a call that could exceed it is not sent."
    )


class EndpointSettings(Settings):
    """A chat model behind an OpenAI-compatible server."""

    kind: Literal["endpoint"] = "endpoint"
    base_url: str = Field(pattern=r"^https?://[^@\s?#]+$", description="As https://host/v1.")
    model: str = Field(min_length=1, description="The name that the server knows.")
    api_key_env: str | None = Field(None, description="The environment variable that holds the server's key.")
    concurrency: int = Field(16, ge=1, le=1024, description="Requests at a time, at most.")
    rpm: int | None = Field(None, ge=1, description="Requests a minute.")
    tpm: int | None = Field(None, ge=1, description="Tokens a minute, of prompt and reply.")
    timeout: float = Field(120.0, gt=0, description="Seconds a request may take.")
    attempts: int = Field(6, ge=1, description="Tries of one call that fails for a passing reason.")
    max_wait: float = Field(600.0, gt=0, description="Seconds that its requests and the waits between them may take in all.")
    max_tokens: int = Field(1024, ge=1, description="Longest reply, where the call does not say.")
    larger_limit: int | None = Field(
        None, ge=2, description="A reply cut off by `max_tokens` is asked for once more with so many; default is not at all."
    )
    limit_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the server calls the limit."
    )
    structured: Literal["auto", "strict", "json", "text"] = Field(
        "auto", description="How JSON is asked for: a strict schema, JSON mode, or in words; `auto` tries them once."
    )
    tokenizer: str | None = Field(
        None, description="The model's own, a folder or hub name, to bound prompts closer than by their bytes."
    )

    @field_validator("base_url")
    @classmethod
    def _no_slash(cls, value: str) -> str:
        return value.rstrip("/")


class ServedSettings(EndpointSettings):
    """A chat model on this machine: raglan starts a server for it, and ends it. It costs nothing unless `price` says so."""

    kind: Literal["vllm", "hf"]  # type: ignore[assignment]  # of the same union
    model: str = Field(min_length=1, description="A folder or a hub name.")
    base_url: str = Field(
        "http://127.0.0.1:8377/v1", pattern=r"^http://(127\.0\.0\.1|localhost):[1-9]\d{0,4}/v1/?$",
        description="Where it listens: on this machine.",
    )  # fmt: skip
    arguments: tuple[str, ...] = Field((), description="Further words of `serve`, as [--max-model-len, '8192'].")
    start_seconds: float = Field(1800.0, gt=0, description="Seconds that it may take until it answers.")

    @field_validator("base_url")
    @classmethod
    def _is_a_port(cls, value: str) -> str:
        if int(value.split(":")[2].partition("/")[0]) > 65535:
            raise ValueError("a port is a number up to 65535")
        return value

    @field_validator("arguments")
    @classmethod
    def _leave_the_rest(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        """No secret, and nothing that other settings say."""
        for word in words:
            name = word.partition("=")[0].replace("_", "-").lstrip("-")
            if word.startswith("-") and len(name) > 2 and any(secret.startswith(name) for secret in SECRETS):
                raise ValueError(
                    f"{word.partition('=')[0]} is a secret, and settings are written into manifests: leave it out, and export "
                    "it instead (HF_TOKEN for the Hugging Face hub)"
                )
            if word.startswith("-") and name in SETTLED:
                raise ValueError(f"--{name} follows from base_url and model")
        return words
