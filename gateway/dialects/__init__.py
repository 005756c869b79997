"""One dialect a file: request in, events out, errors in its own envelope."""
