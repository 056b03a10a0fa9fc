"""An index is searched in a browser: a page of our own, and the server that answers it."""
