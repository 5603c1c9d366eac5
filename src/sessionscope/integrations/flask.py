"""Flask: what an app with ``with_session`` on its views needs beside.

A view that is decorated with ``with_session()`` is one unit of work, which ends
before its response leaves the view. What is left for the app is the answer to
overload.
"""

from flask import Flask, Response, jsonify, request

from sessionscope.integrations import _refusal

__all__ = ["install"]


def install(app: Flask) -> None:
    """Answer PoolBusy and DatabaseUnavailable with 503 and Retry-After, DeadlineExceeded with 504.

    Unless the app has a handler of its own for them or for an error above
    them. A blueprint's handlers go before the app's.
    """

    def answer_refusal(error: Exception) -> Response:
        # They may have been added later.
        handlers = app.error_handler_spec[None][None]
        handler = _refusal.handler_of_the_app(type(error), handlers, answer_refusal)
        if handler is not None:
            answer: Response = app.make_response(app.ensure_sync(handler)(error))
            return answer
        status, body, headers = _refusal.refuse(error, request.path)
        response = jsonify(body)
        response.status_code = status
        response.headers.update(headers)
        return response

    for error in _refusal.ERRORS:
        if error not in app.error_handler_spec[None][None]:
            app.register_error_handler(error, answer_refusal)
