"""What may lie between an application and MLflow's server."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Gateway:
    """A reverse proxy that notes what passes, refuses some of it, or changes it."""

    def __init__(self, port):
        self.seen = []
        self.rule = lambda path, body: body
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                gateway.seen.append((self.command, self.path, dict(self.headers)))
                changed = gateway.rule(self.path, body)
                if isinstance(changed, int):
                    self.answer(changed, {"Content-Type": "text/html"}, b"<html>no</html>")
                else:
                    self.answer(*self.forward(changed))

            def forward(self, body):
                headers = {**self.headers, "Content-Length": str(len(body))}
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                answer = response.status, dict(response.getheaders()), response.read()
                connection.close()
                return answer

            def answer(self, status, headers, body):
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_):
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    @property
    def uri(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def count(self, method, path):
        return sum(one[0] == method and path in one[1] for one in self.seen)
