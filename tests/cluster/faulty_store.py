"""An object store that misbehaves on request: moto's S3 server behind a wrapper that injects faults a request.

    python -m tests.cluster.faulty_store HOST PORT

``PUT /_faults`` with a JSON list of rules sets what goes wrong from then on, ``GET /_faults`` tells how often each
rule met a request. A rule::

    {"match": "GET .*shard-", "kind": "status", "status": 503, "code": "SlowDown", "times": 3}

``match`` is a regular expression on "METHOD /path"; ``kind`` is "status" (an S3 error), "slow" (seconds before the
answer), "truncate" (the body ends early, and so says its length), "cut" (the body ends before the length it announced)
or "flip" (one bit of the body is another); it is over after ``times`` requests or ``seconds``.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

StartResponse = Callable[..., Any]

ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'


@dataclass
class Rule:
    match: str
    kind: str
    status: int = 503
    code: str = "SlowDown"
    times: int | None = None
    seconds: float | None = None
    delay: float = 0.0
    met: int = 0
    began: float = field(default_factory=time.monotonic)

    def takes(self, request: str) -> bool:
        """Whether this request is the rule's, which is then counted."""
        if not re.search(self.match, request):
            return False
        if self.times is not None and self.met >= self.times:
            return False
        if self.seconds is not None and time.monotonic() - self.began > self.seconds:
            return False
        self.met += 1
        return True


class FaultyStore:
    """WSGI: the wrapped application, with the rules' faults."""

    def __init__(self, application: Any) -> None:
        self._application, self._lock = application, threading.Lock()
        self._rules: list[Rule] = []

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            return self._control(environ, start_response)
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        with self._lock:
            rule = next((rule for rule in self._rules if rule.takes(request)), None)
        if rule is None:
            return self._application(environ, start_response)
        if rule.kind == "slow":
            time.sleep(rule.delay)
            return self._application(environ, start_response)
        if rule.kind == "status":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = ERROR.format(code=rule.code).encode()
            start_response(f"{rule.status} Injected", [("Content-Type", "application/xml"), _length(body)])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
        return self._altered(rule, environ, start_response)

    def _altered(self, rule: Rule, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        answered: list[Any] = []
        parts = self._application(environ, lambda status, headers, *rest: answered.append((status, headers)))
        body = bytearray(b"".join(parts))
        status, headers = answered[0]
        announced = len(body)
        if body and rule.kind == "flip":
            body[len(body) // 2] ^= 1
        elif rule.kind in ("truncate", "cut"):
            del body[len(body) // 2 :]
        length = announced if rule.kind == "cut" else len(body)
        start_response(status, [h for h in headers if h[0].lower() != "content-length"] + [_length(bytes(length))])
        return [bytes(body)]

    def _control(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        with self._lock:
            if environ["REQUEST_METHOD"] == "PUT":
                rules = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
                self._rules = [Rule(**rule) for rule in rules]
            body = json.dumps([rule.met for rule in self._rules]).encode()
        start_response("200 OK", [("Content-Type", "application/json"), _length(body)])
        return [body]


def _length(body: bytes) -> tuple[str, str]:
    return "Content-Length", str(len(body))


def main(host: str, port: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    application = FaultyStore(DomainDispatcherApplication(create_backend_app))
    run_simple(host, port, application, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
