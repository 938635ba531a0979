"""The ceiling of the API's benchmark: a Flask view that returns a constant, under the API's own server."""

from flask import Flask, Response

app = Flask(__name__)
BODY = b'{"a":"constant"}'


@app.get("/")
@app.get("/health/live")
def constant() -> Response:
    """Return the same, whoever asks."""
    return Response(BODY, mimetype="application/json")
