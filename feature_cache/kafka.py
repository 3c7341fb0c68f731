"""How every Kafka client of pretrade connects to its brokers: plainly, or over TLS and with a name and password.

One set of variables, `PRETRADE_KAFKA_*`, holds for worker, ingest, replay, the topic of decisions and the labels. They
are read whenever a client is made, so that the next connection uses a renewed certificate.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any, Final, Literal, Self

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code
from pydantic import SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX: Final = "PRETRADE_KAFKA_"
MAX_EVENT_BYTES: Final = 8 * 2**20
"""Largest market event. Only snapshots are large: a level takes about 10 bytes, and some books have over 100,000, which
is more than Kafka's default of 1 MiB."""


class KafkaSecurityError(KafkaError):  # type: ignore[misc]  # aiokafka has no types
    """The variables contradict each other, or name a file that cannot be used."""


class KafkaSecurity(BaseSettings):
    """How a client proves itself, and whom it trusts."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        secrets_dir=os.environ.get("PRETRADE_SECRETS_DIR"),
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    tls: bool = False
    """Speak TLS with the brokers, whose certificates must be for the names they are called by."""
    ca: Path | None = None
    """Certificates of the authorities that are trusted, PEM; unset: the system's."""
    certificate: Path | None = None
    """Our certificate with its chain, PEM, where brokers ask for one."""
    key: Path | None = None
    """Its private key, PEM."""
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    """How name and password are shown; unset: they are not. PLAIN needs TLS, since it hides nothing."""
    username: str = ""
    """Our name at the brokers."""
    password: SecretStr = SecretStr("")
    """Its password; may be a file of the variable's name in the directory `PRETRADE_SECRETS_DIR`."""

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if not self.tls and (self.ca or self.certificate or self.key):
            raise ValueError(f"{PREFIX}CA, _CERTIFICATE and _KEY need {PREFIX}TLS=true")
        if (self.certificate is None) != (self.key is None):
            raise ValueError(f"{PREFIX}CERTIFICATE and {PREFIX}KEY belong together")
        named = bool(self.username and self.password.get_secret_value())
        if named != (self.sasl_mechanism is not None):
            raise ValueError(f"{PREFIX}SASL_MECHANISM, _USERNAME and _PASSWORD belong together")
        if self.sasl_mechanism == "PLAIN" and not self.tls:
            raise ValueError(f"{PREFIX}SASL_MECHANISM=PLAIN needs {PREFIX}TLS=true")
        return self

    def options(self) -> dict[str, Any]:
        """Arguments of a client of aiokafka. Raises OSError for files that cannot be used."""
        options: dict[str, Any] = {
            "security_protocol": ("SASL_" if self.sasl_mechanism else "") + ("SSL" if self.tls else "PLAINTEXT")
        }
        if self.tls:
            options["ssl_context"] = context = ssl.create_default_context(cafile=self.ca)
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        if self.sasl_mechanism is not None:
            options |= {
                "sasl_mechanism": self.sasl_mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password.get_secret_value(),
            }
        return options


def client(bootstrap_servers: str) -> dict[str, Any]:
    """Arguments of every client of these brokers, `host:port` with commas between.

    Raises:
        KafkaSecurityError: The variables are wrong.
    """
    ours = {f"{PREFIX}{name.upper()}" for name in KafkaSecurity.model_fields}
    unknown = sorted(name for name in os.environ if name.upper().startswith(PREFIX) and name.upper() not in ours)
    if unknown:
        raise KafkaSecurityError(f"unknown settings: {', '.join(unknown)}")
    try:
        security = KafkaSecurity()
        return {"bootstrap_servers": bootstrap_servers, **security.options()}
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in error.errors())
        raise KafkaSecurityError(f"{PREFIX}*: {problems}") from None
    except OSError as error:  # of TLS, too
        raise KafkaSecurityError(f"{PREFIX}*: {error}") from error


async def create_topic(
    bootstrap_servers: str,
    topic: str,
    partitions: int,
    replicas: int = 1,
    max_message_bytes: int | None = None,
    *,
    compacted: bool = False,
) -> None:
    """Creates a topic where there is none; one that exists is left as it is.

    Args:
        bootstrap_servers: Comma-separated `host:port` of the brokers.
        topic: Its name.
        partitions: Its partitions.
        replicas: Copies of each partition.
        max_message_bytes: Largest batch that it takes; None leaves that to the brokers.
        compacted: Whether the brokers keep the last message of each key for ever, and may remove the others.

    Raises:
        KafkaError: The brokers cannot be reached, or refuse.
    """
    admin = AIOKafkaAdminClient(**client(bootstrap_servers), request_timeout_ms=5000)
    try:
        await admin.start()
        configuration = {} if max_message_bytes is None else {"max.message.bytes": str(max_message_bytes)}
        if compacted:
            configuration["cleanup.policy"] = "compact"
        answer = await admin.create_topics([NewTopic(topic, partitions, replicas, topic_configs=configuration)])
        for _, code, *message in answer.topic_errors:
            error = for_code(code)
            if code and error is not TopicAlreadyExistsError:
                raise error(*message)
    finally:
        await admin.close()
